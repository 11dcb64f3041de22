"""The pieces of a run put together: repeated ids found, shards named, logs joined, the manifest written."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from gemma_dist.data.rows import row_of_sample
from gemma_dist.errors import DataError
from gemma_dist.files import begin, publish, sync
from gemma_dist.logs import write_json
from gemma_dist.shards.folder import APPEND_REJECTED, Plan, clear_folder, shard_name, tidy
from gemma_dist.shards.manifest import SCHEMA_WITH_WEIGHTS as MANIFEST_SCHEMA
from gemma_dist.shards.manifest import UNFINISHED, WEIGHT, Manifest, ShardEntry, write_manifest
from gemma_dist.shards.pieces import NUM_ERRORS_SHOWN, PIECE_TOOLS, PLACES, PieceHeader, Refused, ShardJob
from gemma_dist.shards.report import REJECTED, TOO_LONG, ShardReport
from gemma_dist.shards.tools import TOOLS, write_tools

IDS_AT_ONCE = 1 << 16  # bounds the memory of hashing


@dataclass(frozen=True)
class _Piece:
    """What `run_job` left in the record of a piece."""

    job: ShardJob
    report: ShardReport
    errors: list[str]  # the first few
    shards: list[ShardEntry]
    lines: pa.Table  # of the manifest, with PLACES


def _read_piece(job: ShardJob) -> _Piece:
    table = pa.ipc.open_file(pa.memory_map(str(job.record))).read_all()
    header: PieceHeader = json.loads(table.schema.metadata[b"header"])
    return _Piece(job, ShardReport(**header["report"]), header["errors"], header["shards"], table)


def report_of(out: Path, jobs: list[ShardJob]) -> ShardReport:
    """What became of the rows of some jobs that are done."""
    pieces = [_read_piece(job) for job in jobs]
    report = _add_reports(out, pieces)
    report.num_shards = sum(len(piece.shards) for piece in pieces)
    return report


def num_rejected(jobs: list[ShardJob]) -> int:
    """Rows that were refused in jobs that are done."""
    return sum(_read_piece(job).report.num_rejected for job in jobs)


# ---- repeated ids ----------------------------------------------------------------------------------------------------


def find_repeated(jobs: list[ShardJob], before: Manifest | None, out: Path) -> dict[int, Refused]:
    """The rows whose id an earlier row has: for each piece, by file and line, with the error.

    Args:
        before: the manifest of the corpus that the rows are added to, whose ids come first.
    """
    tables = [_read_piece(job).lines for job in jobs]
    old_ids = pa.chunked_array([before.ids] if before else [], pa.large_string())
    ids_of_pieces = [_flatten(table["id"]) for table in tables]
    chunks = list(old_ids.chunks)
    for piece_ids in ids_of_pieces:
        chunks += piece_ids.chunks
    ids = pa.chunked_array(chunks, pa.large_string())
    first_of_piece = np.cumsum([len(old_ids), *map(len, ids_of_pieces)])

    def place(index: int) -> tuple[int, str, int]:
        """Piece, file and line of a new row."""
        piece = int(np.searchsorted(first_of_piece, index, side="right")) - 1
        row = index - int(first_of_piece[piece])
        file, line = (_flatten(tables[piece][name])[row].as_py() for name in PLACES)
        return piece, file, line

    first_of_id: dict[str, int] = {}
    repeated: dict[int, Refused] = {}
    for earlier, index in _pairs_of_equal_hash(ids):
        name = ids[index].as_py()
        if ids[earlier].as_py() != name:
            continue  # two ids of one hash: so rare that a third between two equal ones is not looked for
        first = first_of_id.setdefault(name, earlier)
        if first < len(old_ids):
            owner = str(out)
        else:
            _, file, line = place(first)
            owner = f"{file}:{line}"
        piece, file, line = place(index)
        repeated.setdefault(piece, {})[file, line] = (
            f"{file}:{line}: the id {_shown_id(name)} belongs to {owner} already; ids are unique over the whole input: "
            "rename one of them"
        )
    return repeated


def _shown_id(name: str) -> str:
    """The id of a row, and of its sample where it makes several: 'a' (its sample 'a#turn-2')."""
    row_id = row_of_sample(name)
    return repr(name) if row_id == name else f"{row_id!r} (its sample {name!r})"


def _flatten(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of lists, one a row group, as their values one behind the other."""
    return pa.chunked_array([chunk.flatten() for chunk in lists.chunks], lists.type.value_type)


def _pairs_of_equal_hash(ids: pa.ChunkedArray) -> Iterator[tuple[int, int]]:
    """Of the ids with one hash, in their order, each with the one before it. Hashes take less memory than the ids."""
    hashes = np.fromiter(_hashes(ids), np.uint64, len(ids))
    by_hash = np.argsort(hashes, kind="stable")
    in_order = hashes[by_hash]
    equal = in_order[1:] == in_order[:-1]
    yield from zip(by_hash[:-1][equal].tolist(), by_hash[1:][equal].tolist(), strict=True)


def _hashes(ids: pa.ChunkedArray) -> Iterator[int]:
    for start in range(0, len(ids), IDS_AT_ONCE):
        for name in ids.slice(start, IDS_AT_ONCE).to_pylist():
            yield int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


# ---- the finished folder ---------------------------------------------------------------------------------------------


