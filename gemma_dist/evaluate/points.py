"""The decision points of held-out rows that a server is asked: found without a template, or by one that is here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_dist.config import EvaluateConfig
from gemma_dist.data.content import count_images
from gemma_dist.data.encode import Encoder, Prompt, decision_points
from gemma_dist.data.strict import error_context
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.data.types import Message
from gemma_dist.data.unroll import unroll
from gemma_dist.errors import DataError
from gemma_dist.evaluate.asked import asked_rows, require_used
from gemma_dist.evaluate.images import blank
from gemma_dist.evaluate.runs import ToolSets, tools_key


@dataclass(frozen=True)
class Point:
    """A decision point that a server is asked."""

    trajectory: Trajectory
    number: int  # of the trajectory, from 1
    index: int  # of the first message that answers it, from 0
    gold: list[Message]
    thinking: bool
    prompt: Prompt | None  # as a processor here renders it, where there is one
    place: str  # in the data, whatever model answers it

    @property
    def history(self) -> list[Message]:
        return self.trajectory.messages[: self.index]

    @property
    def images(self) -> list[bytes]:
        return self.trajectory.images[: sum(map(count_images, self.history))]


def find_points(
    data: Path, limit: int | None, settings: EvaluateConfig, encoder: Encoder | None
) -> tuple[list[Point], ToolSets]:
    """All decision points of the first `limit` rows, in order, and the tools of these.

    Args:
        encoder: of a processor that renders them; None: there is none.

    Raises:
        DataError: there are none, or a row breaks the data contract.
    """
    require_used(data, settings)
    points: list[Point] = []
    tool_sets: ToolSets = {}
    number = 0
    for row in asked_rows(data, limit, settings, limit_general=limit):
        if settings.images == "blank":
            row = replace(row, images=[blank(image) for image in row.images])
        with error_context(f"{data}: {row.id}"):
            for trajectory in [row] if encoder is None else unroll(row, encoder, settings):
                number += 1
                tool_sets[tools_key(trajectory.tools)] = list(trajectory.tools)
                points += _points_of(trajectory, number, settings, encoder)
    if not points:
        raise DataError(f"{data} holds no trajectories, so there is nothing to evaluate")
    return points, tool_sets


def _points_of(
    trajectory: Trajectory, number: int, settings: EvaluateConfig, encoder: Encoder | None
) -> Iterator[Point]:
    """The decision points of one trajectory."""
    if encoder is None:
        setting = settings.enable_thinking if trajectory.enable_thinking is None else trajectory.enable_thinking
        thinking, prompts = thinks(trajectory.messages, setting), {}
    else:
        thinking = encoder.thinks(trajectory)
        prompts = {prompt.turn: prompt for prompt in encoder.prompts(trajectory)}
    for index, gold in decision_points(trajectory.messages):
        place = f"{number} {trajectory.id} {index + 1}"
        yield Point(trajectory, number, index, gold, thinking, prompts.get(index + 1), place)


def thinks(messages: Sequence[Message], setting: object) -> bool:
    """Whether thinking is on where no template is at hand: `auto` as Gemma's own templates would have it, which show
    the thoughts behind the last user message."""
    if setting != "auto":
        return bool(setting)
    last_user = max(number for number, message in enumerate(messages) if message["role"] == "user")
    return any("reasoning_content" in message and message.get("train", True) for message in messages[last_user:])
