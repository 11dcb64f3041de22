"""The tool calls of a raw message in normal form, whatever an API calls their keys.

{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{…}"}}      OpenAI
{"id": "c1", "name": "f", "args": {…}}                                               LangChain
{"id": "c1", "name": "f", "input": {…}}                                              AI SDK, Anthropic
{"name": "f", "parameters": {…}}                                                     Llama
{"toolCallId": "c1", "toolName": "f", "args": {…}}                                   AI SDK
"""

import re
from typing import Any

from gemma_dist.data.gold import ACCEPTABLE, GOLD_KEYS, add_gold, representative
from gemma_dist.data.marks import OFF_MESSAGE, ON_MESSAGE, refuse_finer, snake_case
from gemma_dist.data.schema import tool_name
from gemma_dist.data.spellings import RESULT_KEYS
from gemma_dist.data.strict import (
    error_context,
    get,
    map_json,
    map_json_object,
    parse_json,
    read_json_text,
    require_encodable,
    short,
    without,
    without_nulls,
)
from gemma_dist.data.types import CalledFunction, Clean, JsonObject, RawRow, TextObject, ToolCall
from gemma_dist.errors import DataError

_UNCARRIED = re.compile(r'[:,{}\[\]"\r\n]')  # ends a bare key of Gemma's calls, or opens something else

NAME_KEYS = ("name", "tool_name", "toolName", "function_name", "tool", "action")
ARGUMENT_KEYS = (
    *("arguments", "args", "parameters", "input", "params", "kwargs", "tool_input", "toolInput", "action_input"),
    *("tool_args", "parsed_arguments"),
)
ID_KEYS = ("id", "tool_call_id", "call_id", "toolCallId")
TYPES = ("function", "tool_call", "function_call", "tool_use", "tool-call")
# What servers and loggers put beside a call, which says nothing about it; also as `thoughtSignature`.
SILENT_KEYS = (
    *("index", "status", "cache_control", "extra_content", "thought_signature", "provider_specific_fields", "caller"),
    *("requestor", "timestamp", "created_at", "started_at", "completed_at", "state", "signature", "usage", "score"),
    *("duration", "duration_ms", "latency", "latency_ms", "server_name", "server_label", "item_id", "finish_reason"),
)
_KNOWN_KEYS = {"type", *NAME_KEYS, *ARGUMENT_KEYS, *ID_KEYS, *ON_MESSAGE, *OFF_MESSAGE, *GOLD_KEYS}
_OPENAI_KEYS, _OPENAI_FUNCTION = {"id", "type", "function"}, {"name", "arguments"}
_RUN_BY_PROVIDER = "provider_executed"  # true of a tool that is none of the row's


def parse_calls(message: RawRow, clean: Clean) -> list[ToolCall]:
    """The calls of a message. Ids are as given, "" where there is none.

    Raises:
        DataError: a call has no name, arguments that are no object, or a key that nobody knows.
    """
    calls = read_json_text(message.get("tool_calls") or [], "tool_calls")
    if message.get("function_call"):  # OpenAI's form before tool_calls
        if calls:
            raise DataError("holds both function_call and tool_calls; keep tool_calls")
        calls = [{"function": message["function_call"]}]
    if not isinstance(calls, list):
        raise DataError(f"`tool_calls` is {short(calls)}; write a list of calls")
    return [_parse_call(call, clean) for call in calls]


def call_id(given: object) -> str:
    """An id as a string; "" where there is none."""
    if given is None or given == "":
        return ""
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise DataError(f"the call id is {short(given)}; write it as a string")
    return require_encodable(str(map_json(given, str, str)))


def first_of(value: object, keys: tuple[str, ...]) -> Any:
    """The first value of several keys that is there: "c1" of {"id": null, "call_id": "c1"}; else None."""
    for key in keys:
        found = get(value, key)
        if found is not None:
            return found
    return None


def _parse_call(call: object, clean: Clean) -> ToolCall:
    """One call in normal form.

    {"id": "c1", "name": "f", "args": {"a": 1}}
        ->  {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    """
    if isinstance(call, str):
        call = parse_json(call)
    if not isinstance(call, dict) or call.get("type") not in (None, *TYPES):
        raise DataError(f'the call {short(call)} is no function call; write {{"function": {{"name", "arguments"}}}}')
    function = call.get("function")
    if isinstance(function, dict) and call.keys() <= _OPENAI_KEYS and function.keys() == _OPENAI_FUNCTION:
        given_name = function["name"]
        if isinstance(given_name, str):  # as most are, so that no other key is looked for
            return _parse_openai_call(call.get("id"), given_name, function["arguments"], clean)
    described = _unwrap(call)
    name = tool_name(_name_of(described))
    with error_context(f"call of {name}"):
        _refuse_unknown(described)
        given = _arguments_of(described)
        if given is None and ACCEPTABLE in described:
            given = representative(read_json_text(described[ACCEPTABLE], ACCEPTABLE))
        called: CalledFunction = {"name": name, "arguments": _parse_arguments(given, clean)}
        add_gold(called, described, clean)
    return {"id": call_id(first_of(described, ID_KEYS)), "type": "function", "function": called}


