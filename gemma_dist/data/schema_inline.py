"""`$ref` of a JSON schema in its own `$defs`, replaced by what it names; and schemas that hold at once, as one.

    {"$defs": {"City": {"type": "string"}}, "properties": {"city": {"$ref": "#/$defs/City", "title": "City"}}}
                                            {"properties": {"city": {"type": "string", "title": "City"}}}

What comes out takes the same values as what went in. A `$ref` that refers back to itself, or beside which something
stands that cannot be put together with what it names, stays.
"""

import json
from urllib.parse import unquote

from gemma_dist.data.schema_walk import CONSTRAINTS, DEFINITIONS, keywords, map_subschemas, subschemas
from gemma_dist.data.strict import get
from gemma_dist.data.types import Json, JsonObject

MAX_SCHEMAS = 2000  # in what is inlined: a few definitions that name one another twice each grow without bounds
MAX_LEVELS = 8

REFERENCES = frozenset({"$ref", "$dynamicRef", "$recursiveRef"})
# Keywords that read one another, so that they cannot be taken from two schemas.
_OBJECT_FAMILY = keywords("properties patternProperties additionalProperties")
_ARRAY_FAMILY = keywords("items prefixItems additionalItems contains minContains maxContains")
_IF_FAMILY = keywords("if then else")
_NEVER_MERGED = keywords("unevaluatedProperties unevaluatedItems $dynamicRef $recursiveRef $id $anchor")
# Keywords that may refuse null; the first lot lets it pass beside `nullable: true` (schema.py).
SAYING = keywords("type enum const anyOf oneOf allOf $ref")
OTHERS_ON_NULL = keywords("not if then else $dynamicRef $recursiveRef")


class TooLargeError(Exception):
    """What is inlined would have more than MAX_SCHEMAS schemas, or MAX_LEVELS references in one another."""


def inline_refs(schema: JsonObject) -> JsonObject:
    """The schema with each local `$ref` replaced by what it names, and without definitions that no one names then.

    Raises:
        TooLargeError: the result would be too large.
    """
    body = {key: value for key, value in schema.items() if key not in DEFINITIONS}
    num_schemas = 0

    def inline(one: JsonObject, depth: int) -> JsonObject:
        nonlocal num_schemas
        num_schemas += 1
        if num_schemas > MAX_SCHEMAS or depth > MAX_LEVELS:
            raise TooLargeError
        if "$id" in one and one is not body:  # references in it start there
            return one
        merged = _merge_named(one, schema)
        if merged is not None:
            return inline(merged, depth + 1)
        return map_subschemas(one, lambda subschema: inline(subschema, depth))

    inlined = inline(body, 0)
    if not holds_ref(inlined):
        return inlined
    return inlined | {key: schema[key] for key in schema if key in DEFINITIONS}


def _merge_named(one: JsonObject, root: JsonObject) -> JsonObject | None:
    """A schema as one with that which its `$ref` names; None where there is none, or it stays."""
    named = _find(root, one.get("$ref"))
    if named is None or _leads_to(str(one["$ref"]), named, root, set()):
        return None
    outer = {key: value for key, value in one.items() if key != "$ref"}
    if not _reads_beside_refs(root) and not _says_nothing(outer):
        return None
    return merge(outer, named)


def _leads_to(name: str, schema: JsonObject, root: JsonObject, seen: set[str]) -> bool:
    """Whether a schema refers to `name`, by itself or by what it refers to."""
    reference = schema.get("$ref")
    if reference == name:
        return True
    named = _find(root, reference)
    if named is not None and str(reference) not in seen:
        seen.add(str(reference))
        if _leads_to(name, named, root, seen):
            return True
    return any(_leads_to(name, subschema, root, seen) for subschema in subschemas(schema))


def holds_ref(schema: JsonObject) -> bool:
    """Whether a schema, or one inside of it, refers to another."""
    return bool(schema.keys() & REFERENCES) or any(map(holds_ref, subschemas(schema)))


def _find(root: JsonObject, name: Json) -> JsonObject | None:
    """The schema that a local reference names; None where it is elsewhere or not there."""
    if not isinstance(name, str) or not name.startswith("#/"):
        return None
    found: Json = root
    for part in unquote(name[2:]).split("/"):
        found = get(found, part.replace("~1", "/").replace("~0", "~"))
    return found if isinstance(found, dict) and "$id" not in found else None


def _reads_beside_refs(root: JsonObject) -> bool:
    """Whether what stands beside a `$ref` counts: it does not before draft 2019-09."""
    return "draft-0" not in str(root.get("$schema"))


def _says_nothing(schema: JsonObject) -> bool:
    """Whether a schema takes any value."""
    return not schema.keys() & CONSTRAINTS


def rejects_null(schema: JsonObject) -> bool:
    """Whether it is certain that null does not fit."""
    if schema.get("nullable") is True:
        return False
    given, values = schema.get("type"), schema.get("enum")
    if isinstance(given, str):
        return given != "null"
    return (isinstance(values, list) and None not in values) or schema.get("const") is not None


def merge(outer: JsonObject, inner: JsonObject) -> JsonObject | None:
    """One schema that takes what both take, with the annotations of `outer`; None where that is not certain."""
    if (outer.keys() | inner.keys()) & _NEVER_MERGED:
        return None
    if ("$ref" in outer and not _says_nothing(inner)) or ("$ref" in inner and not _says_nothing(outer)):
        return None  # early drafts do not read what stands beside a $ref
    if outer.get("nullable") is True and inner.keys() & OTHERS_ON_NULL:
        return None
    if inner.get("nullable") is True and outer.keys() & (SAYING | OTHERS_ON_NULL):
        return None
    for family in (_OBJECT_FAMILY, _ARRAY_FAMILY, _IF_FAMILY):
        of_both = (outer.keys() & family, inner.keys() & family)
        if all(of_both) and of_both != ({"properties"}, {"properties"}):
            return None
    merged = inner | outer
    for key in outer.keys() & inner.keys() & CONSTRAINTS:
        both = _both(key, outer[key], inner[key])
        if both is None:
            return None
        merged[key] = both
    return merged


def _both(key: str, outer: Json, inner: Json) -> Json:
    """The value of a keyword that says what two of its values say together; None where there is none."""
    if key == "required" and isinstance(outer, list) and isinstance(inner, list):
        return [*inner, *(name for name in outer if name not in inner)]
    if key == "properties" and isinstance(outer, dict) and isinstance(inner, dict):
        if all(_same(outer[name], inner[name]) for name in outer.keys() & inner.keys()):
            return inner | outer
        return None
    return outer if _same(outer, inner) else None


def _same(one: Json, other: Json) -> bool:
    """Equal as JSON, where 1 is not true."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
