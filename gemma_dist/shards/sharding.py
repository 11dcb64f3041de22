"""Raw rows -> parquet shards with a manifest, on all cores.

A shard folder holds

    train-00000.parquet …   id, messages, tools, images as any parquet reader and plain `datasets` take them
    manifest.arrow          where each row group lies, and how long each sample is; written last
    rejected.jsonl          with --skip-invalid: the rows that were refused, with file, line and error
    too_long.jsonl          the rows that were cut or dropped for their length

The input is cut into pieces, which depend on nothing but the input, and each is worked on by one process
(`pieces.py`). So the same input gives the same bytes on any number of cores, a killed run goes on where it was, and
nothing shows up in the folder before all of it is there. Of what lies in it, a run removes its own files, each by its
exact name, and no others.
"""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gemma_dist.aliases import current_values
from gemma_dist.config import ShardConfig
from gemma_dist.data.encode import Encoder, load_encoder
from gemma_dist.data.rows import InputRange, read_ranges, split_input
from gemma_dist.errors import DataError
from gemma_dist.logs import log, progress, write_json
from gemma_dist.shards.manifest import MANIFEST, UNFINISHED, Manifest, read_manifest, write_manifest
from gemma_dist.shards.manifest import SCHEMA as MANIFEST_SCHEMA
from gemma_dist.shards.pieces import (
    NUM_ERRORS_SHOWN,
    PLACES,
    REJECTED,
    TOO_LONG,
    ShardJob,
    ShardReport,
    piece_files,
    run_job,
)

PIECE_BYTES = 256 << 20  # of input, that one process works on at a time
ROW_GROUP_BYTES = 4 << 20  # before compression: what is fetched and checked as one
SHARD_BYTES = 256 << 20
APPEND_REJECTED = "append_rejected.jsonl"  # of an --append that was refused
_SHARD = re.compile(r"train-\d{5,}\.parquet")  # as `_shard_name` names it
Refused = dict[tuple[str, int], str]  # by file and line: the error


def run_shard(
    inputs: list[Path],
    out: Path,
    model: str,
    settings: ShardConfig,
    skip_invalid: bool,
    *,
    append: bool = False,
    num_workers: int | None = None,
) -> ShardReport:
    """Check, measure and write all rows of `inputs` to the shard folder `out`.

    The same call goes on with what a killed run left. A process holds one row group, and some 300 bytes for each sample
    of its piece; in the end about 100 bytes for each sample of the whole are held.

    Args:
        append: add the rows to a finished folder. Its files stay as they are, and it can be read all the while.
        num_workers: processes; None: one for each core.

    Raises:
        DataError: `out` is taken, or made with other settings; an input is named twice; or rows were refused and
            `skip_invalid` is not set (`out` then holds nothing new but a list of every refused row); or no row is left
            to write.
    """
    for number, path in enumerate(inputs):
        if path.resolve() in [earlier.resolve() for earlier in inputs[:number]]:
            raise DataError(f"{path} is named twice; name each input once")
    encoder = load_encoder(model, chat_template=settings.chat_template, enable_thinking=settings.enable_thinking)
    header = {
        "fingerprint": encoder.fingerprint,
        "settings": settings.model_dump(mode="json", exclude={"media_root"}),
    }
    before = _open_to_append(out, header) if append else None
    pieces = list(_split_pieces(inputs))
    jobs = [
        ShardJob(out, number, ranges, model, settings, skip_invalid, ROW_GROUP_BYTES, SHARD_BYTES)
        for number, ranges in enumerate(pieces)
    ]
    plan = header | {
        "inputs": [[str(one.file), one.start, *_stamp(one.file)] for one in chain.from_iterable(pieces)],
        "media_root": str(settings.media_root),
        "skip_invalid": skip_invalid,
        "sizes": [PIECE_BYTES, ROW_GROUP_BYTES, SHARD_BYTES],
        "append_to": before.sha256 if before else None,
    }
    plan = _claim(out, plan, before)
    _work_on(jobs, encoder, num_workers)
    if repeated := _find_repeated(jobs, before, out):  # those pieces are done again, without these rows
        _work_on([replace(jobs[number], refused=rows) for number, rows in repeated.items()], encoder, num_workers)
    return _finish(jobs, before, header, plan)


