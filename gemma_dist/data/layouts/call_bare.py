"""Calls without a marker: JSON, Python or XML with the name of a declared tool, at the end of a message.

'I call: {"name": "f", "arguments": {"a": 1}}'      ->  before "I call:", style "JSON"
"Sure.\\n```python\\nf(a=1)\\n```"                   ->  before "Sure.", style "Python"

Where tools are declared, whatever evaluation would take for an attempt (`foreign.py`) is converted or refused.
"""

import functools
import re
from dataclasses import dataclass
from itertools import islice
from typing import Any

from gemma_dist.data.foreign import find_attempt
from gemma_dist.data.layouts.call_syntax import Signatures, any_of, read_calls
from gemma_dist.data.layouts.call_words import (
    ARGUMENTS_KEY,
    find_attempt_beside_words,
    is_schema,
    without_declarations,
)
from gemma_dist.data.strict import short
from gemma_dist.errors import DataError

_CODE = re.compile(r"(`{3,}+)(?!\s*(?:tool_code|tool_calls?|function_calls?)\b).*?(?:\1|\Z)|`[^`\n]+`", re.DOTALL)
_JSON_LINE = re.compile(r"^[ \t]*+(?=\[?\s*+\{)", re.MULTILINE)
_FENCE_OPENER = re.compile(r"`{3,}+(?:json|python|py|xml)?\s*")
_ACTION = re.compile(r"^[ \t]*Action:\s*\Z", re.MULTILINE)  # Command R's word for the calls behind it
_CLOSERS = {"{": "}", "[": "]", "<": ">"}
_MAX_STARTS = 20  # each is read to the end of the text
_REMEDY = "write it under `tool_calls`, or set train: false on the message if it shows a mistake"


@dataclass(frozen=True)
class WrittenCalls:
    """Calls that a message writes as text, and what it says before them."""

    before: str
    style: str
    calls: list[dict[str, Any]]


def refusal(style: str, error: object) -> DataError:
    """Why calls in the syntax of `style` cannot be converted, and what to write instead."""
    return DataError(f"writes a call as text in the style of {style}, which cannot be converted: {error}; {_REMEDY}")


def without_code(text: str) -> str:
    """The text with blanks for what stands in backticks, but for fences whose language says that they hold calls."""
    return _CODE.sub(lambda code: " " * len(code[0]), text)


def find_bare(
    thought: str, said: str, signatures: Signatures, *, is_answered: bool, is_asked_on: bool
) -> WrittenCalls | None:
    """Calls without a marker at the end of what a message says behind its thought; None where it attempts none.

    Args:
        is_answered: a tool's result follows.
        is_asked_on: a user goes on, who waits for no call.

    Raises:
        DataError: calls are attempted that cannot be converted.
    """
    others = without_declarations(said)
    if others != said and not find_attempt(others, signatures):
        return None
    written = _find_lines(thought, said, signatures)
    words = said if written is None else written.before
    if not find_attempt_beside_words(words, signatures):
        return written
    if written is None and not is_answered and _ends_in_python(said, signatures):
        if not is_asked_on:
            raise refusal(
                "Python",
                "in a fence behind words, and without a result, it may be an example as well; an example has words "
                "behind it",
            )
        words = _last_fence(said)[0]  # and an example behind it
    elif written is None:
        written = _find_inline(thought, said, signatures)
        words = said if written is None else written.before
    attempt = find_attempt_beside_words(words, signatures)
    if attempt:
        raise refusal(
            "another model",
            f"at {short(words[attempt.start() :].strip())} stands what looks like a call, and calls are read where "
            "nothing follows them; words about a call stand in `backticks`, or in a fence with words behind it",
        )
    return written


def _ends_in_python(said: str, signatures: Signatures) -> bool:
    """Whether words end in a fence with Python calls: "Then call it:\\n```python\\nf(a=1)\\n```"."""
    before, inside = _last_fence(said)
    is_python = not inside.startswith(("{", "[", "<")) and not _ACTION.search(before)
    return bool(before.strip() and is_python and _try_read(inside, signatures))


