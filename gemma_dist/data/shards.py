"""Trajectories -> parquet shards with a manifest, and back.

A shard folder holds

    train-00000.parquet …   id, messages, tools, images as any parquet reader and plain `datasets` take them
    manifest.arrow          one line a sample: where it lies, how long it is; written last, it marks a finished folder
    rejected.jsonl          with --skip-invalid: the rows that were refused, with file, line and error
    too_long.jsonl          the rows that were cut or dropped for their length

Reading trusts no byte of a shard: its size and footer are checked when it is first touched, each row group before it is
parsed. The same input gives the same bytes.
"""

import hashlib
import json
import threading
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gemma_dist.config import DataConfig
from gemma_dist.data.encode import Encoded, Encoder, load_encoder
from gemma_dist.data.rows import Where, read_rows
from gemma_dist.data.strict import at
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.errors import DataError
from gemma_dist.report import JsonlWriter, progress

FORMAT_VERSION = 1
ROW_GROUP_BYTES = 4 << 20  # before compression: the piece that is fetched and checked as one
SHARD_BYTES = 256 << 20
NUM_CACHED_ROW_GROUPS = 8
NUM_ERRORS_SHOWN = 5

MANIFEST = "manifest.arrow"
REJECTED = "rejected.jsonl"
TOO_LONG = "too_long.jsonl"
UNFINISHED = ".unfinished"  # stands in the folder while it is being written: what it holds may then be replaced

