"""What streaming costs and brings, beside what else there is: prints one table a section.

    python benchmarks/streaming.py [--only read|store|index|shuffle|balance|train|shard] [--vocabulary GGUF]

Needs the `bench` extra for all of its competitors; those that are not installed are left out. `docs/benchmarks.md`
explains the tables.
"""

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import packages_distributions
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: one core a process
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pyarrow as pa

from gemma_dist.batch_plan import BatchPlan
from gemma_dist.shards.manifest import COUNTS, MANIFEST, SCHEMA, ShardEntry, read_manifest, write_manifest
from gemma_dist.shards.reader import Shards, open_shards
from gemma_dist.stream.schedule import Schedule

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
NUM_REPEATS = 2  # of a reader, in turns with the others: the best counts, as others use the machine too
SHARD_ROUNDS = 3  # of the contenders of sharding, in turns
ROW_GROUP_SAMPLES, ROW_GROUP_BYTES, SHARD_ROW_GROUPS = 32, 3 << 20, 85  # of synthetic manifests: shards of 256 MB
PACKING_LENGTH = 16_384


def show(title: str, *rows: tuple[Any, ...]) -> None:
    """Print a table: its first row is the head, its first column is text."""
    cells = [[f"{cell:,.0f}" if isinstance(cell, int | float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}", flush=True)
    for first, *others in cells:
        numbers = "".join(f"  {cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        print(f"  {first:<{widths[0]}}{numbers}", flush=True)


def not_installed(*packages: str) -> list[str]:
    """Those that pip has not installed, by their names there."""
    installed = {name for names in packages_distributions().values() for name in names}
    return [package for package in packages if package not in installed]


def read(folder: Path) -> None:
    """Samples a second from a local disk."""
    import reading

    shards = reading.make_corpus(folder, shard_mb=8)
    readers: dict[str, tuple[str, Callable[[], reading.Samples]]] = {
        "gemma_dist, shuffled": ("gemma_dist", partial(reading.read_ours, shards)),
        "datasets stream": ("datasets", partial(reading.read_datasets, shards)),
        "datasets stream, shuffle(200)": ("datasets", partial(reading.read_datasets, shards, shuffle=True)),
        "litdata stream, shuffled": ("litdata", partial(reading.read_litdata, shards)),
        "webdataset tar, shuffle(200)": ("webdataset", partial(reading.read_webdataset, shards)),
        "DataLoader over Arrow, random": ("datasets", partial(reading.read_on_disk, shards)),
    }
    missing = not_installed("litdata", "webdataset")
    found = {name: reader for name, (package, reader) in readers.items() if package not in missing}
    rates = []
    for with_decode in (False, True):
        for reader in found.values():
            next(reader())  # sets up what it reads from
        rounds = [[reading.rate(reader, with_decode) for reader in found.values()] for _ in range(NUM_REPEATS)]
        rates.append(np.max(rounds, axis=0))
    show(
        f"read: samples/s, one process, {reading.NUM_SAMPLES:,} trajectories of two 45 KB images x "
        f"{reading.NUM_PASSES}, best of {NUM_REPEATS}",
        ("", "raw", "with decode"),
        *zip(found, *rates, strict=True),
    )
    for package in missing:
        print(f"  {package}: not installed")


def store(folder: Path) -> None:
    """Samples a second from a store that takes its time."""
    import reading

    def measure(reader: Callable[[], reading.Samples]) -> tuple[float, ...]:
        reading.SlowStore.num_requests.value = 0
        start = time.perf_counter()
        times = [time.perf_counter() - start for _ in reader()]
        rate = (len(times) - 1) / (times[-1] - times[0])
        requests = 1000 * reading.SlowStore.num_requests.value / len(times)
        return rate, len(times) / times[-1], 1000 * times[0], requests

    missing = not_installed("litdata", "mosaicml-streaming")
    for shard_mb in (8, 256):  # files that are fetched whole, and of the size that `gemma-dist shard` writes
        shards = reading.make_corpus(folder, shard_mb)
        url, own_mb = f"slow://{shards}", min(shard_mb, 64)  # litdata and MosaicML write 64 MB if nothing is said
        datasets = partial(reading.read_datasets, url)
        readers: dict[str, Callable[[], reading.Samples]] = {
            "gemma_dist, shuffled": partial(reading.read_ours, url),
            "datasets stream": datasets,
            "datasets stream, prefetch_limit=1": partial(datasets, prefetch=1),
            "datasets stream, prefetch_limit=8, 4 workers": partial(datasets, prefetch=8, num_workers=4),
            "datasets stream, shuffle(200), prefetch_limit=1": partial(datasets, shuffle=True, prefetch=1),
            "datasets stream, shuffle(200), prefetch_limit=8, 4 workers": partial(
                datasets, shuffle=True, prefetch=8, num_workers=4
            ),
        }
        if "litdata" not in missing:
            readers[f"litdata files of {own_mb} MB, shuffled"] = partial(reading.read_litdata_store, shards, own_mb)
        if "mosaicml-streaming" not in missing:
            readers[f"MosaicML files of {own_mb} MB, shuffled"] = partial(reading.read_mosaicml, shards, own_mb)
        for reader in readers.values():
            next(reader())  # imports what it needs
        rounds = [[measure(reader) for reader in readers.values()] for _ in range(NUM_REPEATS)]
        rows = [(name, *max(found)) for name, found in zip(readers, zip(*rounds, strict=True), strict=True)]
        show(
            f"store: shards of at most {shard_mb} MB, {1000 * reading.REQUEST_S:.0f} ms a request, "
            f"{reading.BYTES_PER_S / 1e6:.0f} MB/s a connection; samples/s, best of {NUM_REPEATS}",
            ("", "after the first", "in all", "first sample, ms", "requests / 1,000 samples", "gemma_dist / this"),
            *((*row, f"{rows[0][1] / row[1]:.1f}") for row in rows),
        )
    for package in missing:
        print(f"  {package}: not installed")


def write_synthetic_manifest(folder: Path, lengths: np.ndarray) -> Path:
    """A manifest of as many samples as there are lengths (in tokens), in row groups of 32; the shards do not exist."""
    num_row_groups = len(lengths) // ROW_GROUP_SAMPLES
    num_samples = num_row_groups * ROW_GROUP_SAMPLES
    numbers = np.arange(num_row_groups)
    names = np.empty((num_samples, 15), np.uint8)
    names[:, :7] = np.frombuffer(b"sample-", np.uint8)
    for place in range(8):
        names[:, 7 + place] = np.arange(num_samples) // 10 ** (7 - place) % 10 + ord("0")
    ends = pa.py_buffer(15 * np.arange(num_samples + 1))
    ids = pa.LargeStringArray.from_buffers(num_samples, ends, pa.py_buffer(names))
    lengths, none = lengths[:num_samples], np.zeros(num_samples, np.int32)
    counts = (lengths, none, none, lengths // 4)
    starts = pa.array(ROW_GROUP_SAMPLES * np.arange(num_row_groups + 1))
    lists = [pa.LargeListArray.from_arrays(starts, pa.array(column, pa.int32())) for column in counts]
    columns = {
        "shard": numbers // SHARD_ROW_GROUPS,
        "offset": 4 + numbers % SHARD_ROW_GROUPS * ROW_GROUP_BYTES,
        "num_bytes": np.full(num_row_groups, ROW_GROUP_BYTES),
        "digest": [bytes(32)] * num_row_groups,
        "num_samples": np.full(num_row_groups, ROW_GROUP_SAMPLES),
        "num_tokens": lengths.reshape(-1, ROW_GROUP_SAMPLES).sum(1),
        "footer": [zlib.compress(b"") if number % SHARD_ROW_GROUPS == 0 else None for number in numbers],
        "id": pa.LargeListArray.from_arrays(starts, ids),
        **dict(zip(COUNTS, lists, strict=True)),
    }
    files: list[ShardEntry] = [
        {"name": f"train-{i:05}.parquet", "bytes": 0, "rest_digest": ""}
        for i in range(1 + numbers[-1] // SHARD_ROW_GROUPS)
    ]
    folder.mkdir()
    table = pa.table(columns, schema=SCHEMA)
    write_manifest(folder, {"fingerprint": "", "settings": {}}, files, lambda: [table], num_tools=None)
    return folder


def long_tail(num_samples: int) -> np.ndarray:
    """Lengths in tokens: mean 2.4k, 99 % below 9.3k, at most 16,384."""
    return np.clip(np.random.default_rng(0).lognormal(7.56, 0.67, num_samples), 300, PACKING_LENGTH).astype(np.int32)


def memory_mb() -> tuple[float, float]:
    """Of this process: its own, and with what it has touched of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return int(values["RssAnon"].split()[0]) / 1000, int(values["VmRSS"].split()[0]) / 1000


def look_up(folder: Path, packing: bool, part: float) -> tuple[float, ...]:
    """One rank's way to the samples of a step at `part` of an epoch: milliseconds and megabytes."""
    before = memory_mb()
    times = [time.process_time()]
    shards = open_shards(folder)
    times.append(time.process_time())
    plan = BatchPlan(8, 1, 32, 256)
    schedule = Schedule(shards, plan, 0, packing=packing, packing_length=PACKING_LENGTH, cache_dir=folder)
    times.append(time.process_time())
    for step in range(int(part * schedule.steps_per_epoch), schedule.steps_per_epoch)[:2]:
        schedule.micro_batches(step, 3)
        times.append(time.process_time())
    return (*1000 * np.diff(times), *np.subtract(memory_mb(), before))


def index(folder: Path) -> None:
    """From ten million samples to those of a step."""
    manifest = write_synthetic_manifest(folder / "manifest", long_tail(10_000_000))
    rows: list[tuple[Any, ...]] = []
    for packing in (False, True):
        for part in (0, 0, 0.5, 0.99) if packing else (0, 0.5, 0.99):
            first = ", first start" if packing and len(rows) == 3 else ""  # later ones find the packs counted
            # Each in a process of its own, so that nothing is remembered.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                values = process.submit(look_up, manifest, packing, part).result()
            rows.append((f"{f'packs of {PACKING_LENGTH:,}' if packing else 'unpacked'}, at {part:.0%}{first}", *values))
    size = (manifest / MANIFEST).stat().st_size / 1e6
    show(
        f"index: 10,000,000 samples, manifest of {size:.0f} MB; rank 3 of 8, global batch 256; CPU ms, and MB",
        ("", "open, check", "schedule", "first step", "next step", "memory", "with mapped file"),
        *rows,
    )


def shuffle(folder: Path) -> None:
    """Distinct shards in a global batch of 256, against a true permutation."""
    rows: list[tuple[Any, ...]] = []
    for num_shards in (20, 200, 2000):
        num_samples = num_shards * SHARD_ROW_GROUPS * ROW_GROUP_SAMPLES
        manifest = write_synthetic_manifest(folder / f"of-{num_shards}", np.full(num_samples, 2000, np.int32))
        shard_of = np.repeat(read_manifest(manifest / MANIFEST, "").row_groups("shard"), ROW_GROUP_SAMPLES)
        schedule = Schedule(open_shards(manifest), BatchPlan(8, 1, 32, 256), 0, packing=False, packing_length=None)
        steps = np.linspace(0, schedule.steps_per_epoch - 2, 100).astype(int)
        rng = np.random.default_rng(0)
        ours = np.mean([len(set(shard_of[schedule.global_batch(step)])) for step in steps])
        true = np.mean([len(set(shard_of[rng.choice(num_samples, 256, replace=False)])) for _ in range(400)])
        rows.append((f"{num_shards:,} shards", f"{ours:.1f}", f"{true:.1f}", f"{ours / true - 1:+.1%}"))
    show("shuffle: distinct shards in a global batch of 256", ("", "gemma_dist", "permutation", "difference"), *rows)


def toolcall_lengths() -> np.ndarray | None:
    """Tokens of the shared tool calls, about: a token for 3.3 characters. None where they are absent."""
    path = SHARED / "toolcalls" / "train.jsonl"
    if not path.exists():
        print(f"\n{path}: not there, so its lengths are left out")
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    return np.array([max(16, round(len(line) / 3.3)) for line in lines], np.int32)


def spread(shards: Shards, num_ranks: int, micro_batch: int, packing_length: int | None) -> tuple[float, float]:
    """The share of padding, and the tokens of the step's largest rank over those of the average one."""
    lengths, packing = shards.num_text_tokens, packing_length is not None
    plan = BatchPlan(num_ranks, micro_batch, 8 // micro_batch, 8 * num_ranks)
    if packing:
        plan = BatchPlan(num_ranks, 1, 2, 2 * num_ranks)
    schedule = Schedule(shards, plan, 0, packing=packing, packing_length=packing_length)
    tokens, places, ratios = 0, 0, []
    for step in range(min(200, schedule.steps_per_epoch - 1)):  # the last step of an epoch holds what is left
        of_ranks = []
        for rank in range(num_ranks):
            of_ranks.append(0)
            for packs in schedule.micro_batches(step, rank):
                rows = [int(lengths[pack].sum()) for pack in packs]
                of_ranks[-1] += sum(rows)
                places += len(rows) * (packing_length or max(rows))
        tokens += sum(of_ranks)
        ratios.append(max(of_ranks) / np.mean(of_ranks))
    return 1 - tokens / places, float(np.mean(ratios))


def balance(folder: Path) -> None:
    """Padding, and how much more than the average the largest rank has to do."""
    corpora = {"long tail": long_tail(64_000)}
    toolcalls = toolcall_lengths()
    if toolcalls is not None:  # many times over, as a corpus for 32 ranks is larger
        corpora = {"toolcalls": np.tile(toolcalls, 32)} | corpora
    rows: list[tuple[Any, ...]] = []
    for name, lengths in corpora.items():
        lengths = np.random.default_rng(0).permutation(lengths)
        shards = open_shards(write_synthetic_manifest(folder / name.replace(" ", "-"), lengths))
        for method, micro_batch, packing_length in (
            ("micro-batch 4", 4, None),
            ("micro-batch 8", 8, None),
            (f"packs of {PACKING_LENGTH:,}", 1, PACKING_LENGTH),
        ):
            found = [spread(shards, num_ranks, micro_batch, packing_length) for num_ranks in (8, 32)]
            rows.append((f"{name}, {method}", f"{found[0][0]:.1%}", *(f"{ratio:.3f}" for _, ratio in found)))
    show(
        "balance: padding, and tokens of the largest rank / mean, 8 trajectories or 2 packs a rank and step",
        ("", "padding", "8 ranks", "32 ranks"),
        *rows,
    )


def train(folder: Path) -> None:
    """Useful tokens a second of a training step."""
    import steps

    head = ("", "padding", "timed", "useful tokens / CPU s", "packed / this", "by padding alone")
    toolcalls, limit = toolcall_lengths(), 4096
    if toolcalls is not None:
        documents = [(int(length), 0) for length in np.minimum(toolcalls, limit)]
        rows = steps.compare(folder / "text", documents, limit, {4: 4, 8: 2}, num_packs=2)
        show(f"train: {len(documents):,} toolcalls cut at {limit:,} tokens; goals 1.4 and 1.8", head, *rows)
        short = toolcalls[toolcalls <= limit]
        found = ", ".join(f"{steps.padding(steps.deal(len(short), size), short):.1%}" for size in (4, 8))
        print(
            f"  padding at micro-batch 4, 8 where the {len(toolcalls) - len(short)} longer ones are left out: {found}"
        )
    screenshots = SHARED / "multimodal"
    if screenshots.is_dir():
        documents = steps.screenshots(screenshots)
        rows = steps.compare(folder / "screenshots", documents, 8192, {4: 2}, num_packs=2)
        show(f"train: {len(documents)} trajectories with screenshots of 280 tokens, packs of 8,192", head, *rows)
    else:
        print(f"\n{screenshots}: not there, so its screenshots are left out")


def shard(folder: Path, vocabulary: Path | None = None) -> None:
    """Rows a CPU second from JSONL to parquet, beside `datasets`.

    Args:
        vocabulary: a GGUF file whose words are taken, instead of those that are learned from the rows.
    """
    import sharding

    source = SHARED / "toolcalls" / "train.jsonl"
    if not source.exists():
        print(f"\n{source}: not there, so sharding is left out")
        return
    model, (warm, once, ten_times) = sharding.make_corpus(folder, source, (1, 10), vocabulary)
    num_rows = len(once.read_text().splitlines())
    contenders = [("datasets map", 1), ("plain loop", 1), ("gemma_dist", 1), ("datasets map", 2), ("gemma_dist", 2)]
    taken: dict[tuple[str, int], list[tuple[float, float, sharding.Cost]]] = {one: [] for one in contenders}
    for number in range(SHARD_ROUNDS):  # in turns, since a machine is not as fast in one minute as in the next
        for name, num_workers in contenders:
            out = folder / f"{name}-{num_workers}-{number}"
            start_s = sharding.run(name, warm, model, out / "warm", num_workers).cpu_s
            cost = sharding.run(name, once, model, out / "once", num_workers)
            taken[name, num_workers].append((cost.cpu_s - start_s, start_s, cost))
            shutil.rmtree(out)
    rows: list[tuple[str, int, int, float, float, sharding.Cost]] = []
    for name, num_workers in contenders:
        took, starts, costs = zip(*taken[name, num_workers], strict=True)
        rows.append((name, num_workers, num_rows, median(took), median(starts), sharding.least(list(costs))))
    cost = sharding.run("gemma_dist", ten_times, model, folder / "ten-times", 2)
    rows.append(("gemma_dist", 2, 10 * num_rows, cost.cpu_s - rows[-1][4], rows[-1][4], cost))
    lines = []
    rates: dict[int, float] = {}  # of the map, by processes
    for name, num_workers, count, seconds, start, cost in rows:
        rate = (count - sharding.NUM_WARM) / seconds
        beside = rate / rates.setdefault(num_workers, rate)
        memory = (cost.parent_mb, cost.child_mb or "-", cost.torch_child_mb or "-")
        lines.append(
            (name, num_workers, count, f"{rate:.0f}", f"{beside:.2f}", f"{start + cost.loader_s:.1f}", *memory)
        )
    show(
        "shard: rows from JSONL to parquet a CPU second of all processes, without their start; own MB of each process; "
        f"the median of {SHARD_ROUNDS}",
        ("", "processes", "rows", "rows / CPU s", "beside map", "start, CPU s", "parent", "child", "child with torch"),
        *lines,
    )


SECTIONS: dict[str, Callable[[Path], None]] = {
    "read": read,
    "store": store,
    "index": index,
    "shuffle": shuffle,
    "balance": balance,
    "train": train,
    "shard": shard,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SECTIONS, help="one section instead of all")
    parser.add_argument("--vocabulary", type=Path, help="a GGUF file whose words the section `shard` takes")
    args = parser.parse_args()
    sections = SECTIONS | {"shard": partial(shard, vocabulary=args.vocabulary)}
    with tempfile.TemporaryDirectory(prefix="gemma_dist-bench-") as folder:
        for name, section in sections.items():
            if args.only in (None, name):
                section(Path(folder))


if __name__ == "__main__":
    main()
