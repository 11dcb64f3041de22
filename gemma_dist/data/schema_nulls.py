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
    """A schema, a list of them, or any other value without nulls.

    Args:
        keys_are_names: whether the value is one of _NAMING, so that {"default": …} is a parameter of this name.
    """
    if isinstance(value, dict):
        return _clean_object(value, keys_are_names, notes)
    if isinstance(value, list):
        return [_clean(item, notes) for item in value]
    return value


def _clean_object(given: dict[str, object], keys_are_names: bool, notes: Counter[str]) -> dict[str, object]:
    """As `_clean`, of an object: {"type": "string", "title": null, "default": null} loses the title alone."""
    cleaned: dict[str, object] = {}
    data = () if keys_are_names else _DATA
    naming = () if keys_are_names else _NAMING
    may_be_null = () if keys_are_names or isinstance(given, ArrowStruct) else _MAY_BE_NULL
    for key, value in given.items():
        if value is None and key not in may_be_null:
            notes[DROPPED] += 1
        elif key in data:
            cleaned[key] = value
        else:
            cleaned[key] = _clean(value, notes, keys_are_names=key in naming)
    return cleaned
