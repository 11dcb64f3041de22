"""Bytes of row groups, from local files or any fsspec URL (s3, gs, http, memory …), checked, with retries and a cache.

A remote row group costs one ranged request. What a request cannot get for now (a refused connection, an overloaded
server, bytes that were damaged on the way) is asked for again, with growing pauses. The cache keeps row groups in files
of a local folder: written whole or not at all, checked at every use, fetched by one of the processes of a node for all
of them, and removed in the order of last use where they outgrow their size.
"""

import errno
import fcntl
import hashlib
import io
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gemma_dist.errors import ConfigError
from gemma_dist.files import make_own, put, unfollowed
from gemma_dist.logs import log
from gemma_dist.shards.manifest import has_digest, read_seal
from gemma_dist.shards.refusals import refusal
from gemma_dist.visible import masked

NUM_TRIES = 6
FIRST_WAIT_S = 0.5  # doubled at each try, times 0.5 to 1.5 by chance, so that ranks do not ask in step: 16 s in all
PACKAGES = {"s3": "gemma-dist[s3]", "s3a": "gemma-dist[s3]", "gs": "gemma-dist[gcs]", "gcs": "gemma-dist[gcs]"}
T = TypeVar("T")

_making = threading.RLock()  # of file systems; no process is forked meanwhile, so that it gets a lock that opens
os.register_at_fork(before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release)


class FetchError(Exception):
    """The bytes are unreachable or fail their checksum."""


class StoreRefusalError(FetchError):
    """The store refuses to give them; says why, and what helps."""


def is_url(path: str | Path) -> bool:
    """Whether a path is for fsspec to open."""
    return "://" in str(path)


def join(folder: str | Path, name: str) -> str:
    """The file `name` of a folder, local or remote."""
    return f"{str(folder).rstrip('/')}/{name}"


