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
from gemma_dist.data.layouts.turns import OpenAIRow, turn_name
from gemma_dist.data.strict import error_context, get, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

INPUTS = ("gen_ai.input.messages", "gen_ai.prompt", "llm.input_messages")
OWN_PARTS = ("tool_call", "tool_call_response", "server_tool_call", "blob", "uri")
TEXT_PARTS = ("text", "reasoning", "thinking")


def is_messages(messages: list[object]) -> bool:
    """Whether one of the messages has parts of the GenAI conventions."""
    return any(_is_own_part(part) for message in messages for part in _parts(message))


def to_openai(messages: list[object]) -> OpenAIRow:
    """Messages with parts in OpenAI's shape. DataError where a part cannot be converted."""
    row = OpenAIRow([])
    for number, message in enumerate(messages, start=1):
        role = get(message, "role")
        with error_context(turn_name(number, role)):
            if not isinstance(message, dict) or not isinstance(message.get("parts"), list):
                row.messages.append((number, message))
                continue
            pieces = [_piece(part) for part in _parts(message)]
            if None in pieces:
                row.notes[ENCRYPTED_REASONING] += pieces.count(None)
            kept = {key: message[key] for key in message if key not in ("role", "parts", "finish_reason")}
            add_pieces(row.messages, number, role, pieces, row.notes, kept=kept)
    row.messages = tidy(row.messages)
    return row


def _parts(message: object) -> list[object]:
    parts = get(message, "parts")
    return parts if isinstance(parts, list) else []


def _is_own_part(part: object) -> bool:
    kind = get(part, "type")
    return kind in OWN_PARTS or (kind in TEXT_PARTS and get(part, "content") is not None)


def _piece(part: object) -> Piece:
    kind = get(part, "type")
    if not isinstance(part, dict):
        return content_part(part)
    if kind == "tool_call":
        return Call(part.get("id"), part.get("name"), part.get("arguments"))
    if kind == "tool_call_response":
        response = part.get("response", part.get("result"))
        return Answer(part.get("id"), result_content(response), part.get("name"))
    if kind in ("reasoning", "thinking"):
        return Reasoning(part["content"]) if part.get("content") else None
    if kind == "text":
        return text_part(part.get("content"))
    return _image(part)


def _image(part: RawRow) -> object:
    """The image of a blob or uri part, or of PydanticAI's binary and image-url; other parts pass."""
    kind = part.get("type")
    media_type = part.get("mime_type") or part.get("media_type") or "image/*"
    if part.get("modality") not in (None, "image") or not str(media_type).startswith("image/"):
        raise DataError(f"the part {short(part)} is no image; trajectories hold text and images: remove it")
    if kind in ("blob", "binary"):
        return {"type": "image", "base64": part.get("content") or part.get("data")}
    if kind in ("uri", "image-url"):
        return {"type": "image", "url": part.get("uri") or part.get("url")}
    return part


# ---- spans -----------------------------------------------------------------------------------------------------------


def is_span(row: RawRow) -> bool:
    """Whether the row is a span of a model's call that holds what the model was given."""
    attributes = read_attributes(row)
    return any(find(attributes, name) is not None for name in INPUTS)


def span_exchange(row: RawRow) -> tuple[RawRow, list[object]]:
    """What the model was given, as a request, and the message that it answered with, in a list.

    Raises:
        DataError: the span holds several answers.
    """
    attributes = read_attributes(row)
    if find(attributes, "gen_ai.input.messages") is not None:
        request, answers = _genai(attributes)
    elif find(attributes, "llm.input_messages") is not None:
        request, answers = _openinference(attributes)
    else:
        request, answers = _openllmetry(attributes)
    if len(answers) > 1:
        raise DataError(f"the span holds {len(answers)} answers to one request; keep the one that is to be trained")
    return request, answers


