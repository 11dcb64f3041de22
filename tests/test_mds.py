"""Folders of MDS, as the MDSWriter of MosaicML's `streaming` 0.13 writes them (built here byte by byte)."""

import gzip
import io
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from gemma_dist.config import RowConfig
from gemma_dist.data.images import decode_image
from gemma_dist.data.places import InputRange
from gemma_dist.data.rows import read_ranges, read_rows, split_input
from gemma_dist.data.trajectory import parse_row
from gemma_dist.errors import DataError
from tests.support.corpus import picture

MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": "Look."}, {"type": "image"}, {"type": "image"}]},
    {"role": "assistant", "content": "é"},
]
FIXED = {"int": 8, "uint8": 1, "float32": 4}


def items(*data: bytes) -> bytes:
    return struct.pack(f"<{1 + len(data)}I", len(data), *map(len, data)) + b"".join(data)


def raw_image(mode: str, size: tuple[int, int], pixels: bytes) -> bytes:
    return struct.pack("<III", *size, len(mode)) + mode.encode() + pixels


def sample(number: int) -> dict[str, tuple[str, bytes]]:
    """Encoding and bytes of each column."""
    return {
        "float": ("float32", struct.pack("<f", 0.5)),
        "id": ("str", f"r{number}".encode()),
        "images": ("list[png]", bytes(4) + items(picture(number), picture(number + 1))),
        "messages": ("json", json.dumps(MESSAGES).encode()),
        "number": ("int", struct.pack("<q", -number)),
        "small": ("uint8", bytes([number])),
        "tools": ("str", b"[]"),
    }


def shard_of(samples: list[dict[str, tuple[str, bytes]]]) -> bytes:
    encoded = []
    for one in samples:
        sizes = [len(data) for encoding, data in one.values() if encoding not in FIXED]
        encoded.append(struct.pack(f"<{len(sizes)}I", *sizes) + b"".join(data for _, data in one.values()))
    header = b'{"what the index says": "as well"}'
    offsets = [4 * (len(samples) + 2) + len(header)]
    for data in encoded:
        offsets.append(offsets[-1] + len(data))
    return struct.pack(f"<{1 + len(offsets)}I", len(samples), *offsets) + header + b"".join(encoded)


