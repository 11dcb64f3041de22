"""The manifest of a shard folder: where each row group lies, and how long each sample is.

`manifest.arrow` is an Arrow IPC file of one record batch with one line a row group, written last: its presence marks a
finished folder. It is memory-mapped, so that ten million samples cost a rank what it looks at and no more. Behind it
stand its SHA-256 (32 bytes) and `GEMMDIST`: what Arrow is given to read has been found whole.

    shard, offset, num_bytes, digest    the bytes of the row group: number of the file in the header, place, SHA-256
    num_samples, num_tokens             its totals; tokens of text and images together
    footer                              on the first line of a shard: the bytes behind its last row group, deflated, so
                                        that a row group can be read with one request and nothing else of the file
    id, num_text_tokens, …              one list a line: a value for each of its samples, in the order of the rows
    weight                              likewise, by which the loss of each is multiplied; null: all are 1. Absent where
                                        all of the folder are; where it is there, the format version is 4

The schema's metadata holds `header`, JSON: format version, fingerprint of the encoding, settings, and the `shards` as
{name, bytes, rest_digest}, where `rest_digest` (hexadecimal) covers all bytes outside of the row groups.

Version 2 had CRC-32 in the place of each SHA-256, and one of its own in the metadata, after which Arrow had been given
the file. It is still read; what is appended to it comes with SHA-256.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import pyarrow as pa

from gemma_dist.errors import DataError
from gemma_dist.files import begin, publish
from gemma_dist.logs import log
from gemma_dist.shards.joined import write_joined

FORMAT_VERSION, EARLIER_VERSION = 3, 2
VERSION_WITH_WEIGHTS = 4  # which nobody reads who would not heed them
MANIFEST = "manifest.arrow"
UNFINISHED = ".unfinished"  # stands in a folder while `gemma-dist shard` writes to it
FINISHED = ".finished"  # what it becomes: what the last call did
END = b"GEMMDIST"  # of the file, behind its SHA-256
NUM_CRC32_BYTES = 4
READ_BYTES = 1 << 20
COUNTS = ("num_text_tokens", "num_image_tokens", "num_images", "num_target_tokens")
SCHEMA = pa.schema(
    {
        "shard": pa.int32(),
        "offset": pa.int64(),
        "num_bytes": pa.int64(),
        "digest": pa.binary(),  # of 4 bytes where it is an earlier version's CRC-32
        "num_samples": pa.int64(),
        "num_tokens": pa.int64(),
        "footer": pa.large_binary(),
        "id": pa.large_list(pa.large_string()),
        **{name: pa.large_list(pa.int32()) for name in COUNTS},
    }
)
WEIGHT = pa.field("weight", pa.large_list(pa.float64()))  # empty where all of a row group are 1
SCHEMA_WITH_WEIGHTS = SCHEMA.append(WEIGHT)


class ShardEntry(TypedDict):
    """A shard as the header lists it."""

    name: str  # of the file
    bytes: int  # the size of the file
    rest_digest: str  # of all bytes outside of the row groups, hexadecimal


class CorpusHeader(TypedDict):
    """How the rows of a folder became samples: all of them alike, those that are appended too."""

    fingerprint: str  # of the encoder
    settings: dict[str, object]  # of ShardConfig, without media_root


class ManifestHeader(CorpusHeader):
    """What a manifest says of the whole folder."""

    format_version: int
    shards: list[ShardEntry]
    num_tools: NotRequired[int]  # declarations in tools.json; earlier versions wrote none


class RowGroupPlace(NamedTuple):
    """Where the bytes of a row group lie in its shard, and their checksum."""

    offset: int
    num_bytes: int
    digest: bytes


def digest(data: bytes) -> bytes:
    """The checksum that is written of bytes: their SHA-256."""
    return hashlib.sha256(data).digest()


def has_digest(data: bytes, written: bytes) -> bool:
    """Whether bytes are those of which `written` is the checksum: SHA-256, or the CRC-32 of an earlier version."""
    found = _crc32_bytes(zlib.crc32(data)) if len(written) == NUM_CRC32_BYTES else digest(data)
    return found == written


def _crc32_bytes(crc32: int) -> bytes:
    return crc32.to_bytes(NUM_CRC32_BYTES)


@dataclass(frozen=True)
class Manifest:
    """One open manifest of R row groups and N samples. The arrays lie in the mapped file."""

    header: ManifestHeader
    table: pa.Table  # as SCHEMA says
    sha256: str  # of the file

    @cached_property
    def _batch(self) -> pa.RecordBatch:
        return self.table.to_batches()[0]

    def row_groups(self, name: str) -> np.ndarray:
        """(R,) of `shard`, `offset`, `num_bytes`, `num_samples` or `num_tokens`."""
        return self._batch.column(name).to_numpy()

    def place(self, row_group: int) -> tuple[int, RowGroupPlace]:
        """The shard of a row group, and where it lies in it."""
        shard, *place = (self._batch.column(name)[row_group].as_py() for name in ("shard", *RowGroupPlace._fields))
        return shard, RowGroupPlace(*place)

    def footer(self, shard: int) -> bytes:
        """The bytes of a shard behind its last row group: parquet's metadata, its length, and `PAR1`."""
        first = int(np.searchsorted(self.row_groups("shard"), shard))
        return zlib.decompress(self._batch.column("footer")[first].as_py())

    def samples(self, name: str) -> np.ndarray:
        """(N,) int32 of one of COUNTS."""
        return self._batch.column(name).values.to_numpy()

    @property
    def weights(self) -> np.ndarray | None:
        """(N,) float64, by which the losses of samples are multiplied; None: all are 1."""
        if WEIGHT.name not in self.table.column_names:
            return None
        column = self._batch.column(WEIGHT.name)
        given = np.repeat(column.value_lengths().to_numpy() > 0, self.row_groups("num_samples"))
        weights = np.ones(len(given))
        weights[given] = column.flatten().to_numpy()
        return weights

    def beginning(self, num_row_groups: int) -> str:
        """A hash of the first row groups: equal where their rows, their weights and their order are."""
        hashed = hashlib.sha256()
        for name in ("num_bytes", "num_samples"):
            hashed.update(self.row_groups(name)[:num_row_groups].tobytes())
        hashed.update(b"".join(self._batch.column("digest")[:num_row_groups].to_pylist()))
        if (weights := self.weights) is not None:
            weights = weights[: self.row_groups("num_samples")[:num_row_groups].sum()]
            hashed.update(weights.tobytes() if (weights != 1).any() else b"")
        return hashed.hexdigest()[:16]

    @property
    def ids(self) -> pa.Array:
        """(N,) strings."""
        return self._batch.column("id").values


