"""Rows of parquet files.

A few kilobytes may unpack to any size: a page of zeros, or one long string that all rows point to. So rows are read one
at a time where they may be large, and a page of more than a row may have is not unpacked at all.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gemma_dist.data.arrow import row_reader
from gemma_dist.data.formats.pages import unpacked_sizes
from gemma_dist.data.places import InputRange, ReadRow, SizedRange, Where, cut, read_row, too_large
from gemma_dist.errors import DataError, setting

ROWS_AT_ONCE = 16  # at most: with screenshots a row is megabytes
BYTES_AT_ONCE = 64 << 20  # at most, unless a single row has more
BUFFER_BYTES = 1 << 20  # of a column: it is not read as a whole


def split(path: Path, range_bytes: int) -> Iterator[SizedRange]:
    """Ranges of whole row groups."""
    metadata = pq.read_metadata(path)
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    return cut(path, ((group.num_rows, group.total_byte_size) for group in groups), range_bytes)


def read(input_range: InputRange, max_row_bytes: int) -> Iterator[ReadRow]:
    """The rows of the range's row groups, or of all."""
    path, line = input_range.file, input_range.first_line
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
        end = file.num_row_groups if input_range.end is None else input_range.end
        for number in range(input_range.start, end):
            group = file.metadata.row_group(number)
            largest_page, row_bytes = unpacked_sizes(path, file.schema, group)
            if largest_page > max(max_row_bytes, BYTES_AT_ONCE):
                for row in range(line, line + group.num_rows):
                    yield _in_large_page(Where(path, row), largest_page, max_row_bytes)
            else:
                at_once = max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // max(1, row_bytes)))
                batches = file.iter_batches(batch_size=at_once, row_groups=[number])
                yield from number_rows(path, file.schema_arrow, batches, line, max_row_bytes)
            line += group.num_rows


def _in_large_page(where: Where, page_bytes: int, max_row_bytes: int) -> ReadRow:
    """What stands in the place of a row whose row group is not read."""
    return where, DataError(
        f"{where}: its row group has a page of {page_bytes:,} bytes, which would be unpacked at once, and the limit of "
        f"a row is {max_row_bytes:,}; write smaller pages or use {setting('max_row_bytes', page_bytes)}"
    )


def number_rows(
    file: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], line: int, max_row_bytes: int
) -> Iterator[ReadRow]:
    """The rows of Arrow batches, the first of which is row `line` of the input."""
    read_values = row_reader(schema)
    for batch in batches:
        for part in _small(batch, min(max_row_bytes, BYTES_AT_ONCE)):
            num_bytes = part.nbytes
            if num_bytes > max_row_bytes:  # a single row
                yield too_large(Where(file, line), num_bytes, max_row_bytes)
            else:
                for number, raw in enumerate(part.to_pylist(), start=line):
                    yield read_row(Where(file, number), read_values, raw)
            line += part.num_rows


def _small(batch: pa.RecordBatch, max_bytes: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of at most ROWS_AT_ONCE and `max_bytes`, or of one row that has more."""
    for start in range(0, batch.num_rows, ROWS_AT_ONCE):
        part = batch.slice(start, ROWS_AT_ONCE)
        if part.nbytes <= max_bytes:
            yield part
        else:
            yield from (part.slice(row, 1) for row in range(part.num_rows))
