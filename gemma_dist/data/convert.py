"""Rows of other shapes into the OpenAI shape, before they are parsed: sharegpt and Anthropic, told by their keys.

A converter only moves things to where `trajectory.py` looks for them; whether they are right is checked there, once for
all shapes. Each converted message remembers the turn that it came from, so that an error still names that turn.
"""

import json
import re

from gemma_dist.data.strict import error_context, get, parse_json, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
ANTHROPIC_BLOCKS = ("tool_use", "tool_result", "thinking", "redacted_thinking")
# Keys of a sharegpt turn that its message keeps.
CARRIED = ("train", "weight", "loss", "reasoning_content", "reasoning", "thinking", "name")

# Messages with the turn of the row, from 1, that each came from; 0 for a `system` beside the turns.
NumberedMessages = list[tuple[int, object]]


def to_openai(row: RawRow) -> tuple[RawRow, NumberedMessages]:
    """The row with tools and images in the OpenAI shape, and its messages; none where it holds no list of them.

    sharegpt is known by `conversations` with `from` and `value`, Anthropic by its blocks, by `system` beside `messages`
    or by tools with `input_schema`; anything else is returned as it is.

    Raises:
        DataError: something cannot be converted, with the turn.
    """
    row = dict(row)
    for key in ("messages", "conversations", "tools"):
        if row.get(key):
            row[key] = read_json_text(row[key], key)
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, list):
        return row, []
    messages: NumberedMessages = list(enumerate(turns, start=1))
    if not row.get("messages"):
        if any("from" in turn for turn in turns if isinstance(turn, dict)):
            messages = _sharegpt_messages(row, turns)
        if not row.get("images"):
            row["images"] = [row["image"]] if row.get("image") else None
    elif _is_anthropic(row, turns):
        messages = _anthropic_messages(turns)
        row["tools"] = _anthropic_tools(row.get("tools"))
    if row.get("system"):
        messages = _with_system(row["system"], messages)
    return row, messages


def _with_system(system: object, messages: NumberedMessages) -> NumberedMessages:
    """The messages under the row's own `system`, unless they open with the same."""
    with error_context("`system` of the row"):
        given = [get(message, "content") for _, message in messages if get(message, "role") == "system"]
        if given and given != [system]:
            raise DataError("says something else than the system turn; keep one of the two")
        if given:
            return messages
        return [(0, {"role": "system", "content": _anthropic_content(system)}), *messages]


def read_json_text(value: object, name: str) -> object:
    """The value itself, or what it says where it is JSON text."""
    if not isinstance(value, str):
        return value
    with error_context(f"`{name}`"):
        return parse_json(value)


def turn_name(turn: int, role: object) -> str:
    """How errors name a turn: "turn 5 (tool)", counted from 1."""
    place = f"turn {turn}" if turn else "`system` of the row"
    return f"{place} ({role})" if turn and isinstance(role, str) and len(role) < 20 else place


# ---- sharegpt: {"conversations": [{"from": "human", "value": "..."}, ...], "system"?, "tools"?, "images"?} ----


def _sharegpt_messages(row: RawRow, turns: list[object]) -> NumberedMessages:
    """Messages with their turns. Parallel calls are answered in order by the observations after them."""
    for column in ("videos", "audios"):
        if row.get(column):
            raise DataError(f"the row brings `{column}`, which the trajectories cannot hold; remove the column")
    messages: NumberedMessages = []
    sources = [get(turn, "from") for turn in turns]
    num_calls = 0
    open_ids: list[str] = []  # of the last function_call turn: its calls that no observation has answered yet
    for index, (turn, source) in enumerate(zip(turns, sources, strict=True)):
        number = index + 1
        with error_context(turn_name(number, source)):
            if not isinstance(turn, dict) or not isinstance(source, str) or source not in SHAREGPT_ROLES:
                raise DataError(f"`from` is {short(source)}; sharegpt turns come from {', '.join(SHAREGPT_ROLES)}")
            message = {key: turn[key] for key in CARRIED if turn.get(key) is not None}
            message["role"] = SHAREGPT_ROLES[source]
            value = turn.get("value")
            if source == "function_call":
                functions = _sharegpt_calls(value)
                open_ids = [f"call_{num_calls + i}" for i in range(len(functions))]
                num_calls += len(functions)
                calls = [{"id": id, "function": function} for id, function in zip(open_ids, functions, strict=True)]
                messages.append((number, {**message, "content": "", "tool_calls": calls}))
            elif message["role"] == "tool" and open_ids:
                follows_calls = sources[index - 1] == "function_call"
                is_last = sources[number : number + 1] not in (["observation"], ["tool"])
                # The only observation after several calls answers all of them.
                answers = _sharegpt_answers(value, len(open_ids)) if follows_calls and is_last else [value]
                for answer in answers:
                    answered = {"tool_call_id": open_ids.pop(0), "content": _split_markers(answer)}
                    messages.append((number, message | answered))
            else:
                messages.append((number, {**message, "content": _split_markers(value)}))
    return messages


def _sharegpt_calls(value: object) -> list[RawRow]:
    """The calls of a function_call turn: JSON text of {"name", "arguments"} or of a list of them."""
    given = parse_json(value) if isinstance(value, str) else value
    calls: list[RawRow] = []
    for call in given if isinstance(given, list) else [given]:
        if not isinstance(call, dict) or "name" not in call:
            raise DataError(
                f'the call {short(call)} is no object with a name; write {{"name": ..., "arguments": {{...}}}}'
            )
        calls.append(call)
    return calls


