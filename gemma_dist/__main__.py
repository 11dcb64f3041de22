"""`gemma-dist` and `python -m gemma_dist`: run a verb, and turn what goes wrong into an exit code.

0: done. 2: something the user can mend, said in plain words. 1: a bug of ours, with its traceback.
"""

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence

import click

from gemma_dist import world
from gemma_dist.cli import cli
from gemma_dist.errors import GemmaDistError, PeerError
from gemma_dist.report import start_logging

# What the file system says to a user: a missing file, a forbidden folder, a full disk.
USER_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT}

_saying, _said = threading.Lock(), list[bool]()  # of ended ranks: two threads of a rank may find out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Each of several ranks says its own error, with its number."""
    start_logging()
    if world.world_size() > 1:
        _explain_sigterm()
    try:
        result = cli.main(arguments, prog_name="gemma-dist", standalone_mode=False)
        return result if isinstance(result, int) else 0  # click returns the code of --help and --version
    except click.ClickException as error:
        error.show()
    except click.Abort:
        return 130
    except PeerError:
        pass
    except GemmaDistError as error:
        _say(f"error: {error}")
    except Exception as error:
        if isinstance(error, OSError) and error.errno in USER_ERRNOS:
            _say(f"error: {error.filename or 'disk'}: {error.strerror}")
        elif ended := world.ended_ranks():
            _say_ended(ended)
        elif memory := _out_of_memory(error):
            _say(f"error: {memory}")
        else:
            _say(traceback.format_exc() + "This is a bug in gemma_dist: please report it with the lines above.")
            return 1
    return 2


def _explain_sigterm() -> None:
    """Let a rank that is told to end look first whether another one was killed: that is why the launcher ends the rest.

    In a thread, since the main one may be waiting for that rank, in code that no signal interrupts.
    """
    arrived, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGTERM, lambda *_: None)  # it has to have a handler for its number to be written

    def wait() -> None:
        while os.read(arrived, 1)[0] != signal.SIGTERM:
            pass
        if ended := world.ended_ranks(patience_s=0):
            _say_ended(ended)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, name="sigterm", daemon=True).start()


def _say_ended(ended: dict[int, int]) -> None:
    """Why an exchange failed: other ranks (rank -> process) are gone. Said once, by the first that is left."""
    with _saying:
        if world.rank() != min(set(range(world.world_size())) - ended.keys()) or _said:
            return
        _said.append(True)
        told = ", ".join(f"rank {rank} (process {process})" for rank, process in ended.items())
        _say(
            f"error: {told} has ended, so the others cannot go on. Unless it says why itself, the system killed it "
            "(exitcode -9 in the launcher's lines): most often the machine was out of memory. Finished checkpoints are "
            "whole: the same command resumes from the newest"
        )


def _out_of_memory(error: Exception) -> str:
    """What to tell the user of an error for want of memory; empty for any other."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch's own words on the CPU
        return f"out of memory on the machine: {error}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for its name
        return f"out of memory on the GPU: {error}\ndocs/launch.md says what to change first"
    return ""


def _say(message: str) -> None:
    """Print to stderr; one of several ranks puts its number before each line."""
    prefix = f"[rank {world.rank()}] " if world.world_size() > 1 else ""
    print("\n".join(prefix + line for line in message.splitlines()), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
