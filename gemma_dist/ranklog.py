"""What a rank says, kept in a file of its own: OUT/logs/<host>-rank-<rank>.log, appended to by each attempt.

A thread writes it. Neither a full disk nor one that hangs ends or holds up a run because of its log.
"""

import logging
import os
import queue
import shlex
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from gemma_dist import __version__, world
from gemma_dist.files import unfollowed
from gemma_dist.visible import ShownFormatter, shown

_kept: list["RankLog"] = []


class RankLog(logging.Handler):
    """The messages of this process, for as long as it trains and until it ends."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(ShownFormatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._lines: queue.SimpleQueue[str | threading.Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Take a message; nothing is waited for."""
        self._lines.put(self.format(record))

    def write_to(self, path: Path, head: str) -> None:
        """From now on, write to `path`: first the `head`, then what was said so far."""
        self._thread = threading.Thread(target=self._write, args=(path, head), name="log", daemon=True)
        self._thread.start()

    def _write(self, path: Path, head: str) -> None:
        """The thread that writes, until it is told to end."""
        failed = False
        lines: list[str] = [head]
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "a", encoding="utf-8", errors="backslashreplace", opener=unfollowed) as file:
                    file.write("".join(line + "\n" for line in lines))
            except OSError as error:
                if not failed:
                    print(f"the log {path} cannot be written: {error.strerror}", file=sys.stderr, flush=True)
                failed = True
            lines = []
            match self._lines.get():
                case None:
                    return
                case threading.Event() as written:
                    written.set()
                case line:
                    lines.append(line)

    def drain(self, seconds: float) -> None:
        """Wait until all that was said is written, for so long at most."""
        if self._thread is not None:
            written = threading.Event()
            self._lines.put(written)
            written.wait(seconds)

    def end(self) -> None:
        """Take no more."""
        logging.getLogger("gemma_dist").removeHandler(self)
        self._lines.put(None)


def keep() -> None:
    """From now on, keep what is said, for the file that `write_to` names later. That of a run that failed is closed."""
    close()
    _kept.append(RankLog())
    logging.getLogger("gemma_dist").addHandler(_kept[0])


def write_to(folder: Path, details: dict[str, object]) -> None:
    """Write what is kept to this rank's file in `folder`/logs, below a head that says whose attempt it is.

    Args:
        details: further lines of the head.
    """
    (kept,) = _kept
    kept.write_to(folder / "logs" / f"{socket.gethostname()}-rank-{world.rank()}.log", _head(details))


def say(text: str) -> None:
    """Add what is printed elsewhere than in the log."""
    for kept in _kept:
        kept.emit(logging.LogRecord("gemma_dist", logging.ERROR, "", 0, text, None, None))


def drain(seconds: float = 2.0) -> None:
    """Wait until all that was said is in the file, for so long at most."""
    for kept in _kept:
        kept.drain(seconds)


def close() -> None:
    """The run has ended well: what this process says from now on is not its word any more."""
    drain()
    for kept in _kept:
        kept.end()
    _kept.clear()


def _head(details: dict[str, object]) -> str:
    """What an attempt begins with."""
    job = os.environ.get("SLURM_JOB_ID")
    lines = {
        "job": f"{job}, restart {os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else "none",
        "process": f"{os.getpid()} on {socket.gethostname()}",
        "rank": f"{world.rank()} of {world.world_size()}",
        "nodes": ", ".join(world.hosts()),
        "gemma_dist": f"{__version__}, {_commit()}",
        "command": shlex.join(["gemma-dist", *sys.argv[1:]]),
        **details,
    }
    begin = f"==== {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
    return shown("\n".join([begin, *(f"{key}: {line}" for key, line in lines.items())]))


def _commit() -> str:
    """The commit of the checkout that this package runs from."""
    folder = Path(__file__).parents[1]
    if not (folder / ".git").exists():
        return "not from a checkout"
    describe = ["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", folder, *describe],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return "of an unknown commit"
    return f"commit {done.stdout.strip() or 'unknown'}"
