"""A corpus in every format, a simulated store, and the readers that `streaming.py` compares. Each reader yields the
samples of its passes one by one, with parsed messages: (messages, images as encoded bytes)."""

import base64
import importlib
import io
import json
import multiprocessing
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
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


def read_datasets(shards: str | Path, shuffle: bool = False, prefetch: int = 0, num_workers: int = 0) -> Samples:
    """`datasets` streaming of the same parquet, its images left encoded.

    Args:
        prefetch: pieces of a file that are fetched ahead.
        num_workers: processes of torch's DataLoader, each of which reads some of the files and stays four batches
            ahead; 0 reads in this one.
    """
    import datasets
    import pyarrow as pa
    from pyarrow.dataset import ParquetFragmentScanOptions
    from torch.utils.data import DataLoader

    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # seconds that a shuffled stream sleeps when it ends
    ahead = ParquetFragmentScanOptions(cache_options=pa.CacheOptions(prefetch_limit=prefetch))
    options = {"fragment_scan_options": ahead} if prefetch else {}
    stream = datasets.load_dataset(
        "parquet", data_files=parquet_files(shards), split="train", streaming=True, **options
    )
    samples = stream.shuffle(0, buffer_size=200) if shuffle else stream
    if num_workers:
        num_workers = min(num_workers, stream.num_shards)
        batches = DataLoader(samples, BATCH, num_workers=num_workers, prefetch_factor=4, collate_fn=list)
        samples = chain.from_iterable(batches)
    for sample in samples:
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
    num_requests = multiprocessing.Value("q", 0)  # of this process and of those that it forks

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
        with SlowStore.num_requests.get_lock():
            SlowStore.num_requests.value += 1
        time.sleep(REQUEST_S + num_bytes / BYTES_PER_S)


class SlowFile(AbstractBufferedFile):
    """An open file of the store, buffered as fsspec does by default: 5 MB more than is asked for."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.cat_file(self.path, start, end)


fsspec.register_implementation("slow", SlowStore)


def read_litdata_store(shards: Path, file_mb: int) -> Samples:
    """litdata's shuffled stream of its own files of so many MB, which it fetches whole from the slow store."""
    import litdata
    from litdata.streaming import downloader

    class FromSlowStore(downloader.LocalDownloaderWithCache):
        def download_file(self, remote_filepath: str, local_filepath: str) -> None:
            download(remote_filepath.removeprefix("local:"), local_filepath)
            self._notify_published(local_filepath)

    folder = shards.parent / f"litdata-{file_mb}"
    if not folder.exists():  # in the warm-up
        litdata.optimize(
            partial(_sample_of, shards),
            _all_passes(shards),
            str(folder),
            chunk_bytes=f"{file_mb}MB",
            num_workers=1,
            start_method="fork",
            verbose=False,
        )
    downloader.register_downloader("local:", FromSlowStore, overwrite=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        stream = litdata.StreamingDataset(
            f"local:{folder}", cache, shuffle=True, max_pre_download=8, max_cache_size="10GB"
        )
        for sample in stream:
            yield json.loads(sample["messages"]), [sample["image 0"], sample["image 1"]]


def read_mosaicml(shards: Path, file_mb: int) -> Samples:
    """MosaicML's shuffled stream of its own files of so many MB, which it fetches whole from the slow store."""
    streaming = import_mosaicml()
    storage = streaming.base.storage.download

    class FromSlowStore(storage.LocalDownloader):  # type: ignore[name-defined]
        @staticmethod
        def _client_identifier() -> str:
            return "slow"

        def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
            download(remote, local)

    folder = shards.parent / f"mosaicml-{file_mb}"
    if not folder.exists():  # in the warm-up
        columns = {"messages": "str", "image 0": "bytes", "image 1": "bytes"}
        with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=file_mb << 20) as writer:
            for index in _all_passes(shards):
                writer.write(_sample_of(shards, index))
    storage.DOWNLOADER_MAPPINGS["slow"] = FromSlowStore
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        stream = streaming.StreamingDataset(
            remote=f"slow://{folder}", local=cache, shuffle=True, batch_size=BATCH, predownload=512
        )
        for sample in stream:
            yield json.loads(sample["messages"]), [sample["image 0"], sample["image 1"]]


def import_mosaicml() -> Any:
    """MosaicML's package, whose name is that of the script in this folder."""
    folder = str(Path(__file__).resolve().parent)
    paths = sys.path.copy()
    sys.path[:] = [path for path in paths if path != folder]
    try:
        return importlib.import_module("streaming")
    finally:
        sys.path[:] = paths


def _all_passes(shards: Path) -> list[int]:
    """The samples of all passes: a second pass over the same files would find them on the disk."""
    return list(range(len(open_shards(shards)))) * NUM_PASSES


def _sample_of(shards: Path, index: int) -> dict[str, Any]:
    trajectory = open_shards(shards).read(index)
    images = {f"image {number}": image for number, image in enumerate(trajectory.images)}
    return {"messages": json.dumps(trajectory.messages), **images}


def download(remote: str, local: str) -> None:
    """A whole file of the slow store, in one request."""
    temporary = Path(f"{local}.part")
    temporary.write_bytes(SlowStore().cat_file(remote))
    temporary.rename(local)


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
