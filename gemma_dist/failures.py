"""What ends a run although nothing is wrong with its code: disks, memory, other ranks. Each in words, for the user.

A rank that the system kills says nothing, and the others find out by an exchange that fails, or by the launcher, which
then ends them too (`signals.py`). So both ways lead to one message, said once, by the first rank that is left on that
machine.
"""

import errno
import re
import signal
import socket
import threading
from collections.abc import Mapping
from typing import NamedTuple

from gemma_dist import exits, world

# What the system says of a user's files and disks, and what to do where that does not go without saying.
USER_ERRNOS = {
    errno.ENOENT: "",
    errno.ENOTDIR: "a part of that path is a file: name a folder in its place",
    errno.EISDIR: "",
    errno.EEXIST: "name another, or remove it",
    errno.ENOTEMPTY: "name another folder",
    errno.EACCES: "",
    errno.EPERM: "",
    errno.EROFS: "name a folder on another disk",
    errno.ENAMETOOLONG: "name a shorter one",
    errno.ELOOP: "a symbolic link is not followed there: remove it",
    errno.ENOSPC: "make room there, or name a folder on another disk",
    errno.EDQUOT: "make room in your quota, or name a folder on another disk",
    errno.EFBIG: "raise `ulimit -f`, or name a folder on a file system with larger files",
}
# Of disks that fail, for a moment or for good: the same command may go on.
DISK_ERRNOS = {
    errno.EIO: "the disk or its network fails: look at the system's log, or name a folder on another disk",
    errno.ESTALE: "the file changed under us on a network disk: run the command again",
}
# What torch's exchanges say where the process at the other end is gone.
BROKEN = re.compile(r"Connection (closed|reset) by peer|Broken pipe|gloo/transport|remote process exited")
GOES_ON = "Finished checkpoints are whole: the same command resumes from the newest"
RUST_ERRNO = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers say it in words alone

_telling = threading.Lock()
_told: list[bool] = []  # whether ended ranks were reported: two threads of a rank may find out


class Explanation(NamedTuple):
    """What ended this process."""

    message: str  # for the user; empty where another rank tells it
    code: int  # of this process


def explain(error: Exception) -> Explanation | None:
    """What to tell the user of an error that no code of ours is to blame for; None for any other error."""
    if message := _of_the_disk(error):
        return Explanation(message, code_of(error))
    if ended := world.ended_ranks():
        return Explanation(of_ranks(ended), code_after(ended))
    if (for_memory := _of_memory(error)) is not None:
        return Explanation(for_memory, exits.USER_ERROR)
    if _is_broken_connection(error):
        elsewhere = {rank: code for rank, code in exits.codes().items() if rank != world.rank()}
        return Explanation(of_ranks(elsewhere) if elsewhere else _of_connection(error), code_after(elsewhere))
    return None


def code_of(error: BaseException) -> int:
    """The exit code of an error that is told to the user, by what it was raised from: a disk that fails may work again
    when the same command comes next, all else would not."""
    return exits.DISK_FAILED if is_of_a_disk(error) else exits.USER_ERROR


def is_of_a_disk(error: BaseException) -> bool:
    """Whether a disk that failed is behind an error, and not what lies there."""
    cause: BaseException | None = error
    while cause is not None:
        if _errno(cause) in DISK_ERRNOS:
            return True
        cause = cause.__cause__
    return False


def say_no_more() -> None:
    """From now on, say nothing of ranks that end: it is known why they do, and said."""
    with _telling:
        _told.append(True)


def _of_the_disk(error: Exception) -> str:
    """`FILE: what the system says; what to do`, as far as known. Empty for an error that it does not report of a
    file."""
    remedies = USER_ERRNOS | DISK_ERRNOS
    number = _errno(error)
    if number not in remedies:
        return ""
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename2 or error.filename}: {error.strerror}"  # copies and renames fail at their target
    remedy = remedies[number]
    return f"{message}; {remedy}" if remedy else message


def _errno(error: BaseException) -> int | None:
    """The system's number of an error, Rust's included (`No space left on device (os error 28)`); None without one."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = RUST_ERRNO.search(str(error))
    return int(found[1]) if found else None


def of_ranks(ended: Mapping[int, int | None]) -> str:
    """Why the others stop with those that ended (rank -> how, as `world.ended_ranks` says); empty where it is said
    elsewhere."""
    with _telling:
        left = {world.rank(), *world.neighbors()} - ended.keys()
        if not ended or world.rank() != min(left) or _told:
            return ""
        _told.append(True)
    codes = exits.codes()
    ends = "; ".join(f"rank {rank} {_of_end(codes.get(rank), status)}" for rank, status in sorted(ended.items()))
    return f"{ends}. So the other ranks stop. {GOES_ON}"


def code_after(ended: Mapping[int, int | None]) -> int:
    """The exit code of a rank that ends because others have: theirs, where all that ended were asked to stop."""
    codes = exits.codes()
    asked = bool(ended) and all(codes.get(rank) == exits.STOPPED for rank in ended)
    return exits.STOPPED if asked else exits.ENDED


def _of_end(code: int | None, status: int | None) -> str:
    """How a rank ended: by the `code` that it left a word of, or as the system says."""
    if code is not None:
        return f"ended by itself (exit {code}): see what it says itself"
    if status is None:
        killed = "was killed" if exits.is_told() else "has ended; unless it says why itself, it was killed"
        return f"{killed} (the launcher's lines have its exit code: -9 is most often the kernel's out-of-memory killer)"
    if status >= 0:
        return f"ended by itself (exit {status}): see what it says itself"
    if status == -signal.SIGKILL:
        return "was killed (exit -9; most often the kernel's out-of-memory killer)"
    return f"was killed (exit {status}: {signal.Signals(-status).name})"


def _is_broken_connection(error: Exception) -> bool:
    """Whether an exchange failed since another rank is gone, on this machine or another."""
    names = {one.__name__ for one in type(error).__mro__}
    return world.world_size() > 1 and bool(
        isinstance(error, ConnectionError)
        or names & {"DistNetworkError", "DistStoreError"}  # torch's, which is not imported for their names
        or ("RuntimeError" in names and BROKEN.search(str(error)) is not None)
    )


def _of_connection(error: Exception) -> str:
    """Of a rank on another machine, of which nothing is known here. Said once on each machine."""
    with _telling:
        if world.rank() != min({world.rank(), *world.neighbors()}) or _told:
            return ""
        _told.append(True)
    (first, *_) = str(error).splitlines() or [type(error).__name__]
    return (
        f"{socket.gethostname()} lost its connection to a rank on another machine: that rank was killed, or its "
        f"machine or the network is gone, and says more itself if it can ({first}). {GOES_ON}"
    )


def _of_memory(error: Exception) -> str | None:
    """None for an error that is not for want of memory."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch's own words on the CPU
        return f"out of memory on the machine: {error}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for its name
        return f"out of memory on the GPU: {error}\ndocs/launch.md says what to change first"
    return None
