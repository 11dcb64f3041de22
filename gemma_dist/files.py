"""Writing to disk: whole or not at all, beside other processes, and with a plain word when the disk refuses.

Whole or not at all means: written under a temporary name, with all bytes on the disk (fsync), and renamed then. A
reader, or a run after a power failure, finds the file as it was before or as it is now.

Others may write to a folder of ours, or to the one around it, such as /tmp, and plant symbolic links under names that
we are going to take. So what we write under a name of our own is made there (`begin`) or opened without following a
link (`unfollowed`), and a folder that nobody else should fill is ours (`make_own`).
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from gemma_dist.errors import ConfigError

# No room for another byte: on the disk, in the user's quota, or in a file of this size (`ulimit -f`).
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
UNFINISHED = re.compile(r"[0-9a-f]{32}")  # a folder that is being filled
UMASK = os.umask(0)  # it can only be read by setting it
os.umask(UMASK)
TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}  # what renaming a folder says where something is already


@contextlib.contextmanager
def whole_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends well and is gone when it does not.

    It lies in `.<name>.tmp` beside `out`, which one process at a time has: what a killed one left there is removed.
    Where the file system has no locks, two may be at work; each fills a folder of its own, and the last is refused.

    Args:
        num_bytes: what the folder will take, for the message when the disk is full.

    Raises:
        ConfigError: something lies at `out`; another process is writing it, or was faster; there is no room.
        PermissionError: somebody else made `.<name>.tmp`.
    """
    workshop = out.with_name(f".{out.name}.tmp")
    problem = f"{out}: another process is writing it; wait for it, or name another folder"
    with made(out.parent):
        make_own(workshop)
        with exclusive(workshop, problem) as locked:
            folder = workshop / uuid.uuid4().hex
            try:
                require_free(out)  # the process before this one may have ended well
                if locked:
                    _clear(workshop)
                folder.mkdir()
                yield folder
                seal(folder)
                _rename(folder, out)
                sync(out.parent)
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                shutil.rmtree(folder, ignore_errors=True)  # first, so that the message counts its room as free
                raise ConfigError(_no_room(out, num_bytes, error)) from error
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):  # others may be at work in it, without locks, or it is a user's
                    workshop.rmdir()


def _clear(workshop: Path) -> None:
    """Remove what killed processes were filling, and nothing of others."""
    for path in workshop.iterdir():
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def require_free(out: Path) -> None:
    """Raises ConfigError unless `out` is absent, or an empty folder."""
    is_empty_folder = out.is_dir() and not any(out.iterdir())
    if out.exists() and not is_empty_folder:
        raise ConfigError(f"{out} exists already; remove it or name another folder")


def _rename(folder: Path, out: Path) -> None:
    """Give `folder` its name, at which at most an empty folder may lie."""
    try:
        folder.rename(out)
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        raise ConfigError(
            f"{out} was written by another process meanwhile and stays as it is; name another folder"
        ) from None


def _no_room(out: Path, num_bytes: int, error: OSError) -> str:
    """What to say where a disk, quota or file of `out` is full. Asks for the free room now: clear up before."""
    return (
        f"{out}: {error.strerror} while writing {Path(error.filename2 or error.filename or out).name}; the folder "
        f"takes {size(num_bytes)}, and its disk has {size(shutil.disk_usage(out.parent).free)} free. Nothing of it is "
        "left: make room (also in your quota and `ulimit -f`), or name a folder on another disk"
    )


def size(num_bytes: int) -> str:
    """Bytes for people: in GiB, or in MiB where that says more."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A path to write a file to, which becomes `path` when the block ends well: whole and on the disk, or absent.

    The temporary name has the process in it, so that two may write the same file; the last one stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            begin(temporary)
            yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def begin(path: Path) -> None:
    """Make an empty file: what is at `path`, such as a link that somebody planted, is removed and not followed. Raises
    OSError where it cannot be removed."""
    path.unlink(missing_ok=True)
    os.close(unfollowed(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))


def unfollowed(path: str | Path, flags: int, mode: int = 0o666) -> int:
    """An `opener` of `open` that follows no symbolic link at the end of `path`. Raises OSError (ELOOP) at one."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


def make_own(folder: Path, mode: int = 0o777) -> None:
    """Make a folder, and those around it, unless it is there and ours: the owner of another one could change what is
    in it. With a `mode` that shuts others out, so does one that is there.

    Raises:
        PermissionError: it is a symbolic link, a file, or another user's.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode)
    except FileExistsError:
        found = folder.lstat()
        is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        if not is_own:
            what = (
                f"belongs to user {found.st_uid}" if stat.S_ISDIR(found.st_mode) else "is no folder, or a link to one"
            )
            problem = f"{what}, and what is kept there would be in other hands; remove it, or name another folder"
            raise PermissionError(errno.EPERM, problem, str(folder)) from None
        if stat.S_IMODE(found.st_mode) & ~mode:
            folder.chmod(mode)


def put(path: Path, data: bytes) -> None:
    """Write a small file, whole or not at all, without waiting for the disk: what it loses can be written again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        begin(temporary)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name: its bytes are on the disk before, the name after."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Have the file `source` at `target`, too: the same one, or a copy where the file system has no hard links. What
    lies at `target` is taken away first: a copy into a link that a kill left would overwrite what it is a link to."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)  # of a symbolic link, such as the hub's cache has, the file itself
    except OSError:
        shutil.copyfile(source, target)


def seal(folder: Path) -> None:
    """Have all files of a folder, which is about to get its name, on the disk, and readable for whom the umask says:
    safetensors makes them 0600, so that a group could not share them. A file that another folder has, too, keeps its
    mode, which is that folder's owner's to choose."""
    for path in folder.iterdir():
        if path.is_file():
            if path.stat().st_nlink == 1:
                path.chmod(0o666 & ~UMASK)
            sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's entries, on the disk before a name says that they are there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def exclusive(folder: Path, problem: str) -> Iterator[bool]:
    """Within, no other process has this folder, which is made if need be.

    The lock lies on the folder itself: it leaves no file behind and ends with the process, however that ends. File
    systems without such locks go without; yields whether this one has them.

    Raises:
        ConfigError: another process has the folder, or just removed it; `problem` is the message.
    """
    with made(folder):
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            raise ConfigError(problem) from None
        try:
            locked = _lock(handle, problem)
            # Whoever had the lock before may have removed the folder: then a new one of that name is another's to lock.
            if locked and not (folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())):
                raise ConfigError(problem)
            yield locked
        finally:
            os.close(handle)


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder, and those around it. An error within takes those away that were made here and hold nothing."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in absent:
            with contextlib.suppress(OSError):  # something is kept there
                path.rmdir()
        raise


def _lock(handle: int, problem: str) -> bool:
    """Lock an open folder until it is closed. False where its file system has no locks; ConfigError(`problem`) where
    another process has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(problem) from None
    except OSError:
        return False
    return True


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system within carry `path`: those of an open file's `write` and `close` know no name."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
