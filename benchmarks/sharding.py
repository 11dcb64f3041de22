"""Sharding beside what one would write with `datasets`: each contender as a process of its own, from a JSONL file to
parquet with token ids, under a thread that watches its memory. `streaming.py` makes the table.

    python benchmarks/sharding.py CONTENDER ROWS MODEL OUT NUM_WORKERS

prints one line of JSON: CPU seconds, and the most megabytes that each kind of process held by itself.
"""

import itertools
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

WATCH_S = 0.1  # between two looks at the memory
ENCODED = pa.schema(
    {"id": pa.string(), "messages": pa.string(), "tools": pa.string(), "input_ids": pa.list_(pa.int64())}
)
NUM_WARM = 16  # rows of the run whose time is taken off: that of imports and of loading a tokenizer


@dataclass(frozen=True)
class Cost:
    """What one run took. MB are those that a process shares with no other, at their most."""

    cpu_s: float
    parent_mb: float
    worker_mb: float  # of the largest; 0: there was none


# ---- the contenders --------------------------------------------------------------------------------------------------


def shard(rows: Path, model: Path, out: Path, num_workers: int) -> None:
    """`gemma-dist shard`, in as many pieces as there are workers."""
    from gemma_dist.config import ShardConfig
    from gemma_dist.shards import sharding

    sharding.PIECE_BYTES = min(sharding.PIECE_BYTES, -(-rows.stat().st_size // num_workers))
    settings = ShardConfig(media_root=rows.parent)
    sharding.run_shard([rows], out, str(model), settings, False, num_workers=num_workers)


def encoding(model: Path) -> Callable[[list[Any], list[Any]], dict[str, Any]]:
    """What makes token ids of a row of text, as the documentation of transformers has it."""
    from transformers import AutoProcessor

    tokenizer = AutoProcessor.from_pretrained(model).tokenizer
    template = (model / "chat_template.jinja").read_text()

    def encode(messages: list[Any], tools: list[Any]) -> dict[str, Any]:
        encoded = tokenizer.apply_chat_template(messages, tools=tools or None, chat_template=template, return_dict=True)
        return {"input_ids": encoded["input_ids"]}

    return encode


def datasets_map(rows: Path, model: Path, out: Path, num_workers: int) -> None:
    """`datasets`: load_dataset, map, to_parquet. Messages are JSON text, since their arguments are no one type."""
    import datasets

    encode = encoding(model)
    loaded = datasets.load_dataset("json", data_files=str(as_text(rows)), split="train", cache_dir=str(out / "cache"))
    mapped = loaded.map(
        lambda row: encode(json.loads(row["messages"]), json.loads(row["tools"])),
        num_proc=num_workers if num_workers > 1 else None,
    )
    mapped.to_parquet(str(out / "train.parquet"))


def as_text(rows: Path) -> Path:
    """Where the rows lie with messages and tools as JSON text."""
    return rows.with_suffix(".text.jsonl")


def plain_loop(rows: Path, model: Path, out: Path, num_workers: int) -> None:
    """A loop over the lines, and pyarrow."""
    encode = encoding(model)
    with rows.open() as lines, pq.ParquetWriter(out / "train.parquet", ENCODED, compression="zstd") as writer:
        for batch in _batches(lines, 32):
            writer.write_batch(pa.RecordBatch.from_pylist([_encode_line(line, encode) for line in batch], ENCODED))


def _encode_line(line: str, encode: Callable[[list[Any], list[Any]], dict[str, Any]]) -> dict[str, Any]:
    row = json.loads(line)
    messages, tools = row["messages"], row["tools"]
    texts = {"id": row["id"], "messages": json.dumps(messages), "tools": json.dumps(tools)}
    return texts | encode(messages, tools)


def _batches(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    remaining = iter(lines)
    while batch := list(itertools.islice(remaining, size)):
        yield batch


CONTENDERS: dict[str, Callable[[Path, Path, Path, int], None]] = {
    "gemma_dist": shard,
    "datasets map": datasets_map,
    "plain loop": plain_loop,
}


# ---- one run ---------------------------------------------------------------------------------------------------------


def run(contender: str, rows: Path, model: Path, out: Path, num_workers: int = 1) -> Cost:
    """What a contender takes for `rows`, in a process of its own, its start among it."""
    out.mkdir(parents=True)
    command = [sys.executable, __file__, contender, str(rows), str(model), str(out), str(num_workers)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stderr[-3000:]}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    contender, rows, model, out, num_workers = sys.argv[1:]
    most: dict[bool, float] = defaultdict(float)
    thread = threading.Thread(target=_watch, args=(most,), daemon=True)
    thread.start()
    CONTENDERS[contender](Path(rows), Path(model), Path(out), int(num_workers))
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(one.ru_utime + one.ru_stime for one in used)
    print(json.dumps({"cpu_s": cpu_s, "parent_mb": most[True], "worker_mb": most[False]}))


def _watch(most: dict[bool, float]) -> None:
    """Keep the most megabytes of this process, under True, and of any of its children."""
    this = psutil.Process()
    while True:
        for process in [this, *this.children(recursive=True)]:
            try:
                own = process.memory_full_info().uss / 1e6
            except (psutil.Error, OSError):  # it has ended
                continue
            is_this = process.pid == os.getpid()
            most[is_this] = max(most[is_this], own)
        time.sleep(WATCH_S)


if __name__ == "__main__":
    main()
