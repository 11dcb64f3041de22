"""One piece of the raw rows -> its shard files, hidden until all pieces are done.

Each row is parsed, made one or several samples, encoded (that is how it is measured) and written, one row group in
memory at a time. What is refused or too long goes into logs of its own. The record is written last: it holds the
piece's lines of the manifest, and where in the input each sample came from. With the hashes of the ids beside it,
repeated ones can be found over all pieces, and their rows left out without encoding the others again (`repeated.py`).
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gemma_dist.config import ShardConfig
from gemma_dist.data.encode import Encoder
from gemma_dist.data.encoded import Encoded
from gemma_dist.data.fit import encode_trained, fit, parse
from gemma_dist.data.places import InputRange, ReadRow, Where
from gemma_dist.data.rows import read_ranges
from gemma_dist.data.shared import of_shared
from gemma_dist.data.strict import error_context
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.data.unroll import unroll
from gemma_dist.errors import DataError, spell
from gemma_dist.failures import is_of_a_disk
from gemma_dist.files import begin, publish
from gemma_dist.logs import JsonlWriter, to_json
from gemma_dist.shards.choice import Choice
from gemma_dist.shards.hashes import write_hashes
from gemma_dist.shards.manifest import COUNTS, RowGroupPlace, ShardEntry, digest, row_group_line
from gemma_dist.shards.record import ORIGINS, PieceHeader, Sample, write_record
from gemma_dist.shards.record import SCHEMA as RECORD_SCHEMA
from gemma_dist.shards.report import OPTIONS, REJECTED, TOO_LONG, ShardReport
from gemma_dist.shards.tools import Declaration, SeenTools

NUM_ERRORS_SHOWN = 5
PIECE_FORMAT = 2  # of the files of a piece: those of another one are not taken up
PIECE_TOOLS = "tools.tsv"  # the declarations of a piece, each once; tools.jsonl in format 1
PIECE_IDS = "ids.arrow"  # hashes of its ids
UNDECLARED = "rows call tools but declare none"
_PIECE_FILE = re.compile(  # as `ShardJob.path` names it, or `_partial` while it is written
    rf"\.?\.piece-(\d{{5,}})(?:-again)?(\.arrow|-{re.escape(REJECTED)}|-{re.escape(TOO_LONG)}"
    rf"|-tools\.(?:tsv|jsonl)|-{re.escape(PIECE_IDS)}|-\d{{3,}}\.parquet)(\.tmp)?"
)

IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
# What `datasets.Features(…).arrow_schema` gives for id, Json, Json, List(Image(decode=False)), bool without the import.
FEATURES = {
    "id": {"dtype": "string", "_type": "Value"},
    "messages": {"_type": "Json"},
    "tools": {"_type": "Json"},
    "images": {"feature": {"decode": False, "_type": "Image"}, "_type": "List"},
    "enable_thinking": {"dtype": "bool", "_type": "Value"},
}
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "messages": pa.json_(),
        "tools": pa.json_(),
        "images": pa.list_(IMAGE_TYPE),
        "enable_thinking": pa.bool_(),  # as the row says; null: the setting decides
    },
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


@dataclass(frozen=True)
class ShardJob:
    """A piece of the input, with all that a process needs to work on it."""

    out: Path
    number: int
    ranges: list[InputRange]
    settings: ShardConfig
    skip_invalid: bool
    row_group_bytes: int
    shard_bytes: int
    again: bool = False  # it was done, and is written anew without the rows whose ids came before
    choice: Choice | None = None  # None: all rows

    def rows(self) -> Iterator[ReadRow]:
        """The rows that it takes. Where invalid ones are skipped, an input that cannot be read on is refused like a
        row, the next one of that input, and the others are read."""
        for one in self.ranges:
            line = one.first_line
            try:
                for where, row in read_ranges([one], self.settings.max_row_bytes):
                    line = where.line + 1
                    if self.choice is None or self.choice.takes(where):
                        yield where, row
            except DataError as error:
                if not self.skip_invalid or is_of_a_disk(error):
                    raise
                yield Where(one.file, line), error

    def path(self, suffix: str) -> Path:
        return self.out / f".piece-{self.number:05d}{'-again' if self.again else ''}{suffix}"

    def shard_path(self, number: int) -> Path:
        return self.path(f"-{number:03d}.parquet")

    @property
    def ids(self) -> Path:
        """The hashes of its ids."""
        return self.path(f"-{PIECE_IDS}")

    @property
    def record(self) -> Path:
        """The last file of a piece."""
        return self.path(".arrow")


def piece_files(out: Path, number: int | None = None) -> list[Path]:
    """The files that all pieces, or piece `number`, left in `out`, whole or not."""
    found = []
    for path in out.iterdir():
        piece = _PIECE_FILE.fullmatch(path.name)
        if piece and number in (None, int(piece[1])):
            found.append(path)
    return found


def run_job(job: ShardJob, encoder: Encoder, rows: Iterable[ReadRow], tell: Callable[[str], None]) -> None:
    """Write the shards, the logs and last the record of a piece.

    Args:
        tell: called with the error of each row that is refused, at once.
    """
    job.record.unlink(missing_ok=True)  # first: a record stands for files that are there
    for left in piece_files(job.out, job.number):
        left.unlink()
    report = ShardReport(str(job.out))
    refused: list[int] = []
    errors: list[str] = []
    rejected = RowLog(job.path(f"-{REJECTED}"))
    too_long = RowLog(job.path(f"-{TOO_LONG}"))
    tools, seen_tools = RowLog(job.path(f"-{PIECE_TOOLS}")), SeenTools()
    writer = ShardWriter(job)
    for number, (where, row) in enumerate(rows):
        report.num_read += 1
        place = {"file": str(where.file), "line": where.line}
        try:
            trajectory = parse(row, where, job.settings)
            with error_context(where):
                samples = [
                    _measure(sample, encoder, job.settings) for sample in unroll(trajectory, encoder, job.settings)
                ]
        except DataError as error:
            report.num_rejected += 1
            refused.append(number)
            tell(spell(str(error), OPTIONS))
            rejected.write(place | {"error": spell(str(error), OPTIONS)})
            if len(errors) < NUM_ERRORS_SHOWN:
                errors.append(str(error))
            continue
        report.num_unrolled += len(samples) - 1
        for sample in samples:
            if sample.length:
                too_long.write(place | sample.length)
                report.num_cut += sample.kept is not None
                report.num_dropped += sample.kept is None
            if sample.kept and sample.encoded:
                writer.add(*_as_written(sample.kept, sample.encoded, where, number))
                for tool in filter(seen_tools.is_new, map(_declaration, sample.kept.tools)):
                    tools.write_line(tool.line())
    tools.close()
    rejected.close()
    too_long.close()
    writer.close(report, refused, errors)


def _as_written(trajectory: Trajectory, encoded: Encoded, where: Where, number: int) -> tuple[dict[str, Any], Sample]:
    """A sample of row `number` as a line of SCHEMA, and what the record holds of it."""
    images = [{"bytes": image, "path": None} for image in trajectory.images]
    row = {
        "id": trajectory.id,
        "messages": json.dumps(trajectory.messages, ensure_ascii=False, allow_nan=False, separators=(",", ":")),
        "tools": f"[{','.join([_declaration(tool).text for tool in trajectory.tools])}]",
        "images": images,
        "enable_thinking": trajectory.enable_thinking,
    }
    num_text_tokens = encoded.num_tokens - encoded.num_image_tokens
    counts = [num_text_tokens, encoded.num_image_tokens, encoded.num_images, encoded.num_target_tokens]
    notes = _notes(trajectory, encoded)
    noted = {"num_dropped_reasoning": encoded.num_dropped_reasoning, "notes": notes}
    text = intern(to_json(noted)) if any(noted.values()) else ""  # many samples have the same
    return row, Sample(trajectory.id, counts, trajectory.weight, str(where.file), where.line, number, text)


def _notes(trajectory: Trajectory, encoded: Encoded) -> Counter[str]:
    """What the report says of a written row, in the words of the command line."""
    notes: Counter[str] = Counter()
    for found in (trajectory.notes, encoded.notes):
        for note, count in found.items():
            notes[spell(note, OPTIONS)] += count
    if not trajectory.tools and any("tool_calls" in message for message in trajectory.messages):
        notes[UNDECLARED] += 1
    return notes


@dataclass(frozen=True)
class _Measured:
    """A sample within the length limit."""

    kept: Trajectory | None  # None: dropped for its length
    encoded: Encoded | None
    length: dict[str, Any] | None  # what the log says of one that is dropped or cut


def _measure(sample: Trajectory, encoder: Encoder, settings: ShardConfig) -> _Measured:
    encoded = encode_trained(sample, encoder)
    kept, encoded_kept = fit(sample, encoded, encoder, settings) or (None, None)
    if kept is sample:
        return _Measured(kept, encoded_kept, None)
    length = {
        "id": sample.id,
        "num_tokens": encoded.num_tokens,
        "num_messages": len(sample.messages),
        "num_messages_kept": len(kept.messages) if kept else 0,
    }
    return _Measured(kept, encoded_kept, length)


# ---- writing ---------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Samples into row groups into the shard files of a piece, all bounded by bytes, and in the end its record."""

    def __init__(self, job: ShardJob) -> None:
        self.num_written = 0
        self._job = job
        self._totals: Counter[str] = Counter()  # as a ShardReport counts them
        self._notes: Counter[str] = Counter()
        self._shards: list[ShardEntry] = []  # the finished ones
        self._lines: list[dict[str, Any]] = []  # of the manifest, with ORIGINS: their row groups
        self._samples: list[list[Sample]] = [[]]  # for each row group of this shard
        self._rows: list[dict[str, Any]] = []  # of the row group that is being filled
        self._row_bytes = 0
        self._shard_bytes = 0
        self._parquet: pq.ParquetWriter | None = None

    def add(self, row: dict[str, Any], sample: Sample) -> None:
        """Write a sample: `row` has the values of SCHEMA."""
        images = sum(len(image["bytes"]) for image in row["images"])
        num_bytes = len(row["messages"].encode()) + len(row["tools"].encode()) + images
        if self._rows and self._row_bytes + num_bytes > self._job.row_group_bytes:
            self._end_row_group()
        if self._parquet and self._shard_bytes + num_bytes > self._job.shard_bytes:
            self._end_row_group()
            self._end_shard()
        self._samples[-1].append(sample)
        self._totals.update(dict(zip(COUNTS, sample.counts, strict=True)))
        self.num_written += 1
        if sample.noted:
            noted = json.loads(sample.noted)
            self._notes.update(noted.pop("notes"))
            self._totals.update(noted)
        self._rows.append(row)
        self._row_bytes += num_bytes
        self._shard_bytes += num_bytes

    def close(self, report: ShardReport, rejected: list[int], errors: list[str]) -> None:
        """Finish the last shard, then write the record: the piece is done from here on.

        Args:
            report: gets what it says of the samples that were added.
            rejected: the numbers of the rows that were refused.
        """
        self._end_row_group()
        self._end_shard()
        for name, total in self._totals.items():
            setattr(report, name, total)
        report.num_written, report.notes = self.num_written, self._notes
        lines = pa.Table.from_pylist(self._lines, RECORD_SCHEMA)
        ids, record = self._job.ids, self._job.record
        write_hashes(_begun(ids), lines["id"].combine_chunks().flatten())
        publish(_partial(ids), ids)
        header = PieceHeader(report=report.to_json(), rejected=rejected, errors=errors, shards=self._shards)
        write_record(_begun(record), header, lines)
        publish(_partial(record), record)

    def _path(self) -> Path:
        return self._job.shard_path(len(self._shards))

    def _end_row_group(self) -> None:
        if not self._rows:
            return
        if self._parquet is None:
            # Images are compressed already. Statistics of the long strings would only bloat the footer.
            self._parquet = pq.ParquetWriter(
                _begun(self._path()),
                SCHEMA,
                compression={"id": "zstd", "messages": "zstd", "tools": "zstd"},
                use_dictionary=False,
                write_statistics=["id"],
                write_page_checksum=True,
            )
        columns = {field.name: pa.array([row[field.name] for row in self._rows], field.type) for field in SCHEMA}
        self._parquet.write_table(pa.table(columns, schema=SCHEMA), row_group_size=len(self._rows))
        self._rows, self._row_bytes = [], 0
        self._samples.append([])

    def _end_shard(self) -> None:
        if self._parquet is None:
            return
        self._parquet.close()
        path = self._path()
        publish(_partial(path), path)
        finished = _describe(path)
        footer: bytes | None = finished.footer
        for samples, place in zip(self._samples, finished.row_groups, strict=False):
            line = row_group_line(
                [sample.id for sample in samples],
                [sample.counts for sample in samples],
                [sample.weight for sample in samples],
                len(self._shards),
                place,
                footer,
            )
            for name in ORIGINS:
                line[name] = [getattr(sample, name) for sample in samples]
            self._lines.append(line)
            footer = None  # on the first line of a shard alone
        self._shards.append(finished.entry)
        self._parquet, self._shard_bytes, self._samples = None, 0, [[]]


