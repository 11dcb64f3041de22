"""OpenAI's Responses API and Agents SDK: a list of items, of which several make up one message.

    [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Warm in Rome?"}]},
     {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Look it up."}], "encrypted_content": "..."},
     {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"},
     {"type": "function_call_output", "call_id": "call_1", "output": "30"},
     {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]}]

`input` and `output` of a request and its response, and `result.to_input_list()` of the Agents SDK, are such lists.
"""

from collections.abc import Callable

from gemma_dist.data import marks
from gemma_dist.data.layouts.pieces import (
    ENCRYPTED_REASONING,
    Answer,
    Call,
    Piece,
    Reasoning,
    add_pieces,
    content_parts,
    convert_turns,
    has_part,
    listed_content,
    open_assistant,
    result_content,
    without_keys,
)
from gemma_dist.data.layouts.turns import OpenAIRow
from gemma_dist.data.strict import get, get_list, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

OWN_PARTS = ("input_text", "output_text", "input_image", "input_file", "summary_text", "reasoning_text")
OWN_ITEMS = (
    "function_call",
    "function_call_output",
    "reasoning",
    "custom_tool_call",
    "custom_tool_call_output",
    "mcp_call",
    "mcp_list_tools",
    "mcp_approval_request",
    "mcp_approval_response",
    "computer_call",
    "computer_call_output",
    "web_search_call",
    "file_search_call",
    "code_interpreter_call",
    "image_generation_call",
    "local_shell_call",
    "local_shell_call_output",
    "shell_call",
    "shell_call_output",
    "apply_patch_call",
    "apply_patch_call_output",
    "compaction",
    "item_reference",
)
UNSEEN_ITEMS = ("ghost_snapshot",)  # Codex keeps them for itself
BESIDE_MESSAGE = ("type", "id", "status", "content", "role", "phase")  # converted, or about the response alone
FULL_REASONING = "reasoning summaries beside the whole reasoning were left out"


def is_messages(items: list[object]) -> bool:
    """Whether one of the items is none that Chat Completions knows."""
    return any(map(_is_own_item, items))


def to_openai(items: list[object]) -> OpenAIRow:
    """The items as messages. DataError where one has no meaning in a chat with tools."""
    return convert_turns(items, _add_item, lambda item: get(item, "role") or get(item, "type"))


def is_item(item: object) -> bool:
    """Whether an object is one of Responses: a message with a type, or an item of another kind."""
    return get(item, "type") == "message" or _is_own_item(item)


def _is_own_item(item: object) -> bool:
    """Whether an item is none that Chat Completions knows: {"type": "function_call"}, or a part of `input_text`."""
    is_own_kind = get(item, "type") in OWN_ITEMS and get(item, "role") is None
    return is_own_kind or has_part([item], "content", _is_own_part)


def _is_own_part(part: object) -> bool:
    """Whether a part of a message is in the spelling of Responses: {"type": "input_text", "text": "Hi"}."""
    return get(part, "type") in OWN_PARTS


def _add_item(row: OpenAIRow, number: int, item: object) -> None:
    """Add an item of one of the ITEMS; one without a type is a message."""
    if not isinstance(item, dict):
        raise DataError(f"the item is {short(item)}; write an object with a type")
    kind = "message" if item.get("type") is None else item["type"]
    if kind in UNSEEN_ITEMS:
        return
    if not isinstance(kind, str) or kind not in ITEMS:
        raise DataError(_why_not(kind))
    ITEMS[kind](row, number, item)


def _join(row: OpenAIRow, number: int, item: RawRow, pieces: list[Piece]) -> None:
    """Add an item's pieces to the message of the assistant that stands last: calls of one response are one message."""
    marked = {key: item[key] for key in (*marks.ON_MESSAGE, *marks.UNCLEAR) if key in item}
    add_pieces(row.messages, number, "assistant", pieces, row.notes, joins=True, kept=marked)


def _add_call(row: OpenAIRow, number: int, item: RawRow) -> None:
    """{"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"} -> Call("c1", "f", "{}")"""
    _join(row, number, item, [Call(item.get("call_id"), item.get("name"), item.get("arguments"))])


