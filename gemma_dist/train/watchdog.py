"""What ends a step that does not end: a rank that hangs would keep all others busy until their exchange gives up.

No exception reaches a thread that waits in an exchange, so a thread of each rank watches, and ends its process. Before
that each rank reports where it stands; the one that does not answer, or that stands elsewhere, holds the others up.

OUT/heartbeats/<rank>.json    what a rank is at, rewritten every few seconds for as long as its process is alive
OUT/heartbeats/hangs-<run>    there once the time of one rank was up, so that the others report as well
OUT/stacks-rank-<rank>.txt    where all threads of a rank stood
"""

import contextlib
import faulthandler
import json
import os
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from gemma_dist import exits, failures, world
from gemma_dist.files import put, unfollowed
from gemma_dist.logs import log, to_json
from gemma_dist.train.checkpoint import UNFINISHED
from gemma_dist.train.owner import HEARTBEATS, disown, successor

HANGS = "hangs"
BEAT_S = 10.0  # between heartbeats, or a quarter of the timeout where that is less
PATIENCE = 3  # a step may take so many times as long as the longest; the first, which compiles, as the timeout
GRACE = 4  # beats that the others have to report
SLOWEST_DISK = 50e6  # bytes a second: a checkpoint may take as long, once it is written and no longer grows


def clear(folder: Path) -> None:
    """Remove the heartbeats of an earlier run. Rank 0 calls it, before any rank makes its `Watchdog`."""
    shutil.rmtree(folder / HEARTBEATS, ignore_errors=True)


