"""LangChain: messages by `type`, as `model_dump`, `messages_to_dict` or `dumpd` write them.

{"type": "ai", "content": "", "tool_calls": [{"name": "weather", "args": {"city": "Rome"}, "id": "c1",
 "type": "tool_call"}], "additional_kwargs": {"tool_calls": [...]}, "response_metadata": {...}}
{"type": "tool", "data": {"content": "30", "tool_call_id": "c1", "status": "success"}}
{"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", "HumanMessage"], "kwargs": {...}}
"""

from collections import Counter

from gemma_dist.data import marks
from gemma_dist.data.layouts.pieces import (
    ENCRYPTED_REASONING,
    Answer,
    Call,
    Piece,
    Reasoning,
    add_pieces,
    content_part,
    tidy,
)
from gemma_dist.data.layouts.turns import OpenAIRow, turn_name
from gemma_dist.data.strict import error_context, get, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

LANGCHAIN_ROLES = {
    "human": "user",
    "HumanMessage": "user",
    "HumanMessageChunk": "user",
    "ai": "assistant",
    "AIMessage": "assistant",
    "AIMessageChunk": "assistant",
    "tool": "tool",
    "ToolMessage": "tool",
    "ToolMessageChunk": "tool",
    "system": "system",
    "SystemMessage": "system",
    "SystemMessageChunk": "system",
    "function": "function",
    "FunctionMessage": "function",
    "chat": "",  # says its role itself
    "ChatMessage": "",
}
CARRIED = ("name", "reasoning_content", *marks.ON_MESSAGE, *marks.UNCLEAR)
CALL_BLOCKS = ("tool_use", "tool_call", "function_call", "tool_call_chunk")  # repeat what `tool_calls` says
ARTIFACT = "artifacts of tool messages, which no model sees, were left out"


def is_message(message: object) -> bool:
    """Whether an object is a message of LangChain: it has a type of theirs and no role."""
    if not isinstance(message, dict) or (message.get("role") is not None and message.get("type") != "chat"):
        return False
    if message.get("lc") is not None and isinstance(message.get("kwargs"), dict):
        return _class_name(message) in LANGCHAIN_ROLES
    kind = message.get("type")
    has_content = "content" in message or isinstance(message.get("data"), dict)
    return isinstance(kind, str) and kind in LANGCHAIN_ROLES and has_content


def is_messages(messages: list[object]) -> bool:
    """Whether one of the messages is LangChain's, or holds calls in LangChain's form."""
    return any(is_message(message) or any(map(_is_own_call, _calls_of(message))) for message in messages)


def to_openai(messages: list[object]) -> OpenAIRow:
    """The messages in OpenAI's shape; those that have a role pass. DataError where one cannot be converted."""
    row = OpenAIRow([])
    for number, message in enumerate(messages, start=1):
        if not is_message(message):
            if get(message, "type") == "remove":
                raise DataError(f"turn {number} removes another message; export the state after it was applied")
            row.messages.append((number, _with_openai_calls(message)))
            continue
        assert isinstance(message, dict)
        role, fields = _role_and_fields(message)
        with error_context(turn_name(number, role)):
            kept = {key: fields[key] for key in CARRIED if fields.get(key) is not None}
            if role in ("tool", "function"):
                pieces = [_answer(fields, row.notes)]
                add_pieces(row.messages, number, role, pieces, row.notes)
            else:
                add_pieces(row.messages, number, role, _pieces(fields, row.notes), row.notes, kept=kept)
    row.messages = tidy(row.messages)
    return row


def _calls_of(message: object) -> list[object]:
    calls = get(message, "tool_calls")
    return calls if isinstance(calls, list) else []


def _is_own_call(call: object) -> bool:
    return get(call, "type") == "tool_call" and get(call, "function") is None


def _with_openai_calls(message: object) -> object:
    """A message with a role, as Langfuse logs those of LangChain, with its calls in OpenAI's form."""
    calls = _calls_of(message)
    if not isinstance(message, dict) or not any(map(_is_own_call, calls)):
        return message
    read = [_call(call) for call in calls]
    functions = [{"id": call.id, "function": {"name": call.name, "arguments": call.arguments}} for call in read]
    return {**message, "tool_calls": functions}


def _class_name(message: RawRow) -> object:
    names = message.get("id")
    return names[-1] if isinstance(names, list) and names else None


def _role_and_fields(message: RawRow) -> tuple[object, RawRow]:
    """The role in OpenAI's words, and where the fields of the message stand."""
    fields = message
    kind = message.get("type")
    if message.get("lc") is not None:
        kind = _class_name(message)
        fields = message["kwargs"]  # type: ignore[assignment]
    elif isinstance(message.get("data"), dict):
        fields = message["data"]  # type: ignore[assignment]
    assert isinstance(kind, str)
    return LANGCHAIN_ROLES[kind] or fields.get("role"), fields


