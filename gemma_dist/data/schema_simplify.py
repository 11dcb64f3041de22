"""A JSON schema in the spelling that Gemma's template can show, where an equal one exists.

    {"type": ["string", "null"]}                                {"type": "string", "nullable": true}
    {"anyOf": [{"type": "integer"}, {"type": "null"}]}          {"type": "integer", "nullable": true}
    {"allOf": [{"type": "string"}], "title": "Name"}            {"type": "string", "title": "Name"}
    {"const": "a"}                                              {"type": "string", "enum": ["a"]}
    {"oneOf": [{"const": "a"}, {"enum": ["b", "c"]}]}           {"type": "string", "enum": ["a", "b", "c"]}
    {"type": ["string", "integer"]}                             {"anyOf": [{"type": "string"}, {"type": "integer"}]}
    {"$ref": "#/$defs/City"}                                    what it names (schema_inline.py)
    {"type": "object", "additionalProperties": {…}}             the same with "properties": {}

Each takes the same arguments as before, with `nullable` as `schema.py` reads it: a server may declare either. What has
no such spelling stays, and `schema_show.py` puts it into words.
"""

from contextlib import suppress
from typing import cast

from gemma_dist.data.schema_inline import OTHERS_ON_NULL, SAYING, TooLargeError, inline_refs, merge, rejects_null
from gemma_dist.data.schema_walk import CONSTRAINTS, keywords, map_subschemas
from gemma_dist.data.strict import as_list, is_list_of, without
from gemma_dist.data.types import Json, JsonObject

MAX_ROUNDS = 5  # what one step makes may be what another one can make simpler
# What schemas that take null alone say.
_NULLS: tuple[JsonObject, ...] = ({"type": "null"}, {"const": None}, {"enum": [None]})
_MAY_REFUSE_NULL = SAYING | OTHERS_ON_NULL
_CHOICES = ("anyOf", "oneOf")
# What the template shows of an object itself; it takes every other key for a property where `properties` is absent.
SHOWN_OF_OBJECT = keywords("description type properties required nullable")


def simplify(parameters: JsonObject) -> JsonObject:
    """The parameters of a tool in the template's spelling; they take the same arguments."""
    simple = parameters
    for _ in range(MAX_ROUNDS):
        before = simple
        with suppress(TooLargeError, RecursionError):  # or a chain of a thousand definitions
            simple = inline_refs(before)
        simple = {"type": "object", **_simplify(simple)}
        if simple == before:
            break
    return simple


def _simplify(schema: JsonObject) -> JsonObject:
    """One round of all steps, of the schemas within first. Each step gives the schema, or an equal one."""
    simple = map_subschemas(schema, _simplify)
    for step in (_merge_only_one, _split_type_list, _take_out_null, _merge_enums, _merge_only_one, _as_enum, _close):
        simple = step(simple)
    return simple


def _branches(schema: JsonObject, keyword: str) -> list[JsonObject]:
    """The schemas of anyOf, oneOf or allOf; none where one of them is true or false, which has no keywords."""
    given = schema.get(keyword)
    return cast(list[JsonObject], given) if is_list_of(given, dict) else []


def _said(schema: JsonObject) -> JsonObject:
    """What a schema says of values: {"type": "null"} of {"type": "null", "title": "Nothing"}."""
    return {key: value for key, value in schema.items() if key in CONSTRAINTS}


# ---- allOf, and lists of types ---------------------------------------------------------------------------------------


def _merge_only_one(schema: JsonObject) -> JsonObject:
    """allOf as one schema, and anyOf or oneOf with a single choice.

    {"allOf": [{"type": "string"}, {"minLength": 2}]} -> {"type": "string", "minLength": 2}
    """
    for keyword in ("allOf", *_CHOICES):
        branches = _branches(schema, keyword)
        all_hold = keyword == "allOf" or len(branches) == 1
        if branches and all_hold:
            merged = _merge_all(without(schema, keyword), branches)
            schema = schema if merged is None else merged
    return schema


def _merge_all(schema: JsonObject, branches: list[JsonObject]) -> JsonObject | None:
    """One schema that says what all of these say; None where `merge` knows none."""
    merged: JsonObject | None = schema
    for branch in branches:
        merged = None if merged is None else merge(merged, branch)
    return merged


def _split_type_list(schema: JsonObject) -> JsonObject:
    """A list of types as anyOf, which the template does not print as a list of Python.

    {"type": ["string", "null"]}                    ->  {"type": "string", "nullable": true}
    {"type": ["string", "integer"]}                 ->  {"anyOf": [{"type": "string"}, {"type": "integer"}]}
    {"type": ["string", "integer"], "anyOf": […]}   ->  {"anyOf": […], "allOf": [{"anyOf": [the two types]}]}
    """
    types = schema.get("type")
    if not isinstance(types, list):
        return schema
    rest = without(schema, "type")
    others = [name for name in types if name != "null"]
    is_read_with_null = rest.keys() & _MAY_REFUSE_NULL <= {"enum"}
    if len(types) == 1:
        return rest | {"type": types[0]}
    if len(types) == 2 and len(others) == 1 and is_read_with_null:
        return _with_nullable(rest | {"type": others[0]})
    choices: list[Json] = [{"type": name} for name in types]
    if schema.get("nullable") is True and "null" not in types:
        choices.append({"type": "null"})
    if "anyOf" not in rest:
        return rest | {"anyOf": choices}
    return rest | {"allOf": [*as_list(rest.get("allOf")), {"anyOf": choices}]}


def _with_nullable(schema: JsonObject) -> JsonObject:
    """The schema with `nullable`, unless its enum leaves null out: {"type": ["string", "null"], "enum": ["a"]}."""
    values = schema.get("enum")
    leaves_null_out = isinstance(values, list) and None not in values
    return schema if leaves_null_out else schema | {"nullable": True}


