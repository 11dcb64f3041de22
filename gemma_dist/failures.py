"""What ends a run although nothing is wrong with its code: disks, memory, other ranks. Each in words, for the user.

A rank that the system kills says nothing, and the others find out by an exchange that fails, or by the launcher, which
then ends them too. So both ways lead to one message, said once, by the first rank that is left.
"""

import errno
import os
import re
import signal
import threading
from collections.abc import Callable

from gemma_dist import world

# What the system says of a user's files and disks, and what to do where that does not go without saying.
USER_ERRNOS = {
    errno.ENOENT: "",
    errno.ENOTDIR: "",
    errno.EISDIR: "",
    errno.EEXIST: "name another, or remove it",
    errno.ENOTEMPTY: "name another folder",
    errno.EACCES: "",
    errno.EPERM: "",
    errno.EROFS: "name a folder on another disk",
    errno.ENAMETOOLONG: "name a shorter one",
    errno.ELOOP: "",
    errno.ENOSPC: "make room there, or name a folder on another disk",
    errno.EDQUOT: "make room in your quota, or name a folder on another disk",
    errno.EFBIG: "raise `ulimit -f`, or name a folder on a file system with larger files",
    errno.EIO: "the disk or its network fails: look at the system's log, or name a folder on another disk",
    errno.ESTALE: "the file changed under us on a network disk: run the command again",
}
HUNG = 4  # exit code of a run that the watchdog ended
RUST_ERRNO = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers say it in words alone

_telling = threading.Lock()
_told: list[bool] = []  # whether ended ranks were reported: two threads of a rank may find out


def explain(error: Exception) -> str | None:
    """What to tell the user of an error that no code of ours is to blame for; empty where another rank tells it, None
    for any other error."""
    if message := _of_the_disk(error):
        return message
    if ended := world.ended_ranks():
        return _of_ranks(ended)
    return _of_memory(error)


def explain_sigterm(say: Callable[[str], None]) -> None:
    """Let a rank that is told to end look first whether another one was killed: that is why the launcher ends the rest.

    In a thread, since the main one may be waiting for that rank, in code that no signal interrupts.
    """
    arrived, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGTERM, lambda *_: None)  # it has to have a handler for its number to be written

    def wait() -> None:
        """Read the number of every signal that has a handler, as Python's runtime writes it; at SIGTERM, the end."""
        while os.read(arrived, 1)[0] != signal.SIGTERM:
            pass
        if message := _of_ranks(world.ended_ranks(patience_s=0)):
            say(message)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, name="sigterm", daemon=True).start()


def say_no_more() -> None:
    """From now on, say nothing of ranks that end: it is known why they do, and said."""
    with _telling:
        _told.append(True)


def _of_the_disk(error: Exception) -> str:
    """`FILE: what the system says; what to do`, as far as known. Empty for an error that it does not report of a
    file."""
    number = _errno(error)
    if number not in USER_ERRNOS:
        return ""
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename2 or error.filename}: {error.strerror}"  # copies and renames fail at their target
    remedy = USER_ERRNOS[number]
    return f"{message}; {remedy}" if remedy else message


def _errno(error: Exception) -> int | None:
    """The system's number of an error, Rust's included (`No space left on device (os error 28)`); None without one."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = RUST_ERRNO.search(str(error))
    return int(found[1]) if found else None


def _of_ranks(ended: dict[int, int]) -> str:
    """Why the others stop with those that ended (rank -> process); empty where it is said elsewhere."""
    with _telling:
        left = set(range(world.world_size())) - ended.keys()
        if not ended or world.rank() != min(left) or _told:
            return ""
        _told.append(True)
    names = ", ".join(f"rank {rank} (process {process})" for rank, process in ended.items())
    return (
        f"{names} has ended, so the other ranks stop. Unless it says why itself, the system killed it (exitcode -9 "
        "in the launcher's lines): most often the machine was out of memory. Finished checkpoints are whole: the same "
        "command resumes from the newest"
    )


def _of_memory(error: Exception) -> str | None:
    """None for an error that is not for want of memory."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch's own words on the CPU
        return f"out of memory on the machine: {error}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for its name
        return f"out of memory on the GPU: {error}\ndocs/launch.md says what to change first"
    return None
