"""Schemas of tools that need no validator to be known as valid: made of the keywords that tools have, each with a value
of its kind. Nearly all are; asking jsonschema whether one fits its metaschema takes milliseconds, more than all else
that is done to a row. So it is with arguments that fit such a schema, as nearly all do.
"""

from collections.abc import Callable
from typing import Any

from gemma_dist.data.schema_walk import keywords
from gemma_dist.data.strict import as_object
from gemma_dist.data.types import Json, JsonObject

_TYPES = keywords("string number integer boolean array object null")
_TYPE_NAMES: dict[type, tuple[str, ...]] = {  # a bool is an int of Python
    **{str: ("string",), bool: ("boolean",), int: ("integer", "number"), float: ("number",)},
    **{list: ("array",), dict: ("object",), type(None): ("null",)},
}
_SILENT = keywords(
    "description title format default example examples nullable"
)  # of which values fit, they say nothing


def is_plainly_valid(schema: Json) -> bool:
    """Whether a schema is valid in JSON schema's draft 2020-12, as far as can be told at a glance: with a keyword that
    is not known here the answer is no, and the metaschema knows."""
    if isinstance(schema, dict):
        return all(keyword in _FITS and _FITS[keyword](value) for keyword, value in schema.items())
    return isinstance(schema, bool)


def plainly_fits(value: Json, schema: Json) -> bool:
    """Whether a value fits a schema that is plainly valid, as far as can be told at a glance; jsonschema knows of those
    for which the answer is no."""
    if not isinstance(schema, dict):
        return schema is True
    return all(_fits(value, keyword, rule, schema) for keyword, rule in schema.items())


def _fits(value: Json, keyword: str, rule: Any, schema: JsonObject) -> bool:
    """Whether a value fits one keyword of a schema."""
    if keyword == "type":
        return rule in _types_of(value)
    if keyword == "enum":
        return isinstance(value, str) and value in rule  # of numbers 1, 1.0 and true are alike in Python
    if keyword == "items":
        return isinstance(value, list) and all(plainly_fits(item, rule) for item in value)
    if not isinstance(value, dict):
        return keyword in _SILENT
    if keyword == "properties":
        return all(plainly_fits(value[name], inner) for name, inner in rule.items() if name in value)
    if keyword == "required":
        return all(name in value for name in rule)
    if keyword == "additionalProperties":
        return rule is True or value.keys() <= as_object(schema.get("properties")).keys()
    return keyword in _SILENT


def _types_of(value: Json) -> tuple[str, ...]:
    """The names of JSON schema for what a value is; 1.0 is an integer, too, which jsonschema says."""
    return next((names for kind, names in _TYPE_NAMES.items() if isinstance(value, kind)), ())


def _is_type(value: Json) -> bool:
    if isinstance(value, list):
        return bool(value) and _are_distinct(value) and all(map(_is_type_name, value))
    return _is_type_name(value)


def _is_type_name(value: Json) -> bool:
    return isinstance(value, str) and value in _TYPES


def _are_distinct(value: Json) -> bool:
    """Whether this is a list of strings, none of them twice."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value) and len({*value}) == len(value)


def _are_schemas(value: Json) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_plainly_valid, value))


def _are_named_schemas(value: Json) -> bool:
    return isinstance(value, dict) and all(map(is_plainly_valid, value.values()))


def _is_text(value: Json) -> bool:
    return isinstance(value, str)


def _is_flag(value: Json) -> bool:
    return isinstance(value, bool)


def _is_list(value: Json) -> bool:
    return isinstance(value, list)


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_anything(value: Json) -> bool:
    return True


_KINDS: dict[Callable[[Json], bool], str] = {
    _is_text: "description title format",
    _is_type: "type",
    _are_distinct: "required",
    _is_list: "enum examples",
    _are_schemas: "anyOf oneOf allOf",
    _are_named_schemas: "properties",
    is_plainly_valid: "items additionalProperties",
    _is_number: "minimum maximum exclusiveMinimum exclusiveMaximum",
    _is_count: "minLength maxLength minItems maxItems",
    _is_flag: "uniqueItems",
    _is_anything: "default const example nullable",
}
_FITS = {keyword: fits for fits, words in _KINDS.items() for keyword in words.split()}
