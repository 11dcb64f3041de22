"""Rows of folders of MDS, the format of MosaicML's `streaming`: a column of a sample is a field of a row.

    index.json              {"version": 2, "shards": [{"format": "mds", "column_names": […], "column_encodings": […],
                             "raw_data": {"basename": "shard.00000.mds", …}, "zip_data": …, "samples": 100, …}, …]}
    shard.00000.mds         number of samples N (4 bytes), N + 1 offsets (4 bytes each), a header, then the samples
    shard.00000.mds.zstd    the same, packed

A sample holds the sizes of its columns (4 bytes each, but for those whose encoding has one), then their values. All
numbers are little-endian. Source: streaming/base/format/mds of mosaicml/streaming, 0.13.

A `pkl` column, which runs whatever code it holds when it is read, is refused, and so are encodings that no row needs.
"""

import io
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gemma_dist.data.formats.packed import CHUNK_BYTES, unpack
from gemma_dist.data.places import InputRange, ReadRow, SizedRange, Where, cut, inside, read_row, too_large
from gemma_dist.data.strict import error_context, parse_json, reason, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

INDEX = "index.json"
ZIPPED = ("zstd", "gz")  # how a shard may be packed
NUMBER = struct.Struct("<I")
PIL_MODES = ("1", "L", "LA", "RGB", "RGBA", "I;16", "F", "CMYK")  # that say all of their pixels


@dataclass(frozen=True)
class _Shard:
    """What the index says of a shard."""

    file: Path  # the raw one, or the packed one where that alone is there
    is_zipped: bool
    num_samples: int
    num_bytes: int  # unpacked
    columns: list[tuple[str, str, int | None]]  # name, encoding, and bytes where each value has as many


def split(folder: Path, range_bytes: int) -> Iterator[SizedRange]:
    """Ranges of whole shards."""
    return cut(folder, ((shard.num_samples, shard.num_bytes) for shard in _shards(folder)), range_bytes)


def read(input_range: InputRange, max_row_bytes: int) -> Iterator[ReadRow]:
    """The rows of the range's shards."""
    line = input_range.first_line
    for shard in _shards(input_range.file)[input_range.start : input_range.end]:
        yield from _read_shard(input_range.file, shard, line, max_row_bytes)
        line += shard.num_samples


# ---- the index -------------------------------------------------------------------------------------------------------


def _shards(folder: Path) -> list[_Shard]:
    """The shards of a folder in order."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [_parse_shard(folder, entry) for entry in index["shards"]]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{folder / INDEX}: not as the MDSWriter of streaming writes it ({error!r}); write the folder anew"
        ) from None


def _parse_shard(folder: Path, entry: Any) -> _Shard:
    """A shard of the index. DataError where it is of another kind, or has a column that is not read."""
    if entry["format"] != "mds" or entry["version"] != 2:
        raise DataError(
            f"{folder / INDEX}: a shard of the format {short(entry['format'])}, version {short(entry['version'])}; mds "
            "of version 2 is read (rows of JSON, CSV: name the files themselves, or write them as JSONL)"
        )
    columns = list(zip(entry["column_names"], entry["column_encodings"], entry["column_sizes"], strict=True))
    for name, encoding, _ in columns:
        _require_readable(folder, name, encoding)
    raw, packed = entry["raw_data"], entry["zip_data"]
    file, is_zipped = inside(folder, INDEX, raw["basename"]), False
    if packed and not file.is_file():
        file, is_zipped = inside(folder, INDEX, packed["basename"]), True
        if str(entry["compression"]).partition(":")[0] not in ZIPPED:
            raise DataError(
                f"{file}: packed by {short(entry['compression'])}; {' and '.join(ZIPPED)} are read: unpack it beside "
                f"the {INDEX}"
            )
    elif file.is_file() and file.stat().st_size != raw["bytes"]:
        raise DataError(
            f"{file}: {file.stat().st_size:,} bytes, and {INDEX} says {short(raw['bytes'])}; restore the file"
        )
    return _Shard(file, is_zipped, int(entry["samples"]), int(raw["bytes"]), columns)


def _require_readable(folder: Path, name: object, encoding: object) -> None:
    kind = str(encoding).partition(":")[0]
    if kind == "pkl":
        raise DataError(
            f"{folder / INDEX}: the column {short(name)} is pickled, and reading a pickle runs the code in it; write "
            "the column as json, str or bytes"
        )
    if kind not in _DECODERS:
        raise DataError(
            f"{folder / INDEX}: the column {short(name)} is encoded as {short(encoding)}; {', '.join(_DECODERS)} are "
            "read: write it as one of these, or leave it out"
        )


# ---- a shard ---------------------------------------------------------------------------------------------------------


class _Stream:
    """The bytes of a shard in order, some at a time."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._chunk, self._at = chunks, b"", 0

    def read(self, num_bytes: int) -> bytes:
        return b"".join(self._pieces(num_bytes))

    def skip(self, num_bytes: int) -> None:
        for _ in self._pieces(num_bytes):
            pass

    def _pieces(self, num_bytes: int) -> Iterator[bytes]:
        """The next bytes. EOFError where there are not as many."""
        while num_bytes > 0:
            if self._at == len(self._chunk):
                self._chunk, self._at = next(self._chunks, b""), 0
            if not self._chunk:
                raise EOFError("a shard ends before its last sample")
            piece = self._chunk[self._at : self._at + num_bytes]
            self._at += len(piece)
            num_bytes -= len(piece)
            yield piece


