"""What it costs in time to keep weights in host memory: steps of a model with them there, and on the device.

    python benchmarks/offload.py [ple] [--steps N]

CPU time, as other jobs use the machine. `docs/benchmarks.md` explains the tables.
"""

import argparse
import os
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def ple(num_steps: int) -> None:
    """Per-layer embeddings of E2B and E4B."""
    import per_layer

    per_layer.ple(num_steps)


SECTIONS: dict[str, Callable[[int], None]] = {"ple": ple}


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
