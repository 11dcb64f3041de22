"""When an argument is right by our own rule, and what is wrong with it otherwise.

`strict`: equal as JSON. Types agree (5 equals 5.0, true is not 1), texts after NFC and trimming, arrays in order,
objects by key. Where gold lists acceptable values (`data/gold.py`), one of them has to be equal; "" among them lets the
argument be absent. Arguments that gold ignores are right whatever they hold, and need not be there.
"""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

from gemma_dist.data.gold import ABSENT

# What can be wrong with an argument of a call of the right tool.
FaultKind = Literal["missing_required", "unknown_name", "wrong_type", "wrong_value", "wrong_optional_use"]

# JSON's types as Python has them. The first that fits counts: Python's bool is an int as well.
_JSON_TYPES = (
    ("boolean", bool),
    ("number", (int, float)),
    ("string", str),
    ("array", list),
    ("object", Mapping),
    ("null", type(None)),
)


class GoldCall(TypedDict):
    """A call of the gold turn."""

    name: str
    arguments: dict[str, Any]
    acceptable: NotRequired[dict[str, list[Any]]]  # all values that are right, of the arguments that it speaks of
    ignore_arguments: NotRequired[list[str]]


@dataclass(frozen=True)
class Fault:
    """One argument that is wrong, or is not there."""

    kind: FaultKind
    parameter: str
    expected: tuple[Any, ...] = ()  # the values that would be right; none where the argument should not be there
    got: tuple[Any, ...] = ()  # its value; none where it is not there


@dataclass(frozen=True)
class Wanted:
    """The arguments of a gold call as the rules compare them: all in NFC, and what is not judged left out."""

    values: dict[str, list[Any]]  # the right values of each argument
    listed: frozenset[str]  # arguments whose values gold lists: objects in them hold lists again
    ignored: frozenset[str]

    def may_lack(self, name: str) -> bool:
        """Whether the argument may be absent."""
        return name in self.listed and ABSENT in self.values[name]


def wanted_of(gold: GoldCall) -> Wanted:
    """What a gold call wants of arguments."""
    ignored = frozenset(map(nfc, gold.get("ignore_arguments", ())))
    acceptable = nfc(gold.get("acceptable", {}))
    values = {name: [value] for name, value in nfc(gold["arguments"]).items()} | acceptable
    judged = {name: options for name, options in values.items() if name not in ignored}
    return Wanted(judged, frozenset(acceptable), ignored)


def strict_faults(wanted: Wanted, arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> list[Fault]:
    """What is wrong with the arguments (in NFC) of a call by the strict rule.

    Args:
        schema: of the tool's parameters (in NFC); {} where it has none.
    """
    faults = list(faults_of_names(wanted, arguments, schema, required_may_lack=True))
    for name, value in arguments.items():
        if name not in wanted.values:
            continue
        options = wanted.values[name]
        if any(_accepts(option, value) if name in wanted.listed else _same(option, value) for option in options):
            continue
        is_type_right = any(_json_type(option) == _json_type(value) for option in options if option != ABSENT)
        faults.append(Fault("wrong_value" if is_type_right else "wrong_type", name, tuple(options), (value,)))
    return faults


def faults_of_names(
    wanted: Wanted, arguments: Mapping[str, Any], schema: Mapping[str, Any], *, required_may_lack: bool
) -> Iterator[Fault]:
    """Arguments that should be there and are not, or are there and should not be. Both rules ask this.

    Args:
        required_may_lack: whether an argument that the schema requires may lack where gold says so.
    """
    properties, required = schema.get("properties"), schema.get("required")
    known = set(properties) if isinstance(properties, Mapping) else set()
    needed = set(required) if isinstance(required, list) else set()
    for name, options in wanted.values.items():
        may_lack = wanted.may_lack(name) and (required_may_lack or name not in needed)
        if name not in arguments and not may_lack:
            is_needed = name in needed or not schema
            yield Fault("missing_required" if is_needed else "wrong_optional_use", name, tuple(options))
    for name, value in arguments.items():
        if name not in wanted.values and name not in wanted.ignored:
            yield Fault("wrong_optional_use" if name in known else "unknown_name", name, (), (value,))


def same_value(first: Any, second: Any) -> bool:
    """Equal as JSON: types must agree, numbers by value (5 equals 5.0), true is not 1, keys after NFC, strings after
    NFC and trimming."""
    return _same(nfc(first), nfc(second))


def _same(first: Any, second: Any) -> bool:
    """`same_value` of values in NFC."""
    kind = _json_type(first)
    if kind != _json_type(second):
        return False
    if kind == "string":
        return first.strip() == second.strip()
    if kind == "array":
        return len(first) == len(second) and all(map(_same, first, second))
    if kind == "object":
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return first == second


def _accepts(option: Any, value: Any) -> bool:
    """Whether an acceptable value takes a value: as `_same`, but objects in it hold lists of acceptable values."""
    if isinstance(option, Mapping) and isinstance(value, Mapping):
        if not value.keys() <= option.keys():
            return False
        return all(_accepts_member(options, value, key) for key, options in option.items())
    if isinstance(option, list) and isinstance(value, list):
        return len(option) == len(value) and all(map(_accepts, option, value))
    return _same(option, value)


def _accepts_member(options: Any, value: Mapping[str, Any], key: str) -> bool:
    """Whether the value under `key`, or its absence, is among `options`; what is no list stands for itself."""
    listed = options if isinstance(options, list) else [options]
    if key not in value:
        return ABSENT in listed
    return any(_accepts(option, value[key]) for option in listed)


def _json_type(value: Any) -> str:
    """JSON's name for the type of a value: `true` is a "boolean", 5 and 5.0 are a "number"."""
    return next(name for name, types in _JSON_TYPES if isinstance(value, types))


def nfc(value: Any) -> Any:
    """A JSON value, its strings and keys in Unicode's NFC. Keys that would become one stay as they are."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, list):
        return [nfc(item) for item in value]
    if isinstance(value, Mapping):
        keys = [nfc(key) for key in value]
        if len(set(keys)) < len(keys):
            keys = list(value)
        return dict(zip(keys, map(nfc, value.values()), strict=True))
    return value


def is_one_of(text: str, texts: Sequence[str]) -> bool:
    """Whether a text is one of several by the strict rule."""
    return any(same_value(text, other) for other in texts)