class FileSystem(Protocol):
    """What is used of fsspec's file systems."""

    def info(self, path: str) -> Mapping[str, Any]:
        """What is known of a file; `size` in bytes, or None."""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes [start, end) of a file, or all of them; a negative start counts from the end."""

    def ls(self, path: str, detail: bool = True) -> list[dict[str, Any]]:
        """The files of a folder: `name` and `size`."""

    def get_file(self, rpath: str, lpath: str) -> None:
        """Copy a file to the disk."""

    def put_file(self, lpath: str, rpath: str) -> None:
        """Copy a file from the disk: whole, in stores of objects, or not at all."""

    def pipe_file(self, path: str, value: bytes) -> None:
        """Write a file."""

    def rm_file(self, path: str) -> None:
        """Remove a file."""


class Fetcher:
    """Reads byte ranges for all threads of a process. A forked process may keep using it."""

    def __init__(self, cache_dir: Path | None, cache_bytes: int) -> None:
        """Folders of ours are made in `cache_dir`, and nothing else in it is touched. Without it no row group is kept.

        Raises:
            ConfigError: `cache_dir` cannot be written, or its disk has no locks.
        """
        self._systems: dict[tuple[int, str], FileSystem] = {}  # by process and protocol
        self._downloads = cache_dir / "gemma_dist-manifests" if cache_dir else None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        try:
            self._cache = _Cache(cache_dir / "gemma_dist-row-groups", cache_bytes) if cache_dir else None
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir = {str(cache_dir)!r}: {error}; name a folder on a local disk that can be written"
            ) from error

    def size(self, path: str) -> int:
        """Bytes of a file. Raises OSError or FetchError if it cannot be read."""
        if not is_url(path):
            return Path(path).stat().st_size

        def ask() -> int | None:
            """Bytes; None where the server does not say."""
            try:
                return self.system(path).info(path)["size"]
            except FileNotFoundError as error:
                if path.startswith("http") and error.__cause__:
                    raise error.__cause__ from None  # over HTTP fsspec says so of whatever keeps it from asking
                raise

        num_bytes = self.patiently(path, ask)
        if num_bytes is None:
            raise FetchError(f"the server of {path} does not say how large it is")
        return num_bytes

    def read(self, path: str, offset: int, num_bytes: int, digest: bytes) -> bytes:
        """The bytes [offset, offset + num_bytes) of a file. Raises OSError or FetchError if they cannot be read or fail
        their checksum."""
        if not is_url(path):
            with open(path, "rb") as file:
                file.seek(offset)
                return _checked(file.read(num_bytes), num_bytes, digest)

        def fetch() -> bytes:
            """The bytes, asked for once. FetchError where other ones came."""
            data = self.system(path).cat_file(path, start=offset, end=offset + num_bytes)
            return _checked(data, num_bytes, digest)

        if self._cache is None:
            return self.patiently(path, fetch)
        name = hashlib.sha256(f"{masked(path)}\n{offset}\n{num_bytes}\n{digest.hex()}".encode()).hexdigest()[:32]
        return self._cache.get(name, num_bytes, digest, lambda: self.patiently(path, fetch))

    def download(self, path: str) -> Path:
        """A whole file as a local one. What is kept of it is taken only if it is a manifest, and the store's has the
        same seal. It is replaced, never written to, so that who has mapped it keeps what he has.

        Of the processes that share a cache one fetches it. OSError or FetchError as `size`.
        """
        if not is_url(path):
            Path(path).stat()
            return Path(path)
        with _making:
            if self._downloads is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="gemma_dist-")  # goes with the Fetcher
                self._downloads = Path(self._temporary.name)
        file = self._downloads / f"{hashlib.sha256(masked(path).encode()).hexdigest()[:16]}-{path.rsplit('/', 1)[1]}"
        with _locked(file.with_suffix(".lock")):
            _remove_unfinished(file.parent, file.name)
            if not self._has_seal_of(path, file):
                put(file, self.patiently(path, lambda: self.system(path).cat_file(path)))
        return file

    def _has_seal_of(self, path: str, kept: Path) -> bool:
        """Whether the file `kept` is the manifest that the store has at `path`: one request for a few bytes."""
        seal = read_seal(kept) if kept.is_file() else None
        if seal is None:
            return False
        end = kept.stat().st_size

        def ask() -> bytes:
            """The end of the store's, and one byte behind it if there is one."""
            return self.system(path).cat_file(path, start=end - len(seal), end=end + 1)

        try:
            return self.patiently(path, ask) == seal
        except FetchError:  # such as of a shorter file
            return False

    def system(self, path: str) -> FileSystem:
        """fsspec's file system for a URL: credentials and endpoints come from where it looks for them."""
        import fsspec

        protocol = path.split("://", 1)[0]
        key = os.getpid(), protocol  # connections are of the process that made them
        with _making:
            if key not in self._systems:
                try:
                    # Nothing is listed, so that a file that has changed is never taken for its former self.
                    if protocol in ("http", "https"):
                        from gemma_dist.shards.ranged_http import RangedHTTP

                        self._systems[key] = RangedHTTP(use_listings_cache=False)
                    elif protocol in ("s3", "s3a"):
                        from gemma_dist.shards.ranged_s3 import RangedS3

                        self._systems[key] = RangedS3(use_listings_cache=False)
                    else:
                        self._systems[key] = fsspec.filesystem(protocol, use_listings_cache=False)
                except ImportError as error:
                    install = f"; pip install '{PACKAGES[protocol]}'" if protocol in PACKAGES else ""
                    raise ConfigError(f"{path}: {error}{install}") from error
                except ValueError as error:
                    raise ConfigError(f"{path}: {error}; write a local path or a URL that fsspec knows") from error
            return self._systems[key]

    def patiently(self, path: str, attempt: Callable[[], T]) -> T:
        """What `attempt` returns, tried again after errors that may pass."""
        for number in range(1, NUM_TRIES + 1):
            try:
                return attempt()
            except ConfigError:
                raise
            except Exception as error:  # each file system has errors of its own
                if is_url(path) and (words := refusal(error, lambda: self.system(path).cat_file(path, 0, 1))):
                    raise StoreRefusalError(f"{path}: {words}") from error
                if isinstance(error, FileNotFoundError | PermissionError):
                    raise
                if _is_final(error):
                    raise FetchError(f"{path} cannot be fetched: {_words(error)}") from error
                if number == NUM_TRIES:
                    raise FetchError(f"{path} cannot be fetched, tried {NUM_TRIES} times: {_words(error)}") from error
                pause = FIRST_WAIT_S * 2 ** (number - 1) * random.uniform(0.5, 1.5)
                log.warning("%s: %s; trying again in %.1f s", path, _words(error), pause)
                time.sleep(pause)
        raise AssertionError("unreachable")


