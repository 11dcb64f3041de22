"""Images of a row that stand in columns of their own, and the `<image>` markers where they belong (LLaMA-Factory,
ms-swift, HF `Image`):

    {"messages": [{"role": "user", "content": "<image>What is it?"}, ...], "images": ["a.png"]}     or "image": "a.png"
"""

import re

from gemma_dist.data.content import ColumnIndex, image_source
from gemma_dist.data.layouts.turns import OpenAIRow, turn_name
from gemma_dist.data.strict import as_list, as_object, error_context, get, is_null, parse_json, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

MARKER = "<image>"
_ROLES_WITHOUT_IMAGES = ("system", "developer")


def image_column(row: RawRow) -> object:
    """The row's `images`, or its only `image`, as a list; None where it has neither. DataError where they differ."""
    images, image = _as_list(row.get("images")), _as_list(row.get("image"))
    if images and image and images != image:
        raise DataError(f"`images` is {short(images)}, `image` is {short(image)}; keep `images`, with all of them")
    return images or image


def _as_list(column: object) -> object:
    """A column of images as a list: "a.png" -> ["a.png"], '["a.png"]' -> ["a.png"]. Lists and null stay as they are.

    {"path": null, "bytes": null}, Arrow's absent image, is null.
    """
    if isinstance(column, dict) and is_null(column):
        return None
    if isinstance(column, str) and column.strip().startswith("["):
        with error_context("`images`"):
            return parse_json(column)
    return [column] if column and isinstance(column, (str, bytes, dict)) else column


def place_images(row: OpenAIRow) -> None:
    """Make the `<image>` markers of a row parts, in place, where they are as many as the images that have no part.

    Without images, or with a part for each, the markers are words. DataError where the numbers disagree.
    """
    num_images = len(as_list(row.images))
    if not num_images:
        return
    num_markers = num_parts = 0
    for turn, message in row.messages:
        with error_context(turn_name(turn, get(message, "role"))):
            for part in _parts(message):
                num_markers += _text_of(part).count(MARKER)
                num_parts += _takes_next_image(part)
    if not num_markers or num_parts == num_images:
        return
    if num_parts + num_markers != num_images:
        raise DataError(
            f"`images` holds {num_images} images for {num_markers} `{MARKER}` markers and {num_parts} image parts "
            "without one of their own; write a marker for each image, in order"
        )
    row.messages = [(turn, _with_parts(message)) for turn, message in row.messages]


def _parts(message: object) -> list[object]:
    """What a message may show images in: its parts, a string as one."""
    content = get(message, "content")
    if get(message, "role") in _ROLES_WITHOUT_IMAGES:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return content if isinstance(content, list) else []


def _text_of(part: object) -> str:
    """What a text part says; "" of any other part."""
    text = get(part, "text")
    return text if get(part, "type") == "text" and isinstance(text, str) else ""


def _takes_next_image(part: object) -> bool:
    """Whether a part is an image without a source of its own: {"type": "image"}, {"type": "image", "image": 0}."""
    if not isinstance(part, dict) or part.get("type") not in ("image", "image_url"):
        return False
    source = image_source(part)
    return source is None or isinstance(source, ColumnIndex)


def _with_parts(message: object) -> object:
    """The message with a part in place of each marker in its content.

    [{"type": "text", "text": "<image>Hi", "train": false}] -> [{"type": "image"}, {"type": "text", "text": "Hi", ...}]
    """
    if not isinstance(message, dict) or not _parts(message):
        return message
    if isinstance(message["content"], str):
        return {**message, "content": split_markers(message["content"])}
    parts: list[object] = []
    for part in _parts(message):
        for piece in as_list(split_markers(_text_of(part))) or [part]:  # itself where it holds no marker
            is_text = get(piece, "type") == "text"
            parts.append({**as_object(part), **piece} if is_text else piece)
    return {**message, "content": parts}


def split_markers(value: object) -> object:
    """Text with `<image>` markers as a list of parts; the images come from the row's `images` in order."""
    if not isinstance(value, str) or MARKER not in value:
        return value
    pieces = re.split(f"({MARKER})", value)
    return [{"type": "image"} if piece == MARKER else {"type": "text", "text": piece} for piece in pieces if piece]
