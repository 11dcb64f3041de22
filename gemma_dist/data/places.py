"""Where raw rows come from: the place of each, the ranges of an input, and how what cannot be read is said."""

import re
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import pyarrow as pa

from gemma_dist.data.strict import error_context, reason, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError, setting

# A folder or file of a commit in the hub's cache: its repository's folder, organization, name, commit, and path.
SNAPSHOT = re.compile(r"(.*/datasets--([^/]+)--([^/]+))/snapshots/([0-9a-f]{40})(/.+)?")
ANY_SIZE = sys.maxsize  # of a row, where nothing limits it
BROKEN_FILE = (OSError, EOFError, zlib.error, pa.ArrowException, tarfile.TarError)


@dataclass(frozen=True)
class Where:
    """Place of a raw row: the file, or folder, as given, and the line in it (not JSONL: the row), from 1."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class InputRange:
    """A range [start, end) of an input, or all of it (no end). Counted are the bytes of JSONL, unpacked, and of a tar;
    the row groups of parquet, the record batches of a saved dataset, the shards of MDS."""

    file: Path
    first_line: int = 1  # its first line (not JSONL: row), counted from 1 over the whole input
    start: int = 0
    end: int | None = None
    entry: tuple[int, int] = (0, 0)  # of a packed file: where unpacking can begin, in bytes of the file and unpacked


# A row as it was read, or why it could not be.
ReadRow: TypeAlias = tuple[Where, RawRow | DataError]
# A range of an input, and how many bytes it has once unpacked, about.
SizedRange: TypeAlias = tuple[InputRange, int]


def read_row(where: Where, read: Callable[[Any], RawRow], raw: object) -> ReadRow:
    """The row that `read` makes of a line of JSON, or of a row of a table; the DataError in its place."""
    try:
        with error_context(where):
            return where, read(raw)
    except DataError as error:
        return where, error


def too_large(where: Where, num_bytes: int, max_row_bytes: int) -> ReadRow:
    """What stands in the place of a row that is not read for its size."""
    return where, DataError(
        f"{where}: the row has {num_bytes:,} bytes, the limit is {max_row_bytes:,}; make it smaller or use "
        f"{setting('max_row_bytes', num_bytes)}"
    )


@contextmanager
def whole_file(path: Path) -> Iterator[None]:
    """What libraries raise while they read a file that is broken or cut short, as a DataError with its path."""
    try:
        yield
    except BROKEN_FILE as error:
        raise DataError(f"{path}: cannot be read to its end: {reason(error).rstrip('.')}; restore the file") from error


def inside(folder: Path, index: str, name: object) -> Path:
    """The file of a folder that its own index names. DataError where the name leads elsewhere."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or ".." in parts or parts[0] == "/" or "\0" in str(name):
        raise DataError(
            f"{folder / index}: names the file {short(name)}, which is none inside of the folder; only files of the "
            "folder are read"
        )
    return folder.joinpath(*parts)


def blobs_of(folder: Path) -> Path | None:
    """Where the files of a folder are, if it is one of a commit in the hub's cache, which holds links alone."""
    found = SNAPSHOT.fullmatch(folder.as_posix())
    return Path(found[1]) / "blobs" if found else None


def cut(path: Path, units: Iterable[tuple[int, int]], range_bytes: int) -> Iterator[SizedRange]:
    """Ranges of whole units, each as many as it takes to have `range_bytes`.

    Args:
        units: the rows and bytes of each row group, record batch or shard, in order.
    """
    start, end, line, size, num_rows = 0, 0, 1, 0, 0
    for unit_rows, unit_bytes in units:
        end, size, num_rows = end + 1, size + unit_bytes, num_rows + unit_rows
        if size >= range_bytes:
            yield InputRange(path, line, start, end), size
            start, line, size, num_rows = end, line + num_rows, 0, 0
    if end > start:
        yield InputRange(path, line, start, end), size
    elif not end:
        yield InputRange(path), 0
