"""Images of a row that stand in columns of their own, and the `<image>` markers where they belong (LLaMA-Factory,
ms-swift, HF `Image`):

    {"messages": [{"role": "user", "content": "<image>What is it?"}, ...], "images": ["a.png"]}     or "image": "a.png"
"""

import re

from gemma_dist.data.content import ColumnIndex, image_source
from gemma_dist.data.layouts.turns import OpenAIRow, turn_name
from gemma_dist.data.strict import error_context, get, parse_json, short
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
    if isinstance(column, str) and column.strip().startswith("["):
        with error_context("`images`"):
            return parse_json(column)
    return [column] if column and isinstance(column, (str, bytes, dict)) else column


def place_images(row: OpenAIRow) -> None:
    """Make the `<image>` markers of a row parts, in place, where they are as many as the images that have no part.

    Without images, or with a part for each, the markers are words. DataError where the numbers disagree.
    """
    if not row.images or not isinstance(row.images, list):
        return
    num_markers = num_parts = 0
    for turn, message in row.messages:
        for part in _parts(message):
            if get(part, "type") == "text":
                num_markers += _count_markers(get(part, "text"))
            else:
                with error_context(turn_name(turn, get(message, "role"))):
                    num_parts += _takes_next_image(part)
    if not num_markers or num_parts == len(row.images):
        return
    if num_parts + num_markers != len(row.images):
        raise DataError(
            f"`images` holds {len(row.images)} images for {num_markers} `{MARKER}` markers and {num_parts} image parts "
            "without one of their own; write a marker for each image, in order"
        )
    placed: list[tuple[int, object]] = []
    for turn, message in row.messages:
        if isinstance(message, dict) and _parts(message):
            message = {**message, "content": _split(message.get("content"))}
        placed.append((turn, message))
    row.messages = placed


def _parts(message: object) -> list[object]:
    """What a message may show images in: its parts, a string as one."""
    content = get(message, "content")
    if get(message, "role") in _ROLES_WITHOUT_IMAGES:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return content if isinstance(content, list) else []


def _count_markers(text: object) -> int:
    return text.count(MARKER) if isinstance(text, str) else 0


def _takes_next_image(part: object) -> bool:
    if not isinstance(part, dict) or part.get("type") not in ("image", "image_url"):
        return False
    source = image_source(part)
    return source is None or isinstance(source, ColumnIndex)


def _split(content: object) -> object:
    if not isinstance(content, list):
        return split_markers(content)
    parts: list[object] = []
    for part in content:
        pieces = split_markers(get(part, "text")) if get(part, "type") == "text" else None
        if isinstance(pieces, list):
            parts += [piece if piece["type"] == "image" else {**part, **piece} for piece in pieces]
        else:
            parts.append(part)
    return parts


def split_markers(value: object) -> object:
    """Text with `<image>` markers as a list of parts; the images come from the row's `images` in order."""
    if not isinstance(value, str) or MARKER not in value:
        return value
    pieces = re.split(f"({MARKER})", value)
    return [{"type": "image"} if piece == MARKER else {"type": "text", "text": piece} for piece in pieces if piece]
