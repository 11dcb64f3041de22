"""One row into several samples, so that every thought is trained, each once, under the history that a server shows.

The template shows the thoughts of the last user turn alone. With `unroll: reasoning`, a row

    user, assistant (thought), user, assistant, user, assistant (thought), user, assistant

makes three samples, each with all that comes before it:

    row#turn-2    trains message 2
    row#turn-6    trains messages 4 and 6
    row           trains message 8; the last sample keeps the row's id

Where the template's prompt opens a thought that a server does not show to later answers, a sample ends behind the
answer as well: behind a tool's result and without a thought of its own (gemma4_v5), or with the empty thought of the
large models' prompts. See served.py.
"""

from collections import Counter
from dataclasses import replace

from gemma_dist.config import RowConfig
from gemma_dist.data.content import count_images
from gemma_dist.data.encode import Encoder
from gemma_dist.data.rows import TURN_MARK
from gemma_dist.data.served import NO_THOUGHT, SHOWN_LATER, is_target, trained_answers
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.data.types import Message
from gemma_dist.gemma_format import THOUGHT


def unroll(trajectory: Trajectory, encoder: Encoder, settings: RowConfig) -> list[Trajectory]:
    """The samples that a row makes by the settings, in order; the last one has its id and its notes.

    Raises:
        DataError: as `Encoder.encode`, where the template's rendering has to be looked at.
    """
    if settings.unroll == "none":
        return [trajectory]
    samples: list[Trajectory] = []
    for sample in _split(trajectory, _ends_of_thoughts(trajectory.messages)):
        thinking = encoder.thinks(sample)
        parts = _split(sample, _ends_behind_openings(sample, encoder, thinking))
        if len(parts) > 1:  # one alone may hold no thought that says how it is rendered
            parts = [replace(part, enable_thinking=thinking) for part in parts]
        samples += parts
    earlier = [
        replace(sample, id=f"{trajectory.id}{TURN_MARK}{len(sample.messages)}", notes=Counter())
        for sample in samples[:-1]
    ]
    return [*earlier, samples[-1]]


def first_messages(trajectory: Trajectory, end: int) -> Trajectory:
    """The trajectory without its messages from index `end` on."""
    messages = trajectory.messages[:end]
    num_images = sum(map(count_images, messages))
    return replace(trajectory, messages=messages, images=trajectory.images[:num_images])


def _split(trajectory: Trajectory, ends: list[int]) -> list[Trajectory]:
    """A sample up to each of `ends`, and the whole if it trains more; each trains what is behind the one before it."""
    if not ends or any(map(is_target, trajectory.messages[ends[-1] :])):
        ends = [*ends, len(trajectory.messages)]
    samples = []
    start = 0
    for end in ends:
        sample = first_messages(trajectory, end)
        history = [_untrained(message) for message in sample.messages[:start]]
        samples.append(replace(sample, messages=history + sample.messages[start:]))
        start = end
    return samples


def _untrained(message: Message) -> Message:
    return {**message, "train": False} if message["role"] == "assistant" else message


def _ends_of_thoughts(messages: list[Message]) -> list[int]:
    """Where user turns end that train a thought and have another behind them."""
    ends = []
    has_thought = False
    for index, message in enumerate(messages):
        if message["role"] == "user" and has_thought:
            ends.append(index)
            has_thought = False
        has_thought |= is_target(message) and "reasoning_content" in message
    return ends


def _ends_behind_openings(trajectory: Trajectory, encoder: Encoder, thinking: bool) -> list[int]:
    """Where answers end that stand behind an opened thought which later answers are not shown."""
    openings = encoder.openings[thinking]
    if openings.get("tool") == THOUGHT:
        return _ends_without_thought(trajectory.messages, "tool")
    if openings.get("user") == NO_THOUGHT and encoder.encode(trajectory).notes[SHOWN_LATER]:
        return _ends_without_thought(trajectory.messages, "user")
    return []


def _ends_without_thought(messages: list[Message], role: str) -> list[int]:
    """Where answers to a message of `role` end that have no thought and have another answer behind them."""
    ends = []
    for first, *others in trained_answers(messages)[:-1]:
        if messages[first - 1]["role"] == role and "reasoning_content" not in messages[first]:
            ends.append(first + len(others) + 1)
    return ends
