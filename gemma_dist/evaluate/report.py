"""What evaluation reports: report.json, from the lines of samples.jsonl alone.

Every metric has its numerator and denominator. The order of the lines, and how many ranks wrote them, change nothing.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NotRequired, TypedDict, get_args

from gemma_dist.data.read import Status
from gemma_dist.evaluate.beside import BesideReport, beside_lines, held_out, report_beside
from gemma_dist.evaluate.decision import ScoredDecision, Trajectory, steps_of, trajectory_of
from gemma_dist.evaluate.loss_report import LossReport, loss_lines, loss_report
from gemma_dist.evaluate.message import ServerReading, compare_readings
from gemma_dist.evaluate.metrics import MetricReport
from gemma_dist.evaluate.pass_at_k import metrics_of
from gemma_dist.evaluate.score import FAILURES
from gemma_dist.evaluate.slices import slice_up
from gemma_dist.evaluate.tally import MacroReport, add_up, macro, measure
from gemma_dist.evaluate.values import FaultKind


class SurvivalStep(TypedDict):
    """How trajectories fared at their n-th decision point."""

    step: int
    at_risk: int  # trajectories with such a point, right at all earlier ones
    failed: int  # of these: wrong at it
    survival: float  # share that is right so far, of trajectories as long (Kaplan-Meier)


class Report(TypedDict):
    """report.json. Where several answers are taken, each counts as one at its point, in a trajectory of its own."""

    model: str
    model_hash: str
    adapter: str | None
    adapter_hash: str | None
    data: str
    data_hash: str
    limit: int | None
    encoding: str  # a hash of template and tokenizer, and of what else makes prompts
    template_hash: NotRequired[str]  # of the chat template alone, where prompts were rendered here
    versions: dict[str, str]  # of the packages that computed
    settings: dict[str, Any]
    num_trajectories: int
    num_decision_points: int
    num_samples: int  # answers to each
    statuses: dict[str, int]
    call_decision: dict[str, dict[str, int]]
    metrics: dict[str, MetricReport]
    bfcl: dict[str, MetricReport]  # the same by BFCL's rule, where that may decide otherwise
    overall_by_category: dict[str, MacroReport | None]  # mean over categories, by each rule
    failures: dict[str, int]  # wrong points by what is wrong, most important first
    arg_errors: dict[str, int]  # wrong arguments of matched calls, by kind
    survival: list[SurvivalStep]
    confusion: dict[str, dict[str, int]]  # {gold's tool: {called tool: calls}}
    slices: dict[str, dict[str, dict[str, MetricReport]]]  # {slice: {value: metrics with something to judge}}
    loss: LossReport | None  # of gold's answers; None: not measured
    beside: NotRequired[BesideReport]  # probes and a general set, which count nowhere else
    server: NotRequired[dict[str, Any]]  # where one was asked: its address, and how it was
    server_reading: NotRequired[ServerReading]  # of a server of chat: how it read the answers, beside how we would
    times: dict[str, Any]  # what differs from run to run, and nothing else does: command, ranks, seconds, throughput


def make_report(header: Mapping[str, Any], decisions: Iterable[ScoredDecision]) -> Report:
    """The report of all scored decision points of a run.

    Args:
        header: what the points do not say: what was evaluated (`describe_run`), settings and times.
    """
    everything = sorted(decisions, key=lambda decision: (*trajectory_of(decision), decision["turn"]))
    decisions = held_out(everything)
    num_samples = 1 + max((decision["sample"] for decision in decisions), default=0)
    metrics = metrics_of(num_samples)
    strict, bfcl = measure(add_up(decisions), metrics), measure(add_up(decisions, "bfcl"), metrics)
    kept = {name for name, metric in bfcl.items() if metric["denominator"]}
    steps = steps_of(decisions)
    computed = {
        "num_trajectories": len({decision["trajectory"] for decision in decisions}),
        "num_decision_points": len({(decision["trajectory"], decision["turn"]) for decision in decisions}),
        "num_samples": num_samples,
        "statuses": _counts((decision["score"]["status"] for decision in decisions), get_args(Status)),
        "call_decision": call_decision(strict),
        "metrics": strict,
        "bfcl": {name: bfcl[name] for name in bfcl if name in kept},
        "overall_by_category": {"strict": macro(decisions), "bfcl": macro(decisions, "bfcl")},
        "failures": _counts((decision["score"]["failure"] for decision in decisions), FAILURES),
        "arg_errors": arg_errors(decisions),
        "survival": survival(decisions, steps),
        "confusion": confusion(decisions),
        "slices": {
            name: {value: judged(measure(add_up(found, whole=False))) for value, found in values.items()}
            for name, values in slice_up(decisions, steps).items()
        },
        "loss": loss_report(decisions),
    }
    beside, reading = report_beside(everything), compare_readings(decisions)
    others = {"beside": beside, "server_reading": reading}
    given = {key: value for key, value in header.items() if key not in (*computed, *others, "times")}
    computed |= {name: found for name, found in others.items() if found is not None}
    return {**given, **computed, "times": header["times"]}  # type: ignore[typeddict-item]


def judged(metrics: Mapping[str, MetricReport]) -> dict[str, MetricReport]:
    """The metrics that have something to judge."""
    return {name: metric for name, metric in metrics.items() if metric["denominator"]}


def _counts(found: Iterable[str], names: Iterable[str]) -> dict[str, int]:
    """How often each name was found, in the order of the names; those that were not are left out."""
    counts = Counter(found)
    return {name: counts[name] for name in names if counts[name]}


def call_decision(metrics: Mapping[str, MetricReport]) -> dict[str, dict[str, int]]:
    """The two by two table of decision points: {gold: {output: points}} with "call" and "none" on both sides."""
    points = metrics["overall"]["denominator"]
    wanted, both = metrics["call_recall"]["denominator"], metrics["call_recall"]["numerator"]
    attempted = metrics["call_precision"]["denominator"]
    return {
        "call": {"call": both, "none": wanted - both},
        "none": {"call": attempted - both, "none": points - wanted - attempted + both},
    }


def arg_errors(decisions: Iterable[ScoredDecision]) -> dict[str, int]:
    """Wrong arguments of calls that are matched with a gold call of the same name, by kind; all kinds."""
    kinds = [error["kind"] for decision in decisions for error in decision["score"]["errors"]]
    counts = Counter(kinds)
    return {kind: counts[kind] for kind in get_args(FaultKind)}


def survival(decisions: Sequence[ScoredDecision], steps: Sequence[int]) -> list[SurvivalStep]:
    """At which step trajectories first fail. Those that end right leave the curve without being counted as failed."""
    failed_before: set[Trajectory] = set()
    at_risk: Counter[int] = Counter()
    failed: Counter[int] = Counter()
    for decision, step in zip(decisions, steps, strict=True):
        trajectory = trajectory_of(decision)
        if trajectory in failed_before:
            continue
        at_risk[step] += 1
        if not decision["score"]["right"]:
            failed[step] += 1
            failed_before.add(trajectory)
    curve: list[SurvivalStep] = []
    share = 1.0
    for step in sorted(at_risk):
        share *= 1 - failed[step] / at_risk[step]
        row = SurvivalStep(step=step, at_risk=at_risk[step], failed=failed[step], survival=round(share, 6))
        curve.append(row)
    return curve


def confusion(decisions: Iterable[ScoredDecision]) -> dict[str, dict[str, int]]:
    """Which tool was called where gold calls which, with "(no call)", "(not offered)" and "(malformed)" beside them."""
    counts = Counter((gold, called) for decision in decisions for gold, called in decision["score"]["confusion"])
    table: dict[str, dict[str, int]] = {}
    for (gold, called), count in sorted(counts.items()):
        table.setdefault(gold, {})[called] = count
    return table


def summary(report: Report) -> Iterator[str]:
    """Lines for the terminal: each metric with what it divides."""
    answers = f", {report['num_samples']} answers to each" if report["num_samples"] > 1 else ""
    yield f"{report['num_decision_points']} decision points of {report['num_trajectories']} trajectories{answers}"
    for metric in metrics_of(report["num_samples"]):
        found = report["metrics"][metric.name]
        if found["value"] is not None:
            share = f"{found['value']:7.1%}  {found['numerator']:>6} of {found['denominator']:<6}"
            yield f"  {metric.name:<18} {share}  {metric.sentence}"
    if report["loss"] is not None:
        yield from loss_lines(report["loss"])
    if (beside := report.get("beside")) is not None:
        yield from beside_lines(report["metrics"], beside)
