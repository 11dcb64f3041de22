"""What it costs in time to keep weights in host memory: steps of a model with them there, and on the device.

    python benchmarks/offload.py [experts] [ple] [--steps N]

experts: trains a random Gemma 4 of the 26B-A4B style in NF4, forward and backward with checkpointing, in turns with its
4-bit experts on the device and on the host, and prints the median time of a step and the ratio. The losses must be
equal to the last bit. On a GPU copies run beside what is computed; on a CPU a copy is from memory to memory and nothing
overlaps, so the ratio says what the copies themselves cost there, and nothing of PCI Express.

ple: steps with per-layer embeddings in the base's file and on the device (`per_layer.py`), in CPU time, as other jobs
use the machine. `docs/benchmarks.md` explains the tables.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

NUM_TOKENS = 512
STACKS = {"num_experts": 32, "top_k_experts": 4, "moe_intermediate_size": 256}


def experts(num_steps: int) -> None:
    """The 4-bit experts of a 26B-A4B style: on the device against on the host."""
    import torch

    from gemma_dist.config import LoraConfig, ModelConfig, QuantizationConfig
    from gemma_dist.model import load, tiny

    text_config = tiny._text_config
    tiny._text_config = lambda *words: text_config(*words) | STACKS
    steps: dict[str, Callable[[], float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        tiny.write_tiny_model(model, style="26b", dtype="bfloat16", hidden_size=512, num_hidden_layers=8)
        for where in ("gpu", "host"):
            settings = ModelConfig(model_name_or_path=str(model), dtype="bfloat16", experts=where)
            loaded = load.load_model(settings, QuantizationConfig(bnb_4bit_compute_dtype="bfloat16"), packing=False)
            torch.manual_seed(0)
            adapted = load.add_adapter(loaded, LoraConfig(), zero3=False).train()
            adapted.activation_checkpointing_enable({"use_reentrant": False})
            steps[where] = partial(_step, adapted)
    times, losses = _in_turns(steps, num_steps)
    assert losses["gpu"] == losses["host"], losses
    device = load.device()
    print(f"experts, {NUM_TOKENS:,} tokens a step on {device}: the losses are equal to the last bit")
    for where, seconds in times.items():
        print(f"  {where:5} {1000 * seconds:8.0f} ms a step, {seconds / times['gpu']:.2f} of that on the device")


def _step(model: Any) -> float:
    """The loss of a forward pass, after its backward pass too."""
    import torch

    ids = torch.randint(50, 300, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)
    model.zero_grad()
    with torch.autocast(ids.device.type, torch.bfloat16):
        loss = model(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids), labels=ids).loss
    loss.backward()
    return loss.item()


def _in_turns(steps: dict[str, Callable[[], float]], num_steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds and last result of each, one step of each after the other, so that what else the machine does
    meets them alike; the first step of each is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    results: dict[str, float] = {}
    for number in range(num_steps + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            results[name] = step()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}, results


def ple(num_steps: int) -> None:
    """Per-layer embeddings of E2B and E4B."""
    import per_layer

    per_layer.ple(num_steps)


SECTIONS: dict[str, Callable[[int], None]] = {"experts": experts, "ple": ple}


def main() -> None:
    """Print the sections that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    for name in options.sections or SECTIONS:
        SECTIONS[name](options.steps)


if __name__ == "__main__":
    main()
