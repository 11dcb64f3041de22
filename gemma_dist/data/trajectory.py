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
from itertools import chain, islice
from pathlib import Path

from gemma_dist.config import EvaluateConfig, RowConfig
from gemma_dist.data import bfcl, marks, schema_fit
from gemma_dist.data.answers import link_answers
from gemma_dist.data.bounded import together
from gemma_dist.data.content import ColumnIndex, clean_text
from gemma_dist.data.convert import to_openai
from gemma_dist.data.expected import Expected, is_test_case, with_expected_answer
from gemma_dist.data.images import Media, count_pixels, decode_image, image_name, image_notes, load_image
from gemma_dist.data.layouts.turns import OpenAIRow, turn_name
from gemma_dist.data.messages import parse_message
from gemma_dist.data.model_turns import JOINED, join_neighbors, merge_parallel_calls, text_before_calls
from gemma_dist.data.nulls import settle_nulls
from gemma_dist.data.places import Where
from gemma_dist.data.schema import check_calls, parse_tools, without_schemas
from gemma_dist.data.schema_show import show_tools
from gemma_dist.data.strict import bounded_depth, error_context, get, map_json, require_encodable, short
from gemma_dist.data.template_kwargs import parse_template_kwargs
from gemma_dist.data.types import Clean, Message, RawRow, RowWithFiles, Tool
from gemma_dist.errors import DataError, setting

WEIGHED = "rows have a weight, by which their loss is multiplied"


@dataclass(frozen=True)
class Trajectory:
    """A checked trajectory in normal form."""

    id: str
    messages: list[Message]
    tools: list[Tool]
    images: list[bytes]  # files as they came, one for each image part, in the order of the messages
    notes: Counter[str] = field(default_factory=Counter)  # what parsing changed or left out, in words: how often
    enable_thinking: bool | None = None  # as the row itself says; None: the setting decides
    weight: float = 1.0  # by which its loss is multiplied
    is_outline: bool = False  # of a test case: its answer names tools, or none, and gives no arguments and no words
    any_call: bool = False  # of a test case: any call is right
    answers: tuple[str, ...] = ()  # of a test case: texts, any of which is right
    category: str = ""  # as the row says, for reports
    pair: str = ""  # as the row says: the name that it shares with a row of the same words and another image
    part: str = ""  # of a report, in which it counts (`evaluate/beside.py`); "": the main one


@dataclass(frozen=True)
class _ImagePlace:
    """Where an image part of a row was found; `source` is None where the row's `images` column has to fill it."""

    place: str
    source: object


@dataclass
class _ParsedMessages:
    """The messages of a row, how errors name each, and their image parts."""

    places: list[str]
    messages: list[Message]
    image_places: list[_ImagePlace]


def parse_row(row: object, where: Where | str, settings: RowConfig) -> Trajectory:
    """The trajectory in a raw row of any layout that is taken (`data/layouts/`).

    Args:
        where: "file:line"; it opens every message and names a row without id ("<file name>:<line>").

    Raises:
        DataError: for the first thing that is wrong.
    """
    with error_context(where), bounded_depth(), together(schema_fit.ROW_SECONDS):
        if not isinstance(row, dict):
            raise DataError(f"the row is {short(row)}, not a JSON object; write one object a line")
        media = row.files if isinstance(row, RowWithFiles) else _media_root(settings.media_root, where)
        row = bfcl.as_test_case(row) if bfcl.is_row(row) else row
        row_id = name_row(row.get("id"), where)
        expected = _convert(row, settings)
        converted = expected.row
        notes = converted.notes
        clean = _cleaner(settings.control_tokens == "escape")
        tools = parse_tools(converted.tools, clean, notes)
        parsed = _parse_messages(converted, clean, settings.arrow_nulls == "keep")
        _check_order(parsed.places, parsed.messages)
        parsed.places, parsed.messages = merge_parallel_calls(parsed.places, parsed.messages, notes)
        link_answers(parsed.places, parsed.messages)
        _check_trained(parsed.messages)
        settle_nulls(parsed.places, parsed.messages, tools, settings.arrow_nulls, notes)
        if tools:
            check_calls(parsed.places, parsed.messages, without_schemas(tools) if expected.is_outline else tools)
            tools = show_tools(tools, settings.schemas, notes)
        images = _load_images(parsed.image_places, converted.images, media, settings)
        for image in images:
            notes.update(image_notes(image))
        messages = _in_order(parsed.messages, settings, notes)
        thinking = parse_template_kwargs(row.get("chat_template_kwargs"))
        weight = marks.weight_of_row(row)
        if weight != 1:
            notes[WEIGHED] += 1
        return Trajectory(
            id=row_id,
            messages=messages,
            tools=tools,
            images=images,
            notes=notes,
            enable_thinking=thinking,
            weight=weight,
            is_outline=expected.is_outline,
            any_call=expected.any_call,
            answers=expected.answers,
            category=_label(row, "category"),
            pair=_label(row, "pair"),
        )


@functools.cache
def _cleaner(escape: bool) -> Clean:
    """One function for all rows, by which what was cleaned is remembered."""
    return functools.partial(clean_text, escape=escape)


def _label(row: RawRow, key: str) -> str:
    """A word of the row that reports sort it by; "" where it has none."""
    given = row.get(key)
    return require_encodable(given) if isinstance(given, str) else ""


