"""What watches over a run's steps: nothing that is not finite reaches the weights. It rides on the one exchange of a
step (`sums.py`)."""

from gemma_dist import world
from gemma_dist.errors import TrainingError, setting
from gemma_dist.stream.schedule import Schedule

NUM_IDS_SHOWN = 50  # of a rank, in a message


def stop_unless_finite(schedule: Schedule, step: int, *, everywhere: bool, loss: bool) -> None:
    """Let all ranks stop together, before the optimizer, when the loss or a gradient of step `step` (from 0) is not
    finite on any of them. To be called by every rank; only where they stop, they tell each other more.

    Args:
        everywhere: whether all ranks' losses and gradients are finite, as all of them know by now.
        loss: whether this rank's loss is.

    Raises:
        TrainingError: on every rank, with the samples of the step.
    """
    if everywhere:
        return
    finite_of_rank = world.gather_objects(loss)
    what = "the loss is finite, but a gradient is"
    blamed = [rank for rank, finite in enumerate(finite_of_rank) if not finite]
    if blamed:
        what = f"the loss of rank {', '.join(map(str, blamed))} is"
    shown = blamed or range(len(finite_of_rank))  # a gradient is the sum of all ranks': any of them may be to blame
    ids = "\n".join(f"    rank {rank}: {sample_ids(schedule, step, rank)}" for rank in shown)
    raise TrainingError(
        f"step {step + 1}: {what} not finite. The weights were not changed, and checkpoints hold finished steps only. "
        f"Its samples:\n{ids}\nLook at them (`gemma-dist inspect SHARDS --id ID`) and leave bad ones out "
        f"({setting('quarantine', 'FILE')}), or resume from the last checkpoint with a lower learning_rate or a longer "
        "warm-up, if loss or grad grew before"
    )


def sample_ids(schedule: Schedule, step: int, rank: int) -> str:
    """The ids of the samples that a rank trains on at a step (from 0), for messages."""
    samples = [sample for packs in schedule.micro_batches(step, rank) for pack in packs for sample in pack]
    if not samples:
        return "none, only fillers"
    more = f" and {len(samples) - NUM_IDS_SHOWN} more" if len(samples) > NUM_IDS_SHOWN else ""
    return ", ".join(map(schedule.shards.id, samples[:NUM_IDS_SHOWN])) + more