def _split_pieces(inputs: list[Path]) -> Iterator[list[InputRange]]:
    """Ranges of the inputs, in order, that make about PIECE_BYTES together."""
    ranges: list[InputRange] = []
    total = 0
    for path in inputs:
        for input_range, num_bytes in split_input(path, PIECE_BYTES):
            ranges.append(input_range)
            total += num_bytes
            if total >= PIECE_BYTES:
                yield ranges
                ranges, total = [], 0
    if ranges:
        yield ranges


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


# ---- the folder ------------------------------------------------------------------------------------------------------


def _open_to_append(out: Path, header: dict[str, Any]) -> Manifest:
    """The manifest of a folder that rows can be added to."""
    if not (out / MANIFEST).is_file():
        raise DataError(f"{out} holds no finished shards to append to; leave --append out to make the folder")
    manifest = read_manifest(out / MANIFEST, str(out / MANIFEST))
    if manifest.header["fingerprint"] != header["fingerprint"]:
        raise DataError(
            f"{out} was made with another tokenizer, chat template or image processor (fingerprint "
            f"{manifest.header['fingerprint']}, here {header['fingerprint']}); append with the same model and template"
        )
    old, new = current_values(manifest.header["settings"]), header["settings"]
    if changed := [f"{name} was {old.get(name)!r} and is {new[name]!r}" for name in new if old.get(name) != new[name]]:
        raise DataError(f"{out} was made with other settings: {'; '.join(changed)}; append with the same ones")
    return manifest


def _claim(out: Path, plan: dict[str, Any], before: Manifest | None) -> dict[str, Any]:
    """Make `out` ours to write to: with what the same call left there when it was killed, and nothing else of the kind.

    Returns the plan, with the sizes that the logs had before an append.
    """
    append = before is not None
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; name a folder with --out")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if MANIFEST in names and not append:
        raise DataError(
            f"{out} holds finished shards already; remove it, name another folder with --out, or add to it by --append"
        )
    begun = (out / UNFINISHED).is_file()
    if not begun and not append and names - {REJECTED}:
        raise DataError(
            f"{out} holds {min(names - {REJECTED})!r}, which `gemma-dist shard` did not leave there; name a new folder"
            " with --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    left: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        left = json.loads((out / UNFINISHED).read_text(encoding="utf-8"))
    finished = {shard["name"] for shard in before.header["shards"]} if before else set()
    shown = [name for name in left.get("shards", []) if name not in finished]
    if strange := sorted(set(filter(_SHARD.fullmatch, names)) - finished - set(shown)):
        raise DataError(
            f"{out} holds {strange[0]!r}, which no manifest there names, and new shards would take its place; move it "
            f"away, or put the {MANIFEST} back that names it"
        )
    if plan.items() <= left.items():
        log.info("going on with what an earlier run left in %s", out)
        return left
    logs = {name: (out / name).stat().st_size for name in (REJECTED, TOO_LONG) if append and (out / name).is_file()}
    if append and left.get("append_to") == plan["append_to"]:  # the logs may have grown already, the corpus has not
        logs = left["logs"]
    # While files of the other plan are there, the marker names none: they must not be taken for those of this one.
    write_json(out / UNFINISHED, {"append_to": plan["append_to"], "logs": logs, "shards": shown})
    _clear(out, append, keep=UNFINISHED, shown=shown)
    write_json(out / UNFINISHED, plan | {"logs": logs})
    return plan | {"logs": logs}


def _clear(out: Path, append: bool, keep: str, shown: Iterable[str] = ()) -> None:
    """Remove what an unfinished run left in `out`, but for `keep`; and an empty folder itself.

    Args:
        append: the logs are of the finished corpus, which stays.
        shown: the shards that the run had given their names already.
    """
    logs = [APPEND_REJECTED] if append else [REJECTED, TOO_LONG, APPEND_REJECTED]
    for path in [*(out / name for name in (*shown, *logs)), *_work_files(out)]:
        if path.name != keep:
            path.unlink(missing_ok=True)
    if not any(out.iterdir()):
        out.rmdir()


def _work_files(out: Path) -> list[Path]:
    """What a run has in `out` only while it works; the marker, which says whose the others are, comes last."""
    names = {f".{name}.tmp" for name in (MANIFEST, REJECTED, TOO_LONG, APPEND_REJECTED)}
    marker = re.compile(rf"\.{re.escape(UNFINISHED)}\.\d+\.tmp")  # as `write_json` begins it
    begun = [path for path in out.iterdir() if path.name in names or marker.fullmatch(path.name)]
    return [*piece_files(out), *begun, out / UNFINISHED]


# ---- the work, in processes ------------------------------------------------------------------------------------------

# Of a worker process: its encoder, and the number of rows that all workers have read together.
_encoder: Encoder
_num_rows: Any


def _work_on(jobs: list[ShardJob], encoder: Encoder, num_workers: int | None) -> None:
    """Do the jobs that are not done, here or in `num_workers` processes."""
    jobs = [job for job in jobs if job.refused or not job.record.exists()]
    num_workers = min(len(jobs), len(os.sched_getaffinity(0)) if num_workers is None else num_workers)
    if num_workers <= 1:
        for job in jobs:
            rows = progress(read_ranges(job.ranges), total=None, desc="sharding", unit=" rows")
            run_job(job, encoder, rows)
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    setup = (jobs[0].model, jobs[0].settings, counter)
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=setup) as pool:
        running = [pool.submit(_work_in_worker, job) for job in jobs]

        def rows_read() -> Iterator[None]:
            """One item for each row that the workers read, while they do."""
            num_seen, pending = 0, set(running)
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                yield from [None] * (counter.value - num_seen)
                num_seen = counter.value

        try:
            for _ in progress(rows_read(), total=None, desc=f"sharding {len(jobs)} pieces", unit=" rows"):
                pass
        except BaseException as error:
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise DataError(
                    "a process of `gemma-dist shard` was killed, most often for want of memory: run the same command "
                    "again with a smaller --num-workers, and it goes on where it was"
                ) from None
            raise


