"""Which steps a dry run takes: the first ones, and the one with the longest micro-batch, which decides on memory."""

from collections.abc import Sequence

from gemma_dist import world
from gemma_dist.resolve import Run
from gemma_dist.stream.schedule import PackedSequence, Schedule

FIRST_STEPS = 3  # of the run; those after the first are timed
MOST_SEQUENCES = 100_000  # of a rank, that are searched for the longest micro-batch


class ChosenSteps(Schedule):
    """A schedule whose steps from `first` on are `steps` of another one."""

    def __init__(self, schedule: Schedule, first: int, steps: Sequence[int]) -> None:
        self.__dict__.update(schedule.__dict__)  # it reads the same corpus
        self._first, self._chosen = first, list(steps)

    def sequences(self, step: int, lanes: range) -> list[PackedSequence]:
        """Those of the chosen step; none for steps behind the last, for which a loader asks ahead."""
        return super().sequences(self._chosen[step - self._first], lanes)


def choose_steps(run: Run, start_step: int) -> tuple[list[int], int]:
    """The steps (from 0) of a dry run: the first ones, and behind them the one with the longest micro-batch of the next
    epoch, unless it is among them; and how many were searched for it. All ranks call it and get the same.

    Lengths stand in the manifest: no row is read.
    """
    schedule, rank = run.schedule, world.rank()
    per_rank = run.plan.per_device_train_batch_size * run.plan.gradient_accumulation_steps
    num_searched = min(run.num_steps - start_step, schedule.steps_per_epoch, max(1, MOST_SEQUENCES // per_rank))
    steps = range(start_step, start_step + num_searched)
    longest = max(((tokens_of(schedule, step, rank), -step) for step in steps), default=(0, -start_step))
    _, earliest = max(world.gather_objects(longest))
    first = list(range(start_step, min(start_step + FIRST_STEPS, run.num_steps)))
    return (first if -earliest in first else [*first, -earliest]), num_searched


def tokens_of(schedule: Schedule, step: int, rank: int) -> int:
    """Tokens, padding included, of the largest micro-batch of a rank at a step (from 0)."""
    shards = schedule.shards
    most = 0
    for packs in schedule.micro_batches(step, rank):
        lengths = [int(shards.num_text_tokens[pack].sum() + shards.num_image_tokens[pack].sum()) for pack in packs]
        most = max(most, len(lengths) * max(lengths, default=0))
    return most