def _openllmetry(attributes: RawRow) -> tuple[RawRow, list[object]]:
    request: RawRow = {"messages": [_openllmetry_message(entry) for entry in find_list(attributes, "gen_ai.prompt")]}
    request["tools"] = find_list(attributes, "llm.request.functions") or None
    answers: list[object] = [
        _openllmetry_message(entry, "assistant") for entry in find_list(attributes, "gen_ai.completion")
    ]
    return request, answers


def _genai(attributes: RawRow) -> tuple[RawRow, list[object]]:
    request: RawRow = {
        "messages": find_list(attributes, "gen_ai.input.messages"),
        "tools": find_list(attributes, "gen_ai.tool.definitions") or None,
    }
    instructions = find(attributes, "gen_ai.system_instructions")
    if instructions:
        parts = find_list(attributes, "gen_ai.system_instructions")
        request["system"] = [_piece(part) for part in parts] if parts else instructions
    return request, find_list(attributes, "gen_ai.output.messages")


def _openllmetry_message(entry: object, role: str = "") -> RawRow:
    """OpenLLMetry: role, content (text, or JSON text of parts), tool_calls.N.{id, name, arguments}."""
    calls: list[RawRow] = []
    for call in find_list(entry, "tool_calls"):
        function = {"name": find(call, "name"), "arguments": find(call, "arguments")}
        calls.append({"id": find(call, "id"), "type": "function", "function": function})
    return _message(find(entry, "role") or role, _content(find(entry, "content")), calls, find(entry, "tool_call_id"))


def _openinference(attributes: RawRow) -> tuple[RawRow, list[object]]:
    tools = [_declaration(find(tool, "tool.json_schema")) for tool in find_list(attributes, "llm.tools")]
    messages = [_openinference_message(entry) for entry in find_list(attributes, "llm.input_messages")]
    answers: list[object] = [_openinference_message(entry) for entry in find_list(attributes, "llm.output_messages")]
    return {"messages": messages, "tools": tools or None}, answers


def _openinference_message(entry: object) -> RawRow:
    """OpenInference: message.role, message.content or message.contents.N, message.tool_calls.N.tool_call.function."""
    calls: list[RawRow] = []
    for call in find_list(entry, "message.tool_calls"):
        function = {
            "name": find(call, "tool_call.function.name"),
            "arguments": find(call, "tool_call.function.arguments"),
        }
        calls.append({"id": find(call, "tool_call.id"), "type": "function", "function": function})
    parts = [_openinference_part(part) for part in find_list(entry, "message.contents")]
    content = parts or find(entry, "message.content")
    reasoning = [part for part in parts if get(part, "type") == "reasoning"]
    message = _message(find(entry, "message.role"), content, calls, find(entry, "message.tool_call_id"))
    if reasoning:
        message["content"] = [part for part in parts if get(part, "type") != "reasoning"]
        message["reasoning_content"] = "\n".join(str(get(part, "text")) for part in reasoning)
    if message["role"] == "tool":
        message["name"] = find(entry, "message.name")
    return message


def _openinference_part(part: object) -> RawRow:
    kind = find(part, "message_content.type")
    if kind == "image":
        address = find(part, "message_content.image.image.url") or find(part, "message_content.image.url")
        return {"type": "image", "url": address}
    return {"type": kind, "text": find(part, "message_content.text")}


def _declaration(schema: object) -> object:
    return find_text(schema) if isinstance(schema, str) else schema


def _message(role: object, content: object, calls: list[RawRow], call_id: object) -> RawRow:
    message: RawRow = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = calls
    if call_id is not None:
        message["tool_call_id"] = call_id
    return message


def _content(content: object) -> object:
    """Content that is JSON text of nothing but text and image parts as these parts; any other text as it is."""
    if not isinstance(content, str) or not content.startswith("[{"):
        return content
    try:
        parts = json.loads(content)
    except ValueError:
        return content
    read = result_content(parts)
    return read if isinstance(read, list) else content
