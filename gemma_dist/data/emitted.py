"""Where the model's own words lie in what a chat template rendered: the characters that labels are made from.

A cursor walks through the rendered string message by message. What follows the messages of others (system, user, tool)
is passed over; of an assistant's message every piece must come where it must be, right behind the one before it.
"""

import json
import re
from dataclasses import dataclass

from gemma_dist.data.content import content_parts, count_images
from gemma_dist.data.read import read_whole_call
from gemma_dist.data.strict import short
from gemma_dist.data.types import CalledFunction, Json, JsonObject, Message
from gemma_dist.errors import DataError, setting
from gemma_dist.gemma_format import (
    CALL,
    CALL_END,
    CHANNEL_END,
    IMAGE,
    IMAGE_BEGIN,
    IMAGE_END,
    MODEL_TURN,
    QUOTE,
    RESPONSE,
    RESPONSE_END,
    THOUGHT,
    TURN,
    TURN_END,
)

NEWER_TEMPLATE = f"Use a newer template, for example {setting('chat_template', 'gemma4_v5')}"

_response, _response_end = re.escape(RESPONSE), re.escape(RESPONSE_END)
IMAGE_BLOCK = re.compile(rf"\s*{re.escape(IMAGE_BEGIN)}(?:{re.escape(IMAGE)})*{re.escape(IMAGE_END)}\s*")
CONTEXT = re.compile(  # what a template puts between two assistant messages, none of it the model's own
    rf"{re.escape(MODEL_TURN)}"
    rf"|{re.escape(TURN)}tool\n.*?{re.escape(TURN_END)}\n"  # a turn for each tool message: one old revision
    rf"|(?:{_response}|(?<={_response}))response:.*?{_response_end}"
    rf"|{re.escape(THOUGHT + CHANNEL_END)}"  # the empty thought in large models' prompts when thinking is off
    r"|\n",
    re.DOTALL,
)


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of the rendered string, written by the assistant's message of this index."""

    start: int
    end: int
    message_index: int


@dataclass(frozen=True)
class Emitted:
    """All that the model wrote of a trajectory."""

    spans: list[Span]  # in order, none of them empty
    starts: dict[int, int]  # where each assistant message begins, by its index
    with_reasoning: set[int]  # indices of the assistant messages whose reasoning is rendered
    num_dropped_reasoning: int  # trained assistant messages whose reasoning the template left out


def find_emitted(rendered: str, messages: list[Message]) -> Emitted:
    """Where in the `rendered` messages the model's own words lie.

    Raises:
        DataError: a piece of an assistant message is not where it must be.
    """
    cursor = _Cursor(rendered, messages)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            cursor.read_assistant(index)
        elif message["role"] == "tool":
            cursor.find_tool_result(index)
        else:
            cursor.pass_turn(index)
    return Emitted(cursor.spans, cursor.starts, cursor.with_reasoning, cursor.num_dropped_reasoning)


