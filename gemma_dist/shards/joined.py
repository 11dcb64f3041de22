"""Tables that lie one behind the other, written as an Arrow IPC file of one record batch that memory need not hold.

A record batch says first how long each of its buffers is. So it is written twice: once with zeros in the place of all
that there is for each sample, pages that the kernel never fills; then these values go to their places in the file,
table by table.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa


def write_joined(path: Path, schema: pa.Schema, tables: Callable[[], Iterable[pa.Table]]) -> None:
    """Write tables to `path`, with the bytes that pyarrow gives them as one batch. A killed call leaves a part.

    What lists of int32 and of large strings hold is never in memory but for one table; the other columns, and the
    lengths of the lists, are.

    Args:
        tables: gives tables whose columns are those of `schema`; called twice.
    """
    found: dict[str, list[pa.Array]] = {name: [] for name in schema.names}  # of a list: the lengths
    num_bytes = dict.fromkeys(schema.names, 0)  # of all strings in a column
    for table in tables():
        assert table.schema.remove_metadata().equals(schema.remove_metadata()), table.schema
        for name, chunk in _chunks(table):
            if not pa.types.is_large_list(chunk.type):
                found[name].append(chunk.take(pa.array(np.arange(len(chunk)))))  # a copy: it may lie in a map
                continue
            found[name].append(pa.array(np.diff(chunk.offsets.to_numpy())))
            if pa.types.is_large_string(chunk.type.value_type):
                ends = _offsets(chunk.flatten())
                num_bytes[name] += int(ends[-1] - ends[0])
    columns = []
    for field in schema:
        is_list = pa.types.is_large_list(field.type)
        column = pa.chunked_array(found[field.name], pa.int64() if is_list else field.type).combine_chunks()
        columns.append(_with_zeros(field.type, column.to_numpy(), num_bytes[field.name]) if is_list else column)
    with pa.ipc.new_file(path, schema) as file:
        file.write_batch(pa.record_batch(columns, schema=schema))
    _fill(path, tables)


def _chunks(table: pa.Table) -> Iterator[tuple[str, pa.Array]]:
    for name, column in zip(table.column_names, table.columns, strict=True):
        for chunk in column.chunks:
            yield name, chunk


def _offsets(strings: pa.Array) -> np.ndarray:
    """(N + 1,) of N large strings."""
    return np.frombuffer(strings.buffers()[1], np.int64)[strings.offset : strings.offset + len(strings) + 1]


def _with_zeros(kind: pa.DataType, lengths: np.ndarray, num_bytes: int) -> pa.Array:
    """Lists of these lengths: of zeros, or of strings that have `num_bytes` zeros in all."""
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    num_values = int(ends[-1])
    if pa.types.is_large_string(kind.value_type):
        offsets = np.zeros(num_values + 1, np.int64)
        offsets[-1] = num_bytes
        buffers = [pa.py_buffer(offsets), pa.py_buffer(np.zeros(num_bytes, np.uint8))]
        values = pa.LargeStringArray.from_buffers(num_values, *buffers)
    else:
        values = pa.array(np.zeros(num_values, kind.value_type.to_pandas_dtype()))
    return pa.LargeListArray.from_arrays(pa.array(ends), values)


def _fill(path: Path, tables: Callable[[], Iterable[pa.Table]]) -> None:
    """Put what the lists hold into the places that it has in the file."""
    whole = pa.memory_map(str(path)).read_buffer()
    batch = pa.ipc.open_file(whole).get_batch(0)
    places = {}  # in the file: where the next value goes; of strings, of the end of one and of its bytes
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_large_list(column.type):
            places[name] = [buffer.address - whole.address for buffer in column.values.buffers()[1:] if buffer]
    with path.open("r+b") as file:

        def put(name: str, number: int, values: np.ndarray) -> None:
            """Write values where those before them end."""
            file.seek(places[name][number])
            places[name][number] += file.write(values.data)

        before = dict.fromkeys(places, 0)  # bytes of strings
        for table in tables():
            for name, chunk in _chunks(table):
                if name not in places:
                    continue
                values = chunk.flatten()
                if not pa.types.is_large_string(values.type):
                    put(name, 0, values.to_numpy())
                    continue
                ends = _offsets(values)
                put(name, 0, ends[:-1] - ends[0] + before[name])  # the end of the last string stands there already
                put(name, 1, np.frombuffer(values.buffers()[2] or b"", np.uint8)[ends[0] : ends[-1]])
                before[name] += int(ends[-1] - ends[0])
