"""JSON read strictly, and errors that say where: what the reader, the converters and the parser of raw rows share.

Python's `json` keeps the last of two equal keys, reads NaN, and follows any depth until the stack ends. Training data
must not lose anything silently, so all three are refused here.
"""

import functools
import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard, TypeVar, cast

from gemma_dist.data.types import ArrowStruct, Json, JsonObject, RawRow, TextObject
from gemma_dist.errors import DataError, shortened
from gemma_dist.gemma_format import MAX_DEPTH

Value = TypeVar("Value")

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+\b")
_shortener = reprlib.Repr()
_shortener.maxlevel, _shortener.maxdict, _shortener.maxlist = 2, 4, 4
_shortener.maxstring = _shortener.maxother = 80


def short(value: object) -> str:
    """`value` as Python would print it, at most about 80 characters a text, for an error message."""
    try:
        return _shortener.repr(value)
    except ValueError:  # Python refuses to print integers above 4,300 digits
        return "a number of thousands of digits"


def reason(error: BaseException) -> str:
    """What an error of another library says, on one line of at most 200 characters, for an error message of ours. An
    object's address in memory, which is another one each time, is left out."""
    return shortened(_ADDRESS.sub("", str(getattr(error, "message", "") or error or type(error).__name__)))


class error_context:  # not by contextlib, which takes three times as long: a row enters a hundred
    """Put `place` in front of every DataError that leaves the block: "train.jsonl:41: turn 5 (tool): ..."."""

    __slots__ = ("_place",)

    def __init__(self, place: object) -> None:
        self._place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, DataError):
            raise DataError(f"{self._place}: {error}") from None


@contextmanager
def bounded_depth() -> Iterator[None]:
    """DataError where what walks over JSON within goes too deep: a text that is taken may still be so for that."""
    try:
        yield
    except RecursionError:
        raise DataError("it is nested too deeply; make it flatter") from None


def parse_json(text: str) -> object:
    """The value of a JSON text. DataError (with the column, from 1) if it is not JSON or holds a key twice."""
    try:
        return _decoder().decode(text)
    except json.JSONDecodeError as error:
        near = short(text[max(0, error.pos - 20) : error.pos + 20])
        raise DataError(f"not JSON at column {error.pos + 1}, near {near}: {error.msg}; fix the JSON") from None
    except DataError:
        raise
    except RecursionError:
        raise DataError(f"JSON nested too deeply: {short(text)}; at most {MAX_DEPTH} levels are taken") from None
    except ValueError:
        raise DataError(
            "an integer of thousands of digits; integers fit 64 bits, write longer ones as strings"
        ) from None


@functools.cache
def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=_unique_keys)


def read_json_text(value: object, name: str) -> object:
    """The value itself, or what it says where it is JSON text; `name` is what errors call it."""
    if not isinstance(value, str):
        return value
    with error_context(f"`{name}`"):
        return parse_json(value)


def to_json_text(value: object) -> str:
    """A value as JSON text, which a message can show. DataError where it holds NaN, or bytes of parquet."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{short(value)} is not JSON: {error}; write it as a string") from None


def without_spaces(text: str) -> str:
    """The text without blanks and line breaks, for a comparison: "I look.\\n\\nYes." -> "Ilook.Yes."."""
    return "".join(text.split())


def require_encodable(text: str) -> str:
    """The string itself. DataError if UTF-8 cannot encode it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{short(text[max(0, error.start - 20) : error.end + 20])} holds half of a surrogate pair, which UTF-8 "
            "cannot encode; write the whole character"
        ) from None
    return text


def _unique_keys(pairs: list[tuple[str, object]]) -> RawRow:
    """What `json` makes of the pairs of an object, but for those with one key twice: {"a": 1, "a": 2} is refused."""
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
        raise DataError(f"the key {short(twice)} stands twice in one JSON object; remove one of the two")
    return result


