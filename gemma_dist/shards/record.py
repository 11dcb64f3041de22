"""The record of a piece: its lines of the manifest, where each sample came from, and what became of the rows."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa

from gemma_dist.shards.manifest import SCHEMA_WITH_WEIGHTS as MANIFEST_SCHEMA
from gemma_dist.shards.manifest import ShardEntry

ORIGINS = {  # of each sample, beside the lines of the manifest
    "file": pa.large_list(pa.large_string()),
    "line": pa.large_list(pa.int64()),
    "row": pa.large_list(pa.int64()),
    "noted": pa.large_list(pa.large_string()),
}
SCHEMA = pa.schema([*MANIFEST_SCHEMA, *(pa.field(name, kind) for name, kind in ORIGINS.items())])


@dataclass(frozen=True)
class Sample:
    """What the record holds of a sample."""

    id: str
    counts: list[int]  # the values of COUNTS
    weight: float
    file: str
    line: int
    row: int  # number of the row in the piece, from 0
    noted: str  # JSON, its share of the report beside `counts`: num_dropped_reasoning and notes; empty: nothing


class PieceHeader(TypedDict):
    """What the record says of the whole piece."""

    report: dict[str, Any]  # a ShardReport's
    rejected: list[int]  # the numbers of the rows that were refused: one for each line of their log
    errors: list[str]  # the first few
    shards: list[ShardEntry]


def write_record(path: Path, header: PieceHeader, lines: pa.Table) -> None:
    """Write a record of lines of SCHEMA. A killed call leaves a part of it."""
    table = lines.replace_schema_metadata({"header": json.dumps(header)})
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table)


def read_header(path: Path) -> PieceHeader:
    """What a record says of its piece; the lines are not touched."""
    with pa.memory_map(str(path)) as mapped:
        header: PieceHeader = json.loads(pa.ipc.open_file(mapped).schema.metadata[b"header"])
    return header


def read_lines(path: Path) -> pa.Table:
    """The lines of a record, mapped: what is looked at of them counts as memory for as long as they are held."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
