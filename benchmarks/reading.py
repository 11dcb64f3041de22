"""A corpus in every format, a simulated store, and the readers that `streaming.py` compares. Each reader yields the
samples of its passes one by one, with parsed messages: (messages, images as encoded bytes)."""

import base64
import io
import json
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from PIL import Image

from gemma_dist.batch_plan import BatchPlan
from gemma_dist.config import ShardConfig
from gemma_dist.data.images import decode_image
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.model.tiny import write_tiny_model
from gemma_dist.shards import sharding
from gemma_dist.shards.reader import open_shards
from gemma_dist.stream.loader import NUM_FETCHERS, RowGroups
from gemma_dist.stream.schedule import Schedule

Samples = Iterator[tuple[Any, list[bytes]]]
NUM_SAMPLES, NUM_PASSES = 1000, 3
REQUEST_S, BYTES_PER_S = 0.030, 100e6  # of the simulated store: a request, and a connection
BATCH = 16


def chart(rng: np.random.Generator) -> bytes:
    """A PNG of 512 x 512 pixels and 45 KB: a page with a patch of noise."""
    page = np.full((512, 512, 3), 245, np.uint8)
    page[40:160, 40:160] = rng.integers(0, 256, (120, 120, 3))
    file = io.BytesIO()
    Image.fromarray(page).save(file, "PNG", compress_level=1)
    return file.getvalue()


def row(number: int, rng: np.random.Generator) -> dict[str, Any]:
    """A trajectory of two calls that each return an image."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"Draw the sales of {number} and of last year."}]
    for name in ("c0", "c1"):
        url = "data:image/png;base64," + base64.b64encode(chart(rng)).decode()
        function = {"name": "plot", "arguments": {"n": number}}
        messages += [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": name, "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": name, "content": [{"type": "image_url", "image_url": {"url": url}}]},
        ]
    return {"id": f"row-{number}", "messages": [*messages, {"role": "assistant", "content": "They have doubled."}]}


def make_corpus(folder: Path, shard_mb: int) -> Path:
    """Shards of `NUM_SAMPLES` trajectories, of so many MB each, made by `gemma-dist shard`'s own function."""
    source, model, shards = folder / "rows.jsonl", folder / "model", folder / f"shards-{shard_mb}"
    if not source.exists():
        rng = np.random.default_rng(0)
        with source.open("w") as file:
            file.writelines(json.dumps(row(number, rng)) + "\n" for number in range(NUM_SAMPLES))
        write_tiny_model(model)
    if not shards.exists():
        sharding.SHARD_BYTES = shard_mb << 20
        sharding.run_shard([source], shards, str(model), ShardConfig(), False)
    return shards


def parquet_files(shards: str | Path, num_passes: int = NUM_PASSES) -> list[str]:
    """The shards of a folder or URL, as plain parquet files, once for each pass."""
    local = Path(str(shards).removeprefix("slow://"))
    names = sorted(path.name for path in local.glob("*.parquet"))
    return [f"{shards}/{name}" for name in names] * num_passes


def read_ours(shards: str | Path) -> Samples:
    """Our order, shuffled, without packing: row groups fetched ahead by threads, as the loader does it."""
    corpus = open_shards(*[shards] * NUM_PASSES)
    schedule = Schedule(corpus, BatchPlan(1, BATCH, 1, BATCH), 0, packing=False, packing_length=None)
    steps = range(schedule.steps_per_epoch)
    with ThreadPoolExecutor(NUM_FETCHERS) as pool:
        row_groups = RowGroups(schedule, 0, steps, pool)
        for step in steps:
            tables = row_groups.of_step(step)
            for sequence in schedule.rank_sequences(step, 0):
                for index in sequence.samples:
                    found = corpus.trajectory(tables[corpus.row_group_of(index)].result(), index)
                    yield found.messages, found.images


def read_datasets(shards: str | Path, shuffle: bool = False, prefetch: bool = False) -> Samples:
    """`datasets` streaming of the same parquet, its images left encoded."""
    import datasets
    import pyarrow as pa
    from pyarrow.dataset import ParquetFragmentScanOptions

    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # seconds that a shuffled stream sleeps when it ends
    options = {"fragment_scan_options": ParquetFragmentScanOptions(cache_options=pa.CacheOptions(prefetch_limit=1))}
    stream = datasets.load_dataset(
        "parquet", data_files=parquet_files(shards), split="train", streaming=True, **(options if prefetch else {})
    )
    for sample in stream.shuffle(0, buffer_size=200) if shuffle else stream:
        yield sample["messages"], [image["bytes"] for image in sample["images"]]