# ---- null as a choice ------------------------------------------------------------------------------------------------


def _take_out_null(schema: JsonObject) -> JsonObject:
    """The choice of null, in anyOf, oneOf or enum, as `nullable`.

    {"enum": ["a", "b", null]} -> {"enum": ["a", "b"], "nullable": true}
    """
    for keyword in _CHOICES:
        schema = _null_branch_out(schema, keyword)
    values = as_list(schema.get("enum"))
    if None not in values or len(values) == 1:
        return schema
    others: list[Json] = [value for value in values if value is not None]
    rest = without(schema, "enum")
    if schema.get("nullable") is True or rejects_null(rest):
        return schema | {"enum": others}
    if not rest.keys() & _MAY_REFUSE_NULL:
        return schema | {"enum": others, "nullable": True}
    return schema


def _null_branch_out(schema: JsonObject, keyword: str) -> JsonObject:
    """The schema without the branch that takes null, and with `nullable`; as it is, where that would not be equal.

    {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}]}
        ->  {"anyOf": [{"type": "string"}, {"type": "integer"}], "nullable": true}
    {"anyOf": [{"type": "string", "minLength": 1}, {"type": "null"}]}
        ->  {"type": "string", "minLength": 1, "nullable": true}
    """
    branches = _branches(schema, keyword)
    others = [branch for branch in branches if _said(branch) not in _NULLS]
    num_nulls = len(branches) - len(others)
    if not num_nulls or not others:
        return schema
    is_taken_twice = num_nulls > 1 or not all(map(rejects_null, others))
    if keyword == "oneOf" and is_taken_twice:  # so null does not fit
        return schema
    rest = without(schema, keyword)
    several = rest | {keyword: cast(list[Json], others)}
    if rest.get("nullable") is not True and rest.keys() & _MAY_REFUSE_NULL:
        return several if rejects_null(rest) else schema
    several |= {"nullable": True}
    if len(others) > 1:
        return several
    (only,) = others
    if only.keys() & OTHERS_ON_NULL:
        return schema
    return merge(rest | {"nullable": True}, without(only, "nullable")) or several


# ---- strings to choose from ------------------------------------------------------------------------------------------


def _merge_enums(schema: JsonObject) -> JsonObject:
    """anyOf or oneOf of strings to choose from, as one enum; what they say of themselves goes into the description.

    {"oneOf": [{"const": "C", "description": "Celsius"}, {"const": "F"}]}
        ->  {"type": "string", "enum": ["C", "F"], "description": "C: Celsius"}
    """
    for keyword in _CHOICES:
        branches = _branches(schema, keyword)
        strings = _strings_of_all(branches)
        unique: list[Json] = list(dict.fromkeys(strings))
        fits_twice = len(unique) < len(strings)  # what oneOf refuses
        if not strings or (keyword == "oneOf" and fits_twice):
            continue
        merged = merge(without(schema, keyword), {"type": "string", "enum": unique})
        if merged is not None:
            schema = _with_words(merged, schema, _words_of_choices(branches))
    return schema


def _with_words(merged: JsonObject, schema: JsonObject, words: str) -> JsonObject:
    """The merged schema with words behind the description that the schema had."""
    if not words:
        return merged
    given = str(schema.get("description") or "")
    return merged | {"description": f"{given} {words}" if given else words}


def _strings_of_all(branches: list[JsonObject]) -> list[str]:
    """The strings that the branches take, in order; none where one of them takes anything else."""
    strings: list[str] = []
    for branch in branches:
        found = _strings(branch)
        if not found:
            return []
        strings += found
    return strings


def _strings(schema: JsonObject) -> list[str]:
    """The strings that a schema takes, where it takes these alone and says nothing else.

    {"const": "a"} -> ["a"], {"type": "string", "enum": ["b", "c"]} -> ["b", "c"], {"type": "string"} -> []
    """
    said = _said(schema)
    if said.pop("type", "string") != "string" or len(said) != 1:
        return []
    values = said.get("enum", [said.get("const")])
    return cast(list[str], values) if is_list_of(values, str) else []


def _words_of_choices(branches: list[JsonObject]) -> str:
    """What choices of one string each say of themselves: "a: The first; b: The second"."""
    words = []
    for branch in branches:
        strings, description = _strings(branch), branch.get("description")
        is_described = isinstance(description, str) and description != ""
        if len(strings) == 1 and is_described:
            words.append(f"{strings[0]}: {description}")
    return "; ".join(words)


def _as_enum(schema: JsonObject) -> JsonObject:
    """A constant string as an enum of one; strings to choose from with their type, without which none is shown.

    {"const": "a"} -> {"type": "string", "enum": ["a"]}
    """
    if isinstance(schema.get("const"), str) and "enum" not in schema:
        schema = without(schema, "const") | {"enum": [schema["const"]]}
    if "type" not in schema and is_list_of(schema.get("enum"), str):
        return {"type": "string"} | schema
    return schema


# ---- objects ---------------------------------------------------------------------------------------------------------


def _close(schema: JsonObject) -> JsonObject:
    """An object with `properties`, if none: without them the template shows its other keywords as properties.

    {"type": "object", "minProperties": 1} -> {"type": "object", "minProperties": 1, "properties": {}}
    """
    if schema.get("type") != "object" or "properties" in schema:
        return schema
    extra = schema.keys() - SHOWN_OF_OBJECT
    own_words = any(isinstance(schema[key], dict) and key not in CONSTRAINTS for key in extra)
    return schema | {"properties": {}} if extra and not own_words else schema
