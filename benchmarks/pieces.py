"""Sharding in pieces by several processes beside one, and what 100 million rows would take: the tables of
docs/streaming.md.

    python benchmarks/pieces.py [--only pieces|end] [--num-rows 200000] [--num-ids 1000000 4000000]

pieces: rows of a few messages are sharded by one process, and by four calls with `--part` that begin at the same time
and a fifth that joins them; every byte of the two folders is compared.
end: what is done once all pieces are there (repeated ids, the manifest), on made-up records of two sizes; the last line
projects 100 million rows from the measured parts.
"""

import argparse
import filecmp
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from gemma_dist.config import ShardConfig
from gemma_dist.data.places import InputRange
from gemma_dist.shards.assemble import finish
from gemma_dist.shards.manifest import COUNTS, MANIFEST, WEIGHT
from gemma_dist.shards.pieces import ShardJob
from gemma_dist.shards.repeated import find_repeated

NUM_PARTS = 4
PIECE_BYTES = 8 << 20  # of input: some pieces for each part
NUM_PROJECTED = 100_000_000
PIECE_IDS, ROW_GROUP_IDS = 50_000, 800  # of made-up records: rows of 5 KB in pieces of 256 MB and row groups of 4 MB
CALL = """
import sys
from pathlib import Path
from gemma_dist.config import ShardConfig
from gemma_dist.shards import sharding
from gemma_dist.shards.folder import Part
sharding.PIECE_BYTES = int(sys.argv[5])
part = Part(int(sys.argv[4]), NUM_PARTS) if sys.argv[4] != "0" else None
sharding.run_shard([Path(sys.argv[1])], Path(sys.argv[2]), sys.argv[3], ShardConfig(), True, num_workers=1, part=part)
"""


def show(*rows: tuple[Any, ...]) -> None:
    """Print a table: its first row is the head, its first column is text."""
    cells = [[f"{cell:,.1f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        numbers = "".join(f"  {cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        print(f"{first:<{widths[0]}}{numbers}", flush=True)


# ---- pieces ----------------------------------------------------------------------------------------------------------


def write_rows(path: Path, num_rows: int) -> None:
    """Rows of a question, a call, its result and an answer; four of them have the id of an earlier one."""
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
    repeated = {num_rows * share // 5: share for share in range(1, 5)}
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"n": number}}}
            messages = [
                {"role": "user", "content": f"What comes behind {number}?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c", "name": "add", "content": str(number + 1)},
                {"role": "assistant", "content": f"{number + 1} does."},
            ]
            row = {"id": f"row-{repeated.get(number, number)}", "messages": messages, "tools": [tool]}
            file.write(json.dumps(row) + "\n")


def measured(source: Path, out: Path, model: Path, parts: Sequence[int]) -> tuple[float, float, float]:
    """Seconds, CPU seconds, and peak memory in MB of the largest process, of calls that begin at the same time; part 0
    is the whole."""
    begun, cpu_s, peak_mb = time.perf_counter(), 0.0, 0.0
    script = CALL.replace("NUM_PARTS", str(NUM_PARTS))
    words = [sys.executable, "-c", script, str(source), str(out), str(model)]
    calls = [subprocess.Popen([*words, str(part), str(PIECE_BYTES)], stderr=subprocess.DEVNULL) for part in parts]
    for call in calls:
        _, status, usage = os.wait4(call.pid, 0)
        assert status == 0, status
        cpu_s += usage.ru_utime + usage.ru_stime
        peak_mb = max(peak_mb, usage.ru_maxrss / 1000)
    return time.perf_counter() - begun, cpu_s, peak_mb


def pieces(folder: Path, num_rows: int) -> float:
    """Print the table; CPU seconds for each row of one process."""
    source, model = folder / "rows.jsonl", folder / "model"
    # Not in this process: what it has taken, Linux counts as its children's peak, too.
    subprocess.run([sys.executable, "-m", "gemma_dist", "tiny", str(model), "--style", "e4b"], check=True)
    write_rows(source, num_rows)
    whole = measured(source, folder / "whole", model, [0])
    parts = measured(source, folder / "joined", model, range(1, NUM_PARTS + 1))
    join = measured(source, folder / "joined", model, [0])
    names = sorted(path.name for path in (folder / "whole").iterdir())
    same = names == sorted(path.name for path in (folder / "joined").iterdir()) and all(
        filecmp.cmp(folder / "whole" / name, folder / "joined" / name, shallow=False) for name in names
    )
    print(f"\n{num_rows:,} rows in {-(-source.stat().st_size // PIECE_BYTES)} pieces, 4 repeated ids")
    head = ("", "time, s", "CPU, s", "peak memory of a process, MB")
    show(head, ("one process", *whole), (f"{NUM_PARTS} parts at once", *parts), ("their join", *join))
    print(f"{len(names)} files, {'every byte the same' if same else 'NOT THE SAME'}")
    if not same:
        sys.exit(1)
    return whole[1] / num_rows


# ---- the end ---------------------------------------------------------------------------------------------------------


def end(folder: Path, num_ids: int) -> dict[str, float]:
    """What the end of a run takes that has so many samples, in a process of its own."""
    words = [sys.executable, __file__, "--only", "made-up", "--num-ids", str(num_ids), "--folder", str(folder)]
    return json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)


