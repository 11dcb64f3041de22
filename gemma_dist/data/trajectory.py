"""One raw row becomes one checked trajectory: the first arrow of the walk from JSONL to checkpoint.

    for where, row in read_rows(["train.jsonl"]):
        trajectory = parse_row(row, where=where, media_root=None, ...)

Everything that could go wrong later, silently, is refused here with file, line, turn (counted from 1), rule and remedy:
answers without a call, calls that Gemma's format cannot carry, control tokens in a tool's output, pictures that do not
decode. What comes out is in the normal form that the chat template takes as it is, and that the shards store.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemma_dist.data.answers import link_answers, text_before_call
from gemma_dist.data.convert import to_openai, turn_name
from gemma_dist.data.images import check_image, load_image
from gemma_dist.data.messages import clean_text, get, parse_message, require_encodable
from gemma_dist.data.rows import Where
from gemma_dist.data.schema import check_calls, parse_tools
from gemma_dist.data.strict import error_context, map_json, short
from gemma_dist.errors import DataError


@dataclass(frozen=True)
class Trajectory:
    """A checked trajectory in normal form.

    `messages`: {"role": system|user|assistant|tool, "content": str or list of {"type": "text", "text"} and
    {"type": "image"}}; an assistant's may have "tool_calls" [{"id", "type", "function": {"name", "arguments": dict}}],
    "reasoning_content" and "train": False; a tool's has "tool_call_id" and "name". Absent is absent, never None.
    """

    id: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]  # {"type": "function", "function": {"name", "description", "parameters"?}}
    images: list[bytes]  # files as they came, one for each image part, in the order of the messages


@dataclass(frozen=True)
class _Picture:
    """Where an image part of a row was found; `source` is None where the row's `images` column has to fill it."""

    place: str
    source: Any


def parse_row(
    row: Any,
    *,
    where: Where | str,
    media_root: Path | None,
    text_beside_call: Literal["message", "reasoning"],
    control_tokens: Literal["reject", "escape"],
    max_image_pixels: int,
) -> Trajectory:
    """The trajectory in a raw row of any shape that is taken (OpenAI, sharegpt, Anthropic).

    `where` is "file:line"; it opens every message and names a row without id ("<file name>:<line>"). `media_root` is
    the folder that image paths start from and must stay inside, None the folder of the file in `where`.
    Raises DataError for the first thing that is wrong.
    """
    with error_context(where):
        if not isinstance(row, dict):
            raise DataError(f"the row is {short(row)}, not a JSON object; write one object a line")
        clean = functools.partial(clean_text, neutralise=control_tokens == "neutralise")
        row_id = name_row(row.get("id"), where)
        row, turns = to_openai(row)
        raw_messages = row.get("messages")
        if not isinstance(raw_messages, list) or not raw_messages:
            raise DataError(
                f"`messages` is {short(raw_messages)}; a row holds a list of messages (OpenAI or Anthropic), "
                f"or `conversations` (sharegpt); this one has the keys {short(list(row))}"
            )
        tools = parse_tools(row.get("tools"), clean)
        messages: list[dict[str, Any]] = []
        pictures: list[_Picture] = []
        places = [turn_name(turn, get(raw, "role")) for turn, raw in zip(turns, raw_messages, strict=True)]
        for place, raw in zip(places, raw_messages, strict=True):
            with error_context(place):
                message, sources = parse_message(raw, clean)
            messages.append(message)
            pictures += [_Picture(place, source) for source in sources]
        _check_order(places, messages)
        link_answers(places, messages)
        if tools:
            check_calls(places, messages, tools)
        images = _load_images(pictures, row.get("images"), _media_root(media_root, where), max_image_pixels)
        moved = [part for message in messages for part in text_before_call(message, text_beside_call)]
        return Trajectory(row_id, moved, tools, images)


def name_row(given: Any, where: Where | str) -> str:
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


def _check_order(places: list[str], messages: list[dict[str, Any]]) -> None:
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


# ---- pictures ----


def _load_images(pictures: list[_Picture], column: Any, media_root: Path, max_image_pixels: int) -> list[bytes]:
    """The files of all image parts in order; parts without their own picture are filled from the row's `images`."""
    if column is not None and not isinstance(column, list):
        raise DataError(f"`images` is {short(column)}; write a list")
    num_empty = sum(picture.source is None for picture in pictures)
    if num_empty != len(column or []):
        raise DataError(
            f"`images` holds {len(column or [])} pictures for {num_empty} image parts without one of their own; "
            "the numbers must agree"
        )
    spare = iter(column or [])
    images = []
    for picture in pictures:
        with error_context(picture.place):
            data = load_image(next(spare) if picture.source is None else picture.source, media_root)
            check_image(data, max_image_pixels)
        images.append(data)
    return images
