"""What Gemma's template shows to the model of a tool's declaration, and what it does not.

Of a parameter it shows `description`, `type`, `nullable`, the `enum` of a string, the `items` of an array (with all
their keywords), the `properties` and `required` of an object. The rest vanishes, but for these, which come out wrong:

    {"type": ["string", "null"]}                        type:<|"|>['STRING', 'NULL']<|"|>
    {"type": "object", "additionalProperties": {…}}     properties:{additionalProperties:{type:…}}, a parameter
    "response": {"type": "string"} of a function        response:{ is never closed

The report names each such tool once. `schemas: simplify` writes its schema in an equal spelling that is shown
(schema_simplify.py), and puts what has none into the description: "How many. (one of 1, 2, 3; default: 2)". So nothing
about which arguments are right changes: the integers of an enum stay integers, as calls carry them.
"""

import functools
import json
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from gemma_dist.data.schema_inline import REFERENCES, holds_ref
from gemma_dist.data.schema_simplify import SHOWN_OF_OBJECT, simplify
from gemma_dist.data.schema_walk import CONSTRAINTS, DEFINITIONS
from gemma_dist.data.strict import get
from gemma_dist.data.types import Json, JsonObject, Tool
from gemma_dist.errors import setting

NUM_SHOWN = 3  # of what one note lists
REWRITTEN = "schemas of tools were written in the spelling that the chat template shows"
# Keywords that tell a model something, besides those that say which values are right.
_TELLING = frozenset({"default", "examples", "example"})
_SHOWN_OF_PARAMETERS = frozenset({"type", "properties", "required"})
_SHOWN_ANYWHERE = frozenset({"description", "type", "nullable"})


def show_tools(tools: list[Tool], schemas: Literal["as_given", "simplify"], notes: Counter[str]) -> list[Tool]:
    """The declarations as they are rendered, stored and served; `notes` say what of them the template does not show."""
    return [_show_tool(tool, schemas, notes) for tool in tools]


def _show_tool(tool: Tool, schemas: str, notes: Counter[str]) -> Tool:
    text, name = json.dumps(tool["function"], ensure_ascii=False), tool["function"]["name"]
    if schemas == "as_given":
        lost = _lost(text)
        if lost:
            listed = ", ".join(lost[:NUM_SHOWN])
            more = f" and {len(lost) - NUM_SHOWN} more" if len(lost) > NUM_SHOWN else ""
            remedy = f"use {setting('schemas', 'simplify')}"
            notes[f"tool {name}: the chat template does not show {listed}{more}; {remedy}"] += 1
        return tool
    simple = json.loads(_simplified(text))
    if simple == tool["function"]:
        return tool
    notes[REWRITTEN] += 1
    if holds_ref(simple.get("parameters") or {}):
        notes[f"tool {name}: the chat template does not show a `$ref` that leads to itself; describe it in words"] += 1
    return {"type": "function", "function": simple}


@functools.lru_cache(maxsize=4096)
def _lost(function_json: str) -> list[str]:
    """What the template does not show of a function, in words."""
    function = json.loads(function_json)
    lost = ["the end of `response` (its brace stays open)"] if _is_open(function) else []
    parameters = function.get("parameters")
    if isinstance(parameters, dict):
        lost += list(dict.fromkeys(_lost_of_parameters(parameters)))
    return lost


def _is_open(function: JsonObject) -> bool:
    """Whether a declaration has a `response` that the template never closes: it takes it for an object."""
    return "response" in function and str(get(function["response"], "type")).upper() != "OBJECT"


# ---- what is lost ----------------------------------------------------------------------------------------------------


def _lost_of_parameters(parameters: JsonObject) -> Iterator[str]:
    for keyword in parameters:
        if _tells(keyword, parameters) and keyword not in _SHOWN_OF_PARAMETERS:
            yield f"`{keyword}` of the parameters"
    if parameters.get("description"):
        yield "`description` of the parameters"
    yield from _lost_of_properties(parameters, "")


def _lost_of_properties(schema: JsonObject, prefix: str) -> Iterator[str]:
    properties = schema.get("properties")
    for name, value in properties.items() if isinstance(properties, dict) else ():
        if isinstance(value, dict):
            yield from _lost_of_parameter(value, prefix + name)


def _lost_of_parameter(schema: JsonObject, place: str) -> Iterator[str]:
    if isinstance(schema.get("type"), list):
        yield f"the list of types of {place} (it becomes one of Python)"
    if _shows_keywords(schema):
        for keyword in sorted(schema.keys() - SHOWN_OF_OBJECT):
            yield f"`{keyword}` of {place} (it becomes a parameter)"
    else:
        yield from (f"`{keyword}` of {place}" for keyword in _unshown(schema))
    if _is_shown_object(schema):
        yield from _lost_of_properties(schema, f"{place}.")
    items = schema.get("items")
    if _is_shown_array(schema) and isinstance(items, dict):
        yield from _lost_of_items(items, f"items of {place}")


