"""Ids that came before, found over all pieces, and the pieces written anew without their rows.

Nothing is encoded again: a row that stays is copied, with all that the record says of it. The bytes are those of a run
in which the rows had been refused when they were read.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from heapq import merge
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from gemma_dist.data.rows import row_of_sample
from gemma_dist.errors import spell
from gemma_dist.logs import read_jsonl
from gemma_dist.shards.folder import hashes_before
from gemma_dist.shards.hashes import Place, equal_hashes, write_hashes
from gemma_dist.shards.manifest import COUNTS, WEIGHT, Manifest
from gemma_dist.shards.pieces import NUM_ERRORS_SHOWN, PIECE_TOOLS, RowLog, ShardJob, ShardWriter, piece_files
from gemma_dist.shards.record import ORIGINS, Sample, read_header, read_lines
from gemma_dist.shards.report import OPTIONS, REJECTED, TOO_LONG, ShardReport
from gemma_dist.shards.tools import Declaration, SeenTools

OLD_IDS_AT_ONCE = 1 << 22  # of the corpus that is added to: a file of hashes
NUM_OPEN_RECORDS = 16

# Rows of a piece that are refused, by their numbers there: the error.
Refused: TypeAlias = dict[int, str]


def find_repeated(jobs: list[ShardJob], before: Manifest | None, corpus: str) -> dict[int, Refused]:
    """The rows whose id an earlier row has, by piece, in their order.

    Memory: what `equal_hashes` takes, and some 500 bytes for each row that is found.

    Args:
        before: the manifest of the corpus that the rows are added to, whose ids come first.
        corpus: its name in messages.
    """
    old_ids = before.ids if before else pa.array([], pa.large_string())
    starts = range(0, len(old_ids), OLD_IDS_AT_ONCE)
    old_files = [hashes_before(jobs[0].out, number) for number in range(len(starts))]
    for path, start in zip(old_files, starts, strict=True):
        write_hashes(path, old_ids.slice(start, OLD_IDS_AT_ONCE))
    num_new = sum(read_header(job.record)["report"]["num_written"] for job in jobs)
    files = [*old_files, *(job.ids for job in jobs)]
    lines_of = lru_cache(NUM_OPEN_RECORDS)(lambda piece: read_lines(jobs[piece].record))

    def look(place: Place, name: str) -> Any:
        """What the record says of a new sample."""
        column = lines_of(place.file - len(old_files))[name].combine_chunks()
        return column.flatten()[place.sample].as_py()

    def id_of(place: Place) -> str:
        if place.file < len(old_files):
            return old_ids[starts[place.file] + place.sample].as_py()
        return look(place, "id")

    found: dict[int, dict[int, tuple[Place, str]]] = {}  # by piece and row: its first such sample
    for places in equal_hashes(files, len(old_ids) + num_new):
        first_of_id: dict[str, Place] = {}
        for place in places:
            name = id_of(place)
            first = first_of_id.setdefault(name, place)
            if first is place:
                continue
            is_old = first.file < len(old_files)
            owner = corpus if is_old else f"{look(first, 'file')}:{look(first, 'line')}"
            error = (
                f"{look(place, 'file')}:{look(place, 'line')}: the id {_shown_id(name)} belongs to {owner} already; "
                "ids are unique over the whole input: rename one of them"
            )
            rows, row = found.setdefault(place.file - len(old_files), {}), look(place, "row")
            rows[row] = min(rows.get(row, (place, error)), (place, error))
    return {piece: {row: error for row, (_, error) in sorted(rows.items())} for piece, rows in sorted(found.items())}


def _shown_id(name: str) -> str:
    """The id of a row, and of its sample where it makes several: 'a' (its sample 'a#turn-2')."""
    row_id = row_of_sample(name)
    return repr(name) if row_id == name else f"{row_id!r} (its sample {name!r})"


# ---- a piece without some of its rows --------------------------------------------------------------------------------


def leave_out(job: ShardJob, refused: Refused) -> ShardJob:
    """Write a piece that is done anew, without the rows `refused`. Returns the job that names its files.

    Those of `job` are removed, but for the record and the logs: the same call after a kill begins with them.
    """
    again = replace(job, again=True)
    if not again.record.exists():
        for left in piece_files(job.out, job.number):
            if left.name.lstrip(".").startswith(again.path("").name.lstrip(".")):
                left.unlink()
        _copy(job, again, refused)
    for number in range(len(read_header(job.record)["shards"])):
        job.shard_path(number).unlink(missing_ok=True)
    return again


def _copy(job: ShardJob, again: ShardJob, refused: Refused) -> None:
    """The files of `job` without the rows `refused` as those of `again`."""
    header = read_header(job.record)
    places: dict[int, dict[str, Any]] = {}
    writer = ShardWriter(again)
    tools, seen_tools = RowLog(again.path(f"-{PIECE_TOOLS}")), SeenTools()
    declared = ""
    for row, sample in _samples(job):
        if sample.row in refused:
            places[sample.row] = {"file": sample.file, "line": sample.line}
            continue
        writer.add(row, sample)
        if row["tools"] != declared:
            declared = row["tools"]
            for tool in filter(seen_tools.is_new, map(Declaration.of, json.loads(declared))):
                tools.write_line(tool.line())
    tools.close()
    rejected = sorted([*header["rejected"], *refused])
    errors = sorted([*zip(header["rejected"], header["errors"], strict=False), *refused.items()])[:NUM_ERRORS_SHOWN]
    new_lines = ((number, places[number] | {"error": spell(error, OPTIONS)}) for number, error in refused.items())
    old_lines = zip(header["rejected"], _lines_of(job.path(f"-{REJECTED}")), strict=True)
    log = RowLog(again.path(f"-{REJECTED}"))
    for _, line in merge(old_lines, new_lines, key=lambda pair: pair[0]):
        log.write(line)
    log.close()
    lengths = _copy_lengths(job, again, {(place["file"], place["line"]) for place in places.values()})
    report = ShardReport(str(job.out), num_read=header["report"]["num_read"], num_rejected=len(rejected))
    report.num_cut, report.num_dropped = lengths["num_cut"], lengths["num_dropped"]
    report.num_unrolled = writer.num_written + report.num_rejected + report.num_dropped - report.num_read
    writer.close(report, rejected, [error for _, error in errors])


def _samples(job: ShardJob) -> Iterator[tuple[dict[str, Any], Sample]]:
    """The rows of a piece's shards, with what its record says of each."""
    lines = read_lines(job.record)
    number = 0  # of the row group in the piece
    for shard in range(len(read_header(job.record)["shards"])):
        with pq.ParquetFile(job.shard_path(shard)) as file:
            for row_group in range(file.num_row_groups):
                group = {name: lines[name][number].as_py() for name in ("id", *COUNTS, WEIGHT.name, *ORIGINS)}
                counts = map(list, zip(*(group[name] for name in COUNTS), strict=True))
                origins = zip(*(group[name] for name in ORIGINS), strict=True)
                rows = file.read_row_group(row_group).to_pylist()
                weights = group[WEIGHT.name] or [1.0] * len(rows)
                for row, name, count, weight, origin in zip(rows, group["id"], counts, weights, origins, strict=True):
                    yield row, Sample(name, count, weight, *origin)
                number += 1


def _copy_lengths(job: ShardJob, again: ShardJob, refused: set[tuple[str, int]]) -> Counter[str]:
    """Copy the log of what was too long, without the lines of refused rows. What a report counts of the others."""
    counts: Counter[str] = Counter()
    log = RowLog(again.path(f"-{TOO_LONG}"))
    for line in _lines_of(job.path(f"-{TOO_LONG}")):
        if (line["file"], line["line"]) not in refused:
            log.write(line)
            counts["num_cut" if line["num_messages_kept"] else "num_dropped"] += 1
    log.close()
    return counts


def _lines_of(path: Path) -> Iterator[Any]:
    return read_jsonl(path) if path.exists() else iter(())
