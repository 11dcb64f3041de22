"""The manifest of a shard folder: where each row group lies, and how long each sample is.

`manifest.arrow` is an Arrow IPC file of one record batch with one line a row group, written last: its presence marks a
finished folder. It is memory-mapped, so that ten million samples cost a rank what it looks at and no more.

    shard, offset, num_bytes, crc32     the bytes of the row group: number of the file in the header, place, checksum
    num_samples, num_tokens             its totals; tokens of text and images together
    footer                              on the first line of a shard: the bytes behind its last row group, deflated, so
                                        that a row group can be read with one request and nothing else of the file
    id, num_text_tokens, …              one list a line: a value for each of its samples, in the order of the rows

The schema's metadata holds `header`, JSON: format version, fingerprint of the encoding, settings, and the `shards` as
{name, bytes, rest_crc32}, where `rest_crc32` covers all bytes outside of the row groups; and `crc32` of all of it.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import pyarrow as pa

from gemma_dist.errors import DataError
from gemma_dist.files import publish

FORMAT_VERSION = 2
MANIFEST = "manifest.arrow"
UNFINISHED = ".unfinished"  # stands in a folder while `gemma-dist shard` writes to it
COUNTS = ("num_text_tokens", "num_image_tokens", "num_images", "num_target_tokens")
SCHEMA = pa.schema(
    {
        "shard": pa.int32(),
        "offset": pa.int64(),
        "num_bytes": pa.int64(),
        "crc32": pa.int64(),
        "num_samples": pa.int64(),
        "num_tokens": pa.int64(),
        "footer": pa.large_binary(),
        "id": pa.large_list(pa.large_string()),
        **{name: pa.large_list(pa.int32()) for name in COUNTS},
    }
)


class ShardEntry(TypedDict):
    """A shard as the header lists it."""

    name: str  # of the file
    bytes: int  # the size of the file
    rest_crc32: int  # of all bytes outside of the row groups


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
    crc32: int


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
        """(R,) of `shard`, `offset`, `num_bytes`, `crc32`, `num_samples` or `num_tokens`."""
        return self._batch.column(name).to_numpy()

    def place(self, row_group: int) -> tuple[int, RowGroupPlace]:
        """The shard of a row group, and where it lies in it."""
        place = RowGroupPlace(*(int(self.row_groups(name)[row_group]) for name in RowGroupPlace._fields))
        return int(self.row_groups("shard")[row_group]), place

    def footer(self, shard: int) -> bytes:
        """The bytes of a shard behind its last row group: parquet's metadata, its length, and `PAR1`."""
        first = int(np.searchsorted(self.row_groups("shard"), shard))
        return zlib.decompress(self._batch.column("footer")[first].as_py())

    def samples(self, name: str) -> np.ndarray:
        """(N,) int32 of one of COUNTS."""
        return self._batch.column(name).values.to_numpy()

    @property
    def ids(self) -> pa.Array:
        """(N,) strings."""
        return self._batch.column("id").values


def row_group_line(
    ids: Sequence[str],
    counts: Sequence[Sequence[int]],
    shard: int,
    place: RowGroupPlace,
    footer: bytes | None,
) -> dict[str, Any]:
    """A line of the manifest. `counts` holds, for each sample, the values of COUNTS; `footer` is deflated."""
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
    }


def write_manifest(
    folder: Path, corpus: CorpusHeader, shards: list[ShardEntry], table: pa.Table, num_tools: int | None
) -> None:
    """Write `folder`/manifest.arrow, complete or not at all: the folder is finished from here on.

    Args:
        num_tools: declarations in tools.json; None: no such list was made.
        table: lines of SCHEMA, in the order of the shards and of the row groups in them.
    """
    assert table.schema.equals(SCHEMA), table.schema
    table = table.combine_chunks()
    header: ManifestHeader = {
        "format_version": FORMAT_VERSION,
        "fingerprint": corpus["fingerprint"],
        "settings": corpus["settings"],
        "shards": shards,
    }
    if num_tools is not None:
        header["num_tools"] = num_tools
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    table = table.replace_schema_metadata({"header": text, "crc32": str(_crc32(text, table))})
    path = folder / MANIFEST
    temporary = path.with_name(f".{MANIFEST}.tmp")
    with pa.ipc.new_file(temporary, table.schema) as file:
        file.write_table(table, max_chunksize=max(1, table.num_rows))
    publish(temporary, path)


def read_manifest(path: Path, origin: str) -> Manifest:
    """The manifest in the file `path`; `origin` is what messages call it.

    Raises:
        DataError: a byte of it differs from what was written, or it is of another format version.
    """
    try:
        # Checked through a map of its own, which ends here: what is mapped afterwards has not been touched yet.
        intact = _is_intact(pa.ipc.open_file(pa.memory_map(str(path))).read_all())
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        header: ManifestHeader = json.loads(table.schema.metadata[b"header"])
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{origin} is damaged ({error}); make the shards again") from error
    if not intact:
        raise DataError(f"{origin} is damaged (its checksum differs); make the shards again")
    if header["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"{origin} has format version {header['format_version']}, this gemma_dist reads {FORMAT_VERSION}; make the "
            "shards again"
        )
    return Manifest(header, table, sha256)


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
