"""Raw rows from files, one at a time, with the place that each came from: the first step of the walk.

A JSONL line that cannot be read is handed out as an error in the row's place, so that a caller may set it aside and go
on; a file that cannot be read as a whole stops the reading.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from gemma_dist.data.strict import error_context, parse_json, short
from gemma_dist.errors import DataError

PACKED = (".gz", ".zst")  # can be read from the front alone
BROKEN_FILE = (OSError, EOFError, zlib.error, pa.ArrowException)
ROWS_AT_ONCE = 16  # rows of parquet that are held at a time: with screenshots a row is megabytes


@dataclass(frozen=True)
class Where:
    """Place of a raw row: the file, or `datasets` folder, as given, and the line in it (not JSONL: the row), from 1."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Part:
    """A part of an input: bytes [start, end) of JSONL, row groups [start, end) of parquet, or all of it (no end)."""

    file: Path
    first_line: int = 1  # its first line (not JSONL: row), counted from 1 over the whole input
    start: int = 0
    end: int | None = None


def read_rows(paths: Iterable[str | Path]) -> Iterator[tuple[Where, dict[str, Any] | DataError]]:
    """The rows of JSONL (also .gz, .zst), parquet files and folders that `datasets` saved, in the order given.

    A row that cannot be read comes as the DataError that says why, with file and line. DataError is raised, not
    yielded, where a whole file is missing, cut short or of another kind. Memory does not grow with the files.
    """
    return read_parts(Part(Path(path)) for path in paths)


def read_parts(parts: Iterable[Part]) -> Iterator[tuple[Where, dict[str, Any] | DataError]]:
    """The rows of parts of inputs, as `read_rows` gives them."""
    for part in parts:
        path = part.file
        if not path.exists():
            raise DataError(f"{path}: no such file; check the path")
        if path.is_dir():
            read: Iterator[Any] = _read_saved_dataset(path)
        elif path.suffix == ".parquet":
            read = _read_parquet(part)
        else:
            read = _read_lines(part)
        try:
            yield from read
        except BROKEN_FILE as error:
            raise DataError(f"{path}: cannot be read to its end: {error}; restore the file") from None


def cut_parts(path: Path, part_bytes: int) -> Iterator[tuple[Part, int]]:
    """Parts of an input of about `part_bytes` each, with their size in bytes. Compressed files and folders stay whole.

    Raises:
        DataError: the input is missing, or is no parquet file by its end.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path")
    if path.is_dir():
        yield Part(path), sum(file.stat().st_size for file in path.iterdir())
    elif path.suffix == ".parquet":
        try:
            metadata = pq.read_metadata(path)
        except BROKEN_FILE as error:
            raise DataError(f"{path}: cannot be read to its end: {error}; restore the file") from None
        yield from _cut_parquet(path, metadata, part_bytes)
    elif path.suffix in PACKED or path.stat().st_size <= part_bytes:
        yield Part(path), path.stat().st_size
    else:
        yield from _cut_lines(path, part_bytes)


def _cut_lines(path: Path, part_bytes: int) -> Iterator[tuple[Part, int]]:
    with path.open("rb") as file:
        start, line, size = 0, 1, path.stat().st_size
        while start < size:
            num_lines = sum(chunk.count(b"\n") for chunk in _chunks(file, part_bytes))
            num_lines += file.readline().count(b"\n")
            yield Part(path, line, start, file.tell()), file.tell() - start
            start, line = file.tell(), line + num_lines


def _chunks(file: IO[bytes], num_bytes: int) -> Iterator[bytes]:
    """The next `num_bytes` of a file, or what is left, a megabyte at a time."""
    while num_bytes > 0 and (chunk := file.read(min(num_bytes, 1 << 20))):
        num_bytes -= len(chunk)
        yield chunk


def _cut_parquet(path: Path, metadata: pq.FileMetaData, part_bytes: int) -> Iterator[tuple[Part, int]]:
    start, line, size, num_rows = 0, 1, 0, 0
    if not metadata.num_row_groups:
        yield Part(path), 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size, num_rows = size + group.total_byte_size, num_rows + group.num_rows
        if size >= part_bytes or number == metadata.num_row_groups - 1:
            yield Part(path, line, start, number + 1), size
            start, line, size, num_rows = number + 1, line + num_rows, 0, 0


def _read_lines(part: Part) -> Iterator[tuple[Where, dict[str, Any] | DataError]]:
    path = part.file
    with _open(path) as file:
        begun = part.start > 0
        if part.start:
            file.seek(part.start)
        at_byte = part.start
        for number, line in enumerate(file, start=part.first_line):
            if part.end is not None and at_byte >= part.end:
                break
            at_byte += len(line)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            if not begun and line.strip().startswith(b"[") and not line.strip().endswith(b"]"):
                raise DataError(f"{path}: a JSON array, not JSONL; write one object a line: jq -c '.[]' {path}")
            begun = True
            where = Where(path, number)
            try:
                with error_context(where):
                    row = _read_line(line)
                yield where, row
            except DataError as error:
                yield where, error


def _read_line(line: bytes) -> dict[str, Any]:
    try:
        row = parse_json(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 at column {error.start + 1}, near {short(line[error.start : error.end])}; "
            "save the file as UTF-8"
        ) from None
    if not isinstance(row, dict):
        raise DataError(
            f"the line holds {short(row)}, not a JSON object; write one object a line (jq -c '.[]' splits an array)"
        )
    return row


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        # pyarrow reads all frames of a file and says when the last one is cut short; zstandard does neither.
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    if path.suffix not in (".jsonl", ".json", ".ndjson"):
        raise DataError(
            f"{path}: unknown kind of file; rows are read from .jsonl, .jsonl.gz, .jsonl.zst, .parquet and "
            "folders that datasets saved"
        )
    return path.open("rb")


def _read_parquet(part: Part) -> Iterator[tuple[Where, dict[str, Any]]]:
    with pq.ParquetFile(part.file) as file:
        row_groups = None if part.end is None else range(part.start, part.end)
        batches = file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=row_groups)
        yield from _number(part.file, batches, part.first_line)


def _read_saved_dataset(folder: Path) -> Iterator[tuple[Where, dict[str, Any]]]:
    """Rows of a folder by `Dataset.save_to_disk`: `state.json` names Arrow stream files.

    Read with pyarrow and not with `datasets`, which would decode pictures and encode them again.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(str(child) for child in sorted(folder.iterdir()) if child.is_dir())
        raise DataError(f"{folder}: holds several splits; name those that you mean: {splits}")
    if not (folder / "state.json").is_file():
        raise DataError(f"{folder}: no folder that datasets saved (no state.json in it); name the files themselves")
    try:
        state = json.loads((folder / "state.json").read_text())
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}/state.json: not as datasets writes it ({error!r}); save the dataset anew") from None
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: holds an index over its rows; save it anew with a current datasets")
    yield from _number(folder, _arrow_batches(files))


def _arrow_batches(files: Iterable[Path]) -> Iterator[pa.RecordBatch]:
    for file in files:
        with pa.memory_map(str(file)) as source:
            for batch in pa.ipc.open_stream(source):
                for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                    yield batch.slice(start, ROWS_AT_ONCE)


def _number(file: Path, batches: Iterable[pa.RecordBatch], line: int = 1) -> Iterator[tuple[Where, dict[str, Any]]]:
    for batch in batches:
        for row in batch.to_pylist():
            yield Where(file, line), row
            line += 1
