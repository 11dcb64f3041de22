"""Whether arguments fit a JSON schema, by the jsonschema library, in a time that a stranger's schema cannot stretch.

A schema without references and patterns is a tree, of which each part looks at a part of the arguments once: it takes
no more steps than the lengths of both, multiplied. The pattern `^(a+)+$` takes 2^n steps of n letters, and 24 `$ref`
that each name the next one twice 2^24 of any value: such a schema, and whatever is long, goes to a process with limits
(bounded.py). Both ask the same library, so that they find the same.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict, cast

import jsonschema
import referencing
from jsonschema.exceptions import ValidationError

from gemma_dist.data.bounded import Bounded, OverLimitError, RefusedError, spend
from gemma_dist.data.schema_plain import is_plainly_valid, plainly_fits
from gemma_dist.data.schema_walk import keywords, subschemas
from gemma_dist.data.shared import of_shared, shared_json
from gemma_dist.data.strict import reason
from gemma_dist.data.types import Json, JsonObject
from gemma_dist.errors import DataError

SECONDS = 2  # of processor time, for one call's arguments; what is no trap takes milliseconds
ROW_SECONDS = 10  # for all schemas and calls of a row
NUM_BYTES = 2**30
MAX_STEPS = 10_000_000  # characters of schema and arguments, multiplied: what is checked without a process of its own
MAX_ARGUMENTS, MAX_SMALL_CHARACTERS = 50, 5_000  # of a call and its schema that are compared without a clock
MAX_SCHEMA_CHARACTERS = 20_000  # of a schema that is itself checked so: `uniqueItems` of 500 entries

_UNBOUNDED = keywords("pattern patternProperties $ref $dynamicRef $recursiveRef unevaluatedProperties unevaluatedItems")

# How jsonschema checks one keyword: by validator, rule, value and schema.
Check: TypeAlias = Callable[[object, Json, Json, JsonObject], Iterable[Exception]]


@dataclass(frozen=True)
class Misfit:
    """One thing that does not fit: where, from the arguments down, and which keys `required` says are missing."""

    path: tuple[str | int, ...]
    required: list[str]  # of an object that lacks one of them; else empty


class _SaidMisfit(TypedDict):
    """A `Misfit` as JSON carries it."""

    path: list[str | int]
    required: list[str]


def require_valid(schema: JsonObject) -> None:
    """DataError where a schema is none of its dialect."""
    if _is_plain(schema):
        return
    schema_json = json.dumps(schema)
    if len(schema_json) <= MAX_SCHEMA_CHARACTERS:
        _here("require_valid", schema_json)
    else:
        _elsewhere("require_valid", schema_json)


def find_misfit(arguments: Mapping[str, Json], parameters: JsonObject | None) -> str | None:
    """Where and why `arguments` do not fit the JSON schema of a tool's parameters; None if they do, or there is none.

    Raises:
        DataError: the schema is invalid or cannot be applied to these arguments, at all or in the time that it has.
    """
    if not parameters or _fits_at_a_glance(arguments, parameters):
        return None
    return cast(str | None, _apply("best_misfit", arguments, parameters))


def find_misfits(arguments: Mapping[str, Json], parameters: JsonObject | None) -> list[Misfit]:
    """As `find_misfit`, but everything that does not fit, also what does not fit one schema of an `anyOf`."""
    said = _apply("all_misfits", arguments, parameters) if parameters else []
    return [Misfit(tuple(misfit["path"]), misfit["required"]) for misfit in said]


@functools.lru_cache(maxsize=4096)
def matches(pattern: str, key: str) -> bool:
    """Whether a pattern of `patternProperties` names a key; a broken one names none. DataError where it takes too
    long."""
    return bool(_elsewhere("is_match", pattern, key))


def _fits_at_a_glance(arguments: Mapping[str, Json], schema: JsonObject) -> bool:
    """Whether a few arguments without parts fit a small schema that is plainly valid, as those of most calls do."""
    if len(arguments) > MAX_ARGUMENTS or any(isinstance(value, dict | list) for value in arguments.values()):
        return False
    return _is_small_and_plain(schema) and plainly_fits(dict(arguments), schema)


@of_shared
def _is_small_and_plain(schema: JsonObject) -> bool:
    return _is_plain(schema) and len(shared_json(schema)) <= MAX_SMALL_CHARACTERS


_is_plain = of_shared(is_plainly_valid)


# ---- here, or where it can be stopped --------------------------------------------------------------------------------


def _apply(function: str, arguments: Mapping[str, Json], schema: JsonObject) -> Any:
    """What a function of the table below finds, in this process if that is sure to end soon."""
    schema_json = shared_json(schema)
    size = len(json.dumps(arguments))
    is_short = len(schema_json) <= MAX_SCHEMA_CHARACTERS and max(len(schema_json), size) * size <= MAX_STEPS
    if is_short and _is_tree(schema_json):
        return _here(function, schema_json, arguments)
    return _elsewhere(function, schema_json, arguments)


@functools.lru_cache(maxsize=4096)
def _is_tree(schema_json: str) -> bool:
    """Whether a schema has no references and no patterns. One that names its dialect is only looked at for the words:
    its keywords may be others."""
    if not any(f'"{word}"' in schema_json for word in _UNBOUNDED):
        return True
    return '"$schema"' not in schema_json and _is_tree_within(json.loads(schema_json))


def _is_tree_within(schema: JsonObject) -> bool:
    return not schema.keys() & _UNBOUNDED and all(map(_is_tree_within, subschemas(schema)))


def _here(function: str, *args: object) -> Any:
    start = time.thread_time()
    found = run(function, *args)
    try:
        spend(time.thread_time() - start)
    except OverLimitError as error:
        raise _too_much(error) from None
    return found


def _elsewhere(function: str, *args: object) -> Any:
    try:
        return _bounded()(function, *args)
    except OverLimitError as error:
        raise _too_much(error) from None
    except RefusedError as error:
        raise DataError(str(error)) from None


def _too_much(error: OverLimitError) -> DataError:
    return DataError(f"the tool's schema cannot be applied: {error}; make its patterns and references simpler")


@functools.cache
def _bounded() -> Bounded:
    return Bounded("gemma_dist.data.schema_fit:run", seconds=SECONDS, num_bytes=NUM_BYTES)


def run(function: str, *args: Any) -> Any:
    """Call a function of this file, which gives what JSON can say."""
    functions: dict[str, Callable[..., Any]] = {
        "require_valid": _require_valid,
        "best_misfit": _best_misfit,
        "all_misfits": _all_misfits,
        "is_match": _is_match,
    }
    return functions[function](*args)


# ---- what jsonschema says --------------------------------------------------------------------------------------------


def _require_valid(schema_json: str) -> None:
    if _plain(schema_json) is None:
        _validator(schema_json)


@functools.lru_cache(maxsize=4096)
def _plain(schema_json: str) -> JsonObject | None:
    """The schema where it is plainly valid."""
    schema: JsonObject = json.loads(schema_json)
    return schema if is_plainly_valid(schema) else None


def _best_misfit(schema_json: str, arguments: Mapping[str, Json]) -> str | None:
    plain = _plain(schema_json)
    if plain is not None and plainly_fits(dict(arguments), plain):
        return None
    error = jsonschema.exceptions.best_match(_errors(schema_json, arguments))
    if error is None:
        return None
    place = ".".join(map(str, error.absolute_path)) or "as a whole"
    return f"{place}: {re.sub(r'^None ', 'null ', reason(error))}"


def _all_misfits(schema_json: str, arguments: Mapping[str, Json]) -> list[_SaidMisfit]:
    return [
        {
            "path": list(error.absolute_path),
            "required": list(cast(list[str], error.validator_value)) if error.validator == "required" else [],
        }
        for error in _with_inner(_errors(schema_json, arguments))
    ]


def _with_inner(errors: Iterable[ValidationError]) -> Iterator[ValidationError]:
    """Also those within an `anyOf`, of which each says what one of its schemas finds amiss."""
    for error in errors:
        yield error
        yield from _with_inner(error.context or [])


def _is_match(pattern: str, key: str) -> bool:
    try:
        return re.search(pattern, key) is not None
    except re.error:  # said where the schema is applied
        return False


def _errors(schema_json: str, arguments: Mapping[str, Json]) -> list[ValidationError]:
    validator = _validator(schema_json)
    try:
        return list(validator.iter_errors(arguments))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as broken:  # a $ref that leads nowhere, a pattern that is no regular expression; or endless
        # recursion, which may end in a panic of jsonschema's Rust: that is no Exception
        raise DataError(
            f"the tool's schema cannot be applied: {reason(broken)}; fix the schema (no remote $ref)"
        ) from None


@functools.lru_cache(maxsize=1024)
def _validator(schema_json: str) -> jsonschema.protocols.Validator:
    """A validator of the schema in its own dialect, by default 2020-12. It fetches nothing that a $ref names."""
    schema = json.loads(schema_json)
    try:
        dialect = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        if not is_plainly_valid(schema):
            dialect.check_schema(schema)
        return _nullable(dialect)(schema, registry=referencing.Registry())
    except MemoryError:
        raise
    except Exception as error:  # whatever trips the validator's own reading of a schema is a fault of the schema
        place = ".".join(map(str, getattr(error, "absolute_path", ())))  # within the schema
        why = f"{place}: {reason(error)}" if place else reason(error)
        raise DataError(f"parameters are no valid JSON schema: {why}; fix the schema") from None


@functools.cache
def _nullable(dialect: type[jsonschema.protocols.Validator]) -> type[jsonschema.protocols.Validator]:
    """The dialect with OpenAPI's `nullable: true`, which Gemma's template shows to the model."""

    def unless_null(keyword: str) -> Check:
        """The check of a keyword, which null passes beside `nullable: true`."""
        check = dialect.VALIDATORS[keyword]

        def checked(validator: object, rule: Json, value: Json, schema: JsonObject) -> Iterable[Exception]:
            if value is None and schema.get("nullable") is True:
                return ()
            return check(validator, rule, value, schema) or ()

        return checked

    # Whatever may say what a value is; as OpenAPI's generators write an optional reference, beside anyOf or allOf.
    saying = ("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref")
    known = [keyword for keyword in saying if keyword in dialect.VALIDATORS]  # older dialects lack some
    checks = {keyword: unless_null(keyword) for keyword in known}
    return jsonschema.validators.extend(dialect, checks | {"uniqueItems": _check_unique})


def _check_unique(validator: Any, rule: Json, value: Json, schema: JsonObject) -> Iterator[ValidationError]:
    """`uniqueItems` in one look at each item; the library compares each with all others where they are objects."""
    if rule and isinstance(value, list) and len(set(map(_as_json, value))) < len(value):
        yield ValidationError(f"{value!r} has non-unique elements")


def _as_json(value: Json) -> str:
    """One text for all that JSON schema calls equal: 1 and 1.0, but not true; objects in any order."""
    whole = json.loads(
        json.dumps(value),
        parse_float=lambda digits: int(float(digits)) if float(digits).is_integer() else float(digits),
    )
    return json.dumps(whole, sort_keys=True)
