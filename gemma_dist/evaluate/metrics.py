"""What evaluation measures: one row a metric, counted at each decision point, added, and divided once at the end.

Every metric is a ratio of two sums, so the order of decision points and their partition over ranks change nothing;
where there was nothing to judge the value is None. A new metric is a new row (and, if need be, a new count).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypedDict, TypeVar

from gemma_dist.evaluate.intervals import wilson

Counted = TypeVar("Counted")

# Metric -> [numerator, denominator].
Ratios = dict[str, list[int]]


@dataclass(frozen=True)
class DecisionCounts:
    """What is counted at one decision point. Calls of the output are those that could be read."""

    readable: bool  # the status is neither malformed nor truncated
    attempted: bool  # the output attempts a call, readable or not
    abstains: bool  # readable text, not empty, without an attempt
    same_text: bool  # its text is gold's, or one of the accepted answers
    says_answer: bool  # its text holds it, or one of these
    has_answer: bool  # gold says which text is right
    gold_calls: int
    calls: int
    matched: int  # pairs of a gold call and a call of the same name
    exact: int  # those whose arguments are all right, too
    gold_arguments: int  # of gold calls that are matched, without those that may be left out and are
    arguments: int  # of calls that are matched, without those that gold ignores
    right_arguments: int  # wanted by gold, and with a value that it takes
    offered_any: bool  # the sample declares tools
    not_offered: int  # calls of a tool that is not among them
    judged: int  # calls of offered tools with a usable schema
    fitting: int  # those that fit it
    is_outline: bool = False  # gold gives the names of calls alone, and no text
    any_call: bool = False  # gold is any call of an offered tool

    @property
    def wants_call(self) -> bool:
        return self.gold_calls > 0 or self.any_call

    @property
    def wants_several(self) -> bool:
        return self.gold_calls > 1

    @property
    def attempts_wanted_call(self) -> bool:
        """Gold and output both call, whatever they call."""
        return self.wants_call and self.attempted

    @property
    def abstains_rightly(self) -> bool:
        return not self.wants_call and self.abstains

    @property
    def all_names_right(self) -> bool:
        """The same tools as often as gold, in any order, and no others; arguments aside."""
        if self.any_call:
            return self.readable and self.attempted and not self.not_offered
        return self.wants_call and self.readable and self.matched == self.gold_calls == self.calls

    @property
    def all_exact(self) -> bool:
        """Gold's calls with gold's arguments, in any order, and no others."""
        return self.wants_call and self.readable and self.exact == self.gold_calls == self.calls

    @property
    def named_calls(self) -> int:
        """Calls whose names gold has an opinion on."""
        return 0 if self.any_call else self.calls

    @property
    def gold_calls_with_arguments(self) -> int:
        return 0 if self.is_outline else self.gold_calls

    @property
    def right(self) -> bool:
        """What `overall` counts: where gold calls, all its calls; elsewhere, some text (not: the right text)."""
        if not self.wants_call:
            return self.abstains
        return self.all_names_right if self.is_outline else self.all_exact


@dataclass(frozen=True)
class TrajectoryCounts:
    """What is counted of one trajectory."""

    points: int
    right_points: int

    @property
    def right(self) -> bool:
        return self.points == self.right_points


@dataclass(frozen=True)
class PairCounts:
    """What is counted of one pair: rows of the same words and other images, with other answers."""

    right: bool  # every member, at every decision point


@dataclass(frozen=True)
class Metric(Generic[Counted]):
    """A ratio of two sums over what was counted."""

    name: str
    sentence: str  # what is divided by what
    numerator: Callable[[Counted], int]
    denominator: Callable[[Counted], int]
    is_share: bool = True  # of trials, so that it has a Wilson interval
    is_fault: bool = False  # the less, the better


# "Calls" alone means calls that could be read; "points" means decision points. Test cases that give the names of tools
# alone count in no metric of arguments or texts, and are right (`overall`) as tool_set_exact says.
DECISION_METRICS: Sequence[Metric[DecisionCounts]] = (
    Metric(
        "parse_ok",
        "points neither malformed nor truncated / points",
        lambda point: point.readable,
        lambda _: 1,
    ),
    Metric(
        "call_accuracy",
        "points where gold and output both call or both do not / points",
        lambda point: point.wants_call == point.attempted,
        lambda _: 1,
    ),
    Metric(
        "call_precision",
        "gold calls too / the output attempts a call",
        lambda point: point.attempts_wanted_call,
        lambda point: point.attempted,
    ),
    Metric(
        "call_recall",
        "the output attempts a call too / gold calls",
        lambda point: point.attempts_wanted_call,
        lambda point: point.wants_call,
    ),
    Metric(
        "call_f1",
        "harmonic mean of call_precision and call_recall",
        lambda point: 2 * point.attempts_wanted_call,
        lambda point: point.wants_call + point.attempted,
        is_share=False,
    ),
    Metric(
        "abstain_acc",
        "readable text, not empty, without an attempt / gold has no call",
        lambda point: point.abstains_rightly,
        lambda point: not point.wants_call,
    ),
    Metric(
        "over_calling",
        "the output attempts a call / gold has no call",
        lambda point: point.attempted and not point.wants_call,
        lambda point: not point.wants_call,
        is_fault=True,
    ),
    Metric(
        "relevance_acc",
        "the output attempts a call / gold has calls",
        lambda point: point.attempts_wanted_call,
        lambda point: point.wants_call,
    ),
    Metric(
        "tool_set_exact",
        "the same names as often / gold has calls",
        lambda point: point.all_names_right,
        lambda point: point.wants_call,
    ),
    Metric(
        "tool_precision",
        "called names that gold calls too / predicted calls",
        lambda point: point.matched,
        lambda point: point.named_calls,
    ),
    Metric(
        "tool_recall",
        "gold names that were called / gold calls",
        lambda point: point.matched,
        lambda point: point.gold_calls,
    ),
    Metric(
        "tool_f1",
        "harmonic mean of tool_precision and tool_recall",
        lambda point: 2 * point.matched,
        lambda point: point.gold_calls + point.named_calls,
        is_share=False,
    ),
    Metric(
        "hallucinated_tool",
        "calls of a tool that was not offered / predicted calls, where tools are declared",
        lambda point: point.not_offered if point.offered_any else 0,
        lambda point: point.calls if point.offered_any else 0,
        is_fault=True,
    ),
    Metric(
        "schema_valid",
        "calls that fit the tool's schema / predicted calls of offered tools with a usable schema",
        lambda point: point.fitting,
        lambda point: point.judged,
    ),
    Metric(
        "arg_precision",
        "right arguments / arguments of predicted calls that are matched",
        lambda point: point.right_arguments,
        lambda point: point.arguments,
    ),
    Metric(
        "arg_recall",
        "right arguments / arguments of gold calls that are matched",
        lambda point: point.right_arguments,
        lambda point: point.gold_arguments,
    ),
    Metric(
        "arg_f1",
        "harmonic mean of arg_precision and arg_recall",
        lambda point: 2 * point.right_arguments,
        lambda point: point.gold_arguments + point.arguments,
        is_share=False,
    ),
    Metric(
        "call_exact",
        "gold calls with a partner of the same name and right arguments / gold calls",
        lambda point: point.exact,
        lambda point: point.gold_calls_with_arguments,
    ),
    Metric(
        "sample_exact",
        "every call exact, none too many, status ok / gold has calls",
        lambda point: point.all_exact,
        lambda point: point.gold_calls_with_arguments > 0,
    ),
    Metric(
        "parallel_exact",
        "sample_exact / gold has two or more calls",
        lambda point: point.all_exact and point.wants_several,
        lambda point: point.gold_calls_with_arguments > 1,
    ),
    Metric(
        "count_match",
        "as many calls as gold / gold has two or more calls",
        lambda point: point.wants_several and point.readable and point.gold_calls == point.calls,
        lambda point: point.wants_several,
    ),
    Metric(
        "answer_exact",
        "readable text equal to gold's, or to an accepted answer / gold has no call",
        lambda point: point.abstains_rightly and point.same_text,
        lambda point: not point.wants_call and point.has_answer,
    ),
    Metric(
        "answer_contains",
        "readable text that holds gold's, or an accepted answer / gold has no call",
        lambda point: point.abstains_rightly and point.says_answer,
        lambda point: not point.wants_call and point.has_answer,
    ),
    Metric(
        "overall",
        "sample_exact where gold calls, abstain_acc elsewhere / points",
        lambda point: point.right,
        lambda _: 1,
    ),
)
# What BFCL's rule may decide otherwise.
BFCL_METRICS: Sequence[Metric[DecisionCounts]] = tuple(
    metric
    for metric in DECISION_METRICS
    if metric.name.startswith(("arg_", "call_exact", "sample_exact", "parallel_", "abstain_", "relevance_", "overall"))
)
TRAJECTORY_METRICS: Sequence[Metric[TrajectoryCounts]] = (
    Metric(
        "step_acc",
        "points that are right (overall) / points of trajectories with two or more",
        lambda trajectory: trajectory.right_points if trajectory.points > 1 else 0,
        lambda trajectory: trajectory.points if trajectory.points > 1 else 0,
    ),
    Metric(
        "trajectory_exact",
        "trajectories with every point right (overall) / trajectories",
        lambda trajectory: trajectory.right,
        lambda _: 1,
    ),
)
PAIR_METRICS: Sequence[Metric[PairCounts]] = (
    Metric(
        "image_pair_acc",
        "pairs with every member right (overall) / pairs of the same words and other images",
        lambda pair: pair.right,
        lambda _: 1,
    ),
)
METRICS: Sequence[Metric[DecisionCounts] | Metric[TrajectoryCounts] | Metric[PairCounts]] = (
    *DECISION_METRICS,
    *TRAJECTORY_METRICS,
    *PAIR_METRICS,
)


class MetricReport(TypedDict):
    """One metric of a report. Of shares, low and high are the 95 % Wilson interval, which takes decision points as
    independent; cluster_low and cluster_high are that of the bootstrap over trajectories. All None at 0 / 0."""

    value: float | None
    numerator: int
    denominator: int
    low: float | None
    high: float | None
    cluster_low: float | None
    cluster_high: float | None


def ratios(metrics: Iterable[Metric[Counted]], counted: Counted) -> Ratios:
    """Numerator and denominator of each metric; those with nothing to judge are absent."""
    found = {}
    for metric in metrics:
        denominator = int(metric.denominator(counted))
        if denominator:
            found[metric.name] = [int(metric.numerator(counted)), denominator]
    return found


def flat_counts(ratios: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Numerators and denominators under flat names, to be added over decision points, trajectories and ranks."""
    counts = {}
    for name, (numerator, denominator) in ratios.items():
        counts[f"{name}.numerator"] = numerator
        counts[f"{name}.denominator"] = denominator
    return counts


def divide(totals: Mapping[str, int], metrics: Iterable[Metric[Any]] = METRICS) -> dict[str, MetricReport]:
    """Divide the summed counts of each metric; the intervals of the bootstrap are left to `tally.py`."""
    report: dict[str, MetricReport] = {}
    for metric in metrics:
        numerator = totals.get(f"{metric.name}.numerator", 0)
        denominator = totals.get(f"{metric.name}.denominator", 0)
        row: MetricReport = {
            "value": numerator / denominator if denominator else None,
            "numerator": numerator,
            "denominator": denominator,
            "low": None,
            "high": None,
            "cluster_low": None,
            "cluster_high": None,
        }
        if denominator and metric.is_share:
            row["low"], row["high"] = wilson(numerator, denominator)
        report[metric.name] = row
    return report
