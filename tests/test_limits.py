"""Rows of others: a few bytes that stand for many, files that lead elsewhere. Memory is measured in processes of their
own, as what they take beyond what the imports did."""

import ctypes
import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from gemma_dist.config import RowConfig, ShardConfig
from gemma_dist.data.encode import load_encoder
from gemma_dist.data.formats import parquet
from gemma_dist.data.images import decode_image
from gemma_dist.data.rows import read_ranges, read_rows, split_input
from gemma_dist.data.trajectory import parse_row
from gemma_dist.errors import DataError
from gemma_dist.shards.sharding import run_shard
from tests.support.corpus import picture, row

MIB = 1 << 20
ROW = b'{"messages": [{"role": "user", "content": "hi"}]}'
LARGE = b'{"a": "' + b"x" * (60 * MIB) + b'"}'
MEASURED = """
import resource, sys
from pathlib import Path
from gemma_dist.data.rows import read_ranges, split_input
from gemma_dist.errors import DataError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

before = peak()
ranges = [one for one, _ in split_input(Path(sys.argv[1]), 1 << 28)]
refused = [isinstance(row, DataError) for _, row in read_ranges(ranges, int(sys.argv[2]))]
print(peak() - before, len(refused), sum(refused))
"""


def measure(path: Path, max_row_bytes: int) -> tuple[int, int, int]:
    """MiB that reading takes, rows, and how many of them were refused."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path), str(max_row_bytes)], capture_output=True, text=True, check=True
    )
    mib, num_rows, num_refused = map(int, done.stdout.split())
    return mib, num_rows, num_refused


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data).to_pybytes()


BOMBS: dict[str, Callable[[], bytes]] = {
    "rows.jsonl": lambda: b"\n".join([ROW, LARGE, ROW]),
    "rows.jsonl.zst": lambda: zstd(b"\n".join([ROW, LARGE, ROW])),
    "rows.jsonl.gz": lambda: gzip.compress(b"\n".join([ROW, LARGE, ROW])),
    "rows.json.zst": lambda: zstd(b"[" + b",".join([ROW, LARGE, ROW]) + b"]"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_line_beyond_the_limit_is_refused_and_never_held(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(BOMBS[name]())
    mib, *rows = measure(path, 10 * MIB)
    assert rows == [3, 1]
    assert mib < 40
    _, (_, error), _ = read_rows([path], 10 * MIB)
    assert isinstance(error, DataError)
    assert str(error).startswith(f"{path}:2: the row has 62,914,5")
    assert "the limit is 10,485,760; make it smaller or use `max_row_bytes: 629145" in str(error)


def repeated(folder: Path, num_rows: int, mib: int) -> Path:
    """A parquet file of a few kilobytes whose rows all point to one long string."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * num_rows), pa.array(["x" * (mib * MIB)]))
    path = folder / "rows.parquet"
    pq.write_table(pa.table({"content": texts}), path, compression="zstd", store_schema=False)
    return path


def test_rows_of_parquet_are_read_at_once_by_bytes(tmp_path: Path) -> None:
    path = repeated(tmp_path, num_rows=16, mib=30)
    assert path.stat().st_size < 10_000
    mib, *rows = measure(path, 256 * MIB)
    assert rows == [16, 0]
    assert mib < 8 * 30, "of 16 x 30"
    path = repeated(tmp_path, num_rows=16, mib=70)
    mib, *rows = measure(path, 10 * MIB)
    assert rows == [16, 16]
    assert mib < 20, "the page is not unpacked"
    assert "its row group has a page of 73,400,324 bytes" in str(next(iter(read_rows([path], 10 * MIB)))[1])


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz", "json"])
def test_memory_is_flat_at_ten_times_the_rows(tmp_path: Path, kind: str) -> None:
    taken = []
    for num_rows in (3000, 30_000):
        texts = [f"word {number} " * 60 for number in range(num_rows)]
        path = tmp_path / f"{num_rows}.{kind}"
        if kind == "parquet":  # in one row group
            pq.write_table(pa.table({"text": texts}), path, row_group_size=num_rows)
        elif kind == "json":
            path.write_text(json.dumps([{"text": text} for text in texts]))
        else:
            path.write_bytes(gzip.compress("".join(f'{{"text": "{text}"}}\n' for text in texts).encode(), 1))
        mib, *rows = measure(path, 256 * MIB)
        assert rows == [num_rows, 0]
        taken.append(mib)
    assert taken[1] < taken[0] + 12, "MiB; the larger file has 20 unpacked"


def test_small_batches_are_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": n, "messages": [{"role": "user", "content": "x" * (n * 37 % 400)}] * (n % 4)} for n in range(100)]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=30)
    expected = list(read_rows([path]))
    assert [raw["id"] for _, raw in expected if not isinstance(raw, DataError)] == list(range(100))
    for at_once in (1, 300, 3000):
        monkeypatch.setattr(parquet, "BYTES_AT_ONCE", at_once)
        assert list(read_rows([path])) == expected
    monkeypatch.undo()
    found = list(read_rows([path], 1000))
    refused = [where.line for where, raw in found if isinstance(raw, DataError)]
    assert len(found) == 100
    assert refused == [n + 1 for n in range(100) if (n % 4) * (n * 37 % 400) > 950], "some are for roles and offsets"


# ---- folders that datasets saved -------------------------------------------------------------------------------------


