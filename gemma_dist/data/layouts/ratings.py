"""Rows that rate answers: preferences and KTO. One trajectory is trained, so each is refused with the command that
keeps the good answer.

    {"messages": [...], "label": false}, {"conversations": [...], "kto_tag": false}              KTO
    {"conversations": [...], "chosen": {"from": "gpt", ...}, "rejected": {...}}                  LLaMA-Factory
    {"messages": [...], "chosen_response": {...}, "rejected_response": {...}}                    When2Call
    {"messages": [..., {"role": "assistant", ...}], "rejected_response": "..."}                  ms-swift

Only where the messages are the better answer themselves, word by word, does the row have one meaning.
"""

from collections import Counter
from dataclasses import dataclass

from gemma_dist.data.layouts.turns import first_filled
from gemma_dist.data.strict import as_list, as_object
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

# Columns of the worse answer, and that of the better one beside it.
WORSE = {
    "rejected": "chosen",
    "rejected_response": "chosen_response",
    "rejected_responses": "chosen_responses",
    "rejected_message": "chosen_message",
    "rejected_messages": "chosen_messages",
    "rejected_conversation": "chosen_conversation",
    "rejected_conversations": "chosen_conversations",
    "rejected_answer": "chosen_answer",
    "rejected_completion": "chosen_completion",
    "rejected_output": "chosen_output",
    "non_preferred_output": "preferred_output",
    "dispreferred_output": "preferred_output",
}
LABELS = ("kto_tag", "kto_label", "desirable", "is_desirable")  # and `label`, where it is true or false
ASSISTANTS = ("assistant", "gpt", "ai", "model", "bot")
OPENERS = ("system", "developer", "user", "human")
LEFT_OUT = "the worse answers of preferences were left out: the messages are the better one"


@dataclass(frozen=True)
class Preference:
    """Where a row holds a better and a worse answer."""

    better: str  # a column; "" where the row has none
    worse: str


def find_preference(row: RawRow) -> Preference | None:
    """The two columns of a preference; None where the row has no worse answer, or nothing in it."""
    for worse, better in WORSE.items():
        if not row.get(worse) or not isinstance(row[worse], (str, list, dict)):
            continue
        return Preference(better if row.get(better) else "", worse)
    return None


def refuse_label(row: RawRow) -> None:
    """DataError for a row of KTO: {"messages": [...], "label": false}."""
    labels = [label for label in LABELS if row.get(label) is not None]
    if isinstance(row.get("label"), bool):
        labels.insert(0, "label")
    if labels:
        label = labels[0]
        raise DataError(
            f"`{label}` is {row[label]}: the row rates an answer (KTO), and every row is trained; keep the good ones: "
            f"jq -c 'select(.{label}) | del(.{label})' FILE"
        )


def refuse_ratings(row: RawRow, notes: Counter[str]) -> None:
    """DataError for a row with messages that rates an answer; a preference that says it twice is counted in `notes`."""
    key = messages_column(row)
    if not key:
        return
    refuse_label(row)
    found = find_preference(row)
    if found is None:
        return
    if found.better and row[found.better] == row[key]:  # UltraFeedback has both
        notes[LEFT_OUT] += 1
        return
    both = [name for name in (found.better, found.worse) if name]
    raise DataError(
        f"the row holds {' and '.join(f'`{name}`' for name in both)} beside `{key}` (a preference), and one "
        f"trajectory is trained; keep the better answer: {_better_command(row, key, found.better, both)}"
    )


def _better_command(row: RawRow, key: str, better: str, removed: list[str]) -> str:
    """The command that makes the better answer the end of the messages, which may hold it already."""
    is_whole = bool(better) and _speaker(get_first(row[better])) in OPENERS
    if not better or (ends_with_answer(row, key) and not is_whole):
        return f"jq -c 'del({_paths(removed)})' FILE"
    return move_command(row, key, better, removed)


def messages_column(row: RawRow) -> str:
    """`messages` or `conversations`, whichever the row has; "" where it has none."""
    return next((key for key in ("messages", "conversations") if as_list(row.get(key))), "")


def ends_with_answer(row: RawRow, key: str) -> bool:
    """Whether the last of the messages is the model's."""
    return _speaker(as_list(row.get(key))[-1]) in ASSISTANTS


def move_command(row: RawRow, key: str, column: str, removed: list[str]) -> str:
    """The command that puts an answer behind the messages of its row, whatever it is, and removes columns.

    {"messages": [...], "answer": "Hi"}
        ->  jq -c '.messages += [{role: "assistant", content: .answer}] | del(.answer)' FILE
    """
    value = row.get(column)
    moved = f".{key} += {_as_turns(value, column, is_sharegpt='from' in as_object(as_list(row.get(key))[-1]))}"
    if _speaker(get_first(value)) in OPENERS:  # the whole conversation
        moved = f".{key} = .{column}"
    return f"jq -c '{moved} | del({_paths(removed)})' FILE"


def _as_turns(value: object, column: str, *, is_sharegpt: bool) -> str:
    """The expression of jq for the turns that a value is: a text, a turn, a list of turns, calls."""
    path = f".{column}"
    if isinstance(value, str) and "call" in column:
        path = f"({path} | fromjson)"
    if isinstance(value, dict):
        path = f"[{path}]"
        value = [value]
    first = get_first(value)
    if _speaker(first) is not None:
        return path
    if "call" in column or isinstance(first, dict):
        return f'[{{role: "assistant", tool_calls: {path}}}]'
    if isinstance(first, str):
        path = f"{path}[0]"
    return f'[{{from: "gpt", value: {path}}}]' if is_sharegpt else f'[{{role: "assistant", content: {path}}}]'


def get_first(value: object) -> object:
    """The first of a list; None where the value is no list, or an empty one."""
    return next(iter(as_list(value)), None)


def _speaker(turn: object) -> object:
    """Who speaks in a turn."""
    return first_filled(turn, "role", "from")


def _paths(columns: list[str]) -> str:
    """Columns as jq names them: `.chosen, .rejected`."""
    return ", ".join(f".{column}" for column in columns)
