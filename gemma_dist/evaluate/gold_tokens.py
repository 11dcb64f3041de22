"""The tokens that gold writes at a decision point, behind the prompt that the model is asked with.

They are those that training would train there, with their kinds. One encoding of the whole trajectory gives them for
all points whose prompt it holds; where a later history shows less (thoughts before the last user turn) or other
openings than the prompt did, the trajectory is encoded up to that answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gemma_dist.data.content import count_images
from gemma_dist.data.encode import Encoder, Prompt
from gemma_dist.data.encoded import Encoded
from gemma_dist.data.gold import ACCEPTABLE
from gemma_dist.data.trajectory import Trajectory

SAME_END = 3  # tokens: the turn that the model is given, or the thought that is opened for it


@dataclass(frozen=True)
class GoldTokens:
    """What stands behind a prompt: K tokens."""

    prompt: Prompt
    ids: list[int]  # (K,)
    kinds: bytes  # (K,): of `data/kinds.py`; 0 where one is not trained, as between two messages of an answer


def gold_tokens(encoder: Encoder, trajectory: Trajectory, prompts: Sequence[Prompt]) -> list[GoldTokens | None]:
    """Of each of the trajectory's prompts; None where gold is no whole answer, but says what a right one has.

    Raises:
        DataError: as `Encoder.encode`.
    """
    is_whole = [_is_whole_answer(trajectory, prompt) for prompt in prompts]
    if not any(is_whole):
        return [None] * len(prompts)
    encoded = encoder.encode(trajectory)
    pairs = zip(prompts, is_whole, strict=True)
    return [_of_point(encoder, trajectory, encoded, prompt) if whole else None for prompt, whole in pairs]


def _of_point(encoder: Encoder, trajectory: Trajectory, whole: Encoded, prompt: Prompt) -> GoldTokens | None:
    index = prompt.turn - 1
    shows_less = any("reasoning_content" in message for message in prompt.gold)
    start = dict(whole.answers).get(index)
    is_behind = start == len(prompt.input_ids) and whole.input_ids[:start] == prompt.input_ids
    found = _answer(whole, prompt, index) if is_behind and not shows_less else None
    if found is None:
        messages = trajectory.messages[: index + len(prompt.gold)]
        images = trajectory.images[: sum(map(count_images, messages))]
        thinking = whole.enable_thinking  # as the prompts are rendered
        so_far = replace(trajectory, messages=messages, images=images, enable_thinking=thinking)
        found = _answer(encoder.encode(so_far), prompt, index)
    return found


def _is_whole_answer(trajectory: Trajectory, prompt: Prompt) -> bool:
    """Whether gold is one answer: not the name of a tool, any call, accepted words, or several acceptable values."""
    if trajectory.is_outline or trajectory.any_call or trajectory.answers:
        return False
    calls = [call for message in prompt.gold for call in message.get("tool_calls", [])]
    return not any(ACCEPTABLE in call["function"] for call in calls)


def _answer(encoded: Encoded, prompt: Prompt, index: int) -> GoldTokens | None:
    """The answer that begins with message `index`, if it is trained there, behind what the prompt ends with."""
    start = dict(encoded.answers).get(index)
    if start is None or encoded.input_ids[start - SAME_END : start] != prompt.input_ids[-SAME_END:]:
        return None
    starts = sorted(begin for _, begin in encoded.answers if begin > start)
    end = starts[0] if starts else encoded.num_tokens
    trained = [place for place in range(start, end) if encoded.kinds[place]]
    if not trained:
        return None
    last = trained[-1] + 1
    return GoldTokens(prompt, encoded.input_ids[start:last], encoded.kinds[start:last])
