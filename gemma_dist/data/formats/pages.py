"""How large the pages of a parquet file are once they are unpacked, by their own headers.

A header is a struct in Thrift's compact protocol (parquet-format: Encodings.md, parquet.thrift); its first fields are
the page's type and its sizes unpacked and packed. A footer says sizes, too, but no reader is held to them.
"""

from pathlib import Path
from typing import IO

import pyarrow.parquet as pq

UNPACKED, PACKED = 2, 3  # fields of a page's header
STOP, TRUE, FALSE, BYTE, INTEGERS, DOUBLE, BINARY, STRUCT = 0, 1, 2, 3, (4, 5, 6), 7, 8, 12
MAX_DEPTH = 8  # of structs in a header; parquet has 3


def unpacked_sizes(path: Path, schema: pq.ParquetSchema, group: pq.RowGroupMetaData) -> tuple[int, int]:
    """Bytes of the largest page of a row group, and those that one row may have: a value lies in one page, and a list
    may have all values of its column.

    Raises:
        OSError: a header is damaged.
    """
    largest_page = row_bytes = 0
    with path.open("rb") as file:
        for number in range(group.num_columns):
            column = group.column(number)
            start = min(offset for offset in (column.dictionary_page_offset, column.data_page_offset) if offset)
            file.seek(start)
            pages = [0]
            while file.tell() < start + column.total_compressed_size:
                unpacked, packed = _read_header(file, column.path_in_schema)
                pages.append(unpacked)
                file.seek(packed, 1)
            largest_page = max(largest_page, *pages)
            row_bytes += sum(pages) if schema.column(number).max_repetition_level else max(pages)
    return largest_page, row_bytes


def _read_header(file: IO[bytes], column: str) -> tuple[int, int]:
    """The sizes of the page whose header begins here. The file is behind the header then."""
    try:
        fields = _read_struct(file, 0)
        unpacked, packed = fields[UNPACKED], fields[PACKED]
    except (IndexError, KeyError):
        unpacked = packed = -1
    if unpacked < 0 or packed < 0:
        raise OSError(f"the header of a page of column {column} is damaged")
    return unpacked, packed


def _read_struct(file: IO[bytes], depth: int) -> dict[int, int]:
    """The integers of a struct, by the number of their field; all else is passed over."""
    if depth > MAX_DEPTH:
        raise IndexError
    found: dict[int, int] = {}
    field = 0
    while (head := file.read(1)[0]) != STOP:
        field = field + (head >> 4) if head >> 4 else _zigzag(_varint(file))
        kind = head & 15
        if kind in INTEGERS:
            found[field] = _zigzag(_varint(file))
        else:
            _skip(file, kind, depth)
    return found


def _skip(file: IO[bytes], kind: int, depth: int) -> None:
    """Pass over a value; booleans of a struct have none."""
    if kind == BYTE:
        file.seek(1, 1)
    elif kind in INTEGERS:
        _varint(file)
    elif kind == DOUBLE:
        file.seek(8, 1)
    elif kind == BINARY:
        file.seek(_varint(file), 1)
    elif kind == STRUCT:
        _read_struct(file, depth + 1)
    elif kind not in (TRUE, FALSE):  # nothing else stands in a page's header
        raise IndexError


def _varint(file: IO[bytes]) -> int:
    value = shift = 0
    while (byte := file.read(1)[0]) & 0x80:
        value |= (byte & 0x7F) << shift
        shift += 7
        if shift > 63:
            raise IndexError
    return value | byte << shift


def _zigzag(number: int) -> int:
    """A signed integer from Thrift's unsigned one: 0, 1, 2, 3 -> 0, -1, 1, -2."""
    return number >> 1 ^ -(number & 1)
