"""Where a message writes calls as text: what stands before them, whose syntax it is, and the calls.

"I look.\\n<tool_call>\\n{'name': 'f', 'arguments': {'a': 1}}\\n</tool_call>"
  ->  before "I look.", style "Hermes", calls [{"function": {"name": "f", "arguments": {"a": 1}}}]
"""

import re
from typing import Any

from gemma_dist.data.call_markers import FLAGS, MARKED
from gemma_dist.data.layouts.call_bare import WrittenCalls, find_bare, refusal, without_code
from gemma_dist.data.layouts.call_syntax import BLANKS, Signatures, TextBesideCalls, read_calls, skip
from gemma_dist.data.layouts.call_words import is_code
from gemma_dist.data.literals import parse_calls, parse_literal
from gemma_dist.data.strict import short
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
    (r"<\|tool_calls_section_begin|<\|tool_call_begin", "Kimi"),
    (r"<[|｜]tool[_▁]calls?[_▁]begin", "DeepSeek"),
    (r"<start_function_call>", "FunctionGemma"),
    (r"<\|channel\|>", "gpt-oss"),
    (r"<\|tool_call_start\|>", "LFM2"),
    (r"<\|action_start\|>", "InternLM"),
    (r"<\|START_ACTION\|>", "Command R"),
    (r"functools", "Phi"),
    (r"✿FUNCTION✿", "Qwen-Agent"),
    (r"<<function>>", "Gorilla"),
    (r"[ \t]*`{3,}[ \t]*tool_code|tool_code", "Gemma 3"),
)
_NAMES = r"(?i:tool_?calls?|function_?calls?|tool_?use|tool_?code)"
_TAG_END = r"(?:<\|?/\1\|?>|(?=<\|?\1\|?>)|\Z)"
_TAGGED = re.compile(rf"<\|?({_NAMES})\|?>(.*?){_TAG_END}", re.DOTALL)
# The same, but for tags inside of the strings of JSON or Python.
_STRING = r""""(?:\\.|[^"\\])*+"|'(?:\\.|[^'\\])*+'"""
# Taken by looking ahead, never in part: Python 3.11.2 (Debian 12) matches less where `*+` stands in the place of that.
_JSON_INSIDE = rf"(?=(\s*[{{\[](?:{_STRING}|\\.|(?!{_TAG_END}).)*))\2"
_TAGGED_JSON = re.compile(rf"<\|?({_NAMES})\|?>{_JSON_INSIDE}{_TAG_END}", re.DOTALL)
_NAME, _OBJECT = r"\s*([\w./:-]+?)\s*", r"\s*(\{.*?\})\s*"
_BAR, _LOW = "[|｜]", "[_▁]"  # DeepSeek has characters of its own
_SEPARATOR = rf"<{_BAR}tool{_LOW}sep{_BAR}>"
_BEGIN = rf"(?:<{_BAR}tool{_LOW}calls{_LOW}(?:section{_LOW})?begin{_BAR}>\s*)?<{_BAR}tool{_LOW}call{_LOW}begin{_BAR}>"
_END = rf"<{_BAR}tool{_LOW}call{_LOW}end{_BAR}>\s*(?:<{_BAR}tool{_LOW}calls{_LOW}(?:section{_LOW})?end{_BAR}>\s*)?"
# Calls one behind the other, each a name and its arguments as JSON.
_NAMED = (
    # Mistral
    rf"\[TOOL_CALLS\]{_NAME}(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?{_OBJECT}(?=\[TOOL_CALLS\]|\Z)",
    # DeepSeek
    rf"{_BEGIN}\s*(?:function{_SEPARATOR})?{_NAME}(?:{_SEPARATOR}|\n)\s*(?:```json)?{_OBJECT}(?:```\s*)?{_END}",
    # Kimi
    rf"{_BEGIN}\s*(?:functions\.)?{_NAME}:\d+\s*<\|tool_call_argument_begin\|>{_OBJECT}{_END}",
    # Qwen-Agent
    rf"✿FUNCTION✿:{_NAME}✿ARGS✿:{_OBJECT}(?:✿RESULT✿:?\s*)?(?=✿FUNCTION✿|\Z)",
)
_NAMED_CALLS = tuple(re.compile(pattern, re.DOTALL) for pattern in _NAMED)
# The calls are all that follows.
_OPEN_TO_END = re.compile(r"\[TOOL_CALLS\]|<\|python_(?:tag|start)\|>|tool_code[ \t]*\n|functools(?=\[)")
_CALL_FENCE = re.compile(r"[ \t]*+`{3,}+[ \t]*+(?:tool_code|tool_calls?|function_calls?)\s+(.*?)`{3,}", re.DOTALL)
_BLOCKS = (
    _CALL_FENCE,
    _TAGGED,
    re.compile(r"<\|tool_call_start\|>(.*?)(?:<\|tool_call_end\|>|\Z)", re.DOTALL),
    re.compile(r"<\|action_start\|>\s*<\|plugin\|>(.*?)(?:<\|action_end\|>|\Z)", re.DOTALL),
    re.compile(r"<\|START_ACTION\|>(.*?)(?:<\|END_ACTION\|>|\Z)", re.DOTALL),
    re.compile(r"<<function>>(.*?)(?=<<function>>|\Z)", re.DOTALL),
)
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
    "<｜end▁of▁sentence｜>",
)
_MARKED = re.compile(MARKED, FLAGS)
_GEMMA_CALL = re.compile(r"<\|tool_call>")


