"""A decision point as its line in samples.jsonl: what was asked, what the model wrote, what was read in it, the score.

A line and the tools that it names (tools.json) are all that a score needs: `score_line` makes it when a run ends, and
again, with the rules of the day, for `gemma-dist score`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from gemma_dist.data.content import content_text
from gemma_dist.data.read import read_output, reading_to_json
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.data.types import Message
from gemma_dist.evaluate.decision import AnsweredDecision, ScoredDecision
from gemma_dist.evaluate.message import MESSAGE, read_message
from gemma_dist.evaluate.runs import ToolSets, tools_key
from gemma_dist.evaluate.score import Gold, score_decision


def gold_of(trajectory: Trajectory, messages: Sequence[Message]) -> Gold:
    """What is expected at a decision point that these assistant messages answer.

    Where these are several in a row, gold's text is theirs joined, and its calls are those of the last.
    """
    calls = [call["function"] for call in messages[-1].get("tool_calls", [])]
    text = "".join(content_text(message["content"]) for message in messages)
    gold: Gold = {"calls": cast(Any, calls), "content": text, "is_outline": trajectory.is_outline}
    if trajectory.any_call:
        gold["any_call"] = True
    if trajectory.answers:
        gold["answers"] = list(trajectory.answers)
    return gold


def asked(trajectory: Trajectory, number: int, messages: Sequence[Message], turn: int) -> dict[str, Any]:
    """The keys of a line that the data alone say. `number`: of the trajectory, from 1."""
    part = {"part": trajectory.part} if trajectory.part else {}
    return {
        "id": trajectory.id,
        "trajectory": number,
        "turn": turn,
        "category": trajectory.category,
        "pair": trajectory.pair,
        "num_tools": len(trajectory.tools),
        "tools": tools_key(trajectory.tools),
        "gold": gold_of(trajectory, messages),
        **part,
    }


def score_lines(
    lines: Iterable[AnsweredDecision], tool_sets: ToolSets, answer_tolerance: float
) -> list[ScoredDecision]:
    """The lines of a whole run, scored.

    Args:
        tool_sets: the declarations that lines name.
        answer_tolerance: how far a number of an answer may be off, as a share of it.
    """
    return [score_line(line, tool_sets[line["tools"]], answer_tolerance) for line in lines]


def score_line(line: AnsweredDecision, tools: Sequence[Mapping[str, Any]], answer_tolerance: float) -> ScoredDecision:
    """A line with what is read in its output and the score; what it may say of both already is replaced."""
    names = [tool["function"]["name"] for tool in tools]
    if line.get("form") == MESSAGE:
        reading = read_message(line["output"], budget_spent=not line["stopped"], tool_names=names)
    else:
        reading = read_output(line["output"], line["opening"], budget_spent=not line["stopped"], tool_names=names)
    score = score_decision(reading, line["gold"], tools, answer_tolerance=answer_tolerance)
    unscored = {key: value for key, value in line.items() if key not in ("parsed", "score")}
    return cast(ScoredDecision, {**unscored, "parsed": reading_to_json(reading), "score": score})
