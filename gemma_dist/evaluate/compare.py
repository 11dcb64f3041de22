"""Two runs on the same decision points, side by side: what was fixed, what was broken, and is it more than chance.

    gemma-dist compare runs/before runs/after --fail-if-worse

Every difference is "after" less "before". Points change together within a trajectory, so its interval is that of the
paired bootstrap by clusters; McNemar's exact test asks of the points that changed whether they went one way more often
than a coin would. Slices are many, so their p-values are adjusted (Holm).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from gemma_dist.errors import ConfigError, DataError
from gemma_dist.evaluate.beside import HELD_OUT, OVER_CALLING, SHOWN, by_part, in_both, part_of
from gemma_dist.evaluate.decision import ScoredDecision, steps_of
from gemma_dist.evaluate.intervals import divide_each, holm, mcnemar, middle_95, resample, smallest_difference
from gemma_dist.evaluate.loss_report import LossChange, loss_changes
from gemma_dist.evaluate.metrics import METRICS
from gemma_dist.evaluate.pass_at_k import metrics_of
from gemma_dist.evaluate.runs import Run, read_run
from gemma_dist.evaluate.slices import slice_up
from gemma_dist.evaluate.tally import add_up, columns

NAMED = 5  # points that a refusal names
HEADLINE = "overall"
FAULTS = {metric.name for metric in METRICS if metric.is_fault}
Point = tuple[str, int, int, int]  # id, number of the trajectory, turn, and which of several answers


class Change(TypedDict):
    """A metric before and after. Of metrics that gold alone decides where to judge, what was fixed and broken, too."""

    before: float | None
    after: float | None
    difference: float | None
    low: float | None  # 95 % of the difference, by the bootstrap
    high: float | None
    fixed: int | None
    broken: int | None
    p_value: float | None  # McNemar


class SliceChange(Change):
    """The same of a slice, with its p-value adjusted for all slices."""

    p_holm: float


class BesideChange(TypedDict):
    """What stands beside the held-out rows, before and after."""

    over_calling: Change | None  # of all parts, the held-out rows among them; None: a call is right everywhere
    parts: dict[str, dict[str, Change]]


class ImageGain(TypedDict):
    """What images are worth: `overall` with them less without, at the points that have some."""

    without: str  # "blank" or "swapped"
    value: float
    low: float | None
    high: float | None
    num_points: int


class ChangedPoint(TypedDict):
    """A decision point that is right in one run alone."""

    id: str
    trajectory: int
    turn: int
    sample: int  # which of several answers, from 0
    before: str  # what was wrong, in one word; "right" where nothing was
    after: str


class Comparison(TypedDict):
    """comparison.json."""

    before: str
    after: str
    num_trajectories: int
    num_decision_points: int
    num_samples: int  # answers to each, compared one by one by their numbers
    overall: Change
    smallest_difference: float  # of `overall`: a smaller one would often not show
    image_gain: ImageGain | None
    metrics: dict[str, Change]
    slices: dict[str, dict[str, SliceChange]]  # of `overall`
    loss: dict[str, LossChange] | None  # of gold's answers, where both runs measured it
    beside: BesideChange | None  # where both runs asked probes or a general set
    fixed: list[ChangedPoint]
    broken: list[ChangedPoint]


def compare(before: Path, after: Path) -> Comparison:
    """Compare two finished runs.

    Raises:
        ConfigError: one is none.
        DataError: they were not asked the same.
    """
    first, second = read_run(before), read_run(after)
    everything = _paired(first, second)
    lines = [line for line in everything if part_of(line[0]) == HELD_OUT]
    num_samples = first.report["num_samples"]
    names = [metric.name for metric in metrics_of(num_samples)]
    changes, _ = _changes(*_apart(lines), names, whole=True)
    overall, error = _changes(*_apart(lines), [HEADLINE])
    return {
        "before": str(before),
        "after": str(after),
        "num_trajectories": len({line["trajectory"] for line, _ in lines}),
        "num_decision_points": first.report["num_decision_points"],
        "num_samples": num_samples,
        "overall": overall[HEADLINE],
        "smallest_difference": round(smallest_difference(error, len(lines)), 6),
        "image_gain": _image_gain(first, second, lines),
        "metrics": changes,
        "slices": _slices(lines),
        "loss": loss_changes(*_apart(lines)),
        "beside": _beside(everything),
        "fixed": [_changed(line) for line in lines if _is_right(line[1]) and not _is_right(line[0])],
        "broken": [_changed(line) for line in lines if _is_right(line[0]) and not _is_right(line[1])],
    }


def failed_rules(
    compared: Mapping[str, Any], fail_below: Iterable[str], fail_if_worse: bool, headline: str = HEADLINE
) -> list[str]:
    """What is wrong with "after", a sentence each; none where it passes.

    Args:
        compared: a Comparison, or one of `act`.
        fail_below: "METRIC=X": the lowest value that passes.
        fail_if_worse: the `headline` must not be lower than before by more than chance: its interval must reach 0; nor
            may over-calling be higher, where both runs asked probes or a general set.

    Raises:
        ConfigError: a rule is none, or names a metric that was not judged.
    """
    failures = []
    for rule in fail_below:
        name, lowest = _parse_rule(rule, compared)
        value = compared["metrics"][name]["after"]
        if value is None or value < lowest:
            failures.append(f"{name} is {value if value is None else round(value, 10)}, below {lowest}")
    high = compared["metrics"][headline]["high"]
    if fail_if_worse and high is not None and high < 0:
        low, difference = compared["metrics"][headline]["low"], compared["metrics"][headline]["difference"]
        failures.append(f"{headline} is worse: {difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}")
    beside = compared.get("beside")
    risen = None if beside is None else beside["over_calling"]
    if fail_if_worse and risen is not None and risen["low"] is not None and risen["low"] > 0:
        low, high, difference = risen["low"], risen["high"], risen["difference"]
        failures.append(f"{OVER_CALLING} is worse: {difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}")
    return failures


def _parse_rule(rule: str, compared: Mapping[str, Any]) -> tuple[str, float]:
    """ "call_exact=0.9" -> ("call_exact", 0.9)"""
    match = re.fullmatch(r"([\w@^]+)=(\d*\.?\d+)", rule)
    judged = [name for name, change in compared["metrics"].items() if change["after"] is not None]
    known = [name for name in judged if name not in FAULTS]  # of which less is no failure
    if match is None or match[1] not in known:
        raise ConfigError(
            f"--fail-below {rule}: write METRIC=X with a number from 0 to 1 and one of {', '.join(known)}"
        )
    return match[1], float(match[2])


# ---- the same points -------------------------------------------------------------------------------------------------

Paired = tuple[ScoredDecision, ScoredDecision]


def _point(line: ScoredDecision) -> Point:
    return line["id"], line["trajectory"], line["turn"], line["sample"]


def _paired(before: Run, after: Run) -> list[Paired]:
    """The lines of both runs, point by point and answer by answer.

    Raises:
        DataError: a point is in one alone, or expects something else, or has more answers in one.
    """
    answers = [run.report["num_samples"] for run in (before, after)]
    if answers[0] != answers[1]:
        raise DataError(
            f"{before.folder} holds {answers[0]} answers to each decision point, {after.folder} {answers[1]}; evaluate "
            "both with as many (`gemma-dist evaluate … --num-samples K`)"
        )
    firsts, seconds = ({_point(line): line for line in lines} for lines in in_both(before.lines, after.lines))
    for one, other, found, others in ((before, after, firsts, seconds), (after, before, seconds, firsts)):
        lacking = sorted(found.keys() - others.keys(), key=lambda point: point[1:])
        if lacking:
            raise DataError(
                f"{one.folder} has {len(lacking)} decision points that {other.folder} has not: {_names(lacking)}; "
                "compare runs on the same data, cut and unrolled the same way"
            )
    changed = [point for point, line in firsts.items() if line["gold"] != seconds[point]["gold"]]
    if changed:
        raise DataError(
            f"{before.folder} and {after.folder} expect other answers at {len(changed)} decision points: "
            f"{_names(changed)}; score both with the same gold: `gemma-dist score … --data DATA`"
        )
    return [(line, seconds[point]) for point, line in firsts.items()]


def _names(points: Sequence[Point]) -> str:
    named = ", ".join(f"{id_} (turn {turn})" for id_, _, turn, _ in points[:NAMED])
    return named + (f" and {len(points) - NAMED} more" if len(points) > NAMED else "")


def _apart(lines: Sequence[Paired]) -> tuple[list[ScoredDecision], list[ScoredDecision]]:
    return [line for line, _ in lines], [line for _, line in lines]


def _is_right(line: ScoredDecision) -> bool:
    return line["score"]["right"]


def _changed(line: Paired) -> ChangedPoint:
    first, _ = line
    before, after = (each["score"]["failure"] or "right" for each in line)
    place = {"id": first["id"], "trajectory": first["trajectory"], "turn": first["turn"], "sample": first["sample"]}
    return {**place, "before": before, "after": after}  # type: ignore[typeddict-item]


# ---- differences -----------------------------------------------------------------------------------------------------


def _changes(
    before: Sequence[ScoredDecision],
    after: Sequence[ScoredDecision],
    names: Sequence[str],
    *,
    whole: bool = False,
) -> tuple[dict[str, Change], float]:
    """Metrics before and after, and the standard error of the last one's difference."""
    sums = add_up(before, whole=whole), add_up(after, whole=whole)
    tables = [columns(each, names) for each in sums]
    values = [divide_each(numerators.sum(0), denominators.sum(0)) for numerators, denominators in tables]
    drawn = resample(*tables[0], *tables[1])
    differences = divide_each(drawn[2], drawn[3]) - divide_each(drawn[0], drawn[1])
    changes: dict[str, Change] = {}
    for column, name in enumerate(names):
        if tables[0][1][:, column].any() or tables[1][1][:, column].any():
            one, two = (None if np.isnan(each[column]) else float(each[column]) for each in values)
            changes[name] = _change(name, one, two, differences[:, column], before, after)
    known = differences[:, -1][~np.isnan(differences[:, -1])]
    return changes, float(known.std()) if known.size else 0.0