COUNTS = ("num_text_tokens", "num_image_tokens", "num_images", "num_target_tokens")
PLACE = ("shard", "row_group", "row")
IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
# What `datasets.Features(…).arrow_schema` gives for id, Json, Json, List(Image(decode=False)), without the import.
FEATURES = {
    "id": {"dtype": "string", "_type": "Value"},
    "messages": {"_type": "Json"},
    "tools": {"_type": "Json"},
    "images": {"feature": {"decode": False, "_type": "Image"}, "_type": "List"},
}
SCHEMA = pa.schema(
    {"id": pa.string(), "messages": pa.json_(), "tools": pa.json_(), "images": pa.list_(IMAGE_TYPE)},
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


@dataclass
class ShardReport:
    """What became of the rows: read = written + rejected + dropped; the cut ones are among the written."""

    out: str
    num_read: int = 0
    num_written: int = 0
    num_rejected: int = 0
    num_dropped: int = 0
    num_cut: int = 0
    num_shards: int = 0
    num_text_tokens: int = 0
    num_image_tokens: int = 0
    num_images: int = 0
    num_target_tokens: int = 0
    num_dropped_reasoning: int = 0  # assistant messages whose reasoning the chat template leaves out

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        lines = [
            f"{self.num_written:,} of {self.num_read:,} rows in {self.num_shards:,} shards: {self.out}",
            f"{self.num_text_tokens:,} text tokens, {self.num_image_tokens:,} image tokens in {self.num_images:,} "
            f"images; {self.num_target_tokens:,} tokens are trained",
        ]
        if self.num_rejected:
            lines.append(f"{self.num_rejected:,} rows were refused: {Path(self.out) / REJECTED}")
        if self.num_dropped or self.num_cut:
            lines.append(
                f"{self.num_dropped:,} rows were dropped and {self.num_cut:,} cut for their length: "
                f"{Path(self.out) / TOO_LONG}"
            )
        if self.num_dropped_reasoning:
            lines.append(
                f"{self.num_dropped_reasoning:,} messages lose their reasoning, since the chat template renders it "
                "after the last user turn only: to train on it, make one row for each user turn"
            )
        return "\n".join(lines)


def run_shard(inputs: list[Path], out: Path, model: str, settings: DataConfig, skip_invalid: bool) -> ShardReport:
    """Check, measure and write all rows of `inputs` to the shard folder `out`.

    Rows are streamed: one row group is held in memory, and about 300 bytes a sample (id, place, lengths).

    Raises:
        DataError: `out` is taken; or rows were refused and `skip_invalid` is not set (`out` then holds nothing but
            `rejected.jsonl`, with every refused row of the whole input); or no row is left to write.
    """
    encoder = load_encoder(model, chat_template=settings.chat_template, enable_thinking=settings.enable_thinking)
    _claim(out)
    try:
        report = _write(inputs, out, encoder, settings, skip_invalid)
    except BaseException:
        _clear(out, keep=REJECTED)
        raise
    (out / UNFINISHED).unlink()
    return report


def _write(inputs: list[Path], out: Path, encoder: Encoder, settings: DataConfig, skip_invalid: bool) -> ShardReport:
    report = ShardReport(str(out))
    rejected, too_long, writer = _RowLog(out / REJECTED), _RowLog(out / TOO_LONG), _ShardWriter(out)
    first_errors: list[str] = []
    seen: dict[str, str] = {}
    for where, row in progress(read_rows(inputs), total=None, desc="sharding", unit=" rows"):
        report.num_read += 1
        try:
            trajectory = parse(row, where, settings)
            if trajectory.id in seen:
                raise DataError(
                    f"{where}: the id {trajectory.id!r} belongs to {seen[trajectory.id]} already; ids are unique over "
                    "the whole input: rename one of them (a row without an id is named by file and line)"
                )
            seen[trajectory.id] = str(where)
            with at(where):
                encoded = encode_trained(trajectory, encoder)
                fitting = fit(trajectory, encoded, encoder, settings)
        except DataError as error:
            report.num_rejected += 1
            rejected.write({"file": str(where.file), "line": where.line, "error": str(error)})
            if len(first_errors) < NUM_ERRORS_SHOWN:
                first_errors.append(str(error))
            continue
        if fitting is None or fitting[0] is not trajectory:
            num_kept = len(fitting[0].messages) if fitting else 0
            too_long.write(
                {
                    "file": str(where.file),
                    "line": where.line,
                    "id": trajectory.id,
                    "num_tokens": len(encoded.input_ids),
                    "num_messages": len(trajectory.messages),
                    "num_messages_kept": num_kept,
                }
            )
            report.num_cut += num_kept > 0
            report.num_dropped += num_kept == 0
        if fitting and (skip_invalid or not first_errors):
            writer.add(*fitting)
            report.num_dropped_reasoning += fitting[1].num_dropped_reasoning
    rejected.close()
    if first_errors and not skip_invalid:
        raise DataError(
            f"{report.num_rejected:,} of {report.num_read:,} rows were refused, so nothing was written. The first:\n"
            + "\n".join(f"  {error}" for error in first_errors)
            + f"\nAll of them are in {out / REJECTED}; mend them, or leave them out with --skip-invalid"
        )
    if not writer.num_samples:
        raise DataError(
            f"none of the {report.num_read:,} rows of {', '.join(map(str, inputs))} is left to write: "
            f"{report.num_rejected:,} were refused, {report.num_dropped:,} dropped for their length"
        )
    too_long.close()
    writer.close(encoder.fingerprint, settings)
    report.num_written, report.num_shards = writer.num_samples, len(writer.shards)
    for name in COUNTS:
        setattr(report, name, sum(writer.columns[name]))
    return report


def parse(row: dict[str, Any] | DataError, where: Where, settings: DataConfig) -> Trajectory:
    """A raw row, as `read_rows` gives it, by the settings. Raises DataError where it breaks the data contract."""
    if isinstance(row, DataError):
        raise row
    return parse_row(
        row,
        where=where,
        media_root=settings.media_root,
        text_beside_call=settings.text_beside_call,
        control_tokens=settings.control_tokens,
        max_image_pixels=settings.max_image_pixels,
    )


def encode_trained(trajectory: Trajectory, encoder: Encoder) -> Encoded:
    """The encoded trajectory. Raises DataError where the template cannot express it, or not one token is trained."""
    encoded = encoder.encode(trajectory)
    if not encoded.num_target_tokens:
        raise DataError("not one token of this row would be trained; at least one assistant message must say something")
    return encoded


def fit(
    trajectory: Trajectory, encoded: Encoded, encoder: Encoder, settings: DataConfig
) -> tuple[Trajectory, Encoded] | None:
    """The trajectory with at most `settings.max_length` tokens: whole, or with turns cut from its end; None: dropped.

    Raises:
        DataError: it is longer and `settings.too_long` is "error".
    """
    limit = settings.max_length
    if limit is None or len(encoded.input_ids) <= limit:
        return trajectory, encoded
    if settings.too_long == "error":
        raise DataError(
            f"{len(encoded.input_ids):,} tokens ({encoded.num_image_tokens:,} of images), but max_length is "
            f"{limit:,}; raise it, or choose --too-long drop or cut_turns"
        )
    if settings.too_long == "cut_turns":
        # From long to short by trial: reasoning is rendered only after the last user turn, so that what remains after a
        # cut is not a prefix of the tokens of the whole.
        for end in reversed(cut_points(trajectory.messages)):
            shorter = _first_messages(trajectory, end)
            encoded = encoder.encode(shorter)
            if len(encoded.input_ids) <= limit and encoded.num_target_tokens:
                return shorter, encoded
    return None


def cut_points(messages: list[dict[str, Any]]) -> list[int]:
    """How many messages may remain when a trajectory is cut at its end, without the whole of it.

    Each remainder ends with a trained assistant message, which may be a call: its responses go together. It never ends
    between two assistant messages in a row, which are one turn (the text before a call and the call): the model would
    learn to stop after announcing a call.
    """
    return [
        end
        for end in range(1, len(messages))
        if messages[end - 1]["role"] == "assistant"
        and messages[end - 1].get("train", True)
        and messages[end]["role"] != "assistant"
    ]


def _first_messages(trajectory: Trajectory, end: int) -> Trajectory:
    messages = trajectory.messages[:end]
    parts = (part for message in messages if isinstance(message["content"], list) for part in message["content"])
    num_images = sum(part["type"] == "image" for part in parts)
    return replace(trajectory, messages=messages, images=trajectory.images[:num_images])


# ---- writing ---------------------------------------------------------------------------------------------------------


class _ShardWriter:
    """Rows into row groups into shard files, all bounded by bytes, and in the end the manifest."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.ids: list[str] = []
        self.columns = {name: array("i") for name in (*PLACE, *COUNTS)}
        self.shards: list[dict[str, Any]] = []  # the finished ones, as the manifest lists them
        self._rows: list[dict[str, Any]] = []  # of the row group that is being filled
        self._row_bytes = 0
        self._shard_bytes = 0
        self._num_row_groups = 0  # in the shard that is being filled
        self._parquet: pq.ParquetWriter | None = None

    @property
    def num_samples(self) -> int:
        return len(self.ids)

    def add(self, trajectory: Trajectory, encoded: Encoded) -> None:
        messages, tools = _to_json(trajectory.messages), _to_json(trajectory.tools)
        images = [{"bytes": image, "path": None} for image in trajectory.images]
        row = {"id": trajectory.id, "messages": messages, "tools": tools, "images": images}
        num_bytes = len(messages.encode()) + len(tools.encode()) + sum(map(len, trajectory.images))
        if self._rows and self._row_bytes + num_bytes > ROW_GROUP_BYTES:
            self._end_row_group()
        if self._parquet and self._shard_bytes + num_bytes > SHARD_BYTES:
            self._end_row_group()
            self._end_shard()
        self.ids.append(trajectory.id)
        values = {
            "shard": len(self.shards),
            "row_group": self._num_row_groups,
            "row": len(self._rows),
            "num_text_tokens": len(encoded.input_ids) - encoded.num_image_tokens,
            "num_image_tokens": encoded.num_image_tokens,
            "num_images": encoded.num_images,
            "num_target_tokens": encoded.num_target_tokens,
        }
        for name, value in values.items():
            self.columns[name].append(value)
        self._rows.append(row)
        self._row_bytes += num_bytes
        self._shard_bytes += num_bytes

    def close(self, fingerprint: str, settings: DataConfig) -> None:
        """Finish the last shard, then write the manifest: the folder is complete from here on."""
        self._end_row_group()
        self._end_shard()
        header = {
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint,
            "settings": settings.model_dump(mode="json", exclude={"media_root", "train"}),
            "shards": self.shards,
        }
        table = pa.table(
            {
                "id": pa.array(self.ids, pa.large_string()),
                **{name: pa.array(np.asarray(values), pa.int32()) for name, values in self.columns.items()},
            }
        )
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
        table = table.replace_schema_metadata({"header": text, "crc32": str(_manifest_crc32(text, table))})
        path = self.out / MANIFEST
        with pa.ipc.new_file(_partial(path), table.schema) as file:
            file.write_table(table, max_chunksize=max(1, len(self.ids)))
        _partial(path).rename(path)

    def _path(self) -> Path:
        # `datasets` finds files called "train" in a folder, and so does not stumble over the manifest beside them.
        return self.out / f"train-{len(self.shards):05d}.parquet"

    def _end_row_group(self) -> None:
        if not self._rows:
            return
        if self._parquet is None:
            # Pictures are compressed already. Statistics of the long texts would only bloat the footer.
            self._parquet = pq.ParquetWriter(
                _partial(self._path()),
                SCHEMA,
                compression={"id": "zstd", "messages": "zstd", "tools": "zstd"},
                use_dictionary=False,
                write_statistics=["id"],
                write_page_checksum=True,
            )
        columns = {field.name: pa.array([row[field.name] for row in self._rows], field.type) for field in SCHEMA}
        self._parquet.write_table(pa.table(columns, schema=SCHEMA), row_group_size=len(self._rows))
        self._rows, self._row_bytes = [], 0
        self._num_row_groups += 1

    def _end_shard(self) -> None:
        if self._parquet is None:
            return
        self._parquet.close()
        path = self._path()
        _partial(path).rename(path)
        self.shards.append(_describe(path))
        self._parquet, self._shard_bytes, self._num_row_groups = None, 0, 0


class _RowLog:
    """A JSONL file that appears under its name when it is closed, and only if a row was written to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: JsonlWriter | None = None

    def write(self, row: dict[str, Any]) -> None:
        self._file = self._file or JsonlWriter(_partial(self._path), append=False)
        self._file.write(row)

    def close(self) -> None:
        if self._file:
            self._file.close()
            _partial(self._path).rename(self._path)


def _claim(out: Path) -> None:
    """Make `out` an empty folder that is ours. What a crashed or refused run left is replaced; nothing else ever is."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; name a folder with --out")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if MANIFEST in names:
        raise DataError(f"{out} holds finished shards already; remove it, or name another folder with --out")
    if UNFINISHED not in names and names - {REJECTED}:
        raise DataError(
            f"{out} holds {min(names - {REJECTED})!r}, which `gemma-dist shard` did not leave there; name a new folder"
            " with --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / UNFINISHED).touch()
    _clear(out, keep=UNFINISHED)


def _clear(out: Path, keep: str) -> None:
    """Remove what is in `out`, with the folder itself if nothing is kept."""
    for path in out.iterdir():
        if path.name != keep:
            path.unlink()
    if not any(out.iterdir()):
        out.rmdir()


def _partial(path: Path) -> Path:
    """Where a file is written until it is complete."""
    return path.with_name(f".{path.name}.tmp")


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _describe(path: Path) -> dict[str, Any]:
    """A finished shard as the manifest lists it. `row_groups` are [offset, bytes, rows, crc32]; `rest_crc32` covers all
    bytes outside of them: the magic number at the front and the footer."""
    metadata = pq.read_metadata(path)
    row_groups = []
    with path.open("rb") as file:
        rest = zlib.crc32(file.read(4))
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            chunks = [group.column(column) for column in range(group.num_columns)]
            offset, num_bytes = chunks[0].data_page_offset, sum(chunk.total_compressed_size for chunk in chunks)
            assert offset == file.tell(), "row groups lie one behind the other, without dictionary pages"
            row_groups.append([offset, num_bytes, group.num_rows, zlib.crc32(file.read(num_bytes))])
        rest = zlib.crc32(file.read(), rest)
        return {"name": path.name, "bytes": file.tell(), "rest_crc32": rest, "row_groups": row_groups}


def _manifest_crc32(header: str, table: pa.Table) -> int:
    crc = zlib.crc32(header.encode())
    for column in table.columns:
        for chunk in column.chunks:
            for buffer in filter(None, chunk.buffers()):
                crc = zlib.crc32(buffer, crc)
    return crc


# ---- reading ---------------------------------------------------------------------------------------------------------


class Shards:
    """One or more open shard folders: samples 0 … len-1, folder by folder. Safe to read from several threads.

    `num_text_tokens`, `num_image_tokens`, `num_images` and `num_target_tokens` are int32 arrays (len,); those of a
    single folder lie in its memory-mapped manifest.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        """Raises DataError: no finished shard folder, a damaged manifest, or folders of different encodings."""
        self.folders = list(folders)
        self._shards: list[tuple[Path, dict[str, Any]]] = []  # each shard's file and entry in its manifest
        tables, first_shards, fingerprints = [], [], []
        for folder in folders:
            header, table = _read_manifest(folder)
            tables.append(table)
            first_shards.append(len(self._shards))
            fingerprints.append(header["fingerprint"])
            self._shards += [(folder / shard["name"], shard) for shard in header["shards"]]
        if len(set(fingerprints)) > 1:
            found = ", ".join(f"{folder} ({mark})" for folder, mark in zip(folders, fingerprints, strict=True))
            raise DataError(
                f"the shards were made with different tokenizers, chat templates or image processors: {found}; "
                "make them again with the same model and template"
            )
        self.fingerprint: str = fingerprints[0]
        self._ids = pa.chunked_array([chunk for table in tables for chunk in table.column("id").chunks])
        columns = {name: [table.column(name).chunk(0).to_numpy() for table in tables] for name in (*PLACE, *COUNTS)}
        columns["shard"] = [part + first for part, first in zip(columns["shard"], first_shards, strict=True)]
        whole = {name: parts[0] if len(parts) == 1 else np.concatenate(parts) for name, parts in columns.items()}
        self._shard, self._row_group, self._row = (whole[name] for name in PLACE)
        self.num_text_tokens: np.ndarray = whole["num_text_tokens"]
        self.num_image_tokens: np.ndarray = whole["num_image_tokens"]
        self.num_images: np.ndarray = whole["num_images"]
        self.num_target_tokens: np.ndarray = whole["num_target_tokens"]
        self._lock = threading.Lock()
        self._footers: dict[int, pq.FileMetaData] = {}
        self._row_groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._ids)

    @cached_property
    def manifest_hash(self) -> str:
        """What a checkpoint notes of its corpus: equal where all samples, their order and their encoding are."""
        digest = hashlib.sha256()
        for folder in self.folders:
            with (folder / MANIFEST).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    def id(self, index: int) -> str:
        return self._ids[index].as_py()

    def place(self, index: int) -> str:
        """Where sample `index` lies, for messages: file, row group and row."""
        path, _ = self._shards[self._shard[index]]
        return f"{path}, row group {self._row_group[index]}, row {self._row[index]}"

    def read(self, index: int) -> Trajectory:
        """Sample `index`. DataError, with shard, row group and ids, where the stored bytes are damaged."""
        row = self._read_row_group(index).slice(self._row[index], 1).to_pylist()[0]
        return Trajectory(
            id=row["id"],
            messages=json.loads(row["messages"]),
            tools=json.loads(row["tools"]),
            images=[image["bytes"] for image in row["images"]],
        )

    def _read_row_group(self, index: int) -> pa.Table:
        """The row group of sample `index`, from the cache or checked from the file."""
        key = shard, row_group = int(self._shard[index]), int(self._row_group[index])
        with self._lock:
            if key in self._row_groups:
                self._row_groups.move_to_end(key)
                return self._row_groups[key]
        try:
            table = self._checked_row_group(shard, row_group)
        except (_DamagedError, OSError, pa.ArrowException) as error:
            first, num_rows = index - int(self._row[index]), self._shards[shard][1]["row_groups"][row_group][2]
            raise DataError(
                f"{self._shards[shard][0]}, row group {row_group}: {error}. It holds the samples "
                f"{', '.join(map(self.id, range(first, first + num_rows)))}. Restore the file from its source, or make "
                "the shards again"
            ) from error
        with self._lock:
            self._row_groups[key] = table
            while len(self._row_groups) > NUM_CACHED_ROW_GROUPS:
                self._row_groups.popitem(last=False)
        return table

    def _checked_row_group(self, shard: int, row_group: int) -> pa.Table:
        path, entry = self._shards[shard]
        if shard not in self._footers:
            self._footers[shard] = _checked_footer(path, entry)
        offset, num_bytes, _, crc32 = entry["row_groups"][row_group]
        with path.open("rb") as file:
            file.seek(offset)
            if zlib.crc32(file.read(num_bytes)) != crc32:
                raise _DamagedError("the bytes differ from those that were written (checksum)")
        # A file object of its own for each call: one is not safe to share between threads.
        with pq.ParquetFile(path, metadata=self._footers[shard], page_checksum_verification=True) as parquet:
            return parquet.read_row_group(row_group)


