"""How an optimizer step is divided among ranks, micro-batches and accumulation steps: arithmetic on a recipe."""

from dataclasses import dataclass

from gemma_dist.config import RunConfig
from gemma_dist.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """How an optimizer step is divided: ranks x micro-batch x accumulation = global batch, in sequences."""

    world_size: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch_size} = {self.world_size} ranks x {self.per_device_train_batch_size} "
            f"micro-batch x {self.gradient_accumulation_steps} accumulation"
        )


def batch_plan(config: RunConfig, world_size: int) -> BatchPlan:
    """Divide the global batch among `world_size` ranks. Raises ConfigError where the sizes do not agree."""
    train = config.train
    micro, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    at_once = world_size * micro
    total = train.global_batch_size or at_once * (accumulation or 1)
    if total % at_once:
        below = total - total % at_once
        nearest = f"{below} or {below + at_once}" if below else str(at_once)
        raise ConfigError(
            f"train.global_batch_size: global batch {total} is not a multiple of {world_size} ranks x {micro} "
            f"micro-batch = {at_once}; use {nearest}"
        )
    if accumulation and (made := at_once * accumulation) != total:
        raise ConfigError(
            f"train.gradient_accumulation_steps: {world_size} ranks x {micro} micro-batch x {accumulation} steps "
            f"= {made}, but train.global_batch_size is {total}; leave gradient_accumulation_steps out (it becomes "
            f"{total // at_once}) or set global_batch_size: {made}"
        )
    return BatchPlan(world_size, micro, total // at_once, total)
