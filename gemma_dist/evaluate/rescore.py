"""Score a run again from what it wrote, without the model: with newer rules, or against corrected data.

    RUN/samples.jsonl + RUN/tools.json  ->  OUT/samples.jsonl, OUT/report.json, OUT/report.md

Where neither rules nor data changed, OUT/report.json is RUN/report.json byte for byte.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gemma_dist.config import EvaluateConfig
from gemma_dist.data.encode import decision_points
from gemma_dist.errors import ConfigError, DataError
from gemma_dist.evaluate.line import asked, score_line
from gemma_dist.evaluate.report import Report
from gemma_dist.evaluate.runs import REPORT, TOOLS, ToolSets, read_run, tools_key, write_results
from gemma_dist.shards.reader import load_trajectories

ASKED_FIRST = ("id", "trajectory", "turn")  # which decision point a line is of


def score_again(run_folder: Path, data: Path | None, out: Path, answer_tolerance: float | None) -> Report:
    """Score a run again and write the result to `out`.

    Args:
        data: rows whose gold and tools are taken in the place of the run's own; they have to ask for the same points.
        answer_tolerance: of numbers in answers; None: the run's own.

    Raises:
        ConfigError: there is no run, or `out` holds a report.
        DataError: the data are not those of the run.
    """
    if (out / REPORT).exists():
        raise ConfigError(f"{out / REPORT} exists already; name another folder or remove it")
    run = read_run(run_folder)
    settings = EvaluateConfig.model_validate(run.report["settings"])
    if answer_tolerance is not None:
        settings = settings.model_copy(update={"answer_tolerance": answer_tolerance})
    lines: Iterable[dict[str, Any]] = [dict(line) for line in run.lines]
    if data is None:
        tool_sets: ToolSets = json.loads((run_folder / TOOLS).read_bytes())
    else:
        lines, tool_sets = _asked_again(lines, data, settings)
    scored = [score_line(line, tool_sets[line["tools"]], settings.answer_tolerance) for line in lines]
    header = {**run.report, "settings": settings.model_dump(mode="json")}
    if data is not None:
        header["data"] = str(data)
    return write_results(out, header, scored, tool_sets)


def _asked_again(
    lines: Iterable[dict[str, Any]], data: Path, settings: EvaluateConfig
) -> tuple[list[dict[str, Any]], ToolSets]:
    """The lines with gold and tools of `data`, and these tools."""
    if settings.unroll != "none":
        raise ConfigError(f"{data}: rows that are unrolled need the model's template; score without --data")
    lines = list(lines)
    tool_sets: ToolSets = {}
    points: dict[tuple[Any, ...], dict[str, Any]] = {}
    last = max(line["trajectory"] for line in lines)
    for point in _points(data, settings, last, tool_sets):
        points[tuple(point[key] for key in ASKED_FIRST)] = point
    places = {tuple(line[key] for key in ASKED_FIRST) for line in lines}
    for rows, where, other in (
        (places - points.keys(), "the run", str(data)),
        (points.keys() - places, data, "the run"),
    ):
        if rows:
            id_, _, turn = min(rows, key=lambda place: place[1:])
            raise DataError(
                f"{where} has {len(rows)} decision points that {other} has not, the first at {id_}, turn {turn}; "
                "name the data that the run was asked"
            )
    return [{**line, **points[tuple(line[key] for key in ASKED_FIRST)]} for line in lines], tool_sets


def _points(data: Path, settings: EvaluateConfig, last: int, tool_sets: ToolSets) -> Iterator[dict[str, Any]]:
    """What the first `last` rows ask; their tools are added to `tool_sets`."""
    for number, trajectory in enumerate(load_trajectories(data, settings), start=1):
        if number > last:
            break
        tool_sets[tools_key(trajectory.tools)] = list(trajectory.tools)
        for index, messages in decision_points(trajectory.messages):
            yield asked(trajectory, number, messages, index + 1)
