"""Rows of other shapes into the OpenAI shape, before they are parsed: sharegpt and Anthropic, told by their keys.

A converter only moves things to where `trajectory.py` looks for them; whether they are right is checked there, once for
all shapes. Each converted message remembers the turn that it came from, so that an error still names that turn.
"""

import json
import re
from typing import Any

from gemma_dist.data.strict import error_context, parse_json, short
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
CARRIED = ("train", "weight", "loss", "reasoning_content", "reasoning", "thinking", "name")  # of a sharegpt turn


def to_openai(row: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The row in the OpenAI shape, and for each of its messages the turn (from 1) of the row as given.

    A `system` text beside the turns counts as turn 0. sharegpt is known by `conversations` with `from` and `value`,
    Anthropic by its blocks, by `system` beside `messages` or by tools with `input_schema`; anything else is returned as
    it is. DataError, with the turn, where something cannot be converted.
    """
    row = {
        **row,
        **{key: read_json_text(row[key], key) for key in ("messages", "conversations", "tools") if row.get(key)},
    }
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, list):
        return row, []
    if not row.get("messages"):
        if any(isinstance(turn, dict) and "from" in turn for turn in turns):
            messages = _sharegpt_messages(row, turns)
        else:  # OpenAI messages under the other name
            messages = list(enumerate(turns, start=1))
        row = {**row, "images": row.get("images") or ([row["image"]] if row.get("image") else None)}
    elif _is_anthropic(row, turns):
        messages = _anthropic_messages(turns)
        row = {**row, "tools": _anthropic_tools(row.get("tools"))}
    else:
        return row, list(range(1, len(turns) + 1))
    if row.get("system"):
        with error_context("`system` of the row"):
            given = [m.get("content") for _, m in messages if isinstance(m, dict) and m.get("role") == "system"]
            if given and given != [row["system"]]:
                raise DataError("says something else than the system turn; keep one of the two")
            if not given:
                messages = [(0, {"role": "system", "content": _anthropic_content(row["system"])}), *messages]
    return {**row, "messages": [message for _, message in messages]}, [turn for turn, _ in messages]


def read_json_text(value: Any, name: str) -> Any:
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


def _sharegpt_messages(row: dict[str, Any], turns: list[Any]) -> list[tuple[int, Any]]:
    """Messages with their turns. Parallel calls are answered in order by the observations after them."""
    for column in ("videos", "audios"):
        if row.get(column):
            raise DataError(f"the row brings `{column}`, which the trajectories cannot hold; remove the column")
    messages: list[tuple[int, Any]] = []
    sources = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    num_calls, open_ids = 0, []
    for number, (turn, source) in enumerate(zip(turns, sources, strict=True), start=1):
        with error_context(turn_name(number, source)):
            if not isinstance(source, str) or source not in SHAREGPT_ROLES:
                raise DataError(f"`from` is {short(source)}; sharegpt turns come from {', '.join(SHAREGPT_ROLES)}")
            message = {key: turn[key] for key in CARRIED if turn.get(key) is not None}
            message |= {"role": SHAREGPT_ROLES[source]}
            value = turn.get("value")
            if source == "function_call":
                calls = _sharegpt_calls(value)
                open_ids = [f"call_{num_calls + index}" for index in range(len(calls))]
                num_calls += len(calls)
                named = [{"id": id, "function": call} for id, call in zip(open_ids, calls, strict=True)]
                messages.append((number, {**message, "content": "", "tool_calls": named}))
            elif message["role"] == "tool" and open_ids:
                alone = sources[number - 2] == "function_call" and sources[number : number + 1] not in (
                    ["observation"],
                    ["tool"],
                )
                for answer in _sharegpt_answers(value, len(open_ids)) if alone else [value]:
                    answered = {**message, "tool_call_id": open_ids.pop(0), "content": _split_markers(answer)}
                    messages.append((number, answered))
            else:
                messages.append((number, {**message, "content": _split_markers(value)}))
    return messages


def _sharegpt_calls(value: Any) -> list[dict[str, Any]]:
    """The calls of a function_call turn: JSON text of {"name", "arguments"} or of a list of them."""
    calls = parse_json(value) if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or "name" not in call:
            raise DataError(
                f'the call {short(call)} is no object with a name; write {{"name": ..., "arguments": {{...}}}}'
            )
    return calls


def _sharegpt_answers(value: Any, num_calls: int) -> list[Any]:
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


def _split_markers(value: Any) -> Any:
    """Text with `<image>` markers as a list of parts; the pictures come from the row's `images` in order."""
    if not isinstance(value, str) or "<image>" not in value:
        return value
    pieces = re.split("(<image>)", value)
    return [{"type": "image"} if piece == "<image>" else {"type": "text", "text": piece} for piece in pieces if piece]


# ---- Anthropic: content as blocks, `system` beside the messages, tools with `input_schema` ----


def _is_anthropic(row: dict[str, Any], messages: list[Any]) -> bool:
    tools = row.get("tools")
    return (
        bool(row.get("system"))
        or (isinstance(tools, list) and any(isinstance(tool, dict) and tool.get("input_schema") for tool in tools))
        or any(_is_anthropic_block(block) for message in messages for block in _blocks(message))
    )


def _is_anthropic_block(block: Any) -> bool:
    return isinstance(block, dict) and (block.get("type") in ANTHROPIC_BLOCKS or isinstance(block.get("source"), dict))


def _blocks(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, list) else []


def _anthropic_messages(turns: list[Any]) -> list[tuple[int, Any]]:
    messages: list[tuple[int, Any]] = []
    for number, turn in enumerate(turns, start=1):
        role = turn.get("role") if isinstance(turn, dict) else None
        with error_context(turn_name(number, role)):
            if not any(map(_is_anthropic_block, _blocks(turn))):
                messages.append((number, turn))
            elif role == "assistant":
                messages.append((number, _anthropic_assistant(turn)))
            else:
                messages.extend((number, message) for message in _anthropic_user(turn))
    return messages


def _anthropic_assistant(turn: dict[str, Any]) -> dict[str, Any]:
    """One message: thinking to reasoning, tool_use to calls, the rest stays content."""
    content, calls, reasoning = [], [], [turn["reasoning_content"]] if turn.get("reasoning_content") else []
    for block in turn["content"]:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_use":
            arguments = block.get("input")
            calls.append({"id": block.get("id"), "function": {"name": block.get("name"), "arguments": arguments}})
        elif kind == "thinking":
            if not isinstance(block.get("thinking"), str):
                raise DataError(
                    f"the thinking block holds {short(block.get('thinking'))}, not text; write text or remove it"
                )
            reasoning.append(block["thinking"])
        else:
            content.append(_anthropic_part(block))
    message = {key: value for key, value in turn.items() if key not in ("content", "reasoning_content")}
    message |= {"content": content, **({"tool_calls": calls} if calls else {})}
    if reasoning and not all(isinstance(text, str) for text in reasoning):
        raise DataError(f"reasoning_content is {short(reasoning[0])}, not text; write it as text")
    return message | ({"reasoning_content": "\n".join(reasoning)} if reasoning else {})


def _anthropic_user(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """A tool message for each tool_result, a message of the turn's own role for each run of other blocks, in order."""
    rest = {key: value for key, value in turn.items() if key != "content"}
    messages: list[dict[str, Any]] = []
    for block in turn["content"]:
        if isinstance(block, dict) and block.get("type") == "tool_result":
            content = _anthropic_content(block.get("content"))
            if block.get("is_error"):
                content = _mark_error(content)
            messages.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content})
        elif messages and messages[-1]["role"] != "tool":
            messages[-1]["content"].append(_anthropic_part(block))
        else:
            messages.append({**rest, "content": [_anthropic_part(block)]})
    return messages


def _mark_error(content: Any) -> Any:
    """Gemma has no flag for a failed call, so the words must say it."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
    text = "".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))
    if "error" in text[:40].lower():
        return content
    if isinstance(content, str) or content is None:
        return f"Error: {content or ''}".strip()
    return [{"type": "text", "text": "Error: "}, *parts]


def _anthropic_content(content: Any) -> Any:
    return [_anthropic_part(block) for block in content] if isinstance(content, list) else content


def _anthropic_part(block: Any) -> Any:
    """A text or image part. Other kinds pass, and are refused with the turn's other parts."""
    source = block.get("source") if isinstance(block, dict) and block.get("type") == "image" else None
    if not isinstance(source, dict):
        return block
    if source.get("type") == "base64":
        return {"type": "image", "base64": source.get("data")}
    if source.get("type") == "url":
        return {"type": "image", "url": source.get("url")}
    raise DataError(
        f"the image source {short(source)} is of another kind than base64 and url; put the picture in as base64"
    )


def _anthropic_tools(tools: Any) -> Any:
    if not isinstance(tools, list):
        return tools
    return [
        {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool["input_schema"]}
        if isinstance(tool, dict) and tool.get("input_schema")
        else tool
        for tool in tools
    ]