def save(folder: Path, tables: list[pa.Table], **options: Any) -> Path:
    """A folder as `Dataset.save_to_disk` writes it, in batches of ten rows."""
    folder.mkdir()
    names = []
    for number, table in enumerate(tables):
        names.append(f"data-{number:05d}-of-{len(tables):05d}.arrow")
        with pa.ipc.new_stream(
            str(folder / names[-1]), table.schema, options=pa.ipc.IpcWriteOptions(**options)
        ) as file:
            file.write_table(table, max_chunksize=10)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def test_a_saved_dataset_is_cut_by_record_batches(tmp_path: Path) -> None:
    tables = [pa.table({"n": list(range(start, start + 25)), "t": ["x" * 100] * 25}) for start in (0, 25)]
    folder = save(tmp_path / "saved", tables)
    rows = list(read_rows([folder]))
    assert [(where.line, raw) for where, raw in rows] == [(n + 1, {"n": n, "t": "x" * 100}) for n in range(50)]
    for range_bytes, num_ranges in ((1, 6), (2000, 3), (10**6, 1)):
        ranges = [one for one, _ in split_input(folder, range_bytes)]
        assert len(ranges) == num_ranges
        assert list(read_ranges(ranges)) == rows
        assert [row for one in ranges for row in read_ranges([one])] == rows
    _, *others = read_rows([save(tmp_path / "large", [pa.table({"t": ["a", "b" * 5000, "c"]})])], 4000)
    assert [isinstance(raw, DataError) for _, raw in others] == [True, False]


@pytest.mark.parametrize("name", ["../elsewhere.arrow", "/etc/passwd", "a/../../elsewhere.arrow", "", None, 3])
def test_a_saved_dataset_names_files_of_its_folder_alone(tmp_path: Path, name: Any) -> None:
    save(tmp_path / "other", [pa.table({"n": [1]})])
    (tmp_path / "other" / "data-00000-of-00001.arrow").rename(tmp_path / "elsewhere.arrow")
    folder = save(tmp_path / "saved", [pa.table({"n": [1]})])
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError, match=r"state.json: names the file .* which is none inside of the folder"):
        list(read_rows([folder]))


def test_a_saved_dataset_that_is_packed_or_points_is_refused(tmp_path: Path) -> None:
    packed = save(tmp_path / "packed", [pa.table({"t": ["x" * 10_000] * 5})], compression="zstd")
    pointing = save(tmp_path / "pointing", [pa.table({"t": pa.array(["x" * 10_000] * 5).dictionary_encode()})])
    for folder in (packed, pointing):
        with pytest.raises(DataError, match="that is packed or points to a dictionary"):
            list(read_rows([folder]))


# ---- images ----------------------------------------------------------------------------------------------------------


def shown(*images: bytes) -> dict[str, Any]:
    parts = [{"type": "image"}] * len(images)
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "ok"}]
    return {"messages": messages, "images": [{"bytes": image} for image in images]}


def test_the_pixels_of_a_row_are_limited_together_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = RowConfig(max_image_pixels=4000, max_row_pixels=10_000)
    image = picture(0)  # 48 x 64
    assert len(parse_row(shown(*[image] * 3), "a:1", settings).images) == 3
    monkeypatch.setattr("gemma_dist.data.trajectory.decode_image", None)
    with pytest.raises(
        DataError, match=r"the 4 images of the row have 12,288 pixels together, the limit is 10,000; scale"
    ):
        parse_row(shown(*[image] * 4), "a:1", settings)


def test_a_file_that_is_named_as_an_image_counts_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(1 << 40)
    for names, words in ((["large.png"], "has 1,099,511,627,776 bytes"), (["a.png"] * 4, "'a.png' has")):
        with pytest.raises(DataError, match=words):
            parse_row(shown() | {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": name} for name in names]},
                    {"role": "assistant", "content": "ok"},
                ]
            }, f"{tmp_path}/rows.jsonl:1", RowConfig(max_row_bytes=3 * len(picture(0))))  # fmt: skip


def noise(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_pixels_of_images_one_by_one_are_those_of_all_at_once(model: str) -> None:
    encoder = load_encoder(model, RowConfig())
    images = [noise(64, 48), noise(300, 200), noise(64, 48), noise(31, 90)]
    together = encoder.processor.image_processor(images=[decode_image(one) for one in images], return_tensors="pt")
    for name, tensor in encoder.pixels(images).items():
        assert torch.equal(tensor, together[name]), name


def peak_of(action: Callable[[], object]) -> int:
    """MiB that an action takes at most beyond what this process has."""
    ctypes.CDLL(None).malloc_trim(0)  # what other tests left free would be taken up again, and not seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak (VmHWM) is forgotten
    before = status("VmRSS")
    action()
    return status("VmHWM") - before


def status(name: str) -> int:
    return next(int(line.split()[1]) >> 10 for line in Path("/proc/self/status").open() if line.startswith(name))


def test_images_of_a_row_are_decoded_one_at_a_time(model: str) -> None:
    encoder = load_encoder(model, RowConfig())
    file = io.BytesIO()
    Image.new("RGB", (4000, 3000), "red").save(file, "PNG", compress_level=1)
    encoder.pixels([file.getvalue()])  # what is loaded once
    for read in (encoder.pixels, lambda images: parse_row(shown(*images), "a:1", RowConfig())):
        one, eight = (peak_of(partial(read, [file.getvalue()] * number)) for number in (1, 8))
        assert one > 30, "the image alone"
        assert eight < 2 * one


def test_a_bomb_among_rows_is_put_aside_and_the_others_are_written(tmp_path: Path, model: str) -> None:
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(
        zstd("\n".join([json.dumps(row(1)), '{"a": "' + "x" * 99_999 + '"}', json.dumps(row(2))]).encode())
    )
    report = run_shard([path], tmp_path / "out", model, ShardConfig(max_row_bytes=9000), True, num_workers=1)
    assert (report.num_written, report.num_rejected) == (2, 1)
    error = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())["error"]
    assert error.startswith(f"{path}:2: the row has 100,009 bytes")
    assert error.endswith("use --max-row-bytes 100009")
