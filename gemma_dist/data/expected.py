"""Test cases: rows that end before the answer and say beside the messages which call, or which words, are expected.

    {"messages": [..., {"role": "user", "content": "Rome?"}], "expected_tool": "weather",
     "expected_arguments"?: {"city": "Rome"}, "available_tools": [...]}
    {..., "expected_calls": [{"name": "weather", "arguments": {"city": ["Rome", "Roma"], "unit": ["celsius", ""]}}],
     "ignore_arguments"?: ["note"]}                           a list of acceptable values for each argument (`gold.py`)
    {..., "expected_answer": ["20 degrees", "20 °C"]}         no call, and one of these texts
    {..., "expected_tool": "*"}                               a call, whichever; "none": no call

`evaluate` takes them as if the expected call were the last message. Where only a tool's name is given, or that no tool
is to be called, the case is an outline: arguments and words of the answer are not judged.

A null or [] expects no call where no assistant has spoken; else it is what Arrow fills into a row that expects nothing.
"""

from dataclasses import dataclass, replace
from typing import Any

from gemma_dist.data.calls import first_of
from gemma_dist.data.gold import ACCEPTABLE, IGNORED
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
    "expected_calls",
)
_ACCEPTABLE_CALLS_KEY = "expected_calls"  # whose arguments are lists of acceptable values
_ANSWER_KEYS = ("expected_answer", "expected_answers")
_ARGUMENTS_KEYS = ("expected_arguments", "expected_args", "expected_parameters", "expected_tool_args")
_BEFORE_ANSWERS = ("user", "tool", "function")  # whose message an answer follows
_NO_TOOL = ("", "none", "null", "no_tool")
ANY_TOOL = "*"
NO_CALL_EXPECTED = "(any answer without a call)"
CALL_EXPECTED = "(any call)"


@dataclass(frozen=True)
class Expected:
    """What a test case expects: the row with the answer as its last message, and how that is to be judged."""

    row: OpenAIRow
    is_outline: bool  # by the names of its calls alone
    any_call: bool = False  # by whether it calls a tool at all
    answers: tuple[str, ...] = ()  # texts, any of which is right


def is_test_case(row: RawRow, converted: OpenAIRow) -> bool:
    """Whether the row says which call it expects in place of an assistant's last message.

    A null expects no call, unless the row calls tools itself: then it is a whole trajectory, and the null is Arrow's.
    """
    key = _expecting_key(row)
    if key is None and converted.messages and expected_answers(row):
        return get(converted.messages[-1][1], "role") in _BEFORE_ANSWERS
    if not converted.messages or key is None:
        return False
    roles = [get(message, "role") for _, message in converted.messages]
    calls_tools = any(get(message, "tool_calls") for _, message in converted.messages)
    is_said = not is_null(row[key]) or not calls_tools
    return is_said and roles[-1] in _BEFORE_ANSWERS


def _expecting_key(row: RawRow) -> str | None:
    """The key that says what is expected: the first that is not null, else the first; None where there is none.

    {"expected_tool": null, "expected_tools": ["weather"]}  ->  "expected_tools"
    """
    keys = [key for key in _CALL_KEYS if key in row]
    said = [key for key in keys if not is_null(row[key])]
    return next(iter(said + keys), None)


def with_expected_answer(row: RawRow, converted: OpenAIRow) -> Expected:
    """The row with the expected call as its last message, the only one that is asked for.

    Raises:
        DataError: what is expected cannot be read.
    """
    key = _expecting_key(row)
    answers = expected_answers(row)
    any_call = key is not None and row[key] == ANY_TOOL
    calls: list[dict[str, Any]] = []
    if key is not None and not any_call:
        with error_context(f"`{key}`"):
            calls = _acceptable_calls(row[key]) if key == _ACCEPTABLE_CALLS_KEY else _expected_calls(row, key)
    if calls and answers:
        raise DataError(f"expects calls (`{key}`) and the words of an answer; keep one of the two")
    messages = [(number, _untrained(message)) for number, message in converted.messages]
    words = "" if calls else CALL_EXPECTED if any_call else (*answers, NO_CALL_EXPECTED)[0]
    answer: RawRow = {"role": "assistant", "content": words}
    if calls:
        answer["tool_calls"] = _with_ignored(calls, row)
    messages.append((messages[-1][0] + 1, answer))
    num_with_arguments = sum(_gives_arguments(call["function"]) for call in calls)
    if num_with_arguments not in (0, len(calls)):
        raise DataError(f"`{key}` gives arguments of some calls alone; give those of all, or of none")
    tools = converted.tools or row.get("available_tools")
    filled = replace(converted, messages=messages, tools=tools)
    return Expected(filled, num_with_arguments == 0, any_call, answers)


def expected_answers(row: RawRow) -> tuple[str, ...]:
    """The texts that the row takes for an answer, numbers as text; none where it says none.

    Raises:
        DataError: there is something else than text or numbers.
    """
    given = first_of(row, _ANSWER_KEYS)
    listed = given if isinstance(given, list) else [] if given is None else [given]
    for answer in listed:
        if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
            raise DataError(f"the expected answer is {short(answer)}; write a text, a number, or a list of these")
    return tuple(str(answer) for answer in listed)


def _gives_arguments(function: RawRow) -> bool:
    return "arguments" in function or ACCEPTABLE in function


def _acceptable_calls(expected: object) -> list[dict[str, Any]]:
    """The calls of `expected_calls`, whose arguments are lists of acceptable values.

    [{"name": "f", "arguments": {"a": [1, 2]}}]
        ->  [{"type": "function", "function": {"name": "f", "acceptable": {"a": [1, 2]}}}]
    """
    expected = parse_literal(expected) if is_json_text(expected) else expected
    if not isinstance(expected, list):
        raise DataError(f'is {short(expected)}; write a list of {{"name": ..., "arguments": {{"city": ["Rome"]}}}}')
    calls = parse_calls(expected) if expected else []
    for call in calls:
        function = call["function"]
        function.setdefault(ACCEPTABLE, function.pop("arguments", None) or {})
    return calls


def _with_ignored(calls: list[dict[str, Any]], row: RawRow) -> list[dict[str, Any]]:
    """The calls, each with the row's own `ignore_arguments` unless it has some itself."""
    if row.get(IGNORED) is None:
        return calls
    return [{**call, "function": {IGNORED: row[IGNORED], **call["function"]}} for call in calls]


def _untrained(message: object) -> object:
    """A message that is context alone: an assistant's with train: false, any other as it is."""
    given = as_object(message)
    return {**given, "train": False} if given.get("role") == "assistant" else message


def _arguments(row: RawRow) -> object:
    """The arguments that stand beside the tool's name, in themselves or as text; None where there are none."""
    given = first_of(row, _ARGUMENTS_KEYS)
    return parse_literal(given) if isinstance(given, str) else given


def _expected_calls(row: RawRow, key: str) -> list[dict[str, Any]]:
    """The expected calls under `key` as OpenAI's; those of which only the name is known have no arguments.

    "weather", {"city": "Rome"}  ->  [{"type": "function", "function": {"name": "weather", "arguments": {…}}}]
    ["weather", "clock"], None   ->  [{"type": "function", "function": {"name": "weather"}}, {…}]
    "none", None                 ->  []
    """
    expected, arguments = row[key], _arguments(row)
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
