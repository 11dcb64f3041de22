"""How an optimizer step is divided among ranks, micro-batches and accumulation steps: arithmetic on a recipe."""

from dataclasses import dataclass

from gemma_dist.config import RunConfig
from gemma_dist.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """How an optimizer step is divided: ranks x micro-batch x accumulation = global batch, in sequences.

    Where several ranks share each sequence, neighbors do, and they count as one.
    """

    world_size: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    sequence_parallel_size: int = 1  # ranks that share a sequence

    @property
    def data_world_size(self) -> int:
        """How many ranks, or groups of them, have sequences of their own."""
        return self.world_size // self.sequence_parallel_size

    def data_rank(self, rank: int) -> int:
        """The number, from 0, of the group of ranks that a rank shares its sequences with."""
        return rank // self.sequence_parallel_size

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch_size} = {_ranks(self.world_size, self.sequence_parallel_size)} x "
            f"{self.per_device_train_batch_size} micro-batch x {self.gradient_accumulation_steps} accumulation"
        )


def _ranks(world_size: int, sequence: int) -> str:
    """So many ranks, in words."""
    if sequence == 1:
        return f"{world_size} ranks"
    groups = world_size // sequence
    return f"{groups} group{'s' * (groups > 1)} of {sequence} ranks (train.sequence_parallel_size)"


def batch_plan(config: RunConfig, world_size: int) -> BatchPlan:
    """Divide the global batch among `world_size` ranks. Raises ConfigError where the sizes do not agree."""
    train = config.train
    micro, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    sequence = train.sequence_parallel_size
    _require_shareable(config, world_size)
    ranks = _ranks(world_size, sequence)
    at_once = world_size // sequence * micro
    total = train.global_batch_size or at_once * (accumulation or 1)
    if total % at_once:
        below = total - total % at_once
        nearest = f"{below} or {below + at_once}" if below else str(at_once)
        raise ConfigError(
            f"train.global_batch_size: global batch {total} is not a multiple of {ranks} x {micro} "
            f"micro-batch = {at_once}; use {nearest}"
        )
    if accumulation and (made := at_once * accumulation) != total:
        raise ConfigError(
            f"train.gradient_accumulation_steps: {ranks} x {micro} micro-batch x {accumulation} steps "
            f"= {made}, but train.global_batch_size is {total}; leave gradient_accumulation_steps out (it becomes "
            f"{total // at_once}) or set global_batch_size: {made}"
        )
    return BatchPlan(world_size, micro, total // at_once, total, sequence)


def _require_shareable(config: RunConfig, world_size: int) -> None:
    """Raises ConfigError where train.sequence_parallel_size does not go with the ranks or the rest of the recipe."""
    size, attention = config.train.sequence_parallel_size, config.model.attn_implementation
    if size == 1:
        return
    if not config.train.packing:
        raise ConfigError(
            f"train.sequence_parallel_size: {size}, but packing is off, and packs are what ranks share; set "
            "train.packing: true (packing_length: the most tokens of a sequence), or remove it"
        )
    if attention != "sdpa":
        raise ConfigError(
            f"model.attn_implementation: {attention}, but sequences that ranks share (train.sequence_parallel_size) "
            "have attention of their own; set it to sdpa, or remove it"
        )
    if world_size % size:
        divisors = [str(number) for number in range(1, world_size + 1) if world_size % number == 0]
        raise ConfigError(
            f"train.sequence_parallel_size: {size} does not divide the {world_size} rank{'s' * (world_size > 1)} of "
            f"this launch; use {' or '.join(divisors)}, or start a multiple of {size} processes"
        )
