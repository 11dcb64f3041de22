"""Declarations of tools without the nulls that say nothing: Arrow's, and those of dumps that write every field.

{"name": "f", "description": null, "parameters": {"type": "object", "required": null, "properties": {"b": null}}}
{"name": "f", "parameters": {"type": "object", "properties": {}}}
"""

from collections import Counter

from gemma_dist.data.types import ArrowStruct

DROPPED = "null values in schemas were dropped"

_NAMING = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # their keys are names
_DATA = ("default", "const", "enum", "example", "examples")  # their values are no schemas
_MAY_BE_NULL = ("default", "const", "example")


def drop_schema_nulls(declaration: dict[str, object], notes: Counter[str]) -> dict[str, object]:
    """A declaration, of any shape, without keys whose null is no value of theirs; how many is added to `notes`.

    `default: null` says something and stays, but not in a struct of Arrow, where every null may stand for no key.
    """
    return _clean_object(declaration, False, notes)


def _clean(value: object, notes: Counter[str], keys_are_names: bool = False) -> object:
    if isinstance(value, dict):
        return _clean_object(value, keys_are_names, notes)
    if isinstance(value, list):
        return [_clean(item, notes) for item in value]
    return value


def _clean_object(given: dict[str, object], keys_are_names: bool, notes: Counter[str]) -> dict[str, object]:
    cleaned: dict[str, object] = {}
    for key, value in given.items():
        may_be_null = key in _MAY_BE_NULL and not keys_are_names and not isinstance(given, ArrowStruct)
        if value is None and not may_be_null:
            notes[DROPPED] += 1
        elif key in _DATA and not keys_are_names:
            cleaned[key] = value
        else:
            cleaned[key] = _clean(value, notes, key in _NAMING and not keys_are_names)
    return cleaned
