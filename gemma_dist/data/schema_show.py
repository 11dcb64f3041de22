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
from gemma_dist.data.schema_walk import CONSTRAINTS
from gemma_dist.data.shared import of_shared, shared_json
from gemma_dist.data.strict import as_object, get
from gemma_dist.data.types import Json, JsonObject, Tool
from gemma_dist.errors import setting

NUM_SHOWN = 3  # of what one note lists
REWRITTEN = "schemas of tools were written in the spelling that the chat template shows"
# Keywords that tell a model something, besides those that say which values are right.
_TELLING = frozenset({"default", "examples", "example"})
_SHOWN_OF_PARAMETERS = frozenset({"type", "properties", "required"})
_SHOWN_ANYWHERE = frozenset({"description", "type", "nullable"})
_SHOWN_OF_TYPE = {"string": frozenset({"enum"}), "array": frozenset({"items"}), "object": SHOWN_OF_OBJECT}


def show_tools(tools: list[Tool], schemas: Literal["as_given", "simplify"], notes: Counter[str]) -> list[Tool]:
    """The declarations as they are rendered, stored and served; `notes` say what of them the template does not show."""
    return [_show_tool(tool, schemas, notes) for tool in tools]


def _show_tool(tool: Tool, schemas: str, notes: Counter[str]) -> Tool:
    """One declaration, as it is or simplified, and what `notes` say of it."""
    function, name = tool["function"], tool["function"]["name"]
    if schemas == "as_given":
        lost = _lost(function)
        if lost:
            remedy = f"use {setting('schemas', 'simplify')}"
            notes[f"tool {name}: the chat template does not show {_first_of(lost)}; {remedy}"] += 1
        return tool
    simple = json.loads(_simplified(shared_json(function)))
    if simple == function:
        return tool
    notes[REWRITTEN] += 1
    if holds_ref(simple.get("parameters") or {}):
        notes[f"tool {name}: the chat template does not show a `$ref` that leads to itself; describe it in words"] += 1
    return {"type": "function", "function": simple}


def _first_of(lost: list[str]) -> str:
    """The first of what is lost, and how many more there are: "`default` of city, `minimum` of days and 2 more"."""
    num_more = len(lost) - NUM_SHOWN
    more = f" and {num_more} more" if num_more > 0 else ""
    return ", ".join(lost[:NUM_SHOWN]) + more


@of_shared
def _lost(function: JsonObject) -> list[str]:
    """What the template does not show of a function, in words: ["`default` of city", "`minimum` of days"]."""
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
    """What is not shown of {"type": "object", "properties": {…}, "additionalProperties": {…}, …}, and within it."""
    for keyword in _untold(parameters, _SHOWN_OF_PARAMETERS):
        yield f"`{keyword}` of the parameters"
    if parameters.get("description"):
        yield "`description` of the parameters"
    yield from _lost_of_properties(parameters, "")


def _lost_of_properties(schema: JsonObject, prefix: str) -> Iterator[str]:
    """What is not shown of each parameter; `prefix` stands in front of its name: "trip." for {"trip": {"city": …}}."""
    for name, value in as_object(schema.get("properties")).items():
        if isinstance(value, dict):
            yield from _lost_of_parameter(value, prefix + name)


def _lost_of_parameter(schema: JsonObject, place: str) -> Iterator[str]:
    """What is not shown of one parameter, and within it: "`default` of trip.city" of {"default": "Rome", …}."""
    if isinstance(schema.get("type"), list):
        yield f"the list of types of {place} (it becomes one of Python)"
    if _shows_keywords(schema):
        for keyword in sorted(schema.keys() - SHOWN_OF_OBJECT):
            yield f"`{keyword}` of {place} (it becomes a parameter)"
    else:
        yield from (f"`{keyword}` of {place}" for keyword in _unshown(schema))
    if _type(schema) == "object":
        yield from _lost_of_properties(schema, f"{place}.")
    yield from _lost_of_items(_shown_items(schema), f"items of {place}")


