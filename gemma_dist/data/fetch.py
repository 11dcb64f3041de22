"""Bytes of row groups, from local files or any fsspec URL (s3, gs, http, memory …), checked, with retries and a cache.

A remote row group costs one ranged request. What a request cannot get for now (a refused connection, an overloaded
server, bytes that were damaged on the way) is asked for again, with growing pauses. The cache keeps row groups in files
of a local folder: written whole or not at all, checked at every use, fetched by one of the processes of a node for all
of them, and removed in the order of last use where they outgrow their size.
"""

import fcntl
import hashlib
import os
import random
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from gemma_dist.errors import ConfigError
from gemma_dist.report import log

NUM_TRIES = 6
FIRST_WAIT_S = 0.5  # doubled at each try, times 0.5 to 1.5 by chance, so that ranks do not ask in step: 16 s in all
PACKAGES = {"s3": "gemma-dist[s3]", "gs": "gemma-dist[gcs]", "gcs": "gemma-dist[gcs]"}
T = TypeVar("T")


class FetchError(Exception):
    """Bytes cannot be had, or are not those that were written."""


def is_url(path: str | Path) -> bool:
    """Whether a path is for fsspec to open."""
    return "://" in str(path)


def join(folder: str | Path, name: str) -> str:
    """The file `name` of a folder, local or remote."""
    return f"{str(folder).rstrip('/')}/{name}"


class Fetcher:
    """Reads byte ranges for all threads of a process."""

    def __init__(self, cache_dir: Path | None, cache_bytes: int) -> None:
        """Without `cache_dir` nothing that is fetched is kept."""
        self._cache = _Cache(cache_dir, cache_bytes) if cache_dir else None
        self._systems: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._downloads: tempfile.TemporaryDirectory[str] | None = None

    def size(self, path: str) -> int:
        """Bytes of a file. OSError or FetchError where it is not to be had."""
        if not is_url(path):
            return Path(path).stat().st_size
        return int(self._patiently(path, lambda: self._system(path).info(path)["size"]))

    def read(self, path: str, offset: int, num_bytes: int, crc32: int) -> bytes:
        """The bytes [offset, offset + num_bytes) of a file. OSError or FetchError where they are not to be had, or not
        those of the checksum."""
        if not is_url(path):
            with open(path, "rb") as file:
                file.seek(offset)
                return _checked(file.read(num_bytes), num_bytes, crc32)

        def fetch() -> bytes:
            data = self._system(path).cat_file(path, start=offset, end=offset + num_bytes)
            return _checked(data, num_bytes, crc32)

        if self._cache is None:
            return self._patiently(path, fetch)
        name = hashlib.sha256(f"{path}\n{offset}\n{num_bytes}\n{crc32}".encode()).hexdigest()[:32]
        return self._cache.get(name, num_bytes, crc32, lambda: self._patiently(path, fetch))

    def download(self, path: str) -> Path:
        """A whole file as a local one, fetched anew unless it is local. OSError or FetchError as `size`."""
        if not is_url(path):
            Path(path).stat()
            return Path(path)
        data = self._patiently(path, lambda: self._system(path).cat_file(path))
        with self._lock:
            self._downloads = self._downloads or tempfile.TemporaryDirectory(prefix="gemma_dist-")
        file = Path(self._downloads.name) / f"{hashlib.sha256(path.encode()).hexdigest()[:16]}-{Path(path).name}"
        _write(file, data)
        return file

    def _system(self, path: str) -> Any:
        """fsspec's file system for a URL: credentials and endpoints come from where it looks for them."""
        import fsspec

        protocol = path.split("://", 1)[0]
        with self._lock:
            if protocol not in self._systems:
                try:
                    # Nothing is listed, so that a file that has changed is never taken for its former self.
                    self._systems[protocol] = fsspec.filesystem(protocol, use_listings_cache=False)
                except ImportError as error:
                    package = PACKAGES.get(protocol, "the package that fsspec names")
                    raise ConfigError(f"{path}: {error}; pip install '{package}'") from error
                except ValueError as error:
                    raise ConfigError(f"{path}: {error}; write a local path or a URL that fsspec knows") from error
            return self._systems[protocol]

    def _patiently(self, path: str, attempt: Callable[[], T]) -> T:
        """What `attempt` returns, tried again after errors that may pass."""
        for number in range(1, NUM_TRIES + 1):
            try:
                return attempt()
            except (FileNotFoundError, PermissionError, ConfigError):
                raise
            except Exception as error:  # each file system has errors of its own
                if _is_final(error):
                    raise FetchError(f"{path} cannot be fetched: {_words(error)}") from error
                if number == NUM_TRIES:
                    raise FetchError(f"{path} cannot be fetched, tried {NUM_TRIES} times: {_words(error)}") from error
                pause = FIRST_WAIT_S * 2 ** (number - 1) * random.uniform(0.5, 1.5)
                log.warning("%s: %s; trying again in %.1f s", path, _words(error), pause)
                time.sleep(pause)
        raise AssertionError("unreachable")


class _Cache:
    """Files in a folder that all processes of a node share."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir = {str(folder)!r}: {error}; name a folder that can be written"
            ) from error
        with self._locked("cleaning"):
            self._make_room(0)

    def get(self, name: str, num_bytes: int, crc32: int, fetch: Callable[[], bytes]) -> bytes:
        """The file `name`, or what `fetch` gives: once for all processes that ask for it now."""
        with self._locked(name[:2]):  # 256 locks, so that there are not as many lock files as row groups
            path = self._folder / name
            with suppress(OSError, FetchError):
                data = _checked(path.read_bytes(), num_bytes, crc32)
                os.utime(path)  # the time of its last use
                return data
            data = fetch()
            if num_bytes <= self._max_bytes:
                with self._locked("cleaning"):
                    self._make_room(num_bytes)
                    _write(path, data)
            return data

    def _make_room(self, num_bytes: int) -> None:
        """Remove what was used longest ago until `num_bytes` more fit, and what killed processes left unfinished."""
        files = []
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):
                if entry.name.endswith(".tmp"):
                    os.unlink(entry.path)  # written under the lock that we hold, so its writer is gone
                elif not entry.name.endswith(".lock"):
                    status = entry.stat()
                    files.append((status.st_mtime_ns, status.st_size, entry.path))
        total = num_bytes + sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._max_bytes:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Alone on this node with a name; the lock of a process that dies is free."""
        with (self._folder / f"{name}.lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _checked(data: bytes, num_bytes: int, crc32: int) -> bytes:
    if len(data) != num_bytes:
        raise FetchError(f"the file ends early: {len(data):,} bytes came instead of {num_bytes:,}")
    if zlib.crc32(data) != crc32:
        raise FetchError("the bytes differ from those that were written (checksum)")
    return data


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _is_final(error: Exception) -> bool:
    """Whether a server has said no for good: a status of 400 to 499, but for 408 (too slow) and 429 (too often)."""
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