class Watchdog:
    """Ends this process, and lets the other ranks end theirs, once a step takes too long: more than `timeout_s` seconds
    and more than three times the longest step so far. As long as a checkpoint grows, that time starts anew; before it
    has its name, it is read, and waited for until it is on the disk, which takes a while by its size.

    Two threads: one has to do with files, which may hang themselves; the other counts, and waits for nothing.
    """

    def __init__(
        self, folder: Path, timeout_s: float, position: Callable[[], str], samples: Callable[[int], str]
    ) -> None:
        """
        Args:
            folder: of the run, where all ranks write.
            position: says what this rank is at.
            samples: says what another one works on there.
        """
        self._folder, self._timeout_s, self._position, self._samples = folder, timeout_s, position, samples
        self._beat_s = min(BEAT_S, timeout_s / 4)
        self._main = threading.get_ident()
        self._moved, self._others_hang, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._num_steps, self._longest_s, self._begun = 0, 0.0, time.monotonic()
        self._saving_s = 0.0  # what the checkpoint at work may take
        self._hang: dict[str, object] = {}  # once this rank reports one
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat_on, self._watch)]
        for thread in self._threads:
            thread.start()

    def step_ended(self) -> None:
        """A step has ended: count from now."""
        if self._num_steps:  # the first compiles: no measure of the others
            self._longest_s = max(self._longest_s, time.monotonic() - self._begun)
        self._num_steps += 1
        self.moved()

    def moved(self) -> None:
        """Something else has ended that takes its own time: count from now."""
        self._begun = time.monotonic()
        self._moved.set()

    def close(self) -> None:
        """End the threads, and take the heartbeat away."""
        self._closed.set()
        self._moved.set()
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(OSError):
            disown(self._folder)
            self._path(world.rank()).unlink(missing_ok=True)
            (self._folder / HEARTBEATS).rmdir()  # by the last rank

    def _limit_s(self) -> float:
        """What the step at work may take."""
        if not self._num_steps:
            return max(PATIENCE * self._timeout_s, self._saving_s)
        return max(self._timeout_s, PATIENCE * self._longest_s, self._saving_s)

    def _watch(self) -> None:
        """The thread that counts."""
        waited_s = 0.0
        while not self._closed.is_set():
            begin = time.monotonic()
            if self._moved.wait(self._beat_s):
                self._moved.clear()
                waited_s = 0.0
                continue
            waited_s += min(time.monotonic() - begin, 2 * self._beat_s)  # not while this process itself was stopped
            if waited_s >= self._limit_s() or self._others_hang.is_set():
                self._end(waited_s)

    def _beat_on(self) -> None:
        """The thread that has to do with files."""
        size = 0
        while True:
            with contextlib.suppress(OSError):  # nothing of it is worth a run
                (self._folder / HEARTBEATS).mkdir(parents=True, exist_ok=True)
                self._beat()
            with contextlib.suppress(OSError):  # a full disk can be read
                before, size = size, _size(self._folder / UNFINISHED)
                self._saving_s = size / SLOWEST_DISK
                if size != before:
                    self._moved.set()
            with contextlib.suppress(OSError):
                if self._hangs().exists():
                    self._others_hang.set()
            with contextlib.suppress(OSError, ValueError):
                self._leave_to(successor(self._folder))
            if self._closed.wait(self._beat_s):
                return

    def _leave_to(self, successor: str) -> None:
        """End this process, which its launcher has lost, if another run has the folder by now."""
        if successor:
            log.error(
                "error: %s has %s now, so this process ends: its launcher is gone, or lost sight of it",
                successor,
                self._folder,
            )
            exits.leave(exits.HUNG, silently=True)  # what launched the other run looks for codes in the same place

    def _path(self, rank: int) -> Path:
        return self._folder / HEARTBEATS / f"{rank}.json"

    def _hangs(self) -> Path:
        """Of this run: ranks of a killed one, which wait for it on another machine, may have their time up later."""
        return self._folder / HEARTBEATS / f"{HANGS}-{world.name_of_run()}"

    def _beat(self) -> None:
        """Rewrite this rank's heartbeat; a reader sees the old one or the new one."""
        heartbeat = {
            "at": self._position(),
            "seconds": round(time.monotonic() - self._begun, 1),
            "host": socket.gethostname(),
            "process": os.getpid(),
        }
        put(self._path(world.rank()), f"{to_json(heartbeat | self._hang)}\n".encode())

    def _end(self, waited_s: float) -> None:
        """Report where this rank stands, let one of those that do tell of all of them, and end the process."""
        try:
            failures.say_no_more()  # of ranks that end
            reports = self._exchange_reports(waited_s)
            answering = [rank for rank, heartbeat in reports.items() if "hangs" in heartbeat]
            if world.rank() == min(answering, default=world.rank()):
                log.error("%s", self._verdict(waited_s, reports))
            else:
                time.sleep(self._beat_s)  # let that rank speak before the launcher ends it
        except Exception:  # whatever it is, it must not keep the process alive
            traceback.print_exc()
        exits.leave(exits.HUNG)

    def _exchange_reports(self, waited_s: float) -> dict[int, dict[str, Any]]:
        """Say and write where this rank stands, and wait for the others to do so: the heartbeats of all ranks, or none
        where the disk hangs."""
        frame = sys._current_frames()[self._main]
        stack = "".join(traceback.format_stack(frame)[-4:])
        at = f"{self._position()}, {self._samples(world.rank())}"
        message = f"no step has ended for {waited_s:.0f} s (train.step_timeout_s): this rank is at {at}\n{stack}"
        log.warning("%s", message.rstrip())
        self._hang = {"hangs": _place(frame)}
        reports: dict[int, dict[str, Any]] = {}

        def exchange() -> None:
            """What never ends on a disk that hangs."""
            with contextlib.suppress(OSError):
                self._beat()
                self._hangs().touch()
                path = self._folder / f"stacks-rank-{world.rank()}.txt"
                with open(path, "a", encoding="utf-8", opener=unfollowed) as file:
                    file.write(message)
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
                time.sleep(GRACE * self._beat_s)
                reports.update(self._reports())

        thread = threading.Thread(target=exchange, daemon=True)
        thread.start()
        thread.join(2 * GRACE * self._beat_s)
        return reports

    def _reports(self) -> dict[int, dict[str, Any]]:
        """The heartbeats of all ranks, as far as they wrote some, with how long ago that was, by the disk's clock."""
        reports, now = {}, self._path(world.rank()).stat().st_mtime
        for rank in range(world.world_size()):
            with contextlib.suppress(OSError, ValueError):
                heartbeat = json.loads(self._path(rank).read_text(encoding="utf-8"))
                reports[rank] = heartbeat | {"silent_s": now - self._path(rank).stat().st_mtime}
        return reports

    def _verdict(self, waited_s: float, reports: dict[int, dict[str, Any]]) -> str:
        """What is said once, of all ranks. Without any `reports` the disk hangs, too."""
        lines = [
            f"error: no step has ended for {waited_s:.0f} s, so the run ends here (train.step_timeout_s: "
            f"{self._timeout_s:g}; three times the longest step, where that is more)"
        ]
        if reports:
            ranks = range(world.world_size())
            lines += [f"    rank {rank}: {self._state(rank, reports.get(rank))}" for rank in ranks]
        else:
            lines.append(f"    {self._folder}: heartbeats can neither be written nor read there, so its disk may hang")
        lines.append(
            f"One that does not answer, or stands elsewhere than the others, holds them up. All threads: {self._folder}"
            "/stacks-rank-*.txt. Finished checkpoints are whole: the same command resumes from the newest. Where steps "
            "are merely slow, raise train.step_timeout_s"
        )
        return "\n".join(lines)

    def _state(self, rank: int, heartbeat: dict[str, Any] | None) -> str:
        """Of one rank, in words."""
        if heartbeat is None:
            return f"DOES NOT ANSWER, and never did; {self._samples(rank)}"
        at = f"{heartbeat['at']}, {self._samples(rank)}"
        if "hangs" in heartbeat:
            return f"in {heartbeat['hangs']}; at {at}"
        return (
            f"DOES NOT ANSWER since {heartbeat['silent_s']:.0f} s: process {heartbeat['process']} on "
            f"{heartbeat['host']} is stopped, or its machine or disk hangs; at {at}"
        )


def _place(frame: FrameType) -> str:
    """The two innermost calls of a stack, and the innermost of ours."""
    calls = traceback.extract_stack(frame)[::-1]
    ours = [call for call in calls[2:] if f"{os.sep}gemma_dist{os.sep}" in call.filename]
    shown = [*calls[:2], *ours[:1]]
    return ", called by ".join(
        f"{call.name} ({'/'.join(Path(call.filename).parts[-3:])}:{call.lineno})" for call in shown
    )


def _size(folder: Path) -> int:
    """Bytes in a folder that others write to, and rename."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            size += path.stat().st_size
    return size
