"""Counts of scored decision points added up by cluster, and divided once, with intervals.

Ratios cannot be added, their numerators and denominators can. A cluster is what the bootstrap draws as a whole: the
rows of a pair, else the decision points of one row.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np

from gemma_dist.evaluate.decision import ScoredDecision, Trajectory, cluster_of, trajectory_of
from gemma_dist.evaluate.intervals import divide_each, middle_95, resample, wilson
from gemma_dist.evaluate.metrics import (
    METRICS,
    PAIR_METRICS,
    TRAJECTORY_METRICS,
    Metric,
    MetricReport,
    PairCounts,
    TrajectoryCounts,
    divide,
    flat_counts,
    ratios,
)
from gemma_dist.evaluate.pass_at_k import PointCounts, pass_metrics
from gemma_dist.evaluate.score import RuleScore, Score

Rule = Literal["strict", "bfcl"]
Sums = dict[str, Counter[str]]  # cluster -> flat name of a count -> its sum


class MacroReport(TypedDict):
    """The mean of a metric over categories, each with the same weight."""

    value: float
    num_categories: int
    cluster_low: float | None
    cluster_high: float | None


def by_rule(score: Score, rule: Rule) -> Score | RuleScore:
    """The score by a rule."""
    return score if rule == "strict" else score["bfcl"]


def add_up(decisions: Iterable[ScoredDecision], rule: Rule = "strict", *, whole: bool = True) -> Sums:
    """Addable counts by cluster, clusters in order.

    Args:
        whole: the decisions are whole trajectories with all their answers, so that trajectories, pairs and the answers
            to each point are counted, too.
    """
    sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
    trajectories: dict[Trajectory, list[bool]] = {}
    clusters: dict[Trajectory, str] = {}
    pairs: dict[tuple[str, int], dict[int, bool]] = {}
    points: dict[tuple[int, int], list[bool]] = {}
    for decision in decisions:
        score, trajectory = by_rule(decision["score"], rule), trajectory_of(decision)
        clusters[trajectory] = cluster_of(decision)
        sums[clusters[trajectory]].update(flat_counts(score["ratios"]))
        trajectories.setdefault(trajectory, []).append(score["right"])
        points.setdefault((decision["trajectory"], decision["turn"]), []).append(score["right"])
        if decision["pair"]:
            members = pairs.setdefault((decision["pair"], trajectory[1]), {})
            members[trajectory[0]] = members.get(trajectory[0], True) and score["right"]
    if whole:
        for trajectory, right in trajectories.items():
            counted = TrajectoryCounts(len(right), sum(right))
            sums[clusters[trajectory]].update(flat_counts(ratios(TRAJECTORY_METRICS, counted)))
        for (pair, _), members in pairs.items():
            if len(members) > 1:
                counted_pair = PairCounts(all(members.values()))
                sums[f"pair {pair}"].update(flat_counts(ratios(PAIR_METRICS, counted_pair)))
        for (number, _), right in points.items():
            found = ratios(pass_metrics(len(right)), PointCounts(len(right), sum(right)))
            sums[clusters[number, 0]].update(flat_counts(found))
    return {cluster: sums[cluster] for cluster in sorted(sums)}


def measure(sums: Sums, metrics: Sequence[Metric[Any]] = METRICS) -> dict[str, MetricReport]:
    """Each metric of these counts, with both intervals.

    Where all is right, or nothing, every draw says the same; then each cluster counts as one trial (Wilson).
    """
    report = divide(sum(sums.values(), Counter()), metrics)
    names = [name for name, metric in report.items() if metric["denominator"]]
    if names:
        _, denominators = columns(sums, names)
        num_clusters = (denominators > 0).sum(0).tolist()
        for name, clusters, values in zip(names, num_clusters, _resampled(sums, names).T, strict=True):
            found = report[name]
            interval = middle_95(values)
            if found["value"] in (0, 1) and found["low"] is not None:
                interval = wilson(clusters * int(found["value"]), clusters)
            found["cluster_low"], found["cluster_high"] = interval or (None, None)
    return report


def macro(decisions: Sequence[ScoredDecision], rule: Rule = "strict") -> MacroReport | None:
    """The mean of `overall` over the categories that rows name; None where they name none, or none has something to
    judge."""
    categories = sorted({decision["category"] for decision in decisions})
    if categories in ([], [""]):
        return None
    counts: Sums = {}
    for decision in decisions:
        numerator, denominator = by_rule(decision["score"], rule)["ratios"].get("overall", (0, 0))
        column = flat_counts({decision["category"]: (numerator, denominator)})
        counts.setdefault(cluster_of(decision), Counter()).update(column)
    sums = {cluster: counts[cluster] for cluster in sorted(counts)}
    judged = [category for category in categories if sum(c[f"{category}.denominator"] for c in sums.values())]
    if not judged:
        return None
    numerators, denominators = columns(sums, judged)
    value = divide_each(numerators.sum(0), denominators.sum(0)).mean()
    low, high = middle_95(np.nanmean(_resampled(sums, judged), axis=1)) or (None, None)
    return {"value": float(value), "num_categories": len(judged), "cluster_low": low, "cluster_high": high}


def columns(sums: Mapping[str, Mapping[str, int]], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators (C, M) of C clusters and M metrics. In float64, as are the sums of draws: choices of
    answers are too many for whole numbers of 8 bytes."""
    kinds = ("numerator", "denominator")
    table = [[[counts.get(f"{name}.{kind}", 0) for name in names] for kind in kinds] for counts in sums.values()]
    both = np.array(table, dtype=np.float64).reshape(len(sums), 2, len(names))
    return both[:, 0], both[:, 1]


def _resampled(sums: Sums, names: Sequence[str]) -> np.ndarray:
    """The metrics of clusters drawn with replacement (RESAMPLES, M); NaN where a draw has nothing to judge."""
    return divide_each(*resample(*columns(sums, names)))
