"""What the layouts share: messages that remember their turn, and how errors name it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from gemma_dist.data.strict import get

# Messages with the turn of the row, from 1, that each came from; 0 for a `system` beside the turns.
NumberedMessages = list[tuple[int, object]]


@dataclass
class OpenAIRow:
    """A row in the OpenAI shape, moved but not checked: `parse_row` refuses what is wrong, once for all layouts."""

    messages: NumberedMessages
    tools: object = None
    images: object = None  # of image parts without a source of their own, in order
    has_system: bool = False  # whether the layout has looked for a system text beside the messages itself
    notes: Counter[str] = field(default_factory=Counter)  # what was changed or left out on the way: how often


def first_filled(value: object, *keys: str) -> Any:
    """The first value of several keys that is not empty: "f" of {"action": "", "kind": "f"}; else that of the last."""
    found = None
    for key in keys:
        found = get(value, key)
        if found:
            break
    return found


def turn_name(turn: int, role: object) -> str:
    """How errors name a turn: "turn 5 (tool)", counted from 1."""
    if not turn:
        return "`system` of the row"
    is_word = isinstance(role, str) and len(role) < 20
    return f"turn {turn} ({role})" if is_word else f"turn {turn}"


def number_turns(turns: list[object]) -> NumberedMessages:
    """Turns that are messages already, each with its number."""
    return list(enumerate(turns, start=1))