def row_group_line(
    ids: Sequence[str],
    counts: Sequence[Sequence[int]],
    weights: Sequence[float],
    shard: int,
    place: RowGroupPlace,
    footer: bytes | None,
) -> dict[str, Any]:
    """A line of SCHEMA_WITH_WEIGHTS. `counts` holds, for each sample, the values of COUNTS; `footer` is deflated."""
    columns = {name: [sample[i] for sample in counts] for i, name in enumerate(COUNTS)}
    num_tokens = sum(columns["num_text_tokens"]) + sum(columns["num_image_tokens"])
    return {
        "shard": shard,
        **place._asdict(),
        "num_samples": len(ids),
        "num_tokens": num_tokens,
        "footer": footer,
        "id": list(ids),
        **columns,
        WEIGHT.name: [] if all(weight == 1 for weight in weights) else list(weights),
    }


def write_manifest(
    folder: Path,
    corpus: CorpusHeader,
    shards: list[ShardEntry],
    tables: Callable[[], Iterable[pa.Table]],
    num_tools: int | None,
) -> None:
    """Write `folder`/manifest.arrow, complete or not at all: the folder is finished from here on.

    Memory: one table, and of all of them what a row group takes beside its samples, some 150 bytes, and the footers.

    Args:
        num_tools: declarations in tools.json; None: no such list was made.
        tables: gives lines of SCHEMA or SCHEMA_WITH_WEIGHTS, in the order of the shards and of the row groups in them.
            It is called twice or more.
    """
    has_weights = any(map(_has_weights, tables()))
    schema = SCHEMA_WITH_WEIGHTS if has_weights else SCHEMA
    header: ManifestHeader = {
        "format_version": VERSION_WITH_WEIGHTS if has_weights else FORMAT_VERSION,
        "fingerprint": corpus["fingerprint"],
        "settings": corpus["settings"],
        "shards": shards,
    }
    if num_tools is not None:
        header["num_tools"] = num_tools
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    path = folder / MANIFEST
    temporary = path.with_name(f".{MANIFEST}.tmp")
    begin(temporary)
    header_schema = schema.with_metadata({"header": text})
    write_joined(temporary, header_schema, lambda: (_with_columns(table, schema) for table in tables()))
    sha256 = _sha256(temporary, temporary.stat().st_size)
    with temporary.open("ab") as file:
        file.write(sha256 + END)
    publish(temporary, path)


