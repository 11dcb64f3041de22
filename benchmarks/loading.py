"""What loading a model takes of a rank's memory: a real Gemma 4 of 2 GB in bfloat16, alone and at ZeRO-3 on two ranks.

    python benchmarks/loading.py [--style 31b|e4b|26b] [--folder FOLDER]

Loads it as training does, each case in fresh processes, and prints a table; FOLDER keeps the model for the next time.
Private memory is what a rank alone pays for. Mapped files are page cache, which the ranks of a node share and the
kernel takes back when it needs room. `docs/benchmarks.md` explains the table.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: one core a process
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parents[1]
ZERO3 = "accelerate_configs/cpu_zero3.yaml"
MB = 10**6
# Sizes that make about a billion parameters of each style; the per-layer embeddings of `e4b` weigh a third, as in E4B.
SIZES = {
    "31b": {"hidden_size": 1536, "num_hidden_layers": 36, "intermediate_size": 4096, "vocab_size": 32_768},
    "26b": {"hidden_size": 1536, "num_hidden_layers": 24, "intermediate_size": 4096, "vocab_size": 32_768},
    "e4b": {"hidden_size": 1024, "num_hidden_layers": 26, "intermediate_size": 4096, "vocab_size": 49_152},
}
WITHOUT_OURS = "bf16, ZeRO-3, as it comes"
CASES = {  # name: (recipe, settings, ranks at ZeRO-3 or 1)
    "bf16, one process": ("cpu_lora", ["model.dtype=bfloat16"], 1),
    "bf16, ZeRO-3": ("cpu_lora", ["model.dtype=bfloat16"], 2),
    WITHOUT_OURS: ("cpu_lora", ["model.dtype=bfloat16"], 2),
    "QLoRA, one process": ("cpu_qlora", ["model.dtype=bfloat16", "bnb_4bit_compute_dtype=bfloat16"], 1),
    "QLoRA, ZeRO-3": ("cpu_qlora", ["model.dtype=bfloat16", "bnb_4bit_compute_dtype=bfloat16"], 2),
}


def make_model(folder: Path, style: str, *, times: int = 1) -> None:
    """Write a random Gemma 4 in bfloat16, with so many `times` the layers, to `folder`, as safetensors of at most
    300 MB."""
    import torch
    from transformers import Gemma4ForConditionalGeneration

    from gemma_dist.model.tiny import DEFAULT_CORPUS, tiny_config, tiny_processor

    sizes = dict(SIZES[style])
    shape = {name: sizes.pop(name) for name in ("hidden_size", "num_hidden_layers")}
    processor = tiny_processor(DEFAULT_CORPUS, style=style, vocab_size=1024, chat_template=None)
    shape["num_hidden_layers"] *= times
    config = tiny_config(processor.tokenizer, style=style, **shape)
    config.text_config.update(sizes)
    if style == "e4b":
        config.text_config.update(
            {"vocab_size_per_layer_input": sizes["vocab_size"], "hidden_size_per_layer_input": 256}
        )
    config.dtype = torch.bfloat16
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Gemma4ForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="300MB")
    processor.save_pretrained(folder)


class Memory:
    """The peak of this process's memory since `start`, in bytes: sampled every millisecond by a thread."""

    def __init__(self) -> None:
        self.start = _status()
        self.peak = dict(self.start)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stopped.wait(0.001):
            for name, value in _status().items():
                self.peak[name] = max(self.peak[name], value)

    def stop(self) -> dict[str, float]:
        """Peak and present memory over the start."""
        self._stopped.set()
        self._thread.join()
        end = _status()
        return {
            "peak": self.peak["private"] - self.start["private"],
            "after": end["private"] - self.start["private"],
            "mapped": self.peak["mapped"] - self.start["mapped"],
        }


