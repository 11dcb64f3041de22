"""LangChain: messages by `type`, as `model_dump`, `messages_to_dict` or `dumpd` write them.

{"type": "ai", "content": "", "tool_calls": [{"name": "weather", "args": {"city": "Rome"}, "id": "c1",
 "type": "tool_call"}], "additional_kwargs": {"tool_calls": [...]}, "response_metadata": {...}}
{"type": "tool", "data": {"content": "30", "tool_call_id": "c1", "status": "success"}}
{"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", "HumanMessage"], "kwargs": {...}}
"""

from collections import Counter
from typing import TypeGuard

from gemma_dist.data import marks
from gemma_dist.data.calls import first_of
from gemma_dist.data.layouts.pieces import (
    ENCRYPTED_REASONING,
    PAUSE,
    Answer,
    Call,
    Piece,
    Reasoning,
    add_pieces,
    content_part,
    has_part,
    listed_content,
    tidy,
)
from gemma_dist.data.layouts.turns import OpenAIRow, turn_name
from gemma_dist.data.strict import error_context, get, get_list, short
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
CARRIED = ("name", "reasoning_content", *marks.ON_MESSAGE, *marks.OFF_MESSAGE, *marks.UNCLEAR)
CALL_BLOCKS = ("tool_use", "tool_call", "function_call", "tool_call_chunk")  # repeat what `tool_calls` says
REASONING_BLOCKS = ("reasoning", "thinking", "reasoning_content", "redacted_thinking")
CALL_PART = "input_json_delta"  # a part of the stream of a call, which `tool_calls` holds as a whole
ARTIFACT = "artifacts of tool messages, which no model sees, were left out"


def is_message(message: object) -> TypeGuard[RawRow]:
    """Whether an object is a message of LangChain: it has a type of theirs and no role, but for {"type": "chat"}."""
    kind = get(message, "type")
    if not isinstance(message, dict) or (message.get("role") is not None and kind != "chat"):
        return False
    if _is_dumped(message):
        return _class_name(message) in LANGCHAIN_ROLES
    has_content = "content" in message or isinstance(message.get("data"), dict)
    return isinstance(kind, str) and kind in LANGCHAIN_ROLES and has_content


def is_messages(messages: list[object]) -> bool:
    """Whether one of the messages is LangChain's, or holds calls in LangChain's form."""
    return any(map(is_message, messages)) or has_part(messages, "tool_calls", _is_own_call)


def to_openai(messages: list[object]) -> OpenAIRow:
    """The messages in OpenAI's shape; those that have a role pass. DataError where one cannot be converted."""
    row = OpenAIRow([])
    for number, message in enumerate(messages, start=1):
        if is_message(message):
            _add_message(row, number, message)
        elif get(message, "type") == "remove":
            raise DataError(f"turn {number} removes another message; export the state after it was applied")
        else:
            row.messages.append((number, _with_openai_calls(message)))
    row.messages = tidy(row.messages)
    return row


def _add_message(row: OpenAIRow, number: int, message: RawRow) -> None:
    """{"type": "human", "content": "Hi"} -> {"role": "user", "content": "Hi"}"""
    role, fields = _role_and_fields(message)
    with error_context(turn_name(number, role)):
        is_answer = role in ("tool", "function")
        pieces = [_answer(fields, row.notes)] if is_answer else _pieces(fields, row.notes)
        kept = {key: fields[key] for key in CARRIED if fields.get(key) is not None}
        add_pieces(row.messages, number, role, pieces, row.notes, kept=kept)


def _is_own_call(call: object) -> bool:
    """Whether a call is in LangChain's form: {"type": "tool_call", "name": "f", "args": {...}, "id": "c1"}."""
    return get(call, "type") == "tool_call" and get(call, "function") is None


def _with_openai_calls(message: object) -> object:
    """A message with a role, as Langfuse logs those of LangChain, with its calls in OpenAI's form.

    {"role": "assistant", "tool_calls": [{"type": "tool_call", "name": "f", "args": {...}, "id": "c1"}]}
    -> {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": {...}}}]}
    """
    if not isinstance(message, dict) or not has_part([message], "tool_calls", _is_own_call):
        return message
    read = map(_call, get_list(message, "tool_calls"))
    functions = [{"id": call.id, "function": {"name": call.name, "arguments": call.arguments}} for call in read]
    return {**message, "tool_calls": functions}


def _is_dumped(message: RawRow) -> bool:
    """Whether `dumpd` wrote a message: {"lc": 1, "id": [..., "HumanMessage"], "kwargs": {"content": "Hi"}}."""
    return message.get("lc") is not None and isinstance(message.get("kwargs"), dict)


def _class_name(message: RawRow) -> object:
    """{"id": ["langchain", "schema", "messages", "HumanMessage"]} -> HumanMessage"""
    names = get_list(message, "id")
    return str(names[-1]) if names else None


def _role_and_fields(message: RawRow) -> tuple[object, RawRow]:
    """The role in OpenAI's words, and where the fields of the message stand.

    {"type": "ai", "content": ...}                            -> "assistant", the message itself   model_dump
    {"type": "ai", "data": {"content": ...}}                  -> "assistant", its `data`           messages_to_dict
    {"lc": 1, "id": [..., "AIMessage"], "kwargs": {...}}      -> "assistant", its `kwargs`         dumpd
    {"type": "chat", "role": "user", "content": ...}          -> "user", the message itself
    """
    kind, fields = message.get("type"), message
    if _is_dumped(message):
        kind, fields = _class_name(message), get(message, "kwargs")
    elif isinstance(message.get("data"), dict):
        fields = get(message, "data")
    return LANGCHAIN_ROLES[str(kind)] or fields.get("role"), fields


