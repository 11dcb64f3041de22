"""A decision point as it stands in samples.jsonl, answered and scored, and what it belongs to."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypedDict

from gemma_dist.data.rows import row_of_sample
from gemma_dist.evaluate.score import Gold, Score

Trajectory = tuple[int, int]  # its number, and which of several answers (`sample`) was taken at each of its points


class KindLoss(TypedDict):
    """What gold's tokens of one kind cost at a decision point."""

    nll: float  # nats
    tokens: int
    right: int  # that the model found likeliest


class AnsweredDecision(TypedDict):
    """A line of a run that is at work: a decision point, and what the model wrote at it."""

    id: str
    trajectory: int  # from 1
    turn: int  # number of the message, from 1
    sample: int  # which of the answers to this point, from 0
    key: str  # a hash of all that the answers to this point hang on (`log.py`)
    category: str
    pair: str
    part: NotRequired[str]  # of the report, in which it counts (`beside.py`); absent: the main one
    num_images: int
    num_tools: int  # declared
    tools: str  # the key of their declarations in tools.json
    prompt_tokens: int
    opening: str  # the block that the prompt left open, from its token on; "" where it left none
    output: str
    output_ids: list[int]
    output_tokens: int
    stopped: bool  # False: cut off at max_new_tokens
    gold: Gold
    form: NotRequired[Literal["message"]]  # of a server of chat: `output` is its message as JSON text (`message.py`)
    raw: NotRequired[str]  # of such an answer: what the model wrote, where the server says that as well
    own_prompt_tokens: NotRequired[int]  # of such an answer: as the processor here counts, if there is one
    loss: NotRequired[dict[str, KindLoss] | None]  # by kind of token; None: gold is no whole answer


class ScoredDecision(AnsweredDecision):
    """A line of samples.jsonl: what was read in the answer, and its score, beside it."""

    parsed: dict[str, Any]  # `reading_to_json`
    score: Score


def trajectory_of(decision: ScoredDecision) -> Trajectory:
    """Which trajectory a decision point is of; where several answers are taken, each makes one of its own."""
    return decision["trajectory"], decision["sample"]


def cluster_of(decision: ScoredDecision) -> str:
    """What a decision point is drawn with: the pair of its row, else its row."""
    return f"pair {decision['pair']}" if decision["pair"] else f"row {row_of_sample(decision['id'])}"


def steps_of(decisions: Sequence[ScoredDecision]) -> list[int]:
    """The number of each decision point in its trajectory, from 1; `decisions` are in order."""
    seen: Counter[Trajectory] = Counter()
    steps = []
    for decision in decisions:
        seen[trajectory_of(decision)] += 1
        steps.append(seen[trajectory_of(decision)])
    return steps
