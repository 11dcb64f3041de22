"""Raw rows -> parquet shards with a manifest, on all cores.

A shard folder holds

    train-00000.parquet …   id, messages, tools, images, enable_thinking, for any parquet reader and plain `datasets`
    manifest.arrow          where each row group lies, and how long each sample is; written last
    tools.json              each declaration of a tool that the rows show, once
    rejected.jsonl          with --skip-invalid: the rows, and files, that were refused, with file, line and error
    too_long.jsonl          the rows that were cut or dropped for their length
    .finished               what the last call was to do, and did

The input is cut into pieces, which depend on nothing but the input, and each is worked on by one process
(`pieces.py`). So the same input gives the same bytes on any number of cores, a killed run resumes where it was, and
nothing shows up in the folder before all of it is there. Of what lies in it, a run removes its own files, each by its
exact name, and no others.
"""

import gc
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from gemma_dist.config import ShardConfig
from gemma_dist.data.encode import Encoder
from gemma_dist.data.inputs import identity
from gemma_dist.data.places import InputRange, ReadRow, SizedRange
from gemma_dist.data.plain import load_plain_encoder, without_script
from gemma_dist.data.rows import split_input
from gemma_dist.errors import DataError
from gemma_dist.failures import is_of_a_disk
from gemma_dist.logs import log, progress
from gemma_dist.shards.assemble import finish, num_rejected, report_of
from gemma_dist.shards.choice import Choice
from gemma_dist.shards.fetch import is_url
from gemma_dist.shards.folder import (
    Part,
    Plan,
    at_work,
    claim_folder,
    finished_already,
    one_at_a_time,
    open_to_append,
)
from gemma_dist.shards.pieces import NUM_ERRORS_SHOWN, PIECE_FORMAT, ShardJob, run_job
from gemma_dist.shards.repeated import Refused, find_repeated, leave_out
from gemma_dist.shards.report import ShardReport
from gemma_dist.shards.store import Store

PIECE_BYTES = 256 << 20  # of input, that one process works on at a time
ROW_GROUP_BYTES = 4 << 20  # before compression: what is fetched and checked as one
SHARD_BYTES = 256 << 20


def run_shard(
    inputs: list[Path],
    out: str | Path,
    model: str,
    settings: ShardConfig,
    skip_invalid: bool,
    *,
    append: bool = False,
    num_workers: int | None = None,
    max_rejected: int | None = None,
    part: Part | None = None,
    work_dir: Path | None = None,
    choice: Choice | None = None,
) -> ShardReport:
    """Check, measure and write all rows of `inputs` to the shard folder `out`: on a disk, or a URL that fsspec knows.

    The same call resumes what a killed run left. A process holds one row group, and some 300 bytes for each sample
    of its piece. In the end some 100 MB are held for any number of samples, 150 bytes for each row group, the footers
    of the shards, and 500 bytes for each repeated id.

    Args:
        append: add the rows to a finished folder. Its files stay as they are, and it can be read all the while.
        num_workers: processes; None: one for each core.
        max_rejected: stop as soon as more rows than this are refused; None: look at all of them.
        part: do a share of the pieces alone, beside other calls, which may run elsewhere, and finish nothing: the same
            call without it does what is left. The report is of this part.
        work_dir: where the shards for a URL are made; None: the user's folder of caches.
        choice: which rows are taken; None: all.

    Raises:
        DataError: `out` is taken, or made with other settings, or another call is at work there; an input is named
            twice; or rows were refused and `skip_invalid` is not set (`out` then holds nothing new but a list of every
            refused row), or more of them than `max_rejected`; or no row is left to write.
    """
    _require_distinct(inputs)
    store = _open_store(str(out), work_dir, part)
    folder = store.folder if store else Path(str(out).removeprefix("file://"))
    encoder = load_plain_encoder(model, settings)
    if note := encoder.lost_opening():
        log.warning(note)
    pieces = list(_split_pieces(inputs, skip_invalid=skip_invalid))
    jobs = [
        ShardJob(folder, number, ranges, settings, skip_invalid, ROW_GROUP_BYTES, SHARD_BYTES, choice=choice)
        for number, ranges in enumerate(pieces)
    ]
    plan = _plan(encoder, settings, pieces, skip_invalid=skip_invalid)
    if choice is not None:
        plan["choice"] = choice.digest()
    with at_work(folder, part), store.named(append=append, alone=part is None) if store else nullcontext():
        if store:
            store.prepare(plan, alone=part is None)
        told = _Refusals(max_rejected)
        report = _do(folder, store, jobs, encoder, plan, told, append=append, num_workers=num_workers, part=part)
        if store and part is None:
            store.publish()
    return replace(report, out=str(out))


def _plan(encoder: Encoder, settings: ShardConfig, pieces: list[list[InputRange]], *, skip_invalid: bool) -> Plan:
    ranges = list(chain.from_iterable(pieces))
    identities = {file: identity(file) for file in {one.file for one in ranges}}
    return {
        "fingerprint": encoder.fingerprint,
        "settings": settings.model_dump(mode="json", exclude={"media_root"}),
        "inputs": [_known(one, *identities[one.file]) for one in ranges],
        "media_root": str(settings.media_root),
        "skip_invalid": skip_invalid,
        "pieces": PIECE_FORMAT,
        "sizes": [PIECE_BYTES, ROW_GROUP_BYTES, SHARD_BYTES],
        "append_to": None,
    }


def _open_store(out: str, work_dir: Path | None, part: Part | None) -> Store | None:
    """The store of a URL, which can be written; None for a folder on a disk."""
    if re.match(r"[a-z][a-z0-9+.-]+:/(?!/)", out):
        raise DataError(f"{out!r} is no folder, and has one slash too few for a URL; write it as in s3://bucket/train")
    if not is_url(out) or out.startswith("file://"):
        if work_dir is not None:
            raise DataError(f"--work-dir is for shards that go to a store, and {out} is a folder; leave it out")
        return None
    if part is not None and work_dir is None:
        raise DataError(
            f"the parts of {out} meet in a folder on a disk before they are sent: name one that all of them share by "
            "--work-dir"
        )
    return Store(out.rstrip("/"), work_dir)


def _do(
    out: Path,
    store: Store | None,
    jobs: list[ShardJob],
    encoder: Encoder,
    plan: Plan,
    refusals: "_Refusals",
    *,
    append: bool,
    num_workers: int | None,
    part: Part | None,
) -> ShardReport:
    """What is left of a plan, or of a part of it, in the folder `out`, which may be that of a store."""
    name = store.url if store else str(out)
    with one_at_a_time(out):
        if done := finished_already(out, plan, store.sizes() if store else {}):
            log.info("%s: all of it is there already; an earlier run of the same command wrote it", name)
            return done
        before = open_to_append(out, plan) if append else None
        plan["append_to"] = before.sha256 if before else None
        log_sizes = claim_folder(out, plan, before)
    if part is not None:
        jobs = jobs[part.number - 1 :: part.of]
        _work_on(jobs, encoder, num_workers, refusals)
        return report_of(out, jobs)
    _work_on(jobs, encoder, num_workers, refusals)
    if repeated := find_repeated(jobs, before, name):
        for error in chain.from_iterable(rows.values() for rows in repeated.values()):
            refusals.add(error)
        jobs = _leave_out(jobs, repeated, num_workers)
    return finish(jobs, before, plan, log_sizes)


def _require_distinct(inputs: list[Path]) -> None:
    """Raises DataError where an input is named twice."""
    seen: set[Path] = set()
    for path in inputs:
        if path.resolve() in seen:
            raise DataError(f"{path} is named twice; name each input once")
        seen.add(path.resolve())


def _split_pieces(inputs: list[Path], *, skip_invalid: bool) -> Iterator[list[InputRange]]:
    """Ranges of the inputs, in order, that make about PIECE_BYTES together. Raises DataError of an input that cannot be
    read, unless such are to be skipped."""
    ranges: list[InputRange] = []
    total = 0
    split = partial(_split_one, skip_invalid=skip_invalid)
    threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)))  # unpacking and reading let one another run
    try:
        for input_range, num_bytes in chain.from_iterable(threads.map(split, inputs)):
            ranges.append(input_range)
            total += num_bytes
            if total >= PIECE_BYTES:
                yield ranges
                ranges, total = [], 0
        if ranges:
            yield ranges
    finally:
        threads.shutdown(cancel_futures=True)


def _split_one(path: Path, *, skip_invalid: bool) -> list[SizedRange]:
    try:
        return list(split_input(path, PIECE_BYTES))
    except DataError as error:
        if not skip_invalid or is_of_a_disk(error):
            raise
        return [(InputRange(path), 0)]  # a range of its own, which says so when it is read


def _known(one: InputRange, name: str, num_bytes: int, changed: int) -> list[str | int]:
    """What a plan says of a range of an input."""
    return [name, one.start, num_bytes, changed]


# ---- the work, in processes ------------------------------------------------------------------------------------------


class _Refusals:
    """The rows that were refused so far: the first few are told at once."""

    def __init__(self, max_rejected: int | None) -> None:
        self.num_rejected, self._max_rejected = 0, max_rejected

    def add(self, error: str, num_rows: int = 1) -> None:
        """Count rows that were refused. DataError where they are too many."""
        if error and self.num_rejected < NUM_ERRORS_SHOWN:
            log.warning("refused: %s", error)
        self.num_rejected += num_rows
        if self._max_rejected is not None and self.num_rejected > self._max_rejected:
            raise DataError(
                f"refused rows: {self.num_rejected:,} so far, more than --max-rejected {self._max_rejected:,}, so the "
                "others were not looked at; fix them and run it again, or allow more, and what is done stays done"
            )


# Of a worker process: its encoder, the numbers of rows that all workers have read and refused together, and where the
# errors of the first few of these go.
_encoder: Encoder
_num_rows: Any
_num_rejected: Any
_errors: Any


def _work_on(jobs: list[ShardJob], encoder: Encoder, num_workers: int | None, refusals: _Refusals) -> None:
    """Do the jobs that are not done, here or in `num_workers` processes.

    Args:
        refusals: counts the rows that are refused, those of jobs that are done, too.
    """
    tell = refusals.add
    if refusals_before := num_rejected([job for job in jobs if job.record.exists()]):
        tell("", refusals_before)
    jobs = [job for job in jobs if not job.record.exists()]
    num_workers = min(len(jobs), len(os.sched_getaffinity(0)) if num_workers is None else num_workers)
    if num_workers <= 1:
        gc.freeze()  # no collection looks again at what was imported
        for job in jobs:
            rows = progress(job.rows(), total=None, desc="sharding", unit=" rows")
            run_job(job, encoder, rows, tell)
        gc.unfreeze()
        return
    context = multiprocessing.get_context("spawn")
    counter, rejected, errors = context.Value("q", 0), context.Value("q", 0), context.SimpleQueue()
    setup = (encoder, counter, rejected, errors)
    with without_script(), ProcessPoolExecutor(num_workers, context, _start_worker, setup) as pool:
        running = [pool.submit(_work_in_worker, job) for job in jobs]

        def rows_read() -> Iterator[None]:
            """One item for each row that the workers read, while they do."""
            num_seen, num_told, pending = 0, 0, set(running)
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                while not errors.empty():
                    tell(errors.get())
                    num_told += 1
                if rejected.value > num_told:
                    tell("", rejected.value - num_told)
                    num_told = rejected.value
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
                    "again with a smaller --num-workers to resume it"
                ) from None
            raise


def _start_worker(encoder: Encoder, num_rows: Any, num_rejected: Any, errors: Any) -> None:
    global _encoder, _num_rows, _num_rejected, _errors
    _end_alone()
    gc.freeze()
    _encoder, _num_rows, _num_rejected, _errors = encoder, num_rows, num_rejected, errors


def _leave_out(jobs: list[ShardJob], repeated: dict[int, Refused], num_workers: int | None) -> list[ShardJob]:
    """The jobs, those with `repeated` rows written anew without them, here or in `num_workers` processes."""
    todo = [jobs[number] for number in repeated]
    num_rows = sum(map(len, repeated.values()))
    log.info("%s repeated ids: %s of %s pieces are copied without their rows", num_rows, len(todo), len(jobs))
    num_workers = min(len(todo), len(os.sched_getaffinity(0)) if num_workers is None else num_workers)
    if num_workers <= 1:
        again = list(map(leave_out, todo, repeated.values()))
    else:
        context = multiprocessing.get_context("spawn")
        with without_script(), ProcessPoolExecutor(num_workers, context, _end_alone) as pool:
            again = list(pool.map(leave_out, todo, repeated.values()))
    done = {job.number: job for job in again}
    return [done.get(job.number, job) for job in jobs]


def _end_alone() -> None:
    """Of a worker: end with the run, and silently."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker that outlived a killed run would write to the same files as the run that resumes."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _work_in_worker(job: ShardJob) -> None:
    def counted() -> Iterator[ReadRow]:
        for row in job.rows():
            with _num_rows.get_lock():
                _num_rows.value += 1
            yield row

    def tell(error: str) -> None:
        with _num_rejected.get_lock():
            if _num_rejected.value < NUM_ERRORS_SHOWN:
                _errors.put(error)
            _num_rejected.value += 1

    run_job(job, _encoder, counted(), tell)