def _start_worker(model: str, settings: ShardConfig, num_rows: Any) -> None:
    global _encoder, _num_rows
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process: this one ends without a word
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = load_encoder(model, chat_template=settings.chat_template, enable_thinking=settings.enable_thinking)
    _num_rows = num_rows


def _end_with_parent() -> None:
    """A worker that outlived a killed run would write to the same files as the run that goes on."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _work_in_worker(job: ShardJob) -> None:
    def counted() -> Iterator[Any]:
        for row in read_ranges(job.ranges):
            with _num_rows.get_lock():
                _num_rows.value += 1
            yield row

    run_job(job, _encoder, counted())


# ---- putting the pieces together -------------------------------------------------------------------------------------


def _read_record(job: ShardJob) -> tuple[dict[str, Any], pa.Table]:
    """What `run_job` left of a piece: header, and lines of the manifest with places."""
    table = pa.ipc.open_file(pa.memory_map(str(job.record))).read_all()
    return json.loads(table.schema.metadata[b"header"]), table


def _find_repeated(jobs: list[ShardJob], before: Manifest | None, out: Path) -> dict[int, Refused]:
    """The rows whose id an earlier row has: for each piece, by file and line, with the error."""
    tables = [_read_record(job)[1] for job in jobs]
    old = pa.chunked_array([before.ids] if before else [], pa.large_string())
    new = [pa.chunked_array([c.flatten() for c in table["id"].chunks], pa.large_string()) for table in tables]
    ids = pa.chunked_array([chunk for part in (old, *new) for chunk in part.chunks], pa.large_string())
    hashes = np.fromiter(_hashes(ids), np.uint64, len(ids))
    by_hash = np.argsort(hashes, kind="stable")
    starts = np.cumsum([len(old), *map(len, new)])  # of each piece
    firsts: dict[str, int] = {}
    repeated: dict[int, Refused] = {}

    def place(index: int) -> tuple[int, str, int]:
        piece = int(np.searchsorted(starts, index, side="right")) - 1
        row = index - int(starts[piece])
        file, line = (
            pa.chunked_array([c.flatten() for c in tables[piece][name].chunks])[row].as_py() for name in PLACES
        )
        return piece, file, line

    alike = np.flatnonzero(hashes[by_hash][1:] == hashes[by_hash][:-1])
    for first, index in zip(by_hash[alike].tolist(), by_hash[alike + 1].tolist(), strict=True):
        name = ids[index].as_py()
        if ids[first].as_py() != name:
            continue  # two ids of one hash: so rare that a third between two equal ones is not looked for
        first = firsts.setdefault(name, first)
        owner = str(out) if first < len(old) else "{1}:{2}".format(*place(first))
        piece, file, line = place(index)
        repeated.setdefault(piece, {})[file, line] = (
            f"{file}:{line}: the id {name!r} belongs to {owner} already; ids are unique over the whole input: rename "
            "one of them"
        )
    return repeated


def _hashes(ids: pa.ChunkedArray) -> Iterator[int]:
    for start in range(0, len(ids), 1 << 16):
        for name in ids.slice(start, 1 << 16).to_pylist():
            yield int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def _finish(jobs: list[ShardJob], before: Manifest | None, header: dict[str, Any], plan: dict[str, Any]) -> ShardReport:
    """Show the shards under their names, and write the logs and the manifest; or refuse the whole."""
    out, append = jobs[0].out, before is not None
    headers, tables = zip(*map(_read_record, jobs), strict=True)
    report = ShardReport(str(out))
    for part in headers:
        for name, count in part["report"].items():
            if name != "out":
                setattr(report, name, getattr(report, name) + count)
    rejected, too_long = ([job.path(name) for job in jobs] for name in (f"-{REJECTED}", f"-{TOO_LONG}"))
    if report.num_rejected and not plan["skip_invalid"]:
        kept = APPEND_REJECTED if append else REJECTED
        _join_files(rejected, out / kept, 0)
        _clear(out, append, keep=kept)
        errors = [f"  {error}" for part in headers for error in part["errors"]][:NUM_ERRORS_SHOWN]
        raise DataError(
            f"{report.num_rejected:,} of {report.num_read:,} rows were refused, so nothing was written. The first:\n"
            + "\n".join(errors)
            + f"\nAll of them are in {out / kept}; mend them, or leave them out with --skip-invalid"
        )
    if not sum(table.num_rows for table in tables):
        _join_files(rejected, out / (APPEND_REJECTED if append else REJECTED), 0)
        _clear(out, append, keep=APPEND_REJECTED if append else REJECTED)
        raise DataError(
            f"none of the {report.num_read:,} rows of {', '.join(sorted({file for file, *_ in plan['inputs']}))} is "
            f"left to write: {report.num_rejected:,} were refused, {report.num_dropped:,} dropped for their length"
        )
    shards = list(before.header["shards"]) if before else []
    num_new = sum(len(part["shards"]) for part in headers)
    names = [_shard_name(number) for number in range(len(shards), len(shards) + num_new)]
    write_json(out / UNFINISHED, plan | {"shards": names})  # so that they are known for ours, should this run be killed
    lines = [before.table.replace_schema_metadata(None)] if before else []
    for job, part, table in zip(jobs, headers, tables, strict=True):
        numbers = pa.array(np.asarray(table["shard"]) + len(shards), pa.int32())
        lines.append(table.drop_columns(list(PLACES)).set_column(0, "shard", numbers).cast(MANIFEST_SCHEMA))
        for number, entry in enumerate(part["shards"]):
            name = _shard_name(len(shards))
            with suppress(FileNotFoundError):  # a run that was killed here has renamed it
                job.path(f"-{number:03d}.parquet").rename(out / name)
            shards.append(entry | {"name": name})
    _join_files(rejected, out / REJECTED, plan["logs"].get(REJECTED, 0))
    _join_files(too_long, out / TOO_LONG, plan["logs"].get(TOO_LONG, 0))
    manifest = pa.concat_tables(lines).combine_chunks()
    del lines, tables
    write_manifest(out, header | {"shards": shards}, manifest)
    for path in _work_files(out):
        path.unlink(missing_ok=True)
    report.num_shards = num_new
    return report


def _shard_name(number: int) -> str:
    """`datasets` finds files called "train" in a folder, and so does not stumble over the manifest beside them."""
    return f"train-{number:05d}.parquet"


def _join_files(paths: list[Path], out: Path, keep_bytes: int) -> None:
    """Put the files that exist behind the first `keep_bytes` of `out`, whole or not at all."""
    temporary = out.with_name(f".{out.name}.tmp")
    with temporary.open("wb") as file:
        if keep_bytes:
            file.write(out.read_bytes()[:keep_bytes])
        for path in paths:
            if path.exists():
                file.write(path.read_bytes())
        length = file.tell()
    if length:
        temporary.replace(out)
    else:
        temporary.unlink()
