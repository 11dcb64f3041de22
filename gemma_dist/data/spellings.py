"""Messages that write OpenAI's fields under other names: into OpenAI's own, before anything else reads them.

{"role": "Human", "text": "Rome?"}                      -> {"role": "user", "content": "Rome?"}
{"role": "tool", "tool_call_id": "c1", "output": 20}    -> {"role": "tool", "tool_call_id": "c1", "content": 20}
{"role": "assistant", "content": "", "additional_kwargs": {"tool_calls": […]}}      LangChain, LlamaIndex
    -> {"role": "assistant", "content": "", "tool_calls": […]}
"""

import re

from gemma_dist.data.strict import as_object, get, short, without
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

ROLES = {"ai": "assistant", "bot": "assistant", "gpt": "assistant", "model": "assistant", "human": "user"}
# Where a message may keep its text in place of `content`, and a tool's message its result.
TEXT_KEYS = ("text", "value", "message", "body")
RESULT_KEYS = ("output", "result", "results", "response", "data", "observation", "return_value")
# Fields that LangChain and LlamaIndex keep in `additional_kwargs`.
_BESIDE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "tool_call_id", "name")
_CALL_KEYS = ("tool_calls", "function_call")
_IS_NAME = re.compile(r"[\w.:/-]+")
_RESULT_ROLES = ("tool", "function")
_BLOCK_KEYS = ("blocks", "parts")


def respell(message: object) -> object:
    """The message with its role, its content, its parts' texts and its calls where OpenAI has them.

    Raises:
        DataError: two keys could be its content, or an object beside the known keys holds calls.
    """
    if not isinstance(message, dict):
        return message
    message = _with_beside(message)
    role = message.get("role")
    if isinstance(role, str):
        role = role.strip().lower()
        message = {**message, "role": ROLES.get(role, role)}
    message = _with_content(message)
    content = message.get("content")
    if isinstance(content, list):
        message = {**message, "content": [_with_text(part) for part in content]}
    return message


def _with_beside(message: RawRow) -> RawRow:
    """The message with those fields of `additional_kwargs` that it does not have itself."""
    for key, value in message.items():
        held = [name for name in _CALL_KEYS if _holds_calls(get(value, name)) and get(value, name) != message.get(name)]
        if held and key != "additional_kwargs":
            raise DataError(f"`{key}` holds {held[0]}; calls stand under tool_calls of the message: move them there")
    beside = as_object(message.get("additional_kwargs"))
    found = {key: beside[key] for key in _BESIDE if beside.get(key) and not message.get(key)}
    if message.get("tool_calls"):  # LangChain reads them out of either of the two
        found = without(found, *_CALL_KEYS)
    return {**without(message, "additional_kwargs"), **found} if beside else message


def _holds_calls(value: object) -> bool:
    """Whether what stands beside the known keys may be calls; a list of their names, ["f"], is none."""
    items = value if isinstance(value, list) else [value]
    are_names = all(isinstance(item, str) and _IS_NAME.fullmatch(item) for item in items)
    return isinstance(value, (dict, list)) and bool(value) and not are_names


def _with_content(message: RawRow) -> RawRow:
    """The message with its text under `content`, where nothing stands there.

    {"role": "tool", "output": {"t": 20}} -> {"role": "tool", "content": {"t": 20}}

    Raises:
        DataError: two keys could hold it, or one that is an answer's elsewhere.
    """
    if not _is_empty(message.get("content")):
        return message
    is_result = message.get("role") in _RESULT_ROLES
    keys = (*TEXT_KEYS, *RESULT_KEYS) if is_result else TEXT_KEYS
    given = {key: message[key] for key in keys if _says(message.get(key), is_result)}
    others = [key for key in (*RESULT_KEYS, *_BLOCK_KEYS) if key not in keys and _says(message.get(key), False)]
    if others:
        key = others[0]
        raise DataError(
            f"has no content, but `{key}`, {short(message[key])}; what a message says stands under content, and what "
            "a tool answered in a message of role tool: move it there, or remove it"
        )
    if not given:
        return message
    content, *rest = given.values()
    if any(value != content for value in rest):
        raise DataError(f"has no content, but {' and '.join(given)}, which differ; write one of them as content")
    return {**without(message, *given), "content": content}


def _is_empty(value: object) -> bool:
    return value is None or value in ("", [])


def _says(value: object, with_numbers: bool) -> bool:
    """Whether a value may be what a message says; a number beside a text is a score, but may be a tool's result."""
    if isinstance(value, (bool, int, float)):
        return with_numbers
    return not _is_empty(value) and value != {}


def _with_text(part: object) -> object:
    """A text part with its text under `text`.

    {"type": "text", "content": "hi"}, {"type": "text", "text": {"value": "hi"}} -> {"type": "text", "text": "hi"}
    """
    if not isinstance(part, dict) or part.get("type") != "text":
        return part
    text = part.get("text")
    if isinstance(get(text, "value"), str):  # OpenAI's Assistants
        return {**part, "text": get(text, "value")}
    for key in ("content", "value"):
        if text is None and isinstance(part.get(key), str):
            return {**without(part, key), "text": part[key]}
    return part
