"""OpenTelemetry spans of a model's call: GenAI conventions, OpenLLMetry and OpenInference (Phoenix).

    {"trace_id": ..., "name": "chat", "attributes": {
      "gen_ai.system_instructions": [{"type": "text", "content": "Be kind."}],
      "gen_ai.input.messages": [{"role": "user", "parts": [{"type": "text", "content": "Hi"}]}],
      "gen_ai.output.messages": [{"role": "assistant", "parts": [{"type": "tool_call", "id": ..., "name": ...}]}],
      "gen_ai.tool.definitions": [...]}}
    {"attributes": {"gen_ai.prompt.0.role": "user", "gen_ai.prompt.0.content": "Hi",
      "gen_ai.completion.0.tool_calls.0.name": "weather", "llm.request.functions.0.name": "weather"}}
    {"attributes": {"llm.input_messages.0.message.role": "user", "llm.input_messages.0.message.content": "Hi",
      "llm.output_messages.0.message.tool_calls.0.tool_call.function.name": "weather",
      "llm.tools.0.tool.json_schema": "{...}"}}

Attributes may be flat, nested, JSON text, or OTLP's list of {"key", "value": {"stringValue": ...}}.
"""

import json
from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

from gemma_dist.data.layouts.attributes import find, find_list, find_text, read_attributes
from gemma_dist.data.layouts.pieces import (
    ENCRYPTED_REASONING,
    Answer,
    Call,
    Piece,
    Reasoning,
    add_pieces,
    content_part,
    result_content,
    text_part,
    tidy,
)
from gemma_dist.data.layouts.turns import OpenAIRow, first_filled, turn_name
from gemma_dist.data.strict import error_context, get, get_list, short, without, without_nulls
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

# What parts of the GenAI conventions are called. Those of THOUGHTS and "text" hold `content`, where others hold `text`.
THOUGHTS = ("reasoning", "thinking")
OWN_PARTS = ("tool_call", "tool_call_response", "server_tool_call", "blob", "uri")
IN_MESSAGE_KEYS = ("role", "parts", "finish_reason")  # which a message in OpenAI's shape does without, or writes itself


def is_messages(messages: list[object]) -> bool:
    """Whether one of the messages has parts of the GenAI conventions."""
    return any(_is_own_part(part) for message in messages for part in get_list(message, "parts"))


def to_openai(messages: list[object]) -> OpenAIRow:
    """Messages with parts in OpenAI's shape. DataError where a part cannot be converted.

    {"role": "assistant", "parts": [{"type": "tool_call", "id": "c1", "name": "f", "arguments": {...}}]}
      -> {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "function": {"name": "f", ...}}]}
    """
    row = OpenAIRow([])
    for number, message in enumerate(messages, start=1):
        role, parts = get(message, "role"), get(message, "parts")
        if not isinstance(message, dict) or not isinstance(parts, list):
            row.messages.append((number, message))
            continue
        with error_context(turn_name(number, role)):
            pieces = [_piece(part, row.notes) for part in parts]
            if None in pieces:
                row.notes[ENCRYPTED_REASONING] += pieces.count(None)
            add_pieces(row.messages, number, role, pieces, row.notes, kept=without(message, *IN_MESSAGE_KEYS))
    row.messages = tidy(row.messages)
    return row


def _is_own_part(part: object) -> bool:
    """Whether only the GenAI conventions write a part so: {"type": "text", "content": "Hi"}."""
    kind = get(part, "type")
    if kind in OWN_PARTS:
        return True
    return kind in ("text", *THOUGHTS) and get(part, "content") is not None


def _piece(part: object, notes: Counter[str]) -> Piece:
    """What a part says; None for a thought that is encrypted.

    {"type": "tool_call_response", "id": "c1", "response": {"t": 20}} -> Answer("c1", '{"t": 20}')
    """
    if not isinstance(part, dict):
        return content_part(part)
    kind, content = part.get("type"), part.get("content")
    if kind == "tool_call":
        return Call(part.get("id"), part.get("name"), part.get("arguments"))
    if kind == "tool_call_response":
        response = part.get("response", part.get("result"))
        return Answer(part.get("id"), result_content(response, notes), part.get("name"))
    if kind in THOUGHTS:
        return Reasoning(content) if content else None
    return text_part(content) if kind == "text" else _image(part)


def _image(part: RawRow) -> object:
    """The image of a blob or uri part, or of PydanticAI's binary and image-url; other parts pass.

    {"type": "blob", "modality": "image", "mime_type": "image/png", "content": "iVB..."}
      -> {"type": "image", "base64": "iVB..."}
    """
    kind = part.get("type")
    media_type = first_filled(part, "mime_type", "media_type") or "image/*"
    if part.get("modality") not in (None, "image") or not str(media_type).startswith("image/"):
        raise DataError(f"the part {short(part)} is no image; trajectories hold text and images: remove it")
    if kind in ("blob", "binary"):
        return {"type": "image", "base64": first_filled(part, "content", "data")}
    if kind in ("uri", "image-url"):
        return {"type": "image", "url": first_filled(part, "uri", "url")}
    return part


# ---- spans -----------------------------------------------------------------------------------------------------------


def is_span(row: RawRow) -> bool:
    """Whether the row is a span of a model's call that holds what the model was given."""
    return _reader(read_attributes(row)) is not None