def find_calls(
    text: str, signatures: Signatures, *, is_answered: bool, is_asked_on: bool, is_last: bool
) -> WrittenCalls | None:
    """The calls at the end of a message's text; None where it attempts none.

    Args:
        signatures: the declared tools. Without them a marker is an attempt only in front of a result, or in the last
            message with nothing around the calls.
        is_answered: a tool's result follows.
        is_asked_on: a user goes on, who waits for no call.
        is_last: nothing follows.

    Raises:
        DataError: calls are attempted that cannot be converted.
    """
    thought = _THOUGHT.match(text)
    first = thought.end() if thought else 0
    said = _without_end(text[first:])
    is_expected = bool(signatures) or is_answered
    fence = _WHOLE_FENCE.fullmatch(said)
    if fence and is_expected and not _CALL_FENCE.match(said) and not is_code(said, signatures):
        said = fence[1]
    marker = _MARKED.search(without_code(said))
    if marker is None:
        if not is_expected:
            return None
        return find_bare(text[:first], said, signatures, is_answered=is_answered, is_asked_on=is_asked_on)
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
        raise refusal(style, error) from None
    except DataError as error:
        raise refusal(style, error) from None
    return WrittenCalls((text[:first] + said[:start]).strip(), style, calls)


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


def _read_marked(text: str, signatures: Signatures) -> list[dict[str, Any]]:
    """The calls of a text that begins with a marker. DataError if anything else stands in it."""
    if text.startswith(("<function=", "<invoke")):
        return read_calls(text, signatures)
    named = _first_match(_NAMED_CALLS, text)
    if named:
        return _read_named(named.re, text)
    rest_marker = _OPEN_TO_END.match(text)
    if rest_marker:
        return read_calls(text[rest_marker.end() :], signatures)
    first = _first_match(_BLOCKS, text)
    if first is None:
        raise TextBesideCalls(f"no complete call can be read from {short(text)}")
    calls: list[dict[str, Any]] = []
    position = 0
    while text[position:].strip():
        match = first.re.match(text, position)
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


def _first_match(patterns: tuple[re.Pattern[str], ...], text: str) -> re.Match[str] | None:
    """What the first pattern finds with which the text begins; None where it begins with none."""
    for pattern in patterns:
        match = pattern.match(text)
        if match:
            return match
    return None


def _read_named(pattern: re.Pattern[str], text: str) -> list[dict[str, Any]]:
    """`[TOOL_CALLS]f[ARGS]{"a": 1}`, one or several, in the form that the pattern reads."""
    calls: list[dict[str, Any]] = []
    position = 0
    while position < len(text):
        match = pattern.match(text, position)
        if match is None:
            raise TextBesideCalls(f"{short(text[position:])} is no call in the form of the others")
        calls += parse_calls({"name": match[1], "arguments": parse_literal(match[2])}, from_text=True)
        position = match.end()
    return calls
