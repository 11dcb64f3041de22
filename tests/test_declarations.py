"""Declarations of tools in every place and form that exports have, and the types that people write in them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_dist.config import RowConfig
from gemma_dist.data.rows import read_rows
from gemma_dist.data.schema_types import parse_type
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.errors import DataError

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "Tells.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
OTHER = {"type": "function", "function": {"name": "now", "description": ""}}
NAMED = {"name": "weather", "description": "Tells."}


def row(**columns: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "20"},
        {"role": "assistant", "content": "20 degrees."},
    ]
    return {"messages": messages, **columns}


def with_system(message: dict[str, Any], **columns: Any) -> dict[str, Any]:
    made = row(**columns)
    made["messages"].insert(0, {"role": "system", "content": "s", **message})
    return made


def parse(given: Any) -> Trajectory:
    return parse_row(given, "rows.jsonl:1", RowConfig())


def refusal(given: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse(given)
    return str(caught.value)


# ---- where and how ---------------------------------------------------------------------------------------------------

SAME = {
    "openai": row(tools=[TOOL]),
    "openai, one": row(tools=TOOL),
    "openai, json text": row(tools=json.dumps([TOOL])),
    "openai, one as json text": row(tools=json.dumps(TOOL)),
    "when2call, json texts": row(tools=[json.dumps(FUNCTION)]),
    "parameters as json text": row(tools=[NAMED | {"parameters": json.dumps(PARAMETERS)}]),
    "the function as json text": row(tools=[{"type": "function", "function": json.dumps(FUNCTION)}]),
    "openai until 2023": row(functions=[FUNCTION]),
    "openai until 2023, json text": row(functions=json.dumps([FUNCTION])),
    "beside an empty column": row(functions=[FUNCTION], tools=[]),
    "toucan": row(available_tools=json.dumps([TOOL]), target_tools="weather", num_tools=1),
    "chat_template_kwargs": row(chat_template_kwargs={"tools": [TOOL]}),
    "glm": with_system({"tools": [TOOL]}),
    "glm, without the wrapper": with_system({"tools": [FUNCTION]}),
    "developer": with_system({"role": "developer", "tools": [TOOL]}),
    "twice the same": row(tools=[TOOL], functions=[FUNCTION], available_tools=json.dumps([FUNCTION])),
    "tools and the system message": with_system({"tools": [FUNCTION]}, tools=json.dumps([TOOL])),
    "responses": row(tools=[{"type": "function", **FUNCTION}]),
    "anthropic": row(tools=[{"type": "custom", **NAMED, "input_schema": PARAMETERS, "cache_control": {}}]),
    "mcp": row(tools=[{**NAMED, "inputSchema": PARAMETERS}]),
    "mcp, nulls": row(tools=[{**NAMED, "title": None, "inputSchema": PARAMETERS, "outputSchema": None}]),
    "mcp, tools/list": row(tools={"tools": [{**NAMED, "inputSchema": PARAMETERS}], "nextCursor": None}),
    "mcp, answer": row(tools={"jsonrpc": "2.0", "id": 1, "result": {"tools": [{**NAMED, "inputSchema": PARAMETERS}]}}),
    "gemini": row(tools=[{"functionDeclarations": [FUNCTION]}]),
    "gemini, snake": row(tools=[{"function_declarations": [FUNCTION]}]),
    "gemini, one": row(tools={"functionDeclarations": [FUNCTION]}),
    "gemini, json schema": row(tools=[{"functionDeclarations": [{**NAMED, "parametersJsonSchema": PARAMETERS}]}]),
    "bedrock": row(tools={"tools": [{"toolSpec": {**NAMED, "inputSchema": {"json": PARAMETERS}}}]}),
    "langchain": row(tools=[{**NAMED, "args_schema": PARAMETERS, "args": {"city": {"type": "string"}}}]),
    "cohere": row(tools=[{**NAMED, "parameter_definitions": {"city": {"type": "str", "required": True}}}]),
    "ai sdk": row(tools={"weather": {"description": "Tells.", "inputSchema": PARAMETERS}}),
    "qwen-agent": row(tools=[NAMED | {"parameters": [{"name": "city", "type": "string", "required": True}]}]),
    "without properties": row(tools=[NAMED | {"parameters": {"city": {"type": "str", "required": True}}}]),
    "properties beside the type": row(
        tools=[NAMED | {"parameters": {"type": "dict", "city": {"type": "string"}, "required": ["city"]}}]
    ),
    "twice": row(tools=[TOOL, {**FUNCTION}]),
    "the servers that they came from": row(tools=[TOOL], mcp_servers=[{"name": "s", "tools": [FUNCTION]}]),
    # columns that repeat some of the tools, or are about servers
    "repeated": row(tools=[TOOL], target_tools=[TOOL], selected_tools=[FUNCTION], tool_schemas=json.dumps([FUNCTION])),
    "repeated as mcp": row(tools=[TOOL], original_tools=[{**NAMED, "inputSchema": PARAMETERS}]),
    "repeated with nulls": row(
        tools=[TOOL], target_tools=[{"type": "function", "function": FUNCTION | {"strict": None}}]
    ),
    "repeated as responses": row(tools=[TOOL], target_tools=[{"type": "function", **FUNCTION, "strict": True}]),
    "no json": row(tools=[TOOL], api_config="[a"),
    "repeated, less of it": row(tools=[TOOL], target_tools=[NAMED]),
    "a server": row(tools=[TOOL], mcp_server={"name": "weather", "description": "server"}),
    "servers": row(tools=[TOOL], mcp_servers=[{"name": "weather", "description": "server"}, {"name": "s", "url": "u"}]),
    "servers by name": row(tools=[TOOL], mcp_servers={"s": {"command": "uvx", "description": "server"}}),
    "a server as json text": row(tools=[TOOL], api_info=json.dumps({"name": "s", "description": "server"})),
    "servers with their tools": row(tools=[TOOL], mcp_servers=[{"name": "s", "description": "d", "tools": [FUNCTION]}]),
    "what an api is": row(functions=[FUNCTION], api_info={"api_name": "s", "api_description": "server"}),
    "types in capitals": row(
        tools=[NAMED | {"parameters": PARAMETERS | {"type": "OBJECT", "properties": {"city": {"type": "STRING"}}}}]
    ),
}


@pytest.mark.parametrize("given", SAME.values(), ids=SAME)
def test_every_place_and_form_declares_the_same(given: Any) -> None:
    before = json.dumps(given)
    assert parse(given).tools == [TOOL]
    assert json.dumps(given) == before, "the row stays as it was"


def test_sharegpt_rows_may_declare_in_the_system_turn() -> None:
    turns = [
        {"from": "system", "value": "s", "tools": [TOOL]},
        {"from": "human", "value": "Rome?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
    ]
    assert parse({"conversations": turns}).tools == [TOOL]


def test_a_column_may_repeat_some_of_the_tools() -> None:
    assert parse(row(tools=[TOOL, OTHER], target_tools=[OTHER], selected_tools=json.dumps([TOOL]))).tools == [
        TOOL,
        OTHER,
    ]


def test_keys_that_no_prompt_shows_are_left_out_and_counted() -> None:
    extra = {"title": "Weather", "annotations": {"readOnlyHint": True}, "outputSchema": {"type": "object"}}
    parsed = parse(row(tools=[{**NAMED, **extra, "inputSchema": PARAMETERS}]))
    assert parsed.tools == [TOOL]
    assert parsed.notes == {
        "keys of declarations that no prompt shows were left out: annotations, outputSchema, title": 1
    }


def test_columns_that_declare_nothing_pass() -> None:
    columns = {
        "tools": [TOOL],
        "target_tools": "weather",
        "tool_names": ["weather"],
        "num_tools": 2,
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "parallel_tool_calls": True,
        "function_call": {"name": "weather"},
        "available_tools": ["weather", "now"],
        "api_key": "k",
        "rapid_capital": [FUNCTION | {"name": "g"}],
        "mcp_servers": [{"name": "s", "url": "u"}],
        "expected_tool_calls": [{"name": "weather", "parameters": {"city": "Rome"}}],
        "tool_results": [{"name": "weather", "description": "x"}],
        "gen_ai.tool.definitions": json.dumps([FUNCTION]),  # the same again
    }
    assert parse(row(**columns)).tools == [TOOL]


REFUSED = [
    (row(tools=[TOOL], functions=[OTHER["function"]]), "`tools` and `functions` declare different tools; keep one"),
    (with_system({"tools": [OTHER]}, tools=[TOOL]), "`tools` and `tools of the system message` declare different"),
    (row(tool_list=[FUNCTION]), "the column `tool_list` declares tools, but is not read; rename it to `tools`"),
    (row(toolset=json.dumps([TOOL])), "the column `toolset` declares tools"),
    (row(available_functions=[FUNCTION]), "the column `available_functions` declares tools"),
    (row(apis=[OTHER["function"]], tools=[TOOL]), "the column `apis` declares tools"),
    (row(api_list=json.dumps([NAMED])), "the column `api_list` declares tools"),
    (row(mcp_tools={"weather": {"inputSchema": PARAMETERS}}), "the column `mcp_tools` declares tools"),
    (
        row(tools=[TOOL], original_tools=[TOOL, OTHER]),
        "the column `original_tools` declares tools that `tools` does not, or not like this; write them into "
        "`tools`, or remove one of the two columns",
    ),
    (row(tools=[TOOL], target_tools=[FUNCTION | {"description": "x"}]), "`target_tools` declares tools that `tools`"),
    (row(functions=[FUNCTION], tool_info=[OTHER | {"x": 1}]), "`tool_info` declares tools that `functions` does not"),
    (row(tools=[TOOL], mcp_servers=[{"name": "f", "inputSchema": PARAMETERS}]), "`mcp_servers` declares tools that"),
    (
        row(tools=[TOOL], mcp_servers=[{"name": "s", "description": "d", "tools": [OTHER["function"]]}]),
        "the column `mcp_servers` declares",
    ),
    (row(functions="[{]"), "`functions`: not JSON at column 3"),
    (row(tools=["{]"]), "`tools`: not JSON at column 2"),
    (row(tools=[{"googleSearch": {}}]), "tool 1: {'googleSearch': {}} declares no function"),
    (row(tools=[{"functionDeclarations": [FUNCTION], "googleSearch": {}}]), "declares no function"),
    (row(tools=[NAMED | {"parameters": PARAMETERS, "inputSchema": {"type": "object"}}]), "say different things; keep"),
    (row(tools=[NAMED | {"parameters": [{"name": "a"}, {"name": "a"}]}]), "two parameters have one name"),
    (row(tools=[TOOL, FUNCTION | {"description": "Says."}]), "tool weather: is declared twice, and not the same; keep"),
    (
        row(tools=[NAMED | {"parameters": {"city": "string, the city"}}]),
        "tool 1: `parameters`: the parameter 'city' is 'string, the city'; write its schema: "
        '{"properties": {"city": {"type": "string", "description": ...}}}',
    ),
    (
        row(tools=[NAMED | {"parameters": {"type": "object", "city": {"type": "string"}, "days": 3}}]),
        "the parameter 'days' is 3; write its schema",
    ),
    (
        row(api_list=[{"tool_name": "t", "api_name": "f", "api_description": "d", "required_parameters": []}]),
        "the column `api_list` declares ['f'] in a form that is not read; write as `tools`",
    ),
    (row(api_docs=[FUNCTION]), "the column `api_docs` declares tools, but is not read"),
    (row(api_docs={"f": {"api_name": "f", "api_description": "d"}}), "the column `api_docs` declares ['f'] in a form"),
    (
        row(mcp_servers=[{"name": "s", "description": "d", "tools": [{**NAMED, "inputSchema": PARAMETERS}]}]),
        "the column `mcp_servers` declares",
    ),
    (
        row(tools=[TOOL], mcp_servers={"s": {"url": "u", "tools": [OTHER]}}),
        "the column `mcp_servers` declares",
    ),
    (row(tools=[NAMED | {"parameters": {"city": {"type": "float64"}}}]), "city: 'float64' is no type; write one of"),
]


@pytest.mark.parametrize(("given", "words"), REFUSED)
def test_what_has_not_one_meaning_is_refused_with_the_way_out(given: Any, words: str) -> None:
    message = refusal(given)
    assert message.startswith("rows.jsonl:1: ")
    assert words in message


def test_only_the_first_system_message_may_declare() -> None:
    given = row(tools=[TOOL])
    given["messages"][1]["tools"] = [OTHER]
    assert "turn 2 (assistant): `tools` of a message that is not the first system message" in refusal(given)


# ---- parameters and types --------------------------------------------------------------------------------------------


def declared(parameters: Any) -> Any:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    tools = [{"name": "f", "description": "d", "parameters": parameters}]
    return parse({"messages": messages, "tools": tools}).tools[0]["function"]["parameters"]


def test_parameters_of_xlam() -> None:
    given = {
        "city": {"type": "str", "description": "The city", "default": "London"},
        "days": {"type": "int, optional", "description": "n"},
        "points": {"type": "List[Tuple[float, float]]"},
        "type": {"type": "str", "default": "a"},
    }
    assert declared(given) == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "The city", "default": "London"},
            "days": {"type": "integer", "description": "n"},
            "points": {
                "type": "array",
                "items": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
            },
            "type": {"type": "string", "default": "a"},
        },
        "required": ["points"],  # since another one says that it is optional, and this one has no default
    }


def test_no_parameter_is_required_where_none_says_that_it_is_optional() -> None:
    assert declared({"city": {"type": "str"}}) == {"type": "object", "properties": {"city": {"type": "string"}}}


@pytest.mark.parametrize(
    ("given", "properties"),
    [
        ({"city": {"type": "string"}, "days": "int"}, {"city": {"type": "string"}, "days": {"type": "integer"}}),
        ({"city": "str"}, {"city": {"type": "string"}}),
        ({"title": "string", "body": "List[str]"}, {"title": {}, "body": {"type": "array"}}),
        ({"format": "str", "city": {"type": "string"}}, {"format": {"type": "string"}, "city": {"type": "string"}}),
        ({"type": "object", "city": "str", "title": "Weather"}, {"city": {"type": "string"}}),
    ],
)
def test_a_parameter_may_be_its_type_alone(given: Any, properties: Any) -> None:
    found = declared(given)["properties"]
    assert list(found) == list(properties)
    for name, schema in properties.items():
        assert found[name].items() >= schema.items()


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "strict": True, "x-order": ["a"]},
        {"type": "object", "title": "Nothing", "description": "No parameters", "examples": [{}]},
        {"type": "object", "properties": {"properties": {"type": "string"}, "type": {"type": "string"}}},
        {"type": "object", "properties": {}},
        {"type": "object", "additionalProperties": {"type": "string"}},
        {"type": "object", "$defs": {"A": {"type": "string"}}, "properties": {"a": {"$ref": "#/$defs/A"}}},
        {"type": "object", "properties": {"a": {"enum": ["int", "str"], "default": {"type": "str"}}}},
        {"type": "object", "properties": {"a": {"const": {"type": "dict"}, "examples": [{"type": "int"}]}}},
    ],
)
def test_a_schema_stays_as_it_is(schema: Any) -> None:
    assert declared(schema) == schema


def test_types_are_renamed_wherever_a_schema_stands() -> None:
    given = {
        "type": "dict",
        "properties": {
            "type": {"type": "float"},
            "list": {"type": "LIST", "items": {"type": "Any"}},
            "one": {"anyOf": [{"type": "int"}, {"type": ["STRING", "NULL"]}, {"type": ["OBJECT"]}]},
            "map": {"type": "dict", "additionalProperties": {"type": "bool"}},
            "ref": {"$ref": "#/$defs/A"},
        },
        "$defs": {"A": {"type": "str"}},
    }
    assert declared(given) == {
        "type": "object",
        "properties": {
            "type": {"type": "number"},
            "list": {"type": "array", "items": {}},
            "one": {"anyOf": [{"type": "integer"}, {"type": ["string", "null"]}, {"type": "object"}]},
            "map": {"type": "object", "additionalProperties": {"type": "boolean"}},
            "ref": {"$ref": "#/$defs/A"},
        },
        "$defs": {"A": {"type": "string"}},
    }


TYPES: dict[str, Any] = {
    "str": {"type": "string"},
    "Boolean": {"type": "boolean"},
    "double": {"type": "number"},
    "any": {},
    "TYPE_UNSPECIFIED": {},
    "None": {"type": "null"},
    "int, optional": {"type": "integer"},
    "Optional[str]": {"type": "string", "nullable": True},
    "str | None": {"type": "string", "nullable": True},
    "typing.List[int]": {"type": "array", "items": {"type": "integer"}},
    "list[list[str]]": {"type": "array", "items": {"type": "array", "items": {"type": "string"}}},
    "string[]": {"type": "array", "items": {"type": "string"}},
    "Dict[str, float]": {"type": "object", "additionalProperties": {"type": "number"}},
    "Union[int, float]": {"anyOf": [{"type": "integer"}, {"type": "number"}]},
    "Tuple[int, ...]": {"type": "array", "items": {"type": "integer"}},
    "Tuple[int, str]": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "string"}],
        "minItems": 2,
        "maxItems": 2,
    },
    "Literal['a', 'b']": {"enum": ["a", "b"]},
    "Callable[[float], float]": {},
}


@pytest.mark.parametrize("name", TYPES)
def test_types(name: str) -> None:
    assert parse_type(name) == TYPES[name]


@pytest.mark.parametrize(
    "name",
    ["float64", "", "a b", "np.ndarray", "List[float64]", "Literal[f()]", "Literal[b'x']", "x" * 500, "[]" * 500],
)
def test_types_that_nobody_knows(name: str) -> None:
    with pytest.raises(DataError, match=r"is no type; write one of string, number, integer"):
        parse_type(name)


# ---- the small inputs beside the repository --------------------------------------------------------------------------

CITY = {"city": {"type": "string", "description": "City"}}
WEATHER = {
    "name": "get_weather",
    "description": "Weather now",
    "parameters": {"type": "object", "properties": CITY, "required": ["city"]},
}
F = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
FLAT_CITY = {"city": {"type": "string", "description": "The city", "default": "London"}}
FILES: dict[str, Any] = {
    "format_toucan_full": WEATHER | {"name": "weather-server-get_weather"},
    "format_when2call_sft": WEATHER,
    "format_xlam60k_messages_flat": WEATHER
    | {"parameters": {"type": "object", "properties": {"city": CITY["city"] | {"default": "London"}}}},
    "schema_functions_legacy_column": F | {"parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    "schema_mcp_inputSchema": F,
    "schema_tools_list_of_json_strings_when2call": F,
    "schema_xlam_flat_params": F
    | {
        "parameters": {
            "type": "object",
            "properties": FLAT_CITY | {"days": {"type": "integer", "description": "n"}},
        }
    },
}


@pytest.mark.parametrize("name", FILES)
def test_the_case_of_this_name(name: str, shared: Path) -> None:
    ((where, given),) = read_rows([shared / "cases" / "data" / f"{name}.jsonl"])
    # the answers of some are calls written as text, which is another matter
    assert isinstance(given, dict)
    assert parse_row(given, where, RowConfig()).tools == [{"type": "function", "function": FILES[name]}]


def test_a_call_that_the_system_message_does_not_declare_is_refused(shared: Path) -> None:
    ((where, given),) = read_rows([shared / "cases" / "data" / "msg_tools_in_system_message.jsonl"])
    with pytest.raises(DataError, match=r"calls zzz, which `tools` does not declare \(\['f'\]\)"):
        parse_row(given, where, RowConfig())


def test_equal_declarations_are_one_object_and_none_of_the_rows() -> None:
    given = row(tools=[json.loads(json.dumps(TOOL))])
    first, second = parse(given), parse(row(tools=[json.loads(json.dumps(TOOL))]))
    assert first.tools[0] is second.tools[0]
    given["tools"][0]["function"]["description"] = "Another."  # by who made the row
    given["tools"][0]["function"]["parameters"]["properties"]["city"]["type"] = "integer"
    assert parse(row(tools=[TOOL])).tools == second.tools == [TOOL]


@pytest.mark.parametrize(("one", "other"), [(1, True), (1, 1.0), (0, False), ("1", 1), (None, "null")])
def test_declarations_that_only_python_takes_for_equal_are_two(one: Any, other: Any) -> None:
    def default_of(value: Any) -> Any:
        city = {"type": ["string", "number", "boolean"], "default": value}
        function = FUNCTION | {"parameters": {"type": "object", "properties": {"city": city}}}
        (tool,) = parse(row(tools=[{"type": "function", "function": function}])).tools
        found: Any = tool
        return found["function"]["parameters"]["properties"]["city"].get("default")

    assert [repr(default_of(value)) for value in (one, other, one)] == [repr(value) for value in (one, other, one)]


def test_objects_of_python_are_taken_as_the_json_that_they_would_be() -> None:
    """Rows that Python hands over may hold tuples and numpy's words."""
    parameters = {**PARAMETERS, "required": ("city",), "description": np.str_("Of it.")}
    given = {"type": "function", "function": {**FUNCTION, "parameters": parameters}}
    (tool,) = parse(row(tools=[given])).tools
    assert tool["function"]["parameters"] == {**PARAMETERS, "description": "Of it."}
