"""What evaluation reports: counts of scored decision points added up, every metric with numerator and denominator.

Ratios of ranks, slices or runs cannot be added, their numerators and denominators can: `add_up` keeps these, and
`make_report` divides once, at the end.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from gemma_dist.config import EvaluateConfig
from gemma_dist.evaluate.metrics import (
    METRICS,
    TRAJECTORY_METRICS,
    MetricReport,
    TrajectoryCounts,
    call_decision,
    divide,
    flat_counts,
    ratios,
)
from gemma_dist.evaluate.score import GoldCall, Score

SLICES = ("with_images", "without_images")


class Gold(TypedDict):
    """What the model was expected to write."""

    calls: list[GoldCall]
    content: str
    is_outline: bool  # of a test case that gives names of tools alone: arguments and content stand for nothing


class ScoredDecision(TypedDict):
    """One line of samples.jsonl: a decision point, what the model wrote at it, and the score."""

    id: str
    trajectory: int  # from 1
    turn: int  # number of the message, from 1
    sample: NotRequired[int]  # where several answers were taken: which one, from 0
    key: str  # a hash of all that the answer hangs on (`log.py`)
    num_images: int
    prompt_tokens: int
    output: str
    output_ids: list[int]
    output_tokens: int
    stopped: bool  # False: cut off at max_new_tokens
    parsed: dict[str, Any]  # `reading_to_json`
    gold: Gold
    score: Score


class Report(TypedDict):
    """report.json."""

    model: str
    adapter: str | None
    data: str
    settings: dict[str, Any]
    num_trajectories: int
    num_decision_points: int
    statuses: dict[str, int]
    call_decision: dict[str, dict[str, int]]
    metrics: dict[str, MetricReport]
    slices: dict[str, dict[str, MetricReport]]
    pass_at_k: NotRequired[dict[str, MetricReport]]  # where several answers were taken
    times: dict[str, Any]  # what differs from run to run: ranks, seconds, throughput


def add_up(decisions: Iterable[ScoredDecision]) -> dict[str, Counter[str]]:
    """Addable counts of whole trajectories: of all their decision points, and of each slice."""
    totals: dict[str, Counter[str]] = {"all": Counter(), **{name: Counter() for name in SLICES}}
    right: dict[tuple[int, int], bool] = {}  # trajectory, sample -> at every decision point
    for decision in decisions:
        score = decision["score"]
        counts = flat_counts(score["ratios"])
        totals["all"].update(counts)
        totals["with_images" if decision["num_images"] else "without_images"].update(counts)
        totals["all"][f"status.{score['status']}"] += 1
        trajectory = decision["trajectory"], decision.get("sample", 0)
        right[trajectory] = right.get(trajectory, True) and score["right"]
    for all_right in right.values():
        totals["all"].update(flat_counts(ratios(TRAJECTORY_METRICS, TrajectoryCounts(all_right))))
    return totals


def make_report(
    totals: Mapping[str, Mapping[str, int]],
    *,
    model: str,
    adapter: Path | None,
    data: Path,
    settings: EvaluateConfig,
    num_trajectories: int,
    num_decisions: int,
    times: dict[str, Any],
) -> Report:
    """The report of a run, from the counts of all its lines (`add_up`)."""
    statuses = {}
    for name, count in totals["all"].items():
        if name.startswith("status."):
            statuses[name.removeprefix("status.")] = count
    return {
        "model": model,
        "adapter": str(adapter) if adapter else None,
        "data": str(data),
        "settings": settings.model_dump(mode="json"),
        "num_trajectories": num_trajectories,
        "num_decision_points": num_decisions,
        "statuses": statuses,
        "call_decision": call_decision(totals["all"]),
        "metrics": divide(totals["all"]),
        "slices": {name: divide(totals[name]) for name in SLICES},
        "times": times,
    }


def summary(report: Report) -> Iterator[str]:
    """Lines for the terminal: each metric with what it divides."""
    yield f"{report['num_decision_points']} decision points of {report['num_trajectories']} trajectories"
    for metric in METRICS:
        found = report["metrics"][metric.name]
        if found["value"] is not None:
            share = f"{found['value']:7.1%}  {found['numerator']:>6} of {found['denominator']:<6}"
            yield f"  {metric.name:<18} {share}  {metric.sentence}"