def _answer(fields: RawRow, notes: Counter[str]) -> Answer:
    """{"content": "30", "tool_call_id": "c1", "name": "f", "status": "success"} -> Answer("c1", "30", "f")"""
    if fields.get("artifact") is not None:
        notes[ARTIFACT] += 1
    content = fields.get("content")
    if isinstance(content, list):
        content = listed_content(content, notes)
    return Answer(fields.get("tool_call_id"), content, fields.get("name"), fields.get("status") == "error")


def _pieces(fields: RawRow, notes: Counter[str]) -> list[Piece]:
    """Reasoning, content and calls of a message, each of which LangChain may write in several places.

    {"content": "I look.", "additional_kwargs": {"reasoning_content": "Hm."}, "tool_calls": [{"name": "f", ...}]}
    -> [Reasoning("Hm."), {"type": "text", "text": "I look."}, Call("c1", "f", {...})]
    """
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
    calls: list[Piece] = []
    place_of_calls = len(pieces) + len(blocks)  # behind all of them
    for block in blocks:
        piece = _piece(block, notes)
        is_repeated = isinstance(piece, Reasoning) and piece in pieces
        if isinstance(piece, Call):
            place_of_calls = min(place_of_calls, len(pieces))
            calls.append(piece)
        pieces.append(PAUSE if is_repeated or isinstance(piece, Call) else piece)
    return pieces[:place_of_calls] + _calls(fields, beside, calls) + pieces[place_of_calls:]


def _reasoning_beside(beside: object) -> list[Piece]:
    """What `additional_kwargs` holds of reasoning: a text of its own, or OpenAI's summaries.

    {"reasoning_content": "Look it up."} -> [Reasoning("Look it up.")]      DeepSeek
    {"reasoning": {"summary": [{"type": "summary_text", "text": "Look it up."}]}} -> the same      OpenAI
    """
    text = get(beside, "reasoning_content")
    if text:
        return [Reasoning(text)]
    reasoning = get(beside, "reasoning")
    if isinstance(reasoning, str) and reasoning:
        return [Reasoning(reasoning)]
    summary = get_list(reasoning, "summary")
    return [Reasoning(_summary(summary))] if summary else []


def _calls(fields: RawRow, beside: object, in_content: list[Piece]) -> list[Piece]:
    """The calls of `tool_calls`, else those of blocks, else those that `additional_kwargs` holds as OpenAI sent them.

    The three repeat one another: LangChain reads `tool_calls` out of the other two.
    """
    given = fields.get("tool_calls")
    if given:
        if not isinstance(given, list):
            raise DataError(f"`tool_calls` is {short(given)}; write a list of calls")
        return [_call(call) for call in given]
    if in_content:
        return in_content
    given = get_list(beside, "tool_calls")
    if not given and get(beside, "function_call"):
        given = [{"function": get(beside, "function_call")}]
    return [_call(call) for call in given]


def _call(call: object) -> Call:
    """A call in LangChain's form, or in the provider's.

    {"name": "f", "args": {...}, "id": "c1", "type": "tool_call"} -> Call("c1", "f", {...})
    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{...}"}} -> Call("c1", "f", "{...}")
    """
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
    """What a block of the content says; PAUSE where it is encrypted, None where it says nothing.

    {"type": "text", "text": "Hi", "index": 0} -> {"type": "text", "text": "Hi"}
    {"type": "tool_use", "id": "c1", "name": "f", "input": {...}} -> Call("c1", "f", {...})
    {"type": "thinking", "thinking": "Look it up.", "signature": "..."} -> Reasoning("Look it up.")
    """
    kind = get(block, "type")
    if kind in CALL_BLOCKS:
        id = get(block, "call_id") or get(block, "id")
        return Call(id, get(block, "name"), first_of(block, ("args", "input", "arguments")))
    if kind in REASONING_BLOCKS:
        text = _reasoning(block)
        if text:
            return Reasoning(text)
        notes[ENCRYPTED_REASONING] += 1
        return PAUSE
    return None if kind == CALL_PART else content_part(block)


def _reasoning(block: object) -> object:
    """The text of a reasoning block, wherever its provider writes it; nothing where it is encrypted.

    {"reasoning": "Look it up."}, {"thinking": "Look it up."}, {"reasoning_content": {"text": "Look it up."}},
    {"summary": [{"type": "summary_text", "text": "Look it up."}]} -> "Look it up."
    """
    for key in ("reasoning", "thinking", "text"):
        text: object = get(block, key)
        if text:
            return text
    nested: object = get(block, "reasoning_content")
    if nested:
        return get(nested, "text") or nested
    return _summary(get_list(block, "summary"))


def _summary(summary: list[object]) -> str:
    """[{"type": "summary_text", "text": "Look it up."}] -> "Look it up.", one line for each part"""
    texts = [get(part, "text") for part in summary]
    return "\n".join(text for text in texts if isinstance(text, str))
