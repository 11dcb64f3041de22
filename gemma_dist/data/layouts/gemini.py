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

from gemma_dist.data.calls import first_of
from gemma_dist.data.layouts.pieces import (
    ENCRYPTED_REASONING,
    Answer,
    Call,
    Piece,
    Reasoning,
    add_pieces,
    convert_turns,
    get_keys,
    has_part,
    is_image_type,
    open_assistant,
    result_content,
    text_part,
    without_keys,
)
from gemma_dist.data.layouts.turns import OpenAIRow
from gemma_dist.data.strict import get, get_list, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

GEMINI_ROLES = {None: "user", "user": "user", "model": "assistant", "function": "user", "tool": "user"}
# Each key as the API writes it, and as Python's SDK does.
CALL = ("functionCall", "function_call")
RESPONSE = ("functionResponse", "function_response")
INLINE_DATA = ("inlineData", "inline_data")
FILE_DATA = ("fileData", "file_data")
CODE = ("executableCode", "executable_code")
SIGNATURE = ("thoughtSignature", "thought_signature")
MEDIA_TYPE = ("mimeType", "mime_type")
FILE_URI = ("fileUri", "file_uri")
OWN_KEYS = ("text", *CALL, *RESPONSE, *INLINE_DATA, *FILE_DATA, *CODE)


def is_messages(contents: list[object]) -> bool:
    """Whether one of the turns has parts that are told by their keys, not by a type."""
    return has_part(contents, "parts", _is_part)


def to_openai(contents: list[object]) -> OpenAIRow:
    """The turns as messages. DataError where a part has no meaning in a chat with tools."""
    return convert_turns(contents, _add_content)


def _is_part(part: object) -> bool:
    """Whether a part is told by its key, {"text": "Hi"}; `type` and PydanticAI's `part_kind` are of other layouts."""
    return first_of(part, ("type", "part_kind")) is None and first_of(part, OWN_KEYS) is not None


def _add_content(row: OpenAIRow, number: int, content: object) -> None:
    """{"role": "model", "parts": [{"text": "Hi"}]} -> {"role": "assistant", "content": "Hi"}"""
    role = get(content, "role")
    if role == "system":
        raise DataError("a system text stands in `systemInstruction`, not in `contents`; move it there")
    is_known = isinstance(role, str | None) and role in GEMINI_ROLES
    if not is_known or not isinstance(content, dict) or not isinstance(content.get("parts"), list):
        raise DataError(
            f"the content {short(content)} is none of Gemini's; write "
            '{"role": "user" or "model", "parts": [{"text": ...}]}'
        )
    pieces = [_piece(part, row.notes) for part in get_list(content, "parts")]
    joins = _goes_on(row, pieces)
    kept = without_keys(content, ("role", "parts"))
    add_pieces(row.messages, number, GEMINI_ROLES[role], pieces, row.notes, joins=joins, kept=kept)


def _goes_on(row: OpenAIRow, pieces: list[Piece]) -> bool:
    """Whether a turn of the model adds calls to its turn before, as a streamed answer is stored."""
    last = open_assistant(row.messages)
    if last is None:
        return False
    thinks_only = not last["content"] and not last.get("tool_calls")
    return thinks_only or all(isinstance(piece, Call) or piece is None for piece in pieces)


def _piece(part: object, notes: Counter[str]) -> Piece:
    """What a part says; None where it is a signature of thoughts alone.

    {"functionCall": {"name": "f", "args": {...}}} -> Call(None, "f", {...})
    {"text": "Look it up.", "thought": true} -> Reasoning("Look it up.")
    """
    if isinstance(part, str):
        return text_part(part)
    call, answer = first_of(part, CALL), first_of(part, RESPONSE)
    data, text = _data(part), get(part, "text")
    if first_of(part, SIGNATURE) is not None:
        notes[ENCRYPTED_REASONING] += 1
        is_signature_alone = call is None and answer is None and not text
        if is_signature_alone:
            return None
    if isinstance(call, dict):
        return Call(call.get("id"), call.get("name"), call.get("args"))
    if isinstance(answer, dict):
        return _answer(answer, notes)
    if isinstance(data, dict):
        return _image(data)
    if isinstance(text, str):
        return Reasoning(text) if get(part, "thought") else text_part(text)
    raise DataError(
        f"the part {short(part)} is none of text, functionCall, functionResponse and inlineData; remove it, or write "
        "code that ran as a functionCall and its functionResponse"
    )


def _answer(answer: RawRow, notes: Counter[str]) -> Answer:
    """What a function gave back. By Gemini's rule `output` alone is the output, `error` alone an error, else all is.

    {"name": "f", "response": {"output": "30"}} -> Answer(None, "30", "f")
    {"name": "f", "response": {"celsius": 30, "wind": 2}} -> Answer(None, '{"celsius": 30, "wind": 2}', "f")
    """
    response = answer.get("response")
    keys = get_keys(response)
    failed = keys == ["error"]
    if keys in (["output"], ["error"]):
        response = get(response, keys[0])
    content = result_content(response, notes)
    images: list[object] = []
    for part in get_list(answer, "parts"):
        data = _data(part)
        if not isinstance(data, dict):
            raise DataError(f"the part {short(part)} of a functionResponse is no inlineData; write it into `response`")
        images.append(_image(data))
    if images:
        content = [text_part(content), *images]
    return Answer(answer.get("id"), content, answer.get("name"), failed)


def _data(part: object) -> object:
    """What {"inlineData": {...}} or {"fileData": {...}} holds."""
    return first_of(part, INLINE_DATA) or first_of(part, FILE_DATA)


def _image(data: RawRow) -> RawRow:
    """{"mimeType": "image/png", "data": "iVBO"} -> {"type": "image", "base64": "iVBO"}"""
    media_type = first_of(data, MEDIA_TYPE)
    if not is_image_type(media_type):
        raise DataError(f"the data are {short(media_type)}; trajectories hold text and images: remove the part")
    if data.get("data") is not None:
        return {"type": "image", "base64": data["data"]}
    return {"type": "image", "url": first_of(data, FILE_URI)}