def _change(
    name: str,
    one: float | None,
    two: float | None,
    differences: np.ndarray,
    before: Sequence[ScoredDecision],
    after: Sequence[ScoredDecision],
) -> Change:
    low, high = middle_95(differences) or (None, None)
    tested = _fixed_and_broken(name, before, after)
    fixed, broken = tested or (None, None)
    return {
        "before": one,
        "after": two,
        "difference": None if one is None or two is None else round(two - one, 9),
        "low": low,
        "high": high,
        "fixed": fixed,
        "broken": broken,
        "p_value": mcnemar(*tested) if tested else None,
    }


def _fixed_and_broken(
    name: str, before: Iterable[ScoredDecision], after: Iterable[ScoredDecision]
) -> tuple[int, int] | None:
    """How many points a metric calls right in the second run alone, and in the first alone (a metric of faults: those
    that it does not count); None where it judges other points in each run, or judges them by parts."""
    counts: Counter[tuple[int, int]] = Counter()
    for first, second in zip(before, after, strict=True):
        one, two = (line["score"]["ratios"].get(name) for line in (first, second))
        if one is None and two is None:
            continue
        if one is None or two is None or one[1] != 1 or two[1] != 1:
            return None
        counts[one[0], two[0]] += 1
    right = name not in FAULTS
    return (counts[1 - right, right], counts[right, 1 - right]) if counts else None


