"""Columns beside the messages that say what belongs into them, and that no layout reads: refused, not lost.

{"messages": [..., {"role": "user", ...}], "answer": "20 degrees."}         the answer to the last message
{"messages": [...], "history": [...]}                                       what came before
{"messages": [...], "reasoning": "I look it up."}                           what was thought
{"messages": [...], "objects": {"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}}    what markers in the texts stand for
{"messages": [...], "image_1": "a.png"}, {"messages": [...], "video": "a.mp4"}
"""

import re

from gemma_dist.data.expected import is_test_case
from gemma_dist.data.layouts.ratings import messages_column, move_command
from gemma_dist.data.layouts.turns import OpenAIRow
from gemma_dist.data.strict import as_list, get, is_null, short, without_spaces
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

# What may answer messages that end without an answer.
ANSWERS = (
    *("completion", "completions", "response", "responses", "output", "outputs", "answer", "answers", "reply"),
    *("assistant", "assistant_response", "model_response", "final_answer", "target", "targets", "prediction"),
    *("generation", "generated_text", "tool_calls", "function_call", "calls", "chosen", "chosen_response"),
)
# Words that are no thought, but say whether or how long is thought: "detailed thinking off", "not enabled".
SWITCH = re.compile(
    r"(?:(?:detailed|extended)\s+)?(?:(?:thinking|reasoning)(?:\s+mode)?(?:\s+is|:)?\s*)?(?:not\s+)?"
    r"(?:on|off|enabled|disabled|low|medium|high|none)\.?",
    re.IGNORECASE,
)
REASONING = ("reasoning", "reasoning_content", "thinking", "thought", "thoughts")
BEFORE = ("history",)
UNCARRIED = re.compile(r"(video|audio)s?(_?\d+|_(path|file|url|byte)s?)?")
IMAGES = re.compile(r"(image|img|picture|photo|screenshot)s?(_?\d+|_(path|file|url|bytes|base64|data)s?)?")
READ_IMAGES = ("images", "image")


def refuse_beside(row: RawRow, converted: OpenAIRow) -> None:
    """DataError for the first column that would be lost.

    Args:
        converted: the row in the OpenAI shape, with its images.
    """
    _refuse_media(row, converted)
    key = messages_column(row)
    if not key or not converted.messages:
        return
    _, last = converted.messages[-1]
    if get(last, "role") != "assistant" and not is_test_case(row, converted):
        _refuse_answer(row, key)
    for column in REASONING:
        given = row.get(column)
        text = given.strip() if isinstance(given, str) else ""
        is_thought = " " in text and not SWITCH.fullmatch(text)  # a word is a switch: "on", "high"
        if is_thought and without_spaces(text) not in without_spaces(_said(converted)):
            raise DataError(
                f"`{column}` stands beside `{key}`, and does not say which message it belongs to; write it as "
                "`reasoning_content` of that message, or remove the column"
            )
    for column in BEFORE:
        before = as_list(row.get(column))
        if before and as_list(row[key])[: len(before)] != before:
            raise DataError(
                f"`{column}` stands beside `{key}`, which does not begin with it; write its {len(before)} turns in "
                "front of the messages, or remove the column"
            )


def _refuse_answer(row: RawRow, key: str) -> None:
    """DataError for a column that may be the answer to messages which end without one."""
    for column in ANSWERS:
        value = row.get(column)
        if value and isinstance(value, (str, list, dict)):
            raise DataError(
                f"`{key}` end without an answer, and `{column}` is {short(value)}; if the model is to say that, write "
                f"it as the last message: {move_command(row, key, column, [column])}; else remove the column"
            )


def _said(converted: OpenAIRow) -> str:
    """All that the messages say and think, for a look whether a text is among it."""
    texts: list[str] = []
    for _, message in converted.messages:
        for key in ("content", *REASONING):
            value = get(message, key)
            parts = [value] if isinstance(value, str) else [get(part, "text") for part in as_list(value)]
            texts += [part for part in parts if isinstance(part, str)]
    return "\n".join(texts)


def _refuse_media(row: RawRow, converted: OpenAIRow) -> None:
    """DataError for what is seen or heard, and that no part of a message shows."""
    has_images = bool(converted.images) or any(_shows_image(message) for _, message in converted.messages)
    for column, value in row.items():
        if not value or is_null(value) or not isinstance(value, (str, bytes, list, dict)):
            continue
        name = str(column).lower()
        if UNCARRIED.fullmatch(name):
            raise DataError(f"the row brings `{column}`, which the trajectories cannot hold; remove the column")
        if IMAGES.fullmatch(name) and name not in READ_IMAGES and not has_images:
            raise DataError(
                f"the column `{column}` brings an image, but is not read; write all images of the row as `images`, in "
                "order, and <image> in the texts where each belongs, or remove the column"
            )
    objects = row.get("objects")
    if get(objects, "ref") or get(objects, "bbox"):
        raise DataError(
            "`objects` holds what <ref-object> and <bbox> in the texts stand for, which is not carried out; write "
            "names and coordinates into the texts and remove the column"
        )


def _shows_image(message: object) -> bool:
    """Whether a message has an image as one of its parts."""
    return any(get(part, "type") in ("image", "image_url") for part in as_list(get(message, "content")))
