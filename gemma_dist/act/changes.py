"""Two folders of `act`, runs of the same tasks, side by side: does AFTER succeed more often, by more than chance?

Runs are paired by their tasks and numbers. Runs of one task are alike, so the interval of a difference is that of the
bootstrap over tasks, both folders drawn together; McNemar's exact test asks of the runs that changed whether they went
one way more often than a coin would.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from gemma_dist.act.report import SUCCESSES
from gemma_dist.errors import ConfigError, DataError
from gemma_dist.evaluate.compare import Change, failed_rules
from gemma_dist.evaluate.compare_page import HEADER, change_row
from gemma_dist.evaluate.intervals import divide_each, mcnemar, middle_95, resample, smallest_difference
from gemma_dist.evaluate.log import NUM_NAMED, RUN
from gemma_dist.evaluate.markdown import MAX_ROWS, code, section, table
from gemma_dist.evaluate.pass_at_k import PointCounts, pass_metrics
from gemma_dist.evaluate.runs import REPORT, RUNS
from gemma_dist.files import writing
from gemma_dist.logs import log, read_jsonl, to_json, write_json

_HEADER = [column.replace("trajectory", "task") for column in HEADER]
RunOf = tuple[int, int]  # number of the task, number of its run


@dataclass(frozen=True)
class _Acted:
    """What `act` wrote to a folder."""

    folder: Path
    replay: bool
    num_runs: int
    ended: Mapping[RunOf, Mapping[str, Any]]


def compare_acted(
    before: Path, after: Path, out: Path | None, fail_below: Sequence[str], fail_if_worse: bool, *, as_json: bool
) -> tuple[str, bool]:
    """What `gemma-dist compare` prints of two folders of `act`, and whether "after" passes the rules; those that it
    does not are logged. With `out`, comparison.md and comparison.json are written there.

    Raises:
        ConfigError: one is no such folder, or its runs were not judged.
        DataError: they are not of the same tasks.
    """
    compared = _compare(_read(before), _read(after))
    failures = failed_rules(compared, fail_below, fail_if_worse, SUCCESSES.name)
    page = "\n".join(_lines(compared)) + "\n"
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with writing(out / "comparison.md") as temporary:
            temporary.write_text(page, encoding="utf-8")
        write_json(out / "comparison.json", compared)
    for failure in failures:
        log.error(failure)
    return to_json(compared) + "\n" if as_json else page, not failures


def _read(folder: Path) -> _Acted:
    if not ((folder / RUNS).is_file() and (folder / REPORT).is_file()):
        raise ConfigError(
            f"{folder} holds no {RUNS} with its {REPORT}: compare two folders of `act` that has ended, or two of "
            "`evaluate`"
        )
    try:
        report, run = (json.loads((folder / name).read_bytes()) for name in (REPORT, RUN))
        ended = {(line["task_number"], line["run"]): _short(line) for line in read_jsonl(folder / RUNS)}
        replay, num_runs = run["settings"]["replay"], report["num_runs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: {REPORT}, {RUN} or {RUNS} cannot be read: {error!r}; act again") from None
    if all(one["reward"] is None for one in ended.values()):
        raise ConfigError(f"{folder}: nothing judged these runs; act again with a checker (--check MODULE:NAME)")
    return _Acted(folder, replay, num_runs, ended)


def _short(line: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared of a run: what it was given, and how it ended."""
    kept = {name: line[name] for name in ("task", "run", "outcome", "reward")}
    given = takewhile(lambda message: message["role"] != "assistant", line["row"]["messages"])  # no answer may be there
    return {**kept, "given": list(given)}


