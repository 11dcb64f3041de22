"""Rows of folders by `Dataset.save_to_disk`: `state.json` names Arrow stream files.

Read with pyarrow and not with `datasets`, which would decode images and encode them again. `datasets` packs nothing in
these files and points to no dictionaries; files that do are refused, since a few bytes of them may stand for many.
"""

import json
import struct
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa

from gemma_dist.data.formats.parquet import number_rows
from gemma_dist.data.places import InputRange, ReadRow, SizedRange, cut, inside
from gemma_dist.errors import DataError

STATE = "state.json"


def split(folder: Path, range_bytes: int) -> Iterator[SizedRange]:
    """Ranges of whole record batches, counted over all files."""
    return cut(folder, ((batch.num_rows, batch.nbytes) for batch in _batches(folder)), range_bytes)


def read(input_range: InputRange, max_row_bytes: int) -> Iterator[ReadRow]:
    """The rows of the range's record batches."""
    line = input_range.first_line
    for batch in islice(_batches(input_range.file), input_range.start, input_range.end):
        yield from number_rows(input_range.file, batch.schema, [batch], line, max_row_bytes)
        line += batch.num_rows


def _batches(folder: Path) -> Iterator[pa.RecordBatch]:
    """The record batches of all files, in order: mapped, not read."""
    for file in _saved_files(folder):
        with pa.memory_map(str(file)) as source:
            schema = None
            for message in pa.ipc.MessageReader.open_stream(source):
                if message.type == "schema":
                    schema = pa.ipc.read_schema(message)
                elif message.type == "record batch" and not _is_packed(message):
                    yield pa.ipc.read_record_batch(message, schema)
                else:
                    raise DataError(
                        f"{file}: holds a {message.type} that is packed or points to a dictionary, as datasets writes "
                        "none; save the dataset anew with datasets"
                    )


def _saved_files(folder: Path) -> list[Path]:
    """The files of a saved dataset in order: {"_data_files": [{"filename": "data-00000-of-00002.arrow"}, …], …}."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(str(child) for child in sorted(folder.iterdir()) if child.is_dir())
        raise DataError(f"{folder}: holds several splits; name those that you mean: {splits}")
    if (folder / "manifest.arrow").is_file():
        raise DataError(
            f"{folder}: holds finished shards, which `train` and all that looks at rows take as they are; to make "
            "others for another model, name the rows that these were made of"
        )
    if not (folder / STATE).is_file():
        raise DataError(
            f"{folder}: neither finished shards (no manifest.arrow in it) nor a folder that datasets saved (no "
            f"{STATE} in it) nor one of MDS (no index.json); name the files themselves"
        )
    try:
        state = json.loads((folder / STATE).read_text())
        names = [entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}/{STATE}: not as datasets writes it ({error!r}); save the dataset anew") from None
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: holds an index over its rows; save it anew with a current datasets")
    return [inside(folder, STATE, name) for name in names]


def _is_packed(message: pa.ipc.Message) -> bool:
    """Whether the buffers of a record batch are compressed: whether its fourth field (Arrow: Message.fbs) is there."""
    data = message.metadata.to_pybytes()
    (root,) = struct.unpack_from("<I", data)
    header = _field(data, root, 2)
    if header is None:
        return False
    return _field(data, header + struct.unpack_from("<I", data, header)[0], 3) is not None


def _field(data: bytes, table: int, number: int) -> int | None:
    """Where a field of a table of FlatBuffers stands; None where it is left out."""
    fields = table - struct.unpack_from("<i", data, table)[0]
    (num_bytes,) = struct.unpack_from("<H", data, fields)
    place = 4 + 2 * number
    (offset,) = struct.unpack_from("<H", data, fields + place) if place < num_bytes else (0,)
    return table + offset if offset else None
