"""What the model is given to do: a row up to its first answer. What comes behind is gold: for replay, and the checker.

A row may also end there, with the user's words: most tasks have no gold.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from gemma_dist.chat.conversation import ANSWER, Conversation
from gemma_dist.config_act import ActConfig
from gemma_dist.data.bfcl import read_with_answers
from gemma_dist.data.content import content_parts, count_images
from gemma_dist.data.encode import decision_points
from gemma_dist.data.fit import parse
from gemma_dist.data.strict import as_list, error_context, get, read_json_text
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
        """How many messages the model is given."""
        return self.points[0][0] if self.has_gold else len(self.trajectory.messages) - 1

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

    def begin(self, settings: ActConfig, declared: Any, known: Any) -> Conversation:
        """The conversation that a run of the task begins with.

        Args:
            declared: tools that are declared where the row has none.
            known: names of tools that may be called though none is declared.
        """
        tools = self.trajectory.tools or declared
        conversation = Conversation(settings, self._thinks(settings), tools or None, known=known)
        conversation.messages += self.given(0, self.length)
        return conversation

    def _thinks(self, settings: ActConfig) -> bool:
        row = self.trajectory
        setting = settings.enable_thinking if row.enable_thinking is None else row.enable_thinking
        return thinks(row.messages, setting if self.has_gold or setting != "auto" else False)


def read_tasks(data: Path, limit: int | None, settings: ActConfig) -> Iterator[Task]:
    """The tasks of raw rows, or of shards, in order. Raises DataError: a row breaks the data contract."""
    for number, (row, trajectory, has_gold) in enumerate(islice(_rows(data, settings), limit), start=1):
        if has_gold and not any(decision_points(trajectory.messages)):
            raise DataError(f"{data}: {trajectory.id} holds no answer that is trained; leave its answers out")
        yield Task(number, row, trajectory, has_gold)


def _rows(data: Path, settings: ActConfig) -> Iterator[tuple[Mapping[str, Any], Trajectory, bool]]:
    """Each row as it is given and as it is read, and whether it has answers."""
    if is_shard_folder(data):
        for trajectory in load_trajectories(data, settings):
            yield {"id": trajectory.id, "messages": trajectory.messages, "tools": trajectory.tools}, trajectory, True
        return
    for where, given in read_with_answers(data, settings.max_row_bytes):
        if isinstance(given, DataError):
            raise given
        row: RawRow = copy.copy(given)  # with the files that it came with
        is_open = False
        for column in ("messages", "conversations"):
            with error_context(where):
                turns = as_list(read_json_text(given.get(column), column))
            if turns and all(_speaker(turn) in BEFORE_ANSWER for turn in turns) and _speaker(turns[-1]) in USER:
                is_open = True
                row[column] = [*turns, ANSWER if get(turns[-1], "role") else SHAREGPT_ANSWER]
        yield given, parse(row, where, settings), not is_open


def _speaker(turn: object) -> object:
    """Who says a turn, as OpenAI's rows or sharegpt's have it."""
    return get(turn, "role") or get(turn, "from")
