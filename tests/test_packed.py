"""Packed files in ranges: each range holds the lines that it would hold unpacked, wherever unpacking can begin."""

import gzip
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest

from gemma_dist.data.formats import jsonl, packed
from gemma_dist.data.rows import read_ranges, read_rows, split_input
from gemma_dist.errors import DataError

LINES = b"".join(json.dumps({"n": n, "é": "ü" * (n % 40)}).encode() + b"\n" * (1 + n % 3) for n in range(900))
ENDS = [0, 1000, 1001, 30_000, 60_000, len(LINES)]  # of the parts that are packed alone: in the middle of lines
PARTS = [LINES[start:end] for start, end in pairwise(ENDS)]
SKIPPED = (0x184D2A57).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"  # a frame of zstd without rows


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data).to_pybytes()


FILES: dict[str, Callable[[], bytes]] = {
    "one.jsonl.gz": lambda: gzip.compress(LINES),
    "several.jsonl.gz": lambda: b"".join(map(gzip.compress, PARTS)) + bytes(900),
    "one.jsonl.zst": lambda: zstd(LINES),
    "several.jsonl.zst": lambda: SKIPPED + b"".join(map(zstd, PARTS)),
}


@pytest.mark.parametrize("chunk_bytes", [37, 1 << 20])
@pytest.mark.parametrize("name", FILES)
def test_ranges_of_a_packed_file_are_those_of_the_file(
    tmp_path: Path, name: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, file = tmp_path / "plain.jsonl", tmp_path / name
    plain.write_bytes(LINES)
    file.write_bytes(FILES[name]())
    monkeypatch.setattr(packed, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", chunk_bytes)
    for range_bytes in (700, 10_000, 10**6):
        ranges = list(split_input(file, range_bytes))
        assert sum(size for _, size in ranges) == len(LINES)
        rows = [(where.line, row) for where, row in read_ranges(one for one, _ in ranges)]
        assert rows == [(where.line, row) for where, row in read_rows([plain])]
        alone = [(where.line, row) for one, _ in reversed(ranges) for where, row in read_ranges([one])]
        assert sorted(alone, key=lambda row: row[0]) == rows, "in any order, and each alone"
        if range_bytes == 700:
            begun = {one.entry[1] for one, _ in ranges}
            assert begun == ({0, 1001, 30_000, 60_000} if name.startswith("several") else {0}), "the nearest part"
            assert len(ranges) <= jsonl.MAX_RANGES_OF_STREAM * len(begun)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "flipped", "text behind"])
def test_a_damaged_file_is_refused_before_any_work(tmp_path: Path, name: str, damage: str) -> None:
    data = FILES[name]()
    file = tmp_path / name
    middle = len(data) // 2
    file.write_bytes({
        "cut": data[:middle],
        "flipped": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :],
        "text behind": data + b"more",
    }[damage])  # fmt: skip
    with pytest.raises(DataError, match="cannot be read to its end"):
        list(split_input(file, 1000))
    with pytest.raises(DataError, match="cannot be read to its end"):
        list(read_rows([file]))


def test_a_packed_tar_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for name, command in (("a.tar.gz", "gunzip"), ("a.tar.zst", "zstd -d")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=f"unpack it: {command} "):
            list(read_rows([tmp_path / name]))
