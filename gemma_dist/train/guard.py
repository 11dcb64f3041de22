"""What watches over a run's steps: nothing that is not finite reaches the weights, and a hang names its culprit.

The first rides on the one exchange of a step (`sums.py`), the second is a thread that sleeps.
"""

import faulthandler
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from gemma_dist import world
from gemma_dist.errors import TrainingError, setting
from gemma_dist.logs import log
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


class Watchdog:
    """A thread that, once no step has ended for `timeout_s` seconds, writes where every thread of this rank stands.

    In a hang most ranks wait for each other in an exchange; the one that stands elsewhere is the culprit, and the
    samples it works on are named with it. The run is left alone: it may only be slow.
    """

    def __init__(self, folder: Path, timeout_s: float, describe: Callable[[], str]) -> None:
        """`describe` says what this rank is working on; the stacks go to `folder`/stacks-rank-<rank>.txt."""
        self._path, self._timeout_s, self._describe = folder / f"stacks-rank-{world.rank()}.txt", timeout_s, describe
        self._main = threading.get_ident()
        self._fed, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def feed(self) -> None:
        """A step has ended: count from now."""
        self._fed.set()

    def close(self) -> None:
        """End the thread, and wait until it has."""
        self._closed = True
        self._fed.set()
        self._thread.join()

    def _watch(self) -> None:
        """The thread: waits for the next `feed`, and barks where it does not come in time."""
        barked = False
        while not self._closed:
            if self._fed.wait(self._timeout_s):
                self._fed.clear()
                barked = False
            elif not barked:  # once for each hang
                barked = True
                self._bark()

    def _bark(self) -> None:
        """Log what this rank works on and the last calls of its main thread, and write the stacks of all threads."""
        stack = "".join(traceback.format_stack(sys._current_frames()[self._main])[-4:])
        message = (
            f"no step has ended for {self._timeout_s:g} s (train.step_timeout_s): this rank is at {self._describe()}\n"
            f"{stack}All its threads: {self._path}. The rank whose stack does not wait for the others holds them up"
        )
        log.warning("%s", message)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(message + "\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