def write(
    folder: Path, shards: list[list[dict[str, tuple[str, bytes]]]], compression: str | None = None, **changes: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    entries = []
    for number, samples in enumerate(shards):
        data, name = shard_of(samples), f"shard.{number:05d}.mds"
        entry: dict[str, Any] = {
            "column_encodings": [encoding for encoding, _ in samples[0].values()],
            "column_names": list(samples[0]),
            "column_sizes": [FIXED.get(encoding) for encoding, _ in samples[0].values()],
            "compression": compression,
            "format": "mds",
            "hashes": [],
            "raw_data": {"basename": name, "bytes": len(data), "hashes": {}},
            "samples": len(samples),
            "size_limit": 1 << 26,
            "version": 2,
            "zip_data": None,
        }
        if compression:
            kind = compression.partition(":")[0]
            data = gzip.compress(data) if kind == "gz" else pa.Codec("zstd").compress(data).to_pybytes()
            name = f"{name}.{kind}"
            entry["zip_data"] = {"basename": name, "bytes": len(data), "hashes": {}}
        (folder / name).write_bytes(data)
        entries.append(entry | changes)
    (folder / "index.json").write_text(json.dumps({"shards": entries, "version": 2}))
    return folder


@pytest.mark.parametrize("compression", [None, "zstd:7", "gz"])
def test_columns_are_fields_and_ranges_are_shards(tmp_path: Path, compression: str | None) -> None:
    folder = write(tmp_path / "mds", [[sample(0), sample(1)], [sample(2)], [sample(3), sample(4)]], compression)
    rows = list(read_rows([folder]))
    assert [str(where) for where, _ in rows] == [f"{folder}:{number}" for number in range(1, 6)]
    for number, (where, row) in enumerate(rows):
        assert not isinstance(row, DataError)
        assert (row["number"], row["small"], row["float"], row["tools"]) == (-number, number, 0.5, "[]")
        trajectory = parse_row(row, where, RowConfig())
        assert trajectory.id == f"r{number}"
        assert trajectory.images == [picture(number), picture(number + 1)]
    ranges = [one for one, _ in split_input(folder, 1)]
    assert ranges == [InputRange(folder, 1, 0, 1), InputRange(folder, 3, 1, 2), InputRange(folder, 4, 2, 3)]
    assert list(read_ranges(ranges)) == rows


def test_raw_pixels_become_files(tmp_path: Path) -> None:
    pixels = bytes(range(240))
    raw = {"RGB": ((10, 8), pixels), "L": ((16, 15), pixels), "RGBA": ((6, 10), pixels), "1": ((32, 60), pixels)}
    one = sample(0) | {
        "images": ("list[pil]", bytes(4) + items(*(raw_image(mode, *image) for mode, image in raw.items())))
    }
    ((_, row),) = read_rows([write(tmp_path / "mds", [[one]])])
    assert not isinstance(row, DataError)
    images: Any = row["images"]
    for (mode, (size, data)), file in zip(raw.items(), images, strict=True):
        assert Image.open(io.BytesIO(file)).tobytes() == data
        assert decode_image(file).size == size, mode


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    harm = b"cposix\nsystem\n(S'touch " + str(tmp_path / "harm").encode() + b"'\ntR."
    folder = write(tmp_path / "mds", [[sample(0) | {"extra": ("pkl", harm)}]])
    with pytest.raises(DataError, match=r"index.json: the column 'extra' is pickled, and reading a pickle runs"):
        list(read_rows([folder]))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"raw_data": {"basename": "../a.mds", "bytes": 1}},
            "names the file '../a.mds', which is none inside of the folder",
        ),
        ({"raw_data": {"basename": "/etc/passwd", "bytes": 1}}, "names the file '/etc/passwd', which is none inside"),
        ({"raw_data": {"basename": "shard.00000.mds", "bytes": 1}}, "and index.json says 1; restore the file"),
        ({"samples": 3}, "holds 1 samples, and index.json says 3"),
        ({"format": "csv"}, "a shard of the format 'csv'"),
        ({"column_sizes": [1]}, "not as the MDSWriter of streaming writes it"),
        ({"column_encodings": ["ndarray"] * 7}, "is encoded as 'ndarray'; str, json, bytes"),
        (
            {
                "raw_data": {"basename": "b.mds", "bytes": 1},
                "zip_data": {"basename": "b.mds.br"},
                "compression": "br:3",
            },
            "packed by 'br:3'",
        ),
    ],
)
def test_an_index_that_is_not_right_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = write(tmp_path / "mds", [[sample(0)]], **changes)
    with pytest.raises(DataError, match=words):
        list(read_rows([folder]))


def test_what_is_wrong_with_a_sample_is_said_in_its_place(tmp_path: Path) -> None:
    def with_raw(number: int, raw: bytes | None = None) -> dict[str, tuple[str, bytes]]:
        return sample(number) | {"raw": ("list[pil]", bytes(4) + (items() if raw is None else items(raw)))}

    bad = [
        with_raw(1) | {"messages": ("json", b"{")},
        with_raw(2) | {"id": ("str", b"\xff")},
        with_raw(3) | {"images": ("list[png]", bytes(4) + struct.pack("<II", 1, 99) + b"short")},
        with_raw(4, raw_image("RGB", (60_000, 60_000), b"")),
        with_raw(5, raw_image("P", (1, 1), b"x")),
        with_raw(6) | {"tools": ("str", b" " * 9000)},
    ]
    folder = write(tmp_path / "mds", [[with_raw(0), *bad, with_raw(7)]])
    (_, first), *errors, (_, last) = read_rows([folder], 8000)
    assert not isinstance(first, DataError)
    assert not isinstance(last, DataError)
    words = [
        "not JSON",
        "cannot be decoded",
        "its items end at",
        "60,000 x 60,000 pixels",
        "the mode 'P'",
        "the limit is",
    ]
    for line, ((_, error), said) in enumerate(zip(errors, words, strict=True), start=2):
        assert isinstance(error, DataError)
        assert str(error).startswith(f"{folder}:{line}: ")
        assert said in str(error)


def test_a_shard_that_was_cut_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "mds", [[sample(0), sample(1)]], "zstd")
    file = folder / "shard.00000.mds.zstd"
    file.write_bytes(pa.Codec("zstd").compress(shard_of([sample(0), sample(1)])[:-9]).to_pybytes())
    with pytest.raises(DataError, match="cannot be read to its end: a shard ends before its last sample"):
        list(read_rows([folder]))
    file.unlink()
    with pytest.raises(DataError, match=r"cannot be read to its end: .*No such file"):
        list(read_rows([folder]))
