"""Where a message writes calls as text: what stands before them, whose syntax it is, and the calls.

"I look.\\n<tool_call>\\n{'name': 'f', 'arguments': {'a': 1}}\\n</tool_call>"
  ->  before "I look.", style "Hermes", calls [{"function": {"name": "f", "arguments": {"a": 1}}}]
"""

import re
from dataclasses import dataclass
from typing import Any

from gemma_dist.data.call_markers import FLAGS, MARKED
from gemma_dist.data.layouts.call_syntax import BLANKS, Signatures, TextBesideCalls, read_calls, skip
from gemma_dist.data.literals import parse_calls, parse_literal
from gemma_dist.data.strict import get, short
from gemma_dist.errors import DataError

# Whose syntax a marker is. The first that matches where the calls begin says it.
_STYLES = (
    (r"<TOOLCALL>", "Nemotron"),
    (r"<functioncall>", "glaive"),
    (r"<\|?tool_?call\|?>\s*[\w./:-]+\s*<arg_key>", "GLM"),
    (r"<\|?tool_?call\|?>\s*<function=|<function=[^>]+>\s*(?:<parameter|</function>)", "Qwen Coder"),
    (r"<\|?(?i:tool_?calls?)\|?>", "Hermes"),
    (r"<function_calls?>\s*<invoke|<invoke", "Claude"),
    (r"<function=|<\|python_(?:tag|start)\|>", "Llama"),
    (r"\[TOOL_CALLS\]", "Mistral"),
    (r"[ \t]*`{3,}[ \t]*tool_code|tool_code", "Gemma 3"),
)
_NAMES = r"(?i:tool_?calls?|function_?calls?|tool_?use|tool_?code)"
_TAG_END = r"(?:<\|?/\1\|?>|(?=<\|?\1\|?>)|\Z)"
_TAGGED = re.compile(rf"<\|?({_NAMES})\|?>(.*?){_TAG_END}", re.DOTALL)
# The same, but for tags inside of the strings of JSON or Python.
_STRING = r""""(?:\\.|[^"\\])*+"|'(?:\\.|[^'\\])*+'"""
_TAGGED_JSON = re.compile(rf"<\|?({_NAMES})\|?>(\s*[{{\[](?:{_STRING}|\\.|(?!{_TAG_END}).)*+){_TAG_END}", re.DOTALL)
_MISTRAL = re.compile(
    r"\[TOOL_CALLS\]\s*([\w./:-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(\{.*?\})\s*(?=\[TOOL_CALLS\]|\Z)",
    re.DOTALL,
)
# The calls are all that follows.
_OPEN_TO_END = re.compile(r"\[TOOL_CALLS\]|<\|python_(?:tag|start)\|>|tool_code[ \t]*\n")
_CALL_FENCE = re.compile(r"[ \t]*+`{3,}+[ \t]*+(?:tool_code|tool_calls?|function_calls?)\s+(.*?)`{3,}", re.DOTALL)
_WHOLE_FENCE = re.compile(r"\s*`{3,}+\w*\s*\n(.*?)\n?\s*`{3,}\s*", re.DOTALL)
_THOUGHT = re.compile(r".*</think(?:ing)?>\s*", re.DOTALL)
_END_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_end|>",
    "<|end|>",
    "</s>",
)
_CODE = re.compile(r"(`{3,}+)(?!\s*(?:tool_code|tool_calls?|function_calls?)\b).*?(?:\1|\Z)|`[^`\n]+`", re.DOTALL)
_MARKED = re.compile(MARKED, FLAGS)
_GEMMA_CALL = re.compile(r"<\|tool_call>")
_JSON_LINE = re.compile(r"^[ \t]*+(?=\[?\s*+\{)", re.MULTILINE)
_ARGUMENTS_KEY = re.compile(r"""["'](?:arguments|parameters)["']\s*:""")
_REMEDY = "write it under `tool_calls`, or set train: false on the message if it shows a mistake"


@dataclass(frozen=True)
class WrittenCalls:
    """Calls that a message writes as text, and what it says before them."""

    before: str
    style: str
    calls: list[dict[str, Any]]


def find_calls(text: str, signatures: Signatures, *, is_answered: bool, is_last: bool) -> WrittenCalls | None:
    """The calls at the end of a message's text; None where it attempts none.

    Args:
        signatures: the declared tools. Without them a marker is an attempt only in front of a result, or in the last
            message with nothing around the calls.
        is_answered: a tool's result follows.
        is_last: nothing follows.

    Raises:
        DataError: calls are attempted that cannot be converted.
    """
    thought = _THOUGHT.match(text)
    first = thought.end() if thought else 0
    said = _without_end(text[first:])
    is_expected = bool(signatures) or is_answered
    fence = _WHOLE_FENCE.fullmatch(said)
    if fence and is_expected and not _CALL_FENCE.match(said):
        said = fence[1]
    marker = _MARKED.search(_without_code(said))
    if marker is None:
        return _find_bare(text[:first], said, signatures) if is_expected else None
    start = marker.start()
    if _GEMMA_CALL.match(said, start):
        return None  # the check of control tokens refuses it
    if not is_expected and (said[:start].strip() or not is_last):
        return None
    style = _style(said[start:])
    try:
        calls = _read_marked(said[start:], signatures)
    except TextBesideCalls as error:
        if not is_expected:
            return None
        raise _refusal(style, error) from None
    except DataError as error:
        raise _refusal(style, error) from None
    return WrittenCalls((text[:first] + said[:start]).strip(), style, calls)


