"""Per-layer embeddings on the host against on the device, for `offload.py`: what a step costs, and what a gather."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gemma_dist.config import LoraConfig, ModelConfig
from gemma_dist.model.load import add_adapter, load_model, read_config
from gemma_dist.model.per_layer import INDEX, ROWS, TABLE, PerLayerTable, open_table
from gemma_dist.model.tiny import DEFAULT_CORPUS, tiny_config, tiny_processor
from gemma_dist.tensorfile import Entry, header_bytes, open_tensors

WARM_UP, STEP_TOKENS = 2, 512
LAYERS, WIDTH, VOCABULARY = 8, 256, 16_384  # of the model whose steps are timed
ROW = 42 * 256  # values of a row of E4B's table
NUM_ROWS, NUM_GATHERS, GATHER_TOKENS = 16_384, 7, 4096
MIB = 2**20


def ple(num_steps: int) -> None:
    """Per-layer embeddings in the base's file, against those in the model."""
    with tempfile.TemporaryDirectory(prefix="ple-") as folder:
        steps(Path(folder) / "model", num_steps)
        gathers(Path(folder) / "rows.safetensors")


def steps(folder: Path, num_steps: int) -> None:
    """LoRA steps of a model whose table is most of it, in turns; rows come from a thread, one step ahead."""
    make_model(folder)
    config, settings = read_config(str(folder)), ModelConfig(model_name_or_path=str(folder), dtype="float32")
    table = open_table(str(folder), config, torch.float32)
    assert table is not None
    models = {
        "on the device": add_adapter(load_model(settings, None, packing=False), LoraConfig(), zero3=False),
        "on the host": add_adapter(load_model(settings, None, packing=False, table=table), LoraConfig(), zero3=False),
    }
    feeds = {"on the device": _batches(None), "on the host": _batches(table)}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    losses: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(num_steps + WARM_UP):
        for name, model in models.items():
            start = time.process_time()
            loss = model(**next(feeds[name])).loss
            loss.backward()
            model.zero_grad()
            seconds[name].append(time.process_time() - start)
            losses[name].append(loss.item())
    share = VOCABULARY * LAYERS * WIDTH / sum(parameter.numel() for parameter in models["on the device"].parameters())
    print(f"\nple: LoRA steps of {STEP_TOKENS:,} tokens, float32; the table is {share:.0%} of the model's weights")
    print(f"  {'':14} {'CPU ms a step (median)':>24} {'ratio':>8} {'mean loss':>12}")
    first = median(seconds["on the device"][WARM_UP:])
    for name, times in seconds.items():
        taken = median(times[WARM_UP:])
        print(f"  {name:14} {1000 * taken:24.1f} {taken / first:8.3f} {sum(losses[name]) / len(times):12.7f}")


def make_model(folder: Path) -> None:
    """A random Gemma 4 in the style of E4B whose table is large beside it."""
    from transformers import Gemma4ForConditionalGeneration

    processor = tiny_processor(DEFAULT_CORPUS, style="e4b", vocab_size=1024, chat_template=None)
    config = tiny_config(processor.tokenizer, style="e4b", hidden_size=256, num_hidden_layers=LAYERS)
    config.text_config.update(
        {"vocab_size_per_layer_input": VOCABULARY, "vocab_size": VOCABULARY, "hidden_size_per_layer_input": WIDTH}
    )
    torch.manual_seed(0)
    Gemma4ForConditionalGeneration(config).save_pretrained(folder)


def _batches(table: PerLayerTable | None) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of random tokens, always the same, each prepared while the one before it is trained on."""
    generator = torch.Generator().manual_seed(0)

    def prepare(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        batch = {"input_ids": ids, "labels": ids, "mm_token_type_ids": torch.zeros_like(ids)}
        return batch if table is None else table.add_rows(batch)

    with ThreadPoolExecutor(1) as pool:
        coming = None
        while True:
            ids = torch.randint(1000, VOCABULARY, (1, STEP_TOKENS), generator=generator)
            before, coming = coming, pool.submit(prepare, ids)
            if before is not None:
                yield before.result()


def gathers(path: Path) -> None:
    """Seconds for the rows of a sequence, of E4B's size, from a mapped file that is in the page cache or not."""
    with path.open("wb") as file:
        entry = Entry("BF16", (NUM_ROWS, ROW), 0, 2 * NUM_ROWS * ROW)
        file.write(header_bytes({f"{TABLE}.weight": entry}, {}))
        for _ in range(NUM_ROWS // 256):
            file.write(os.urandom(2 * 256 * ROW))
        file.flush()
        os.fsync(file.fileno())
    config = tiny_config(
        tiny_processor(DEFAULT_CORPUS, style="e4b", vocab_size=1024, chat_template=None).tokenizer,
        style="e4b",
        hidden_size=128,
        num_hidden_layers=42,
    )
    config.text_config.update({"vocab_size_per_layer_input": NUM_ROWS, "hidden_size_per_layer_input": 256})

    def opened() -> PerLayerTable:
        return PerLayerTable(open_tensors(path), f"{TABLE}.weight", config, torch.bfloat16)

    def evicted() -> PerLayerTable:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return opened()

    print(f"\nple: rows of {GATHER_TOKENS:,} tokens from a file, {2 * ROW:,} bytes each as in E4B; ms")
    print(f"  {'':22} {'distinct tokens':>16} {'MiB':>8} {'median':>8} {'worst':>8} {'CPU':>8}")
    warm = opened()
    warm.gather(torch.arange(NUM_ROWS)[None])
    sources: dict[str, Callable[[], PerLayerTable]] = {"in the page cache": lambda: warm, "on the disk": evicted}
    for name, source in sources.items():
        if name == "on the disk":
            del warm
        for num_distinct in (GATHER_TOKENS // 4, GATHER_TOKENS):
            _print_gathers(name, source, num_distinct)


def _print_gathers(name: str, source: Callable[[], PerLayerTable], num_distinct: int) -> None:
    """One line of the table."""
    taken, busy, size = [], [], 0.0
    for number in range(NUM_GATHERS):
        generator = torch.Generator().manual_seed(number)
        distinct = 100 + torch.randperm(NUM_ROWS - 100, generator=generator)[:num_distinct]
        ids = distinct.repeat(GATHER_TOKENS // num_distinct)[torch.randperm(GATHER_TOKENS, generator=generator)]
        table: Any = source()
        start, start_busy = time.perf_counter(), time.process_time()
        batch = table.add_rows({"input_ids": ids[None]})
        taken.append(1000 * (time.perf_counter() - start))
        busy.append(1000 * (time.process_time() - start_busy))
        assert batch[INDEX].shape == (1, GATHER_TOKENS)
        size = batch[ROWS].nbytes / MIB
    print(f"  {name:22} {num_distinct:16,} {size:8.1f} {median(taken):8.1f} {max(taken):8.1f} {median(busy):8.1f}")
