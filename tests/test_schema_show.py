"""What the chat templates show of a tool's schema, and `schemas: simplify`, which changes no argument that is right."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import _compile_jinja_template

from gemma_dist.config import RowConfig
from gemma_dist.data.rows import read_rows
from gemma_dist.data.schema_fit import find_misfit
from gemma_dist.data.schema_show import REWRITTEN, show_tools
from gemma_dist.data.trajectory import parse_row
from gemma_dist.errors import DataError

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = {path.stem: _compile_jinja_template(path.read_text()) for path in sorted(FOLDER.glob("gemma4*.jinja"))}
STRING = re.compile(r'<\|"\|>.*?<\|"\|>', re.DOTALL)


def shown(function: dict[str, Any], template: str = "gemma4_v5") -> str:
    """What a template shows of a tool, between its control tokens."""
    messages = [{"role": "user", "content": "x"}]
    tools: Any = [{"type": "function", "function": function}]
    text = TEMPLATES[template].render(messages=messages, tools=tools, bos_token="")
    return text.partition("<|tool>declaration:f")[2].partition("<tool|>")[0]


def with_parameter(schema: dict[str, Any], **others: Any) -> dict[str, Any]:
    """A function with one parameter, x."""
    return {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": schema}, **others}}


def simplified(function: dict[str, Any], notes: Counter[str] | None = None) -> dict[str, Any]:
    tools: Any = [{"type": "function", "function": function}]
    (tool,) = show_tools(tools, "simplify", Counter() if notes is None else notes)
    return dict(tool["function"])


def notes_as_given(function: dict[str, Any]) -> list[str]:
    notes: Counter[str] = Counter()
    tools: Any = [{"type": "function", "function": function}]
    assert show_tools(tools, "as_given", notes) == tools
    return list(notes)


CITY = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}}

# A parameter: what the template does not show of it, what it becomes.
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "type list": (
        {"type": ["string", "null"]},
        "the list of types of x (it becomes one of Python)",
        {"type": "string", "nullable": True},
    ),
    "type list with an enum": (
        {"type": ["string", "null"], "enum": ["a", None]},
        "the list of types of x (it becomes one of Python), `enum` of x",
        {"type": "string", "enum": ["a"], "nullable": True},
    ),
    "types": (
        {"type": ["string", "integer"]},
        "the list of types of x (it becomes one of Python)",
        {"anyOf": [{"type": "string"}, {"type": "integer"}], "description": "(string or integer)"},
    ),
    "optional of pydantic": (
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}], "default": None, "title": "X"},
        "`anyOf` of x",
        {
            "description": "(minimum: 1)",
            "type": "integer",
            "minimum": 1,
            "default": None,
            "title": "X",
            "nullable": True,
        },
    ),
    "choices or null": (
        {"anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]},
        "`anyOf` of x",
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "nullable": True,
            "description": "(integer or string)",
        },
    ),
    "constants": (
        {"oneOf": [{"const": "a", "description": "First."}, {"const": "b"}], "description": "Which."},
        "`oneOf` of x",
        {"type": "string", "enum": ["a", "b"], "description": "Which. a: First."},
    ),
    "one allOf": (
        {"allOf": [{"type": "string", "enum": ["a"]}], "description": "Which."},
        "`allOf` of x",
        {"type": "string", "enum": ["a"], "description": "Which."},
    ),
    "const": ({"const": "a"}, "`const` of x", {"type": "string", "enum": ["a"]}),
    "enum without type": ({"enum": ["a", "b"]}, "`enum` of x", {"type": "string", "enum": ["a", "b"]}),
    "enum of integers": (
        {"type": "integer", "enum": [1, 2, 3], "description": "How many."},
        "`enum` of x",
        {"type": "integer", "enum": [1, 2, 3], "description": "How many. (one of 1, 2, 3)"},
    ),
    "default and bounds": (
        {"type": "integer", "default": 5, "minimum": 1, "maximum": 9},
        "`default` of x, `minimum` of x, `maximum` of x",
        {
            "type": "integer",
            "default": 5,
            "minimum": 1,
            "maximum": 9,
            "description": "(default: 5; minimum: 1; maximum: 9)",
        },
    ),
    "map": (
        {"type": "object", "additionalProperties": {"type": "string"}},
        "`additionalProperties` of x (it becomes a parameter)",
        {
            "type": "object",
            "additionalProperties": {"type": "string"},
            "properties": {},
            "description": '(additionalProperties: {"type": "string"})',
        },
    ),
    "properties of items": (
        {"type": "array", "items": {"type": "object", "properties": {"n": {"type": ["integer", "null"]}}}},
        "the list of types of items of x.n (it becomes one of Python)",
        {
            "type": "array",
            "items": {"type": "object", "properties": {"n": {"type": "integer", "nullable": True}}},
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_shown_is_said_and_simplified(name: str) -> None:
    schema, lost, simple = CASES[name]
    function = with_parameter(schema)
    assert notes_as_given(function) == [f"tool f: the chat template does not show {lost}; use `schemas: simplify`"]
    notes: Counter[str] = Counter()
    assert simplified(function, notes) == with_parameter(simple)
    assert notes == {REWRITTEN: 1}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "enum": ["a", "b"], "description": "Which.", "title": "X"},
        {"type": "integer", "nullable": True, "default": None},
        {"type": "array", "items": {"type": "integer", "enum": [1, 2], "default": 1}},
        {"type": "object", "properties": {"type": {"type": "string"}}, "additionalProperties": False},
        {},
    ],
)
def test_what_is_shown_stays_and_is_not_mentioned(schema: dict[str, Any]) -> None:
    function = with_parameter(schema)
    assert notes_as_given(function) == []
    assert simplified(function) == function


def test_a_definition_is_put_where_it_is_named() -> None:
    definitions = {"City": CITY, "Way": {"type": "array", "items": {"$ref": "#/$defs/City"}}}
    reference = {"$ref": "#/$defs/Way", "title": "Way"}
    function = with_parameter(reference, **{"$defs": definitions})
    assert "`$ref` of x" in notes_as_given(function)[0]
    assert simplified(function) == with_parameter({"type": "array", "items": CITY, "title": "Way"})


def test_a_definition_that_leads_to_itself_stays_and_is_said() -> None:
    function = with_parameter({"$ref": "#/$defs/Node"}, **{"$defs": {"Node": NODE}, "allOf": [{"required": ["x"]}]})
    notes: Counter[str] = Counter()
    expected = with_parameter({"$ref": "#/$defs/Node"}, required=["x"], **{"$defs": {"Node": NODE}})
    assert simplified(function, notes) == expected
    assert "tool f: the chat template does not show a `$ref` that leads to itself; describe it in words" in notes


def test_definitions_that_would_grow_without_bounds_stay() -> None:
    definitions: dict[str, Any] = {"D20": {"type": "string"}}
    for level in range(20):
        following = {"$ref": f"#/$defs/D{level + 1}"}
        definitions[f"D{level}"] = {"type": "object", "properties": {"a": following, "b": following}}
    function = with_parameter({"$ref": "#/$defs/D0"}, **{"$defs": definitions})
    assert simplified(function) == function


def test_a_long_chain_of_definitions_does_not_end_the_process() -> None:
    definitions: dict[str, Any] = {f"D{i}": {"$ref": f"#/$defs/D{i + 1}"} for i in range(5000)}
    function = with_parameter({"$ref": "#/$defs/D0"}, **{"$defs": definitions | {"D5000": {"type": "string"}}})
    assert simplified(function) == function


def test_what_a_tool_returns_never_leaves_a_brace_open() -> None:
    function = with_parameter({"type": "string"}) | {"response": {"type": "STRING", "description": "A word."}}
    assert notes_as_given(function) == [
        "tool f: the chat template does not show the end of `response` (its brace stays open); use `schemas: simplify`"
    ]
    assert shown(function).count("{") > shown(function).count("}")
    assert simplified(function) == with_parameter({"type": "string"}) | {"description": "d (returns: A word.)"}
    closed = function | {"response": {"type": "OBJECT", "description": "A word."}}
    assert notes_as_given(closed) == []
    assert simplified(closed) == closed


def test_what_only_all_parameters_say_together_is_described_with_the_tool() -> None:
    function = with_parameter({"type": "string"}, anyOf=[{"required": ["x"]}, {"required": ["y"]}])
    assert notes_as_given(function) == [
        "tool f: the chat template does not show `anyOf` of the parameters; use `schemas: simplify`"
    ]
    assert simplified(function)["description"] == 'd (anyOf: [{"required": ["x"]}, {"required": ["y"]}])'


def test_a_long_list_is_cut() -> None:
    function = with_parameter({"type": "integer", "minimum": 1, "maximum": 2, "multipleOf": 1, "default": 1})
    (note,) = notes_as_given(function)
    assert "`minimum` of x, `maximum` of x, `multipleOf` of x and 1 more; use" in note


def test_a_prompt_of_simplified_tools() -> None:
    """As a server shows them: the case that FastMCP and pydantic make most often."""
    parameters = {
        "type": "object",
        "properties": {
            "city": {"$ref": "#/$defs/City", "description": "Where."},
            "days": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
        },
        "$defs": {"City": CITY},
    }
    assert shown(simplified({"name": "f", "description": "d", "parameters": parameters})) == (
        '{description:<|"|>d<|"|>,parameters:{properties:{city:{description:<|"|>Where.<|"|>,'
        'properties:{name:{type:<|"|>STRING<|"|>}},required:[<|"|>name<|"|>],type:<|"|>OBJECT<|"|>},'
        'days:{nullable:true,type:<|"|>INTEGER<|"|>}},type:<|"|>OBJECT<|"|>}}'
    )


def row(tools: list[Any], arguments: Any) -> dict[str, Any]:
    call = {"function": {"name": "f", "arguments": arguments}}
    return {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}], "tools": tools}


def test_calls_keep_the_types_of_the_schema_as_given() -> None:
    tools = [with_parameter({"type": "integer", "enum": [1, 2]})]
    simple = RowConfig(schemas="simplify")
    parsed = parse_row(row(tools, {"x": 2}), "rows.jsonl:1", simple)
    assert parsed.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 2}
    assert parsed.tools[0]["function"]["parameters"]["properties"] == {
        "x": {"description": "(one of 1, 2)", "type": "integer", "enum": [1, 2]}
    }
    for wrong in ("2", 3):
        with pytest.raises(DataError, match="do not fit the tool's schema"):
            parse_row(row(tools, {"x": wrong}), "rows.jsonl:1", simple)


def test_a_schema_that_denies_itself_is_refused() -> None:
    denying = {"not": {"$ref": "#/$defs/A"}}
    tools = [with_parameter({"$ref": "#/$defs/A"}, **{"$defs": {"A": denying}})]
    with pytest.raises(DataError, match="the tool's schema cannot be applied"):
        parse_row(row(tools, {"x": 2}), "rows.jsonl:1", RowConfig())


CASE_FILES = [
    "schema_additionalProperties_map",
    "schema_anyOf_pydantic_optional",
    "schema_enum_ints",
    "schema_ref_defs_fastmcp",
    "schema_response_key",
    "schema_type_list_nullable",
]


@pytest.mark.parametrize("name", CASE_FILES)
def test_the_case_of_this_name_is_noted_and_shown_whole_when_simplified(name: str, shared: Path) -> None:
    ((where, raw),) = read_rows([shared / "cases" / "data" / f"{name}.jsonl"])
    (note,) = parse_row(raw, where, RowConfig()).notes
    assert note.startswith("tool f: the chat template does not show ")
    assert note.endswith("; use `schemas: simplify`")
    simple = parse_row(raw, where, RowConfig(schemas="simplify"))
    assert simple.notes == {REWRITTEN: 1}
    check_shown(dict(simple.tools[0]["function"]))


# ---- anything at all -------------------------------------------------------------------------------------------------


def check_shown(function: dict[str, Any]) -> None:
    """No template shows a list of Python, or leaves a brace open."""
    for template in TEMPLATES:
        text = shown(function, template)
        assert "<|\"|>['" not in text, (template, text)
        outside = STRING.sub("", text)
        for opening, closing in ("{}", "[]"):
            assert outside.count(opening) == outside.count(closing), (template, text)


NAMES = st.sampled_from(["a", "b"])
SCALARS = st.sampled_from([None, True, 0, 1, "a", "b"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2))
WORDS: list[dict[str, Any]] = [
    *({"type": name} for name in ("string", "integer", "null", "object", "array")),
    *({"type": names} for names in (["string"], ["string", "null"], ["integer", "string", "null"])),
    *({"enum": values} for values in (["a"], ["a", None], [1, 2], [None])),
    *({"const": value} for value in ("a", 1, None)),
    *({"$ref": f"#/$defs/{name}"} for name in "AB"),
    *({"nullable": True}, {"description": "d"}, {"title": "T"}, {"default": 1}, {"minimum": 1}, {"required": ["b"]}),
    *({"additionalProperties": False}, {}),
]


def with_inner(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    choices = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        st.builds(lambda keyword, value: {keyword: value}, st.sampled_from(["anyOf", "oneOf", "allOf"]), choices),
        st.builds(lambda value: {"type": "object", "properties": value}, st.dictionaries(NAMES, inner, max_size=2)),
        st.builds(lambda value: {"type": "array", "items": value}, inner),
        st.builds(lambda value: {"type": "object", "additionalProperties": value}, inner),
        st.builds(lambda value: {"not": value}, inner),
        st.builds(lambda one, other: one | other, inner, inner),
    )


SCHEMAS = st.recursive(st.sampled_from(WORDS), with_inner, max_leaves=6)
WHOLE = st.sampled_from(
    [
        {},
        {"required": ["a"]},
        {"additionalProperties": False},
        {"allOf": [{"$ref": "#/$defs/A"}]},
        {"$schema": "http://json-schema.org/draft-07/schema#"},
    ]
)


@given(st.dictionaries(NAMES, SCHEMAS, min_size=1), SCHEMAS, SCHEMAS, WHOLE, st.lists(st.dictionaries(NAMES, VALUES)))
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_simplified_schemas_take_the_same_arguments_and_are_shown_whole(
    properties: Any, first: Any, second: Any, whole: Any, arguments: list[Any]
) -> None:
    parameters = {"type": "object", "properties": properties, "$defs": {"A": first, "B": second}, **whole}
    function = {"name": "f", "description": "d", "parameters": parameters}
    before = json.dumps(function)
    notes_as_given(function)
    simple = simplified(function)
    assert json.dumps(function) == before
    assert simplified(simple) == simple, "simplifying again changes nothing"
    check_shown(simple)
    for given_arguments in arguments:
        try:
            fits = find_misfit(given_arguments, parameters) is None
            fits_simple = find_misfit(given_arguments, simple["parameters"]) is None
        except DataError:  # such a schema leads to itself, without end, unless a keyword before that ends it
            continue
        assert fits_simple == fits
