"""Schemas and arguments that are taken without asking jsonschema are valid ones."""

import random
from typing import Any

import jsonschema
import pytest

from gemma_dist.data.schema_plain import is_plainly_valid, plainly_fits

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 1.5, 2.0, "", "a", "string", "integer", "str", "["),
    *([], ["a"], ["a", "a"], ["string", "null"], ["string", "string"], [1], [{}], [True], [{"type": "x"}]),
    *({}, {"type": "string"}, {"type": "x"}, {"a": {"type": "object"}}, {"a": []}, {"a": {"minLength": -1}}),
]
KEYWORDS = (
    *("type", "description", "title", "format", "required", "enum", "examples", "anyOf", "oneOf", "allOf", "not"),
    *("properties", "items", "additionalProperties", "minimum", "exclusiveMaximum", "maxLength", "minItems", "pattern"),
    *("uniqueItems", "default", "const", "example", "nullable", "$ref", "$schema", "$defs", "$id", "if", "unknown"),
)


def is_valid(schema: Any) -> bool:
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError:
        return False
    return True


def test_what_is_plainly_valid_is_valid() -> None:
    rng = random.Random(0)
    schemas = [{keyword: value} for keyword in KEYWORDS for value in VALUES]
    for _ in range(300):
        inner: Any = {rng.choice(KEYWORDS): rng.choice(VALUES) for _ in range(2)}
        outer: Any = rng.choice([{"properties": {"type": inner}}, {"items": inner}, {"anyOf": [{}, inner]}])
        schemas.append({"type": "object", rng.choice(KEYWORDS): rng.choice(VALUES)} | outer)
    plain = [schema for schema in schemas if is_plainly_valid(schema)]
    assert len(plain) > 100
    assert [schema for schema in plain if not is_valid(schema)] == []


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
        {"type": ["string", "null"], "enum": ["a", None], "description": "A letter.", "nullable": True},
        {"type": "array", "items": {"anyOf": [{"type": "integer", "minimum": 0}, True]}, "minItems": 1},
    ],
)
def test_schemas_as_tools_have_them_are_plain(schema: Any) -> None:
    assert is_plainly_valid(schema)


@pytest.mark.parametrize("schema", [{"pattern": "("}, {"type": "float"}, {"$ref": "#/x"}, {"items": [{}]}, None, []])
def test_what_is_not_plain_is_asked_about(schema: Any) -> None:
    assert not is_plainly_valid(schema)


def test_what_plainly_fits_fits() -> None:
    rng = random.Random(0)
    values = [*VALUES, {"a": 1}, {"a": True, "b": "x"}, {"a": 1.0}, {"b": {"a": ["a"]}}, [["a"]], [1, "a"]]
    inner: list[Any] = [True, False, {}, *({key: value} for key in KEYWORDS for value in VALUES)]
    inner = [schema for schema in inner if is_plainly_valid(schema)]
    schemas = list(inner)
    for _ in range(1000):
        one, other = rng.choices(inner, k=2)
        outer = {"properties": {"a": one, "b": other}, "required": ["a"], "additionalProperties": one, "items": other}
        schemas.append({"type": "object"} | {key: outer[key] for key in rng.sample(sorted(outer), 2)})
    plain = [(schema, value) for schema in schemas for value in values if plainly_fits(value, schema)]
    assert len(plain) > 1000
    assert [pair for pair in plain if not jsonschema.Draft202012Validator(pair[0]).is_valid(pair[1])] == []


def test_arguments_as_calls_have_them_plainly_fit() -> None:
    days = {"type": "array", "items": {"type": "integer"}, "description": "Of the week."}
    schema: Any = {"type": "object", "properties": {"city": {"enum": ["Rome"]}, "days": days}, "required": ["city"]}
    assert plainly_fits({"city": "Rome", "days": [1, 2]}, schema)
    misfits: list[Any] = [{}, {"city": "Oslo"}, {"city": "Rome", "days": ["1"]}]
    assert not any(plainly_fits(value, schema) for value in misfits)
