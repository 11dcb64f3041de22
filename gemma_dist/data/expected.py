"""Test cases: rows that end before the answer and say beside the messages which call is expected.

    {"messages": [..., {"role": "user", "content": "Rome?"}], "expected_tool": "weather",
     "expected_arguments"?: {"city": "Rome"}, "available_tools": [...]}

`evaluate` takes them as if the expected call were the last message. Where only a tool's name is given, or that no tool
is to be called, the case is an outline: arguments and words of the answer are not judged.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gemma_dist.data.layouts.turns import NumberedMessages, OpenAIRow
from gemma_dist.data.literals import parse_calls, parse_literal
from gemma_dist.data.strict import error_context, get, short
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
    """Whether the row says which call it expects in place of an assistant's last message."""
    if not converted.messages or not any(key in row for key in _CALL_KEYS):
        return False
    _, last = converted.messages[-1]
    return get(last, "role") in ("user", "tool", "function")


def with_expected_answer(row: RawRow, converted: OpenAIRow) -> tuple[OpenAIRow, bool]:
    """The row with the expected call as its last message, the only one that is asked for; whether it is an outline.

    Raises:
        DataError: what is expected cannot be read.
    """
    key = next(key for key in _CALL_KEYS if key in row)
    with error_context(f"`{key}`"):
        calls = list(_expected_calls(row[key], _arguments(row)))
    messages: NumberedMessages = []
    for number, message in converted.messages:
        if isinstance(message, dict) and message.get("role") == "assistant":
            message = {**message, "train": False}
        messages.append((number, message))
    answer: RawRow = {"role": "assistant", "content": "" if calls else NO_CALL_EXPECTED}
    if calls:
        answer["tool_calls"] = calls
    messages.append((messages[-1][0] + 1, answer))
    with_arguments = [call for call in calls if "arguments" in call["function"]]
    if calls and with_arguments and len(with_arguments) < len(calls):
        raise DataError(f"`{key}` gives arguments of some calls alone; give those of all, or of none")
    tools = converted.tools or row.get("available_tools")
    return replace(converted, messages=messages, tools=tools), not with_arguments


def _arguments(row: RawRow) -> object:
    """The arguments that stand beside the tool's name; None where there are none."""
    given = [row[key] for key in _ARGUMENTS_KEYS if row.get(key) is not None]
    return parse_literal(given[0]) if given and isinstance(given[0], str) else next(iter(given), None)


def _expected_calls(expected: object, arguments: object) -> Iterator[dict[str, Any]]:
    """The expected calls; those of which only the name is known have no arguments."""
    if isinstance(expected, str) and expected.lstrip().startswith(("{", "[")):
        expected = parse_literal(expected)
    listed = expected if isinstance(expected, list) else [expected]
    if arguments is not None and len(listed) != 1:
        raise DataError(f"names {len(listed)} calls beside the arguments of one; write a list of calls with arguments")
    for call in listed:
        if call is None or (isinstance(call, str) and call.strip().lower() in _NO_TOOL):
            continue
        if not isinstance(call, str):
            yield from parse_calls(call)
        elif arguments is None:
            yield {"type": "function", "function": {"name": call}}
        elif isinstance(arguments, dict):
            yield {"type": "function", "function": {"name": call, "arguments": arguments}}
        else:
            raise DataError(
                f"the expected arguments are {short(arguments)}, not an object; write name and value of each"
            )