def _slices(lines: Sequence[Paired]) -> dict[str, dict[str, SliceChange]]:
    """`overall` of each slice, and how sure its change is among all slices."""
    firsts = [first for first, _ in lines]
    order = sorted(range(len(lines)), key=lambda place: (firsts[place]["trajectory"], firsts[place]["turn"]))
    ordered = [firsts[place] for place in order]
    partner = {_point(first): second for first, second in lines}
    found: dict[str, dict[str, Any]] = {}
    for name, values in slice_up(ordered, steps_of(ordered)).items():
        for value, part in values.items():
            changes, _ = _changes(part, [partner[_point(line)] for line in part], [HEADLINE])
            found.setdefault(name, {})[value] = changes[HEADLINE]
    every = [change for values in found.values() for change in values.values()]
    for change, adjusted in zip(every, holm([change["p_value"] for change in every]), strict=True):
        change["p_holm"] = adjusted
    return found


def _beside(everything: Sequence[Paired]) -> BesideChange | None:
    """What probes and a general set say of both runs; None where they have none in common."""
    before, after = _apart(everything)
    firsts, seconds = by_part(before), by_part(after)
    if firsts.keys() <= {HELD_OUT}:
        return None
    total, _ = _changes(before, after, [OVER_CALLING])
    parts = {part: _changes(firsts[part], seconds[part], SHOWN)[0] for part in firsts}
    return {"over_calling": total.get(OVER_CALLING), "parts": parts}


def _image_gain(before: Run, after: Run, lines: Sequence[Paired]) -> ImageGain | None:
    """What the images are worth, where one run saw them and the other saw blank or swapped ones."""
    seen = [run.report["settings"].get("images", "as_is") for run in (before, after)]
    if seen.count("as_is") != 1:
        return None
    with_images = [line if seen[0] == "as_is" else line[::-1] for line in lines if line[0]["num_images"]]
    if not with_images:
        return None
    real, other = _apart(with_images)
    changes, _ = _changes(other, real, [HEADLINE])
    gain = changes[HEADLINE]
    assert gain["difference"] is not None, "`overall` judges every point"
    without = next(images for images in seen if images != "as_is")
    return {"without": without, "value": gain["difference"], "low": gain["low"], "high": gain["high"],
            "num_points": len(with_images)}  # fmt: skip
