"""Rows from parquet and folders of datasets: the same trajectory as of the JSON that they were made from.

Arrow gives every object of a column the keys of all, and `datasets` 5 writes JSON text into the table: neither may
show in what is trained.
"""

import datetime
import decimal
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemma_dist.config import RowConfig
from gemma_dist.data import nulls, schema_nulls
from gemma_dist.data.rows import read_rows
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.errors import DataError

Nulls = Literal["auto", "drop", "keep"]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
NULLABLE = {"type": ["string", "null"]}


def read(file: Path, arrow_nulls: Nulls = "auto") -> list[Trajectory]:
    trajectories = []
    for where, row in read_rows([file]):
        assert not isinstance(row, DataError), row
        trajectories.append(parse_row(row, where, RowConfig(arrow_nulls=arrow_nulls)))
    return trajectories


def row(name: str, arguments: Any, parameters: Any = None, **message: Any) -> dict[str, Any]:
    """A row with one call; `parameters` declare the tool, as JSON text so that Arrow leaves them alone."""
    call = {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call], **message},
        {"role": "tool", "tool_call_id": "c1", "content": "ok"},
        {"role": "assistant", "content": "done"},
    ]
    if parameters is None:
        return {"messages": messages}
    return {"messages": messages, "tools": json.dumps([declared(name, parameters)])}


def declared(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


def write_parquet(rows: list[dict[str, Any]], folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


def arguments(trajectory: Trajectory) -> list[Any]:
    return [call["function"]["arguments"] for message in trajectory.messages for call in message.get("tool_calls", [])]


def refusal(file: Path, arrow_nulls: Nulls = "auto") -> str:
    with pytest.raises(DataError) as caught:
        read(file, arrow_nulls)
    return str(caught.value)


# ---- null arguments --------------------------------------------------------------------------------------------------

OPTIONAL_UNIT = {"type": "object", "properties": {"city": {"type": "string"}, "unit": {"type": "string"}}}
BY_REFERENCE = {
    "type": "object",
    "properties": {"where": {"anyOf": [{"$ref": "#/$defs/Place"}, {"type": "null"}]}},
    "required": ["where"],
    "$defs": {"Place": {"type": "object", "properties": {"city": {"type": "string"}, "zip": {"type": "string"}}}},
}
LIST_OF_OBJECTS = {
    "type": "object",
    "properties": {"steps": {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}}}},
}

# Rows (arguments, schema) that share a table; what is trained of the last one; how many nulls were dropped from it.
DECIDED: dict[str, tuple[list[tuple[Any, Any]], Any, int]] = {
    "another tool's": ([({"expr": "1"}, {}), ({"city": "Rome"}, CITY)], {"city": "Rome"}, 1),
    "optional, and null does not fit": (
        [({"city": "Oslo", "unit": "C"}, OPTIONAL_UNIT), ({"city": "Rome"}, OPTIONAL_UNIT)],
        {"city": "Rome"},
        1,
    ),
    "of a tool without arguments": ([({"city": "Rome"}, CITY), ({}, {"type": "object", "properties": {}})], {}, 1),
    "of a tool without parameters": ([({"city": "Rome"}, CITY), ({}, {})], {}, 1),
    "required and nullable": (
        [({"city": None}, {"type": "object", "properties": {"city": NULLABLE}, "required": ["city"]})],
        {"city": None},
        0,
    ),
    "required and OpenAPI's nullable": (
        [
            ({"city": "Rome"}, CITY),
            (
                {"city": None},
                {
                    "type": "object",
                    "properties": {"city": {"type": "string", "nullable": True}},
                    "required": ["city"],
                },
            ),
        ],
        {"city": None},
        0,
    ),
    "in an object by reference": (
        [({"where": {"city": "Oslo", "zip": "1", "lat": 2}}, {}), ({"where": {"city": "Rome"}}, BY_REFERENCE)],
        {"where": {"city": "Rome"}},
        2,
    ),
    "in objects of a list": (
        [({"steps": [{"b": 1}]}, {}), ({"steps": [{"a": "x"}, {"a": "y"}]}, LIST_OF_OBJECTS)],
        {"steps": [{"a": "x"}, {"a": "y"}]},
        2,
    ),
    "an object that is absent": (
        [({"where": {"city": "Oslo"}}, {}), ({"city": "Rome"}, CITY)],
        {"city": "Rome"},
        1,
    ),
    "of a map of strings": (
        [({"b": "2"}, {}), ({"a": "1"}, {"type": "object", "additionalProperties": {"type": "string"}})],
        {"a": "1"},
        1,
    ),
    "by pattern": (
        [({"x_b": 2}, {}), ({"x_a": 1}, {"type": "object", "patternProperties": {"^x_": {"type": "integer"}}})],
        {"x_a": 1},
        1,
    ),
    "the row's own, in JSON text": (
        [('{"expr": "1"}', {}), ('{"city": "Rome", "expr": null}', CITY)],
        {"city": "Rome", "expr": None},
        0,
    ),
    "list elements are no keys": (
        [({"a": [None, "x"]}, {"type": "object", "properties": {"a": {"type": "array"}}})],
        {"a": [None, "x"]},
        0,
    ),
}


