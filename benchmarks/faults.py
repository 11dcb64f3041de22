"""What becomes of shards where disks flip bits and runs are killed: the table of docs/streaming.md.

    python benchmarks/faults.py [--only flips|kills] [--num-kills 40] [--seed 0]

flips: each bit of a manifest on its own, and bits all over a shard. A reader in a process of its own must say that the
file is damaged: other data, a traceback and a process that dies are counted.
kills: `gemma-dist shard` of a corpus in pieces is ended by SIGKILL at moments spread over all of its work, anew and
with --append. Then the folder either has no manifest or reads as it should, and the same call must
end in the same bytes.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/support

from gemma_dist.config import ShardConfig
from gemma_dist.errors import DataError
from gemma_dist.model.tiny import write_tiny_model
from gemma_dist.shards import sharding
from gemma_dist.shards.manifest import MANIFEST
from gemma_dist.shards.reader import open_shards
from gemma_dist.shards.sharding import run_shard
from tests.support.corpus import row, write_rows

NUM_ROWS, NUM_MORE = 40, 12
EVERY_BIT_OF_A_SHARD = 97  # is flipped, counted from the first
PROCESSES = multiprocessing.get_context("forkserver")  # not fork: Arrow's threads are not copied, but their locks are
PROCESSES.set_forkserver_preload(["gemma_dist.shards.sharding", "transformers"])


def everything(folder: Path) -> list[Any]:
    """All that a training run would read of shards."""
    shards = open_shards(folder)
    lengths = [shards.num_text_tokens, shards.num_image_tokens, shards.num_images, shards.num_target_tokens]
    return [[shards.read(index) for index in range(len(shards))], [each.tolist() for each in lengths]]


def flips(folder: Path, model: Path) -> None:
    """Print what readers make of each flipped bit."""
    source = write_rows(folder / "rows.jsonl", [row(number) for number in range(4)])
    run_shard([source], folder / "shards", str(model), ShardConfig(), False, num_workers=1)
    print(f"\n{'flipped':<20} {'bits':>8} {'named':>8} {'other data':>11} {'traceback':>10} {'died':>6}")
    for name, step in ((MANIFEST, 1), ("train-00000.parquet", EVERY_BIT_OF_A_SHARD)):
        found = Counter(outcomes(folder / "shards" / name, step))
        columns = [sum(found.values()), *(found[kind] for kind in ("named", "other data", "traceback", "died"))]
        widths = (8, 8, 11, 10, 6)
        print(f"{name:<20}", *(f"{count:>{width},}" for count, width in zip(columns, widths, strict=True)))


def outcomes(file: Path, step: int) -> Iterator[str]:
    """What comes of each `step`th bit of a file, flipped on its own."""
    intact = file.read_bytes()
    expected = everything(file.parent)
    bits = range(0, 8 * len(intact), step)
    done = 0
    while done < len(bits):
        receiver, sender = PROCESSES.Pipe(duplex=False)
        reader = PROCESSES.Process(target=try_flips, args=(file, intact, bits[done:], expected, sender))
        reader.start()
        sender.close()
        try:
            while True:
                yield receiver.recv()
                done += 1
        except EOFError:
            reader.join()
        if done < len(bits):
            yield "died"
            done += 1
    file.write_bytes(intact)


def try_flips(file: Path, intact: bytes, bits: range, expected: list[Any], sender: Any) -> None:
    """Send what comes of each bit."""
    for bit in bits:
        flipped = bytearray(intact)
        flipped[bit // 8] ^= 1 << bit % 8
        file.unlink(missing_ok=True)  # the one before may be mapped
        file.write_bytes(flipped)
        try:
            sender.send("same data" if everything(file.parent) == expected else "other data")
        except DataError:
            sender.send("named")
        except Exception:
            sender.send("traceback")


def kills(folder: Path, model: Path, num_kills: int, seed: int) -> None:
    """Print how runs went on after each kill."""
    rows = [row(number, num_calls=1 + number % 3) for number in range(NUM_ROWS + NUM_MORE)]
    first = write_rows(folder / "first.jsonl", rows[:NUM_ROWS])
    more = write_rows(folder / "more.jsonl", rows[NUM_ROWS:])
    moments = random.Random(seed)
    print(f"\n{'killed':<10} {'kills':>6} {'after its end':>14} {'wrong':>6} {'not the same bytes':>19} {'refused':>8}")
    for name, source, append in (("shard", first, False), ("--append", more, True)):
        start = folder / f"start-{name}"
        if append:
            run(first, start, model, append=False)
        expected, seconds = uninterrupted(source, start, model, append)
        found: Counter[str] = Counter()
        for number in range(num_kills):
            out = folder / f"killed-{name}"
            shutil.rmtree(out, ignore_errors=True)
            if append:
                shutil.copytree(start, out)
            pause = seconds * 1.05 * (number + moments.random()) / num_kills
            found.update(after_a_kill(source, out, model, append, pause, expected))
        columns = [num_kills, *(found[kind] for kind in ("ended", "wrong", "other bytes", "refused"))]
        print(f"{name:<10}", *(f"{count:>{width}}" for count, width in zip(columns, (6, 14, 6, 19, 8), strict=True)))


def run(source: Path, out: Path, model: Path, *, append: bool) -> None:
    """One call of `gemma-dist shard` in this process: about four rows a piece, two a row group."""
    sharding.PIECE_BYTES, sharding.ROW_GROUP_BYTES, sharding.SHARD_BYTES = 6000, 3000, 5000
    run_shard([source], out, str(model), ShardConfig(), False, append=append, num_workers=1)


def uninterrupted(source: Path, start: Path, model: Path, append: bool) -> tuple[dict[str, bytes], float]:
    """The files of a run that nothing ended, and the seconds that it took in a process of its own."""
    out = start.with_name(f"whole-{start.name}")
    if append:
        shutil.copytree(start, out)
    begun = time.monotonic()
    worker = PROCESSES.Process(target=run, args=(source, out, model), kwargs={"append": append})
    worker.start()
    worker.join()
    return contents(out), time.monotonic() - begun


def after_a_kill(
    source: Path, out: Path, model: Path, append: bool, pause: float, expected: dict[str, bytes]
) -> Iterator[str]:
    """What is not as it should be where a run was killed after `pause` seconds, and called again."""
    worker = PROCESSES.Process(target=run, args=(source, out, model), kwargs={"append": append})
    worker.start()
    time.sleep(pause)
    worker.kill()
    worker.join()
    if worker.exitcode != -signal.SIGKILL:
        yield "ended"
    if (out / MANIFEST).exists() and len(everything(out)[0]) not in (NUM_ROWS, NUM_ROWS + NUM_MORE):
        yield "wrong"
    try:
        run(source, out, model, append=append)
    except DataError as error:
        print(error)
        yield "refused"
    if contents(out) != expected:
        yield "other bytes"


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["flips", "kills"])
    parser.add_argument("--num-kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tiny_model(folder / "model", style="e4b")
        if options.only != "kills":
            flips(folder, folder / "model")
        if options.only != "flips":
            kills(folder, folder / "model", options.num_kills, options.seed)


if __name__ == "__main__":
    main()
