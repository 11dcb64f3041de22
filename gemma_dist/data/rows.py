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
from typing import IO, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from gemma_dist.data.arrow import row_reader
from gemma_dist.data.strict import error_context, get, parse_json, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

PACKED = (".gz", ".zst")  # can be read from the front alone
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ROWS_KEYS = ("data", "rows", "train", "examples", "instances", "samples", "trajectories")  # of an object around rows
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
class InputRange:
    """A range of an input: bytes [start, end) of JSONL, row groups [start, end) of parquet, or all of it (no end)."""

    file: Path
    first_line: int = 1  # its first line (not JSONL: row), counted from 1 over the whole input
    start: int = 0
    end: int | None = None


# A row as it was read, or why it could not be.
ReadRow: TypeAlias = tuple[Where, RawRow | DataError]


def read_rows(paths: Iterable[str | Path]) -> Iterator[ReadRow]:
    """The rows of JSONL or a JSON array (also .gz, .zst), of parquet files and of folders that `datasets` saved, in the
    order given.

    A row that cannot be read comes as the DataError that says why, with file and line. DataError is raised, not
    yielded, where a whole file is missing, cut short or of another kind. Memory does not grow with the files, but for
    a JSON array, which is read as a whole.
    """
    return read_ranges(InputRange(Path(path)) for path in paths)


def read_ranges(ranges: Iterable[InputRange]) -> Iterator[ReadRow]:
    """The rows of ranges of inputs, as `read_rows` gives them."""
    for input_range in ranges:
        path = input_range.file
        if not path.exists():
            raise DataError(f"{path}: no such file; check the path")
        if path.is_dir():
            read: Iterator[ReadRow] = _read_saved_dataset(path)
        elif path.suffix == ".parquet":
            read = _read_parquet(input_range)
        else:
            read = _read_json(input_range)
        try:
            yield from read
        except BROKEN_FILE as error:
            raise DataError(f"{path}: cannot be read to its end: {error}; restore the file") from None


