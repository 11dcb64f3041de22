"""Tools of a trajectory: their declarations, and whether calls fit the JSON Schemas in them.

Training data and evaluation ask the same function, so that a call that may be trained on is one that counts as valid.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jsonschema
import referencing

from gemma_dist.data.convert import read_json_text
from gemma_dist.data.strict import error_context, map_json, short
from gemma_dist.errors import DataError

_TOOL_NAME = re.compile(r"[\w./:-]+")


def tool_name(name: Any) -> str:
    """The name itself. DataError if Gemma's call format cannot carry it."""
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise DataError(
            f"the tool name {short(name)} cannot be carried by Gemma's call format; use letters, digits and _ - . / :"
        )
    return name


def parse_tools(tools: Any, clean: Callable[[str], str]) -> list[dict[str, Any]]:
    """Declarations in OpenAI's form, as given but for the wrapper and the keys that the template needs."""
    tools = read_json_text(tools, "tools") if tools else []
    if not isinstance(tools, list):
        raise DataError(f"`tools` is {short(tools)}; write a list of declarations")
    parsed: dict[str, dict[str, Any]] = {}
    for number, tool in enumerate(tools, start=1):
        with error_context(f"tool {number}"):
            given = tool if isinstance(tool, dict) else {}
            function = given.get("function") or {key: value for key, value in given.items() if key != "type"}
            if not isinstance(function, dict) or not function or given.get("type") not in (None, "function"):
                raise DataError(
                    f'{short(tool)} declares no function; write {{"type": "function", "function": {{"name": ...}}}}'
                )
            name = tool_name(function.get("name"))
        with error_context(f"tool {name}"):
            if name in parsed:
                raise DataError("is declared twice; tool names are unique")
            function = map_json({key: value for key, value in function.items() if value is not None}, clean, clean)
            function.setdefault("description", "")
            if not isinstance(function["description"], str):
                raise DataError(f"the description is {short(function['description'])}; write it as text")
            if "parameters" in function:
                _check_parameters(function["parameters"])
            parsed[name] = {"type": "function", "function": function}
    return list(parsed.values())


def _check_parameters(parameters: Any) -> None:
    if not isinstance(parameters, dict):
        raise DataError(f"parameters are {short(parameters)}; write a JSON schema of type object")
    if not parameters:
        return
    # Without the type the template never closes the brace of the parameters.
    if parameters.setdefault("type", "object") != "object":
        raise DataError(
            f'the type of parameters is {short(parameters.get("type"))}; arguments are an object: write "object"'
        )
    _validator(json.dumps(parameters))


@functools.lru_cache(maxsize=4096)
def _validator(schema_json: str) -> Any:
    """A validator of the schema in its own dialect, by default 2020-12. It fetches nothing that a $ref names."""
    schema = json.loads(schema_json)
    try:
        dialect = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        dialect.check_schema(schema)
        return _nullable(dialect)(schema, registry=referencing.Registry())
    except Exception as error:  # whatever trips the validator's own reading of a schema is a fault of the schema
        raise DataError(f"parameters are no valid JSON schema: {_reason(error)}; mend the schema") from None


@functools.cache
def _nullable(dialect: Any) -> Any:
    """The dialect with OpenAPI's `nullable: true`, which Gemma's template shows to the model."""

    def unless_null(keyword: str) -> Any:
        check = dialect.VALIDATORS[keyword]

        def checked(validator: Any, rule: Any, value: Any, schema: Any) -> Any:
            return (
                () if value is None and schema.get("nullable") is True else check(validator, rule, value, schema) or ()
            )

        return checked

    # Whatever may say what a value is; as OpenAPI's generators write an optional reference, beside anyOf or allOf.
    saying = ("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref")
    known = [keyword for keyword in saying if keyword in dialect.VALIDATORS]  # older dialects lack some
    return jsonschema.validators.extend(dialect, {keyword: unless_null(keyword) for keyword in known})


def check_calls(places: list[str], messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
    """Calls of trained messages name declared tools and fit their schema; others may show a mistake."""
    declared = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    for place, message in zip(places, messages, strict=True):
        if not message.get("train", True):
            continue
        for call in message.get("tool_calls", []):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            with error_context(place):
                if name not in declared:
                    raise DataError(
                        f"calls {name}, which `tools` does not declare ({short(list(declared))}); declare it, mend the "
                        "name, or set train: false on the message if it shows a mistake"
                    )
                with error_context(f"call of {name}"):
                    misfit = find_misfit(arguments, declared[name])
                    if misfit is not None:
                        raise DataError(
                            f"the arguments do not fit the tool's schema: {misfit}; mend them, or set train: false on "
                            "the message if it shows a mistake"
                        )


def find_misfit(arguments: Mapping[str, Any], parameters: dict[str, Any] | None) -> str | None:
    """Where and why `arguments` do not fit the JSON schema of a tool's parameters; None if they do, or there is none.

    Raises:
        DataError: the schema is invalid or cannot be applied to these arguments.
    """
    if not parameters:
        return None
    validator = _validator(json.dumps(parameters))
    try:
        error = jsonschema.exceptions.best_match(validator.iter_errors(arguments))
    except Exception as broken:  # a $ref that leads nowhere, a pattern that is no regular expression, endless recursion
        raise DataError(
            f"the tool's schema cannot be applied: {_reason(broken)}; mend the schema (no remote $ref)"
        ) from None
    if error is None:
        return None
    return f"{'.'.join(map(str, error.absolute_path)) or 'as a whole'}: {_reason(error)}"


def _reason(error: Exception) -> str:
    text = " ".join(str(getattr(error, "message", "") or error or type(error).__name__).split())
    return text if len(text) <= 200 else f"{text[:120]} ... {text[-70:]}"
