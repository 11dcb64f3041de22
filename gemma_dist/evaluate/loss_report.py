"""The teacher-forced loss of a run, added up by kind of token, and that of two runs beside one another. No torch here.

    loss                nats / all tokens that gold writes
    loss_call …         the same of one kind (`data/kinds.py`)
    token_accuracy      tokens that were the likeliest / all

The intervals are those of the bootstrap by clusters, as of every other metric. What is not finite, as of a model that
answers NaN, is null in report.json, and "not finite" in words.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TypedDict

import numpy as np

from gemma_dist.data.kinds import KINDS
from gemma_dist.evaluate.decision import KindLoss, ScoredDecision, cluster_of
from gemma_dist.evaluate.intervals import divide_each, middle_95, resample

NAMES = ("loss", *(f"loss_{kind}" for kind in KINDS.values()), "token_accuracy")
SENTENCES = {
    "loss": "nats a token that gold writes, the history being gold's",
    "token_accuracy": "tokens of gold that the model finds likeliest",
}


class LossMetric(TypedDict):
    """One of NAMES."""

    value: float | None  # None: not finite
    numerator: float | None  # nats, or tokens
    denominator: int  # tokens
    cluster_low: float | None
    cluster_high: float | None


class LossReport(TypedDict):
    """`loss` in report.json."""

    num_points: int  # whose gold is a whole answer
    num_others: int  # that have none: they say what a right answer has
    metrics: dict[str, LossMetric]  # those with tokens


class LossChange(TypedDict):
    """One of NAMES before and after."""

    before: float
    after: float
    difference: float
    low: float | None  # 95 % of the difference
    high: float | None


def loss_report(decisions: Iterable[ScoredDecision]) -> LossReport | None:
    """Of all decision points of a run; None: it was not measured."""
    points = [decision for decision in decisions if decision["sample"] == 0 and "loss" in decision]
    if not points:
        return None
    forced = [point for point in points if point["loss"]]
    numerators, denominators = _columns(forced)
    metrics: dict[str, LossMetric] = {}
    if forced:
        values = divide_each(*resample(numerators, denominators))
        for column, name in enumerate(NAMES):
            numerator, denominator = float(numerators[:, column].sum()), int(denominators[:, column].sum())
            if denominator:
                low, high = _interval_of(values[:, column])
                numerator = round(numerator, 6)
                metrics[name] = {
                    "value": _finite(numerator / denominator),
                    "numerator": _finite(numerator),
                    "denominator": denominator,
                    "cluster_low": low,
                    "cluster_high": high,
                }
    return {"num_points": len(forced), "num_others": len(points) - len(forced), "metrics": metrics}


def loss_changes(before: Sequence[ScoredDecision], after: Sequence[ScoredDecision]) -> dict[str, LossChange] | None:
    """The losses of two runs of the same points, at those that both measured; None: there are none."""
    both = [
        pair for pair in zip(before, after, strict=True) if all(one["sample"] == 0 and one.get("loss") for one in pair)
    ]
    if not both:
        return None
    tables = [_columns([pair[side] for pair in both]) for side in (0, 1)]
    values = [divide_each(numerators.sum(0), denominators.sum(0)) for numerators, denominators in tables]
    drawn = resample(*tables[0], *tables[1])
    differences = divide_each(drawn[2], drawn[3]) - divide_each(drawn[0], drawn[1])
    changes: dict[str, LossChange] = {}
    for column, name in enumerate(NAMES):
        one, two = (float(each[column]) for each in values)
        if np.isfinite([one, two]).all():
            low, high = _interval_of(differences[:, column])
            changes[name] = {"before": one, "after": two, "difference": round(two - one, 9), "low": low, "high": high}
    return changes


def _columns(points: Sequence[ScoredDecision]) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators (C, M) of C clusters, in order, and the M of NAMES."""
    clusters = sorted({cluster_of(point) for point in points})
    numerators, denominators = np.zeros((2, len(clusters), len(NAMES)))
    row_of = {cluster: row for row, cluster in enumerate(clusters)}
    for point in points:
        row = row_of[cluster_of(point)]
        found: dict[str, KindLoss] = point["loss"] or {}
        for kind, sums in found.items():
            for name in ("loss", f"loss_{kind}"):
                numerators[row, NAMES.index(name)] += sums["nll"]
                denominators[row, NAMES.index(name)] += sums["tokens"]
            numerators[row, -1] += sums["right"]
            denominators[row, -1] += sums["tokens"]
    return numerators, denominators


def _interval_of(values: np.ndarray) -> tuple[float | None, float | None]:
    """`middle_95`; no ends where one of them is not finite, or there is none."""
    low, high = middle_95(values) or (math.nan, math.nan)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (None, None)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _said(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def loss_lines(report: LossReport) -> Iterable[str]:
    """Lines for the terminal."""
    others = f"; {report['num_others']} have no whole answer" if report["num_others"] else ""
    yield f"loss of gold's answers at {report['num_points']} decision points{others}"
    for name, found in report["metrics"].items():
        line = f"  {name:<18} {_said(found['value']):>7}  of {found['denominator']:,} tokens  {SENTENCES.get(name, '')}"
        yield line.rstrip()


def loss_rows(report: LossReport) -> list[list[object]]:
    """Rows of a table: metric, value, interval, tokens."""
    rows: list[list[object]] = []
    for name, found in report["metrics"].items():
        rows.append([name, _said(found["value"]), _interval(found["cluster_low"], found["cluster_high"])])
        rows[-1].append(f"{found['denominator']:,} tokens")
    return rows


def change_rows(changes: dict[str, LossChange]) -> list[list[object]]:
    """Rows of a table: metric, before, after, difference, interval."""
    return [
        [
            name,
            f"{found['before']:.4f}",
            f"{found['after']:.4f}",
            f"{found['difference']:+.4f}",
            _interval(found["low"], found["high"], sign="+"),
        ]
        for name, found in changes.items()
    ]


def _interval(low: float | None, high: float | None, *, sign: str = "") -> str:
    return "" if low is None or high is None else f"{low:{sign}.4f} to {high:{sign}.4f}"