def split_input(path: Path, range_bytes: int) -> Iterator[tuple[InputRange, int]]:
    """Ranges of an input of about `range_bytes` each, with their bytes. Compressed files and folders stay whole.

    Raises:
        DataError: the input is missing, or is no parquet file by its end.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path")
    if path.is_dir():
        yield InputRange(path), sum(file.stat().st_size for file in path.iterdir())
    elif path.suffix == ".parquet":
        try:
            metadata = pq.read_metadata(path)
        except BROKEN_FILE as error:
            raise DataError(f"{path}: cannot be read to its end: {error}; restore the file") from None
        yield from _split_parquet(path, metadata, range_bytes)
    elif path.suffix in PACKED or path.stat().st_size <= range_bytes or _is_one_document(path):
        yield InputRange(path), path.stat().st_size
    else:
        yield from _split_lines(path, range_bytes)


def _split_lines(path: Path, range_bytes: int) -> Iterator[tuple[InputRange, int]]:
    with path.open("rb") as file:
        start, line, size = 0, 1, path.stat().st_size
        while start < size:
            num_lines = sum(chunk.count(b"\n") for chunk in _chunks(file, range_bytes))
            num_lines += file.readline().count(b"\n")
            yield InputRange(path, line, start, file.tell()), file.tell() - start
            start, line = file.tell(), line + num_lines


def _chunks(file: IO[bytes], num_bytes: int) -> Iterator[bytes]:
    """The next `num_bytes` of a file, or what is left, a megabyte at a time."""
    while num_bytes > 0 and (chunk := file.read(min(num_bytes, 1 << 20))):
        num_bytes -= len(chunk)
        yield chunk


def _split_parquet(path: Path, metadata: pq.FileMetaData, range_bytes: int) -> Iterator[tuple[InputRange, int]]:
    start, line, size, num_rows = 0, 1, 0, 0
    if not metadata.num_row_groups:
        yield InputRange(path), 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size, num_rows = size + group.total_byte_size, num_rows + group.num_rows
        if size >= range_bytes or number == metadata.num_row_groups - 1:
            yield InputRange(path, line, start, number + 1), size
            start, line, size, num_rows = number + 1, line + num_rows, 0, 0


def _read_json(input_range: InputRange) -> Iterator[ReadRow]:
    if input_range.start == 0 and _is_one_document(input_range.file):
        yield from _read_document(input_range.file)
    else:
        yield from _read_lines(input_range)


def _is_one_document(path: Path) -> bool:
    """Whether a file of JSON is one value, an array or a pretty-printed object, and not one object a line."""
    with _open(path) as file:
        lines = (line.removeprefix(BYTE_ORDER_MARK).strip() for line in file)
        contents = filter(None, lines)
        first, second = next(contents, b""), next(contents, b"")
    if first.startswith(b"["):
        return not (second and first.endswith(b"]"))  # else each line is an array, which is refused as a line
    is_jsonl = second and first.endswith(b"}")
    return ".json" in path.suffixes and first.startswith(b"{") and not is_jsonl


def _rows_key(value: object) -> str | None:
    """The key of the only list of objects in an object, where it is one of ROWS_KEYS."""
    if not isinstance(value, dict):
        return None
    found = [key for key, inner in value.items() if _is_list_of_objects(inner)]
    return found[0] if len(found) == 1 and found[0] in ROWS_KEYS else None


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _read_document(path: Path) -> Iterator[ReadRow]:
    """The rows of a file that is one array, one object with the array under a key of ROWS_KEYS, or one row."""
    with _open(path) as file, error_context(path):
        text = _decode(file.read().removeprefix(BYTE_ORDER_MARK))
        try:
            value = parse_json(text)
        except DataError as error:
            raise DataError(f"{error}, or write one object a line: jq -c . {path}") from None
    key = _rows_key(value)
    if key is not None:
        value = get(value, key)
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        where = Where(path, number)
        if isinstance(row, dict):
            yield where, row
        else:
            yield where, DataError(f"{where}: the array holds {short(row)}, not a JSON object; write one object a row")


def _read_lines(input_range: InputRange) -> Iterator[ReadRow]:
    path = input_range.file
    with _open(path) as file:
        if input_range.start:
            file.seek(input_range.start)
        position = input_range.start
        for number, line in enumerate(file, start=input_range.first_line):
            if input_range.end is not None and position >= input_range.end:
                break
            position += len(line)
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.strip():
                continue
            where = Where(path, number)
            try:
                with error_context(where):
                    row = _read_line(line)
                yield where, row
            except DataError as error:
                yield where, error


def _read_line(line: bytes) -> RawRow:
    row = parse_json(_decode(line))
    if not isinstance(row, dict):
        raise DataError(
            f"the line holds {short(row)}, not a JSON object; write one object a line (jq -c '.[]' splits an array)"
        )
    return row


def _decode(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 at column {error.start + 1}, near {short(text[error.start : error.end])}; "
            "save the file as UTF-8"
        ) from None


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


def _read_parquet(input_range: InputRange) -> Iterator[ReadRow]:
    with pq.ParquetFile(input_range.file) as file:
        row_groups = None if input_range.end is None else range(input_range.start, input_range.end)
        batches = file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=row_groups)
        yield from _number(input_range.file, file.schema_arrow, batches, input_range.first_line)


def _read_saved_dataset(folder: Path) -> Iterator[ReadRow]:
    """Rows of a folder by `Dataset.save_to_disk`: `state.json` names Arrow stream files.

    Read with pyarrow and not with `datasets`, which would decode images and encode them again.
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
    line = 1
    for file in files:
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
            for where, row in _number(folder, stream.schema, _small_batches(stream), line):
                yield where, row
                line = where.line + 1


def _small_batches(stream: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in stream:
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            yield batch.slice(start, ROWS_AT_ONCE)


def _number(file: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], line: int) -> Iterator[ReadRow]:
    """The rows of Arrow batches, the first of which is row `line` of the input."""
    read_row = row_reader(schema)
    for batch in batches:
        for raw in batch.to_pylist():
            where = Where(file, line)
            line += 1
            try:
                with error_context(where):
                    row = read_row(raw)
                yield where, row
            except DataError as error:
                yield where, error
