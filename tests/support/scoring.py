"""Hand-made decision points: what gold expects, what an output says, and the line that both make."""

from collections.abc import Sequence
from typing import Any

from gemma_dist.data.read import Call, Reading, reading_to_json
from gemma_dist.evaluate.decision import ScoredDecision
from gemma_dist.evaluate.score import Gold, GoldCall, Score, score_decision


def expecting(calls: Sequence[Any], content: str = "", **keys: Any) -> Gold:
    """A gold turn."""
    return {"calls": list(calls), "content": content, "is_outline": False, **keys}  # type: ignore[typeddict-item]


def reading(*calls: GoldCall, content: str = "", status: Any = None, attempted: bool | None = None) -> Reading:
    """A generated turn that says these calls and this text."""
    read = tuple(Call(call["name"], call["arguments"], (0, 0)) for call in calls)
    return Reading(
        read, content, "", bool(calls) if attempted is None else attempted, status or ("ok" if calls else "no_call")
    )


def line(trajectory: int, turn: int, gold: Gold, output: Reading, tools: Any = (), **keys: Any) -> ScoredDecision:
    """A decision point as in samples.jsonl."""
    score: Score = score_decision(output, gold, tools)
    made: Any = {
        "id": f"row-{trajectory}",
        "trajectory": trajectory,
        "turn": turn,
        "sample": 0,
        "key": "",
        "category": "",
        "pair": "",
        "num_images": 0,
        "num_tools": len(tools),
        "prompt_tokens": 100,
        "tools": "",
        "opening": "",
        "output": "",
        "output_ids": [1],
        "output_tokens": 1,
        "stopped": True,
        "parsed": reading_to_json(output),
        "gold": gold,
        "score": score,
    }
    return made | keys
