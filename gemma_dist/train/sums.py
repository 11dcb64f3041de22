"""What a step's micro-batches add up to, kept on the device until its end.

TRL gathers and reads its figures in every micro-batch, so that all ranks wait there for each other and for their GPUs.
Here a micro-batch adds to a few numbers on the device, and a step has one exchange, between the last backward pass and
the optimizer: a single small all-reduce, which also tells whether the loss and the gradients are finite on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemma_dist import world
from gemma_dist.data.kinds import KINDS
from gemma_dist.errors import DataError

# What a line of metrics.jsonl has of them: of each kind of token where there is one.
SHOWN = ("loss", *(f"loss_{name}" for name in KINDS.values()), "entropy", "token_accuracy")


@dataclass(frozen=True)
class Totals:
    """Of one step, all ranks together."""

    loss: float  # nats a target token
    entropy: float  # nats, summed over the target tokens
    num_correct: float  # target tokens that the model gave the highest probability
    nll_of_kinds: list[float]  # nats, summed over the target tokens of each of `KINDS`
    tokens_of_kinds: list[int]
    grad_norm: float
    is_finite: bool  # the loss and the gradients of each rank
    is_asked_to_stop: bool = False  # any rank

    @property
    def target_tokens(self) -> int:
        return sum(self.tokens_of_kinds)


class StepSums:
    """The sums of this rank's micro-batches since the last exchange."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3 + 2 * len(KINDS), dtype=torch.float64, device=device)
        self._kinds = torch.tensor(list(KINDS), device=device)[:, None]
        self.loss_is_finite = True  # of this rank, as of the last exchange

    def add(self, loss: torch.Tensor, outputs: Any, kinds: torch.Tensor) -> None:
        """Add a micro-batch: its loss as it is differentiated, what `model.head.score` says of its K target tokens, and
        their kinds (K,)."""
        is_of_kind = kinds == self._kinds  # (kinds, K)
        nll = torch.where(is_of_kind, -outputs.log_probs.detach().double(), 0)
        sums = torch.stack([part.detach().double() for part in (loss, outputs.entropy.sum(), outputs.is_top1.sum())])
        self._sums += torch.cat([sums, nll.sum(1), is_of_kind.sum(1)])

    def exchange(self, grad_norm: torch.Tensor | float, *, is_asked_to_stop: bool = False) -> Totals:
        """The sums of all ranks; they begin anew. Each rank calls it once a step, and waits for its device once.

        Args:
            grad_norm: of the gradients, which all ranks share; not finite where they are not.
            is_asked_to_stop: this rank.
        """
        norm = torch.as_tensor(grad_norm, dtype=torch.float64, device=self._sums.device).reshape(1)
        flags = ~torch.stack([self._sums[:1], norm]).isfinite()
        asked = torch.full_like(norm, is_asked_to_stop)
        found = world.add_up(torch.cat([self._sums, norm, flags.flatten().double(), asked]))
        loss, entropy, correct, *of_kinds, total_norm, loss_failed, norm_failed, num_asked = found
        is_finite = not (loss_failed or norm_failed)
        self.loss_is_finite = is_finite or bool(self._sums[0].isfinite())
        self._sums.zero_()
        num_ranks, num_kinds = world.world_size(), len(KINDS)
        return Totals(
            loss / num_ranks,
            entropy,
            correct,
            of_kinds[:num_kinds],
            [int(count) for count in of_kinds[num_kinds:]],
            total_norm / num_ranks,
            is_finite,
            is_asked_to_stop=num_asked > 0,
        )


def summarize(steps: Sequence[Totals]) -> dict[str, float]:
    """The mean loss of some steps, that of each kind of target token (`loss_call` and so on, where there are any), and
    per target token their `entropy` (nats) and `token_accuracy`."""
    tokens = max(1, sum(step.target_tokens for step in steps))
    values = {"loss": sum(step.loss for step in steps) / len(steps)}
    for number, name in enumerate(KINDS.values()):
        if count := sum(step.tokens_of_kinds[number] for step in steps):
            values[f"loss_{name}"] = sum(step.nll_of_kinds[number] for step in steps) / count
    return values | {
        "entropy": sum(step.entropy for step in steps) / tokens,
        "token_accuracy": sum(step.num_correct for step in steps) / tokens,
    }


def require_counted(step: int, totals: Totals, expected: int) -> None:
    """Raises DataError, on every rank, where the labels of step `step` (from 0) are more or fewer than the `expected`
    number of the shards, by which its loss was divided."""
    if totals.target_tokens != expected:
        raise DataError(
            f"step {step + 1} has {totals.target_tokens:,} target tokens, and data.train counts {expected:,} for its "
            "samples: the loss would have the wrong weight. The weights were not changed; make the shards anew "
            "(`gemma-dist shard`)"
        )
