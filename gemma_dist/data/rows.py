"""Raw rows from files, one at a time, with the place that each came from: the first step of the walk.

    train.jsonl, .ndjson        {"messages": […]}                           one object a line
    train.json                  [{"messages": […]}, …]                      an array
                                {"data": [{"messages": […]}, …]}            an object around one
    train.jsonl.gz, .jsonl.zst  any of these, packed
    train.parquet               a row is a row
    train/                      state.json, data-00000-of-00001.arrow       `Dataset.save_to_disk`

A JSONL line that cannot be read is handed out as an error in the row's place, so that a caller may set it aside and go
on; a file that cannot be read as a whole stops the reading.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from gemma_dist.data.arrow import row_reader
from gemma_dist.data.strict import as_object, error_context, get, is_list_of, parse_json, short
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


TURN_MARK = "#turn-"  # between the id of a row and the number of messages in one of its samples

# A row as it was read, or why it could not be.
ReadRow: TypeAlias = tuple[Where, RawRow | DataError]


def row_of_sample(sample_id: str) -> str:
    """The id of the row that a sample comes from, by the sample's own."""
    row_id, mark, number = sample_id.rpartition(TURN_MARK)
    return row_id if mark and number.isdecimal() else sample_id


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
        _require_exists(path)
        if path.is_dir():
            read: Iterator[ReadRow] = _read_saved_dataset(path)
        elif path.suffix == ".parquet":
            read = _read_parquet(input_range)
        else:
            read = _read_json(input_range)
        with _whole_file(path):
            yield from read


def _require_exists(path: Path) -> None:
    """DataError where there is no file or folder of this path."""
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path")


@contextmanager
def _whole_file(path: Path) -> Iterator[None]:
    """What libraries raise while they read a file that is broken or cut short, as a DataError with its path."""
    try:
        yield
    except BROKEN_FILE as error:
        raise DataError(f"{path}: cannot be read to its end: {error}; restore the file") from None


def _read_row(where: Where, read: Callable[[Any], RawRow], raw: object) -> ReadRow:
    """The row that `read` makes of a line of JSON, or of a row of Arrow; the DataError in its place."""
    try:
        with error_context(where):
            return where, read(raw)
    except DataError as error:
        return where, error


# ---- parts of an input, for several processes ------------------------------------------------------------------------


def split_input(path: Path, range_bytes: int) -> Iterator[tuple[InputRange, int]]:
    """Ranges of an input of about `range_bytes` each, with their bytes. Compressed files and folders stay whole.

    Raises:
        DataError: the input is missing, or is no parquet file by its end.
    """
    _require_exists(path)
    if path.is_dir():
        yield InputRange(path), sum(file.stat().st_size for file in path.iterdir())
    elif path.suffix == ".parquet":
        with _whole_file(path):
            metadata = pq.read_metadata(path)
        yield from _split_parquet(path, metadata, range_bytes)
    elif path.suffix in PACKED or path.stat().st_size <= range_bytes or _is_one_document(path):
        yield InputRange(path), path.stat().st_size
    else:
        yield from _split_lines(path, range_bytes)


def _split_lines(path: Path, range_bytes: int) -> Iterator[tuple[InputRange, int]]:
    """Ranges of JSONL, of `range_bytes` and the rest of the line in which these end."""
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
    """Ranges of whole row groups, each as many as it takes to have `range_bytes`."""
    start, line, size, num_rows = 0, 1, 0, 0
    if not metadata.num_row_groups:
        yield InputRange(path), 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size, num_rows = size + group.total_byte_size, num_rows + group.num_rows
        if size >= range_bytes or number == metadata.num_row_groups - 1:
            yield InputRange(path, line, start, number + 1), size
            start, line, size, num_rows = number + 1, line + num_rows, 0, 0


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _read_json(input_range: InputRange) -> Iterator[ReadRow]:
    """The rows of a file of JSON: of the whole file where it is one value, of the range where it is one a line."""
    if input_range.start == 0 and _is_one_document(input_range.file):
        yield from _read_document(input_range.file)
    else:
        yield from _read_lines(input_range)