def make_records(folder: Path, num_ids: int) -> list[ShardJob]:
    """Records of pieces whose shards are not there, as `run_job` leaves them."""
    import numpy as np
    import pyarrow as pa

    from gemma_dist.shards.hashes import write_hashes
    from gemma_dist.shards.record import ORIGINS, SCHEMA, PieceHeader, write_record
    from gemma_dist.shards.report import ShardReport

    jobs = []
    for number in range(num_ids // PIECE_IDS):
        ranges = [InputRange(Path("rows.jsonl"))]
        job = ShardJob(folder, number, ranges, ShardConfig(), False, 0, 0)
        first, num_groups = number * PIECE_IDS, -(-PIECE_IDS // ROW_GROUP_IDS)
        ids = pa.array([f"trajectory-{first + i:012}" for i in range(PIECE_IDS)], pa.large_string())
        files = pa.array(["rows.jsonl"] * PIECE_IDS, pa.large_string())
        ends = pa.array(np.minimum(np.arange(num_groups + 1) * ROW_GROUP_IDS, PIECE_IDS))
        lists = {"id": ids, "file": files, "noted": pa.array([""] * PIECE_IDS, pa.large_string())}
        lists |= {name: pa.array(np.arange(PIECE_IDS, dtype=np.int32)) for name in COUNTS}
        lists |= {name: pa.array(np.arange(PIECE_IDS)) for name in ("line", "row")}
        columns: dict[str, Any] = dict.fromkeys(("offset", "num_bytes", "num_samples", "num_tokens"), [1] * num_groups)
        columns |= {"shard": [0] * num_groups, "digest": [bytes(32)] * num_groups}
        columns |= {"footer": [os.urandom(10_000), *[None] * (num_groups - 1)]}
        columns |= {name: pa.LargeListArray.from_arrays(ends, values) for name, values in lists.items()}
        columns |= {WEIGHT.name: pa.array([[]] * num_groups, WEIGHT.type)}
        report = ShardReport("", num_read=PIECE_IDS, num_written=PIECE_IDS).to_json()
        shards: Any = [{"name": f"{number}", "bytes": 0, "rest_digest": ""}]
        header = PieceHeader(report=report, rejected=[], errors=[], shards=shards)
        assert set(ORIGINS) < set(lists)
        write_record(job.record, header, pa.table(columns, schema=SCHEMA))
        write_hashes(job.ids, ids)
        jobs.append(job)
    return jobs


def made_up(folder: Path, num_ids: int) -> dict[str, float]:
    """The same in this process: memory is what its peak grows by, mapped files included."""
    folder.mkdir()
    made = subprocess.run  # records are made in another process, so that this one's peak is of the end alone
    made(
        [sys.executable, __file__, "--only", "records", "--num-ids", str(num_ids), "--folder", str(folder)], check=True
    )
    jobs = [ShardJob(folder, number, [], ShardConfig(), False, 0, 0) for number in range(num_ids // PIECE_IDS)]
    plan: Any = {"fingerprint": "", "settings": {}, "inputs": [["rows.jsonl"]], "skip_invalid": False}
    peaks, times = [peak_mb()], [time.process_time()]
    assert not find_repeated(jobs, None, "made up")
    peaks.append(peak_mb())
    times.append(time.process_time())
    finish(jobs, None, plan, {})
    peaks.append(peak_mb())
    times.append(time.process_time())
    return {
        "find_s": times[1] - times[0],
        "finish_s": times[2] - times[1],
        "find_mb": peaks[1] - peaks[0],
        "grown_mb": peaks[2] - peaks[0],
        "manifest_bytes": (folder / MANIFEST).stat().st_size,
    }


def peak_mb() -> float:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def ends(folder: Path, sizes: list[int], row_s: float | None) -> None:
    """Print the table, and the projection."""
    found = {size: end(folder / str(size), size) for size in sizes}
    head = ("ids", "repeated ids, CPU s", "the rest, CPU s", "memory beyond the start, MB", "manifest, bytes a sample")
    rows = [
        (f"{size:,}", one["find_s"], one["finish_s"], one["grown_mb"], one["manifest_bytes"] / size)
        for size, one in found.items()
    ]
    print("\nonce all pieces are there, in one process")
    show(head, *rows)
    largest = max(sizes)
    times = NUM_PROJECTED / largest
    one = found[largest]
    seconds = (one["find_s"] + one["finish_s"]) * times
    print(
        f"\n{NUM_PROJECTED:,} rows, projected: {seconds:,.0f} s of one core at the end, a manifest of "
        f"{one['manifest_bytes'] * times / 1e9:.1f} GB"
        + (f", and {row_s * NUM_PROJECTED / 3600:,.0f} core hours of encoding before" if row_s else "")
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["pieces", "end", "made-up", "records"])
    parser.add_argument("--num-rows", type=int, default=200_000)
    parser.add_argument("--num-ids", type=int, nargs="+", default=[1_000_000, 4_000_000])
    parser.add_argument("--folder", type=Path, help="of --only made-up and records, which the others call")
    options = parser.parse_args()
    if options.only == "records":
        make_records(options.folder, options.num_ids[0])
    elif options.only == "made-up":
        print(json.dumps(made_up(options.folder, options.num_ids[0])))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            row_s = pieces(folder, options.num_rows) if options.only != "end" else None
            if options.only != "pieces":
                ends(folder, options.num_ids, row_s)


if __name__ == "__main__":
    main()
