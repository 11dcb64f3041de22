"""The pieces of a run put together: shards named, logs joined, the manifest written."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from gemma_dist.errors import DataError
from gemma_dist.files import begin, publish, sync
from gemma_dist.logs import write_json
from gemma_dist.shards.folder import APPEND_REJECTED, Plan, clear_folder, shard_name, tidy
from gemma_dist.shards.manifest import UNFINISHED, Manifest, ShardEntry, write_manifest
from gemma_dist.shards.pieces import NUM_ERRORS_SHOWN, PIECE_TOOLS, ShardJob
from gemma_dist.shards.record import ORIGINS, read_header, read_lines
from gemma_dist.shards.report import REJECTED, TOO_LONG, ShardReport
from gemma_dist.shards.tools import TOOLS, write_tools

ROW_GROUPS_AT_ONCE = 1 << 12  # of the corpus that is added to


@dataclass(frozen=True)
class _Piece:
    """What `run_job` left in the record of a piece, but for its lines, which are read one piece at a time."""

    job: ShardJob
    report: ShardReport
    errors: list[str]  # the first few
    shards: list[ShardEntry]


def _read_piece(job: ShardJob) -> _Piece:
    header = read_header(job.record)
    return _Piece(job, ShardReport(**header["report"]), header["errors"], header["shards"])


def report_of(out: Path, jobs: list[ShardJob]) -> ShardReport:
    """What became of the rows of some jobs that are done."""
    pieces = [_read_piece(job) for job in jobs]
    report = _add_reports(out, pieces)
    report.num_shards = sum(len(piece.shards) for piece in pieces)
    return report


def num_rejected(jobs: list[ShardJob]) -> int:
    """Rows that were refused in jobs that are done."""
    return sum(_read_piece(job).report.num_rejected for job in jobs)


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
    write_manifest(out, plan, old_shards + new_shards, lambda: _join_lines(pieces, before), len(tools))
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
    if report.num_written and not refused:
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
    if not report.num_read:
        raise DataError(f"{', '.join(files)}: no row in {'it' if len(files) == 1 else 'them'}; check the path")
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


def _join_lines(pieces: list[_Piece], before: Manifest | None) -> Iterator[pa.Table]:
    """The lines of the whole manifest, with shards counted over all pieces, behind those of the corpus `before`."""
    num_shards = 0
    if before:
        for start in range(0, before.table.num_rows, ROW_GROUPS_AT_ONCE):
            yield before.table.slice(start, ROW_GROUPS_AT_ONCE)
        num_shards = len(before.header["shards"])
    for piece in pieces:
        lines = read_lines(piece.job.record).replace_schema_metadata(None).drop_columns(list(ORIGINS))
        yield lines.set_column(0, "shard", pc.add(lines["shard"], pa.scalar(num_shards, pa.int32())))
        num_shards += len(piece.shards)


def _logs(pieces: list[_Piece], name: str) -> list[Path]:
    return [piece.job.path(f"-{name}") for piece in pieces]


def _join_files(paths: list[Path], out: Path, keep_bytes: int) -> None:
    """Put the files that exist behind the first `keep_bytes` of `out`, whole or not at all."""
    temporary = out.with_name(f".{out.name}.tmp")
    begin(temporary)
    with temporary.open("wb") as file:
        if keep_bytes:
            file.write(out.read_bytes()[:keep_bytes])
        for path in filter(Path.exists, paths):
            with path.open("rb") as part:
                shutil.copyfileobj(part, file)
        length = file.tell()
    if length:
        publish(temporary, out)
    else:
        temporary.unlink()
