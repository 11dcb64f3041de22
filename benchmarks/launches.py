"""Launches of kernels in a micro-batch of 4,096 tokens, counted on fakes of each model's true shape.

    python benchmarks/launches.py

Of attention over packs alone: forward, the second forward of checkpointing, and backward, over all layers.
`tests/support/launches.py` says what a launch is.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    from transformers import AutoConfig

    from tests.support.launches import PACKS, of_attention

    print(f"{'model':8} {'pack':20} {'calls of SDPA':>14} {'launches':>9} {'with checkpointing':>19} {'once':>5}")
    for model in sys.argv[1:] or ("e2b", "e4b", "12b", "26b", "31b"):
        text = AutoConfig.from_pretrained(f"{ROOT}/tests/shapes/{model}.json").get_text_config()
        for name, sizes in PACKS.items():
            plain, twice = (of_attention(text, sizes, checkpointing=checkpointing) for checkpointing in (False, True))
            counts = f"{plain['calls']:>14,} {plain['layers']:>9,} {twice['layers']:>19,} {twice['once']:>5}"
            print(f"{model:8} {name:20} {counts}")


if __name__ == "__main__":
    main()
