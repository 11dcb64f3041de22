"""What asks a run to stop: SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 to any rank, and a file OUT/stop.

From its first step on, a run that is asked to finishes the optimizer step at work on all ranks, saves, and ends with
exit code 75 (`boundary.py`). Before, there is nothing to save: the command ends at once. Not a run that was begun from
Python, whose process is not ours to end, nor one of several machines because of the file, of which the others hear
nothing before they train: those stop after their first step. While the result is published, that is ended first. A
second SIGINT ends the process at once, at any time.

A rank that waits in an exchange for one that is gone never comes to the end of its step. It ends all the same: by the
launcher, where that was told to end (it kills what does not, after TORCH_ELASTIC_SHUTDOWN_TIMEOUT) or where a rank of
its own machine ended (`signals.py`); by the failing connection, where the other machine closed it; by Slurm's KILL,
where that ends the job step because of the other machine; and by the watchdog after `train.step_timeout_s`, where
nobody says anything, as when the network is cut.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma_dist import exits, meeting, signals, world
from gemma_dist.logs import log

STOP = "stop"  # the file's name
LOOK_S = 1.0  # between two looks for it
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
BY_LAUNCHER = ("SIGTERM", "SIGINT")  # with which torch's launcher ends its ranks
LAUNCHER_GRACE_S = 30.0  # until it kills them, unless the environment says otherwise


@dataclass(frozen=True)
class Request:
    """One request to stop."""

    by: str  # the signal, or the file
    came: float  # by `time.monotonic`
    is_signal: bool = True

    def deadline(self, stop_grace_s: float | None) -> float | None:
        """When this process is going to be killed, by `time.monotonic`; None where no limit is known."""
        limits = [stop_grace_s] if self.is_signal and stop_grace_s is not None else []
        if self.by in BY_LAUNCHER and "TORCHELASTIC_RUN_ID" in os.environ:
            limits.append(float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") or LAUNCHER_GRACE_S))
        return self.came + min(limits) if limits else None


class StopRequests:
    """What has asked one run of this process to stop: signals, and on rank 0 the file. Each is seen in a thread of its
    own."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._listens = False
        self._num_interrupts = 0
        self._waits_for = "the first step"  # where to stop at once is to lose nothing; empty once it has begun
        self._last_words = ""  # of a request that changes nothing any more
        self._ends = False
        self._file: Path | None = None
        self._closed = threading.Event()

    def listen(self) -> None:
        """Take the signals of this process, which is ours to end. To be called early: what comes before does what it
        always does."""
        self._listens = True
        signals.take(SIGNALS, self._signaled)

    @contextlib.contextmanager
    def looking_in(self, folder: Path) -> Iterator[None]:
        """Within, rank 0 looks for the file in `folder`, once a second; no step waits for its disk."""
        self._file = folder / STOP if world.rank() == 0 else None
        if self._file is not None:
            threading.Thread(target=self._look, args=(self._file,), name="stop", daemon=True).start()
        try:
            yield
        finally:
            self._closed.set()

    def begins_at(self, step: int, num_steps: int) -> None:
        """The run is going to begin with `step` (from 1)."""
        self._waits_for = f"step {step} of {num_steps}"

    def at_work(self) -> None:
        """A step begins: from now on there is something to save."""
        self._waits_for = ""

    def ends(self, last_words: str = "") -> None:
        """The run ends now, on all ranks: requests change nothing any more, and are answered with `last_words`."""
        self._last_words, self._ends = last_words, True
        signals.let_others_end()
        exits.use_folder(None)
        self._remove_file()

    def by(self) -> str:
        """The first request; empty without any."""
        return self._requests[0].by if self._requests else ""

    def seconds_left(self, stop_grace_s: float | None) -> float | None:
        """Until this process is going to be killed; None where no limit is known."""
        deadlines = [deadline for one in self._requests if (deadline := one.deadline(stop_grace_s)) is not None]
        return min(deadlines) - time.monotonic() if deadlines else None

    def _signaled(self, name: str, came: float) -> None:
        """In the thread that sees signals."""
        self._num_interrupts += name == signal.SIGINT.name
        if self._num_interrupts > 1:
            log.warning("interrupted twice: leaving at once")
            exits.leave(exits.INTERRUPTED)
        self._add(Request(name, came))

    def _look(self, file: Path) -> None:
        """The thread that looks for the file."""
        while not self._closed.is_set():
            with contextlib.suppress(OSError):
                if file.exists():
                    self._add(Request(str(file), time.monotonic(), is_signal=False))
                    return
            self._closed.wait(LOOK_S)

    def _add(self, request: Request) -> None:
        if self._ends:
            if self._last_words:
                log.info("%s: %s", request.by, self._last_words)
            return
        if self._waits_for and self._may_leave(request):
            log.info("stopped before %s, as %s asked: nothing had to be saved", self._waits_for, request.by)
            self._remove_file()
            exits.note("asked", request.by)
            exits.leave(exits.STOPPED)
        if not self._requests:
            log.info("%s: stopping after %s", request.by, self._waits_for or "this step")
        self._requests.append(request)

    def _may_leave(self, request: Request) -> bool:
        """Whether this process may end although no step has begun."""
        return self._listens and (request.is_signal or not meeting.over_machines())

    def _remove_file(self) -> None:
        """It is obeyed."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)
