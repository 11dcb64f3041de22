"""What the messages of logs are made of, whatever their layout: text and image parts, reasoning, calls and answers.

A layout turns each of its own parts into a piece; `add_pieces` puts the pieces together into OpenAI's messages.

    [Reasoning("Look it up."), Call("c1", "weather", {"city": "Rome"})]
    -> {"role": "assistant", "content": "", "reasoning_content": "Look it up.", "tool_calls": [...]}
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from gemma_dist.data import marks
from gemma_dist.data.layouts.turns import NumberedMessages, OpenAIRow, turn_name
from gemma_dist.data.model_turns import BETWEEN_MESSAGES
from gemma_dist.data.results import mark_error, without_filled
from gemma_dist.data.strict import error_context, get, get_list, short, to_json_text
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError
from gemma_dist.gemma_format import MAX_DEPTH

ENCRYPTED_REASONING = "encrypted reasoning parts were left out"
REASONING_MOVED = "reasoning between the texts and calls of a message was moved in front of them"
TEXT_MOVED = "texts behind calls of their message were moved in front of them, with a blank line between texts"
TEXT_KINDS = ("text", "input_text", "output_text")
FILE_KINDS = ("media", "file", "file-data", "file-url")  # images where a media type says so
IMAGE_KINDS = ("image", "image_url", "input_image", "image-url", "image-data", *FILE_KINDS)
# Where a part may hold its image, and what OpenAI's spelling calls that.
IMAGE_KEYS = {"base64": "base64", "data": "image", "image": "image", "url": "url", "image_url": "url"}
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


# Reasoning that cannot be read, or a call that stands elsewhere, too: it says nothing, but parts the texts around it.
PAUSE = Reasoning("")

# Any other object is a content part. None is a part that was left out on purpose.
Piece: TypeAlias = Reasoning | Call | Answer | object


def role_of(turn: object) -> object:
    """Who speaks in a turn; None where it does not say so by `role`."""
    return get(turn, "role")


def convert_turns(
    turns: list[object],
    add: Callable[[OpenAIRow, int, object], None],
    speaker: Callable[[object], object] = role_of,
) -> OpenAIRow:
    """The row to which `add(row, number, turn)` adds what each turn says.

    Args:
        speaker: what errors call a turn, besides its number.
    """
    row = OpenAIRow([])
    for number, turn in enumerate(turns, start=1):
        with error_context(turn_name(number, speaker(turn))):
            add(row, number, turn)
    row.messages = tidy(row.messages)
    return row


def has_part(messages: list[object], key: str, is_own: Callable[[object], bool]) -> bool:
    """Whether one of the messages has a part of a layout's own in the list under `key`."""
    return any(is_own(part) for message in messages for part in get_list(message, key))


def without_keys(turn: RawRow, keys: tuple[str, ...]) -> RawRow:
    """What a turn holds besides the keys that its layout converts: name, marks, keys that are refused later."""
    return {key: turn[key] for key in turn if key not in keys}


def add_pieces(
    messages: NumberedMessages,
    turn: int,
    role: object,
    pieces: Sequence[Piece],
    notes: Counter[str],
    *,
    joins: bool = False,
    kept: RawRow | None = None,
) -> None:
    """Append what a turn says to `messages`: a tool message for each answer, one message for what lies between them.

    Args:
        joins: an assistant's pieces go on with the message of the assistant that stands last, if both are trained or
            neither is.
        kept: other keys of the turn, which its messages keep.
    """
    kept = kept or {}
    message = open_assistant(messages) if joins and role == "assistant" else None
    if message is not None and marks.is_trained(message) != marks.is_trained(kept):
        message = None
    if not pieces:
        messages.append((turn, {**kept, "role": role, "content": ""}))
    goes_on = False  # whether a text goes on with the text before it
    for piece in pieces:
        if piece is None:
            continue
        if piece is PAUSE:
            goes_on = False
            continue
        if isinstance(piece, Answer):
            messages.append((turn, _tool_message(piece)))
            message = None
            continue
        if message is None:
            message = {**kept, "role": role, "content": []}
            messages.append((turn, message))
        _add_piece(message, piece, goes_on, notes)
        goes_on = not isinstance(piece, (Reasoning, Call))


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
    """{"role": "user", "content": [{"type": "text", "text": "Hi"}]} -> {"role": "user", "content": "Hi"}"""
    content = get(message, "content")
    if not isinstance(message, dict) or not isinstance(content, list):
        return message
    if not content:
        return {**message, "content": ""}
    if len(content) == 1 and _is_text(content[0]):
        return {**message, "content": content[0]["text"]}
    return message


def _add_piece(message: RawRow, piece: Piece, goes_on: bool, notes: Counter[str]) -> None:
    """Put a piece where OpenAI's message holds it: `reasoning_content`, `tool_calls` or the parts of `content`."""
    content = get_list(message, "content")
    if isinstance(piece, Reasoning):
        if not isinstance(piece.text, str):
            raise DataError(f"the reasoning is {short(piece.text)}, not text; write it as text or remove it")
        if message.get("tool_calls") or says_text(content):
            notes[REASONING_MOVED] += 1
        earlier = message.get("reasoning_content")
        message["reasoning_content"] = f"{earlier}\n{piece.text}" if earlier else piece.text
    elif isinstance(piece, Call):
        function = {"name": piece.name, "arguments": piece.arguments}
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            raise DataError(f"`tool_calls` is {short(calls)}; write a list of calls")
        message["tool_calls"] = [*calls, {"id": piece.id, "type": "function", "function": function}]
    else:
        if message.get("tool_calls") and says_text([piece]):
            notes[TEXT_MOVED] += 1
        message["content"] = with_part(content, piece, goes_on)


