"""What the model is given to do: a row up to its first answer. What comes behind is gold: for replay, and the checker.

What the user says behind an answer is said when the model has answered without a call. A row may also hold no answers,
and so no gold: then each message of the user is a turn, and may bring `tools`, which are declared from then on.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice, pairwise
from pathlib import Path
from typing import Any

from gemma_dist.chat.conversation import ANSWER, Conversation
from gemma_dist.config_act import ActConfig
from gemma_dist.data.bfcl import read_with_answers
from gemma_dist.data.content import content_parts, count_images
from gemma_dist.data.encode import decision_points
from gemma_dist.data.fit import parse
from gemma_dist.data.strict import as_list, error_context, get, read_json_text, short
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.data.types import Message, RawRow
from gemma_dist.errors import DataError
from gemma_dist.evaluate.points import thinks
from gemma_dist.shards.reader import is_shard_folder, load_trajectories

USER = ("user", "human")
BEFORE_ANSWER = ("system", "developer", *USER)
SHAREGPT_ANSWER: RawRow = {"from": "gpt", "value": ANSWER["content"]}


@dataclass(frozen=True)
class Task:
    """A row that is acted on."""

    number: int  # of the row, from 1
    row: Mapping[str, Any]  # as it stands in the file; of shards: in normal form, without images
    trajectory: Trajectory
    has_gold: bool
    brought: Sequence[Any] = ()  # without gold: the tools that each of the user's messages behind the first one brings

    @property
    def id(self) -> str:
        return self.trajectory.id

    @property
    def place(self) -> str:
        """In the data, whatever model acts."""
        return f"{self.number} {self.id}"

    @property
    def points(self) -> list[tuple[int, list[Message]]]:
        """Index and messages of each answer that gold trains."""
        return list(decision_points(self.trajectory.messages)) if self.has_gold else []

    @property
    def called(self) -> set[str]:
        """Names of the tools that gold calls."""
        calls = chain.from_iterable(message.get("tool_calls", []) for message in self.trajectory.messages)
        return {call["function"]["name"] for call in calls}

    @property
    def length(self) -> int:
        """How many messages the model is given at first."""
        if self.has_gold:
            return self.points[0][0]
        return 1 + [message["role"] for message in self.trajectory.messages].index("user")

    @property
    def answered(self) -> list[list[Message]]:
        """Gold's answers from the first to the last one that it trains. A run answers where one between is not trained,
        too."""
        last, _ = self.points[-1]
        given = groupby(enumerate(self.trajectory.messages), lambda one: one[1]["role"])
        turns = [list(group) for role, group in given if role == "assistant"]
        return [[message for _, message in turn] for turn in turns if self.length <= turn[0][0] <= last]

    @property
    def turns(self) -> list[tuple[int, int]]:
        """From which message to which gold goes on by itself: behind each answer that it trains and what its calls came
        to, up to the next one."""
        turns = []
        for (index, gold), (following, _) in pairwise(self.points):
            start = index + len(gold)
            while self.trajectory.messages[start]["role"] == "tool":
                start += 1
            turns.append((start, following))
        return turns

    def script(self) -> Iterator[tuple[list[RawRow], Sequence[Any]]]:
        """What the user says when the model has answered without a call, turn by turn, and the tools that it brings. Of
        gold a turn is all that stands between two answers, up to the last one that is trained; else, one message."""
        if not self.has_gold:
            return zip(([one] for one in self.given(self.length, -1)), self.brought, strict=True)
        last, _ = self.points[-1]
        turns = groupby(self.given(self.length, last), lambda one: one["role"])
        return ((list(said), ()) for role, said in turns if role == "user")

    def given(self, start: int, stop: int) -> list[RawRow]:
        """Messages of the row, images within, as a conversation takes them."""
        messages = self.trajectory.messages
        images = iter(self.trajectory.images[sum(map(count_images, messages[:start])) :])
        shown: list[RawRow] = []
        for message in messages[start:stop]:
            parts = [
                {"type": "image", "image": {"bytes": next(images)}} if part["type"] == "image" else dict(part)
                for part in content_parts(message["content"])
            ]
            shown.append({**message, "content": parts if count_images(message) else message["content"]})
        return shown

    def begin(self, settings: ActConfig, declared: Any, known: Any, name: str) -> Conversation:
        """The conversation that a run of the task begins with.

        Args:
            declared: tools that are declared where the row has none.
            known: names of tools that may be called though none is declared.
            name: of the run, for errors.
        """
        tools = self.trajectory.tools or declared
        conversation = Conversation(settings, self._thinks(settings), tools or None, known=known, name=name)
        conversation.messages += self.given(0, self.length)
        return conversation

    def _thinks(self, settings: ActConfig) -> bool:
        row = self.trajectory
        setting = settings.enable_thinking if row.enable_thinking is None else row.enable_thinking
        return thinks(row.messages, setting if self.has_gold or setting != "auto" else False)


def read_tasks(data: Path, limit: int | None, settings: ActConfig) -> Iterator[Task]:
    """The tasks of raw rows, or of shards, in order. Raises DataError: a row breaks the data contract."""
    for number, task in enumerate(islice(_rows(data, settings), limit), start=1):
        if task.has_gold and not any(decision_points(task.trajectory.messages)):
            raise DataError(f"{data}: {task.id} holds no answer that is trained; leave its answers out")
        yield replace(task, number=number)


def _rows(data: Path, settings: ActConfig) -> Iterator[Task]:
    """Each row as a task that has no number yet."""
    if is_shard_folder(data):
        for trajectory in load_trajectories(data, settings):
            row: RawRow = {"id": trajectory.id, "messages": trajectory.messages, "tools": trajectory.tools}
            yield Task(0, row, trajectory, has_gold=True)
        return
    for where, given in read_with_answers(data, settings.max_row_bytes):
        if isinstance(given, DataError):
            raise given
        row = copy.copy(given)  # with the files that it came with
        is_open, brought = False, list[Any]()
        for column in ("messages", "conversations"):
            with error_context(where):
                turns = as_list(read_json_text(given.get(column), column))
            if turns and all(_speaker(turn) in BEFORE_ANSWER for turn in turns) and _speaker(turns[-1]) in USER:
                is_open = True
                with error_context(where):
                    turns, brought = _without_tools(turns)
                row[column] = [*turns, ANSWER if get(turns[-1], "role") else SHAREGPT_ANSWER]
        task = Task(0, given, parse(row, where, settings), not is_open, brought)
        if any(brought):
            with error_context(f"{where}: with the `tools` that the user's messages bring"):
                task.begin(settings, None, (), task.id).declare(list(chain.from_iterable(brought)))
        yield task


def _without_tools(turns: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Turns without the tools that the user's messages behind the first one bring, and these, of each such message.
    DataError where they are no list."""
    first = next(index for index, turn in enumerate(turns) if _speaker(turn) in USER)
    kept = [{key: value for key, value in turn.items() if key != "tools"} for turn in turns[first + 1 :]]
    brought = [read_json_text(turn.get("tools") or [], "tools") for turn in turns[first + 1 :]]
    for tools in brought:
        if not isinstance(tools, list):
            raise DataError(f"a user's message brings the `tools` {short(tools)}; write a list of declarations")
    return [*turns[: first + 1], *kept], brought


def _speaker(turn: object) -> object:
    """Who says a turn, as OpenAI's rows or sharegpt's have it."""
    return get(turn, "role") or get(turn, "from")
