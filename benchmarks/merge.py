"""What a merge costs: time beside PEFT's and beside `cp` of the same bytes, and memory.

    python benchmarks/merge.py [--only speed|memory] [--rounds 5] [--folder FOLDER]

speed: a random Gemma 4 (31B's kind) of 2 and of 4 GB in bfloat16, and an adapter of rank 16 on all its linear layers.
Each contestant runs in a process of its own and is timed after its imports, with all bytes on the disk at the end; in
turns, with the files in the page cache; medians.
memory: anonymous memory over that after the imports, for a tensor of 1 GB, and where it goes to 4 bit and back.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

MB, RANK = 10**6, 16
LINEARS = r"model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
GIANT = (32_768, 16_384)  # 1 GiB in bfloat16


def make_model(folder: Path, times: int) -> Path:
    """A model of `times` 2 GB with its adapter beside it, made once."""
    import torch
    from loading import make_model as make_random
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    base = folder / f"base-{times}"
    if not base.exists():
        make_random(base, "31b", times=times)
        model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
        adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        adapted.save_pretrained(folder / f"adapter-{times}")
    return base


def make_giant(folder: Path) -> Path:
    """A folder with one linear layer of 1 GB, and adapters for it: one trained on it in 4 bits."""
    import torch
    from safetensors.torch import save_file

    base, name = folder / "base-giant", "model.language_model.layers.0.mlp.gate_proj"
    if not base.exists():
        base.mkdir()
        (base / "config.json").write_text(json.dumps({"model_type": "gemma4", "architectures": ["none"]}))
        torch.manual_seed(0)
        weight = torch.empty(GIANT, dtype=torch.bfloat16).normal_(std=0.02)
        save_file({f"{name}.weight": weight}, base / "model.safetensors", {"format": "pt"})
        factors = {"lora_A": torch.randn(RANK, GIANT[1]), "lora_B": 0.01 * torch.randn(GIANT[0], RANK)}
        four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        for adapter, quantization in (("giant", None), ("giant-4-bit", {**four_bit, "modules": [name]})):
            out = folder / f"adapter-{adapter}"
            out.mkdir()
            tensors = {f"base_model.model.{name}.{kind}.weight": factor for kind, factor in factors.items()}
            save_file(tensors, out / "adapter_model.safetensors")
            settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": [name]}
            (out / "adapter_config.json").write_text(json.dumps(settings))
            (out / "gemma_dist.json").write_text(json.dumps({"quantization": quantization}))
    return base


def merge_with_ours(base: Path, adapter: Path, out: Path) -> Callable[[], object]:
    """`gemma-dist merge`, imported."""
    from transformers import AutoTokenizer  # noqa: F401 (with which the result's is tried)

    from gemma_dist.merge.run import merge

    if json.loads((adapter / "gemma_dist.json").read_text() if (adapter / "gemma_dist.json").exists() else "{}"):
        import bitsandbytes.functional  # noqa: F401
    return lambda: merge(base, adapter, out, verify=False, base_weights="as_trained")


def merge_with_peft(base: Path, adapter: Path, out: Path) -> Callable[[], object]:
    """PEFT's way, imported."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, Gemma4ForConditionalGeneration  # noqa: F401

    def work() -> None:
        model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
        sync(out)

    return work


def copy(base: Path, adapter: Path, out: Path) -> Callable[[], object]:
    """No merge at all: `cp` of the base's weights."""

    def work() -> None:
        out.mkdir()
        subprocess.run(["cp", *base.glob("*.safetensors"), out], check=True)
        sync(out)

    return work


CONTESTANTS = {"cp": copy, "gemma-dist merge": merge_with_ours, "PEFT": merge_with_peft}


def sync(folder: Path) -> None:
    """All bytes of a folder's files on the disk."""
    subprocess.run(["sync", *folder.iterdir()], check=True)


def run_here(contestant: str, base: Path, adapter: Path, out: Path, *, watched: bool) -> None:
    """In a process of its own: prepare, measure, and print what it took."""
    from loading import Memory

    work = CONTESTANTS[contestant](base, adapter, out)
    memory, start = Memory() if watched else None, time.monotonic()
    work()
    print(json.dumps({"seconds": time.monotonic() - start, **(memory.stop() if memory else {})}))


def run(contestant: str, base: Path, adapter: Path, *, watched: bool) -> dict[str, float]:
    """What one run of a contestant took: its memory where it is watched, which a thread does every millisecond, and
    takes part of the time."""
    out = base.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(["sync"], check=True)  # nothing of the one before is still to be written
    words = [sys.executable, __file__, "--run", contestant, str(base), str(adapter), str(out)]
    words += ["--watched"] if watched else []
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{contestant} failed:\n{done.stderr[-8000:]}")
    shutil.rmtree(out)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def speed(folder: Path, rounds: int) -> None:
    """Seconds of each contestant on a smaller and a larger model."""
    for times in (1, 2):
        base = make_model(folder, times)
        num_bytes = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        for path in base.glob("*.safetensors"):  # into the page cache
            path.read_bytes()
        adapter = folder / f"adapter-{times}"
        peaks = {name: run(name, base, adapter, watched=True)["peak"] for name in CONTESTANTS}
        took: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        for _ in range(rounds):
            for name, seconds in took.items():
                seconds.append(run(name, base, adapter, watched=False)["seconds"])
        print(f"\nspeed: {num_bytes / MB:,.0f} MB of bfloat16, rank {RANK}; median of {rounds}, least and most")
        print(f"  {'':18} {'seconds':>8} {'least':>7} {'most':>7} {'x cp':>6} {'MB of memory':>13}")
        limit = statistics.median(took["cp"])
        for name, seconds in took.items():
            median, peak = statistics.median(seconds), peaks[name] / MB
            shown = f"{median:>8.2f} {min(seconds):>7.2f} {max(seconds):>7.2f} {median / limit:>6.2f}"
            print(f"  {name:18} {shown} {peak if name != 'cp' else 0:>13,.0f}", flush=True)


def memory(folder: Path) -> None:
    """Memory of ours where a single tensor is large."""
    base = make_giant(folder)
    print(f"\nmemory: one tensor of {GIANT[0] * GIANT[1] * 2 / MB:,.0f} MB")
    for adapter in ("giant", "giant-4-bit"):
        one = run("gemma-dist merge", base, folder / f"adapter-{adapter}", watched=True)
        print(f"  {adapter:18} {one['seconds']:>8.2f} s {one['peak'] / MB:>7,.0f} MB", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["speed", "memory"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keep the models here for the next time")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--watched", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_here(options.run[0], *map(Path, options.run[1:]), watched=options.watched)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if options.only != "memory":
            speed(folder, options.rounds)
        if options.only != "speed":
            memory(folder)


if __name__ == "__main__":
    main()
