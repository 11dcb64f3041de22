"""What only looks like a call of a declared tool: words about calls, code and data.

"Use `f(a=1)`."                                    words in backticks
"```js\\nconst r = await f('/api')\\n```"            code in a fence: more than calls, or with words behind the fence
'{"tool": "f", "why": "x"}'                        data: neither arguments nor a parameter of the tool beside its name
"<text><tspan>hi</tspan></text>"                   markup: no tag in it is a parameter of the tool
'[{"name": "f", "parameters": {...}}]'             declarations of tools
'  File "main.py", line 3, in <module>\\n    f()'   a traceback
"""

import json
import re
from itertools import islice
from typing import Any

from gemma_dist.data.call_markers import DECODER, FLAGS, MARKED
from gemma_dist.data.foreign import find_attempt
from gemma_dist.data.layouts.call_syntax import Signatures, any_of
from gemma_dist.data.layouts.system_text import find_listing
from gemma_dist.data.strict import as_object, get

_MARKED = re.compile(MARKED, FLAGS)
_IN_BACKTICKS = re.compile(r"(?<!`)`(?!`)[^`\n]+`(?!`)")
_FENCE = re.compile(
    r"^[ \t]*+(`{3,}+|~{3,}+)[ \t]*+([\w+#.-]*+)[^\n`]*+\n(.*?)(?:^[ \t]*+\1[ \t]*+$|\Z)", re.DOTALL | re.MULTILINE
)
_DATA_LANGUAGES = ("json", "jsonc", "json5", "jsonl", "xml", "tool_code", "tool_call", "tool_calls", "function_call")
_CALL_LANGUAGES = ("", "py", "python", "python3", "text", "plaintext")
ARGUMENTS_KEY = re.compile(r"""["'](?:arguments|parameters)["']\s*:""")
_TRACEBACK_LINES = re.compile(r'^[ \t]*+File "[^"\n]++", line \d++[^\n]*+\n[^\n]*+', re.MULTILINE)
_CHILD = re.compile(r"<([\w.-]++)>")
_JSON_START = re.compile(r"""[{\[](?=\s*+["{\[])""")
_MAX_STARTS = 1000  # of JSON: each error of the decoder counts the lines before it
_MAX_ELEMENTS = 100  # of markup: each is read to the end of the text
_NAME_KEYS = (
    *("name", "tool_name", "function_name", "tool", "function", "tool_call", "function_call", "action", "call"),
)
_ARGUMENT_KEYS = (
    *("arguments", "parameters", "args", "params", "kwargs", "input"),
    *("action_input", "tool_input", "tool_args", "tool_arguments", "function_args"),
)
_BESIDE = ("id", "call_id", "tool_call_id", "type", "index", "status")


def find_attempt_beside_words(text: str, signatures: Signatures) -> re.Match[str] | None:
    """What evaluation would take for the attempt of a call, and is neither words about one, code nor data."""
    if not signatures or not find_attempt(text, signatures):
        return None
    for pattern in (_FENCE, _IN_BACKTICKS, _TRACEBACK_LINES):
        text = pattern.sub(lambda found: found[0] if _may_call(found, signatures) else _blanks(found[0]), text)
    text = _without_data(without_declarations(text), signatures)
    return find_attempt(_without_markup(text, signatures), signatures)


def _may_call(found: re.Match[str], signatures: Signatures) -> bool:
    """Whether what was found is a fence that may attempt a call."""
    return found.re is _FENCE and not _is_code(found, signatures)


def _blanks(text: str) -> str:
    return " " * len(text)


# ---- code ------------------------------------------------------------------------------------------------------------


def is_code(text: str, signatures: Signatures) -> bool:
    """Whether a text is a fence of code and nothing else."""
    fence = _FENCE.fullmatch(text.strip())
    return bool(fence and signatures and _is_code(fence, signatures))


def _is_code(fence: re.Match[str], signatures: Signatures) -> bool:
    """Whether a fence holds code: neither JSON, nor a call alone with which the text ends."""
    language, body = fence[2].lower(), fence[3].strip()
    if language in _DATA_LANGUAGES or _MARKED.search(body):
        return False
    if language not in _CALL_LANGUAGES:
        return True
    if body.startswith(("{", "[", "<")) or (language != "python" and ARGUMENTS_KEY.search(body)):
        return False
    has_words_behind = bool(fence.string[fence.end() :].strip())
    begins_with_call = re.match(rf"(?:print\()?(?:default_api\.)?(?:{any_of(signatures)})\(", body)
    return has_words_behind or not begins_with_call


# ---- data ------------------------------------------------------------------------------------------------------------


def without_declarations(text: str) -> str:
    """The text without the JSON that declares tools."""
    listing = find_listing(text) if '"parameters"' in text else None
    if listing is None:
        return text
    functions = [get(tool, "function") or tool for tool in listing.tools]
    if not all(is_schema(get(function, "parameters")) for function in functions):
        return text
    return text[: listing.start] + text[listing.end :]


def is_schema(value: object) -> bool:
    """Whether what stands under `parameters` or `arguments` is the schema of arguments, and not arguments."""
    return get(value, "type") == "object" and "properties" in as_object(value)


def _without_data(text: str, signatures: Signatures) -> str:
    """The text with blanks for JSON that calls no tool."""
    end = 0  # all JSON before it was looked at
    for found in islice(_JSON_START.finditer(text), _MAX_STARTS):
        start = found.start()
        if start < end:
            continue
        try:
            value, end = DECODER.raw_decode(text, start)
        except json.JSONDecodeError as error:
            end = error.pos
            continue
        except RecursionError:
            break
        if _is_data(value, signatures):
            text = text[:start] + _blanks(text[start:end]) + text[end:]
    return text


def _is_data(value: Any, signatures: Signatures) -> bool:
    """Whether a JSON value calls no tool, at any depth."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str) and find_attempt(item, signatures):
            return False
        if isinstance(item, list):
            waiting += item
        if isinstance(item, dict):
            if _calls(item, signatures):
                return False
            waiting += item.values()
    return True


def _calls(item: dict[str, Any], signatures: Signatures) -> bool:
    """Whether an object names a tool, alone or with arguments or a parameter of it: {"tool": "f", "city": "Rome"}."""
    for key in _NAME_KEYS:
        named = item.get(key)
        tool = named.removeprefix("functions.").removeprefix("default_api.") if isinstance(named, str) else ""
        if tool not in signatures:
            continue
        others = item.keys() - {key, *_BESIDE}
        if not others or others & signatures[tool].keys():
            return True
        if any(name in item and not is_schema(item[name]) for name in _ARGUMENT_KEYS):
            return True
    for key in item.keys() & signatures.keys():
        given = item[key]
        if isinstance(given, dict) and (not given or given.keys() & signatures[key].keys()):
            return True
    return False


def _without_markup(text: str, signatures: Signatures) -> str:
    """The text with blanks for elements that have a tool's name, but children that are no parameters of it."""
    opener = re.compile(rf"<({any_of(signatures)})>")
    for found in islice(opener.finditer(text), _MAX_ELEMENTS):
        start, inside = found.span()
        end = text.find(f"</{found[1]}>", inside)  # -1: it is not closed, and has no children
        children = set(_CHILD.findall(text, inside, max(inside, end)))
        if children and not children & signatures[found[1]].keys():
            text = text[:start] + _blanks(text[start:end]) + text[end:]
    return text
