"""What a gold call may say beside its arguments: which other values are right, and which arguments are not judged.

    {"name": "weather", "arguments": {"city": "Rome"},
     "acceptable": {"city": ["Rome", "Roma"], "unit": ["celsius", ""]}, "ignore_arguments": ["note"]}

`acceptable` has a list for each argument that it speaks of; "" in the list means that the argument may be absent. A
value that is an object has such a list under each of its keys, also where it stands in an array, as in BFCL's files.
Arguments that it does not speak of have the one value under `arguments`, which may be left out where it speaks of all.

Evaluation alone looks at both keys; training passes over them.
"""

from collections.abc import Mapping
from typing import Any

from gemma_dist.data.strict import is_list_of, map_json_object, read_json_text, short, without_nulls
from gemma_dist.data.types import CalledFunction, Clean, Json, JsonObject, RawRow
from gemma_dist.errors import DataError

ACCEPTABLE, IGNORED = "acceptable", "ignore_arguments"
GOLD_KEYS = (ACCEPTABLE, IGNORED)
ABSENT = ""  # among the acceptable values: the argument may be left out
_LIST_RULE = '; write a list of the values that are right, "" among them where the argument may be left out'


def add_gold(called: CalledFunction, described: RawRow, clean: Clean) -> None:
    """Put `acceptable` and `ignore_arguments` of a raw call into the parsed one, where it has them.

    Raises:
        DataError: they are of another shape.
    """
    if described.get(ACCEPTABLE) is not None:
        acceptable = parse_acceptable(described[ACCEPTABLE], clean)
        called["acceptable"] = acceptable
    if described.get(IGNORED) is not None:
        ignored = described[IGNORED]
        if not isinstance(ignored, list) or not is_list_of(ignored, str):
            raise DataError(f"`{IGNORED}` is {short(ignored)}; write a list of names of arguments")
        called["ignore_arguments"] = [clean(name) for name in ignored]


def parse_acceptable(given: object, clean: Clean) -> dict[str, list[Json]]:
    """The acceptable values of each argument, checked. Keys whose list is null are Arrow's, and left out.

    Raises:
        DataError: an argument has no list, or the value that is an object has none under a key.
    """
    given = read_json_text(given, ACCEPTABLE)
    if not isinstance(given, dict):
        raise DataError(f"`{ACCEPTABLE}` is {short(given)}; write an object with a list of values for each argument")
    for name, values in without_nulls(given).items():
        if not isinstance(values, list):
            raise DataError(f"`{ACCEPTABLE}` gives {short(values)} for {short(name)}{_LIST_RULE}")
    return map_json_object(without_nulls(given), clean, clean)  # type: ignore[return-value]


def representative(acceptable: object) -> JsonObject:
    """Arguments for show that `acceptable` takes: the first value of each that may not be left out, but for nulls.

    {"city": ["Rome", "Roma"], "unit": ["°C", ""], "at": [{"hour": [9, 10]}]}  ->  {"city": "Rome", "at": {"hour": 9}}
    """
    if not isinstance(acceptable, Mapping):
        return {}
    given = {name: values for name, values in acceptable.items() if isinstance(values, list)}
    needed = {name: _first(values) for name, values in given.items() if values and ABSENT not in values}
    return without_nulls(needed)


def _first(values: list[Any]) -> Json:
    """The first value, null last."""
    return _plain(next((value for value in values if value is not None), None))


def _plain(value: Any) -> Json:
    """An acceptable value without its inner lists of alternatives."""
    if isinstance(value, Mapping):
        inner = {key: values if isinstance(values, list) else [values] for key, values in value.items()}
        return {key: _first(values) for key, values in inner.items() if values and ABSENT not in values}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
