"""Where schemas stand inside of a JSON schema, for those that change or describe every one of them.

    {"type": "object", "properties": {"a": {…}}, "anyOf": [{…}, {…}], "items": {…}, "default": {…}}
                                            ^              ^    ^            ^       no schema: a value

Nothing here looks at values (`enum`, `const`, `default`, `examples`), and a property may have any name.
"""

from collections.abc import Callable
from typing import TypeAlias

from gemma_dist.data.strict import error_context
from gemma_dist.data.types import Json, JsonObject


def keywords(words: str) -> frozenset[str]:
    """The words, which have blanks between them."""
    return frozenset(words.split())


# Keywords whose value is a schema, a list of schemas, an object with a schema for each name.
ONE = keywords(
    "items additionalItems additionalProperties unevaluatedItems unevaluatedProperties contains propertyNames "
    "not if then else"
)
SEVERAL = keywords("allOf anyOf oneOf prefixItems items")
NAMED = keywords("properties patternProperties $defs definitions dependentSchemas dependencies")

# Keywords that say which values are right, besides those above.
ASSERTIONS = keywords(
    "type enum const $ref $dynamicRef $recursiveRef minimum maximum exclusiveMinimum exclusiveMaximum multipleOf "
    "minLength maxLength pattern format minItems maxItems uniqueItems minContains maxContains minProperties "
    "maxProperties required dependentRequired nullable"
)
DEFINITIONS = frozenset({"$defs", "definitions"})
CONSTRAINTS = (ASSERTIONS | ONE | SEVERAL | NAMED) - DEFINITIONS

Change: TypeAlias = Callable[[JsonObject], JsonObject]


def map_subschemas(schema: JsonObject, change: Change) -> JsonObject:
    """A copy of a schema with `change` applied to each schema right inside of it; errors name the place."""
    changed: JsonObject = {}
    for keyword, value in schema.items():
        if isinstance(value, dict) and keyword in NAMED:
            changed[keyword] = {name: _changed(item, change, name) for name, item in value.items()}
        elif isinstance(value, list) and keyword in SEVERAL:
            changed[keyword] = [_changed(item, change, keyword) for item in value]
        elif keyword in ONE:
            changed[keyword] = _changed(value, change, keyword)
        else:
            changed[keyword] = value
    return changed


def _changed(value: Json, change: Change, place: str) -> Json:
    """A schema with `change` applied; `place` is how errors name it, such as "city" or "items"."""
    if not isinstance(value, dict):  # true, false, or what the validator refuses
        return value
    with error_context(place):
        return change(value)


def subschemas(schema: JsonObject) -> list[JsonObject]:
    """The schemas right inside of a schema."""
    found: list[JsonObject] = []

    def remember(subschema: JsonObject) -> JsonObject:
        found.append(subschema)
        return subschema

    map_subschemas(schema, remember)
    return found