def _parse_openai_call(given_id: object, given_name: str, given: object, clean: Clean) -> ToolCall:
    """As `_parse_call`, of a call in OpenAI's form to the letter."""
    name = tool_name(given_name)
    with error_context(f"call of {name}"):
        called: CalledFunction = {"name": name, "arguments": _parse_arguments(given, clean)}
    return {"id": call_id(given_id), "type": "function", "function": called}


def _unwrap(call: RawRow) -> RawRow:
    """The keys of a call beside those of its `function`, which may be the name alone.

    {"id": "c1", "function": {"name": "f", "arguments": "{}"}} -> {"id": "c1", "name": "f", "arguments": "{}"}
    """
    described = without(without_nulls(call), "function")
    function = call.get("function") or {}
    if isinstance(function, str):
        function = {"name": function}
    if not isinstance(function, dict):
        raise DataError(f"the `function` of a call is {short(function)}; write an object with name and arguments")
    for key, value in without(without_nulls(function), "type").items():
        first = described.setdefault(key, value)
        if first != value and key not in (*ID_KEYS, *SILENT_KEYS):  # results answer the outer id
            raise DataError(f"the call says `{key}` twice, {short(first)} and {short(value)}; keep one")
    return described


def _name_of(call: RawRow) -> object:
    """The name under whichever of NAME_KEYS holds it. DataError where none does, or two differ."""
    given = {key: call[key] for key in NAME_KEYS if key in call}
    if not given:
        raise DataError(f"the call {short(call)} has no name; write it under `name`, beside its `arguments`")
    name, *rest = given.values()
    if any(other != name for other in rest):
        raise DataError(f"the call says {' and '.join(given)}, which differ; keep `name`")
    return name


def _refuse_unknown(call: RawRow) -> None:
    """DataError for a key that may hold what belongs to the call, such as arguments under a name of its own."""
    refuse_finer(call, "a call")
    for key, value in call.items():
        if key not in _KNOWN_KEYS and not _is_silent(snake_case(str(key)), value, call):
            raise DataError(
                f"the key {short(key)} of the call is not known ({short(value)}); arguments stand under `arguments`: "
                "rename or remove it"
            )


def _is_silent(name: str, value: object, call: RawRow) -> bool:
    """Whether a key says nothing about the call: one of SILENT_KEYS, or empty or a number beside the arguments."""
    if name in SILENT_KEYS:
        return True
    if name == "description":  # with `parameters` it is a tool's declaration
        return "parameters" not in call
    is_empty = value in ("", [], {})
    is_number = isinstance(value, (bool, int, float))
    may_tell = name in RESULT_KEYS or (name == _RUN_BY_PROVIDER and value)
    has_arguments = any(key in call for key in ARGUMENT_KEYS)
    return is_empty or (is_number and has_arguments and not may_tell)


def _arguments_of(function: RawRow) -> object:
    """The arguments under whichever of ARGUMENT_KEYS holds them; None where none does."""
    given = {key: function[key] for key in ARGUMENT_KEYS if key in function}
    if len(given) > 1:
        first, *rest = [read_json_text(value or {}, key) for key, value in given.items()]
        if any(value != first for value in rest):
            raise DataError(f"{' and '.join(given)} stand side by side and differ; keep `arguments`")
    return next(iter(given.values()), None)


def _parse_arguments(arguments: object, clean: Clean) -> JsonObject:
    """Arguments as an object, from an object or its JSON text; nothing at all stands for no arguments.

    '{"city": "Rome"}' -> TextObject({"city": "Rome"}), null -> {}, "" -> {}
    """
    if arguments is None:
        return {}
    if isinstance(arguments, str):
        with error_context("arguments"):
            arguments = parse_json(arguments if arguments.strip() else "{}")
        arguments = TextObject(arguments) if isinstance(arguments, dict) else arguments
    if not isinstance(arguments, dict):
        raise DataError(f"the arguments are {short(arguments)}, not an object; write name and value of each")

    def argument_name(key: str) -> str:
        """The name itself, clean. DataError if Gemma's format cannot carry it."""
        is_bare = key != "" and key == key.strip()
        if not is_bare or _UNCARRIED.search(key):
            raise DataError(
                f"the argument name {short(key)} cannot be represented in Gemma's call format, which writes names "
                'bare: not empty, no blanks around, none of : , { } [ ] " or line breaks; rename it'
            )
        return clean(key)

    return map_json_object(arguments, clean, argument_name)
