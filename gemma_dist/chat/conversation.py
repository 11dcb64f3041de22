"""A conversation as a row of the data contract, and the prompt of its next answer.

The messages are kept as agents log them, and read as `shard` reads a row whenever the model is to answer. So the ids in
front of an answer are those that training puts there, and what is saved is a row that `shard` takes.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gemma_dist.config import RowConfig
from gemma_dist.data.content import content_parts, count_images
from gemma_dist.data.encode import Encoder, Prompt
from gemma_dist.data.read import Call, Reading
from gemma_dist.data.schema_fit import find_misfit
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.data.types import RawRow, Tool
from gemma_dist.errors import DataError
from gemma_dist.evaluate.chat import data_url

WHERE = "conversation"  # in the place of a file's name in errors
QUESTION: RawRow = {"role": "user", "content": "x"}
ANSWER: RawRow = {"role": "assistant", "content": "x"}  # stands for the one that is to come


@dataclass
class Conversation:
    """What was said so far."""

    settings: RowConfig
    thinking: bool
    declared: Any = None  # tools, in any form that a row may have
    messages: list[RawRow] = field(default_factory=list)
    known: Collection[str] = ()  # names of tools that need no declaration, where there is none at all
    name: str = WHERE

    def __post_init__(self) -> None:
        """Raises DataError where a tool's declaration is none."""
        self.tools: list[Tool] = self._read([QUESTION, ANSWER]).tools

    def set_system(self, text: str) -> None:
        """Say something else in the system message; "" removes it."""
        self.messages = [message for message in self.messages if message["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def declare(self, more: Sequence[Any]) -> None:
        """Declare tools beside those that there are, or in the place of those of the same names. The answers so far,
        which were given without them, are not trained then. Raises DataError where one is none."""
        if not more:
            return
        before, brought = self.tools, replace(self, declared=list(more)).tools
        names = {tool["function"]["name"] for tool in brought}
        self.declared = [*(tool for tool in before if tool["function"]["name"] not in names), *brought]
        self.tools = self._read([QUESTION, ANSWER]).tools
        if self.tools != before:
            for message in self.messages:
                if message["role"] == "assistant":
                    message["train"] = False

    def ask(self, text: str, images: Sequence[bytes]) -> None:
        """Add a user's message, the images in front of its text. Raises DataError, and adds nothing, if it is none."""
        self._add({"role": "user", "content": _content(text, images)})

    def prompt(self, encoder: Encoder) -> Prompt:
        """What stands in front of the next answer. Raises DataError where the template cannot render it."""
        trajectory = self.so_far()
        index = len(trajectory.messages)
        lengths = encoder.count_soft_tokens(trajectory.images)
        text, input_ids = encoder.generation_prompt(trajectory, index, lengths, thinking=self.thinking)
        types = [int(token == encoder.image_token_id) for token in input_ids]
        return Prompt(input_ids, types, trajectory.images, text, index + 1, [])

    def so_far(self) -> Trajectory:
        """What was said, in normal form; it ends before an answer, or behind one without calls. Raises DataError where
        that is no row."""
        if self.messages[-1]["role"] == "assistant":
            return self._read(self.messages)
        trajectory = self._read([*self.messages, ANSWER])
        return replace(trajectory, messages=trajectory.messages[:-1])

    def misfit(self, call: Call) -> str | None:
        """Why a call does not fit what is declared; None if it does."""
        if not self.tools and call.name in self.known:
            return None
        for tool in self.tools:
            if tool["function"]["name"] == call.name:
                return find_misfit(call.arguments, tool["function"].get("parameters"))
        names = ", ".join(tool["function"]["name"] for tool in self.tools)
        return f"there is no tool {call.name}" + (f"; there are: {names}" if names else "")

    def answer(self, reading: Reading, *, is_whole: bool) -> None:
        """Add an answer of the model. One that is cut off, or whose calls do not fit, shows a mistake: not to be
        trained. Raises DataError, and adds nothing, where a row could not hold it."""
        message: RawRow = {"role": "assistant", "content": reading.content}
        if reading.reasoning:
            message["reasoning_content"] = reading.reasoning
        if reading.calls:
            first = sum(len(_calls(message)) for message in self.messages)
            message["tool_calls"] = [
                {"id": call_id(first + number), "type": "function", "function": _function(call)}
                for number, call in enumerate(reading.calls)
            ]
        if not is_whole or any(map(self.misfit, reading.calls)):
            message["train"] = False
        results: list[RawRow] = [
            {"role": "tool", "tool_call_id": call["id"], "content": "x"} for call in _calls(message)
        ]
        self._read([*self.messages, message, *(results or [QUESTION]), ANSWER])
        self.messages.append(message)

    def respond(self, number: int, content: str, images: Sequence[bytes] = ()) -> None:
        """Add the result of call `number`, from 0, of the last answer, the images behind its text. Raises DataError,
        and adds nothing, if it is none."""
        last = max(index for index, message in enumerate(self.messages) if message["role"] == "assistant")
        call = _calls(self.messages[last])[number]
        result: RawRow = {"role": "tool", "tool_call_id": call["id"], "content": _content(content, images, behind=True)}
        alone: RawRow = {"role": "assistant", "content": "", "tool_calls": [call], "train": False}
        self._read([QUESTION, alone, result, ANSWER])
        self.messages.append(result)

    def row(self, row_id: str) -> RawRow:
        """All up to the last answer, in normal form, images within. Raises DataError where nothing could be trained."""
        ends = [number for number, message in enumerate(self.messages, start=1) if message["role"] == "assistant"]
        whole = [end for end in ends if not _calls(self.messages[end - 1])]
        if not whole:
            raise DataError("no answer was kept yet, so there is nothing to save")
        return self.as_row(row_id, self._read(self.messages[: whole[-1]]))

    def as_row(self, row_id: str, trajectory: Trajectory) -> RawRow:
        """A part of the conversation as a row, images within."""
        images = iter(trajectory.images)
        messages: list[RawRow] = []
        for message in trajectory.messages:
            shown = [next(images) for _ in range(count_images(message))]
            sources = iter(shown)
            parts = [
                {"type": "image", "image": data_url(next(sources))} if part["type"] == "image" else dict(part)
                for part in content_parts(message["content"])
            ]
            messages.append({**message, "content": parts if shown else message["content"]})
        row: RawRow = {"id": row_id, "messages": messages}
        if trajectory.tools:
            row["tools"] = trajectory.tools
        return {**row, "chat_template_kwargs": {"enable_thinking": self.thinking}}

    def _add(self, message: RawRow) -> None:
        self._read([*self.messages, message, ANSWER])
        self.messages.append(message)

    def _read(self, messages: list[RawRow]) -> Trajectory:
        row: RawRow = {"id": self.name, "messages": messages}
        return parse_row(row if self.declared is None else {**row, "tools": self.declared}, self.name, self.settings)


def call_id(number: int) -> str:
    """The id of a call, counted from 0 over the whole conversation."""
    return f"call_{number}"


def _calls(message: RawRow) -> list[dict[str, Any]]:
    calls: Any = message.get("tool_calls", [])
    return calls


def _function(call: Call) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments}


def _content(text: str, images: Sequence[bytes], *, behind: bool = False) -> object:
    """A message's content: a string, or parts where it shows images."""
    if not images:
        return text
    shown = [{"type": "image", "image": {"bytes": image}} for image in images]
    said = [{"type": "text", "text": text}] if text else []
    return [*said, *shown] if behind else [*shown, *said]
