"""Anthropic's Messages API: content as blocks, `system` beside the messages, tools with `input_schema`.

{"system": "Be kind.", "tools": [{"name": "weather", "input_schema": {...}}], "messages": [
  {"role": "user", "content": [{"type": "image", "source": {"type": "base64", "data": "iVB..."}}]},
  {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}]},
  {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "20", "is_error": false}]}]}
"""

from collections import Counter

from gemma_dist.data.layouts.pieces import REASONING_MOVED, TEXT_MOVED, says_text, with_part
from gemma_dist.data.layouts.turns import NumberedMessages, OpenAIRow, number_turns, turn_name
from gemma_dist.data.results import is_true, mark_error
from gemma_dist.data.strict import error_context, get, get_list, short, without
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

THOUGHTS = ("thinking", "redacted_thinking")
ANTHROPIC_BLOCKS = ("tool_use", "tool_result", *THOUGHTS)


def is_layout(row: RawRow) -> bool:
    """Whether the row has Anthropic's blocks, `system` beside its messages, or tools with `input_schema`."""
    messages = get_list(row, "messages")
    if messages and row.get("system"):
        return True
    has_tools = any(get(tool, "input_schema") for tool in get_list(row, "tools"))
    return (has_tools and bool(messages)) or any(map(_has_own_block, messages))


def to_openai(row: RawRow) -> OpenAIRow:
    """The row in the OpenAI shape. DataError where a block cannot be converted."""
    turns = row["messages"]
    assert isinstance(turns, list)
    notes: Counter[str] = Counter()
    messages = to_messages(number_turns(turns), notes)
    return OpenAIRow(messages, row.get("tools"), row.get("images"), notes=notes)


def _has_own_block(message: object) -> bool:
    """Whether a message has a block that OpenAI's messages do not: a call, a result, thinking, an image's source."""
    for block in get_list(message, "content"):
        if get(block, "type") in ANTHROPIC_BLOCKS or isinstance(get(block, "source"), dict):
            return True
    return False


def to_messages(turns: NumberedMessages, notes: Counter[str]) -> NumberedMessages:
    """The turns with blocks as messages; others pass. DataError where a block cannot be converted."""
    messages: NumberedMessages = []
    for number, turn in turns:
        role = get(turn, "role")
        with error_context(turn_name(number, role)):
            if not isinstance(turn, dict) or not _has_own_block(turn):
                messages.append((number, turn))
            elif role == "assistant":
                messages.append((number, _assistant(turn, notes)))
            else:
                messages += [(number, message) for message in _user(turn)]
    return messages


def _assistant(turn: RawRow, notes: Counter[str]) -> RawRow:
    """The message with its tool_use blocks as calls, which `parse_calls` reads as they are; the rest stays content.

    Thoughts come first, and a text behind a thought or call is a paragraph of its own.

    {"role": "assistant", "content": [A_TEXT, A_TOOL_USE]}
      -> {"role": "assistant", "content": [A_TEXT], "tool_calls": [A_TOOL_USE]}
    """
    thoughts: list[object] = []
    said: list[object] = []
    calls: list[object] = []
    goes_on = False
    for block in get_list(turn, "content"):
        kind = get(block, "type")
        if kind == "tool_use":
            calls.append(block)
        elif kind in THOUGHTS:
            if calls or says_text(said):
                notes[REASONING_MOVED] += 1
            thoughts.append(block)
        else:
            part = _part(block)
            if calls and says_text([part]):
                notes[TEXT_MOVED] += 1
            said = with_part(said, part, goes_on)
        goes_on = kind not in ("tool_use", *THOUGHTS)
    message = {**turn, "content": thoughts + said}
    if calls:
        message["tool_calls"] = calls
    return message


def _user(turn: RawRow) -> list[RawRow]:
    """A tool message for each tool_result, a message of the turn's own role for each run of other blocks, in order."""
    rest = without(turn, "content")
    messages: list[RawRow] = []
    blocks_of_message: list[object] | None = None  # the content of the last message, where it is no tool's
    for block in get_list(turn, "content"):
        if get(block, "type") == "tool_result":
            messages.append(_tool_message(block))
            blocks_of_message = None
            continue
        if blocks_of_message is None:
            blocks_of_message = []
            messages.append({**rest, "content": blocks_of_message})
        blocks_of_message.append(_part(block))
    return messages


def _tool_message(block: object) -> RawRow:
    """{"type": "tool_result", "tool_use_id": "t1", "content": "20"}
    -> {"role": "tool", "tool_call_id": "t1", "content": "20"}
    """
    content = to_parts(get(block, "content"))
    if is_true(get(block, "is_error")):
        content = mark_error(content)
    return {"role": "tool", "tool_call_id": get(block, "tool_use_id"), "content": content}


def to_parts(content: object) -> object:
    """Content with its blocks as parts; a string as it is."""
    return [_part(block) for block in content] if isinstance(content, list) else content


def _part(block: object) -> object:
    """A text or image part. Other kinds pass, and are refused with the turn's other parts."""
    source = get(block, "source")
    if get(block, "type") != "image" or not isinstance(source, dict):
        return block
    if source.get("type") == "base64":
        return {"type": "image", "base64": source.get("data")}
    if source.get("type") == "url":
        return {"type": "image", "url": source.get("url")}
    raise DataError(
        f"the image source {short(source)} is of another kind than base64 and url; put the image in as base64"
    )
