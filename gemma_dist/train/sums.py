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
from gemma_dist.errors import DataError

NUM_SUMS = 4  # of `StepSums.add`: loss, target tokens, entropy, tokens that were the most likely ones


@dataclass(frozen=True)
class Totals:
    """Of one step, all ranks together."""

    loss: float  # nats a target token
    target_tokens: int
    entropy: float  # nats, summed over the target tokens
    num_correct: float  # target tokens that the model gave the highest probability
    is_finite: bool  # the loss and the gradients of each rank


class StepSums:
    """The sums of this rank's micro-batches since the last exchange."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=device)
        self.loss_is_finite = True  # of this rank, as of the last exchange

    def add(self, loss: torch.Tensor, outputs: Any) -> None:
        """Add a micro-batch: its loss as it is differentiated, and what TRL's fused head says of its tokens."""
        parts = (loss, outputs.label_mask.sum(), outputs.entropy.sum(), outputs.is_top1.sum())
        self._sums += torch.stack([part.detach().double() for part in parts])

    def exchange(self, gradients_are_finite: torch.Tensor | bool) -> Totals:
        """The sums of all ranks; they begin anew. Each rank calls it once a step, and waits for its device once."""
        flags = self._sums.new_zeros(2)  # what is not finite: the loss, the gradients
        flags[0] = ~self._sums[0].isfinite()
        flags[1] = ~gradients_are_finite if torch.is_tensor(gradients_are_finite) else not gradients_are_finite
        loss, tokens, entropy, correct, *found = world.add_up(torch.cat([self._sums, flags]))
        if any(found):
            self.loss_is_finite = bool(self._sums[0].isfinite())
        self._sums.zero_()
        return Totals(loss / world.world_size(), int(tokens), entropy, correct, not any(found))


def summarize(steps: Sequence[Totals]) -> dict[str, float]:
    """The mean loss of some steps, and per target token their `entropy` (nats) and `token_accuracy`."""
    tokens = max(1, sum(step.target_tokens for step in steps))
    return {
        "loss": sum(step.loss for step in steps) / len(steps),
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