def with_part(content: list[object], part: object, goes_on: bool) -> list[object]:
    """The content with a part behind it; a text that does not go on with the one before it begins a paragraph.

    [text part "I look."], text part "Then I fix it.", False -> [text part "I look.\\n\\nThen I fix it."]
    """
    before = content[-1] if content else None
    is_paragraph = not goes_on and _is_text(before) and _is_text(part)
    if not is_paragraph:
        return [*content, part]
    texts = [get(before, "text").rstrip(), get(part, "text").lstrip()]
    return [*content[:-1], text_part(BETWEEN_MESSAGES.join(filter(None, texts)))]


def says_text(content: list[object]) -> bool:
    """Whether one of the parts is a text that is more than blanks."""
    return any(_is_text(part) and get(part, "text").strip() for part in content)


def _tool_message(answer: Answer) -> RawRow:
    """Answer("c1", "30", "weather") -> {"role": "tool", "content": "30", "tool_call_id": "c1", "name": "weather"}"""
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


def result_content(value: object, notes: Counter[str]) -> object:
    """A tool's result as content: a string as it is, a list of text and image parts as such, other JSON as its text.

    "30" -> "30"    {"celsius": 30} -> '{"celsius": 30}'    [{"type": "text", "text": "30"}] -> the same
    ["a", "b"] -> '["a", "b"]'
    """
    if value is None or isinstance(value, str):
        return value
    parts = content_parts(value)
    is_value = not isinstance(value, list) or all(isinstance(item, str) for item in value)
    if is_value or not all(map(_is_part, parts)):
        return value_text(value, notes)
    return parts


def listed_content(items: list[object], notes: Counter[str]) -> object:
    """As `result_content`, where parts of unknown types stay parts, which are refused with the turn's others."""
    if not items or any(isinstance(get(item, "type"), str) for item in items):
        return content_parts(items)
    return result_content(items, notes)


def value_text(value: object, notes: Counter[str]) -> str:
    """A value of a tool's result as JSON text, without the nulls that Arrow filled in: ArrowStruct(t=20, sum=None) ->
    '{"t": 20}'.
    """
    try:
        return to_json_text(without_filled(value, notes))
    except RecursionError:
        raise DataError(f"nested too deeply: {short(value)}; at most {MAX_DEPTH} levels are taken") from None


def content_parts(content: object) -> list[object]:
    """The content of a message as parts, in OpenAI's spelling."""
    if content in (None, ""):
        return []
    if isinstance(content, list):
        return [content_part(part) for part in content]
    return [content_part(content)]


def content_part(part: object) -> object:
    """A text or image part of any layout in OpenAI's spelling. Others pass, and are refused with the turn's parts.

    "a text alone"                                  -> {"type": "text", "text": "a text alone"}
    {"type": "input_text", "text": "Hi"}            -> {"type": "text", "text": "Hi"}      Responses
    {"type": "input_image", "image_url": "URL"}     -> {"type": "image", "url": "URL"}     Responses
    {"type": "image", "data": "iVBO", "mimeType": "image/png"} -> {"type": "image", "image": "iVBO"}     MCP
    {"type": "image", "source": {"type": "base64", "data": "iVBO"}} -> {"type": "image", "base64": "iVBO"}     Anthropic
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
    is_image = get(part, "type") == "image" and len(get_keys(part)) > 1
    return is_image or _is_text(part)


def _is_text(part: object) -> bool:
    """Whether a part is {"type": "text", "text": "..."}."""
    return get(part, "type") == "text" and isinstance(get(part, "text"), str)


def get_keys(value: object) -> list[str]:
    """The keys of an object that say something; none where `value` is no object."""
    return [key for key, item in value.items() if item is not None] if isinstance(value, dict) else []


def _may_be_image(part: RawRow) -> bool:
    """Whether the media type of a part, or else its kind, is one of images."""
    for key in MEDIA_TYPE_KEYS:
        if part.get(key):
            return is_image_type(part[key])
    return part["type"] not in FILE_KINDS


def is_image_type(media_type: object) -> bool:
    """Whether a media type is one of images: "image/png"."""
    return isinstance(media_type, str) and media_type.startswith("image/")


def _image_part(part: RawRow) -> RawRow:
    """{"type": "image_url", "image_url": {"url": "URL"}} -> {"type": "image", "url": "URL"}"""
    source, address = part.get("source"), part.get("image_url")
    if isinstance(source, dict):  # Anthropic
        part = {"base64": source.get("data"), "url": source.get("url")}
    elif isinstance(address, dict):  # OpenAI
        part = {**part, "image_url": address.get("url")}
    for key, name in IMAGE_KEYS.items():
        if part.get(key):
            return {"type": "image", name: part[key]}
    return {"type": "image"}
