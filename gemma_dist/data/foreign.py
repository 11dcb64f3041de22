"""Calls in the syntax of other models, which a model that has lost Gemma's falls back to.

Nothing here reads such a call: a server for Gemma would not. It only tells that one was attempted, so that evaluation
does not take it for plain text. A marker of another format with what belongs behind it is an attempt by itself,
anywhere but right behind a backtick. Beyond that:

- Where tools are declared, a declared name in call position is an attempt, whatever stands around it and however
  broken it is. Other JSON and code is data, and a name in a sentence is a word.
- Where none are, JSON of a call and of nothing else is, with which the text begins or ends, in a fence or not. JSON
  inside a sentence or between two paragraphs is an example; JSON with other keys is data, or declares a tool.
"""

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from typing import Any

from gemma_dist.data.call_markers import DECODER, FLAGS, MARKED, TAG, WRAPPERS

_STRICT = re.compile(
    rf"""{MARKED}
    | ^Action:[ \t]*+\S++[ \t]*+\n+Action[ ]Input:                                 # ReAct
    | \A\[\s*+[^\W\d][\w.]*+\(\s*+(?=\)|[^\W\d]\w*+\s*+=[^=]).*\)\s*+\]\Z          # a list of Python calls, alone
    """,
    FLAGS,
)

_TAGGED_LINE = rf"^[ \t]*+{TAG}(?=\w|[ \t]*+$)"  # not a word of a sentence
_NAMELESS = re.compile(rf"{MARKED} | {_TAGGED_LINE}", FLAGS)

# JSON: where it may begin, what may stand before it at the start of the text, and behind it at the end.
_LINE_START = re.compile(r"^[ \t]*+(?:`{3,}+\w*+[ \t]*+)?(?=[{\[])", re.MULTILINE)
_OPENING = re.compile(r"\s*+(?:`{3,}+\w*+\s*+)?")
_CLOSING = re.compile(r"[\s`]*+\Z")
_MAX_LINES = 1000  # each error of the decoder counts the lines before it
_NAMES = ("name", "tool", "tool_name", "function")
_ARGUMENTS = ("arguments", "parameters", "args", "input")
_BESIDE = {"id", "call_id", "type", "index", "status"}


def holds_foreign_call(text: str, tool_names: Iterable[str] = ()) -> bool:
    """Whether `text` attempts a call in the syntax of another model, where tools of these names are declared.

    Never raises; time linear in the length.
    """
    names = frozenset(filter(None, tool_names))
    if names:
        return find_attempt(text, names) is not None
    return bool(_STRICT.search(text)) or _holds_json_call(text)


def find_attempt(text: str, tool_names: Iterable[str]) -> re.Match[str] | None:
    """What `holds_foreign_call` finds first in `text`, where tools of these names are declared."""
    names = frozenset(filter(None, tool_names))
    # What all names have in common is looked for first: a pattern of these names takes longer to compile than a row.
    if not names or (any(name in text for name in names) and (_ATTEMPT.search(text) or not all(map(_is_word, names)))):
        return _attempt(names).search(text)
    return _NAMELESS.search(text)


@lru_cache(maxsize=256)
def _attempt(names: frozenset[str]) -> re.Pattern[str]:
    """What an attempt looks like where tools of these names are declared."""
    return _attempt_of(f"(?:{'|'.join(map(re.escape, sorted(names)))})")


