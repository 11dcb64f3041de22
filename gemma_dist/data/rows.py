"""Raw rows from files, one at a time, with the place that each came from: the first step of the walk.

A JSONL line that cannot be read is handed out as an error in the row's place, so that a caller may set it aside and go
on; a file that cannot be read as a whole stops the reading.
"""

import gzip
import importlib.util
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from gemma_dist.data.strict import at, parse_json, short
from gemma_dist.errors import DataError

zstandard: Any = importlib.import_module("zstandard") if importlib.util.find_spec("zstandard") else None
BROKEN_FILE = (OSError, EOFError, zlib.error, pa.ArrowException, *([zstandard.ZstdError] if zstandard else []))
ROWS_AT_ONCE = 16  # rows of parquet that are held at a time: with screenshots a row is megabytes


@dataclass(frozen=True)
class Where:
    """Place of a raw row: the file, or `datasets` folder, as given, and the line in it (not JSONL: the row), from 1."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def read_rows(paths: Iterable[str | Path]) -> Iterator[tuple[Where, dict[str, Any] | DataError]]:
    """The rows of JSONL (also .gz, .zst), parquet files and folders that `datasets` saved, in the order given.

    A row that cannot be read comes as the DataError that says why, with file and line. DataError is raised, not
    yielded, where a whole file is missing, cut short or of another kind. Memory does not grow with the files.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: no such file; check the path")
        if path.is_dir():
            read: Iterator[Any] = _read_saved_dataset(path)
        elif path.suffix == ".parquet":
            read = _read_parquet(path)
        else:
            read = _read_lines(path)
        try:
            yield from read
        except BROKEN_FILE as error:
            raise DataError(f"{path}: cannot be read to its end: {error}; restore the file") from None


def _read_lines(path: Path) -> Iterator[tuple[Where, dict[str, Any] | DataError]]:
    with _open(path) as file:
        begun = False
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            if not begun and line.strip().startswith(b"[") and not line.strip().endswith(b"]"):
                raise DataError(f"{path}: a JSON array, not JSONL; write one object a line: jq -c '.[]' {path}")
            begun = True
            where = Where(path, number)
            try:
                with at(where):
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
        if zstandard is None:
            raise DataError(
                f"{path}: reading .zst needs the package zstandard; pip install zstandard, or unpack the file"
            )
        return zstandard.open(path)
    if path.suffix not in (".jsonl", ".json", ".ndjson"):
        raise DataError(
            f"{path}: unknown kind of file; rows are read from .jsonl, .jsonl.gz, .jsonl.zst, .parquet and "
            "folders that datasets saved"
        )
    return path.open("rb")


def _read_parquet(path: Path) -> Iterator[tuple[Where, dict[str, Any]]]:
    with pq.ParquetFile(path) as file:
        yield from _number(path, file.iter_batches(batch_size=ROWS_AT_ONCE))


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


def _number(file: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[Where, dict[str, Any]]]:
    line = 0
    for batch in batches:
        for row in batch.to_pylist():
            line += 1
            yield Where(file, line), row