def _lost_of_items(items: JsonObject, place: str) -> Iterator[str]:
    """All keywords of items are shown, but those of their properties as of any parameter."""
    if "$ref" in items:
        yield f"what `$ref` of {place} names"
    yield from _lost_of_properties(items, f"{place}.")


def _type(schema: JsonObject) -> str:
    return str(schema.get("type")).lower()


def _is_shown_object(schema: JsonObject) -> bool:
    return _type(schema) == "object"


def _is_shown_array(schema: JsonObject) -> bool:
    return _type(schema) == "array"


def _shows_keywords(schema: JsonObject) -> bool:
    """Whether the template takes the keywords of an object for its parameters."""
    has_properties = isinstance(schema.get("properties"), dict)
    return _is_shown_object(schema) and not has_properties and bool(schema.keys() - SHOWN_OF_OBJECT)


def _tells(keyword: str, schema: JsonObject) -> bool:
    """Whether a keyword tells something that a model should know."""
    value = schema[keyword]
    if keyword in DEFINITIONS or value is None:
        return False
    if isinstance(value, bool) and keyword.startswith(("additional", "unevaluated")):
        return False
    return keyword in CONSTRAINTS or keyword in _TELLING


def _unshown(schema: JsonObject) -> list[str]:
    """The keywords of a parameter that tell something and are not shown."""
    shown = set(_SHOWN_ANYWHERE)
    if _type(schema) == "string":
        shown.add("enum")
    if _is_shown_array(schema) and isinstance(schema.get("items"), dict):
        shown.add("items")
    if _is_shown_object(schema):
        shown |= SHOWN_OF_OBJECT
    return [keyword for keyword in schema if keyword not in shown and _tells(keyword, schema)]


# ---- simplified ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _simplified(function_json: str) -> str:
    """A function in the template's spelling, what has none in words."""
    function: JsonObject = json.loads(function_json)
    parameters = function.get("parameters")
    if isinstance(parameters, dict) and parameters:
        simple = simplify(parameters)
        told = [keyword for keyword in simple if keyword not in _SHOWN_OF_PARAMETERS and _tells(keyword, simple)]
        described = _add_words(function.get("description"), _all_words(told, simple))
        function |= {"description": described, "parameters": _describe_properties(simple)}
    if _is_open(function):
        response = function.pop("response")
        words = get(response, "description") or (response if isinstance(response, str) else "")
        function["description"] = _add_words(function["description"], [f"returns: {words}"] if words else [])
    return json.dumps(function, ensure_ascii=False)


def _describe_properties(schema: JsonObject) -> JsonObject:
    """A schema, with what is not shown of its parameters in their descriptions."""
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return schema
    described: JsonObject = {}
    for name, value in properties.items():
        described[name] = _describe(value) if isinstance(value, dict) else value
    return schema | {"properties": described}


def _describe(schema: JsonObject) -> JsonObject:
    words = [] if _shows_keywords(schema) else _all_words(_unshown(schema), schema)
    description = _add_words(schema.get("description"), words)
    described = ({"description": description} if description else {}) | schema
    if description:
        described["description"] = description
    if _is_shown_object(schema):
        described = _describe_properties(described)
    items = schema.get("items")
    if _is_shown_array(schema) and isinstance(items, dict):
        described["items"] = _describe_properties(items)
    return described


def _add_words(description: Json, words: list[str]) -> str:
    """A description with words behind it, unless it has them already: "How many. (default: 2)"."""
    given = str(description or "")
    added = f"({'; '.join(words)})"
    if not words or given.endswith(added):
        return given
    return f"{given} {added}".strip()


def _all_words(keywords: list[str], schema: JsonObject) -> list[str]:
    return [_words(keyword, schema) for keyword in keywords if keyword not in REFERENCES]


def _words(keyword: str, schema: JsonObject) -> str:
    """What a keyword says, in words: "one of 1, 2, 3", "integer or string", "default: 5"."""
    value = schema[keyword]
    if keyword == "enum" and isinstance(value, list):
        return f"one of {', '.join(map(_json, value))}"
    if keyword in ("anyOf", "oneOf") and isinstance(value, list) and all(_is_mere_type(one) for one in value):
        return " or ".join(str(get(one, "type")) for one in value)
    return f"{keyword}: {_json(value)}"


def _is_mere_type(schema: Json) -> bool:
    given = {key for key in schema if key != "title"} if isinstance(schema, dict) else set()
    return given == {"type"}


def _json(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False)
