"""What a training step waits for, counted beside bare TRL: waits for the device, collectives and their bytes, in a
micro-batch and at the end of a step (`tests/support/steps.py` says what counts as which).

    python benchmarks/step.py [--launch single|cpu_ddp|cpu_zero2|cpu_zero3|cpu_fsdp2]… [--style e4b] [--json]

Full tuning of a tiny model in micro-batches of one row; a third of our rows have images. TRL takes the others.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.support.ranks import ENVIRONMENT  # noqa: E402 (found by the line above)

LAUNCHES = ("single", "cpu_ddp", "cpu_zero2", "cpu_zero3", "cpu_fsdp2")


def show(rows: list[dict[str, Any]]) -> None:
    parts = {"micro_batch": "in a micro-batch", "end": "at the end of a logged step"}
    for part, title in parts.items():
        print(f"\n{title}: waits for the device, collectives, bytes; by the package that causes them")
        for row in rows:
            found = row[part]
            name = f"{row['launch']}, {'packed' if row['packing'] else 'padded'}, {row['trainer']}"
            cells = [f"{key} {found[key]}" for key in ("waits", "collectives", "bytes")]
            print(f"  {name:28} {'; '.join(cells)}; {found['operators']} operators")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--launch", choices=LAUNCHES, action="append")
    parser.add_argument("--style", default="e4b")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ |= ENVIRONMENT
    from tests.support.steps import measure, prepare

    folder = Path(tempfile.mkdtemp(prefix="step-"))
    try:
        prepare(folder, options.style)
        rows = [
            measure(folder, launch, packing=packing, bare=bare)
            for launch in options.launch or ("single", "cpu_ddp")
            for packing in (False, True)
            for bare in (True, False)
        ]
    finally:
        shutil.rmtree(folder)
    print(json.dumps(rows)) if options.json else show(rows)


if __name__ == "__main__":
    main()
