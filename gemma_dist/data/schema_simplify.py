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

from gemma_dist.data.schema_inline import OTHERS_ON_NULL, SAYING, TooLargeError, inline_refs, merge, rejects_null
from gemma_dist.data.schema_walk import CONSTRAINTS, keywords, map_subschemas
from gemma_dist.data.types import Json, JsonObject

MAX_ROUNDS = 5  # what one step makes may be what another one can make simpler
_NULLS: tuple[JsonObject, ...] = ({"type": "null"}, {"const": None}, {"enum": [None]})
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
    simple = map_subschemas(schema, _simplify)
    for step in (_merge_only_one, _split_type_list, _take_out_null, _merge_enums, _merge_only_one, _as_enum, _close):
        simple = step(simple)
    return simple


def _without(schema: JsonObject, *keys: str) -> JsonObject:
    return {key: value for key, value in schema.items() if key not in keys}


def _branches(schema: JsonObject, keyword: str) -> list[JsonObject] | None:
    """The schemas of anyOf, oneOf or allOf; None where it has none, or one that is true or false."""
    given = schema.get(keyword)
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        return None
    return [one for one in given if isinstance(one, dict)]


def _merge_only_one(schema: JsonObject) -> JsonObject:
    """allOf as one schema, and anyOf or oneOf with a single choice."""
    for keyword in ("allOf", "anyOf", "oneOf"):
        branches = _branches(schema, keyword)
        if not branches or (keyword != "allOf" and len(branches) > 1):
            continue
        merged: JsonObject | None = _without(schema, keyword)
        for branch in branches:
            merged = None if merged is None else merge(merged, branch)
        if merged is not None:
            schema = merged
    return schema


def _split_type_list(schema: JsonObject) -> JsonObject:
    """A list of types as anyOf, which the template does not print as a list of Python."""
    types = schema.get("type")
    if not isinstance(types, list):
        return schema
    rest = _without(schema, "type")
    if len(types) == 1:
        return rest | {"type": types[0]}
    said, values = rest.keys() & (SAYING | OTHERS_ON_NULL), rest.get("enum")
    if len(types) == 2 and "null" in types and said <= {"enum"}:
        (only,) = (name for name in types if name != "null")
        takes_null = rest.get("nullable") is True or not isinstance(values, list) or None in values
        return rest | {"type": only} | ({"nullable": True} if takes_null else {})
    choices: list[Json] = [{"type": name} for name in types]
    if schema.get("nullable") is True and "null" not in types:
        choices.append({"type": "null"})
    if "anyOf" not in rest:
        return rest | {"anyOf": choices}
    others = rest.get("allOf")
    return rest | {"allOf": [*(others if isinstance(others, list) else []), {"anyOf": choices}]}


def _take_out_null(schema: JsonObject) -> JsonObject:
    """The choice of null, in anyOf, oneOf or enum, as `nullable`."""
    for keyword in ("anyOf", "oneOf"):
        branches = _branches(schema, keyword)
        if branches:
            schema = _null_branch_out(schema, keyword, branches)
    values = schema.get("enum")
    if isinstance(values, list) and None in values and len(values) > 1:
        others: list[Json] = [value for value in values if value is not None]
        rest = _without(schema, "enum")
        if schema.get("nullable") is True or rejects_null(rest):
            return schema | {"enum": others}
        if not rest.keys() & (SAYING | OTHERS_ON_NULL):
            return schema | {"enum": others, "nullable": True}
    return schema


def _null_branch_out(schema: JsonObject, keyword: str, branches: list[JsonObject]) -> JsonObject:
    others: list[Json] = []
    takes_null_elsewhere = False
    for branch in branches:
        if {key: value for key, value in branch.items() if key in CONSTRAINTS} in _NULLS:
            continue
        others.append(branch)
        takes_null_elsewhere |= not rejects_null(branch)
    rest = _without(schema, keyword)
    is_one = keyword == "oneOf" and (takes_null_elsewhere or len(branches) - len(others) > 1)
    if len(others) == len(branches) or not others or is_one:
        return schema
    if rest.get("nullable") is not True and rest.keys() & (SAYING | OTHERS_ON_NULL):
        if rejects_null(rest):
            return rest | {keyword: others}
        return schema
    (only, *more) = others
    if more or not isinstance(only, dict):
        return rest | {keyword: others, "nullable": True}
    if only.keys() & OTHERS_ON_NULL:
        return schema
    return merge(rest | {"nullable": True}, _without(only, "nullable")) or rest | {keyword: others, "nullable": True}


def _merge_enums(schema: JsonObject) -> JsonObject:
    """anyOf or oneOf of strings to choose from, as one enum."""
    for keyword in ("anyOf", "oneOf"):
        branches = _branches(schema, keyword)
        if not branches:
            continue
        strings: list[Json] = []
        for branch in branches:
            strings += _strings(branch) or [None]
        if None in strings or (keyword == "oneOf" and len(set(map(str, strings))) < len(strings)):
            continue
        unique: list[Json] = list(dict.fromkeys(map(str, strings)))
        merged = merge(_without(schema, keyword), {"type": "string", "enum": unique})
        if merged is not None:
            words = _words_of_choices(branches)
            described = " ".join(filter(None, [str(schema.get("description") or ""), words]))
            schema = merged | ({"description": described} if words else {})
    return schema


def _strings(schema: JsonObject) -> list[Json] | None:
    """The strings that a schema takes, where it takes these alone and says nothing else."""
    said = {key: value for key, value in schema.items() if key in CONSTRAINTS}
    if said.pop("type", "string") != "string" or len(said) != 1:
        return None
    values = said["enum"] if "enum" in said else [said.get("const")]
    is_list = isinstance(values, list) and all(isinstance(value, str) for value in values)
    return values if is_list and isinstance(values, list) else None


def _words_of_choices(branches: list[JsonObject]) -> str:
    """What choices of one string each say of themselves: "a: The first; b: The second"."""
    words = []
    for branch in branches:
        strings, description = _strings(branch), branch.get("description")
        if strings and len(strings) == 1 and isinstance(description, str) and description:
            words.append(f"{strings[0]}: {description}")
    return "; ".join(words)


def _as_enum(schema: JsonObject) -> JsonObject:
    """A constant string as an enum of one; strings to choose from with their type, without which none is shown."""
    if isinstance(schema.get("const"), str) and "enum" not in schema:
        schema = _without(schema, "const") | {"enum": [schema["const"]]}
    values = schema.get("enum")
    if "type" not in schema and isinstance(values, list) and all(isinstance(value, str) for value in values):
        return {"type": "string"} | schema
    return schema


def _close(schema: JsonObject) -> JsonObject:
    """An object with `properties`, if none: without them the template shows its other keywords as properties."""
    if schema.get("type") != "object" or "properties" in schema:
        return schema
    extra = schema.keys() - SHOWN_OF_OBJECT
    own_words = any(isinstance(schema[key], dict) and key not in CONSTRAINTS for key in extra)
    return schema | {"properties": {}} if extra and not own_words else schema
