"""The memory of a training step: simulated, in closed form, and measured in tiny runs of the real trainer.

    python benchmarks/memory.py [--only NAME …]

Each run is two steps on the CPU. The peak of the second is the sum of what the trainer holds before it and of the
events of torch's allocator (`torch.profiler`); the simulation gets the same micro-batches, and the CPU's kernels. TRL's
head works on tiles of 128 instead of 32,768 columns in both, which would hide all else of a tiny model.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.support.ranks import ENVIRONMENT  # noqa: E402 (found by the line above)

WIDTH = 42  # of a name


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME")
    options = parser.parse_args()
    os.environ |= ENVIRONMENT
    os.chdir(ROOT)
    from gemma_dist.model.tiny import write_tiny_model
    from tests.support.memory import CELLS, compare, write_shards

    print(f"{'run':{WIDTH}} {'measured MiB':>13} {'simulated MiB':>13} {'error':>8}   most of it")
    errors: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or CELLS:
            cell = CELLS[name]
            model = Path(folder) / f"{cell.style}-{cell.dtype}"
            shards = Path(folder) / f"{model.name}-{cell.images}"
            if not model.exists():
                write_tiny_model(model, style=cell.style, dtype=cell.dtype)
            if not shards.exists():
                write_shards(shards, model, images=cell.images)
            result = compare(cell, model, shards / "shards", Path(folder) / f"out-{len(errors)}")
            errors.append(abs(result.error))
            parts = list(result.simulated.parts.items())[:3]
            most = ", ".join(f"{part} {size / 2**20:.0f}" for part, size in parts)
            sizes = f"{result.measured / 2**20:13.2f} {result.simulated.peak_bytes / 2**20:13.2f}"
            print(f"{name:{WIDTH}} {sizes} {result.error:>+8.2%}   {most}", flush=True)
    print(f"largest error: {max(errors):.2%}")


if __name__ == "__main__":
    main()
