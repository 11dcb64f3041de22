"""Tools of a trajectory: their declarations, and whether calls fit the JSON Schemas in them.

Training data and evaluation ask the same function, so that a call that may be trained on is one that counts as valid.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable
from typing import cast

from gemma_dist.data.schema_fit import find_misfit, require_valid
from gemma_dist.data.schema_nulls import drop_schema_nulls
from gemma_dist.data.schema_types import normalize_schema
from gemma_dist.data.shared import of_shared
from gemma_dist.data.strict import (
    as_object,
    error_context,
    get,
    map_json_object,
    read_json_text,
    short,
    without,
    without_nulls,
)
from gemma_dist.data.types import ArrowStruct, CalledFunction, Clean, Function, Json, JsonObject, Message, Tool
from gemma_dist.errors import DataError

TWICE = "declarations that stood there twice were taken once"

_TOOL_NAME = re.compile(r"[\w./:-]+")


def tool_name(name: object) -> str:
    """The name itself. DataError if Gemma's call format cannot carry it."""
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise DataError(
            f"the tool name {short(name)} cannot be represented in Gemma's call format; use letters, digits and "
            "_ - . / :"
        )
    return name


def parse_tools(tools: object, clean: Clean, notes: Counter[str]) -> list[Tool]:
    """Declarations in OpenAI's form, as given but for the wrapper, the names of types, the keys that the template
    needs, and nulls that say nothing. `notes` count what was changed.

    Raises:
        DataError: one is no declaration of a function, is declared in two ways, or has an invalid schema.
    """
    given = read_json_text(tools, "tools") if tools else []
    if not isinstance(given, list):
        raise DataError(f"`tools` is {short(given)}; write a list of declarations")
    parsed: dict[str, Tool] = {}
    for number, tool in enumerate(given, start=1):
        with error_context(f"tool {number}"):
            function = _declared_function(tool)
            name = tool_name(function.get("name"))
        with error_context(f"tool {name}"):
            declared = _declare(function, clean, notes)
            if name not in parsed:
                parsed[name] = declared
            elif parsed[name] != declared:
                raise DataError("is declared twice, and not the same; keep one of the two, or rename one")
            else:
                notes[TWICE] += 1
    return list(parsed.values())


def _declare(function: dict[str, object], clean: Clean, notes: Counter[str]) -> Tool:
    """The declaration in OpenAI's form. Rows share their tools, so one that was parsed before is taken as it is."""
    if any(isinstance(value, ArrowStruct) for value in (function, *function.values())):
        return _parse_declaration(function, clean, notes)  # whose nulls mean something else
    declared, found = _declared_before(clean)(function)
    if found:
        notes.update(found)
    return declared


@functools.cache
def _declared_before(clean: Clean) -> Callable[[dict[str, object]], tuple[Tool, Counter[str]]]:
    """What a declaration becomes, and the notes on it; equal ones are one object (`to_openai_tools`)."""

    def parse(function: dict[str, object]) -> tuple[Tool, Counter[str]]:
        notes: Counter[str] = Counter()
        return _parse_declaration(function, clean, notes), notes

    return of_shared(parse)


def _parse_declaration(function: dict[str, object], clean: Clean, notes: Counter[str]) -> Tool:
    return {"type": "function", "function": _parse_function(drop_schema_nulls(function, notes), clean, notes)}


def _declared_function(tool: object) -> dict[str, object]:
    """What a declaration says of its function, inside of OpenAI's wrapper or without one.

    {"type": "function", "function": {"name": "f", "parameters": {…}}}  ->  {"name": "f", "parameters": {…}}
    {"type": "function", "name": "f", "parameters": {…}}                ->  {"name": "f", "parameters": {…}}
    """
    if get(tool, "type") in (None, "function"):
        function = as_object(get(tool, "function") or without(as_object(tool), "type"))
        if function.get("name") is not None:
            return function
    raise DataError(f'{short(tool)} declares no function; write {{"type": "function", "function": {{"name": ...}}}}')


def _parse_function(function: dict[str, object], clean: Clean, notes: Counter[str]) -> Function:
    """The declaration with clean strings, a description (which the template needs), and a checked schema."""
    parsed = map_json_object(without_nulls(function), clean, clean)
    description = parsed.setdefault("description", "")
    if not isinstance(description, str):
        raise DataError(f"the description is {short(description)}; write it as a string")
    if "parameters" in parsed:
        parsed["parameters"] = _parse_parameters(parsed["parameters"], notes)
    return cast(Function, parsed)  # which may have other keys, too


def _parse_parameters(parameters: Json, notes: Counter[str]) -> JsonObject:
    """The schema of a tool's arguments, of type object and valid: {"properties": {…}} gets its type."""
    if not isinstance(parameters, dict):
        raise DataError(f"parameters are {short(parameters)}; write a JSON schema of type object")
    if not parameters:
        return parameters
    with error_context("parameters are no valid JSON schema"):
        parameters = normalize_schema(parameters, notes)
    # Without the type the template never closes the brace of the parameters.
    if parameters.setdefault("type", "object") != "object":
        raise DataError(
            f'the type of parameters is {short(parameters.get("type"))}; arguments are an object: write "object"'
        )
    require_valid(parameters)
    return parameters


def without_schemas(tools: list[Tool]) -> list[Tool]:
    """The tools by name alone, so that all arguments fit them."""
    return [{"type": "function", "function": {"name": tool["function"]["name"], "description": ""}} for tool in tools]


def check_calls(places: list[str], messages: list[Message], tools: list[Tool]) -> None:
    """Calls of trained messages name declared tools and fit their schema; others may show a mistake.

    Args:
        places: how errors name each message.

    Raises:
        DataError: a call of a trained message does not.
    """
    declared = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    for place, message in zip(places, messages, strict=True):
        if not message.get("train", True):
            continue
        with error_context(place):
            for call in message.get("tool_calls", []):
                _check_call(call["function"], declared)


def _check_call(call: CalledFunction, declared: dict[str, JsonObject | None]) -> None:
    """DataError for a call of a tool that is not declared, or with arguments that do not fit.

    Args:
        declared: the schema of each tool's parameters, by the tool's name; None where it has none.
    """
    name = call["name"]
    if name not in declared:
        raise DataError(
            f"calls {name}, which `tools` does not declare ({short(list(declared))}); declare it, fix the name, or "
            "set train: false on the message if it shows a mistake"
        )
    if "acceptable" in call:  # among them may be what the schema forbids, as in BFCL's files
        return
    with error_context(f"call of {name}"):
        misfit = find_misfit(call["arguments"], declared[name])
        if misfit is not None:
            raise DataError(
                f"the arguments do not fit the tool's schema: {misfit}; fix them, or set train: false on the message "
                "if it shows a mistake"
            )
