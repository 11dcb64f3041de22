"""Values that logs write as text: JSON, or what Python prints of the same value."""

import ast
import re
import warnings
from typing import Any

from gemma_dist.data.calls import ARGUMENT_KEYS, ID_KEYS, NAME_KEYS, first_of
from gemma_dist.data.strict import get, is_json_text, map_json, parse_json, short, to_json_text, without
from gemma_dist.data.types import RawRow, TextObject
from gemma_dist.errors import DataError

_CONSTANTS = {"true": True, "false": False, "null": None}
# What Python's parser raises: no expression, a null byte, an integer of thousands of digits, nesting too deep.
_NO_PYTHON = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)
_PYTHON_QUOTE = re.compile(r"[\s\[{]*+'")  # the first quote of a Python literal; JSON has no such quotes
# What the texts of calls call the tool and what it gets, beside the spellings of structured calls.
_NAME_KEYS = (*NAME_KEYS, "function")
_TEXT_ARGUMENT_KEYS = (*ARGUMENT_KEYS, "tool_parameters")


def parse_literal(text: str) -> object:
    """The value of a JSON text or of a Python literal: `{"a": true}` or `{'a': True}`. Nothing is ever run.

    Raises:
        DataError: it is neither, or holds a key twice.
    """
    try:
        return parse_json(text)
    except DataError as error:
        not_json = error
    try:
        return parse_python(text)
    except DataError as error:
        if "twice" in str(error):
            raise
    raise _python_error(text) if _PYTHON_QUOTE.match(text) else not_json


def _python_error(text: str) -> DataError:
    """Why a text that opens as a Python literal is none, and where: "near \"'city': 'Rome's'}\""."""
    near = text.strip()
    try:
        ast.parse(near, mode="eval")
    except SyntaxError as error:
        lines = [*near.splitlines(), ""]
        column = error.offset or 1
        near = lines[(error.lineno or 1) - 1][max(0, column - 20) : column + 20]
    except _NO_PYTHON:
        pass
    return DataError(
        f"neither JSON nor a Python literal, near {short(near)}; write it as JSON, or a backslash in front of an "
        "apostrophe inside of a string"
    )


def read_literal(value: object) -> object:
    """The value itself, or what it says where it is the text of a literal."""
    return parse_literal(value) if isinstance(value, str) else value


def parse_python(text: str) -> object:
    """The value of a Python literal, in which JSON's true, false and null are read, too. DataError if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "\d" in a string, which stays as it is written
            tree = ast.parse(text.strip(), mode="eval")
        value: object = ast.literal_eval(_JsonConstants().visit(tree))
    except _NO_PYTHON:
        raise DataError(f"{short(text)} is neither JSON nor a Python literal; write JSON") from None
    _refuse_twice(tree)
    return map_json(value, str, str)  # no sets, bytes or tuples


def as_text(value: object) -> str:
    """What a tool's message says of a value: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else to_json_text(value)


class _JsonConstants(ast.NodeTransformer):
    """Names of JSON's constants become what they stand for."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """`true` as True; any other name as it is, which `literal_eval` refuses."""
        return ast.Constant(_CONSTANTS[node.id]) if node.id in _CONSTANTS else node


def _refuse_twice(tree: ast.AST) -> None:
    """DataError for a key that stands twice in an object: {'a': 1, 'a': 2}."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Dict):
            continue
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(f"the key {short(twice)} stands twice in one object; remove one of the two")


def parse_calls(value: object, *, from_text: bool = False) -> list[dict[str, Any]]:
    """The calls that a value says, itself or its text, as OpenAI's `tool_calls`.

        {'name': 'f', 'arguments': '{"a": 1}'}  ->  [{"type": "function", "function": {"name": "f", "arguments": ...}}]

    Also a list of calls, calls in OpenAI's wrapper, and calls with name and arguments under the keys of other formats.

    Args:
        from_text: a text said the value, so every null in it is the row's own, and none was filled in by Arrow.

    Raises:
        DataError: it says something else.
    """
    given = read_literal(value)
    calls = given if isinstance(given, list) else [given]
    if not calls:
        raise DataError('the list of calls is empty; write {"name": ..., "arguments": {...}}')
    return [_tool_call(call, from_text or isinstance(value, str)) for call in calls]


def _tool_call(call: object, from_text: bool) -> dict[str, Any]:
    """One call as OpenAI's. What else stands beside its name is kept, for `calls.py` to refuse.

    {"name": "f", "parameters": {"a": 1}} -> {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    """
    wrapped = get(call, "function")
    function = wrapped if isinstance(wrapped, dict) else call
    described = _under_our_keys(function) if isinstance(function, dict) else {}
    if not described.get("name"):
        raise DataError(
            f'the call {short(function)} is no object with a name; write {{"name": ..., "arguments": {{...}}}}'
        )
    arguments = described.get("arguments")
    if is_json_text(arguments, ("{",)):
        arguments, from_text = parse_literal(arguments), True
    if "arguments" in described:
        described["arguments"] = TextObject(arguments) if from_text and isinstance(arguments, dict) else arguments
    tool_call: dict[str, Any] = {"type": "function", "function": described}
    call_id = first_of(call, ID_KEYS) or first_of(function, ID_KEYS)
    if call_id:
        tool_call["id"] = call_id
    return tool_call


def _under_our_keys(function: RawRow) -> RawRow:
    """What a call says, name and arguments under OpenAI's keys; where several keys may hold one, nothing is moved.

    {"action": "f", "action_input": {"a": 1}, "id": "c1"} -> {"name": "f", "arguments": {"a": 1}}
    """
    described = without(function, "type", *ID_KEYS)
    for ours, keys in (("name", _NAME_KEYS), ("arguments", _TEXT_ARGUMENT_KEYS)):
        given = [key for key in keys if key in described]
        if len(given) == 1:
            described[ours] = described.pop(given[0])
    return described
