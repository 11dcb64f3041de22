"""Test cases: rows that end before the answer and say beside the messages which call is expected.

    {"messages": [..., {"role": "user", "content": "Rome?"}], "expected_tool": "weather",
     "expected_arguments"?: {"city": "Rome"}, "available_tools": [...]}

`evaluate` takes them as if the expected call were the last message. Where only a tool's name is given, or that no tool
is to be called, the case is an outline: arguments and words of the answer are not judged.

A null or [] expects no call where no assistant has spoken; else it is what Arrow fills into a row that expects nothing.
"""

from dataclasses import replace
from typing import Any

from gemma_dist.data.calls import first_of
from gemma_dist.data.layouts.turns import OpenAIRow
from gemma_dist.data.literals import parse_calls, parse_literal
from gemma_dist.data.strict import as_object, error_context, get, is_json_text, is_null, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

_CALL_KEYS = (
    "expected_tool",
    "expected_tools",
    "expected_tool_call",
    "expected_tool_calls",
    "expected_function",
)
_ARGUMENTS_KEYS = ("expected_arguments", "expected_args", "expected_parameters", "expected_tool_args")
_NO_TOOL = ("", "none", "null", "no_tool")
NO_CALL_EXPECTED = "(any answer without a call)"


def is_test_case(row: RawRow, converted: OpenAIRow) -> bool:
    """Whether the row says which call it expects in place of an assistant's last message.

    A null expects no call, unless the row calls tools itself: then it is a whole trajectory, and the null is Arrow's.
    """
    key = _expecting_key(row)
    if not converted.messages or key is None:
        return False
    roles = [get(message, "role") for _, message in converted.messages]
    calls_tools = any(get(message, "tool_calls") for _, message in converted.messages)
    is_said = not is_null(row[key]) or not calls_tools
    return is_said and roles[-1] in ("user", "tool", "function")


def _expecting_key(row: RawRow) -> str | None:
    """The key that says what is expected: the first that is not null, else the first; None where there is none.

    {"expected_tool": null, "expected_tools": ["weather"]}  ->  "expected_tools"
    """
    keys = [key for key in _CALL_KEYS if key in row]
    said = [key for key in keys if not is_null(row[key])]
    return next(iter(said + keys), None)


def with_expected_answer(row: RawRow, converted: OpenAIRow) -> tuple[OpenAIRow, bool]:
    """The row with the expected call as its last message, the only one that is asked for; whether it is an outline.

    Raises:
        DataError: what is expected cannot be read.
    """
    key = _expecting_key(row)
    assert key is not None
    with error_context(f"`{key}`"):
        calls = _expected_calls(row[key], _arguments(row))
    messages = [(number, _untrained(message)) for number, message in converted.messages]
    answer: RawRow = {"role": "assistant", "content": "" if calls else NO_CALL_EXPECTED}
    if calls:
        answer["tool_calls"] = calls
    messages.append((messages[-1][0] + 1, answer))
    num_with_arguments = sum("arguments" in call["function"] for call in calls)
    if num_with_arguments not in (0, len(calls)):
        raise DataError(f"`{key}` gives arguments of some calls alone; give those of all, or of none")
    tools = converted.tools or row.get("available_tools")
    return replace(converted, messages=messages, tools=tools), num_with_arguments == 0


def _untrained(message: object) -> object:
    """A message that is context alone: an assistant's with train: false, any other as it is."""
    given = as_object(message)
    return {**given, "train": False} if given.get("role") == "assistant" else message


def _arguments(row: RawRow) -> object:
    """The arguments that stand beside the tool's name, in themselves or as text; None where there are none."""
    given = first_of(row, _ARGUMENTS_KEYS)
    return parse_literal(given) if isinstance(given, str) else given


def _expected_calls(expected: object, arguments: object) -> list[dict[str, Any]]:
    """The expected calls as OpenAI's; those of which only the name is known have no arguments.

    "weather", {"city": "Rome"}  ->  [{"type": "function", "function": {"name": "weather", "arguments": {…}}}]
    ["weather", "clock"], None   ->  [{"type": "function", "function": {"name": "weather"}}, {…}]
    "none", None                 ->  []
    """
    if is_json_text(expected):
        expected = parse_literal(expected)
    listed = expected if isinstance(expected, list) else [expected]
    if arguments is not None and len(listed) != 1:
        raise DataError(f"names {len(listed)} calls beside the arguments of one; write a list of calls with arguments")
    calls: list[dict[str, Any]] = []
    for call in listed:
        if isinstance(call, str):
            calls += _call_of_name(call, arguments)
        elif not is_null(call):
            calls += parse_calls(call)
    return calls


def _call_of_name(name: str, arguments: object) -> list[dict[str, Any]]:
    """The call of a tool by its name; none for a word that says that no tool is called."""
    if name.strip().lower() in _NO_TOOL:
        return []
    if arguments is None:
        return [{"type": "function", "function": {"name": name}}]
    if not isinstance(arguments, dict):
        raise DataError(f"the expected arguments are {short(arguments)}, not an object; write name and value of each")
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]