def _is_one_document(path: Path) -> bool:
    """Whether a file of JSON is one value, an array or a pretty-printed object, and not one object a line.

    Its first two lines tell: "[" and "{…},", or "[{…}]" alone, or "{" and '"data": [' of a .json file.
    """
    with _open(path) as file:
        lines = (line.removeprefix(BYTE_ORDER_MARK).strip() for line in file)
        contents = filter(None, lines)
        first, second = next(contents, b""), next(contents, b"")
    if first.startswith(b"["):
        return not (second and first.endswith(b"]"))  # else each line is an array, which is refused as a line
    is_jsonl = second and first.endswith(b"}")
    return ".json" in path.suffixes and first.startswith(b"{") and not is_jsonl


def _rows_key(value: object) -> str | None:
    """The key of the only list of objects in an object, where it is one of ROWS_KEYS: "data" of {"data": [{…}, …]}."""
    found = [key for key, inner in as_object(value).items() if inner and is_list_of(inner, dict)]
    is_known = len(found) == 1 and found[0] in ROWS_KEYS
    return found[0] if is_known else None


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
    """The rows of the lines that begin within the range. Empty lines count, and hold no row."""
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
            if line.strip():
                yield _read_row(Where(path, number), _read_line, line)


def _read_line(line: bytes) -> RawRow:
    """The object that a line of JSONL holds."""
    row = parse_json(_decode(line))
    if not isinstance(row, dict):
        raise DataError(
            f"the line holds {short(row)}, not a JSON object; write one object a line (jq -c '.[]' splits an array)"
        )
    return row


def _decode(text: bytes) -> str:
    """The string that bytes of UTF-8 say. DataError with the column, from 1, where they are none."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 at column {error.start + 1}, near {short(text[error.start : error.end])}; "
            "save the file as UTF-8"
        ) from None


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    """The file open for reading, unpacked on the way."""
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


# ---- Arrow -----------------------------------------------------------------------------------------------------------


def _read_parquet(input_range: InputRange) -> Iterator[ReadRow]:
    """The rows of the range's row groups, or of all."""
    with pq.ParquetFile(input_range.file) as file:
        row_groups = None if input_range.end is None else range(input_range.start, input_range.end)
        batches = file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=row_groups)
        yield from _number(input_range.file, file.schema_arrow, batches, input_range.first_line)


def _read_saved_dataset(folder: Path) -> Iterator[ReadRow]:
    """Rows of a folder by `Dataset.save_to_disk`: `state.json` names Arrow stream files.

    Read with pyarrow and not with `datasets`, which would decode images and encode them again.
    """
    line = 1
    for file in _saved_files(folder):
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
            for where, row in _number(folder, stream.schema, _small_batches(stream), line):
                yield where, row
                line = where.line + 1


def _saved_files(folder: Path) -> list[Path]:
    """The files of a saved dataset in order: {"_data_files": [{"filename": "data-00000-of-00002.arrow"}, …], …}."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(str(child) for child in sorted(folder.iterdir()) if child.is_dir())
        raise DataError(f"{folder}: holds several splits; name those that you mean: {splits}")
    if not (folder / "state.json").is_file():
        raise DataError(
            f"{folder}: neither finished shards (no manifest.arrow in it) nor a folder that datasets saved (no "
            "state.json in it); name the files themselves"
        )
    try:
        state = json.loads((folder / "state.json").read_text())
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}/state.json: not as datasets writes it ({error!r}); save the dataset anew") from None
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: holds an index over its rows; save it anew with a current datasets")
    return files


def _small_batches(stream: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of at most ROWS_AT_ONCE."""
    for batch in stream:
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            yield batch.slice(start, ROWS_AT_ONCE)


def _number(file: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], line: int) -> Iterator[ReadRow]:
    """The rows of Arrow batches, the first of which is row `line` of the input."""
    read = row_reader(schema)
    for batch in batches:
        for number, raw in enumerate(batch.to_pylist(), start=line):
            yield _read_row(Where(file, number), read, raw)
        line += batch.num_rows
