"""Several answers to each decision point: how likely one of k is right (pass@k), and how likely all k are (pass^k).

Of n answers c are right. Of the n over k ways to choose k of them, those that hold a right one are all but (n - c) over
k, and those that hold nothing else are c over k: so both are ratios of whole numbers, which are added over the points.
"""

from collections import Counter
from collections.abc import Iterable
from math import comb
from typing import Any

from gemma_dist.evaluate.metrics import MetricReport


def pass_at_k(lines: Iterable[Any], num_samples: int) -> dict[str, MetricReport]:
    """pass@k and pass^k of scored lines of samples.jsonl, `num_samples` of each point, for k = 1, 2, 4 … and
    `num_samples`."""
    right: Counter[tuple[int, int]] = Counter()
    for line in lines:
        right[line["trajectory"], line["turn"]] += line["score"]["right"]
    ks = sorted({*(2**power for power in range(num_samples.bit_length())), num_samples})
    rows: dict[str, MetricReport] = {}
    for k in ks:
        ways = comb(num_samples, k)
        rows[f"pass@{k}"] = _row(
            sum(ways - comb(num_samples - count, k) for count in right.values()), ways * len(right)
        )
        rows[f"pass^{k}"] = _row(sum(comb(count, k) for count in right.values()), ways * len(right))
    return rows


def _row(numerator: int, denominator: int) -> MetricReport:
    value = numerator / denominator if denominator else None
    return {"value": value, "numerator": numerator, "denominator": denominator, "low": None, "high": None}
