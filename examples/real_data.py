"""What a tiny Gemma 4 learns from real logs, on two CPU cores in minutes.

    python examples/real_data.py toolcalls/train.jsonl [--prefix apibank] [--max-length 640] [--epochs 6]

Trains random weights on nine of ten rows that are short enough, and compares them on the tenth with what they were
before: the loss of what the model should have written, and what it writes. The commands are those for real models. The
results are in runs/real_data; an earlier one's are removed.
"""

import argparse
import json
import math
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from demo import gemma_dist, say, texts, train

if TYPE_CHECKING:
    from gemma_dist.data.encode import Encoded

HELD_OUT_EVERY = 10  # rows
SMOOTHING = 5.0  # how many observations the share of a token alone is worth beside the pairs that were seen
RUN = Path("runs/real_data")
WIDTH, LAYERS, VOCABULARY = 128, 4, 2048
COLUMNS = {  # a head, and the metric of gemma-dist evaluate
    "readable": "parse_ok",
    "calls when due": "call_recall",
    "text when due": "abstain_acc",
    "tools right": "tool_set_exact",
    "calls exact": "call_exact",
}


class Loss(NamedTuple):
    """Of the tokens that the model should have written, in nats."""

    total: float
    num_tokens: int


def main() -> None:
    options = parse_options()
    started = time.perf_counter()
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir(parents=True)
    model, trained = RUN / "model", RUN / "trained"
    num_rows = split(options.rows, options.prefix)
    make_model(RUN / "train.jsonl", model)
    shards, held_out = (shard(name, model, options.max_length) for name in ("train", "held_out"))
    train("launch/cpu_full.yaml", model, shards, trained, f"num_train_epochs={options.epochs}",
          "per_device_train_batch_size=2", "global_batch_size=4", "save_steps=100000")  # fmt: skip

    say(f"{options.rows.name}, rows {options.prefix}*: {num_rows}, every {HELD_OUT_EVERY}th held out")
    losses = {"counts of token pairs": count_pairs(model, shards, held_out)}
    metrics = {}
    for name, folder in {"random weights": model, "trained": trained}.items():
        losses[name] = held_out_loss(folder, held_out)
        metrics[name] = evaluate(folder, held_out, RUN / "eval" / name.replace(" ", "-"))
    print_table(losses, metrics)
    print(f"\n{time.perf_counter() - started:.0f} s in all")


def parse_options() -> argparse.Namespace:
    """What to train on, and how much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="a JSONL file of tool calling trajectories")
    parser.add_argument("--prefix", default="", help="only rows whose id begins so")
    parser.add_argument("--max-length", type=int, default=640, help="longer rows are left out (tokens)")
    parser.add_argument("--epochs", type=int, default=6)
    return parser.parse_args()


def split(rows: Path, prefix: str) -> int:
    """Write every tenth of the chosen rows to held_out.jsonl, the others to train.jsonl."""
    lines = rows.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if json.loads(line).get("id", "").startswith(prefix)]
    if len(lines) < HELD_OUT_EVERY:
        found = f"{len(lines)} rows whose id begins with {prefix!r}"
        sys.exit(f"{rows} holds {found}, but at least {HELD_OUT_EVERY} are needed; name another file or --prefix")
    held_out = lines[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    train = [line for number, line in enumerate(lines, 1) if number % HELD_OUT_EVERY]
    for name, chosen in (("train", train), ("held_out", held_out)):
        (RUN / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return len(lines)


def make_model(rows: Path, model: Path) -> None:
    """Random weights and a tokenizer that has seen the words of the training rows."""
    from gemma_dist.logs import read_jsonl
    from gemma_dist.model.tiny import write_tiny_model

    corpus = ["system", "model", "call:", "response:", "{value:"] * 50
    for row in read_jsonl(rows):
        corpus += [*texts(row["messages"]), " ".join(re.findall(r"\w+", json.dumps(row.get("tools", []))))]
    write_tiny_model(model, corpus=corpus, vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS)


def shard(name: str, model: Path, max_length: int) -> Path:
    """Shards of the rows of at most so many tokens."""
    shards = RUN / "shards" / name
    limit = ["--max-length", max_length, "--too-long", "drop"]
    gemma_dist("shard", RUN / f"{name}.jsonl", "--model", model, "--out", shards, *limit)
    return shards


def evaluate(model: Path, held_out: Path, out: Path) -> dict[str, Any]:
    """The metrics of `gemma-dist evaluate`."""
    gemma_dist("evaluate", "--model", model, "--data", held_out, "--out", out, "--max-new-tokens", 96,
               "--per-device-eval-batch-size", 32)  # fmt: skip
    metrics: dict[str, Any] = json.loads((out / "report.json").read_text())["metrics"]
    return metrics


def encoded(model: Path, shards: Path) -> "Iterator[Encoded]":
    """The rows of shards as token ids and labels."""
    from gemma_dist.config import EncodingConfig
    from gemma_dist.data.encode import load_encoder
    from gemma_dist.shards.reader import open_shards

    encoder, corpus = load_encoder(str(model), EncodingConfig()), open_shards(shards)
    return (encoder.encode(corpus.read(index)) for index in range(len(corpus)))


def held_out_loss(model: Path, held_out: Path) -> Loss:
    """By the model's own forward pass, row by row."""
    import torch

    from gemma_dist.model.load import load_for_evaluation

    loaded = load_for_evaluation(str(model), None)
    total, num_tokens = 0.0, 0
    for row in encoded(model, held_out):
        with torch.inference_mode():
            batch = {"input_ids": torch.tensor([row.input_ids]), "labels": torch.tensor([row.labels])}
            total += loaded(**batch).loss.item() * row.num_target_tokens
        num_tokens += row.num_target_tokens
    return Loss(total, num_tokens)


def count_pairs(model: Path, train: Path, held_out: Path) -> Loss:
    """By how often a token followed the one before it in what was to be learned: a model that looks one token back."""
    learned = [pair for row in encoded(model, train) for pair in target_pairs(row)]
    pairs, firsts = Counter(learned), Counter(before for before, _ in learned)
    tokens = Counter(token for _, token in learned)
    asked = [pair for row in encoded(model, held_out) for pair in target_pairs(row)]
    total = 0.0
    for before, token in asked:
        alone = (tokens[token] + 1) / (len(learned) + VOCABULARY)
        total -= math.log((pairs[before, token] + SMOOTHING * alone) / (firsts[before] + SMOOTHING))
    return Loss(total, len(asked))


def target_pairs(row: "Encoded") -> list[tuple[int, int]]:
    """Each trained token behind the one before it."""
    marked = pairwise(zip(row.input_ids, row.labels, strict=True))
    return [(before, token) for (before, _), (token, label) in marked if label == token]


def print_table(losses: dict[str, Loss], metrics: dict[str, dict[str, Any]]) -> None:
    """One row a model: loss and perplexity of a held-out token, and counts of held-out answers."""
    heads = ("loss", "perplexity", *COLUMNS)
    print(f"\n{'':<22}  " + "  ".join(f"{head:>8}" for head in heads))
    for name, loss in losses.items():
        mean = loss.total / loss.num_tokens
        cells = [f"{mean:.2f}", f"{math.exp(mean):,.0f}"]
        if name in metrics:
            found = [metrics[name][metric] for metric in COLUMNS.values()]
            cells += [f"{one['numerator']} of {one['denominator']}" for one in found]
        row = "  ".join(f"{cell:>{max(8, len(head))}}" for head, cell in zip(heads, cells, strict=False))
        print(f"{name:<22}  {row}")


if __name__ == "__main__":
    main()