def _attempt_of(name: str) -> re.Pattern[str]:
    """As `_attempt`, of any name that a pattern matches."""
    opener = r"""(?:print\(\s*+|(?:default_api|functions|tools?)\.|\[\s*+["']?+|await[ ])"""
    parameter = r"""\w++(?::[ ]?+[\w.\[\]| ]++(?:[ ]?+=[ ]?+[\w.'"]++)?+)?+"""  # "x", "x: str", "x: str = 'a'"
    return re.compile(
        rf"""{MARKED}
    | {_TAGGED_LINE}
    | (?<!`)(?:{TAG}|\[TOOL_CALLS\]|<\|python_tag\|>)\s*+{name}(?![\w.-])
    | ^Action(?:[ ]\d++)?:[ \t]*+{name}[ \t]*+(?:$|\[)                               # ReAct
    | (?<!`)<{name}>\s*+(?:<[\w.-]++>|\{{|</{name}>)                               # Cline
    | (?:["']|[{{,]\s*+)(?:(?:tool_|function_)?name|(?:tool|function)(?:_call)?|action|call)\\*+["']?+\s*+:
        \s*+\\*+["'](?:functions\.|default_api\.)?{name}(?:\\*+["']|\Z)              # the value of a JSON key
    | (?:["']|[{{,]\s*+){name}\\*+["']?+\s*+:\s*+\{{                                  # a JSON key
    | (?: ^[ \t]*+(?:`{{3,}}+(?:\w++[ \t]++)?)?(?:Action:[ \t]*+|\w++[ \t]*+=[ \t]*+)?{opener}{{0,3}}
        | (?<![`\w.(]){opener}{{1,3}} ){name}\(                                        # Python, not behind a backtick
        (?!(?:{parameter}(?:,[ ]?+{parameter})*+)?+\)                                 # nor `f(x, y) tells`,
            (?:[ \t]++[^\W\d]|[ \t]*+(?:->|[-–—:])))                              # `f(x: str) -> int`: words
    """,
        FLAGS,
    )


_NAME = r"[\w./:-]{1,100}"  # of nearly all tools; without a bound each opener would be read to the end of the text
_is_word = lru_cache(maxsize=4096)(re.compile(_NAME).fullmatch)
_ATTEMPT = _attempt_of(_NAME)


def _holds_json_call(text: str) -> bool:
    """Whether `text` begins or ends with JSON that is a call and nothing else, in a fence or not."""
    opening = _OPENING.match(text)
    first = opening.end() if opening else 0  # where JSON starts with which the text begins
    end = 0  # all JSON before it was looked at
    for line in islice(_LINE_START.finditer(text), _MAX_LINES):
        start = line.end()
        if start < end:
            continue
        try:
            value, end = DECODER.raw_decode(text, start)
        except json.JSONDecodeError as error:
            end = error.pos  # continuing from here, and not from the next line, reads nothing twice
            continue
        except RecursionError:
            return False
        if _are_calls(value) and (start == first or _CLOSING.match(text, end)):
            return True
    return False


def _are_calls(value: Any) -> bool:
    """Whether a JSON value is a call, a list of calls, or a message that holds calls."""
    if isinstance(value, dict):
        value = next((value[key] for key in WRAPPERS if value.get(key)), value)
    calls = value if isinstance(value, list) else [value]
    return bool(calls) and all(map(_is_call, calls))


def _is_call(value: Any) -> bool:
    """Whether a JSON value is one call: `{"name": "f", "arguments": {}}`, flat or under `function`, in any of the
    spellings of _NAMES and _ARGUMENTS, and with no other keys but _BESIDE."""
    if not isinstance(value, dict):
        return False
    if isinstance(value.get("function"), dict):
        value = value["function"]
    if not value.keys() <= {*_NAMES, *_ARGUMENTS, *_BESIDE}:
        return False
    names = [value[key] for key in _NAMES if key in value]
    arguments = [value[key] for key in _ARGUMENTS if key in value]
    if len(names) != 1 or len(arguments) != 1:
        return False
    return _is_tool_name(names[0]) and _are_arguments(arguments[0])


def _is_tool_name(name: Any) -> bool:
    return isinstance(name, str) and name.split() == [name]  # without blanks


def _are_arguments(given: Any) -> bool:
    """An object, or an object as JSON text (OpenAI's form). The schema of a tool's parameters is not: it declares."""
    if isinstance(given, str):
        return given.lstrip().startswith("{")
    return isinstance(given, dict) and given.get("type") != "object"