def _status() -> dict[str, int]:
    """Bytes that are private (anonymous, and shared memory between the ranks) and pages of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    size = {name: int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem", "RssFile")}
    return {"private": size["RssAnon"] + size["RssShmem"], "mapped": size["RssFile"]}


def load_and_measure(case: str, model: Path, out: Path) -> None:
    """What one rank does: load as `gemma-dist train` does, and write what it took to `out`/<rank>.json."""
    from gemma_dist import world
    from gemma_dist.batch_plan import batch_plan
    from gemma_dist.model import load
    from gemma_dist.recipe import load_config
    from gemma_dist.resolve import Run
    from gemma_dist.topology import current_topology
    from gemma_dist.train.trainer import training_arguments

    recipe, settings, _ = CASES[case]
    paths = [f"model_name_or_path={model}", f"output_dir={out}", "bf16=true", "data.train=none"]
    config = load_config(REPOSITORY / f"launch/{recipe}.yaml", [*paths, *settings])
    topology, schedule = current_topology(), None  # no data is read
    plan = batch_plan(config, topology.num_processes)
    arguments = training_arguments(Run(config, topology, plan, schedule, num_steps=1))  # type: ignore[arg-type]
    # What the first load of a process imports and starts.
    tiny = config.model.model_copy(update={"model_name_or_path": str(model / "tiny")})
    load.load_model(tiny, config.quantization, packing=False)

    if case == WITHOUT_OURS:
        load.loading_partitions = contextlib.nullcontext  # type: ignore[assignment]

    world.barrier()
    memory, start = Memory(), time.monotonic()
    loaded = load.load_model(config.model, config.quantization, packing=False)
    seconds = time.monotonic() - start
    (out / f"{world.rank()}.json").write_text(json.dumps(memory.stop() | {"seconds": seconds}))
    world.barrier()
    world.disconnect()
    del arguments, loaded  # the one holds DeepSpeed's configuration, which must outlive the loading


def measure(case: str, model: Path) -> list[dict[str, float]]:
    """What `case` took, one entry a rank."""
    num_ranks = CASES[case][2]
    launch = ["-m", "accelerate.commands.launch", "--config_file", ZERO3, "--main_process_port", "0"]
    with tempfile.TemporaryDirectory() as out:
        words = [__file__, "--folder", str(model), "--rank-of", case, out]
        run = subprocess.run(
            [sys.executable, *(launch if num_ranks > 1 else []), *words],
            cwd=REPOSITORY,
            # The C library else keeps what was freed, or not, by chance: in one run of QLoRA as much as the model.
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "MALLOC_MMAP_THRESHOLD_": "131072"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if run.returncode:
            sys.exit(f"{case} failed:\n{run.stdout[-8000:]}")
        return [json.loads((Path(out) / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--style", choices=sorted(SIZES), default="31b")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", choices=sorted(CASES))
    parser.add_argument("--rank-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        load_and_measure(options.rank_of[0], options.folder, Path(options.rank_of[1]))
        return

    with tempfile.TemporaryDirectory() as temporary:
        model = (options.folder or Path(temporary)) / f"loading-{options.style}"
        if not model.exists():
            from gemma_dist.model.tiny import write_tiny_model

            make_model(model, options.style)
            write_tiny_model(model / "tiny", style=options.style, dtype="bfloat16")
        files = [path.stat().st_size for path in model.glob("*.safetensors")]
        whole = sum(files)
        title = f"{options.style} style, {whole / MB:,.0f} MB of bfloat16 in {len(files)} files"
        print(f"loading: {title}; MB over the start, of each rank")
        print(f"  {'':25} {'rank':>4} {'peak':>7} {'after':>7} {'mapped':>7} {'seconds':>8}")
        for case in [options.only] if options.only else CASES:
            for rank, one in enumerate(measure(case, model)):
                sizes = " ".join(f"{one[name] / MB:7,.0f}" for name in ("peak", "after", "mapped"))
                print(f"  {case:25} {rank:4} {sizes} {one['seconds']:8.1f}", flush=True)


if __name__ == "__main__":
    main()
