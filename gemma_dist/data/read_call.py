"""Read what stands inside a call that Gemma 4 generated: its name and its arguments, as far as <tool_call|>.

    call:NAME{key:<|"|>text<|"|>,n:1,xs:[true,null]}<tool_call|>

`read.py` says what is read beyond that, and what is not. The grammar is read by recursive descent: each function reads
one thing of `text` from character `at` on and returns it with the character behind it. Where something else stands, it
raises Unreadable.
"""

import json
import math
import re
from typing import Any

from gemma_dist.gemma_format import CALL_END, MAX_DEPTH, QUOTE

MAX_DIGITS = 4300  # Python refuses to read or print longer integers

_HEAD = re.compile(r"""\s*call\s*:\s*([^\s:{}()\[\]<>"',=][^\s{}()\[\]<>"',=]*)\s*\{""")
_BLANK = re.compile(r"\s*")
_JSON_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
# A key may hold colons: then its end is the last colon before a quoted value or a container. Otherwise the first one.
_KEY_BEFORE_QUOTE_OR_CONTAINER = re.compile(r'[^{}\[\],<"]*:(?=\s*(?:<\|"\|>|[{\["]))')
_KEY = re.compile(r"[^{},<:]*:")
_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_SCALAR = re.compile(r"(?:true|false|null|True|False|None)\b|-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


class Unreadable(Exception):
    """This call does not follow the format. `read.py` drops it and says so in the status."""


def read_call(text: str, at: int) -> tuple[str, dict[str, Any], int]:
    """Name, arguments and end of the call whose opening token ends at `at`."""
    head = _HEAD.match(text, at)
    if not head:
        raise Unreadable
    arguments, at = _object(text, head.end(), 1)
    at = _blank(text, at)
    if not text.startswith(CALL_END, at):
        raise Unreadable
    return head.group(1), arguments, at + len(CALL_END)


def _object(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    """The mapping whose brace ends at `at`, and its end. Of a repeated key the last value counts, as in JSON."""
    fields: dict[str, Any] = {}
    at = _blank(text, at)
    while not text.startswith("}", at):
        key, at = _key(text, at)
        fields[key], at = _value(text, at, depth)
        at = _blank(text, _separator(text, at, "}"))
    return fields, at + 1


def _array(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    """The list whose bracket ends at `at`, and its end. A comma may stand before the closing bracket."""
    items: list[Any] = []
    at = _blank(text, at)
    while not text.startswith("]", at):
        item, at = _value(text, at, depth)
        items.append(item)
        at = _blank(text, _separator(text, at, "]"))
    return items, at + 1


def _key(text: str, at: int) -> tuple[str, int]:
    """A key, in delimiters, in JSON's quotes or bare, and the end of the colon behind it. A bare key is not empty."""
    if text.startswith((QUOTE, '"'), at):
        key, at = _string(text, at)
        at = _blank(text, at)
        if not text.startswith(":", at):
            raise Unreadable
        return key, at + 1
    bare = _KEY_BEFORE_QUOTE_OR_CONTAINER.match(text, at) or _KEY.match(text, at)
    if not bare:
        raise Unreadable
    key = bare.group().removesuffix(":").strip()
    if not key:
        raise Unreadable
    return key, bare.end()


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """Any value, of which blanks may stand in front. Containers deeper than MAX_DEPTH are unreadable."""
    at = _blank(text, at)
    if text.startswith((QUOTE, '"'), at):
        return _string(text, at)
    if not text.startswith(("{", "["), at):
        return _scalar(text, at)
    if depth >= MAX_DEPTH:
        raise Unreadable
    read_container = _object if text[at] == "{" else _array
    return read_container(text, at + 1, depth + 1)


def _scalar(text: str, at: int) -> tuple[bool | int | float | None, int]:
    """A bare `true`, `null` or number. Unreadable: what is too large for a float, or too long for an integer."""
    scalar = _SCALAR.match(text, at)
    if not scalar:
        raise Unreadable
    word = scalar.group()
    fraction, exponent = scalar.groups()
    if word in _WORDS:
        return _WORDS[word], scalar.end()
    if fraction or exponent:
        number = float(word)
        if math.isinf(number):
            raise Unreadable
        return number, scalar.end()
    if len(word) > MAX_DIGITS:
        raise Unreadable
    return int(word), scalar.end()


def _string(text: str, at: int) -> tuple[str, int]:
    """A string between delimiters, where nothing is an escape, or a JSON string with JSON's escapes."""
    if text.startswith(QUOTE, at):
        start = at + len(QUOTE)
        end = text.find(QUOTE, start)
        if end < 0:
            raise Unreadable
        return text[start:end], end + len(QUOTE)
    quoted = _JSON_STRING.match(text, at)
    if not quoted:
        raise Unreadable
    try:
        return json.loads(quoted.group(), strict=False), quoted.end()
    except json.JSONDecodeError:
        raise Unreadable from None


def _separator(text: str, at: int, closing: str) -> int:
    """Behind the comma, or at the closing bracket: nothing else may follow a value."""
    at = _blank(text, at)
    if text.startswith(",", at):
        return at + 1
    if text.startswith(closing, at):
        return at
    raise Unreadable


def _blank(text: str, at: int) -> int:
    """The first character from `at` on that is not blank, or the end."""
    found = _BLANK.match(text, at)
    assert found is not None  # it matches nothing at all, too
    return found.end()