def read_on_disk(shards: Path) -> Samples:
    """torch's DataLoader over a `datasets` folder (Arrow files, mapped) in random order."""
    import datasets
    from torch.utils.data import DataLoader

    folder = shards.parent / "arrow"
    if not folder.exists():  # in the warm-up
        rows = datasets.load_dataset("parquet", data_files=parquet_files(shards, 1), cache_dir=str(shards.parent / "c"))
        rows["train"].save_to_disk(folder)
    loader: Any = DataLoader(datasets.load_from_disk(str(folder)), batch_size=None, shuffle=True)
    for _ in range(NUM_PASSES):
        for sample in loader:
            yield sample["messages"], [image["bytes"] for image in sample["images"]]


def read_litdata(shards: Path) -> Samples:
    """litdata's shuffled stream of the same parquet files."""
    import litdata
    from litdata.streaming.item_loader import ParquetLoader

    folder = shards.parent / "litdata"
    if not folder.exists():  # in the warm-up: a copy without our own files, and litdata's index
        folder.mkdir()
        for path in shards.glob("*.parquet"):
            shutil.copy(path, folder)
        litdata.index_parquet_dataset(str(folder))
    for _ in range(NUM_PASSES):
        for sample in litdata.StreamingDataset(str(folder), item_loader=ParquetLoader(), shuffle=True):
            yield json.loads(sample["messages"]), [image["bytes"] for image in sample["images"]]


def read_webdataset(shards: Path) -> Samples:
    """webdataset's stream of tar files of the same samples, shuffled with a buffer of 200."""
    import webdataset

    folder = shards.parent / "tar"
    if not folder.exists():  # in the warm-up
        folder.mkdir()
        corpus = open_shards(shards)
        for first in range(0, len(corpus), 100):
            with tarfile.open(folder / f"{first:05}.tar", "w") as tar:
                for index in range(first, min(first + 100, len(corpus))):
                    _add_to_tar(tar, corpus.read(index))
    urls = sorted(map(str, folder.glob("*.tar")))
    for _ in range(NUM_PASSES):
        for sample in webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(200):
            images = [sample[f"{number}.png"] for number in range(2)]
            yield json.loads(sample["json"]), images


def _add_to_tar(tar: tarfile.TarFile, trajectory: Trajectory) -> None:
    files = {"json": json.dumps(trajectory.messages).encode()}
    files |= {f"{number}.png": image for number, image in enumerate(trajectory.images)}
    for ending, data in files.items():
        member = tarfile.TarInfo(f"{trajectory.id}.{ending}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


class SlowStore(AbstractFileSystem):
    """`slow://…`: the local disk as an object store would give it, each request on a connection of its own."""

    protocol = "slow"
    num_requests = 0

    def info(self, path: str, **settings: Any) -> dict[str, Any]:
        self._wait(0)
        return {"name": path, "size": self._local(path).stat().st_size, "type": "file"}

    def ls(self, path: str, detail: bool = True, **settings: Any) -> list[Any]:
        raise NotImplementedError

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **settings: Any) -> bytes:
        with self._local(path).open("rb") as file:
            file.seek(start or 0)
            data = file.read() if end is None else file.read(end - (start or 0))
        self._wait(len(data))
        return data

    def _open(self, path: str, mode: str = "rb", **settings: Any) -> "SlowFile":
        return SlowFile(self, path, mode, **settings)

    def _local(self, path: str) -> Path:
        return Path("/", self._strip_protocol(path))

    def _wait(self, num_bytes: int) -> None:
        SlowStore.num_requests += 1
        time.sleep(REQUEST_S + num_bytes / BYTES_PER_S)


class SlowFile(AbstractBufferedFile):
    """An open file of the store, buffered as fsspec does by default: 5 MB more than is asked for."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.cat_file(self.path, start, end)


fsspec.register_implementation("slow", SlowStore)


def decode(images: list[bytes]) -> None:
    for image in images:
        decode_image(image).load()


def rate(read: Callable[[], Samples], with_decode: bool) -> float:
    """Samples a second of a reader, after it is set up: the first sample is not counted, nor the wait for it."""
    samples = read()
    next(samples)
    start, num_samples = time.perf_counter(), 0
    for _, images in samples:
        if with_decode:
            decode(images)
        num_samples += 1
    return num_samples / (time.perf_counter() - start)
