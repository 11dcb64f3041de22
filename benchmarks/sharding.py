"""Sharding beside what one would write with `datasets`: each contender as a process of its own, from a JSONL file to
parquet with token ids, under a thread that watches its memory. `streaming.py` makes the table.

    python benchmarks/sharding.py CONTENDER ROWS MODEL OUT NUM_WORKERS

prints one line of JSON: CPU seconds, and the most megabytes that each kind of process held by itself.
"""

import json
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gemma_dist.gemma_format import UNK
from tests.support.vocabulary import of_gemma, with_vocabulary

WATCH_S = 0.2  # between two looks at the memory
ENCODED = pa.schema(
    {"id": pa.string(), "messages": pa.string(), "tools": pa.string(), "input_ids": pa.list_(pa.int64())}
)
VOCAB_SIZE = 32_000
NUM_WARM = 16  # rows of the run whose time is taken off: that of imports and of loading a tokenizer


@dataclass(frozen=True)
class Cost:
    """What one run took. MB are those that a process shares with no other, at their most; 0 where there was none."""

    cpu_s: float  # but for the next
    loader_s: float  # of gemma_dist's child that loads the processor, whatever the rows are
    parent_mb: float
    child_mb: float  # of the largest child that has not loaded torch
    torch_child_mb: float  # of the largest that has


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
    while batch := list(islice(remaining, size)):
        yield batch


CONTENDERS: dict[str, Callable[[Path, Path, Path, int], None]] = {
    "gemma_dist": shard,
    "datasets map": datasets_map,
    "plain loop": plain_loop,
}


# ---- the corpus ------------------------------------------------------------------------------------------------------


def make_corpus(
    folder: Path, source: Path, times: tuple[int, ...], vocabulary: Path | None = None
) -> tuple[Path, list[Path]]:
    """A model folder with a tokenizer of Gemma's kind, whose words are learned from the rows or those of a GGUF file,
    and files of rows: the first NUM_WARM, and all of them each so many times over. They are in normal form, so that
    every contender renders the same messages."""
    from gemma_dist.config import ShardConfig
    from gemma_dist.data.rows import read_rows
    from gemma_dist.data.trajectory import parse_row
    from gemma_dist.model.tiny import tiny_processor

    lines = source.read_text(encoding="utf-8").splitlines()
    tiny_processor(lines[:NUM_WARM], style="e4b", vocab_size=1000, chat_template=None).save_pretrained(folder / "model")
    path = folder / "model/tokenizer.json"
    given = json.loads(path.read_text(encoding="utf-8"))
    made = with_vocabulary(given, vocabulary) if vocabulary else _learned(given, [*map(json.loads, lines)])
    path.write_text(json.dumps(made), encoding="utf-8")
    rows = [parse_row(row, where, ShardConfig()) for where, row in read_rows([source])]
    normal = [{"id": row.id, "messages": row.messages, "tools": row.tools} for row in rows]
    files = [_write(folder / "warm.jsonl", normal[:NUM_WARM])]
    for number in times:
        again = [{**row, "id": f"{row['id']}-{turn}"} for turn in range(number) for row in normal]
        files.append(_write(folder / f"rows-{number}.jsonl", again))
    return folder / "model", files


def _learned(given: dict[str, Any], rows: list[Any]) -> dict[str, Any]:
    """A `tokenizer.json` of Gemma's kind with words from the rows. Merges are learned as Gemma's were: within words,
    and no letter is joined to another sign (of Gemma 4's 262,144 tokens only tags of HTML and the like hold both)."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    added = [token["content"] for token in given["added_tokens"]]  # in the order of their ids
    learned = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token=UNK))
    learned.normalizer = normalizers.Replace(" ", "▁")
    words = pre_tokenizers.Split(Regex(r"▁?\p{L}+|▁?[^▁\n\p{L}]+|▁+|\n+"), "isolated")
    learned.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    specials = [*added, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=specials, show_progress=False)
    control = re.compile("|".join(map(re.escape, added)))
    learned.train_from_iterator((piece for text in _texts(rows) for piece in control.split(text)), trainer)
    return given | of_gemma(json.loads(learned.to_str())["model"])


def _texts(value: Any) -> Iterator[str]:
    """All strings in JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in chain.from_iterable(value.items()) if isinstance(value, dict) else value:
            yield from _texts(item)


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w") as file, as_text(path).open("w") as texts:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            as_json = {key: json.dumps(row[key]) for key in ("messages", "tools")}
            texts.write(json.dumps(row | as_json) + "\n")
    return path


# ---- one run ---------------------------------------------------------------------------------------------------------


def run(contender: str, rows: Path, model: Path, out: Path, num_workers: int = 1) -> Cost:
    """What a contender takes for `rows`, in a process of its own, its start among it."""
    out.mkdir(parents=True)
    command = [sys.executable, __file__, contender, str(rows), str(model), str(out), str(num_workers)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stderr[-3000:]}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def least(costs: list[Cost]) -> Cost:
    """The least of each figure of several runs: what else a machine does only adds to it."""
    return Cost(*map(min, zip(*map(astuple, costs), strict=True)))


def main() -> None:
    contender, rows, model, out, num_workers = sys.argv[1:]
    names = ("parent_mb", "child_mb", "torch_child_mb", "watch_s", "loader_s")
    most: dict[str, float] = dict.fromkeys(names, 0.0)
    threading.Thread(target=_watch, args=(most,), daemon=True).start()
    CONTENDERS[contender](Path(rows), Path(model), Path(out), int(num_workers))
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    if contender != "gemma_dist":  # the children of the others work on rows
        most["loader_s"] = 0.0
    cpu_s = sum(one.ru_utime + one.ru_stime for one in used) - most.pop("watch_s") - most["loader_s"]
    print(json.dumps({"cpu_s": cpu_s, **most}))


def _watch(most: dict[str, float]) -> None:
    """Keep the most megabytes of this process and of its children, what one of them that has torch takes, and what
    looking at them takes itself."""
    this = psutil.Process()
    while True:
        for process in [this, *this.children(recursive=True)]:
            try:
                own, used = process.memory_full_info().uss / 1e6, process.cpu_times()
                maps = Path(f"/proc/{process.pid}/maps").read_text()
            except (psutil.Error, OSError):  # it has ended
                continue
            if not maps:  # it is about to
                continue
            kind = "parent_mb" if process == this else "torch_child_mb" if "libtorch" in maps else "child_mb"
            most[kind] = max(most[kind], own)
            if kind == "torch_child_mb":
                most["loader_s"] = max(most["loader_s"], used.user + used.system)
        most["watch_s"] = time.thread_time()
        time.sleep(WATCH_S)


if __name__ == "__main__":
    main()