class RowLog:
    """A JSONL file that appears under its name when it is closed, and only if a row was written to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: JsonlWriter | None = None

    def write(self, row: Mapping[str, object]) -> None:
        self.write_line(to_json(row))

    def write_line(self, line: str) -> None:
        self._file = self._file or JsonlWriter(_partial(self._path), append=False, flushes=False)
        self._file.write_line(line)

    def close(self) -> None:
        if self._file:
            self._file.close()
            publish(_partial(self._path), self._path)


def _begun(path: Path) -> Path:
    """An empty file to write to until it is complete."""
    begin(_partial(path))
    return _partial(path)


def _partial(path: Path) -> Path:
    """Where a file is written until it is complete."""
    return path.with_name(f".{path.name}.tmp")


_declaration = of_shared(Declaration.of)


@dataclass(frozen=True)
class _FinishedShard:
    entry: ShardEntry
    row_groups: list[RowGroupPlace]
    footer: bytes  # deflated


def _describe(path: Path) -> _FinishedShard:
    """What the manifest says of a shard that has been written."""
    metadata = pq.read_metadata(path)
    places = []
    with path.open("rb") as file:
        magic = file.read(4)
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            columns = [group.column(column) for column in range(group.num_columns)]
            offset = columns[0].data_page_offset
            num_bytes = sum(column.total_compressed_size for column in columns)
            assert offset == file.tell(), "row groups lie one behind the other, without dictionary pages"
            places.append(RowGroupPlace(offset, num_bytes, digest(file.read(num_bytes))))
        footer = file.read()
        entry: ShardEntry = {
            "name": path.name,
            "bytes": file.tell(),
            "rest_digest": digest(magic + footer).hex(),
        }
    return _FinishedShard(entry, places, zlib.compress(footer))
