"""Rows of Arrow tables (parquet, folders that `datasets` saved) as the rows that they were made from.

Arrow has columns where JSON has objects, and three of its habits would change a row:

- a struct has all keys of its column, with null for those that a row does not have: such an object comes as an
  `ArrowStruct`, so that its nulls can be told from those of a JSON text (see nulls.py);
- the `Json()` feature of `datasets` 5, which it chooses by itself for objects of different keys, is JSON text inside
  the table: `messages: ['{"role": "user", ...}', ...]`. It is known by the column's type, or by the features in the
  table's metadata, and read in just these places: no string of the user's is taken for JSON;
- a map is a list of pairs: [("city", "Rome")] for {"city": "Rome"}.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import pyarrow as pa

from gemma_dist.data.strict import as_object, error_context, get, parse_json, short
from gemma_dist.data.types import ArrowStruct, RawRow
from gemma_dist.errors import DataError

# Makes the value of a row out of what pyarrow gives for it.
Reader: TypeAlias = Callable[[Any], object]

# Keys of a message or part that hold a string, or parts. `datasets` stores a string that happens to be JSON ("5", or a
# tool's '{"t": 20}') as it is, and would read it back as something else than the string that it was.
STRING_KEYS = ("content", "value", "text", "thinking", "reasoning", "reasoning_content")

_LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)


def row_reader(schema: pa.Schema) -> Callable[[RawRow], RawRow]:
    """What turns a row of `to_pylist` of a table of this schema into the row that it was made from.

    The function raises DataError where a text of a `Json()` feature is no JSON, or a map holds a key twice.
    """
    features = _features_of(schema)
    readers = {field.name: _reader(field.type, features.get(field.name), field.name) for field in schema}

    def read(row: RawRow) -> RawRow:
        """The row that pyarrow's `row` was made from; errors name the column."""
        result: RawRow = {}
        for name, value in row.items():
            with error_context(f"`{name}`"):
                result[name] = _apply(readers[name], value)
        return result

    return read


def _features_of(schema: pa.Schema) -> Mapping[str, object]:
    """The features of the columns as `datasets` wrote them into the table's metadata; empty where it did not.

    {b"huggingface": b'{"info": {"features": {"tools": {"_type": "Json"}}}}'}
    """
    try:
        return as_object(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError):
        return {}


def _reader(kind: pa.DataType, feature: object, name: str) -> Reader | None:
    """The reader of a column, or of something inside of one; None where pyarrow's value is right as it is."""
    if isinstance(kind, pa.JsonType) or get(feature, "_type") == "Json":
        return _read_string_or_parts if name in STRING_KEYS else _read_json
    if pa.types.is_struct(kind):
        return _struct_reader(kind, feature)
    if pa.types.is_map(kind):
        return _map_reader(kind)
    if isinstance(kind, _LISTS):
        inner = feature[0] if isinstance(feature, list) and feature else get(feature, "feature")
        return _list_reader(_reader(kind.value_type, inner, ""))
    return None


def _apply(reader: Reader | None, value: object) -> object:
    """What the reader makes of a value; null is null, whatever the column."""
    return value if reader is None or value is None else reader(value)


def _struct_reader(kind: pa.StructType, feature: object) -> Reader:
    """The reader of a struct: {"city": "Rome", "unit": None} -> ArrowStruct({"city": "Rome", "unit": None})."""
    readers = {field.name: _reader(field.type, get(feature, field.name), field.name) for field in kind}

    def read(value: dict[str, object]) -> ArrowStruct:
        """The object with each of its values read, marked as a struct."""
        return ArrowStruct({name: _apply(readers[name], item) for name, item in value.items()})

    return read


def _map_reader(kind: pa.MapType) -> Reader:
    """The reader of a map: [("city", "Rome"), ("days", "3")] -> {"city": "Rome", "days": "3"}."""
    read_item = _reader(kind.item_type, None, "")

    def read(pairs: list[tuple[Any, object]]) -> dict[Any, object]:
        """The object of pairs of key and value."""
        result: dict[Any, object] = {}
        for key, item in pairs:
            if key in result:
                raise DataError(f"the key {short(key)} stands twice in one map; remove one of the two")
            result[key] = _apply(read_item, item)
        return result

    return read


def _list_reader(read_item: Reader | None) -> Reader | None:
    """The reader of a list, of which each item is read; None where items are right as they are."""
    if read_item is None:
        return None
    return lambda items: [_apply(read_item, item) for item in items]


def _read_json(text: object) -> object:
    """The value of a `Json()` feature: '{"a": 1}' -> {"a": 1}. pyarrow may have read it already."""
    return parse_json(text) if isinstance(text, str) else text


def _read_string_or_parts(text: object) -> object:
    """Content at a place of `Json()`: parts, or the string in quotes; everything else is the string as it stands."""
    value = _read_json(text)
    are_parts = isinstance(value, list) and all(isinstance(get(part, "type"), str) for part in value)
    return value if value is None or isinstance(value, str) or are_parts else text
