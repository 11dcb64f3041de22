"""Raw rows from files, one at a time, with the place that each came from: the first step of the walk.

    train.jsonl, .json, .jsonl.gz, .jsonl.zst   JSON (formats/jsonl.py)
    train.parquet                               a row is a row
    train.tar                                   WebDataset (formats/tars.py)
    train/                                      `Dataset.save_to_disk` (formats/saved.py), or MDS (formats/mds.py)

A row that cannot be read is handed out as an error in its place, so that a caller may set it aside and go on; a file
that cannot be read as a whole stops the reading.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from gemma_dist.data.formats import jsonl, mds, parquet, saved, tars
from gemma_dist.data.places import ANY_SIZE, InputRange, ReadRow, SizedRange, whole_file
from gemma_dist.errors import DataError

TURN_MARK = "#turn-"  # between the id of a row and the number of messages in one of its samples


def row_of_sample(sample_id: str) -> str:
    """The id of the row that a sample comes from, by the sample's own."""
    row_id, mark, number = sample_id.rpartition(TURN_MARK)
    return row_id if mark and number.isdecimal() else sample_id


def read_rows(paths: Iterable[str | Path], max_row_bytes: int = ANY_SIZE) -> Iterator[ReadRow]:
    """The rows of files and folders of all formats, in the order given.

    A row that cannot be read, or has more than `max_row_bytes`, comes as the DataError that says why, with file and
    line. DataError is raised, not yielded, where a whole file is missing, cut short or of another kind. Memory does
    not grow with the files, but for a JSON object around all rows, which is read as a whole.
    """
    return read_ranges((InputRange(Path(path)) for path in paths), max_row_bytes)


def read_ranges(ranges: Iterable[InputRange], max_row_bytes: int = ANY_SIZE) -> Iterator[ReadRow]:
    """The rows of ranges of inputs, as `read_rows` gives them."""
    for input_range in ranges:
        reader = _format(input_range.file)
        with whole_file(input_range.file):
            yield from reader.read(input_range, max_row_bytes)


def split_input(path: Path, range_bytes: int) -> Iterator[SizedRange]:
    """Ranges of an input of about `range_bytes` each, with their bytes. A packed file is unpacked once for it.

    Raises:
        DataError: the input is missing, damaged, or of no known kind.
    """
    splitter = _format(path)
    with whole_file(path):
        yield from splitter.split(path, range_bytes)


def _format(path: Path) -> ModuleType:
    """The module that reads an input. DataError where there is no file or folder of this path."""
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path")
    if path.is_dir():
        return mds if (path / mds.INDEX).is_file() else saved
    return {".parquet": parquet, ".tar": tars}.get(path.suffix, jsonl)
