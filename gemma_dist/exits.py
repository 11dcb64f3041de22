"""How a command ends: its exit code, and the word that each rank leaves of its own.

    0    done
    1    an internal error; of `check-prompts`, `check-model` and `push`: what they look at has faults
    2    a user error: the same command would fail again
    3    of `plan`: it does not fit; of `compare`: a rule was broken
    4    a step hung, and the watchdog ended the run
    5    of `health`: a node is not fit; of `doctor`: this machine is not
    74   a disk failed, or its network; the same command may go on (EX_IOERR of sysexits.h)
    75   stopped as it was asked to; the same command goes on (EX_TEMPFAIL of sysexits.h)
    130  interrupted; of `train`, twice
    143  told to end, or at an end because another rank is

Launchers hide all of them behind their own. So where GEMMA_DIST_EXIT_CODES names a folder, each rank writes its code
to FOLDER/rank-<rank>: a rank without one was killed. Rank 0 writes FOLDER/step, the step of the newest complete
checkpoint, and FOLDER/asked, what asked the run to stop. While a run trains, codes other than 0 go to OUT/heartbeats as
well, so that the other ranks can tell a rank that was killed from one that ended by itself.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NoReturn

from gemma_dist import ranklog, world
from gemma_dist.files import put

DONE, BUG, USER_ERROR, NOT_PASSED, HUNG, NODE_UNFIT, DISK_FAILED, STOPPED = 0, 1, 2, 3, 4, 5, 74, 75
INTERRUPTED, ENDED = 130, 143

FOLDER = "GEMMA_DIST_EXIT_CODES"
PATIENCE_S = 5.0  # for a disk, at the end of a process: one that hangs must not keep it alive

_of_the_run: list[Path] = []


def use_folder(folder: Path | None) -> None:
    """Where the ranks of a run find each other's codes; None: nowhere any more, since all of them end well."""
    _of_the_run[:] = [folder] if folder else []


def begin() -> None:
    """Take away what an earlier process of this rank left, as where a launcher starts its ranks anew: this one may be
    killed."""
    own = [folder / f"rank-{world.rank()}" for folder in _folder_of_launch()]
    _soon(own, lambda path: path.unlink(missing_ok=True))


def record(code: int) -> None:
    """Leave a word of how this process ends."""
    folders = _folder_of_launch() + (_of_the_run if code else [])
    _write_soon({folder / f"rank-{world.rank()}": str(code) for folder in folders})


def leave(code: int, *, silently: bool = False) -> NoReturn:
    """End the process at once, from any thread, whatever the others wait for.

    Args:
        silently: without a word for the launch, which is not this process's any more.
    """
    if not silently:
        record(code)
    ranklog.drain(PATIENCE_S)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def is_told() -> bool:
    """Whether the ranks leave a word for each other."""
    return bool(_folder_of_launch() + _of_the_run)


def codes() -> dict[int, int]:
    """The ranks that have ended by themselves and left a word of it (rank -> exit code), as far as known here."""
    found = {}
    for folder in _folder_of_launch() + _of_the_run:
        for rank in range(world.world_size()):
            with contextlib.suppress(OSError, ValueError):
                found[rank] = int((folder / f"rank-{rank}").read_text(encoding="utf-8"))
    return found


def note(name: str, value: object) -> None:
    """Tell whoever launched the run something (`step`, `asked`). For rank 0 alone; others say nothing."""
    if world.rank() == 0:
        _write_soon({folder / name: str(value) for folder in _folder_of_launch()})


def _folder_of_launch() -> list[Path]:
    return [Path(folder)] if (folder := os.environ.get(FOLDER)) else []


def _write_soon(texts: dict[Path, str]) -> None:
    """Write small files, each whole or not at all."""

    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path, f"{texts[path]}\n".encode())

    _soon(texts, write)


def _soon(paths: Collection[Path], work: Callable[[Path], None]) -> None:
    """Do something to each file, unless its disk hangs or refuses it."""

    def run() -> None:
        for path in paths:
            with contextlib.suppress(OSError):
                work(path)

    if paths:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(PATIENCE_S)
