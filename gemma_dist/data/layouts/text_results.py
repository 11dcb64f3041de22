"""Results of tools that a row writes as text, as the tool messages that answer its calls.

<tool_response>{"name": "f", "content": 20}</tool_response>   Hermes, Qwen: also several, and text behind them
<TOOL_RESPONSE>[{"t": 20}, {"t": 30}]</TOOL_RESPONSE>         Nemotron: one for each call
FUNCTION RESPONSE: {"t": 20}                                  glaive
[{"name": "f", "results": {"t": 20}}]                         ToolACE, from a tool
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from gemma_dist.data.literals import as_text, parse_literal
from gemma_dist.data.strict import as_list, get, short, without
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

_BLOCK = re.compile(r"\s*<(tool_response|TOOL_RESPONSE|tool_results?|function_results?)>(.*?)</\1>\s*", re.DOTALL)
_PREFIX = re.compile(r"\s*FUNCTION RESPONSE:\s*", re.IGNORECASE)
_FENCE = re.compile(r"\s*`{3,}tool_output\s*\n(.*?)\n?`{3,}\s*", re.DOTALL)
_CONTENT_KEYS = ("content", "results", "result", "response", "output")
_IDS = ("tool_call_id", "call_id", "id")


@dataclass(frozen=True)
class TextResult:
    """What one call gave: the function's name, where the text says it, and the result."""

    name: str
    content: object


def holds_result(message: object) -> bool:
    """Whether a message is a tool's result, as a tool's message or as the text of a user's."""
    role, content = get(message, "role"), get(message, "content")
    if role in ("tool", "function"):
        return True
    if role != "user" or not isinstance(content, str):
        return False
    return any(pattern.match(content) for pattern in (_BLOCK, _PREFIX, _FENCE))


def read_results(message: RawRow, called: Collection[str], num_calls: int) -> tuple[list[TextResult], str]:
    """The results in a message after calls of these names, and what a user says behind them."""
    content = message.get("content")
    if not isinstance(content, str):
        return [TextResult(_name(message), content)], ""
    results: list[TextResult] = []
    position = 0
    block = _BLOCK if _BLOCK.match(content) else _FENCE
    while match := block.match(content, position):
        results += _results(match[match.lastindex or 0], called, num_calls)
        position = match.end()
    if results:
        return results, content[position:]
    text = _PREFIX.sub("", content, count=1) if _PREFIX.match(content) else content
    if _name(message):
        return [TextResult(_name(message), text)], ""
    return _results(text, called, num_calls), ""


def _name(message: RawRow) -> str:
    """The name of the tool that a message says it is of; "" where it says none."""
    name = message.get("name")
    return name if isinstance(name, str) else ""


def _results(text: str, called: Collection[str], num_calls: int) -> list[TextResult]:
    """The results that one block says: a list of named ones, or one for each of several calls, or itself alone."""
    try:
        value = parse_literal(text)
    except DataError:
        return [TextResult("", text.strip())]
    named = _named(value, called)
    if named is not None:
        return [named]
    items = as_list(value)
    all_named = [_named(item, called) for item in items]
    complete = [result for result in all_named if result is not None]
    if complete and len(complete) == len(items):
        return complete
    if num_calls > 1 and len(items) == num_calls:
        return [TextResult("", as_text(item)) for item in items]
    return [TextResult("", text.strip())]


def _named(value: object, called: Collection[str]) -> TextResult | None:
    """The result in {"name": "f", "content": ...}, where f was called; None where the value is anything else."""
    if not isinstance(value, dict) or value.get("name") not in called:
        return None
    said = list(without(value, "name", *_IDS))
    if len(said) != 1 or said[0] not in _CONTENT_KEYS:
        return None
    return TextResult(value["name"], as_text(value[said[0]]))


def match_results(results: list[TextResult], calls: list[str]) -> list[RawRow]:
    """Tool messages that answer the calls of these names: by the names that the results give, or in order.

    Raises:
        DataError: there are more or fewer results than calls, or one of a tool that was not called.
    """
    if len(results) != len(calls):
        raise DataError(
            f"holds {len(results)} results for {len(calls)} calls ({', '.join(calls)}); "
            "write one tool message for each call"
        )
    waiting = list(calls)
    messages: list[RawRow] = []
    for result in results:
        name = result.name or waiting[0]
        if name not in waiting:
            raise DataError(f"holds a result of {short(name)}, but {', '.join(waiting)} wait for one; mend the name")
        waiting.remove(name)
        messages.append({"role": "tool", "name": name, "content": result.content})
    return messages
