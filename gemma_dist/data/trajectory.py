"""One raw row becomes one checked trajectory: the first arrow of the walk from JSONL to checkpoint.

    for where, row in read_rows(["train.jsonl"]):
        trajectory = parse_row(row, where, settings)

Everything that could go wrong later, silently, is refused here with file, line, turn (counted from 1), rule and remedy:
answers without a call, calls that Gemma's format cannot carry, control tokens in a tool's output, images that do not
decode. What comes out is in the normal form that the chat template takes as it is, and that the shards store.
"""

import functools
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from gemma_dist.config import RowConfig
from gemma_dist.data.answers import link_answers, text_before_calls
from gemma_dist.data.convert import to_openai
from gemma_dist.data.images import check_image, load_image
from gemma_dist.data.layouts.turns import turn_name
from gemma_dist.data.messages import clean_text, parse_message, require_encodable
from gemma_dist.data.rows import Where
from gemma_dist.data.schema import check_calls, parse_tools
from gemma_dist.data.strict import error_context, get, map_json, short
from gemma_dist.data.template_kwargs import parse_template_kwargs
from gemma_dist.data.types import Message, Tool
from gemma_dist.errors import DataError


@dataclass(frozen=True)
class Trajectory:
    """A checked trajectory in normal form."""

    id: str
    messages: list[Message]
    tools: list[Tool]
    images: list[bytes]  # files as they came, one for each image part, in the order of the messages
    notes: Counter[str] = field(default_factory=Counter)  # what parsing changed or left out, in words: how often
    enable_thinking: bool | None = None  # as the row itself says; None: the setting decides


@dataclass(frozen=True)
class _ImagePlace:
    """Where an image part of a row was found; `source` is None where the row's `images` column has to fill it."""

    place: str
    source: object


def parse_row(row: object, where: Where | str, settings: RowConfig) -> Trajectory:
    """The trajectory in a raw row of any layout that is taken (`data/layouts/`).

    Args:
        where: "file:line"; it opens every message and names a row without id ("<file name>:<line>").

    Raises:
        DataError: for the first thing that is wrong.
    """
    with error_context(where):
        if not isinstance(row, dict):
            raise DataError(f"the row is {short(row)}, not a JSON object; write one object a line")
        clean = functools.partial(clean_text, escape=settings.control_tokens == "escape")
        row_id = name_row(row.get("id"), where)
        converted = to_openai(row)
        if not converted.messages:
            raise DataError(
                f"`messages` is {short(row.get('messages'))}; a row holds a list of messages (OpenAI or Anthropic), "
                f"or `conversations` (sharegpt); this one has the keys {short(list(row))}"
            )
        tools = parse_tools(converted.tools, clean)
        places: list[str] = []
        messages: list[Message] = []
        image_places: list[_ImagePlace] = []
        for turn, raw in converted.messages:
            place = turn_name(turn, get(raw, "role"))
            with error_context(place):
                parsed = parse_message(raw, clean)
            places.append(place)
            messages.append(parsed.message)
            image_places += [_ImagePlace(place, source) for source in parsed.image_sources]
        _check_order(places, messages)
        link_answers(places, messages)
        if tools:
            check_calls(places, messages, tools)
        media_root = _media_root(settings.media_root, where)
        images = _load_images(image_places, converted.images, media_root, settings.max_image_pixels)
        ordered = chain.from_iterable(text_before_calls(message, settings.text_beside_call) for message in messages)
        thinking = parse_template_kwargs(row.get("chat_template_kwargs"))
        return Trajectory(row_id, list(ordered), tools, images, converted.notes, thinking)


def name_row(given: object, where: Where | str) -> str:
    """The id of a row that gives `given` as its `id`, or nothing. DataError where that is no text or integer."""
    if given is None or given == "":
        return Path(str(where)).name
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise DataError(f"`id` is {short(given)}; write text or an integer, or leave it out")
    with error_context("`id`"):
        return require_encodable(str(map_json(given, str, str)))


def _media_root(given: Path | None, where: Where | str) -> Path:
    if given is not None:
        return given
    file = Path(str(where).rpartition(":")[0])
    return file if file.is_dir() else file.parent


def _check_order(places: list[str], messages: list[Message]) -> None:
    """An optional system message, then a user's; something to train on."""
    for index, (place, message) in enumerate(zip(places, messages, strict=True)):
        with error_context(place):
            if message["role"] == "system" and index > 0:
                raise DataError("a system message may only stand first; merge it into the first message")
    first = 1 if messages[0]["role"] == "system" else 0
    if len(messages) == first:
        raise DataError("holds a system message alone; a trajectory goes on with a user message")
    with error_context(places[first]):
        if messages[first]["role"] != "user":
            raise DataError(
                "a trajectory opens with a user message, after an optional system message; put the task first"
            )
    if not any(message["role"] == "assistant" and message.get("train", True) for message in messages):
        raise DataError("no assistant message is trained; add one or remove train: false")


def _load_images(
    image_places: list[_ImagePlace], column: object, media_root: Path, max_image_pixels: int
) -> list[bytes]:
    """The files of all image parts in order; parts without their own image are filled from the row's `images`."""
    if column is not None and not isinstance(column, list):
        raise DataError(f"`images` is {short(column)}; write a list")
    num_empty = sum(image.source is None for image in image_places)
    if num_empty != len(column or []):
        raise DataError(
            f"`images` holds {len(column or [])} images for {num_empty} image parts without one of their own; "
            "the numbers must agree"
        )
    spare = iter(column or [])
    images = []
    for image in image_places:
        with error_context(image.place):
            data = load_image(next(spare) if image.source is None else image.source, media_root)
            check_image(data, max_image_pixels)
        images.append(data)
    return images