def finish(jobs: list[ShardJob], before: Manifest | None, plan: Plan, log_sizes: dict[str, int]) -> ShardReport:
    """Show the shards under their names, write the logs, the tools and the manifest; or refuse the whole.

    Args:
        log_sizes: bytes of the logs before an append, by name, behind which this run's lines come.

    Raises:
        DataError: rows were refused that the plan does not skip, or none is left. Of the pieces, nothing is left then
            but the list of what was refused.
    """
    out = jobs[0].out
    pieces = [_read_piece(job) for job in jobs]
    report = _add_reports(out, pieces)
    _require_rows(report, pieces, plan, is_append=before is not None)
    old_shards = before.header["shards"] if before else []
    report.num_shards = sum(len(piece.shards) for piece in pieces)
    names = [shard_name(len(old_shards) + i) for i in range(report.num_shards)]
    # Named before they are there: they are known for ours, should this run be killed.
    marker = {**plan, "logs": log_sizes, "shards": names}
    write_json(out / UNFINISHED, marker)
    new_shards = _name_shards(pieces, names)
    _join_files(_logs(pieces, REJECTED), out / REJECTED, log_sizes.get(REJECTED, 0))
    _join_files(_logs(pieces, TOO_LONG), out / TOO_LONG, log_sizes.get(TOO_LONG, 0))
    tools = write_tools(out, before, _logs(pieces, PIECE_TOOLS))
    if twice := tools.names_declared_twice():
        report.notes[f"tools are declared in different ways, such as {twice[0]}; {TOOLS} holds each"] = len(twice)
    what_was_done = {name: value for name, value in report.to_json().items() if name != "out"}
    write_json(out / UNFINISHED, marker | {"report": what_was_done})
    write_manifest(out, plan, old_shards + new_shards, _join_lines(pieces, before), len(tools))
    tidy(out)
    return report


def _add_reports(out: Path, pieces: list[_Piece]) -> ShardReport:
    report = ShardReport(str(out))
    for piece in pieces:
        for name, count in piece.report.to_json().items():
            if name == "notes":
                report.notes.update(count)
            elif name != "out":
                setattr(report, name, getattr(report, name) + count)
    return report


def _require_rows(report: ShardReport, pieces: list[_Piece], plan: Plan, *, is_append: bool) -> None:
    """Refuse the whole, and leave the list of refused rows alone in the folder, where it must not be finished."""
    refused = report.num_rejected and not plan["skip_invalid"]
    num_written = sum(piece.lines.num_rows for piece in pieces)
    if num_written and not refused:
        return
    out = Path(report.out)
    kept = APPEND_REJECTED if is_append else REJECTED
    _join_files(_logs(pieces, REJECTED), out / kept, 0)
    clear_folder(out, is_append, keep=kept)
    if refused:
        errors = [f"  {error}" for piece in pieces for error in piece.errors]
        raise DataError(
            f"{report.num_rejected:,} of {report.num_read:,} rows were refused, so nothing was written. The first:\n"
            + "\n".join(errors[:NUM_ERRORS_SHOWN])
            + f"\nAll of them are in {out / kept}; fix them, or leave them out with --skip-invalid"
        )
    files = sorted({str(file) for file, *_ in plan["inputs"]})
    raise DataError(
        f"none of the {report.num_read:,} rows of {', '.join(files)} is left to write: {report.num_rejected:,} were "
        f"refused, {report.num_dropped:,} dropped for their length"
    )


def _name_shards(pieces: list[_Piece], names: list[str]) -> list[ShardEntry]:
    """Rename the pieces' shards to `names`, in order; their entries for the manifest."""
    entries: list[ShardEntry] = []
    for piece in pieces:
        for number, entry in enumerate(piece.shards):
            name = names[len(entries)]
            with suppress(FileNotFoundError):  # a run that was killed here has renamed it
                piece.job.shard_path(number).rename(piece.job.out / name)
            entries.append({**entry, "name": name})
    sync(pieces[0].job.out)
    return entries


def _join_lines(pieces: list[_Piece], before: Manifest | None) -> pa.Table:
    """The lines of the whole manifest, with shards counted over all pieces, behind those of the corpus `before`."""
    tables = [before.table.replace_schema_metadata(None)] if before else []
    num_shards = len(before.header["shards"]) if before else 0
    for piece in pieces:
        numbers = pa.array(np.asarray(piece.lines["shard"]) + num_shards, pa.int32())
        lines = piece.lines.drop_columns(list(PLACES)).set_column(0, "shard", numbers)
        tables.append(lines.cast(MANIFEST_SCHEMA))
        num_shards += len(piece.shards)
    table = pa.concat_tables(tables, promote_options="default").combine_chunks()
    has_weights = WEIGHT.name in table.column_names and table[WEIGHT.name].null_count < table.num_rows
    return table if has_weights else table.drop_columns([WEIGHT.name])


def _logs(pieces: list[_Piece], name: str) -> list[Path]:
    return [piece.job.path(f"-{name}") for piece in pieces]


def _join_files(paths: list[Path], out: Path, keep_bytes: int) -> None:
    """Put the files that exist behind the first `keep_bytes` of `out`, whole or not at all."""
    temporary = out.with_name(f".{out.name}.tmp")
    begin(temporary)
    with temporary.open("wb") as file:
        if keep_bytes:
            file.write(out.read_bytes()[:keep_bytes])
        for path in paths:
            if path.exists():
                file.write(path.read_bytes())
        length = file.tell()
    if length:
        publish(temporary, out)
    else:
        temporary.unlink()