@pytest.mark.parametrize("kind", DECIDED)
def test_the_schema_decides_whose_a_null_is(tmp_path: Path, kind: str) -> None:
    rows, right, num_dropped = DECIDED[kind]
    file = write_parquet([row("f", given, parameters) for given, parameters in rows], tmp_path)
    where, raw = list(read_rows([file]))[-1]
    last = parse_row(raw, where, RowConfig())
    assert arguments(last) == [right]
    assert last.notes[nulls.FILLED] == num_dropped
    assert type(arguments(last)[0]) is dict


UNDECIDED: dict[str, tuple[list[tuple[Any, Any]], str]] = {
    "no schema": ([({"city": "Rome"}, None), ({"expr": "1"}, None)], "argument expr is null, which may stand for no"),
    "both fit": (
        [({"city": "Rome", "unit": None}, {"type": "object", "properties": {"city": {}, "unit": NULLABLE}})],
        "argument unit is null, which may stand for no argument: both null and no argument fit the tool's schema",
    ),
    "neither fits": (
        [({"city": None}, CITY | {"required": ["city"]})],
        "argument city is null, which may stand for no argument: neither null nor no argument fits",
    ),
    "any object": (
        [({"where": {"a": 1, "b": None}}, {"type": "object", "properties": {"where": {"type": "object"}}})],
        "argument where.b is null",
    ),
    "any further argument": (
        [({"city": "Rome", "b": None}, CITY | {"additionalProperties": True})],
        "argument b is null",
    ),
}


@pytest.mark.parametrize("kind", UNDECIDED)
def test_what_no_schema_decides_is_refused_with_both_ways_out(tmp_path: Path, kind: str) -> None:
    rows, words = UNDECIDED[kind]
    file = write_parquet([row("f", given, parameters) for given, parameters in rows], tmp_path)
    message = refusal(file)
    assert message.startswith(f"{file}:1: turn 2 (assistant): call of f: the {words}")
    assert "store arguments as JSON text" in message
    assert "`arrow_nulls: drop`" in message
    assert "`arrow_nulls: keep`" in message


@pytest.mark.parametrize(
    ("said", "right", "note"), [("drop", {"city": "Rome"}, 1), ("keep", {"city": "Rome", "e": None}, 0)]
)
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_drop_and_keep_settle_all_rows(tmp_path: Path, kind: str, said: Nulls, right: Any, note: int) -> None:
    given = row("f", {"city": "Rome", "e": None})
    file = write_parquet([given], tmp_path)
    if kind == "jsonl":
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(given))
    (trajectory,) = read(file, said)
    assert arguments(trajectory) == [right]
    assert trajectory.notes[nulls.GIVEN] == note