def _answer(fields: RawRow, notes: Counter[str]) -> Answer:
    if fields.get("artifact") is not None:
        notes[ARTIFACT] += 1
    content = fields.get("content")
    if isinstance(content, list):
        content = [content_part(part) for part in content]
    return Answer(fields.get("tool_call_id"), content, fields.get("name"), fields.get("status") == "error")


def _pieces(fields: RawRow, notes: Counter[str]) -> list[Piece]:
    """Reasoning, content and calls of a message, each of which LangChain may write in several places."""
    invalid = fields.get("invalid_tool_calls")
    if invalid:
        raise DataError(
            f"`invalid_tool_calls` holds {short(invalid)}; a call has to be an object with JSON arguments: mend it as "
            '{"name": "NAME", "args": {...}, "id": "ID", "type": "tool_call"} under tool_calls, or remove the turn'
        )
    content = fields.get("content")
    blocks = content if isinstance(content, list) else [content] if content else []
    beside = fields.get("additional_kwargs")
    pieces = _reasoning_beside(beside)
    for block in blocks:
        piece = _piece(block, notes)
        if not (isinstance(piece, Reasoning) and piece in pieces):
            pieces.append(piece)
    calls = [piece for piece in pieces if isinstance(piece, Call)]
    rest = [piece for piece in pieces if not isinstance(piece, Call)]
    return rest + _calls(fields, beside, calls)


def _reasoning_beside(beside: object) -> list[Piece]:
    """`additional_kwargs.reasoning_content`, or `reasoning` with OpenAI's summaries."""
    text = get(beside, "reasoning_content")
    if text:
        return [Reasoning(text)]
    reasoning = get(beside, "reasoning")
    if isinstance(reasoning, str) and reasoning:
        return [Reasoning(reasoning)]
    summary = get(reasoning, "summary")
    if isinstance(summary, list) and summary:
        return [Reasoning(_summary(summary))]
    return []


def _calls(fields: RawRow, beside: object, in_content: list[Call]) -> list[Piece]:
    """The calls of `tool_calls`, else those in the form of the provider."""
    given = fields.get("tool_calls")
    if given:
        if not isinstance(given, list):
            raise DataError(f"`tool_calls` is {short(given)}; write a list of calls")
        return [_call(call) for call in given]
    if in_content:
        return list(in_content)
    given = get(beside, "tool_calls") or []
    if not given and get(beside, "function_call"):
        given = [{"function": get(beside, "function_call")}]
    return [_call(call) for call in given]


def _call(call: object) -> Call:
    """A call in LangChain's form (`args`), or in the provider's (`function`)."""
    function = get(call, "function")
    if isinstance(function, dict):
        return Call(get(call, "id"), function.get("name"), function.get("arguments"))
    if not isinstance(call, dict) or "args" not in call:
        raise DataError(
            f'the call {short(call)} has no `args`; write {{"name": ..., "args": {{...}}, "id": ..., '
            '"type": "tool_call"}'
        )
    return Call(call.get("id"), call.get("name"), call["args"])


def _piece(block: object, notes: Counter[str]) -> Piece:
    """What a block of the content says; None where it says nothing that could be read."""
    kind = get(block, "type")
    if not isinstance(block, dict) or kind not in (*CALL_BLOCKS, *REASONING_BLOCKS, "input_json_delta"):
        return content_part(block)
    if kind in CALL_BLOCKS:
        arguments = next((block[key] for key in ("args", "input", "arguments") if block.get(key) is not None), None)
        return Call(block.get("call_id") or block.get("id"), block.get("name"), arguments)
    if kind == "input_json_delta":  # of a call that `tool_calls` holds as a whole
        return None
    text = _reasoning(block)
    if not text:
        notes[ENCRYPTED_REASONING] += 1
        return None
    return Reasoning(text)


REASONING_BLOCKS = ("reasoning", "thinking", "reasoning_content", "redacted_thinking")


def _reasoning(block: RawRow) -> object:
    for key in ("reasoning", "thinking", "text"):
        if block.get(key):
            return block[key]
    nested = block.get("reasoning_content")
    if nested:
        return get(nested, "text") or nested
    summary = block.get("summary")
    return _summary(summary) if isinstance(summary, list) else None


def _summary(summary: list[object]) -> str:
    texts = [get(part, "text") for part in summary]
    return "\n".join(text for text in texts if isinstance(text, str))
