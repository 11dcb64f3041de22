"""Several answers to each decision point: how likely one of k is right (pass@k), and how likely all k are (pass^k).

Of n answers c are right. Of the n over k ways to choose k of them, those that hold a right one are all but (n - c) over
k, and those that hold nothing else are c over k: so both are ratios of whole numbers, rows as in `metrics.py`, which
are added over the points. pass@1 and pass^1 are `overall`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import comb
from typing import Any

from gemma_dist.evaluate.metrics import METRICS, Metric


@dataclass(frozen=True)
class PointCounts:
    """What is counted of the answers to one decision point."""

    answers: int
    right: int


@cache
def pass_metrics(num_samples: int) -> tuple[Metric[PointCounts], ...]:
    """pass@k and pass^k of so many answers to each point, for k = 2, 4, 8 ... and all of them; of one answer none."""
    ks = {2**power for power in range(1, num_samples.bit_length())} | {num_samples}
    return tuple(metric for k in sorted(ks - {1}) for metric in (_any_right(k), _all_right(k)))


def metrics_of(num_samples: int) -> Sequence[Metric[Any]]:
    """Every metric of a run with so many answers to each point."""
    return (*METRICS, *pass_metrics(num_samples))


def _any_right(k: int) -> Metric[PointCounts]:
    return Metric(
        f"pass@{k}",
        f"ways to choose {k} answers to a point of which one is right (overall) / ways to choose {k}",
        lambda point: comb(point.answers, k) - comb(point.answers - point.right, k),
        lambda point: comb(point.answers, k),
        is_share=False,
    )


def _all_right(k: int) -> Metric[PointCounts]:
    return Metric(
        f"pass^{k}",
        f"ways to choose {k} answers to a point that are all right (overall) / ways to choose {k}",
        lambda point: comb(point.right, k),
        lambda point: comb(point.answers, k),
        is_share=False,
    )
