"""When an argument is right by BFCL's rule: its published AST checker for Python, with its leniency and its quirks.

Texts are equal when they are after blanks and , . / - _ * ^ are deleted, in lower case, and with ' as "; so "10.5"
equals "105". Types are exact Python types, by the type in the schema: an integer passes for a number, a number with a
point never for an integer, true for neither. Arrays: item types one level deep, texts in them as above, the rest by
Python's ==. Objects, and arrays of objects: key by key against lists of values, one level deep. A value of another type
than the schema says passes as a "variable" if it has the type of gold's first value and is equal to one of them.

`docs/evaluation.md` has the differences to the published checker that remain; `benchmarks/bfcl_rule.py` counts them.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_dist.data.gold import ABSENT
from gemma_dist.evaluate.values import Fault, Wanted, faults_of_names

_DELETED = re.compile(r"[ ,./\-_*^]")
# A parameter without a type is what BFCL writes as "any", which its checker takes for a text.
_PYTHON_TYPES = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict}


def bfcl_faults(wanted: Wanted, arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> list[Fault]:
    """What is wrong with the arguments of a call by BFCL's rule; the checker itself stops at the first.

    Args:
        schema: of the tool's parameters, with JSON schema's types; {} where it has none.
    """
    faults = list(faults_of_names(wanted, arguments, schema, required_may_lack=False))
    declared = schema.get("properties")
    properties = declared if isinstance(declared, Mapping) else {}
    required = schema.get("required")
    known = {*arguments, *wanted.values, *wanted.ignored}
    needed = required if isinstance(required, list) else []
    faults += [Fault("missing_required", name) for name in needed if name not in known]
    for name, value in arguments.items():
        if name not in wanted.values:
            continue
        options = wanted.values[name]
        if name not in wanted.listed:
            options = [_as_option(option) for option in options]
        if schema and name not in properties:
            faults.append(Fault("unknown_name", name, tuple(options), (value,)))
        elif (kind := _fault(value, options, properties.get(name))) is not None:
            faults.append(Fault(kind, name, tuple(options), (value,)))
    return faults


def _as_option(value: Any) -> Any:
    """A plain gold value in the form of BFCL's acceptable ones: the values of objects in lists."""
    if isinstance(value, dict):
        return {key: [inner] for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_option(item) if isinstance(item, dict) else item for item in value]
    return value


def _fault(value: Any, options: Sequence[Any], schema: Any) -> Any:
    """ "wrong_type", "wrong_value" or None for one argument, as `type_checker` and the checkers behind it decide."""
    expected = _python_type(schema)
    item_type = _python_type(schema.get("items")) if expected is list and isinstance(schema, Mapping) else None
    if expected is float and type(value) is int:
        value = _as_float(value)
    gold_type = next((type(option) for option in options if option != ABSENT), None)
    is_variable = gold_type is not None and gold_type is not expected
    if type(value) is expected:
        if isinstance(value, list) and item_type is not None and not _item_types_fit(value, options, item_type):
            return "wrong_type"
    elif gold_type is not None and type(value) is gold_type:
        is_variable = True
    else:
        return "wrong_type"
    return None if _is_right(value, options, expected, item_type, is_variable) else "wrong_value"


def _as_float(value: int) -> float:
    """An integer as a number with a point; infinity, which no gold value is, where it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _python_type(schema: Any) -> type:
    """The type that the checker expects of a parameter; of several types in the schema the first."""
    given = schema.get("type") if isinstance(schema, Mapping) else None
    name = next((kind for kind in given if kind != "null"), None) if isinstance(given, list) else given
    return _PYTHON_TYPES.get(str(name), str)


def _item_types_fit(value: list[Any], options: Sequence[Any], item_type: type) -> bool:
    """Whether the items have the type that the schema says, or that of the first item of gold."""
    for option in options:
        if not isinstance(option, list):
            return True
        first = next((type(item) for item in option if item != ABSENT), None)
        if all(type(item) is item_type or (first is not None and type(item) is first) for item in value):
            return True
    return False


def _is_right(value: Any, options: Sequence[Any], expected: type, item_type: type | None, is_variable: bool) -> bool:
    """Whether a value of a right type is among the options."""
    if is_variable or expected not in (dict, list, str):
        return value in options
    if expected is dict:
        return any(_object_fits(value, option) for option in options)
    if expected is str:
        return _plain(value) in [_plain(option) for option in options if isinstance(option, str)]
    if item_type is dict:
        return any(_objects_fit(value, option) for option in options)
    return [_plain(item) for item in value] in [_plain_items(option) for option in options]


def _objects_fit(value: list[Any], option: Any) -> bool:
    """Whether objects agree with those of an option one by one."""
    return isinstance(option, (list, str)) and len(value) == len(option) and all(map(_object_fits, value, option))


def _object_fits(value: Any, option: Any) -> bool:
    """Whether an object agrees with an option: each value in its key's list, and no key missing but with ""."""
    if not isinstance(option, Mapping):
        return False
    allowed = {key: items if isinstance(items, list) else [items] for key, items in option.items()}
    for key, item in value.items():
        if key not in allowed or _plain(item) not in [_plain(one) for one in allowed[key]]:
            return False
    return all(key in value or ABSENT in items for key, items in allowed.items())


def _plain_items(option: Any) -> list[Any] | None:
    """An option's items for a comparison. A text is a list of its letters there, so that "" is an empty list."""
    return [_plain(item) for item in option] if isinstance(option, (list, str)) else None


def _plain(value: Any) -> Any:
    """A text as BFCL compares it; any other value as it is."""
    return _DELETED.sub("", value).lower().replace("'", '"') if type(value) is str else value
