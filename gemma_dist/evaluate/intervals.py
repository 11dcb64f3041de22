"""How sure a share is, and how sure a difference: arithmetic on counts, without the model and without torch.

Decision points of one trajectory are not independent, so whole trajectories (`cluster`) are drawn with replacement, and
every metric is divided anew: the bootstrap by clusters. Two runs of the same points are drawn together, so that what is
hard for both does not blur their difference. The draws are seeded: the same counts give the same interval.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

RESAMPLES = 1000
SEED = 20250607  # of the draws; no setting, so that two reports of one run agree
Z = 1.959964  # 95 % of a normal distribution lie within this many standard errors
Z_POWER = 0.841621  # 80 % lie below
DRAWN_AT_ONCE = 2**22  # of draws, 4 bytes each
MIN_DISCORDANT = (
    6  # the fewest points, all changed in one direction, that McNemar's test calls a change: 2 / 2^6 < 0.05
)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927)."""
    share, weight = successes / trials, Z * Z / trials
    middle = share + weight / 2
    half = Z * math.sqrt((share * (1 - share) + weight / 4) / trials)
    return max(0.0, (middle - half) / (1 + weight)), min(1.0, (middle + half) / (1 + weight))


def resample(*sums: np.ndarray) -> list[np.ndarray]:
    """Sums over clusters drawn with replacement, RESAMPLES times, the same draws for all of `sums`.

    Args:
        sums: each (C, M), of C clusters.

    Returns:
        Each (RESAMPLES, M).
    """
    parts = [[weights @ each.astype(np.float64) for each in sums] for weights in _weights(len(sums[0]))]
    return [np.concatenate(each) for each in zip(*parts, strict=True)]


def _weights(num_clusters: int) -> Iterator[np.ndarray]:
    """How often each cluster was drawn (B, C), for RESAMPLES rows in blocks. Exact: sums of integers in float64."""
    generator = np.random.default_rng(SEED)
    rows_at_once = max(1, DRAWN_AT_ONCE // num_clusters)
    for start in range(0, RESAMPLES, rows_at_once):
        rows = min(rows_at_once, RESAMPLES - start)
        drawn = generator.integers(num_clusters, size=(rows, num_clusters))
        places = drawn + num_clusters * np.arange(rows)[:, None]
        counted = np.bincount(places.ravel(), minlength=rows * num_clusters)
        yield counted.reshape(rows, num_clusters).astype(np.float64)


def divide_each(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Numerators over denominators of the same shape, NaN at 0 / 0."""
    empty = denominators == 0
    return np.where(empty, np.nan, numerators / np.where(empty, 1, denominators))


def middle_95(values: np.ndarray) -> tuple[float, float] | None:
    """The interval from which 2.5 % of the values fall out on each side; None where there are none but NaN."""
    known = values[~np.isnan(values)]
    if not known.size:
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return round(float(low), 6), round(float(high), 6)


def mcnemar(fixed: int, broken: int) -> float:
    """How likely so uneven a split of changed points is, were either direction as likely (exact, two-sided)."""
    changed = fixed + broken
    if not changed:
        return 1.0
    tail = ways = 1  # of choosing none, then as many more as the smaller side has
    for number in range(min(fixed, broken)):
        ways = ways * (changed - number) // (number + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**changed)


def smallest_difference(standard_error: float, num_points: int) -> float:
    """The smallest true difference that points as many, and as alike in a trajectory, would show in 8 of 10 runs.

    Where nothing or nearly nothing changed, the standard error says too little: at least MIN_DISCORDANT points have to.
    """
    return min(1.0, max((Z + Z_POWER) * standard_error, MIN_DISCORDANT / num_points))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted by Holm's method: below 0.05, a difference is one among all of them."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted
