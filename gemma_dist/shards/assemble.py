"""The pieces of a run put together: repeated ids found, shards named, logs joined, the manifest written."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gemma_dist.errors import DataError
from gemma_dist.logs import write_json
from gemma_dist.shards.folder import APPEND_REJECTED, clear_folder, shard_name, work_files
from gemma_dist.shards.manifest import SCHEMA as MANIFEST_SCHEMA
from gemma_dist.shards.manifest import UNFINISHED, Manifest, write_manifest
from gemma_dist.shards.pieces import NUM_ERRORS_SHOWN, PLACES, REJECTED, TOO_LONG, ShardJob, ShardReport

Refused = dict[tuple[str, int], str]  # by file and line: the error


def _read_record(job: ShardJob) -> tuple[dict[str, Any], pa.Table]:
    """What `run_job` left of a piece: header, and lines of the manifest with places."""
    table = pa.ipc.open_file(pa.memory_map(str(job.record))).read_all()
    return json.loads(table.schema.metadata[b"header"]), table


def find_repeated(jobs: list[ShardJob], before: Manifest | None, out: Path) -> dict[int, Refused]:
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


def finish(jobs: list[ShardJob], before: Manifest | None, header: dict[str, Any], plan: dict[str, Any]) -> ShardReport:
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
        clear_folder(out, append, keep=kept)
        errors = [f"  {error}" for part in headers for error in part["errors"]][:NUM_ERRORS_SHOWN]
        raise DataError(
            f"{report.num_rejected:,} of {report.num_read:,} rows were refused, so nothing was written. The first:\n"
            + "\n".join(errors)
            + f"\nAll of them are in {out / kept}; mend them, or leave them out with --skip-invalid"
        )
    if not sum(table.num_rows for table in tables):
        _join_files(rejected, out / (APPEND_REJECTED if append else REJECTED), 0)
        clear_folder(out, append, keep=APPEND_REJECTED if append else REJECTED)
        raise DataError(
            f"none of the {report.num_read:,} rows of {', '.join(sorted({file for file, *_ in plan['inputs']}))} is "
            f"left to write: {report.num_rejected:,} were refused, {report.num_dropped:,} dropped for their length"
        )
    shards = list(before.header["shards"]) if before else []
    num_new = sum(len(part["shards"]) for part in headers)
    names = [shard_name(number) for number in range(len(shards), len(shards) + num_new)]
    write_json(out / UNFINISHED, plan | {"shards": names})  # so that they are known for ours, should this run be killed
    lines = [before.table.replace_schema_metadata(None)] if before else []
    for job, part, table in zip(jobs, headers, tables, strict=True):
        numbers = pa.array(np.asarray(table["shard"]) + len(shards), pa.int32())
        lines.append(table.drop_columns(list(PLACES)).set_column(0, "shard", numbers).cast(MANIFEST_SCHEMA))
        for number, entry in enumerate(part["shards"]):
            name = shard_name(len(shards))
            with suppress(FileNotFoundError):  # a run that was killed here has renamed it
                job.path(f"-{number:03d}.parquet").rename(out / name)
            shards.append(entry | {"name": name})
    _join_files(rejected, out / REJECTED, plan["logs"].get(REJECTED, 0))
    _join_files(too_long, out / TOO_LONG, plan["logs"].get(TOO_LONG, 0))
    manifest = pa.concat_tables(lines).combine_chunks()
    del lines, tables
    write_manifest(out, header | {"shards": shards}, manifest)
    for path in work_files(out):
        path.unlink(missing_ok=True)
    report.num_shards = num_new
    return report


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