def _add_output(row: OpenAIRow, number: int, item: RawRow) -> None:
    """{"type": "function_call_output", "call_id": "c1", "output": "30"} -> Answer("c1", "30")"""
    output = item.get("output")
    content = listed_content(output, row.notes) if isinstance(output, list) else result_content(output, row.notes)
    _join(row, number, item, [Answer(item.get("call_id"), content)])


def _add_tools(row: OpenAIRow, number: int, item: RawRow) -> None:
    """{"type": "mcp_list_tools", "tools": [{"name": "f", "input_schema": {...}}]}: what a server of MCP declares."""
    listed = row.tools if isinstance(row.tools, list) else []
    row.tools = [*listed, *get_list(item, "tools")]


def _add_message(row: OpenAIRow, number: int, item: RawRow) -> None:
    """A message of its own, but for an assistant's words beside reasoning or calls that wait for their answers."""
    last = open_assistant(row.messages)
    pieces = content_parts(item.get("content"))
    joins = last is not None and (not last["content"] or bool(last.get("tool_calls")))
    kept = without_keys(item, BESIDE_MESSAGE)
    add_pieces(row.messages, number, item.get("role"), pieces, row.notes, joins=joins, kept=kept)


def _add_reasoning(row: OpenAIRow, number: int, item: RawRow) -> None:
    """The reasoning itself where the item has it (open models), else its summary, else nothing that could be read."""
    whole, summary = _texts(item, "content"), _texts(item, "summary")
    if whole and summary:
        row.notes[FULL_REASONING] += 1
    texts = whole or summary
    if not texts:
        row.notes[ENCRYPTED_REASONING] += 1
        return
    last = open_assistant(row.messages)
    opens = last is not None and bool(last["content"]) and not last.get("tool_calls")
    add_pieces(row.messages, number, "assistant", [Reasoning("\n".join(texts))], row.notes, joins=not opens)


def _texts(item: RawRow, key: str) -> list[str]:
    """{"summary": [{"type": "summary_text", "text": "Look it up."}]}, "summary" -> ["Look it up."]"""
    texts: list[str] = []
    for part in get_list(item, key):
        text = get(part, "text")
        if isinstance(text, str) and text.strip():
            texts.append(text)
    return texts


def _add_mcp_call(row: OpenAIRow, number: int, item: RawRow) -> None:
    """A call that OpenAI's server made itself: call and answer in one item.

    {"type": "mcp_call", "id": "m1", "name": "f", "arguments": "{}", "output": "30", "error": null}
    """
    error = item.get("error")
    content = result_content(error if error is not None else item.get("output"), row.notes)
    call = Call(item.get("id"), item.get("name"), item.get("arguments"))
    _join(row, number, item, [call, Answer(item.get("id"), content, failed=error is not None)])


# How each type of item is added.
ITEMS: dict[str, Callable[[OpenAIRow, int, RawRow], None]] = {
    "message": _add_message,
    "reasoning": _add_reasoning,
    "function_call": _add_call,
    "function_call_output": _add_output,
    "mcp_call": _add_mcp_call,
    "mcp_list_tools": _add_tools,
}
HIDDEN = {
    "item_reference": (
        "an item_reference names an item that OpenAI keeps; export the item itself (`include` or store: false)"
    ),
    "compaction": "a compaction item hides earlier items encrypted; export the session before it was compacted",
}
WRITE_SCREENSHOT = (
    "write action and screenshot so: "
    '{"type": "function_call", "call_id": "1", "name": "computer", "arguments": "{...}"}, '
    '{"type": "function_call_output", "call_id": "1", "output": [{"type": "input_image", "image_url": "..."}]}'
)
WRITE_CALL = (
    "remove it, or write it as call and answer: "
    '{"type": "function_call", "call_id": "1", "name": "NAME", "arguments": "{...}"}, '
    '{"type": "function_call_output", "call_id": "1", "output": "TEXT"}'
)


def _why_not(kind: object) -> str:
    """Why an item of this type is not taken, and what to write instead."""
    if isinstance(kind, str) and kind in HIDDEN:
        return HIDDEN[kind]
    remedy = WRITE_SCREENSHOT if kind in ("computer_call", "computer_call_output") else WRITE_CALL
    return f"an item of type {short(kind)} is no call of a function that `tools` can declare; {remedy}"