def _compare(before: _Acted, after: _Acted) -> dict[str, Any]:
    """comparison.json."""
    _require_same(before, after)
    metrics = (SUCCESSES, *pass_metrics(before.num_runs))
    tables = [_counts(acted, metrics) for acted in (before, after)]
    drawn = resample(*tables[0], *tables[1])
    differences = divide_each(drawn[2], drawn[3]) - divide_each(drawn[0], drawn[1])
    values = [divide_each(numerators.sum(0), denominators.sum(0)) for numerators, denominators in tables]
    pairs = [(one, after.ended[run]) for run, one in sorted(before.ended.items())]
    fixed, broken = ([_changed(*pair) for pair in pairs if _right(pair) == went] for went in ((0, 1), (1, 0)))
    changes = {}
    for place, metric in enumerate(metrics):
        low, high = middle_95(differences[:, place]) or (None, None)
        one, two = float(values[0][place]), float(values[1][place])
        is_tested = metric is SUCCESSES
        changes[metric.name] = Change(
            before=one,
            after=two,
            difference=round(two - one, 9),
            low=low,
            high=high,
            fixed=len(fixed) if is_tested else None,
            broken=len(broken) if is_tested else None,
            p_value=mcnemar(len(fixed), len(broken)) if is_tested else None,
        )
    return {
        "before": str(before.folder),
        "after": str(after.folder),
        "num_tasks": len(tables[0][0]),
        "num_runs": before.num_runs,
        "metrics": changes,
        "smallest_difference": round(smallest_difference(float(differences[:, 0].std()), len(pairs)), 6),
        "fixed": fixed,
        "broken": broken,
    }


def _require_same(before: _Acted, after: _Acted) -> None:
    """Raises DataError unless both are runs of the same tasks, as many of each."""
    if before.replay != after.replay:
        logged, live = (before, after) if before.replay else (after, before)
        raise DataError(f"{logged.folder} replayed logs, {live.folder} ran functions; compare runs of one kind")
    if before.num_runs != after.num_runs:
        raise DataError(
            f"{before.folder} holds {before.num_runs} runs of each task, {after.folder} {after.num_runs}; act with as "
            "many (--num-runs)"
        )
    same = {
        run
        for run in before.ended.keys() & after.ended.keys()
        if all(before.ended[run][name] == after.ended[run][name] for name in ("task", "given"))
    }
    for one, other in ((before, after), (after, before)):
        lacking = [f"{one.ended[run]['task']} (run {run[1]})" for run in sorted(one.ended.keys() - same)]
        if lacking:
            raise DataError(
                f"{one.folder} has {len(lacking)} runs whose task {other.folder} has not, or gave otherwise, such as "
                f"{', '.join(lacking[:NUM_NAMED])}; compare runs of the same tasks"
            )


def _counts(acted: _Acted, metrics: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators of each metric (N, M), a task a line."""
    of_task: dict[int, list[bool]] = {}
    for (number, _), one in sorted(acted.ended.items()):
        of_task.setdefault(number, []).append(_succeeds(one))
    counts = [PointCounts(len(runs), sum(runs)) for runs in of_task.values()]
    numerators = [[metric.numerator(one) for metric in metrics] for one in counts]
    denominators = [[metric.denominator(one) for metric in metrics] for one in counts]
    return np.array(numerators, float), np.array(denominators, float)


def _succeeds(ended: Mapping[str, Any]) -> bool:
    return bool(ended["outcome"] == "success")


def _right(pair: tuple[Mapping[str, Any], Mapping[str, Any]]) -> tuple[bool, ...]:
    return tuple(map(_succeeds, pair))


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {"task": before["task"], "run": before["run"], "before": before["outcome"], "after": after["outcome"]}


def _lines(compared: Mapping[str, Any]) -> Iterator[str]:
    success = compared["metrics"][SUCCESSES.name]
    yield f"# {code(compared['before'])} against {code(compared['after'])}"
    yield ""
    each = f", {compared['num_runs']} runs of each, compared by their numbers" if compared["num_runs"] > 1 else ""
    yield f"The same {compared['num_tasks']:,} tasks{each}."
    split = f"{success['fixed']} runs succeed that failed before, {success['broken']} the other way round"
    yield f"{split}: p = {success['p_value']:.2g} (McNemar's exact test)."
    smallest = f"{100 * compared['smallest_difference']:.1f}"
    yield f"The smallest true difference that so many runs would show in 8 of 10 cases: {smallest} points of 100."
    yield ""
    yield from table(_HEADER, (change_row(name, found) for name, found in compared["metrics"].items()))
    for title, changed in (("Broken", compared["broken"]), ("Fixed", compared["fixed"])):
        more = f", the first {MAX_ROWS} of {len(changed)}" if len(changed) > MAX_ROWS else ""
        rows = [[code(one["task"]), one["run"], one["before"], one["after"]] for one in changed[:MAX_ROWS]]
        yield from section(f"{title}{more}", ["task", "run", "before", "after"], rows)