class _Cache:
    """Files in a folder of their own that all processes of a node share."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Files there may be from earlier runs. `size.lock` holds their bytes as a number, and is the lock to write.

        Raises:
            OSError: the folder cannot be written, or its disk has no locks.
        """
        self._folder, self._max_bytes = folder, max_bytes
        self._told = False  # that files cannot be kept: once is enough
        with _locked(folder / "size.lock") as ledger:
            _note(ledger, self._make_room(0))

    def get(self, name: str, num_bytes: int, digest: bytes, fetch: Callable[[], bytes]) -> bytes:
        """The file `name`, or what `fetch` gives: once for all processes that ask for it now."""
        path = self._folder / name
        data = _find(path, num_bytes, digest)
        if data is None:
            # 4096 locks, so that files rarely wait for one another, and there is not a lock file for each of them
            with _locked(self._folder / f"{name[:3]}.lock"):
                data = _find(path, num_bytes, digest)
                if data is None:
                    data = fetch()
                    self._keep(path, data)
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        """Write a file, after making room for it. What does not fit, or what the disk refuses, is not kept."""
        if len(data) > self._max_bytes:
            return
        try:
            with _locked(self._folder / "size.lock") as ledger:
                ledger.seek(0)
                noted = ledger.read()  # an estimate: healed files count twice until the next look at the folder
                used = int(noted) if noted.isdigit() else self._max_bytes
                if used + len(data) > self._max_bytes:
                    used = self._make_room(len(data))
                put(path, data)
                _note(ledger, used + len(data))
        except OSError as error:  # a full disk, say: slower, no reason to stop
            if not self._told:
                log.warning("data.cache_dir: %s: %s; what is fetched from now on may not be kept", path.parent, error)
            self._told = True

    def _make_room(self, num_bytes: int) -> int:
        """Bytes of the files, once those that were used longest ago have gone so that `num_bytes` more fit. As looking
        at all files takes a while, a tenth of the cache is freed at a time."""
        _remove_unfinished(self._folder)
        files = []
        used = 0
        for entry in os.scandir(self._folder):
            if entry.name.endswith(".lock"):
                continue
            with suppress(FileNotFoundError):
                status = entry.stat()
                files.append((status.st_mtime_ns, status.st_size, entry.path))
                used += status.st_size
        if used + num_bytes <= self._max_bytes:
            return used
        for _, size, path in sorted(files):
            if used + num_bytes <= 0.9 * self._max_bytes:
                break
            Path(path).unlink(missing_ok=True)
            used -= size
        return used


@contextmanager
def _locked(path: Path) -> Iterator[io.FileIO]:
    """The file `path`, open to read and write, alone on this node; the lock of a process that dies is free."""
    make_own(path.parent, 0o700)  # may be emptied at any time
    with io.FileIO(unfollowed(path, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile has it open, too


def _note(ledger: io.FileIO, num_bytes: int) -> None:
    """Write to `size.lock`, which the caller has locked, how many bytes the cache holds."""
    ledger.seek(0)
    ledger.truncate()
    ledger.write(b"%d" % num_bytes)


def _find(path: Path, num_bytes: int, digest: bytes) -> bytes | None:
    """What a file holds, if it is there and whole."""
    try:
        data = _checked(path.read_bytes(), num_bytes, digest)
    except (OSError, FetchError):
        return None
    with suppress(OSError):
        os.utime(path)  # the time of its last use
    return data


def _remove_unfinished(folder: Path, name: str = "") -> None:
    """Remove what killed processes left of a file, or of all. The caller has the lock under which these are written, so
    no writer is alive."""
    for path in folder.glob("*.tmp"):
        if name in path.name:
            path.unlink(missing_ok=True)


def _checked(data: bytes, num_bytes: int, digest: bytes) -> bytes:
    """`data`. FetchError where it has not this length and checksum."""
    if len(data) < num_bytes:
        raise FetchError(f"the file ends early: {len(data):,} bytes came instead of {num_bytes:,}")
    if len(data) > num_bytes:
        raise FetchError(f"more than the {num_bytes:,} bytes came that were asked for: the server has no ranges")
    if not has_digest(data, digest):
        raise FetchError("the bytes differ from those that were written (checksum)")
    return data


def _is_final(error: Exception) -> bool:
    """Whether a server has said no for good: a status of 400 to 499, but for 408 (too slow) and 429 (too often); or is
    not to be asked (HF_HUB_OFFLINE)."""
    if type(error).__name__ == "OfflineModeIsEnabled":  # of huggingface_hub, which is not imported for its name
        return True
    status = getattr(error, "status", None) or getattr(error, "code", None)  # as aiohttp and gcsfs say it
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    # s3fs makes EINVAL of 400 and 416, gcsfs a message of 403.
    return isinstance(error, OSError) and (error.errno == errno.EINVAL or str(error).startswith("Forbidden"))


def _words(error: Exception) -> str:
    """What an error says, or its kind where it says nothing, as a timeout does."""
    return str(error) or type(error).__name__