def _lost_of_items(items: JsonObject, place: str) -> Iterator[str]:
    """All keywords of items are shown, but those of their properties as of any parameter."""
    if "$ref" in items:
        yield f"what `$ref` of {place} names"
    yield from _lost_of_properties(items, f"{place}.")


def _type(schema: JsonObject) -> str:
    """The type as the template compares it: in lower case."""
    return str(schema.get("type")).lower()


def _shown_items(schema: JsonObject) -> JsonObject:
    """The schema of an array's items, which the template shows; {} where there is none."""
    return as_object(schema.get("items")) if _type(schema) == "array" else {}


def _shows_keywords(schema: JsonObject) -> bool:
    """Whether the template takes the keywords of an object for its parameters."""
    has_properties = isinstance(schema.get("properties"), dict)
    return _type(schema) == "object" and not has_properties and bool(schema.keys() - SHOWN_OF_OBJECT)


def _tells(keyword: str, value: Json) -> bool:
    """Whether a keyword tells something that a model should know: not `title`, not `additionalProperties: false`."""
    is_closing = isinstance(value, bool) and keyword.startswith(("additional", "unevaluated"))
    if value is None or is_closing:
        return False
    return keyword in CONSTRAINTS or keyword in _TELLING


def _untold(schema: JsonObject, shown: frozenset[str]) -> list[str]:
    """The keywords of a schema that tell something and are not among those that are shown."""
    return [keyword for keyword, value in schema.items() if keyword not in shown and _tells(keyword, value)]


def _unshown(schema: JsonObject) -> list[str]:
    """As `_untold`, of a parameter: of {"type": "string", "enum": […], "default": "C"} this is `default`."""
    shown = _SHOWN_ANYWHERE | _SHOWN_OF_TYPE.get(_type(schema), frozenset())
    if not isinstance(schema.get("items"), dict):
        shown -= {"items"}
    return _untold(schema, shown)


# ---- simplified ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _simplified(function_json: str) -> str:
    """A function in the template's spelling, what has none in words; both as JSON."""
    function: JsonObject = json.loads(function_json)
    parameters = function.get("parameters")
    if isinstance(parameters, dict) and parameters:
        simple = simplify(parameters)
        words = _all_words(_untold(simple, _SHOWN_OF_PARAMETERS), simple)
        described = _add_words(function.get("description"), words)
        function |= {"description": described, "parameters": _describe_properties(simple)}
    if _is_open(function):
        response = function.pop("response")
        returned = response if isinstance(response, str) else get(response, "description")
        function["description"] = _add_words(function["description"], [f"returns: {returned}"] if returned else [])
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
    """A parameter with what is not shown of it, and within it, in descriptions.

    {"type": "integer", "default": 5} -> {"description": "(default: 5)", "type": "integer", "default": 5}
    """
    words = [] if _shows_keywords(schema) else _all_words(_unshown(schema), schema)
    description = _add_words(schema.get("description"), words)
    described = schema
    if description:
        described = {"description": description} | schema | {"description": description}
    if _type(schema) == "object":
        described = _describe_properties(described)
    items = _shown_items(schema)
    return described | {"items": _describe_properties(items)} if items else described


def _add_words(description: Json, words: list[str]) -> str:
    """A description with words behind it, unless it has them already: "How many. (default: 2)"."""
    given = str(description or "")
    added = f"({'; '.join(words)})"
    if not words or given.endswith(added):
        return given
    return f"{given} {added}".strip()


def _all_words(keywords: list[str], schema: JsonObject) -> list[str]:
    """What each of the keywords says, but for references, which have no words."""
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
    """Whether a schema says a type and nothing else: {"type": "string", "title": "Name"}."""
    return as_object(schema).keys() - {"title"} == {"type"}


def _json(value: Json) -> str:
    """A value as JSON on one line, in which é stays é."""
    return json.dumps(value, ensure_ascii=False)
