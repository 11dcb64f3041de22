"""What the messages of logs are made of, whatever their layout: text and image parts, reasoning, calls and answers.

A layout turns each of its own parts into a piece; `add_pieces` puts the pieces together into OpenAI's messages.

    [Reasoning("Look it up."), Call("c1", "weather", {"city": "Rome"})]
    -> {"role": "assistant", "content": "", "reasoning_content": "Look it up.", "tool_calls": [...]}
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from gemma_dist.data.content import mark_error
from gemma_dist.data.layouts.turns import NumberedMessages
from gemma_dist.data.strict import get, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

ENCRYPTED_REASONING = "encrypted reasoning parts were left out"
REASONING_MOVED = "reasoning between the calls of a message was moved in front of them"
TEXT_KINDS = ("text", "input_text", "output_text")
IMAGE_KINDS = ("image", "image_url", "input_image", "image-url", "image-data", "media", "file", "file-data", "file-url")
MEDIA_TYPE_KEYS = ("mimeType", "mime_type", "mediaType", "media_type")


@dataclass(frozen=True)
class Reasoning:
    """What a model thought before it said or called something."""

    text: object


@dataclass(frozen=True)
class Call:
    """A call of a tool; `arguments` is an object or its JSON text."""

    id: object
    name: object
    arguments: object


@dataclass(frozen=True)
class Answer:
    """What a tool gave back: a string, or parts. `failed` is the flag of a layout that has one."""

    id: object
    content: object
    name: object = None
    failed: bool = False


# Any other object is a content part. None is a part that was left out on purpose.
Piece: TypeAlias = Reasoning | Call | Answer | object


def add_pieces(
    messages: NumberedMessages,
    turn: int,
    role: object,
    pieces: Iterable[Piece],
    notes: Counter[str],
    *,
    joins: bool = False,
    kept: RawRow | None = None,
) -> None:
    """Append what a turn says to `messages`: a tool message for each answer, one message for what lies between them.

    Args:
        joins: an assistant's pieces go on with the message of the assistant that stands last.
        kept: other keys of the turn, which its messages keep.
    """
    message = open_assistant(messages) if joins and role == "assistant" else None
    given = list(pieces)
    if not given:
        messages.append((turn, {**(kept or {}), "role": role, "content": ""}))
    for piece in given:
        if piece is None:
            continue
        if isinstance(piece, Answer):
            messages.append((turn, _tool_message(piece)))
            message = None
            continue
        if message is None:
            message = {**(kept or {}), "role": role, "content": []}
            messages.append((turn, message))
        _add_piece(message, piece, notes)


def open_assistant(messages: NumberedMessages) -> RawRow | None:
    """The last message, where it is an assistant's that was put together here."""
    last = messages[-1][1] if messages else None
    if isinstance(last, dict) and last.get("role") == "assistant" and isinstance(last.get("content"), list):
        return last
    return None


def tidy(messages: NumberedMessages) -> NumberedMessages:
    """The messages with a content of one text part, or none, as a string."""
    return [(turn, _tidy(message)) for turn, message in messages]


def _tidy(message: object) -> object:
    content = get(message, "content")
    if not isinstance(message, dict) or not isinstance(content, list) or len(content) > 1:
        return message
    if not content:
        return {**message, "content": ""}
    text = get(content[0], "text")
    if get(content[0], "type") == "text" and isinstance(text, str):
        return {**message, "content": text}
    return message


def _add_piece(message: RawRow, piece: Piece, notes: Counter[str]) -> None:
    if isinstance(piece, Reasoning):
        if not isinstance(piece.text, str):
            raise DataError(f"the reasoning is {short(piece.text)}, not text; write it as text or remove it")
        if message.get("tool_calls"):
            notes[REASONING_MOVED] += 1
        earlier = message.get("reasoning_content")
        message["reasoning_content"] = f"{earlier}\n{piece.text}" if earlier else piece.text
    elif isinstance(piece, Call):
        function = {"name": piece.name, "arguments": piece.arguments}
        calls = message.setdefault("tool_calls", [])
        assert isinstance(calls, list)
        calls.append({"id": piece.id, "type": "function", "function": function})
    else:
        content = message["content"]
        assert isinstance(content, list)
        content.append(piece)


def _tool_message(answer: Answer) -> RawRow:
    content = mark_error(answer.content) if answer.failed else answer.content
    message: RawRow = {"role": "tool", "content": content}
    if answer.id is not None:
        message["tool_call_id"] = answer.id
    if answer.name is not None:
        message["name"] = answer.name
    return message


# ---- content ---------------------------------------------------------------------------------------------------------


def text_part(text: object) -> RawRow:
    """A text part; whether `text` is a string is checked with the turn's other parts."""
    return {"type": "text", "text": text}


def result_content(value: object) -> object:
    """A tool's result as content: a string as it is, a list of text and image parts as such, other JSON as its text."""
    if value is None or isinstance(value, str):
        return value
    parts = content_parts(value)
    if parts and isinstance(value, list) and all(_is_part(part) for part in parts):
        return parts
    return json.dumps(value, ensure_ascii=False)


def content_parts(content: object) -> list[object]:
    """The content of a message as parts, in OpenAI's spelling."""
    if content is None or content == "":
        return []
    if isinstance(content, list):
        return [content_part(part) for part in content]
    return [content_part(content)]


def content_part(part: object) -> object:
    """A text or image part of any layout in OpenAI's spelling. Others pass, and are refused with the turn's parts.

    {"type": "input_text", "text": ...}, {"type": "input_image", "image_url": ...}, {"type": "image", "data": ...,
    "mimeType": ...}, {"type": "image", "source": {"type": "base64", "data": ...}}, "a text alone"
    """
    if isinstance(part, str):
        return text_part(part)
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind in TEXT_KINDS and "text" in part:
        return text_part(part["text"])
    if kind not in IMAGE_KINDS or not _may_be_image(part):
        return part
    if part.get("file_id"):
        raise DataError(
            f"the image {short(part['file_id'])} is kept by the provider; nothing is downloaded: put its base64 in"
        )
    return _image_part(part)


def _is_part(part: object) -> bool:
    """Whether a part in OpenAI's spelling is complete: text, or an image with its source."""
    kind = get(part, "type")
    return (kind == "text" and isinstance(get(part, "text"), str)) or (kind == "image" and len(get_keys(part)) > 1)


def get_keys(value: object) -> list[str]:
    """The keys of an object that say something; none where `value` is no object."""
    return [key for key, item in value.items() if item is not None] if isinstance(value, dict) else []


def _may_be_image(part: RawRow) -> bool:
    """Whether nothing says that the file is of another kind."""
    media_type = next((part[key] for key in MEDIA_TYPE_KEYS if part.get(key)), None)
    if media_type is None:
        return part["type"] not in ("media", "file", "file-data", "file-url")
    return isinstance(media_type, str) and media_type.startswith("image/")


def _image_part(part: RawRow) -> RawRow:
    source = part.get("source")
    if isinstance(source, dict):
        part = {"base64": source.get("data"), "url": source.get("url")}
    address = part.get("image_url")
    if isinstance(address, dict):
        address = address.get("url")
    for key in ("base64", "data", "image", "url"):
        if part.get(key):
            return {"type": "image", key if key in ("base64", "url") else "image": part[key]}
    return {"type": "image", "url": address} if address else {"type": "image"}