def _chunks(shard: _Shard) -> Iterator[bytes]:
    if shard.is_zipped:
        yield from (chunk for _, chunk in unpack(shard.file))
        return
    with shard.file.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _read_shard(folder: Path, shard: _Shard, line: int, max_row_bytes: int) -> Iterator[ReadRow]:
    """The rows of a shard, the first of which is row `line` of the folder; one is held at a time."""
    stream = _Stream(_chunks(shard))
    with error_context(shard.file):
        (num_samples,) = NUMBER.unpack(stream.read(NUMBER.size))
        if num_samples != shard.num_samples:
            raise DataError(f"holds {num_samples:,} samples, and {INDEX} says {shard.num_samples:,}; restore the file")
        if 4 * num_samples > max_row_bytes:
            raise DataError(f"{num_samples:,} samples in one shard: the list of them is too long; write smaller shards")
        offsets = np.frombuffer(stream.read(4 * (num_samples + 1)), "<u4").tolist()
        if any(start > end for start, end in pairwise([4 * (num_samples + 2), *offsets])):
            raise DataError("its offsets do not grow; restore the file")
    stream.skip(offsets[0] - 4 * (num_samples + 2))  # what the index says as well
    for number, (start, end) in enumerate(pairwise(offsets), start=line):
        where = Where(folder, number)
        if end - start > max_row_bytes:
            stream.skip(end - start)
            yield too_large(where, end - start, max_row_bytes)
        else:
            yield read_row(where, lambda data: _decode_sample(shard, data), stream.read(end - start))


def _decode_sample(shard: _Shard, data: bytes) -> RawRow:
    """The row of a sample."""
    at, sizes = 0, []
    try:
        for _, _, size in shard.columns:
            if not size:
                (size,) = NUMBER.unpack_from(data, at)
                at += NUMBER.size
            sizes.append(size)
    except struct.error:
        raise DataError(f"the sample of {len(data)} bytes is cut short; restore {shard.file}") from None
    if at + sum(sizes) != len(data):
        raise DataError(
            f"the sample has {len(data):,} bytes, and its columns {at + sum(sizes):,}; restore {shard.file}"
        )
    row: RawRow = {}
    for (name, encoding, _), size in zip(shard.columns, sizes, strict=True):
        with error_context(f"the column {short(name)} ({encoding})"):
            row[name] = _decode(encoding, data[at : at + size])
        at += size
    return row


# ---- a value ---------------------------------------------------------------------------------------------------------


def _decode(encoding: str, data: bytes) -> object:
    """The value of a column."""
    try:
        return _DECODERS[encoding.partition(":")[0]](data)
    except DataError:
        raise
    except (ValueError, struct.error, IndexError) as error:
        raise DataError(f"cannot be decoded: {reason(error)}; write the sample anew") from None


def _scalar(dtype: str) -> Callable[[bytes], object]:
    return lambda data: np.frombuffer(data, dtype)[0].item()


def _pil(data: bytes) -> bytes:
    """Width, height, length of the mode (4 bytes each), the mode, raw pixels -> the image as a PNG, or TIFF."""
    from PIL import Image  # who reads no such column does without it

    width, height, mode_size = struct.unpack_from("<III", data)
    mode = data[12 : 12 + mode_size].decode()
    if mode not in PIL_MODES:
        raise DataError(f"an image of the mode {short(mode)}, whose colors it does not say; write it as png or jpeg")
    if width * height > 8 * len(data):  # of one bit each; room for all is made before they are looked for
        raise DataError(f"{width:,} x {height:,} pixels in {len(data):,} bytes; write the sample anew")
    image, file = Image.frombytes(mode, (width, height), data[12 + mode_size :]), io.BytesIO()
    image.save(file, "TIFF" if mode in ("F", "CMYK") else "PNG")
    return file.getvalue()


def _several(data: bytes) -> list[bytes]:
    """How many, the size of each (4 bytes each), one behind the other."""
    (num_items,) = NUMBER.unpack_from(data)
    ends = 4 * (num_items + 1) + np.cumsum([0, *struct.unpack_from(f"<{num_items}I", data, NUMBER.size)])
    if ends[-1] != len(data):
        raise DataError(f"{len(data):,} bytes, and its items end at {ends[-1]:,}; write the sample anew")
    return [data[start:end] for start, end in pairwise(ends.tolist())]


def _list(decode: Callable[[bytes], object]) -> Callable[[bytes], object]:
    """The reader of a list: four bytes that mean nothing yet, then as `_several`."""
    return lambda data: [decode(item) for item in _several(data[4:])]


_DECODERS: dict[str, Callable[[bytes], object]] = {
    "str": lambda data: data.decode(),
    "json": lambda data: parse_json(data.decode()),
    "bytes": bytes,
    "png": bytes,
    "jpeg": bytes,
    "pil": _pil,
    "jpeg_array": _several,
    "jpegarray": _several,
    "list[png]": _list(bytes),
    "list[jpeg]": _list(bytes),
    "list[pil]": _list(_pil),
    "int": _scalar("<i8"),
    **{f"{kind}{bits}": _scalar(f"<{kind[0]}{bits // 8}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": _scalar(f"<f{bits // 8}") for bits in (16, 32, 64)},
    "str_int": lambda data: int(data.decode()),
    "str_float": lambda data: float(data.decode()),
}