def _refusal(style: str, error: object) -> DataError:
    """Why calls in the syntax of `style` cannot be converted, and what to write instead."""
    return DataError(f"writes a call as text in the style of {style}, which cannot be converted: {error}; {_REMEDY}")


def _style(text: str) -> str:
    """Whose syntax a text begins with: "Hermes" of '<tool_call>{...'."""
    for pattern, name in _STYLES:
        if re.match(pattern, text):
            return name
    return "another model"


def _without_end(text: str) -> str:
    """The text without blanks and the tokens with which other models end at its end."""
    text = text.rstrip()
    while text.endswith(_END_TOKENS):
        text = text[: text.rindex("<")].rstrip()
    return text


def _without_code(text: str) -> str:
    """The text with blanks for what stands in backticks, but for fences whose language says that they hold calls."""
    return _CODE.sub(lambda code: " " * len(code[0]), text)


def _read_marked(text: str, signatures: Signatures) -> list[dict[str, Any]]:
    """The calls of a text that begins with a marker. DataError if anything else stands in it."""
    if text.startswith(("<function=", "<invoke")):
        return read_calls(text, signatures)
    if _MISTRAL.match(text):
        return _read_mistral(text)
    rest_marker = _OPEN_TO_END.match(text)
    if rest_marker:
        return read_calls(text[rest_marker.end() :], signatures)
    block = _CALL_FENCE if _CALL_FENCE.match(text) else _TAGGED
    calls: list[dict[str, Any]] = []
    position = 0
    while text[position:].strip():
        match = block.match(text, position)
        if match is None:
            raise TextBesideCalls(f"{short(text[position:].strip())} stands there, too; calls come last in a message")
        try:
            calls += _read_block(match, signatures)
        except DataError:
            match = _TAGGED_JSON.match(text, position)
            if match is None:
                raise
            calls += _read_block(match, signatures)
        position = skip(BLANKS, text, match.end())
    if not calls:
        raise DataError("no call stands in it")
    return calls


def _read_block(block: re.Match[str], signatures: Signatures) -> list[dict[str, Any]]:
    """The calls between two tags, or in a fence; none where nothing stands there."""
    inside = block[block.lastindex or 0].strip()
    if not inside:
        return []
    return _read_marked(inside, signatures) if _TAGGED.match(inside) else read_calls(inside, signatures)


def _read_mistral(text: str) -> list[dict[str, Any]]:
    """`[TOOL_CALLS]f[ARGS]{"a": 1}`, one or several."""
    calls: list[dict[str, Any]] = []
    position = 0
    while position < len(text):
        match = _MISTRAL.match(text, position)
        if match is None:
            raise TextBesideCalls(f"{short(text[position:])} is no call in the form of the others")
        calls += parse_calls({"name": match[1], "arguments": parse_literal(match[2])}, from_text=True)
        position = match.end()
    return calls


# ---- without a marker ------------------------------------------------------------------------------------------------


def _find_bare(thought: str, said: str, signatures: Signatures) -> WrittenCalls | None:
    """Calls without a marker: JSON or `[f(a=1)]` from the start of a line to the end, or a Python call alone."""
    names = "|".join(map(re.escape, sorted(signatures))) or r"[\w./:-]+"
    outside = _without_code(said)
    react = re.search(rf"^Action:[ \t]*(?:{names})[ \t]*\n+Action Input:", outside, re.MULTILINE)
    if react:
        raise _refusal("ReAct", "its thoughts and results are text as well")
    line = _JSON_LINE.search(outside)
    if line and _names_call(said[line.end() :], names):
        start, style = line.end(), "JSON"
    else:
        python = re.search(rf"^[ \t]*+\[\s*+(?:{names})\(", outside, re.MULTILINE)
        alone = re.match(rf"\s*(?:print\()?(?:default_api\.)?(?:{names})\(|\s*\[", said) if signatures else None
        if not python and not (alone and _is_python_alone(said, signatures)):
            return None
        start, style = (python.start() if python else 0), "Python"
    try:
        calls = read_calls(said[start:], signatures)
    except DataError as error:
        raise _refusal(style, error) from None
    if style == "JSON" and not all(_is_call(call, signatures) for call in calls):
        return None
    return WrittenCalls((thought + said[:start]).strip(), style, calls)


def _names_call(text: str, names: str) -> bool:
    """Whether JSON, broken or not, holds the name of a tool and a key for its arguments."""
    names_tool = re.search(rf"""["']name["']\s*:\s*["'](?:{names})["']""", text)
    return bool(names_tool and _ARGUMENTS_KEY.search(text))


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
    arguments = function["arguments"]
    declares = get(arguments, "type") == "object" and "properties" in arguments
    return not declares and (not signatures or function["name"] in signatures)