def _find_lines(thought: str, said: str, signatures: Signatures) -> WrittenCalls | None:
    """Calls as JSON or `[f(a=1)]` from the start of a line to the end, or as Python alone."""
    outside, names = without_code(said), functools.partial(any_of, signatures)
    # What a pattern begins with is looked for first: to compile the names of a row's tools takes longer than its text.
    if "Action" in outside and re.search(
        rf"^Action(?: \d+)?:[ \t]*(?:{names()})[ \t]*(?:[\[(]|$)", outside, re.MULTILINE
    ):
        raise refusal("ReAct", "its thoughts and results are text as well")
    line = _JSON_LINE.search(outside)
    if line and _names_call(said[line.end() :], names()):
        start, style = line.end(), "JSON"
    else:
        python = re.search(rf"^[ \t]*+\[\s*+(?:{names()})\(", outside, re.MULTILINE) if "[" in outside else None
        may_be_alone = signatures and said.lstrip().startswith(("print(", "default_api.", "[", *signatures))
        alone = may_be_alone and re.match(rf"\s*(?:print\()?(?:default_api\.)?(?:{names()})\(|\s*\[", said)
        if not python and not (alone and _is_python_alone(said, signatures)):
            return None
        start, style = (python.start() if python else 0), "Python"
    try:
        calls = read_calls(said[start:], signatures)
    except DataError as error:
        raise refusal(style, error) from None
    if style == "JSON" and not all(_is_call(call, signatures) for call in calls):
        return None
    return WrittenCalls((thought + said[:start]).strip(), style, calls)


def _find_inline(thought: str, said: str, signatures: Signatures) -> WrittenCalls | None:
    """Calls of declared tools behind other words, in a fence or not, to the end of the text."""
    before_fence, inside = _last_fence(said)
    if inside:
        calls = _try_read(inside, signatures)
        before = _ACTION.sub("", before_fence)
        return WrittenCalls((thought + before).strip(), "a fence", calls) if calls else None
    opener = rf"(?:print\()?(?:default_api\.)?(?:{any_of(signatures)})\("
    starts = re.compile(rf"""(?<![^\s:])(?:[\[{{](?=\s*+["'{{\[]|\s*+{opener})|<(?={any_of(signatures)})|{opener})""")
    for start in islice(starts.finditer(said), _MAX_STARTS):
        closer = _CLOSERS.get(start[0], ")")
        if not said.endswith(closer):
            continue
        calls = _try_read(said[start.start() :], signatures)
        if calls:
            style = "Cline" if start[0] == "<" else "JSON" if closer == "}" else "Python"
            return WrittenCalls((thought + said[: start.start()]).strip(), style, calls)
    return None


def _last_fence(text: str) -> tuple[str, str]:
    """What stands before the fence with which the text ends, and inside of it; ("", "") where it ends in none."""
    if not text.endswith("```"):
        return "", ""
    end = len(text.rstrip("`"))
    start = text.rfind("```", 0, end)
    opener = _FENCE_OPENER.match(text, start) if start >= 0 else None
    return (text[:start], text[opener.end() : end].strip()) if opener else ("", "")


def _try_read(text: str, signatures: Signatures) -> list[dict[str, Any]]:
    """The calls of declared tools that a text is; none where it is something else."""
    try:
        calls = read_calls(text, signatures)
    except DataError:
        return []
    are_calls = all(_is_call(call, signatures) for call in calls)
    if text.startswith("<"):  # else it is other markup
        are_calls = are_calls and all(_has_parameters_alone(call, signatures) for call in calls)
    return calls if are_calls else []


def _has_parameters_alone(call: dict[str, Any], signatures: Signatures) -> bool:
    """Whether each argument of a call is a parameter of its tool."""
    function = call["function"]
    return function["arguments"].keys() <= signatures.get(function["name"], {}).keys()


def _names_call(text: str, names: str) -> bool:
    """Whether JSON, broken or not, holds the name of a tool and a key for its arguments."""
    names_tool = re.search(rf"""["']name["']\s*:\s*["'](?:{names})["']""", text)
    return bool(names_tool and ARGUMENTS_KEY.search(text))


def _is_python_alone(said: str, signatures: Signatures) -> bool:
    """Whether the text is calls and nothing else; other code is data."""
    try:
        return bool(read_calls(said, signatures)) and not said.lstrip().startswith("[{")
    except DataError:
        return False


def _is_call(call: dict[str, Any], signatures: Signatures) -> bool:
    """Whether a JSON value is a call, and neither data with a name nor the declaration of a tool."""
    function = call["function"]
    if not isinstance(function, dict) or function.keys() != {"name", "arguments"}:
        return False
    declares = is_schema(function["arguments"])
    return not declares and (not signatures or function["name"] in signatures)
