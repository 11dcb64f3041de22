"""What an export of a ZeRO-3 checkpoint costs: time beside `cp` of the same result, and memory.

    python benchmarks/export.py [--style 31b|e4b|26b] [--ranks 4] [--rounds 3] [--folder FOLDER]

A random Gemma 4 of 2 GB in bfloat16, and the folder that DeepSpeed's engine would write of it: float32 weights of
`--ranks` ranks, twice those bytes, without the optimizer's moments, which an export does not read. Each contestant runs
in a process of its own and is timed after its imports, with all bytes on the disk at the end; in turns, with the files
in the page cache as far as they fit; medians. Memory is anonymous memory over that after the imports. The result is
compared with the model tensor by tensor.
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

MB = 10**6


def write_zero3(model: Path, out: Path, num_ranks: int) -> None:
    """The files of each rank for a model folder, in the layout of DeepSpeed 0.19 (`gemma_dist/export/zero.py`)."""
    import torch

    from gemma_dist.merge.folders import open_base

    base = open_base(model)
    inner = out / "global_step1"
    inner.mkdir(parents=True)
    shutil.copyfile(model / "config.json", out / "config.json")
    where = {name: shard for shard in base.shards for name in shard.entries}
    buffers = [name for name in where if name.endswith(("layer_scalar", "_min", "_max", "std_bias", "std_scale"))]
    shapes = {name: torch.Size(where[name].entries[name].shape) for name in where if name not in buffers}
    sizes = {name: -(-shape.numel() // num_ranks) for name, shape in shapes.items()}
    for rank in range(num_ranks):
        module = {name: where[name].read(name) for name in buffers} | {name: torch.empty(0) for name in shapes}
        state = {"module": module, "buffer_names": buffers, "param_shapes": [shapes], "shared_params": {}}
        torch.save(
            state | {"dp_world_size": num_ranks, "global_steps": 1},
            inner / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
        )
        flat, at = torch.zeros(sum(sizes.values())), 0
        for name, size in sizes.items():
            own = where[name].read(name).view(-1)[rank * size : (rank + 1) * size]
            flat[at : at + len(own)] = own
            at += size
        torch.save(
            {"optimizer_state_dict": {"zero_stage": 3, "partition_count": num_ranks, "fp32_flat_groups": [flat]}},
            inner / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )


def export_with_ours(model: Path, checkpoint: Path, out: Path) -> Callable[[], object]:
    """`gemma-dist export`, imported."""
    from transformers import Gemma4ForConditionalGeneration  # noqa: F401 (whose tensors the result's are to be)

    from gemma_dist.config_merge import ExportConfig
    from gemma_dist.export.run import export

    return lambda: export(checkpoint, out, ExportConfig())


def copy(model: Path, checkpoint: Path, out: Path) -> Callable[[], object]:
    """No export at all: `cp` of a result's weights."""

    def work() -> None:
        out.mkdir()
        files = [*model.glob("*.safetensors")]
        subprocess.run(["cp", *files, out], check=True)
        subprocess.run(["sync", *out.iterdir()], check=True)

    return work


CONTESTANTS = {"cp": copy, "gemma-dist export": export_with_ours}


def run_here(contestant: str, model: Path, checkpoint: Path, out: Path) -> None:
    """In a process of its own: prepare, measure, and print what it took."""
    from loading import Memory

    work = CONTESTANTS[contestant](model, checkpoint, out)
    memory, start = Memory(), time.monotonic()
    work()
    print(json.dumps({"seconds": time.monotonic() - start, **memory.stop()}))


def run(contestant: str, model: Path, checkpoint: Path, out: Path) -> dict[str, float]:
    """What one run of a contestant took; its result stays at `out`."""
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(["sync"], check=True)  # nothing of the one before is still to be written
    words = [sys.executable, __file__, "--run", contestant, str(model), str(checkpoint), str(out)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{contestant} failed:\n{done.stderr[-8000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def require_equal(model: Path, out: Path) -> int:
    """How many tensors both have, which are to be equal."""
    import torch

    from gemma_dist.merge.folders import open_base

    before, after = ({name: shard for shard in open_base(one).shards for name in shard.entries} for one in (model, out))
    if before.keys() != after.keys():
        sys.exit(f"other tensors: {sorted(before.keys() ^ after.keys())[:3]}")
    for name, shard in before.items():
        if not torch.equal(shard.read(name), after[name].read(name)):
            sys.exit(f"{name} differs")
    return len(before)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--style", choices=["31b", "e4b", "26b"], default="31b")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the model and the checkpoint here for the next time")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_here(options.run[0], *map(Path, options.run[1:]))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model, checkpoint = folder / f"model-{options.style}", folder / f"zero3-{options.style}-{options.ranks}"
        if not model.exists():
            from loading import make_model

            make_model(model, options.style)
        if not checkpoint.exists():
            write_zero3(model, checkpoint, options.ranks)
        took: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
        for _ in range(options.rounds):
            for name, runs in took.items():
                runs.append(run(name, model, checkpoint, Path(temporary) / "out"))
        num_tensors = require_equal(model, Path(temporary) / "out")
        num_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        print(f"{num_bytes / MB:,.0f} MB of bfloat16 from ZeRO-3 on {options.ranks} ranks; median of {options.rounds}")
        print(f"  {'':18} {'seconds':>8} {'least':>7} {'most':>7} {'x cp':>6} {'MB of memory':>13}")
        limit = statistics.median(one["seconds"] for one in took["cp"])
        for name, runs in took.items():
            seconds = sorted(one["seconds"] for one in runs)
            median, peak = statistics.median(seconds), max(one["peak"] for one in runs) / MB
            shown = f"{median:>8.2f} {seconds[0]:>7.2f} {seconds[-1]:>7.2f} {median / limit:>6.2f}"
            print(f"  {name:18} {shown} {peak if name != 'cp' else 0:>13,.0f}")
        print(f"  all {num_tensors} tensors of the result equal the model's")


if __name__ == "__main__":
    main()
