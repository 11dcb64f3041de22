"""Calls in the syntax of other models, which a model that has lost Gemma's falls back to.

Nothing here reads such a call: a server for Gemma would not. It only tells that one was attempted, so that evaluation
does not take it for plain text. There are two kinds, and neither is a text that only speaks of calls:

- a marker of another format with what belongs behind it, anywhere but right behind a backtick;
- JSON of a call and of nothing else, with which the text begins or ends, in a fence or not. JSON inside a sentence or
  between two paragraphs is an example; JSON with other keys is data, or the declaration of a tool.
"""

import json
import re
from itertools import islice
from typing import Any

_MARKED = re.compile(
    r"""
    (?<!`)(?:
      <\|?(?:tool_?calls?|function_?calls?|tool_?use|tool_?code)\|?>\s*+           # Hermes, Qwen, Phi, GLM, XML
        (?:[{\[]|<(?:function|invoke|name|tool_name)\b|[\w.:-]++(?:[({]|\s*+<arg_key>))
    | <function=[^<>\s]++>\s*+(?:\{|<parameter=|</function>)                       # Llama, Qwen Coder
    | <invoke\s+name\s*=
    | <start_function_call>\s*+call:                                               # FunctionGemma
    | <\|python_tag\|>\s*+(?:\{|import\b|[\w.]++\()                                # Llama
    | \[TOOL_CALLS\]\s*+(?:[\[{]|[\w.:-]++\s*+(?:\{|\[ARGS\]|\[CALL_ID\]))         # Mistral
    | <[|｜]tool[_▁]calls?[_▁](?:section[_▁])?begin[|｜]>                          # DeepSeek, Kimi
    | <\|channel\|>commentary\s+to=                                                # gpt-oss
    )
    | ^[ \t]*+`{3,}[ \t]*+(?:tool_code|tool_calls?|function_calls?)\s++[^\s`]      # Gemma before 4
    | ^tool_code[ \t]*+\n\s*+\S
    | ^Action:[ \t]*+\S++[ \t]*+\n+Action[ ]Input:                                 # ReAct
    | \A\[\s*+[^\W\d][\w.]*+\(\s*+(?=\)|[^\W\d]\w*+\s*+=[^=]).*\)\s*+\]\Z          # a list of Python calls, alone
    """,
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)

# JSON: where it may begin, what may stand before it at the start of the text, and behind it at the end.
_LINE_START = re.compile(r"^[ \t]*+(?:`{3,}+\w*+[ \t]*+)?(?=[{\[])", re.MULTILINE)
_OPENING = re.compile(r"\s*+(?:`{3,}+\w*+\s*+)?")
_CLOSING = re.compile(r"[\s`]*+\Z")
_MAX_LINES = 1000  # each error of the decoder counts the lines before it
_DECODER = json.JSONDecoder(strict=False, parse_int=float)  # int() refuses thousands of digits
_WRAPPERS = ("tool_calls", "tool_call", "function_calls", "function_call")
_NAMES = ("name", "tool", "tool_name", "function")
_ARGUMENTS = ("arguments", "parameters", "args")
_BESIDE = {"id", "call_id", "type", "index", "status"}


def holds_foreign_call(text: str) -> bool:
    """Whether `text` attempts a call in the syntax of another model. Never raises; time linear in the length."""
    return bool(_MARKED.search(text)) or _holds_json_call(text)


def _holds_json_call(text: str) -> bool:
    opening = _OPENING.match(text)
    first = opening.end() if opening else 0
    end = 0  # all JSON before it was looked at
    for line in islice(_LINE_START.finditer(text), _MAX_LINES):
        start = line.end()
        if start < end:
            continue
        try:
            value, end = _DECODER.raw_decode(text, start)
        except json.JSONDecodeError as error:
            end = error.pos  # going on from here, and not from the next line, reads nothing twice
            continue
        except RecursionError:
            return False
        if _are_calls(value) and (start == first or _CLOSING.match(text, end)):
            return True
    return False


def _are_calls(value: Any) -> bool:
    """Whether a JSON value is a call, a list of calls, or a message that holds calls."""
    if isinstance(value, dict):
        value = next((value[key] for key in _WRAPPERS if value.get(key)), value)
    calls = value if isinstance(value, list) else [value]
    return bool(calls) and all(map(_is_call, calls))


def _is_call(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    if isinstance(value.get("function"), dict):
        value = value["function"]
    names = [value[key] for key in _NAMES if key in value]
    arguments = [value[key] for key in _ARGUMENTS if key in value]
    if len(names) != 1 or len(arguments) != 1 or not value.keys() <= {*_NAMES, *_ARGUMENTS, *_BESIDE}:
        return False
    (name,), (given,) = names, arguments
    if not isinstance(name, str) or name.split() != [name]:  # a tool's name has no blanks
        return False
    if isinstance(given, str):
        return given.lstrip().startswith("{")  # OpenAI's form: an object as JSON text
    declares = isinstance(given, dict) and given.get("type") == "object"  # the schema of a tool's parameters
    return isinstance(given, dict) and not declares
