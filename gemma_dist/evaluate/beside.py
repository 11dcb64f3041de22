"""The parts of a run that stand beside the held-out rows, and over-calling: calls where none is right.

A part is a key of lines in samples.jsonl. What is reported of the held-out rows counts no other part, so probes and a
general set are added without a change of any other number.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypedDict

from gemma_dist.evaluate.decision import ScoredDecision
from gemma_dist.evaluate.metrics import MetricReport
from gemma_dist.evaluate.tally import add_up, measure

HELD_OUT = ""
WITHHELD, SIMILAR, UNNEEDED, GENERAL = "withheld", "similar", "unneeded", "general"
PROBES = (WITHHELD, SIMILAR, UNNEEDED)
PARTS = {
    HELD_OUT: "the held-out rows",
    WITHHELD: "gold's tool withheld",
    SIMILAR: "similar tools beside it",
    UNNEEDED: "other tools where none is needed",
    GENERAL: "the general set",
}
OVER_CALLING = "over_calling"
SHOWN = (OVER_CALLING, "abstain_acc", "tool_set_exact", "overall")  # of each part


class BesideReport(TypedDict):
    """What stands beside the held-out rows."""

    num_points: int  # with several answers to each, counted once
    over_calling: MetricReport  # of all parts, the held-out rows among them
    parts: dict[str, dict[str, MetricReport]]  # {part: metrics with something to judge}


def part_of(line: ScoredDecision) -> str:
    """The part that a line counts in."""
    return line.get("part", HELD_OUT)


def held_out(lines: Iterable[ScoredDecision]) -> list[ScoredDecision]:
    """The lines of the held-out rows."""
    return [line for line in lines if part_of(line) == HELD_OUT]


def by_part(lines: Sequence[ScoredDecision]) -> dict[str, list[ScoredDecision]]:
    """The lines of each part that is there, the held-out rows first."""
    parts = {part: [line for line in lines if part_of(line) == part] for part in PARTS}
    return {part: found for part, found in parts.items() if found}


def in_both(
    before: Sequence[ScoredDecision], after: Sequence[ScoredDecision]
) -> tuple[list[ScoredDecision], list[ScoredDecision]]:
    """The lines of two runs in the parts that both have. Trajectories have the numbers of the second: a part that one
    run alone asked moves those of the parts behind it."""
    firsts, seconds = (
        {part: min(line["trajectory"] for line in found) for part, found in by_part(lines).items()}
        for lines in (before, after)
    )
    moved = {part: seconds[part] - firsts[part] for part in firsts.keys() & seconds.keys()}
    return (
        [
            {**line, "trajectory": line["trajectory"] + moved[part_of(line)]}
            for line in before
            if part_of(line) in moved
        ],
        [line for line in after if part_of(line) in moved],
    )


def report_beside(lines: Sequence[ScoredDecision]) -> BesideReport | None:
    """What stands beside the held-out rows of a run; None: nothing does."""
    parts = by_part(lines)
    if parts.keys() <= {HELD_OUT}:
        return None
    measured = {
        part: {name: metric for name, metric in measure(add_up(found, whole=False)).items() if metric["denominator"]}
        for part, found in parts.items()
    }
    others = {(line["trajectory"], line["turn"]) for line in lines if part_of(line) != HELD_OUT}
    return {
        "num_points": len(others),
        "over_calling": measure(add_up(lines, whole=False))[OVER_CALLING],
        "parts": {part: found for part, found in measured.items() if part != HELD_OUT},
    }


def beside_lines(held_out: Mapping[str, MetricReport], beside: BesideReport) -> Iterator[str]:
    """Lines for the terminal: each part's metrics; then over-calling in one line."""
    yield f"beside the held-out rows: {beside['num_points']} decision points"
    for part, found in beside["parts"].items():
        for name in SHOWN:
            if metric := found.get(name):
                yield f"  {f'{part} {name}':<24} {_share(metric):>7}  {_counts(metric)}"
    yield over_calling_line(held_out, beside)


def over_calling_line(held_out: Mapping[str, MetricReport], beside: BesideReport) -> str:
    """How often the model calls where no call is right, in all and in each part."""
    each = {HELD_OUT: held_out, **beside["parts"]}
    parts = [f"{PARTS[part]} {_counts(found[OVER_CALLING])}" for part, found in each.items() if _judges(found)]
    total = beside["over_calling"]
    if not parts:
        return "over-calling: a call is right at every point"
    return f"over-calling, where no call is right: {_share(total)}, {_counts(total)} ({', '.join(parts)})"


def beside_rows(held_out: Mapping[str, MetricReport], beside: BesideReport) -> list[list[object]]:
    """The rows of a table with the columns part and SHOWN."""
    each = {HELD_OUT: held_out, **beside["parts"]}
    return [[PARTS[part], *(_cell(found.get(name)) for name in SHOWN)] for part, found in each.items()]


def _judges(found: Mapping[str, MetricReport]) -> bool:
    return OVER_CALLING in found and found[OVER_CALLING]["denominator"] > 0


def _cell(metric: MetricReport | None) -> str:
    return f"{_share(metric)} ({_counts(metric)})" if metric and metric["denominator"] else ""


def _share(metric: MetricReport) -> str:
    return "none" if metric["value"] is None else f"{metric['value']:.1%}"


def _counts(metric: MetricReport) -> str:
    return f"{metric['numerator']} of {metric['denominator']}"
