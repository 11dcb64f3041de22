"""Values that logs write as text: JSON, or what Python prints of the same value."""

import ast
import warnings
from typing import Any

from gemma_dist.data.strict import get, is_json_text, map_json, parse_json, short, to_json_text, without
from gemma_dist.errors import DataError

_CONSTANTS = {"true": True, "false": False, "null": None}
# What Python's parser raises: no expression, a null byte, an integer of thousands of digits, nesting too deep.
_NO_PYTHON = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)


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
    raise not_json


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


def parse_calls(value: object) -> list[dict[str, Any]]:
    """The calls that a value says, itself or its text, as OpenAI's `tool_calls`.

        {'name': 'f', 'arguments': '{"a": 1}'}  ->  [{"type": "function", "function": {"name": "f", "arguments": ...}}]

    Also a list of calls, calls in OpenAI's wrapper, and calls whose arguments are called `parameters`, as Llama does.

    Raises:
        DataError: it says something else.
    """
    given = read_literal(value)
    calls = given if isinstance(given, list) else [given]
    if not calls:
        raise DataError('the list of calls is empty; write {"name": ..., "arguments": {...}}')
    return [_tool_call(call) for call in calls]


def _tool_call(call: object) -> dict[str, Any]:
    """One call as OpenAI's. What else stands beside its name is kept, for `calls.py` to refuse.

    {"name": "f", "parameters": {"a": 1}} -> {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    """
    wrapped = get(call, "function")
    function = wrapped if isinstance(wrapped, dict) else call
    if not isinstance(function, dict) or not function.get("name"):
        raise DataError(
            f'the call {short(function)} is no object with a name; write {{"name": ..., "arguments": {{...}}}}'
        )
    described = without(function, "id", "type")
    if "arguments" not in described and "parameters" in described:
        described["arguments"] = described.pop("parameters")
    arguments = described.get("arguments")
    if is_json_text(arguments, ("{",)):
        described["arguments"] = parse_literal(arguments)
    tool_call: dict[str, Any] = {"type": "function", "function": described}
    call_id = get(call, "id") or function.get("id")
    if call_id:
        tool_call["id"] = call_id
    return tool_call