def span_exchange(row: RawRow) -> tuple[RawRow, list[object]]:
    """What the model was given, as a request, and the message that it answered with, in a list.

    ({"messages": [...], "tools": [...] or None, "system": ...}, [{"role": "assistant", ...}])

    Raises:
        DataError: the span holds several answers.
    """
    attributes = read_attributes(row)
    read = _reader(attributes)
    assert read is not None
    request, answers = read(attributes)
    request["tools"] = request["tools"] or None
    if len(answers) > 1:
        raise DataError(f"the span holds {len(answers)} answers to one request; keep the one that is to be trained")
    return request, answers


def _reader(attributes: RawRow) -> "Reader | None":
    """How the attributes are read; None where they do not say what a model was given."""
    for name, reader in READERS.items():
        if find(attributes, name) is not None:
            return reader
    return None


def _genai(attributes: RawRow) -> tuple[RawRow, list[object]]:
    """The GenAI conventions (1.37): messages with parts, which `to_openai` converts, and instructions beside them."""
    instructions = [_piece(part, Counter()) for part in find_list(attributes, "gen_ai.system_instructions")]
    request: RawRow = {
        "messages": find_list(attributes, "gen_ai.input.messages"),
        "tools": find_list(attributes, "gen_ai.tool.definitions"),
        "system": instructions or find(attributes, "gen_ai.system_instructions"),
    }
    return request, find_list(attributes, "gen_ai.output.messages")


def _openllmetry(attributes: RawRow) -> tuple[RawRow, list[object]]:
    """OpenLLMetry (Traceloop): gen_ai.prompt.N, gen_ai.completion.N and llm.request.functions.N."""
    given = find_list(attributes, "gen_ai.prompt")
    answers = find_list(attributes, "gen_ai.completion")
    request: RawRow = {
        "messages": [_openllmetry_message(entry) for entry in given],
        "tools": find_list(attributes, "llm.request.functions"),
    }
    return request, [_openllmetry_message(entry, "assistant") for entry in answers]


def _openllmetry_message(entry: object, role: str = "") -> RawRow:
    """OpenLLMetry: role, content (text, or JSON text of parts), tool_calls.N.{id, name, arguments}.

    {"role": "assistant", "tool_calls.0.id": "c1", "tool_calls.0.name": "f", "tool_calls.0.arguments": "{}"}
      -> {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "function": {"name": "f", ...}}]}
    """
    calls = [_call(call) for call in find_list(entry, "tool_calls")]
    return _message(find(entry, "role") or role, _content(find(entry, "content")), calls, find(entry, "tool_call_id"))


def _openinference(attributes: RawRow) -> tuple[RawRow, list[object]]:
    """OpenInference (Phoenix): llm.input_messages.N, llm.output_messages.N and llm.tools.N.tool.json_schema."""
    given = find_list(attributes, "llm.input_messages")
    answers = find_list(attributes, "llm.output_messages")
    schemas = [find(tool, "tool.json_schema") for tool in find_list(attributes, "llm.tools")]
    request: RawRow = {
        "messages": [_openinference_message(entry) for entry in given],
        "tools": [find_text(schema) if isinstance(schema, str) else schema for schema in schemas],
    }
    return request, [_openinference_message(entry) for entry in answers]


def _openinference_message(entry: object) -> RawRow:
    """OpenInference: message.role, message.content or message.contents.N, message.tool_calls.N.tool_call.function.

    {"message.role": "user", "message.contents.0.message_content.text": "Hi", ...}
      -> {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    """
    said: list[RawRow] = []
    thoughts: list[str] = []
    entries = find_list(entry, "message.contents")
    for part in map(_openinference_part, entries):
        if part["type"] == "reasoning":
            thoughts.append(str(part["text"]))
        else:
            said.append(part)
    content = said if entries else find(entry, "message.content")
    calls = [_call(call, "tool_call.", "tool_call.function.") for call in find_list(entry, "message.tool_calls")]
    message = _message(find(entry, "message.role"), content, calls, find(entry, "message.tool_call_id"))
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if message["role"] == "tool":
        message["name"] = find(entry, "message.name")
    return message


def _openinference_part(part: object) -> RawRow:
    """{"message_content.type": "text", "message_content.text": "Hi"} -> {"type": "text", "text": "Hi"}"""
    kind = find(part, "message_content.type")
    if kind == "image":
        address = find(part, "message_content.image.image.url") or find(part, "message_content.image.url")
        return {"type": "image", "url": address}
    return {"type": kind, "text": find(part, "message_content.text")}


def _call(entry: object, call: str = "", function: str = "") -> RawRow:
    """A call in OpenAI's shape; `call` and `function` are how the names of its id and of its function's keys begin."""
    called = {"name": find(entry, function + "name"), "arguments": find(entry, function + "arguments")}
    return {"id": find(entry, call + "id"), "type": "function", "function": called}


def _message(role: object, content: object, calls: list[RawRow], call_id: object) -> RawRow:
    """A message in OpenAI's shape, with `tool_calls` and `tool_call_id` where there are such."""
    return {"role": role, "content": content, **without_nulls({"tool_calls": calls or None, "tool_call_id": call_id})}


def _content(content: object) -> object:
    """Content that is JSON text of nothing but text and image parts as these parts; any other text as it is."""
    if not isinstance(content, str) or not content.startswith("[{"):
        return content
    try:
        parts = json.loads(content)
    except ValueError:
        return content
    read = result_content(parts, Counter())
    return read if isinstance(read, list) else content


Reader: TypeAlias = Callable[[RawRow], tuple[RawRow, list[object]]]
# How a span is read whose attributes hold this name.
READERS: dict[str, Reader] = {
    "gen_ai.input.messages": _genai,
    "llm.input_messages": _openinference,
    "gen_ai.prompt": _openllmetry,
}
