"""What a training step waits for, counted beside bare TRL: waits for the device, collectives and their bytes, in a
micro-batch and at the end of a step (`tests/support/steps.py` says what counts as which).

    python benchmarks/step.py [--launch single|cpu_ddp|cpu_zero2|cpu_zero3|cpu_fsdp2]… [--tuning full|lora|qlora]…
                              [--sequence N] [--style e4b] [--json]

A tiny model in micro-batches of one row; a third of our rows have images. TRL takes the others. In 4 bits, at FSDP2,
and where ranks share a sequence (`--sequence`, packed alone), only ours is counted.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.support.ranks import ENVIRONMENT  # noqa: E402 (found by the line above)

LAUNCHES = ("single", "cpu_ddp", "cpu_zero2", "cpu_zero3", "cpu_fsdp2")
TUNINGS = ("full", "lora", "qlora")


def show(rows: list[dict[str, Any]]) -> None:
    parts = {"micro_batch": "in a micro-batch", "end": "at the end of a logged step"}
    for part, title in parts.items():
        print(f"\n{title}: waits for the device, collectives, bytes; by the package that causes them")
        for row in rows:
            found = row[part]
            words = [row["launch"], row["tuning"], "packed" if row["packing"] else "padded", row["trainer"]]
            words += [f"shared by {row['sequence']}"] if row["sequence"] > 1 else []
            cells = [f"{key} {found[key] or 0}" for key in ("waits", "collectives", "bytes")]
            print(f"  {', '.join(words):36} {'; '.join(cells)}; {found['operators']} operators")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--launch", choices=LAUNCHES, action="append")
    parser.add_argument("--tuning", choices=TUNINGS, action="append")
    parser.add_argument("--sequence", type=int, default=1, metavar="N")
    parser.add_argument("--style", default="e4b")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ |= ENVIRONMENT
    from tests.support.steps import Counting, measure, prepare

    folder = Path(tempfile.mkdtemp(prefix="step-"))
    try:
        prepare(folder, options.style)
        kinds = product(options.launch or ("single", "cpu_ddp"), options.tuning or ("full",), (False, True))
        rows = []
        for launch, tuning, packing in kinds:
            if options.sequence > 1:
                if packing:
                    rows.append(measure(folder, Counting(launch, tuning, packing, sequence=options.sequence)))
                continue
            if tuning != "qlora" and launch != "cpu_fsdp2":
                rows.append(measure(folder, Counting(launch, tuning, packing, bare=True)))
            rows.append(measure(folder, Counting(launch, tuning, packing)))
    finally:
        shutil.rmtree(folder)
    print(json.dumps(rows)) if options.json else show(rows)


if __name__ == "__main__":
    main()