def _sharegpt_answers(value: object, num_calls: int) -> list[object]:
    """What the only observation after `num_calls` calls answers to each: its JSON list where there are several."""
    if num_calls == 1:
        return [value]
    answers = parse_json(value) if isinstance(value, str) else value
    if not isinstance(answers, list) or len(answers) != num_calls:
        raise DataError(
            f"one observation, {short(value)}, after {num_calls} calls; "
            f"give an observation for each call, or a JSON list of {num_calls}"
        )
    return [answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False) for answer in answers]


def _split_markers(value: object) -> object:
    """Text with `<image>` markers as a list of parts; the images come from the row's `images` in order."""
    if not isinstance(value, str) or "<image>" not in value:
        return value
    pieces = re.split("(<image>)", value)
    return [{"type": "image"} if piece == "<image>" else {"type": "text", "text": piece} for piece in pieces if piece]


# ---- Anthropic: content as blocks, `system` beside the messages, tools with `input_schema` ----


def _is_anthropic(row: RawRow, messages: list[object]) -> bool:
    if row.get("system"):
        return True
    tools = row.get("tools")
    if isinstance(tools, list) and any(get(tool, "input_schema") for tool in tools):
        return True
    return any(_is_anthropic_block(block) for message in messages for block in _blocks(message))


def _is_anthropic_block(block: object) -> bool:
    return get(block, "type") in ANTHROPIC_BLOCKS or isinstance(get(block, "source"), dict)


def _blocks(message: object) -> list[object]:
    content = get(message, "content")
    return content if isinstance(content, list) else []


def _anthropic_messages(turns: list[object]) -> NumberedMessages:
    messages: NumberedMessages = []
    for number, turn in enumerate(turns, start=1):
        role = get(turn, "role")
        with error_context(turn_name(number, role)):
            if not isinstance(turn, dict) or not any(map(_is_anthropic_block, _blocks(turn))):
                messages.append((number, turn))
            elif role == "assistant":
                messages.append((number, _anthropic_assistant(turn)))
            else:
                messages += [(number, message) for message in _anthropic_user(turn)]
    return messages


def _anthropic_assistant(turn: RawRow) -> RawRow:
    """One message: thinking to reasoning, tool_use to calls, the rest stays content."""
    content: list[object] = []
    calls: list[RawRow] = []
    reasoning: list[object] = [turn["reasoning_content"]] if turn.get("reasoning_content") else []
    for block in _blocks(turn):
        kind = get(block, "type")
        if kind == "tool_use":
            function = {"name": get(block, "name"), "arguments": get(block, "input")}
            calls.append({"id": get(block, "id"), "function": function})
        elif kind == "thinking":
            thinking = get(block, "thinking")
            if not isinstance(thinking, str):
                raise DataError(f"the thinking block holds {short(thinking)}, not a string; write one or remove it")
            reasoning.append(thinking)
        else:
            content.append(_anthropic_part(block))
    message = {key: value for key, value in turn.items() if key not in ("content", "reasoning_content")}
    message["content"] = content
    if calls:
        message["tool_calls"] = calls
    if reasoning:
        texts = [text for text in reasoning if isinstance(text, str)]
        if len(texts) < len(reasoning):
            raise DataError(f"reasoning_content is {short(reasoning[0])}, not a string; write it as a string")
        message["reasoning_content"] = "\n".join(texts)
    return message


def _anthropic_user(turn: RawRow) -> list[RawRow]:
    """A tool message for each tool_result, a message of the turn's own role for each run of other blocks, in order."""
    rest = {key: value for key, value in turn.items() if key != "content"}
    messages: list[RawRow] = []
    blocks_of_message: list[object] | None = None  # the content of the last message, where it is no tool's
    for block in _blocks(turn):
        if get(block, "type") == "tool_result":
            content = _anthropic_content(get(block, "content"))
            if get(block, "is_error"):
                content = _mark_error(content)
            messages.append({"role": "tool", "tool_call_id": get(block, "tool_use_id"), "content": content})
            blocks_of_message = None
            continue
        if blocks_of_message is None:
            blocks_of_message = []
            messages.append({**rest, "content": blocks_of_message})
        blocks_of_message.append(_anthropic_part(block))
    return messages


def _mark_error(content: object) -> object:
    """Gemma has no flag for a failed call, so the words must say it."""
    if content is None:
        return "Error:"
    if isinstance(content, str):
        says_so = "error" in content[:40].lower()
        return content if says_so else f"Error: {content}".strip()
    if not isinstance(content, list):  # refused with the turn's content
        return content
    texts = [get(part, "text") for part in content]
    text = "".join(text for text in texts if isinstance(text, str))
    says_so = "error" in text[:40].lower()
    return content if says_so else [{"type": "text", "text": "Error: "}, *content]


def _anthropic_content(content: object) -> object:
    return [_anthropic_part(block) for block in content] if isinstance(content, list) else content


def _anthropic_part(block: object) -> object:
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


def _anthropic_tools(tools: object) -> object:
    return [_anthropic_tool(tool) for tool in tools] if isinstance(tools, list) else tools


def _anthropic_tool(tool: object) -> object:
    """A declaration with OpenAI's keys; one that has them already passes."""
    schema = get(tool, "input_schema")
    if not schema:
        return tool
    return {"name": get(tool, "name"), "description": get(tool, "description"), "parameters": schema}
