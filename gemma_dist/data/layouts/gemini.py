"""Gemini: `contents` of role and `parts`, as the API and Vertex AI's tuning and batch files write them.

    {"systemInstruction": {"parts": [{"text": "Be kind."}]},
     "contents": [
       {"role": "user", "parts": [{"text": "Warm in Rome?"}, {"inlineData": {"mimeType": "image/png", "data": "..."}}]},
       {"role": "model", "parts": [{"text": "Look it up.", "thought": true},
                                   {"functionCall": {"name": "weather", "args": {"city": "Rome"}}}]},
       {"role": "user", "parts": [{"functionResponse": {"name": "weather", "response": {"output": "30"}}}]},
       {"role": "model", "parts": [{"text": "Yes."}]}],
     "tools": [{"functionDeclarations": [{"name": "weather", "parameters": {"type": "OBJECT", ...}}]}]}

Keys may also be written as Python's SDK does: `function_call`, `inline_data`, `system_instruction`.
"""

from collections import Counter

from gemma_dist.data.layouts.pieces import (
    ENCRYPTED_REASONING,
    Answer,
    Call,
    Piece,
    Reasoning,
    add_pieces,
    get_keys,
    open_assistant,
    result_content,
    text_part,
    tidy,
)
from gemma_dist.data.layouts.turns import OpenAIRow, turn_name
from gemma_dist.data.strict import error_context, get, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

GEMINI_ROLES = {None: "user", "user": "user", "model": "assistant", "function": "user", "tool": "user"}
OWN_KEYS = ("text", "functionCall", "functionResponse", "inlineData", "fileData", "executableCode")
OWN_KEYS_IN_PYTHON = ("function_call", "function_response", "inline_data", "file_data", "executable_code")


def is_messages(contents: list[object]) -> bool:
    """Whether one of the turns has parts that are told by their keys, not by a type."""
    return any(_is_part(part) for content in contents for part in _parts(content))


def to_openai(contents: list[object]) -> OpenAIRow:
    """The turns as messages. DataError where a part has no meaning in a chat with tools."""
    row = OpenAIRow([])
    for number, content in enumerate(contents, start=1):
        role = get(content, "role")
        with error_context(turn_name(number, role)):
            if role not in GEMINI_ROLES or not isinstance(content, dict) or not isinstance(content.get("parts"), list):
                if role == "system":
                    raise DataError("a system text stands in `systemInstruction`, not in `contents`; move it there")
                raise DataError(
                    f"the content {short(content)} is none of Gemini's; write "
                    '{"role": "user" or "model", "parts": [{"text": ...}]}'
                )
            pieces = [_piece(part, row.notes) for part in _parts(content)]
            joins = _goes_on(row, pieces)
            kept = {key: content[key] for key in content if key not in ("role", "parts")}
            add_pieces(row.messages, number, GEMINI_ROLES[role], pieces, row.notes, joins=joins, kept=kept)
    row.messages = tidy(row.messages)
    return row


def _parts(content: object) -> list[object]:
    parts = get(content, "parts")
    return parts if isinstance(parts, list) else []


def _is_part(part: object) -> bool:
    has_type = get(part, "type") is not None or get(part, "part_kind") is not None
    return not has_type and any(get(part, key) is not None for key in (*OWN_KEYS, *OWN_KEYS_IN_PYTHON))


def _goes_on(row: OpenAIRow, pieces: list[Piece]) -> bool:
    """Whether a turn of the model adds calls to its turn before, as a streamed answer is stored."""
    last = open_assistant(row.messages)
    if last is None:
        return False
    thinks_only = not last["content"] and not last.get("tool_calls")
    return thinks_only or all(isinstance(piece, Call) or piece is None for piece in pieces)


def _value(part: object, name: str, python_name: str) -> object:
    value = get(part, name)
    return get(part, python_name) if value is None else value


def _piece(part: object, notes: Counter[str]) -> Piece:
    if isinstance(part, str):
        return text_part(part)
    call = _value(part, "functionCall", "function_call")
    answer = _value(part, "functionResponse", "function_response")
    data = _value(part, "inlineData", "inline_data") or _value(part, "fileData", "file_data")
    text = get(part, "text")
    if _value(part, "thoughtSignature", "thought_signature") is not None:
        notes[ENCRYPTED_REASONING] += 1
        if call is None and answer is None and not text:
            return None
    if isinstance(call, dict):
        return Call(call.get("id"), call.get("name"), call.get("args"))
    if isinstance(answer, dict):
        return _answer(answer)
    if isinstance(data, dict):
        return _image(data)
    if isinstance(text, str):
        return Reasoning(text) if get(part, "thought") else text_part(text)
    raise DataError(
        f"the part {short(part)} is none of text, functionCall, functionResponse and inlineData; remove it, or write "
        "code that ran as a functionCall and its functionResponse"
    )


def _answer(answer: RawRow) -> Answer:
    """What a function gave back. By Gemini's rule `output` alone is the output, `error` alone an error, else all is."""
    response = answer.get("response")
    keys = get_keys(response)
    failed = keys == ["error"]
    if keys in (["output"], ["error"]):
        assert isinstance(response, dict)
        response = response[keys[0]]
    content = result_content(response)
    images: list[object] = []
    for part in _parts(answer):
        data = _value(part, "inlineData", "inline_data") or _value(part, "fileData", "file_data")
        if not isinstance(data, dict):
            raise DataError(f"the part {short(part)} of a functionResponse is no inlineData; write it into `response`")
        images.append(_image(data))
    if images:
        content = [text_part(content), *images]
    return Answer(answer.get("id"), content, answer.get("name"), failed)


def _image(data: RawRow) -> RawRow:
    media_type = _value(data, "mimeType", "mime_type")
    if not isinstance(media_type, str) or not media_type.startswith("image/"):
        raise DataError(f"the data are {short(media_type)}; trajectories hold text and images: remove the part")
    if data.get("data") is not None:
        return {"type": "image", "base64": data["data"]}
    return {"type": "image", "url": _value(data, "fileUri", "file_uri")}