class _Cursor:
    """A position in the rendered string, up to which everything is accounted for."""

    def __init__(self, rendered: str, messages: list[Message]) -> None:
        self.spans: list[Span] = []
        self.starts: dict[int, int] = {}
        self.with_reasoning: set[int] = set()
        self.num_dropped_reasoning = 0
        self._rendered, self._messages = rendered, messages
        self._position = 0
        self._turn_is_closed = True  # no turn of the model is open at the position
        # Tool results are found ahead of the position, which passes over them before the next assistant message.
        self._results_end = 0
        self._num_result_images = 0

    def pass_turn(self, index: int) -> None:
        """Go behind the turn of a system or user message, which holds that message's text."""
        role = self._messages[index]["role"]
        start = self._rendered.find(f"{TURN}{role}\n", max(self._position, self._results_end))
        end = self._rendered.find(TURN_END, start)
        if start < 0 or end < 0 or self._find_texts(index, start) > end:
            raise _torn(index, f"the {role} turn")
        self._position = end + len(TURN_END)
        self._turn_is_closed = True
        self._num_result_images = 0  # they lie before this turn

    def find_tool_result(self, index: int) -> None:
        """Find the text of a tool message ahead, without going there."""
        self._results_end = self._find_texts(index, max(self._position, self._results_end))
        self._num_result_images += count_images(self._messages[index])

    def read_assistant(self, index: int) -> None:
        """Go to where an assistant message begins, then through its pieces to its end, and note the spans."""
        self._enter_turn(index)
        message = self._messages[index]
        message_start = span_start = self.starts[index] = self._position
        self._read_reasoning(index, message.get("reasoning_content"))
        for call in message.get("tool_calls", []):
            self._read_call(index, call["function"])
        for part in content_parts(message["content"]):
            if part["type"] == "text":
                self._read_text(index, part["text"].strip())  # as templates write it
            else:
                self._note_span(index, span_start)
                self._pass_image(index)  # shown to the model, not written by it
                span_start = self._position
        is_empty = self._position == message_start
        self._read_stop(waits_for_results=bool(message.get("tool_calls")))
        if not is_empty:  # else the end of the turn is the template's
            self._note_span(index, span_start)

    def _enter_turn(self, index: int) -> None:
        """Go to the first place that may be the model's own, inside of a turn of the model."""
        if index == 0 or self._messages[index - 1]["role"] in ("system", "user"):
            self._position = self._rendered.find(MODEL_TURN, self._position)
            if self._position < 0:
                raise _torn(index, "the model turn")
        opened_turn = self._skip_context()
        if self._position < self._results_end:
            raise _torn(index - 1, "the tool's answer")
        if self._turn_is_closed and not opened_turn:
            raise DataError(
                f"turn {index + 1}: the chat template closes the model's turn before this assistant message and "
                f"opens no other, so it would stand outside any turn. {NEWER_TEMPLATE}, or "
                f"{setting('text_beside_call', 'reasoning')} if this is text that stood beside a call"
            )

    def _skip_context(self) -> bool:
        """Pass over what a template puts between two assistant messages, and tool results' images behind them. Whether
        a turn of the model was opened there."""
        opened_turn = False
        num_images = self._num_result_images
        while True:
            found = CONTEXT.match(self._rendered, self._position)
            if not found and num_images > 0:
                found = IMAGE_BLOCK.match(self._rendered, self._position)
            if not found:
                break
            if found.group() == MODEL_TURN:
                opened_turn = True
            num_images -= found.group().count(IMAGE_BEGIN)
            self._position = found.end()
        self._num_result_images = 0
        return opened_turn

    def _read_reasoning(self, index: int, reasoning: str | None) -> None:
        if not reasoning:
            return
        block = f"{THOUGHT}{reasoning}\n{CHANNEL_END}"
        if self._rendered.startswith(block, self._position):
            self._position += len(block)
            self.with_reasoning.add(index)
        elif self._messages[index].get("train", True):
            self.num_dropped_reasoning += 1

    def _read_call(self, index: int, called: CalledFunction) -> None:
        """Go behind a call, which must say to the reader of outputs what the row says: else a right answer would count
        as wrong, and a server would pass on something else."""
        start, name = self._position, called["name"]
        if not self._rendered.startswith(f"{CALL}call:{name}{{", start):
            raise _torn(index, f"the call of {name!r}")
        self._position = self._rendered.index(CALL_END, start) + len(CALL_END)
        found = read_whole_call(self._rendered[start : self._position])
        if found is None or found.name != name or not _equal(found.arguments, called["arguments"]):
            if _reads_back(name, called["arguments"]):
                written = short(self._rendered[start : self._position])
                raise DataError(
                    f"turn {index + 1}: the chat template writes {written} for the call of {name!r}, with other "
                    f"arguments than the row's. {NEWER_TEMPLATE}"
                )
            raise DataError(
                f"turn {index + 1}: the call of {name!r} does not read back from Gemma's call format as it stands in "
                f"the row{_difference(called)}; rename what has signs of the format in its name"
            )

    def _read_text(self, index: int, text: str) -> None:
        if not self._rendered.startswith(text, self._position):
            raise _torn(index, f"the text {text[:60]!r}")
        self._position += len(text)

    def _pass_image(self, index: int) -> None:
        found = IMAGE_BLOCK.match(self._rendered, self._position)
        if not found:
            raise _torn(index, "an image")
        self._position = found.end()

    def _read_stop(self, *, waits_for_results: bool) -> None:
        """Go behind the token with which the model stops, if it does here."""
        self._turn_is_closed = False
        if waits_for_results and self._rendered.startswith(RESPONSE, self._position):
            self._position += len(RESPONSE)
        elif self._rendered.startswith(TURN_END, self._position):
            self._position += len(TURN_END)
            self._turn_is_closed = True

    def _note_span(self, index: int, start: int) -> None:
        if start < self._position:
            self.spans.append(Span(start, self._position, index))

    def _find_texts(self, index: int, start: int) -> int:
        """The end of the message's text parts, which stand in their order somewhere behind `start`."""
        end = start
        for part in content_parts(self._messages[index]["content"]):
            if part["type"] == "text":
                text = part["text"].strip()
                found = self._rendered.find(text, end)
                if found < 0:
                    raise _torn(index, f"the text {text[:60]!r}")
                end = found + len(text)
        return end


def _equal(found: Json, given: Json) -> bool:
    """Whether two values are one JSON text, keys in any order: 1, 1.0 and true are three values, 0.0 and -0.0 two."""
    if isinstance(found, dict) and isinstance(given, dict):
        return found.keys() == given.keys() and all(_equal(value, given[key]) for key, value in found.items())
    if isinstance(found, list) and isinstance(given, list):
        return len(found) == len(given) and all(map(_equal, found, given))
    return type(found) is type(given) and (found == given if isinstance(found, str) else repr(found) == repr(given))


def _difference(called: CalledFunction) -> str:
    """The first argument that alone does not read back, " (argument 'a<b')"; "" where none is to blame."""
    name = called["name"]
    if not _reads_back(name, {}):
        return ""
    for key, value in called["arguments"].items():
        if not _reads_back(name, {key: value}):
            return f" (argument {short(key)})"
    return ""


def _reads_back(name: str, arguments: JsonObject) -> bool:
    """Whether a call that the template writes is read as the call that it was made of."""
    found = read_whole_call(f"{CALL}call:{name}{_written(arguments)}{CALL_END}")
    return found is not None and found.name == name and _equal(found.arguments, arguments)


def _written(value: Json) -> str:
    """A value as the template writes it: {"city": "Rome", "days": [1, 2]} -> {city:<|"|>Rome<|"|>,days:[1,2]}."""
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        items = [f"{key}:{_written(item)}" for key, item in value.items()]
        return f"{{{','.join(items)}}}"
    return json.dumps(value)


def _torn(index: int, piece: str) -> DataError:
    return DataError(
        f"turn {index + 1}: the chat template loses or moves {piece}, so what the model emits cannot be told from the "
        f"rest. {NEWER_TEMPLATE}"
    )