def _has_weights(table: pa.Table) -> bool:
    """Whether one of the samples has another weight than 1."""
    return WEIGHT.name in table.column_names and any(len(chunk.flatten()) for chunk in table[WEIGHT.name].chunks)


def _with_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of `schema`; without weights, all are 1."""
    if WEIGHT.name in schema.names and WEIGHT.name not in table.column_names:
        table = table.append_column(WEIGHT, pa.array([[]] * table.num_rows, WEIGHT.type))
    return table.select(schema.names)


def read_manifest(path: Path, origin: str) -> Manifest:
    """The manifest in the file `path`; `origin` is what messages call it.

    Raises:
        DataError: a byte of it differs from what was written, or it is of another format version.
    """
    try:
        return _read_manifest(path, origin)
    except DataError:
        raise
    except PermissionError as error:
        raise DataError(f"{origin} cannot be read ({error.strerror}); have its permissions changed") from error
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{origin} is damaged ({error}); make the shards again") from error


def _read_manifest(path: Path, origin: str) -> Manifest:
    """The manifest. Raises DataError, or one of many where it is damaged."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(END)))
        if file.read() != END:
            return _read_earlier(path, origin)
    sealed = read_seal(path)
    if sealed is None:
        raise ValueError("its checksum differs")
    table = pa.ipc.open_file(pa.memory_map(str(path)).read_buffer(path.stat().st_size - len(sealed))).read_all()
    header: ManifestHeader = json.loads(table.schema.metadata[b"header"])
    version = VERSION_WITH_WEIGHTS if WEIGHT.name in table.column_names else FORMAT_VERSION
    _require_version(header, version, origin)
    return Manifest(header, table, sealed.removesuffix(END).hex())


def read_seal(path: Path) -> bytes | None:
    """What stands behind the Arrow file of a manifest; None where it is not the seal of what comes before it."""
    num_bytes = path.stat().st_size - hashlib.sha256().digest_size - len(END)
    if num_bytes < 0:
        return None
    with path.open("rb") as file:
        file.seek(num_bytes)
        found = file.read()
    return found if found == _sha256(path, num_bytes) + END else None


def _sha256(path: Path, num_bytes: int) -> bytes:
    """Of the beginning of a file. It is read, not mapped: a map that has not been touched takes no memory."""
    hashed, piece = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while num_bytes and (done := file.readinto(piece[: min(num_bytes, READ_BYTES)])):
            hashed.update(piece[:done])
            num_bytes -= done
    return hashed.digest()


def _require_version(header: ManifestHeader, version: int, origin: str) -> None:
    if header["format_version"] != version:
        raise DataError(
            f"{origin} has format version {header['format_version']}, this gemma_dist reads {EARLIER_VERSION} to "
            f"{VERSION_WITH_WEIGHTS}; make the shards again"
        )


# ---- version 2 -------------------------------------------------------------------------------------------------------


def _read_earlier(path: Path, origin: str) -> Manifest:
    """A manifest of version 2 in the words of today: its CRC-32 stand where SHA-256 do."""
    # Checked through a map of its own, which ends here: what is mapped afterwards has not been touched yet.
    if not _is_intact(pa.ipc.open_file(pa.memory_map(str(path))).read_all()):
        raise ValueError("its checksum differs")
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    header = json.loads(table.schema.metadata[b"header"])
    _require_version(header, EARLIER_VERSION, origin)
    for entry in header["shards"]:
        entry["rest_digest"] = _crc32_bytes(entry.pop("rest_crc32")).hex()
    digests = pa.array([_crc32_bytes(crc32) for crc32 in table["crc32"].to_pylist()], SCHEMA.field("digest").type)
    table = table.set_column(table.schema.get_field_index("crc32"), SCHEMA.field("digest"), [digests])
    log.info("%s is of an earlier version: CRC-32 tells of accidents with its shards, and not of forgery", origin)
    return Manifest(header, table, _sha256(path, path.stat().st_size).hex())


def _is_intact(table: pa.Table) -> bool:
    metadata = table.schema.metadata
    return int(metadata[b"crc32"]) == _crc32(metadata[b"header"].decode(), table)


def _crc32(header: str, table: pa.Table) -> int:
    crc = zlib.crc32(header.encode())
    for column in table.columns:
        for chunk in column.chunks:
            for buffer in filter(None, chunk.buffers()):
                crc = zlib.crc32(buffer, crc)
    return crc
