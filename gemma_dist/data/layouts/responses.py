"""OpenAI's Responses API and Agents SDK: a list of items, of which several make up one message.

    [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Warm in Rome?"}]},
     {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Look it up."}], "encrypted_content": "..."},
     {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"},
     {"type": "function_call_output", "call_id": "call_1", "output": "30"},
     {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]}]

`input` and `output` of a request and its response, and `result.to_input_list()` of the Agents SDK, are such lists.
"""

from gemma_dist.data.layouts.pieces import (
    ENCRYPTED_REASONING,
    Answer,
    Call,
    Piece,
    Reasoning,
    add_pieces,
    content_parts,
    open_assistant,
    result_content,
    tidy,
)
from gemma_dist.data.layouts.turns import OpenAIRow, turn_name
from gemma_dist.data.strict import error_context, get, short
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
FULL_REASONING = "reasoning summaries beside the whole reasoning were left out"


def is_messages(items: list[object]) -> bool:
    """Whether one of the items is none that Chat Completions knows."""
    return any(_is_own_item(item) for item in items)


def to_openai(items: list[object]) -> OpenAIRow:
    """The items as messages. DataError where one has no meaning in a chat with tools."""
    row = OpenAIRow([])
    for number, item in enumerate(items, start=1):
        with error_context(turn_name(number, get(item, "role") or get(item, "type"))):
            if not isinstance(item, dict):
                raise DataError(f"the item is {short(item)}; write an object with a type")
            _add_item(row, number, item)
    row.messages = tidy(row.messages)
    return row


def is_item(item: object) -> bool:
    """Whether an object is one of Responses: a message with a type, or an item of another kind."""
    return get(item, "type") == "message" or _is_own_item(item)


def _is_own_item(item: object) -> bool:
    kind = get(item, "type")
    if kind in OWN_ITEMS and get(item, "role") is None:
        return True
    content = get(item, "content")
    return isinstance(content, list) and any(get(part, "type") in OWN_PARTS for part in content)


def _add_item(row: OpenAIRow, number: int, item: RawRow) -> None:
    kind = item.get("type")
    if kind in (None, "message"):
        _add_message(row, number, item)
    elif kind == "reasoning":
        _add_reasoning(row, number, item)
    elif kind == "function_call":
        _join(row, number, [Call(item.get("call_id"), item.get("name"), item.get("arguments"))])
    elif kind == "function_call_output":
        output = item.get("output")
        content = content_parts(output) if isinstance(output, list) else result_content(output)
        _join(row, number, [Answer(item.get("call_id"), content)])
    elif kind == "mcp_call":
        _join(row, number, _mcp_call(item))
    elif kind == "mcp_list_tools":
        tools = row.tools if isinstance(row.tools, list) else []
        given = item.get("tools")
        row.tools = [*tools, *given] if isinstance(given, list) else tools
    elif kind not in UNSEEN_ITEMS:
        raise DataError(_why_not(kind))


def _join(row: OpenAIRow, number: int, pieces: list[Piece]) -> None:
    add_pieces(row.messages, number, "assistant", pieces, row.notes, joins=True)


def _add_message(row: OpenAIRow, number: int, item: RawRow) -> None:
    """A message of its own, but for an assistant's first words, which belong to the reasoning and calls around them."""
    last = open_assistant(row.messages)
    kept = {key: item[key] for key in item if key not in ("type", "id", "status", "content", "role", "phase")}
    pieces = content_parts(item.get("content"))
    joins = last is not None and not last["content"]
    add_pieces(row.messages, number, item.get("role"), pieces, row.notes, joins=joins, kept=kept)


def _add_reasoning(row: OpenAIRow, number: int, item: RawRow) -> None:
    """The reasoning itself where the item has it (open models), else its summary, else nothing that could be read."""
    whole, summary = _texts(item.get("content")), _texts(item.get("summary"))
    if whole and summary:
        row.notes[FULL_REASONING] += 1
    texts = whole or summary
    if not texts:
        row.notes[ENCRYPTED_REASONING] += 1
        return
    last = open_assistant(row.messages)
    opens = last is not None and bool(last["content"]) and not last.get("tool_calls")
    add_pieces(row.messages, number, "assistant", [Reasoning("\n".join(texts))], row.notes, joins=not opens)


def _texts(parts: object) -> list[str]:
    texts: list[str] = []
    for part in parts if isinstance(parts, list) else []:
        text = get(part, "text")
        if isinstance(text, str) and text.strip():
            texts.append(text)
    return texts


def _mcp_call(item: RawRow) -> list[Piece]:
    """A call that OpenAI's server made itself: call and answer in one item."""
    error = item.get("error")
    content = result_content(error if error is not None else item.get("output"))
    call = Call(item.get("id"), item.get("name"), item.get("arguments"))
    return [call, Answer(item.get("id"), content, failed=error is not None)]


def _why_not(kind: object) -> str:
    if kind == "item_reference":
        return "an item_reference names an item that OpenAI keeps; export the item itself (`include` or store: false)"
    if kind == "compaction":
        return "a compaction item hides earlier items encrypted; export the session before it was compacted"
    if kind in ("computer_call", "computer_call_output"):
        return (
            f"an item of type {short(kind)} is no call of a function that `tools` can declare; write action and "
            'screenshot so: {"type": "function_call", "call_id": "1", "name": "computer", "arguments": "{...}"}, '
            '{"type": "function_call_output", "call_id": "1", "output": [{"type": "input_image", "image_url": "..."}]}'
        )
    return (
        f"an item of type {short(kind)} is no call of a function that `tools` can declare; remove it, or write it as "
        'call and answer: {"type": "function_call", "call_id": "1", "name": "NAME", "arguments": "{...}"}, '
        '{"type": "function_call_output", "call_id": "1", "output": "TEXT"}'
    )
