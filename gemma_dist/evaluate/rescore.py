"""Score a run again from what it wrote, without the model: with newer rules, or against corrected data.

    RUN/samples.jsonl + RUN/tools.json  ->  OUT/samples.jsonl, OUT/tools.json, OUT/report.json, .md, .html

Where neither rules nor data changed, all are those of RUN byte for byte: what `times` says is of the answers. What the
model was shown (trajectories.jsonl, images/) is copied.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from gemma_dist.config import EvaluateConfig
from gemma_dist.data.served import decision_points
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.errors import ConfigError, DataError
from gemma_dist.evaluate.asked import asked_rows
from gemma_dist.evaluate.decision import AnsweredDecision
from gemma_dist.evaluate.line import asked, score_lines
from gemma_dist.evaluate.log import hash_data
from gemma_dist.evaluate.report import Report
from gemma_dist.evaluate.runs import REPORT, ToolSets, read_run, read_tools, tools_key, write_results
from gemma_dist.evaluate.shown import copy_shown

Place = tuple[str, int, int]  # id, number of the trajectory, and turn


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
    lines: Sequence[AnsweredDecision] = run.lines
    if data is None:
        tool_sets = read_tools(run_folder)
    else:
        lines, tool_sets = _asked_again(lines, data, run.report["limit"], settings)
    if not any("loss" in line for line in lines):  # an earlier version measured none
        settings = settings.model_copy(update={"loss": False})
    header = {**run.report, "settings": settings.model_dump(mode="json")}
    if data is not None:
        header |= {"data": str(data), "data_hash": hash_data(data)}
    copy_shown(run_folder, out)
    return write_results(out, header, score_lines(lines, tool_sets, settings.answer_tolerance), tool_sets)


def _asked_again(
    lines: Sequence[AnsweredDecision], data: Path, limit: int | None, settings: EvaluateConfig
) -> tuple[list[AnsweredDecision], ToolSets]:
    """The lines with gold and tools of `data`, and these tools."""
    if settings.unroll != "none":
        raise ConfigError(f"{data}: rows that are unrolled need the model's template; score without --data")
    tool_sets: ToolSets = {}
    points: dict[Place, dict[str, Any]] = {}
    last = max(line["trajectory"] for line in lines if not line.get("part"))
    for point in _points(asked_rows(data, last, settings, limit_general=limit), tool_sets):
        points[_place(point)] = point
    asked_then = [_place(line) for line in lines]
    places = set(asked_then)
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
    again = [_asked(line, points[place]) for line, place in zip(lines, asked_then, strict=True)]
    return cast(list[AnsweredDecision], again), tool_sets


def _asked(line: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """A line with what is asked now; without its loss, where that is of another answer."""
    kept = {name: value for name, value in line.items() if name != "loss" or line["gold"] == point["gold"]}
    return {**kept, **point}


def _place(point: Mapping[str, Any]) -> Place:
    """Which decision point a line, or what is asked, is of."""
    return point["id"], point["trajectory"], point["turn"]


def _points(rows: Iterable[Trajectory], tool_sets: ToolSets) -> Iterator[dict[str, Any]]:
    """What rows ask; their tools are added to `tool_sets`."""
    for number, trajectory in enumerate(rows, start=1):
        tool_sets[tools_key(trajectory.tools)] = list(trajectory.tools)
        for index, messages in decision_points(trajectory.messages):
            yield asked(trajectory, number, messages, index + 1)
