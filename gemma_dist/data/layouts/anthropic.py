"""Anthropic: content as blocks, `system` beside the messages, tools with `input_schema`."""

from gemma_dist.data.content import mark_error
from gemma_dist.data.layouts.turns import NumberedMessages, OpenAIRow, number_turns, turn_name
from gemma_dist.data.strict import error_context, get, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

ANTHROPIC_BLOCKS = ("tool_use", "tool_result", "thinking", "redacted_thinking")


def is_layout(row: RawRow) -> bool:
    """Whether the row has Anthropic's blocks, `system` beside its messages, or tools with `input_schema`."""
    messages, tools = row.get("messages"), row.get("tools")
    if not messages or not isinstance(messages, list):
        return False
    if row.get("system"):
        return True
    if isinstance(tools, list) and any(get(tool, "input_schema") for tool in tools):
        return True
    return any(_is_own_block(block) for message in messages for block in _blocks(message))


def to_openai(row: RawRow) -> OpenAIRow:
    """The row in the OpenAI shape. DataError where a block cannot be converted."""
    turns = row["messages"]
    assert isinstance(turns, list)
    return OpenAIRow(to_messages(number_turns(turns)), row.get("tools"), row.get("images"))


def _is_own_block(block: object) -> bool:
    return get(block, "type") in ANTHROPIC_BLOCKS or isinstance(get(block, "source"), dict)


def _blocks(message: object) -> list[object]:
    content = get(message, "content")
    return content if isinstance(content, list) else []


def to_messages(turns: NumberedMessages) -> NumberedMessages:
    """The turns with blocks as messages; others pass. DataError where a block cannot be converted."""
    messages: NumberedMessages = []
    for number, turn in turns:
        role = get(turn, "role")
        with error_context(turn_name(number, role)):
            if not isinstance(turn, dict) or not any(map(_is_own_block, _blocks(turn))):
                messages.append((number, turn))
            elif role == "assistant":
                messages.append((number, _assistant(turn)))
            else:
                messages += [(number, message) for message in _user(turn)]
    return messages


def _assistant(turn: RawRow) -> RawRow:
    """The message with its tool_use blocks as calls; the rest stays content."""
    content: list[object] = []
    calls: list[RawRow] = []
    for block in _blocks(turn):
        if isinstance(block, dict) and block.get("type") == "tool_use":
            calls.append(block)
        else:
            content.append(_part(block))
    message = {**turn, "content": content}
    if calls:
        message["tool_calls"] = calls
    return message


def _user(turn: RawRow) -> list[RawRow]:
    """A tool message for each tool_result, a message of the turn's own role for each run of other blocks, in order."""
    rest = {key: value for key, value in turn.items() if key != "content"}
    messages: list[RawRow] = []
    blocks_of_message: list[object] | None = None  # the content of the last message, where it is no tool's
    for block in _blocks(turn):
        if get(block, "type") == "tool_result":
            content = to_parts(get(block, "content"))
            if get(block, "is_error"):
                content = mark_error(content)
            messages.append({"role": "tool", "tool_call_id": get(block, "tool_use_id"), "content": content})
            blocks_of_message = None
            continue
        if blocks_of_message is None:
            blocks_of_message = []
            messages.append({**rest, "content": blocks_of_message})
        blocks_of_message.append(_part(block))
    return messages


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