class _DamagedError(Exception):
    """Stored bytes are not what was written."""


def _checked_footer(path: Path, entry: dict[str, Any]) -> "pq.FileMetaData":
    """The footer of a shard whose size and bytes outside the row groups are as its entry in the manifest says."""
    num_bytes = path.stat().st_size
    if num_bytes != entry["bytes"]:
        raise _DamagedError(f"the file has {num_bytes:,} bytes instead of {entry['bytes']:,}")
    offset, last_bytes, _, _ = entry["row_groups"][-1]
    with path.open("rb") as file:
        rest = zlib.crc32(file.read(4))
        file.seek(offset + last_bytes)
        if zlib.crc32(file.read(), rest) != entry["rest_crc32"]:
            raise _DamagedError("the footer differs from the one that was written (checksum)")
    return pq.read_metadata(path)


def _read_manifest(folder: Path) -> tuple[dict[str, Any], pa.Table]:
    """Header and samples (memory-mapped) of a finished shard folder."""
    path = folder / MANIFEST
    if not path.exists():
        left = " (a `gemma-dist shard` run was interrupted there; run it again)" * (folder / UNFINISHED).exists()
        raise DataError(f"{folder} holds no {MANIFEST}{left}; make shards with `gemma-dist shard … --out {folder}`")
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        text = table.schema.metadata[b"header"].decode()
        intact = int(table.schema.metadata[b"crc32"]) == _manifest_crc32(text, table)
        header = json.loads(text)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); make the shards again") from error
    if not intact:
        raise DataError(f"{path} is damaged (its checksum differs); make the shards again")
    if header["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {header['format_version']}, this gemma_dist reads {FORMAT_VERSION}; make the "
            "shards again"
        )
    return header, table


def open_shards(*folders: Path) -> Shards:
    """Open folders that `run_shard` finished, as one corpus. Raises DataError as `Shards` does."""
    return Shards(folders)


def is_shard_folder(path: Path) -> bool:
    """Whether `path` was written, or begun, by `run_shard`."""
    return (path / MANIFEST).exists() or (path / UNFINISHED).exists()


def load_trajectories(path: Path, settings: DataConfig) -> Iterator[Trajectory]:
    """The trajectories of a shard folder or of raw rows (any input of `run_shard`), in order, for evaluate and inspect.

    Raises:
        DataError: a row breaks the data contract, or a shard is damaged.
    """
    if is_shard_folder(path):
        shards = open_shards(path)
        yield from map(shards.read, range(len(shards)))
    else:
        for where, row in read_rows([path]):
            yield parse(row, where, settings)
