"""`gemma-dist doctor --train`: a few steps of each launch on this machine's devices, beside one process on its CPU.

A tiny Gemma 4, a few rows, an adapter, float32: losses and norms of gradients are to be those of the CPU. What is
written goes with the call. Never run on a GPU.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gemma_dist.health.gpus import gpus_at_hand
from gemma_dist.shipped import PROCESSES, RECIPES, shipped
from gemma_dist.start.doctor import FAULT, GOOD, Finding

ON_GPUS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
ON_CPU = ("cpu_ddp", "cpu_zero1", "cpu_zero2", "cpu_zero3", "cpu_fsdp2")
NUM_STEPS = 2
NUM_ROWS = 16
LOSS_OFF, GRAD_OFF = 1e-3, 2e-2  # of the CPU's: what the order of sums changes in float32, and more than that
TIMEOUT_S = 900.0  # of a launch, which may have to compile an operator first
HIDE_GPUS = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def try_launches(names: Sequence[str] = ()) -> Iterator[Finding]:
    """A finding for each launch, as it ends: those of `accelerate_configs/` of the given names, by default all for the
    devices that are here. Takes minutes."""
    num_gpus = len(gpus_at_hand())
    names = names or (ON_GPUS if num_gpus else ON_CPU)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_corpus(folder)
        expected = _steps(folder, "alone", [sys.executable], HIDE_GPUS, num_gpus)
        if isinstance(expected, str):
            yield Finding("train on the CPU", FAULT, expected, "mend this first: no launch was tried")
            return
        yield Finding("train on the CPU", GOOD, f"{NUM_STEPS} steps, loss {expected[-1]['loss']:.4f}")
        for name in ([] if names == ON_CPU or not num_gpus else ["one GPU"]) + list(names):
            yield _compare(name, _launched(folder, name, num_gpus), expected)


def _write_corpus(folder: Path) -> None:
    """The model and the shards that all launches train on."""
    from gemma_dist.config import ShardConfig
    from gemma_dist.model.tiny import write_tiny_model
    from gemma_dist.shards.sharding import run_shard

    write_tiny_model(folder / "model", style="e4b")
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Add up." + " Please." * (number % 5)},
                {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"n": number}}}]},
                {"role": "tool", "name": "add", "content": str(number)},
                {"role": "assistant", "content": f"It is {number}."},
            ]
        }
        for number in range(NUM_ROWS)
    ]
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run_shard([source], folder / "shards", str(folder / "model"), ShardConfig(), skip_invalid=False, num_workers=1)


def _launched(folder: Path, name: str, num_gpus: int) -> list[dict[str, Any]] | str:
    """The steps of a launch."""
    if name == "one GPU":
        return _steps(folder, "one", [sys.executable], {"CUDA_VISIBLE_DEVICES": "0"}, num_gpus)
    on_cpu = name.startswith("cpu_")
    num_processes = 2 if on_cpu else num_gpus
    config = shlex.quote(str(shipped(PROCESSES) / f"{name}.yaml"))
    launcher = f"accelerate launch --config_file {config} --num_processes {num_processes} --main_process_port 0"
    return _steps(folder, name, shlex.split(launcher), HIDE_GPUS if on_cpu else {}, num_gpus)


def _steps(
    folder: Path, name: str, launcher: list[str], environment: dict[str, str], num_gpus: int
) -> list[dict[str, Any]] | str:
    """The steps of a run, as metrics.jsonl has them; or why it failed, in a line."""
    batch = 2 * max(2, num_gpus)  # two micro-batches for each rank of the widest launch
    settings = {
        "model.model_name_or_path": folder / "model",
        "data.train": folder / "shards",
        "train.output_dir": folder / name,
        "train.max_steps": NUM_STEPS,
        "train.warmup_steps": 0,
        "train.per_device_train_batch_size": 1,
        "train.global_batch_size": batch,
    }
    recipe = shipped(RECIPES) / "cpu_lora.yaml"
    words = ["-m", "gemma_dist", "train", str(recipe), *(f"{key}={value}" for key, value in settings.items())]
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # accelerate's, ninja
    try:
        done = subprocess.run(
            [*launcher, *words],
            cwd=shipped(PROCESSES).parent,  # the configs name files from there
            env={**os.environ, "PATH": programs, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **environment},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {TIMEOUT_S:g} s"
    if done.returncode:
        lines = done.stderr.splitlines()
        told = [line for line in lines if "error: " in line.lower()] or lines[-1:] or [f"exit code {done.returncode}"]
        return told[0][:300]
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _compare(name: str, steps: list[dict[str, Any]] | str, expected: list[dict[str, Any]]) -> Finding:
    """The finding of a launch, from its steps and the CPU's."""
    what = f"train: {name}"
    if isinstance(steps, str):
        return Finding(what, FAULT, steps, "mend what it names; docs/launch.md says which launch works without")
    off = {
        key: max(abs(one[key] - other[key]) / abs(other[key]) for one, other in zip(steps, expected, strict=True))
        for key in ("loss", "grad_norm")
    }
    found = f"{len(steps)} steps: loss {off['loss']:.1e} and gradient {off['grad_norm']:.1e} off the CPU's"
    if off["loss"] > LOSS_OFF or off["grad_norm"] > GRAD_OFF:
        return Finding(
            what, FAULT, found, "do not train with it; please report the lines of `gemma-dist doctor --json`"
        )
    return Finding(what, GOOD, found)