def get(value: object, key: str) -> Any:
    """The value of a key; None where `value` is no object or has no such key."""
    return value.get(key) if isinstance(value, dict) else None


def get_list(value: object, key: str) -> list[object]:
    """As `get`, of a list; an empty one where there is none."""
    return as_list(get(value, key))


def get_string(value: object, key: str) -> str:
    """As `get`, of a string; "" where there is none. DataError where there is something else."""
    found = get(value, key)
    if found is not None and not isinstance(found, str):
        raise DataError(f"`{key}` is {short(found)}; write it as a string")
    return found or ""


def as_list(value: object) -> list[Any]:
    """The value where it is a list; an empty one where it is anything else."""
    return value if isinstance(value, list) else []


def as_object(value: object) -> dict[str, Any]:
    """The value where it is an object; an empty one where it is anything else."""
    return value if isinstance(value, dict) else {}


def is_list_of(value: object, kind: type) -> bool:
    """Whether the value is a list with nothing but values of one type in it: ["a", "b"] of str. It may be empty."""
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def is_json_text(value: object, brackets: tuple[str, ...] = ("{", "[")) -> TypeGuard[str]:
    """Whether the value is a string that opens as the JSON text of an object or list does."""
    return isinstance(value, str) and value.lstrip().startswith(brackets)


def without(value: Mapping[str, Value], *keys: str) -> dict[str, Value]:
    """A copy of an object without these keys: {"type": "function", "name": "f"} without "type" is {"name": "f"}."""
    return {key: item for key, item in value.items() if key not in keys}


def without_nulls(value: Mapping[str, Value | None]) -> dict[str, Value]:
    """A copy of an object without the keys whose value is null; Arrow fills absent keys with it."""
    return {key: item for key, item in value.items() if item is not None}


def is_null(value: object) -> bool:
    """Whether a value is null, or holds nothing but nulls, as Arrow makes of an absent struct: {"path": null}, []."""
    if isinstance(value, (dict, list)):
        return all(map(is_null, value.values() if isinstance(value, dict) else value))
    return value is None


def holds_null(value: Json) -> bool:
    """Whether a null stands anywhere in a value: {"path": [null]}."""
    if isinstance(value, (dict, list)):
        return any(map(holds_null, value.values() if isinstance(value, dict) else value))
    return value is None


def map_json(value: object, string: Callable[[str], str], key: Callable[[str], str], depth: int = 0) -> Json:
    """A copy of a JSON value with `string` applied to every string and `key` to every key of an object.

    Raises:
        DataError: what JSON, the template or a shard cannot carry: NaN, Infinity, integers beyond 64 bits, other types,
            more than MAX_DEPTH levels.
    """
    if depth > MAX_DEPTH:
        raise DataError(f"nested deeper than {MAX_DEPTH} levels; flatten it")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return string(value)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise DataError(f"the integer {short(value)} does not fit 64 bits; write it as a string")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DataError(
                f"the number {value} (NaN, Infinity, or above 1.8e308) is not JSON; use null or a string instead"
            )
        return value
    if isinstance(value, list):
        return [map_json(item, string, key, depth + 1) for item in value]
    if isinstance(value, dict):
        return map_json_object(value, string, key, depth)
    raise DataError(f"{short(value)} ({type(value).__name__}) is not a JSON value; write it as a string")


def map_json_object(
    value: dict[str, object], string: Callable[[str], str], key: Callable[[str], str], depth: int = 0
) -> JsonObject:
    """As `map_json`, of an object at this depth. It stays an `ArrowStruct` or `TextObject`."""
    for name in value:
        if not isinstance(name, str):
            raise DataError(f"the key {short(name)} is not a string; JSON keys are strings")
    mapped = {key(name): map_json(item, string, key, depth + 1) for name, item in value.items()}
    if isinstance(value, (ArrowStruct, TextObject)):
        return cast(JsonObject, type(value)(mapped))
    return mapped
