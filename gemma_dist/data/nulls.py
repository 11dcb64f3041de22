"""Null arguments of calls: the row's own, or Arrow's in place of keys that the row did not have.

A table of calls of two tools gives each call the arguments of both, {"city": "Rome", "expr": null}, and trained like
this a model writes `call:weather{city:…,expr:null}`. The tool's schema decides, by which of the two readings fits:

    the schema does not name the key                      Arrow's: dropped
    null does not fit, and the key may be absent          Arrow's: dropped
    null fits, and the key is required                    the row's own: kept
    both fit, neither fits, or there is no schema         refused, unless `arrow_nulls` says drop or keep

Of JSON rows, a null that the schema does not name or allow is refused, for JSON is also written from Arrow
(`Dataset.to_json`). Nulls of arguments that a string holds as JSON text are the row's own.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from gemma_dist.data.schema_fit import Misfit, find_misfits, matches
from gemma_dist.data.strict import as_list, as_object, error_context
from gemma_dist.data.types import ArrowStruct, CalledFunction, Json, JsonObject, Message, TextObject, Tool
from gemma_dist.errors import DataError, setting

FILLED = "null arguments that Arrow filled in were dropped"
GIVEN = f"null arguments were dropped, as {setting('arrow_nulls', 'drop')} says"
WHOLE = "whole numbers that Arrow had stored as floats were made integers again"

Path: TypeAlias = tuple[str | int, ...]  # of keys and indices, from the arguments down

AS_TEXT = "Arrow fills absent keys with null, so store arguments as JSON text"
FROM_JSON = "JSON that was written from Arrow holds such nulls, so remove them"
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf")
_EXACT_FLOAT = 2**53  # up to here a float holds each integer


@dataclass(frozen=True)
class _Found:
    """A null or a float in the arguments of a call: of {"trip": {"days": 3.0}} the one at ("trip", "days")."""

    path: Path
    value: float | None
    from_arrow: bool  # a null may stand for no key, a float for an integer
    schemas: list[JsonObject]  # of the tool's schema, those that are about this place
    is_unnamed: bool  # the schema names the keys of the object, and this is none of them


def settle_nulls(
    places: list[str],
    messages: list[Message],
    tools: list[Tool],
    arrow_nulls: Literal["auto", "drop", "keep"],
    notes: Counter[str],
) -> None:
    """Drop or keep each null argument of the messages' calls, in place; what was dropped is added to `notes`.

    Args:
        places: how errors name each message.

    Raises:
        DataError: with `auto`, for a null of which the tool's schema does not tell whose it is.
    """
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    for place, message in zip(places, messages, strict=True):
        for call in message.get("tool_calls", []):
            function = call["function"]
            with error_context(place), error_context(f"call of {function['name']}"):
                schema = schemas.get(function["name"])
                _settle_call(function, schema, arrow_nulls, message.get("train", True), notes)


def _settle_call(
    function: CalledFunction,
    schema: JsonObject | None,
    arrow_nulls: Literal["auto", "drop", "keep"],
    train: bool,
    notes: Counter[str],
) -> None:
    """Drop or keep the null arguments of one call, in place.

    Args:
        schema: of the tool's parameters; {} where it has none, None where no tool of this name is declared.
        train: whether the message of the call is trained.
    """
    if _is_settled(function["arguments"]):
        function["arguments"] = dict(function["arguments"])
        return
    root = schema or {}
    found = list(_find(function["arguments"], _alternatives([root], root), root))
    whole = _whole_numbers(found)
    nulls = [null for null in found if null.value is None]
    dropped: list[Path] = []
    if arrow_nulls == "auto":
        dropped = _arrows_own(function["arguments"], schema, nulls, train)
    elif arrow_nulls == "drop":
        dropped = [null.path for null in nulls]
    function["arguments"] = _changed_object(function["arguments"], {**whole, **dict.fromkeys(dropped)})
    _count(notes, WHOLE, len(whole))
    _count(notes, FILLED if arrow_nulls == "auto" else GIVEN, len(dropped))


def _is_settled(value: Json) -> bool:
    """Whether a value holds no null and no struct of Arrow, at any depth."""
    if isinstance(value, dict):
        return not isinstance(value, ArrowStruct) and all(map(_is_settled, value.values()))
    return all(map(_is_settled, value)) if isinstance(value, list) else value is not None


def _count(notes: Counter[str], note: str, number: int) -> None:
    """Add a number to a note, unless it is 0: a note that is there is printed."""
    if number:
        notes[note] += number


def _arrows_own(arguments: JsonObject, schema: JsonObject | None, nulls: list[_Found], train: bool) -> list[Path]:
    """Places of the nulls that stand for no key, as the table at the top of this file says.

    {"city": "Rome", "expr": null}, {"properties": {"city": {"type": "string"}}} -> [("expr",)]

    Raises:
        DataError: one may be either.
    """
    filled = [null for null in nulls if null.from_arrow]
    if filled and schema is None:
        raise _undecided(filled[0].path, f"no schema says which arguments it has; {AS_TEXT}")
    if train and schema and "properties" in schema and not isinstance(arguments, TextObject):
        _refuse_of_json([null for null in nulls if not null.from_arrow], arguments, schema)
    dropped = [null.path for null in filled if null.is_unnamed]
    named = [null.path for null in filled if not null.is_unnamed]
    given = _changed_object(arguments, dict.fromkeys(dropped))
    for path, may_be_null, may_be_absent in _readings(given, named, schema):
        if may_be_null == may_be_absent:
            which = "both null and no argument fit" if may_be_null else "neither null nor no argument fits"
            raise _undecided(path, f"{which} the tool's schema; {AS_TEXT}")
        if may_be_absent:
            dropped.append(path)
    return dropped


def _refuse_of_json(nulls: list[_Found], arguments: JsonObject, schema: JsonObject) -> None:
    """Refuse a null of a JSON row that would be dropped from a row of Arrow, which it may have been once."""
    readings = _readings(arguments, [null.path for null in nulls], schema)
    for null, (path, may_be_null, may_be_absent) in zip(nulls, readings, strict=True):
        if null.is_unnamed:
            raise _undecided(path, f"the tool's schema does not name it; {FROM_JSON}")
        if may_be_absent and not may_be_null:
            raise _undecided(path, f"null does not fit the tool's schema; {FROM_JSON}")


def _readings(arguments: JsonObject, nulls: list[Path], schema: JsonObject | None) -> list[tuple[Path, bool, bool]]:
    """Of each null in the arguments: its place, whether null fits the schema there, whether no key at all does.

    {"city": "Rome", "unit": null}, {"properties": {"unit": {"type": "string"}}} -> [(("unit",), False, True)]
    """
    if not nulls:
        return []
    with_nulls = find_misfits(arguments, schema)
    without_nulls = find_misfits(_changed_object(arguments, dict.fromkeys(nulls)), schema)
    return [(path, not _is_about(path, with_nulls), not _is_missed(path, without_nulls)) for path in nulls]


def _is_about(path: Path, misfits: list[Misfit]) -> bool:
    """Whether the value at `path` itself is said not to fit."""
    return any(misfit.path == path for misfit in misfits)


def _is_missed(path: Path, misfits: list[Misfit]) -> bool:
    """Whether the object around `path` is said to lack its key."""
    return any(misfit.path == path[:-1] and path[-1] in misfit.required for misfit in misfits)


def _undecided(path: Path, why: str) -> DataError:
    """The error for a null that may be the row's own or Arrow's."""
    name = ".".join(map(str, path))
    return DataError(
        f"the argument {name} is null, which may stand for no argument: {why}, or use {setting('arrow_nulls', 'drop')} "
        f"(it is absent) or {setting('arrow_nulls', 'keep')} (it is null)"
    )


def _whole_numbers(found: list[_Found]) -> dict[Path, int | None]:
    """Floats that Arrow made of integers, where the schema takes integers alone: their places and the integers."""
    whole: dict[Path, int | None] = {}
    for number in found:
        is_whole = number.value is not None and number.value.is_integer() and abs(number.value) <= _EXACT_FLOAT
        if number.from_arrow and is_whole and _takes_integers_alone(number.schemas):
            assert number.value is not None
            whole[number.path] = int(number.value)
    return whole


def _takes_integers_alone(schemas: list[JsonObject]) -> bool:
    """Whether {"type": "integer"} or {"type": ["integer", "null"]} is said of a place, and "number" nowhere."""
    types: list[Json] = []
    for schema in schemas:
        kind = schema.get("type")
        types += kind if isinstance(kind, list) else [kind]
    return "integer" in types and "number" not in types


def _changed_object(given: Mapping[str, Json], changes: Mapping[Path, int | None], path: Path = ()) -> JsonObject:
    """A plain copy of the object at `path` without the nulls in `changes`, and with its integers.

    {"city": "Rome", "days": 3.0, "unit": null}, {("days",): 3, ("unit",): None} -> {"city": "Rome", "days": 3}
    """
    changed: JsonObject = {}
    for key, value in given.items():
        inner = (*path, key)
        is_dropped = inner in changes and changes[inner] is None
        if not is_dropped:
            changed[key] = _changed(value, changes, inner)
    return changed


def _changed(value: Json, changes: Mapping[Path, int | None], path: Path) -> Json:
    """As `_changed_object`, of any value."""
    if path in changes:
        return changes[path]
    if isinstance(value, dict):
        return _changed_object(value, changes, path)
    if isinstance(value, list):
        return [_changed(item, changes, (*path, index)) for index, item in enumerate(value)]
    return value


# ---- what the schema says of each place ------------------------------------------------------------------------------


def _find(
    value: Json, schemas: list[JsonObject], root: JsonObject, path: Path = (), from_arrow: bool = False
) -> Iterator[_Found]:
    """Each float, and each null under a key, of the arguments: of {"a": null, "b": [2.0]} those at a and b.0.

    Args:
        value: what stands at `path`; None is an entry of a list, which Arrow does not fill in.
        schemas: those that are about `value`.
        root: the whole schema, in which `$ref` are looked up.
        from_arrow: whether the object around `value` was a struct of Arrow.
    """
    if isinstance(value, float):
        yield _Found(path, value, from_arrow, schemas, False)
    elif isinstance(value, list):
        about = _about_items(schemas, root)
        for index, item in enumerate(value):
            if not isinstance(item, str | int):
                yield from _find(item, about, root, (*path, index), from_arrow)
    elif isinstance(value, dict):
        from_arrow = isinstance(value, ArrowStruct)
        names_keys = not path or any("properties" in schema for schema in schemas)
        for key, item in value.items():
            if isinstance(item, str | int):  # most are: what is said of them is not asked
                continue
            inner, about = (*path, key), _about_key(schemas, key, root)
            if item is None:
                yield _Found(inner, None, from_arrow, about, names_keys and not about)
            else:
                yield from _find(item, about, root, inner, from_arrow)


def _about_key(schemas: list[JsonObject], key: str, root: JsonObject) -> list[JsonObject]:
    """The schemas that are about a key of an object that `schemas` are about; none where they do not name it.

    [{"properties": {"city": {"type": "string"}}}], "city" -> [{"type": "string"}]
    """
    about: list[Json] = []
    for schema in schemas:
        properties = as_object(schema.get("properties"))
        if key in properties:
            about.append(properties[key])
            continue
        patterns = as_object(schema.get("patternProperties"))
        about += [inner for pattern, inner in patterns.items() if matches(pattern, key)]
        about.append(schema.get("additionalProperties"))
    return _alternatives(about, root)


def _about_items(schemas: list[JsonObject], root: JsonObject) -> list[JsonObject]:
    """The schemas that are about the items of a list that `schemas` are about, whichever item it is."""
    about: list[Json] = []
    for schema in schemas:
        for keyword in ("items", "prefixItems", "additionalItems"):
            rule = schema.get(keyword)
            about += rule if isinstance(rule, list) else [rule]
    return _alternatives(about, root)


def _alternatives(schemas: list[Json], root: JsonObject) -> list[JsonObject]:
    """The schemas, and all that they refer to (`$ref` within `root`) or are made of. A true schema is {}.

    [{"anyOf": [{"type": "string"}, {"type": "null"}]}] -> [{"anyOf": …}, {"type": "null"}, {"type": "string"}]
    """
    found: list[JsonObject] = []
    known: set[int] = set()  # by identity, which is quick and tells more apart: each is in `found`
    waiting = list(schemas)
    while waiting:
        schema = waiting.pop()
        if schema is True:
            schema = {}
        if not isinstance(schema, dict) or id(schema) in known:
            continue
        known.add(id(schema))
        found.append(schema)
        for keyword in _SCHEMA_LISTS:
            waiting += as_list(schema.get(keyword))
        waiting += [schema.get("then"), schema.get("else"), _referred(schema.get("$ref"), root)]
    return found


def _referred(reference: Json, root: JsonObject) -> Json:
    """What a local `$ref` ("#/$defs/Unit") leads to; None where it leads nowhere or outside."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    place: Json = root
    for key in reference[1:].split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if not isinstance(place, dict) or key not in place:
            return None
        place = place[key]
    return place