def _convert(row: RawRow, settings: RowConfig) -> Expected:
    """The row in the OpenAI shape, and how its last message is judged where that is what a test case expects."""
    marks.refuse_on_row(row)
    converted = to_openai(row)
    if not converted.messages:
        raise DataError(
            f"`messages` is {short(row.get('messages'))}; a row holds a list of messages (OpenAI or Anthropic), "
            f"or `conversations` (sharegpt); this one has the keys {short(list(row))}"
        )
    if not is_test_case(row, converted):
        return Expected(converted, is_outline=False)
    if not isinstance(settings, EvaluateConfig):
        raise DataError(
            "ends without an answer and says which call is expected: a test case for `evaluate`; add the assistant "
            "message with the call to train on it"
        )
    return with_expected_answer(row, converted)


def _parse_messages(converted: OpenAIRow, clean: Clean, keeps_nulls: bool) -> _ParsedMessages:
    """All messages in normal form. Their notes are added to those of the row."""
    parsed = _ParsedMessages([], [], [])
    for turn, raw in converted.messages:
        place = turn_name(turn, get(raw, "role"))
        with error_context(place):
            message = parse_message(raw, clean, keeps_nulls)
        parsed.places.append(place)
        parsed.messages.append(message.message)
        parsed.image_places.extend(_ImagePlace(place, source) for source in message.image_sources)
        if message.notes:
            converted.notes += message.notes
    return parsed


def _in_order(messages: list[Message], settings: RowConfig, notes: Counter[str]) -> list[Message]:
    """The messages as the template keeps them: text in front of the calls beside it, neighboring texts joined."""
    in_order = chain.from_iterable(text_before_calls(message, settings.text_beside_call) for message in messages)
    joined, num_joined = join_neighbors(list(in_order))
    if num_joined:
        notes[JOINED] += num_joined
    return joined


def name_row(given: object, where: Where | str) -> str:
    """The id of a row that gives `given` as its `id`, or nothing. DataError where that is no string or integer."""
    if given is None or given == "":
        return Path(str(where)).name
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise DataError(f"`id` is {short(given)}; write a string or an integer, or leave it out")
    with error_context("`id`"):
        return require_encodable(str(map_json(given, str, str)))


def _media_root(given: Path | None, where: Where | str) -> Path:
    if given is not None:
        return given
    file = Path(str(where).rpartition(":")[0])
    return file if file.is_dir() else file.parent


def _check_order(places: list[str], messages: list[Message]) -> None:
    """An optional system message, then a user's."""
    for place, message in islice(zip(places, messages, strict=True), 1, None):
        if message["role"] == "system":
            raise DataError(f"{place}: a system message may only stand first; merge it into the first message")
    first = 1 if messages[0]["role"] == "system" else 0
    if len(messages) == first:
        raise DataError("holds a system message alone; a trajectory continues with a user message")
    if messages[first]["role"] != "user":
        raise DataError(
            f"{places[first]}: a trajectory opens with a user message, after an optional system message; put the task "
            "first"
        )


def _check_trained(messages: list[Message]) -> None:
    """Something to train on."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise DataError("no assistant message is trained: there is none; add what the model should answer")
    if not any(message.get("train", True) for message in answers):
        these = "the only one has" if len(answers) == 1 else f"all {len(answers)} have"
        raise DataError(
            f"no assistant message is trained: {these} train: false (or weight: 0); take that out where it is right"
        )


def _load_images(image_places: list[_ImagePlace], column: object, media: Media, settings: RowConfig) -> list[bytes]:
    """The files of all image parts in order; parts without their own image are filled from the row's `images`."""
    if column is not None and not isinstance(column, list):
        raise DataError(f"`images` is {short(column)}; write a list")
    column = column or []
    num_taking = sum(_takes_next_image(image) for image in image_places)
    if num_taking != len(column):
        raise DataError(
            f"`images` holds {len(column)} images for {num_taking} image parts without one of their own; "
            "the numbers must agree: write a part or a marker <image> where each image belongs"
        )
    spare = iter(enumerate(column))
    images: list[bytes] = []
    names = []
    for image in image_places:
        with error_context(image.place):
            source = image.source
            if _takes_next_image(image):
                index, source = next(spare)
                _require_index(image.source, index)
            images.append(load_image(source, media, settings.max_row_bytes - sum(map(len, images))))
            names.append(image_name(source))
    _check_images(image_places, images, names, settings)
    return images


def _check_images(image_places: list[_ImagePlace], images: list[bytes], names: list[str], settings: RowConfig) -> None:
    """Raises DataError unless each image decodes, one at a time, and none and all together are not too large."""
    num_pixels = 0
    for image, data, name in zip(image_places, images, names, strict=True):
        with error_context(image.place):
            num_pixels += count_pixels(data, settings.max_image_pixels, name)
    if num_pixels > settings.max_row_pixels:
        raise DataError(
            f"the {len(images)} images of the row have {num_pixels:,} pixels together, the limit is "
            f"{settings.max_row_pixels:,}; scale them down or use {setting('max_row_pixels', num_pixels)}"
        )
    for image, data, name in zip(image_places, images, names, strict=True):
        with error_context(image.place):
            decode_image(data, name)


def _takes_next_image(image: _ImagePlace) -> bool:
    return image.source is None or isinstance(image.source, ColumnIndex)


def _require_index(source: object, index: int) -> None:
    if isinstance(source, ColumnIndex) and source.number != index:
        raise DataError(
            f"the part takes image {short(source.number)} of `images`, from 0, where number {index} is the next; "
            "put the images in the order of their parts"
        )
