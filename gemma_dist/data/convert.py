"""Rows of other layouts into the OpenAI shape, before they are parsed.

A layout only moves things to where `trajectory.py` looks for them; whether they are right is checked there, once for
all layouts. Each converted message remembers the turn that it came from, so that an error still names that turn.
"""

from collections import Counter
from collections.abc import Callable

from gemma_dist.data.declarations import find_declarations, read_declarations, to_openai_tools, without_tools
from gemma_dist.data.layouts import anthropic, exchanges, glaive, lone_events, prompt_completion, sharegpt, xlam
from gemma_dist.data.layouts.beside import refuse_beside
from gemma_dist.data.layouts.markers import image_column, place_images
from gemma_dist.data.layouts.ratings import refuse_ratings
from gemma_dist.data.layouts.text_calls import convert_text_calls
from gemma_dist.data.layouts.turns import NumberedMessages, OpenAIRow, number_turns, turn_name
from gemma_dist.data.spellings import respell
from gemma_dist.data.strict import error_context, get, is_list_of, read_json_text, without_spaces
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

COLUMNS_AS_TEXT = ("messages", "conversations", "tools")  # may hold the JSON text of their value
_PLAIN_COLUMNS = {"id", "messages", "tools"}
_PLAIN_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name"}
_PLAIN_ROLES = ("system", "user", "assistant", "tool")
_CALL_KEYS = {"id", "type", "function"}
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message", "instructions")


def to_openai(row: RawRow) -> OpenAIRow:
    """The row in the OpenAI shape; without messages where it holds no list of them.

    Raises:
        DataError: something cannot be converted, with the turn.
    """
    row = dict(row)
    for key in COLUMNS_AS_TEXT:
        if row.get(key):
            row[key] = read_json_text(row[key], key)
    is_plain = is_plain_row(row)
    converted = _openai(row) if is_plain else _moved(row)
    if is_plain:
        converted.tools = read_declarations("tools", row.get("tools"), converted.notes)
    else:
        converted.tools = find_declarations(row, converted.tools, converted.messages, converted.notes)
        converted.messages = [(turn, without_tools(message)) for turn, message in converted.messages]
        if converted.messages and not converted.has_system:
            converted.messages = _with_system(row, converted.messages)
    declared = converted.tools
    converted = convert_text_calls(converted)
    if converted.tools is not declared:  # the system text listed them
        converted.tools = to_openai_tools(converted.tools, converted.notes)
    if not is_plain:
        converted.images = image_column(row) or converted.images
        refuse_beside(row, converted)
        place_images(converted)
    return converted


def is_plain_row(row: RawRow) -> bool:
    """Whether a row is in OpenAI's shape to the letter, and holds nothing else: text, calls and answers. Most are, and
    nothing of them is to be moved, so no other layout, spelling or column is looked for."""
    turns = row.get("messages")
    return row.keys() <= _PLAIN_COLUMNS and isinstance(turns, list) and bool(turns) and all(map(_is_plain, turns))


def _is_plain(message: object) -> bool:
    if not isinstance(message, dict) or not message.keys() <= _PLAIN_KEYS or message.get("role") not in _PLAIN_ROLES:
        return False
    if not all(isinstance(message.get(key), str | None) for key in ("content", "name", "tool_call_id")):
        return False
    calls = message.get("tool_calls") or []
    return isinstance(calls, list) and all(isinstance(call, dict) and call.keys() <= _CALL_KEYS for call in calls)


def _moved(row: RawRow) -> OpenAIRow:
    """A row of any layout and spelling, with its messages where OpenAI has them."""
    notes: Counter[str] = Counter()
    refuse_ratings(row, notes)
    converted = _converter(row)(row)
    converted.notes += notes
    converted.messages = _respelled(converted.messages)
    return converted


# How each layout is told from the others, and converted. The first one that knows the row takes it.
LAYOUTS: list[tuple[Callable[[RawRow], bool], Callable[[RawRow], OpenAIRow]]] = [
    (exchanges.is_layout, exchanges.to_openai),
    (lone_events.is_layout, lone_events.to_openai),
    (sharegpt.is_layout, sharegpt.to_openai),
    (anthropic.is_layout, anthropic.to_openai),
    (glaive.is_layout, glaive.to_openai),
    (xlam.is_layout, xlam.to_openai),
    (prompt_completion.is_layout, prompt_completion.to_openai),
]


def _converter(row: RawRow) -> Callable[[RawRow], OpenAIRow]:
    """What converts the row: the function of its layout."""
    for is_layout, convert in LAYOUTS:
        if is_layout(row):
            return convert
    return _openai


def _openai(row: RawRow) -> OpenAIRow:
    """The row as it is. OpenAI's messages may also stand under `conversations`."""
    turns = row.get("messages") or row.get("conversations")
    messages = number_turns(turns) if isinstance(turns, list) else []
    return OpenAIRow(messages, row.get("tools"))


def _respelled(messages: NumberedMessages) -> NumberedMessages:
    """The messages with their fields under OpenAI's names."""
    result: NumberedMessages = []
    for turn, message in messages:
        with error_context(turn_name(turn, get(message, "role"))):
            result.append((turn, respell(message)))
    return result


def _with_system(row: RawRow, messages: NumberedMessages) -> NumberedMessages:
    """The messages under the row's own `system`, whatever it calls it, unless they open with the same."""
    for column in SYSTEM_COLUMNS:
        system = row.get(column)
        if system:
            with error_context(f"`{column}` of the row"):
                messages = _under(system, messages)
    return messages


def _under(system: object, messages: NumberedMessages) -> NumberedMessages:
    """The messages under a system text. DataError where they open with another."""
    if isinstance(system, str):
        system = system.removeprefix(glaive.SYSTEM)
    content = anthropic.to_parts(system)
    given = [get(message, "content") for _, message in messages if get(message, "role") in ("system", "developer")]
    if given and list(map(_comparable, given)) != [_comparable(content)]:
        raise DataError("says something else than the system turn; keep one of the two")
    return messages if given else [(0, {"role": "system", "content": content}), *messages]


def _comparable(content: object) -> object:
    """What a content says, for a comparison: its text without blanks; parts as they are where one is no text.

    "Be kind.\\n", [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]  ->  "Bekind."
    """
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [get(part, "text") for part in parts if get(part, "type") == "text"]
    if len(texts) < len(parts) or not is_list_of(texts, str):
        return content
    return without_spaces("".join(texts))