def test_a_null_that_json_rows_hold_beside_their_schema_is_asked_about(tmp_path: Path) -> None:
    """`Dataset.to_json` writes Arrow's nulls; a null that the schema names is the row's own."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row("f", {"city": "Rome", "expr": None}, CITY)))
    assert "argument expr is null, which may stand for no argument: the tool's schema does not name it" in refusal(file)
    file.write_text(json.dumps(row("f", {"city": None}, CITY)))
    assert "argument city is null, which may stand for no argument: null does not fit the tool's schema" in refusal(
        file
    )
    assert arguments(read(file, "drop")[0]) == [{}]
    file.write_text(json.dumps(row("f", {"city": "Rome", "expr": None}, CITY, train=False)))
    assert arguments(read(file)[0]) == [{"city": "Rome", "expr": None}]
    file.write_text(json.dumps(row("f", {"city": None}, {"type": "object", "properties": {"city": NULLABLE}})))
    assert arguments(read(file)[0]) == [{"city": None}]
    file.write_text(json.dumps(row("f", {"city": None})))
    assert arguments(read(file)[0]) == [{"city": None}]


def test_floats_that_arrow_made_of_integers_are_integers_again(tmp_path: Path) -> None:
    count = {"type": "object", "properties": {"n": {"type": "integer"}, "x": {"type": "number"}}}
    file = write_parquet([row("f", {"n": 1, "x": 2}, count), row("g", {"n": 1.5, "x": 0.5}, {})], tmp_path)
    trajectory = read(file)[0]
    assert repr(arguments(trajectory)) == "[{'n': 1, 'x': 2.0}]"
    assert trajectory.notes[nulls.WHOLE] == 1


def test_nulls_of_arrow_around_the_arguments_say_nothing(tmp_path: Path) -> None:
    """Keys of messages, calls and parts that only other rows have."""
    plain = row("f", {"city": "Rome"}, CITY)
    for message in plain["messages"]:
        message["content"] = [{"type": "text", "text": message["content"] or ""}]
    full = row("f", {"city": "Rome"}, CITY)
    for message in full["messages"]:
        part = {"type": "text", "text": "t", "image": "x", "image_url": {"url": "u"}, "cache_control": {"type": "e"}}
        message |= {"content": [part], "name": "n", "reasoning_content": "r", "weight": 1, "train": True}
        message |= {"function_call": {"name": "f", "arguments": "{}"}, "refusal": "r"}
    full["messages"][1]["tool_calls"][0] |= {"index": 0, "name": "f", "args": {"a": 1}, "parameters": {"b": 1}}
    file = write_parquet([plain, full], tmp_path)
    where, first = next(iter(read_rows([file])))
    assert parse_row(first, where, RowConfig()).messages == parse_row(plain, where, RowConfig()).messages


def test_anthropic_blocks_in_arrow(tmp_path: Path) -> None:
    tools = [
        {"name": "weather", "input_schema": CITY},
        {"name": "calc", "input_schema": {"properties": {"x": {"type": "string"}}}},
    ]

    def blocks(name: str, arguments: Any) -> dict[str, Any]:
        messages = [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": name, "input": arguments}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "ok"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "done"}]},
        ]
        return {"messages": messages, "tools": tools}

    rows = [blocks("weather", {"city": "Rome"}), blocks("calc", {"x": "1"})]
    found = read(write_parquet(rows, tmp_path))
    assert [arguments(trajectory) for trajectory in found] == [[{"city": "Rome"}], [{"x": "1"}]]
    expected = [parse_row(given, "rows.parquet:1", RowConfig()) for given in rows]
    assert [trajectory.messages for trajectory in found] == [trajectory.messages for trajectory in expected]
    assert [trajectory.tools for trajectory in found] == [trajectory.tools for trajectory in expected]


@pytest.mark.parametrize("write", ["pandas", "parquet", "saved"])
def test_pandas_and_datasets_fill_alike(tmp_path: Path, write: str) -> None:
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    rows = [row("f", {"city": "Rome"}, CITY), row("g", {"expr": "1"}, {"properties": {"expr": {"type": "string"}}})]
    file = tmp_path / "rows.parquet"
    if write == "pandas":
        pandas.DataFrame(rows).to_parquet(file)
    else:
        made = datasets.Dataset.from_list(rows)
        file = as_parquet(made, tmp_path) if write == "parquet" else as_saved(made, tmp_path)
    found = read(file)
    assert [arguments(trajectory) for trajectory in found] == [[{"city": "Rome"}], [{"expr": "1"}]]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (datetime.date(2024, 5, 1), r"datetime.date\(2024, 5, 1\) \(date\) is not a JSON value; write it as a string"),
        (decimal.Decimal("1.5"), r"Decimal\('1.5'\) \(Decimal\) is not a JSON value; write it as a string"),
        (b"x", r"b'x' \(bytes\) is not a JSON value; write it as a string"),
    ],
)
def test_values_that_only_arrow_has_are_refused(tmp_path: Path, value: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"turn 2 .assistant.: call of f: {words}"):
        read(write_parquet([row("f", {"a": value})], tmp_path))


def test_a_pattern_that_is_none_is_said_where_the_schema_is_applied(tmp_path: Path) -> None:
    schema = {"type": "object", "patternProperties": {"(": {}}}
    with pytest.raises(DataError, match="schema"):
        read(write_parquet([row("f", {"a": None, "b": 1}, schema)], tmp_path))


# How each layout that gives arguments as an object writes one call: (name, arguments) -> messages, and their column.
LAYOUTS: dict[str, tuple[str, Callable[[str, Any], list[dict[str, Any]]]]] = {
    "args": (
        "messages",
        lambda name, given: [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "name": name, "args": given}]},
        ],
    ),
    "LangChain": (
        "messages",
        lambda name, given: [
            {"type": "human", "content": "hi"},
            {
                "type": "ai",
                "content": "",
                "tool_calls": [{"id": "c", "name": name, "args": given, "type": "tool_call"}],
            },
        ],
    ),
    "Gemini": (
        "contents",
        lambda name, given: [
            {"role": "user", "parts": [{"text": "hi"}]},
            {"role": "model", "parts": [{"functionCall": {"name": name, "args": given}}]},
        ],
    ),
    "Bedrock": (
        "messages",
        lambda name, given: [
            {"role": "user", "content": [{"text": "hi"}]},
            {"role": "assistant", "content": [{"toolUse": {"toolUseId": "c", "name": name, "input": given}}]},
        ],
    ),
    "AI SDK": (
        "messages",
        lambda name, given: [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {
                "role": "assistant",
                "content": [{"type": "tool-call", "toolCallId": "c", "toolName": name, "input": given}],
            },
        ],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arguments_of_every_layout_lose_the_nulls_of_arrow(tmp_path: Path, layout: str) -> None:
    column, write = LAYOUTS[layout]
    expr = {"type": "object", "properties": {"expr": {"type": "string"}}}
    tools = json.dumps([declared("weather", CITY), declared("calc", expr)])
    rows = [
        {column: write("weather", {"city": "Rome"}), "tools": tools},
        {column: write("calc", {"expr": "1"}), "tools": tools},
    ]
    found = read(write_parquet(rows, tmp_path))
    assert [arguments(trajectory) for trajectory in found] == [[{"city": "Rome"}], [{"expr": "1"}]]
    expected = [parse_row(given, "rows.parquet:1", RowConfig()) for given in rows]
    assert [trajectory.messages for trajectory in found] == [trajectory.messages for trajectory in expected]


# ---- schemas ---------------------------------------------------------------------------------------------------------


def test_tools_in_arrow_are_as_they_were(tmp_path: Path) -> None:
    unit = {"type": "string", "enum": ["C", "F"], "description": "u", "default": "C"}
    place = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [
        declared("weather", {"type": "object", "properties": {"unit": unit, "where": place}, "required": ["where"]}),
        declared("calc", {"type": "object", "properties": {"expr": {"type": "string"}}, "additionalProperties": False}),
        declared("now", {"type": "object", "properties": {}}),
    ]
    given = row("calc", {"expr": "1"}) | {"tools": tools}
    (trajectory,) = read(write_parquet([given], tmp_path), "drop")
    assert trajectory.tools == tools
    assert trajectory.notes[schema_nulls.DROPPED] == 10


NULLS_IN_SCHEMAS: dict[str, tuple[Any, Any, int]] = {
    "description": ({"type": "string", "description": None}, {"type": "string"}, 1),
    "enum": ({"type": "string", "enum": None}, {"type": "string"}, 1),
    "required": ({"type": "object", "required": None, "properties": {}}, {"type": "object", "properties": {}}, 1),
    "a property": ({"type": "object", "properties": {"b": None}}, {"type": "object", "properties": {}}, 1),
    "items": ({"type": "array", "items": {"type": "string", "title": None}}, None, 1),
    "default and const are values": ({"anyOf": [{"const": None}], "default": None, "enum": [None]}, None, 0),
    "properties named like keywords": (
        {"type": "object", "properties": {"default": None, "enum": {"type": "string", "format": None}}},
        {"type": "object", "properties": {"enum": {"type": "string"}}},
        2,
    ),
}


@pytest.mark.parametrize("kind", NULLS_IN_SCHEMAS)
def test_nulls_of_json_schemas_that_say_nothing_are_dropped(kind: str) -> None:
    given, right, num_dropped = NULLS_IN_SCHEMAS[kind]
    if kind == "items":
        right = {"type": "array", "items": {"type": "string"}}
    tools = [declared("f", {"type": "object", "properties": {"a": given}})]
    trajectory = parse_row(row("f", {}) | {"tools": tools}, "a.jsonl:1", RowConfig())
    assert trajectory.tools == [declared("f", {"type": "object", "properties": {"a": right or given}})]
    assert trajectory.notes[schema_nulls.DROPPED] == num_dropped


# ---- Json() of datasets, maps ----------------------------------------------------------------------------------------


def as_parquet(dataset: Any, folder: Path) -> Path:
    dataset.to_parquet(str(folder / "written.parquet"))
    return folder / "written.parquet"


def as_saved(dataset: Any, folder: Path) -> Path:
    dataset.save_to_disk(str(folder / "written"))
    return folder / "written"


def without_extension_type(dataset: Any, folder: Path) -> Path:
    """The storage of the `Json()` feature alone: only the metadata tells of it."""
    table = pq.read_table(as_parquet(dataset, folder), arrow_extensions_enabled=False)
    schema = pa.schema([(name, _storage(table.schema.field(name).type)) for name in table.column_names])
    pq.write_table(table.cast(schema).replace_schema_metadata(table.schema.metadata), folder / "plain.parquet")
    assert "json" not in str(pq.read_schema(folder / "plain.parquet").types)
    return folder / "plain.parquet"


def _storage(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.JsonType):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_storage(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _storage(field.type)) for field in kind])
    return kind


@pytest.mark.parametrize("write", [as_parquet, as_saved, without_extension_type])
def test_what_datasets_writes_is_what_it_read(tmp_path: Path, write: Callable[[Any, Path], Path]) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        row("weather", {"city": "Rome"}) | {"tools": [declared("weather", CITY)]},
        row("calc", '{"expr": "1+1"}') | {"tools": [declared("calc", {"type": "object"}), declared("weather", CITY)]},
    ]
    rows[0]["messages"][0]["content"] = '{"looks": "like JSON"}'
    rows[1]["messages"][2]["content"] = [{"type": "text", "text": "5"}]
    source = tmp_path / "source.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    loaded = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(tmp_path / "cache"))
    assert "Json" in str(loaded.features)
    for found, expected in zip(read(write(loaded, tmp_path)), read(source), strict=True):
        assert (found.messages, found.tools) == (expected.messages, expected.tools)


@pytest.mark.parametrize(
    "content", ["5", "true", "null", '{"t": 20}', '{"t":20}', '["a", "b"]', '"quoted', [{"type": "text", "text": "1"}]]
)
def test_a_string_that_happens_to_be_json_stays_a_string(tmp_path: Path, content: Any) -> None:
    """Messages of equal keys are a struct, whose mixed content alone is `Json()`: it stores "5" as 5."""
    datasets = pytest.importorskip("datasets")
    parts = [{"type": "text", "text": "a"}]
    messages = [
        {"role": role, "content": text} for role, text in (("user", content), ("user", "b"), ("assistant", parts))
    ]
    made = datasets.Dataset.from_list([{"messages": messages}], on_mixed_types="use_json")
    assert made.features["messages"].feature["content"] == datasets.Json()
    (trajectory,) = read(as_parquet(made, tmp_path))
    assert trajectory.messages[0]["content"] == ("" if content == "null" else content)


def test_a_text_of_a_json_feature_that_is_no_json_is_an_error_of_its_row(tmp_path: Path) -> None:
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["[]", "{"]))
    pq.write_table(pa.table({"messages": column}), tmp_path / "rows.parquet")
    (_, first), (_, second) = read_rows([tmp_path / "rows.parquet"])
    assert first == {"messages": []}
    assert str(second).startswith(f"{tmp_path}/rows.parquet:2: `messages`: not JSON at column 2")


def test_a_map_is_an_object(tmp_path: Path) -> None:
    inner = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))])
    call = pa.struct([("id", pa.string()), ("function", inner)])
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))])
    function = {"name": "f", "arguments": [("city", "Rome"), ("unit", None)]}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [{"function": function}]}]
    table = pa.Table.from_pylist([{"messages": messages}], pa.schema([("messages", pa.list_(message))]))
    pq.write_table(table, tmp_path / "rows.parquet")
    assert arguments(read(tmp_path / "rows.parquet")[0]) == [{"city": "Rome", "unit": None}]
    function["arguments"] = [("city", "Rome"), ("city", "Oslo")]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}], table.schema), tmp_path / "rows.parquet")
    ((_, error),) = read_rows([tmp_path / "rows.parquet"])
    assert "the key 'city' stands twice in one map" in str(error)


# ---- the files of the cases ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["arrow_TJ_pa", "arrow_T_pa", "arrow_OPT_pa", "arrow_A_dj"])
def test_cases_that_are_decided(shared: Path, name: str) -> None:
    found = [arguments(trajectory) for trajectory in read(shared / "cases" / "data" / f"{name}.parquet")]
    second = [{"city": "Oslo"}] if name == "arrow_OPT_pa" else [{"expr": "1+1"}]
    first = [{"city": "Rome", "unit": "C"}] if name == "arrow_OPT_pa" else [{"city": "Rome"}]
    assert found == [first, second]


def test_the_case_without_a_schema_is_refused_until_it_is_said(shared: Path) -> None:
    file = shared / "cases" / "data" / "arrow_A_pa.parquet"
    assert "no schema says which arguments it has" in refusal(file)
    assert [arguments(trajectory) for trajectory in read(file, "drop")] == [[{"city": "Rome"}], [{"expr": "1+1"}]]


def test_the_case_of_the_json_feature_equals_its_source(shared: Path) -> None:
    folder = shared / "cases" / "data"
    for found, expected in zip(
        read(folder / "arrow_json_feature_oa.parquet"), read(folder / "arrow_json_feature_oa_source.jsonl"), strict=True
    ):
        assert (found.messages, found.tools) == (expected.messages, expected.tools)


@pytest.mark.parametrize("name", ["schema_descr_null", "schema_required_null", "schema_prop_null"])
def test_cases_of_nulls_in_schemas(shared: Path, name: str) -> None:
    (trajectory,) = read(shared / "cases" / "data" / f"{name}.jsonl")
    description = "" if name == "schema_descr_null" else "d"
    parameters = {"type": "object", "properties": {"a": {"type": "string"}}}
    assert trajectory.tools[0]["function"] == {"name": "f", "description": description, "parameters": parameters}
