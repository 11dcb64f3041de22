"""Rows of JSON: one object a line, or a file that is one array, or an object around one. Packed or not.

    train.jsonl, .ndjson        {"messages": […]}                           one object a line
    train.json                  [{"messages": […]}, …]                      an array
                                {"data": [{"messages": […]}, …]}            an object around one
    train.jsonl.gz, .jsonl.zst  any of these, packed

Lines and the rows of an array are held one at a time. What is longer than the limit is passed over without being held.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

from gemma_dist.data.formats.packed import CHUNK_BYTES, PACKED, unpack
from gemma_dist.data.places import InputRange, ReadRow, SizedRange, Where, read_row, too_large
from gemma_dist.data.strict import as_object, error_context, get, is_list_of, parse_json, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError, setting

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ROWS_KEYS = ("data", "rows", "train", "examples", "instances", "samples", "trajectories")  # of an object around rows
# Ranges of a packed stream. Each is reached by unpacking all before it, so that all together unpack it 32 times.
MAX_RANGES_OF_STREAM = 64
_OUTSIDE, _INSIDE = re.compile(rb'["\[\]{},]'), re.compile(rb'["\\]')  # what matters outside and inside of a string

# A line or item, None where it is longer than the limit; and its length in bytes.
_Text: TypeAlias = tuple[bytes | None, int]


def read(input_range: InputRange, max_row_bytes: int) -> Iterator[ReadRow]:
    """The rows of a file of JSON: of the whole file where it is one value, of the range where it is one a line."""
    if input_range.start == 0 and _is_one_document(input_range.file):
        yield from _read_document(input_range.file, max_row_bytes)
    else:
        yield from _read_lines(input_range, max_row_bytes)


def split(path: Path, range_bytes: int) -> Iterator[SizedRange]:
    """Ranges of JSONL, of `range_bytes`, unpacked, and the rest of the line in which these end. A document is one."""
    _require_json(path)
    is_packed = path.suffix in PACKED
    if (not is_packed and path.stat().st_size <= range_bytes) or _is_one_document(path):
        yield InputRange(path), path.stat().st_size
        return
    ranges = list(_ranges(path, range_bytes)) or [InputRange(path, end=0)]
    for part in _fewer(ranges) if is_packed else ranges:
        yield part, (part.end or 0) - part.start


def _ranges(path: Path, range_bytes: int) -> Iterator[InputRange]:
    """Ranges of whole lines. Of a packed file, each knows the last member or frame that begins before it."""
    found = InputRange(path, end=0)
    start, line, position = 0, 1, 0
    entry = member = (0, 0)
    num_lines = 0
    for offset, chunk in _chunks(path):
        if offset != member[0]:
            member = (offset, position)
        behind = 0  # the bytes of this chunk that are in ranges already
        while (full := start + range_bytes - position) < len(chunk):
            newline = chunk.find(b"\n", max(full, behind))
            if newline < 0:
                break
            num_lines += chunk.count(b"\n", behind, newline + 1)
            behind = newline + 1
            found = InputRange(path, line, start, position + behind, entry)
            yield found
            start, line, entry, num_lines = position + behind, line + num_lines, member, 0
        num_lines += chunk.count(b"\n", behind)
        position += len(chunk)
    if position > start:
        yield InputRange(path, line, start, position, entry)


def _fewer(ranges: list[InputRange]) -> Iterator[InputRange]:
    """The ranges of a packed file with neighbors joined, where too many are reached from one place."""
    for _, group in groupby(ranges, lambda found: found.entry):
        together = list(group)
        step = -(-len(together) // MAX_RANGES_OF_STREAM)
        for first in range(0, len(together), step):
            yield replace(together[first], end=together[first : first + step][-1].end)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def _require_json(path: Path) -> None:
    """DataError where the name says that a file is of no kind that is read."""
    kind = path.with_suffix("").suffix if path.suffix in PACKED else path.suffix
    if kind == ".tar" or path.suffix == ".tgz":
        raise DataError(f"{path}: a packed tar; unpack it: {'zstd -d' if path.suffix == '.zst' else 'gunzip'} {path}")
    if path.suffix not in (".jsonl", ".json", ".ndjson", *PACKED):
        raise DataError(
            f"{path}: unknown kind of file; rows are read from .jsonl, .jsonl.gz, .jsonl.zst, .json, .parquet, .tar "
            "(WebDataset) and folders of MDS or that datasets saved"
        )


def _chunks(path: Path, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """What a file holds from byte `start` of it on, unpacked, as `unpack` gives it."""
    if path.suffix in PACKED:
        yield from unpack(path, start)
        return
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(CHUNK_BYTES):
            yield 0, chunk


def _bytes_of(input_range: InputRange) -> Iterator[bytes]:
    """What a range holds, and all behind it."""
    _require_json(input_range.file)
    is_packed = input_range.file.suffix in PACKED
    offset, position = input_range.entry if is_packed else (input_range.start, input_range.start)
    for _, chunk in _chunks(input_range.file, offset):
        position += len(chunk)
        if position > input_range.start:
            yield chunk[-(position - input_range.start) :]


class _Collected:
    """A text that comes in pieces, of which no more than the limit is held."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._pieces, self._size = max_bytes, list[bytes](), 0

    def add(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._max_bytes:
            self._pieces.clear()
        else:
            self._pieces.append(piece)

    def take(self) -> _Text:
        """All of it; the next text begins."""
        text = b"".join(self._pieces) if self._size <= self._max_bytes else None
        taken = (text, self._size)
        self._pieces, self._size = [], 0
        return taken


# ---- one object a line -----------------------------------------------------------------------------------------------


def _read_lines(input_range: InputRange, max_row_bytes: int) -> Iterator[ReadRow]:
    """The rows of the lines that begin within the range. Empty lines count, and hold no row."""
    path, position = input_range.file, input_range.start
    lines = _lines(_bytes_of(input_range), max_row_bytes)
    for number, (line, size) in enumerate(lines, start=input_range.first_line):
        if input_range.end is not None and position >= input_range.end:
            break
        position += size
        where = Where(path, number)
        if line is None:
            yield too_large(where, size, max_row_bytes)
            continue
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line.strip():
            yield read_row(where, _read_line, line)


def _lines(chunks: Iterable[bytes], max_bytes: int) -> Iterator[_Text]:
    """Each line, with the newline behind it."""
    collected = _Collected(max_bytes)
    rest = b""
    for chunk in chunks:
        start = 0
        while (end := chunk.find(b"\n", start) + 1) > 0:
            collected.add(chunk[start:end])
            yield collected.take()
            start = end
        rest = chunk[start:]
        collected.add(rest)
    if rest:
        yield collected.take()


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


# ---- one document ----------------------------------------------------------------------------------------------------


def _is_one_document(path: Path) -> bool:
    """Whether a file of JSON is one value, an array or a pretty-printed object, and not one object a line.

    Its first two lines tell: "[" and "{…},", or "[{…}]" alone, or "{" and '"data": [' of a .json file.
    """
    ends = _ends_of_lines(_bytes_of(InputRange(path)))
    (first, last), (has_second, _) = next(ends, (b"", b"")), next(ends, (b"", b""))
    if first == b"[":
        return not (has_second and last == b"]")  # else each line is an array, which is refused as a line
    is_jsonl = has_second and last == b"}"
    return ".json" in path.suffixes and first == b"{" and not is_jsonl


def _ends_of_lines(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The first and the last byte of each line, blanks aside, that is not blank. No line is held."""
    first = last = b""
    is_start = True
    for chunk in chunks:
        if is_start:
            chunk, is_start = chunk.removeprefix(BYTE_ORDER_MARK), False
        for number, piece in enumerate(chunk.split(b"\n")):
            if number and first:
                yield first, last
                first = b""
            if text := piece.strip():
                first, last = first or text[:1], text[-1:]
    if first:
        yield first, last


def _read_document(path: Path, max_row_bytes: int) -> Iterator[ReadRow]:
    """The rows of a file that is one array, one object with the array under a key of ROWS_KEYS, or one row."""
    chunks = _bytes_of(InputRange(path))
    first, _ = next(_ends_of_lines(_bytes_of(InputRange(path))))
    if first == b"[":
        for number, (item, size) in enumerate(_items(path, chunks, max_row_bytes), start=1):
            where = Where(path, number)
            yield too_large(where, size, max_row_bytes) if item is None else read_row(where, _read_item, item)
        return
    collected = _Collected(max_row_bytes)
    for chunk in chunks:
        collected.add(chunk)
    text, size = collected.take()
    if text is None:
        raise DataError(
            f"{path}: one JSON object of {size:,} bytes, which is read as a whole, and the limit is "
            f"{max_row_bytes:,}; write one object a line (jq -c '.data[]' {path}), or use "
            f"{setting('max_row_bytes', size)}"
        )
    for number, row in enumerate(_rows_of_object(path, text), start=1):
        yield Where(path, number), row


def _rows_of_object(path: Path, text: bytes) -> list[RawRow]:
    """The rows under the key of an object, or the object itself."""
    with error_context(path):
        try:
            value = parse_json(_decode(text.removeprefix(BYTE_ORDER_MARK)))
        except DataError as error:
            raise DataError(f"{error}, or write one object a line: jq -c . {path}") from None
    key = _rows_key(value)
    return get(value, key) if key is not None else [as_object(value)]


def _rows_key(value: object) -> str | None:
    """The key of the only list of objects in an object, where it is one of ROWS_KEYS: "data" of {"data": [{…}, …]}."""
    found = [key for key, inner in as_object(value).items() if inner and is_list_of(inner, dict)]
    is_known = len(found) == 1 and found[0] in ROWS_KEYS
    return found[0] if is_known else None


def _items(path: Path, chunks: Iterable[bytes], max_bytes: int) -> Iterator[_Text]:
    """The text of each item of an array, found by its brackets, commas and strings alone.

    Raises:
        DataError: the array does not end, or something stands behind it.
    """
    collected = _Collected(max_bytes)
    depth, num_items, closed_by = 0, 0, b""
    in_string = is_escaped = False
    for chunk in chunks:
        start, position, is_escaped = 0, int(is_escaped), False
        while not closed_by and (found := (_INSIDE if in_string else _OUTSIDE).search(chunk, position)):
            mark, position = found[0], found.end()
            if in_string:
                in_string = mark == b"\\"
                is_escaped = in_string and position == len(chunk)
                position += in_string  # over what is escaped
            elif mark == b'"':
                in_string = True
            elif mark in b"[{":
                depth += 1
                start = position if depth == 1 else start
            else:
                depth -= mark != b","
                closed_by = mark if depth == 0 else b""
                if closed_by or (depth == 1 and mark == b","):
                    collected.add(chunk[start : found.start()])
                    text, size = collected.take()
                    if not closed_by or num_items or text is None or text.strip():  # [] has no item
                        yield text, size
                    num_items, start = num_items + 1, position
        if not closed_by:
            collected.add(chunk[start:])
        elif behind := chunk[start:].strip():
            raise DataError(f"{path}: {short(behind[:40])} stands behind the array; write one object a line")
    if closed_by != b"]":
        raise DataError(
            f"{path}: the array is not closed by a ]; restore the file, or write one object a line: jq -c '.[]' {path}"
        )


def _read_item(text: bytes) -> RawRow:
    """The row that an item of an array holds."""
    row = parse_json(_decode(text))
    if not isinstance(row, dict):
        raise DataError(f"the array holds {short(row)}, not a JSON object; write one object a row")
    return row
