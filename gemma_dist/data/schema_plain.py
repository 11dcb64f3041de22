"""Schemas of tools that need no validator to be known as valid: made of the keywords that tools have, each with a value
of its kind. Nearly all are; asking jsonschema whether one fits its metaschema takes milliseconds, more than all else
that is done to a row.
"""

from collections.abc import Callable

from gemma_dist.data.schema_walk import keywords
from gemma_dist.data.types import Json

_TYPES = keywords("string number integer boolean array object null")


def is_plainly_valid(schema: Json) -> bool:
    """Whether a schema is valid in JSON schema's draft 2020-12, as far as can be told at a glance: with a keyword that
    is not known here the answer is no, and the metaschema knows."""
    if isinstance(schema, dict):
        return all(keyword in _FITS and _FITS[keyword](value) for keyword, value in schema.items())
    return isinstance(schema, bool)


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
