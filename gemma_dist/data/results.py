"""What a tool's message says: parts or a string, values as their JSON, and an error called one.

{"content": "20"}, {"content": [{"type": "text", "text": "20"}]}        as they are
{"content": {"t": 20}}, {"content": [1, 2]}, {"content": 20}            '{"t": 20}', "[1, 2]", "20"
{"content": {"content": [parts], "isError": true}}                      MCP's result: the parts
{"content": "x", "is_error": true}, {"error": "x"}, {"content": "x", "success": false}      "Error: x"
"""

import re
from collections import Counter

from gemma_dist.data.content import BESIDE_IMAGE, BESIDE_TEXT, IMAGE_KEYS
from gemma_dist.data.marks import OFF_MESSAGE, ON_MESSAGE
from gemma_dist.data.strict import as_object, get, parse_json, short, to_json_text, without, without_nulls
from gemma_dist.data.types import ArrowStruct, RawRow
from gemma_dist.errors import DataError
from gemma_dist.gemma_format import MAX_DEPTH

FILLED = "null values that Arrow filled into tools' results were dropped"
STRUCTURED = "structuredContent of MCP results, beside a content that says something else, was left out"

# Parts that a result is made of. A list of anything else is a value, and shown as its JSON.
_PARTS = ("text", "image", "image_url", "resource", "resource_link", "audio")
# An object with these keys alone and a list of parts as its content is MCP's result; with others it is a value.
_MCP_KEYS = {"content", "isError", "is_error", "structuredContent", "structured_content", "_meta", "meta"}
_STRUCTURED_KEYS = ("structuredContent", "structured_content")

# Flags of a failed call, of one that did not fail, and words of `status` for the first.
_FAILED = ("is_error", "isError", "error", "failed")
_SUCCEEDED = ("success", "ok")
_FAILED_STATUS = ("error", "failed", "failure")
KEYS = (*_FAILED, *_SUCCEEDED, *_STRUCTURED_KEYS, "status")  # what a tool's message may hold beside its content
_BESIDE_CONTENT = {*KEYS, "tool_status"}
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False, "none": False, "null": False}
# What `error` says where there was none, and what any flag says where it is not set.
_NO_ERROR = ("n/a", "nil", "-", "ok", "success", "no error", "no errors", "none", "null", "undefined")
_NOT_SET = (None, "", "none", "null", "nil", "n/a", "-")

# An error that says so itself, within its first words: "ValueError: …", not "No error found" or "errors: 0".
_SAYS_ERROR = re.compile(r"(?:(?!\b(?:no|not|without|zero|0)\b).){0,40}?(?:error|exception|traceback)(?![a-z])", re.I)


def result_content(message: RawRow, notes: Counter[str], keeps_nulls: bool = False) -> object:
    """The content of a tool's message as parts or a string. Gemma has no flag for a failed call: the words say it.

    Args:
        keeps_nulls: whether a null of an object of Arrow is the row's own.

    Raises:
        DataError: a flag is neither true nor false, parts stand beside values, or `error` says more than the content.
    """
    content = message.get("content")
    if isinstance(content, str) and message.keys().isdisjoint(_BESIDE_CONTENT):
        return content
    is_error = _has_failed(message)
    structured = message
    if _is_mcp(content):
        is_error = is_error or _has_failed(as_object(content))
        structured, content = as_object(content), get(content, "content")
    if not _is_text_or_parts(content):
        content = to_json_text(content if keeps_nulls else without_filled(content, notes))
    shown = _with_structured(_as_parts(content), structured, notes)
    words = _error_words(message.get("error"))
    if words and (shown is None or shown in ("", [])):
        shown = words
    elif words and not _says_error(_text_of(shown), words):
        raise DataError(
            f"`error` is {short(words)} beside the content {short(shown)}; the model reads content alone: write both "
            "there and remove `error`"
        )
    return mark_error(shown) if is_error else shown


def mark_error(content: object) -> object:
    """The content of a failed call, which begins with "Error:" unless it says so itself."""
    if content is None or content == []:
        return "Error:"
    if isinstance(content, str):
        return content if _SAYS_ERROR.match(content.lstrip()) else f"Error: {content}".strip()
    if not isinstance(content, list):  # refused with the turn's content
        return content
    says_error = _SAYS_ERROR.match(_text_of(content).lstrip())
    return content if says_error else [{"type": "text", "text": "Error: "}, *content]


def _text_of(content: object) -> str:
    """The text of a string or of all text parts."""
    if not isinstance(content, list):
        return str(content)
    texts = [get(part, "text") for part in content]
    return "".join(text for text in texts if isinstance(text, str))


# ---- errors ----------------------------------------------------------------------------------------------------------


def is_true(value: object) -> bool | None:
    """What a flag says: True for true, 1, "true"; False for false, 0, "false", null, ""; None for anything else."""
    if value is None or value == "":
        return False
    if isinstance(value, (bool, int, float)):
        return bool(value)
    return _FLAGS.get(value.strip().lower()) if isinstance(value, str) else None


def _has_failed(message: RawRow) -> bool:
    """Whether a flag of a result says that the call failed. DataError where one is neither true nor false."""
    flags = [is_true(message.get(key)) for key in _FAILED if key != "error"]
    if None in flags:
        key = [key for key in _FAILED if key != "error"][flags.index(None)]
        raise DataError(f"`{key}` is {short(message[key])}; write true or false")
    has_error = not _is_no_error(message.get("error"))
    denied = [key for key in _SUCCEEDED if not _is_not_set(message.get(key)) and is_true(message[key]) is False]
    has_status = any(str(message.get(key)).lower() in _FAILED_STATUS for key in ("status", "tool_status"))
    return any(flags) or has_error or bool(denied) or has_status


def _is_not_set(flag: object) -> bool:
    """Whether a flag says nothing: null, "", "N/A"."""
    return (flag.strip().lower() if isinstance(flag, str) else flag) in _NOT_SET


def _is_no_error(error: object) -> bool:
    """Whether an `error` says that there was none: false, "OK", {"code": 0, "message": null}."""
    if isinstance(error, dict):
        return all(map(_is_no_error, error.values()))
    words = error.strip().lower().rstrip(".") if isinstance(error, str) else error
    return words in _NO_ERROR or words == [] or is_true(words) is False


def _error_words(error: object) -> str:
    """What `error` says where it is no flag: "Timeout", '{"code": 7}'; else ""."""
    if _is_no_error(error) or is_true(error) is not None:
        return ""
    return error if isinstance(error, str) else to_json_text(without_nulls(error) if isinstance(error, dict) else error)


def _says_error(text: str, words: str) -> bool:
    """Whether a result says what its `error` says: "timeout after 3s" and "Timeout", or an object with all its keys.

    '{"error": "NotFound", "code": 404}' and '{"code": 404}'
    """
    if words.lower() in text.lower():
        return True
    try:
        error, value = as_object(parse_json(words)), as_object(parse_json(text))
    except DataError:
        return False
    return bool(error) and all(key in value and value[key] == item for key, item in error.items())


# ---- values ----------------------------------------------------------------------------------------------------------


def _is_text_or_parts(content: object) -> bool:
    """Whether a result is shown as it is, and not as its JSON. DataError for parts among other values."""
    if content is None or isinstance(content, str):
        return True
    if not isinstance(content, list):
        return False
    if any(map(_is_record, content)) and all(_is_record(item) or get(item, "type") == "text" for item in content):
        return False
    num_parts = sum(_is_part(item) and not _is_record(item) for item in content)
    if 0 < num_parts < len(content):
        raise DataError(
            f"the content {short(content)} mixes parts with other values; write one string, such as its JSON, or "
            "parts alone"
        )
    return num_parts == len(content)


def _is_part(value: object) -> bool:
    """Whether a value is a part: a text with its text, or another of _PARTS."""
    kind = get(value, "type")
    says_text = isinstance(get(value, "text"), str) or without_nulls(as_object(value)).keys() == {"type"}
    return kind in _PARTS and (kind != "text" or says_text)


def _is_record(value: object) -> bool:
    """Whether what looks like a part is a value, of which a model reads all keys.

    {"type": "text", "text": "20", "bbox": [3, 4]}, {"type": "image", "title": "Cat"}
    """
    part = {key: item for key, item in as_object(value).items() if item not in (None, "", [], {})}
    if part.get("type") == "text" and "text" in part:
        marks = [key for key in (*ON_MESSAGE, *OFF_MESSAGE) if not key.startswith("weight")]
        return bool(without(part, *BESIDE_TEXT, *marks))
    shows_image = bool(part.keys() & set(IMAGE_KEYS))
    return part.get("type") in ("image", "image_url") and not shows_image and bool(without(part, *BESIDE_IMAGE))


def _as_parts(content: object) -> object:
    """A string as it is; of parts, MCP's embedded resources as their text.

    [{"type": "resource", "resource": {"uri": "file:a", "text": "7"}}] -> [{"type": "text", "text": "7"}]
    """
    if not isinstance(content, list):
        return content
    parts: list[object] = []
    for part in content:
        text = get(get(part, "resource"), "text")
        is_resource = get(part, "type") == "resource" and isinstance(text, str)
        parts.append({"type": "text", "text": text} if is_resource else part)
    return parts


def _is_mcp(content: object) -> bool:
    """Whether a value is MCP's result: {"content": [parts], "isError": false}."""
    parts = get(content, "content")
    if not isinstance(parts, list) or not all(_is_part(part) and not _is_record(part) for part in parts):
        return False
    return without_nulls(as_object(content)).keys() <= _MCP_KEYS


def _with_structured(shown: object, result: RawRow, notes: Counter[str]) -> object:
    """The parts of MCP's result, or its structuredContent where there are none.

    A server writes both, of which a model is shown the parts: a structuredContent that says more is counted.
    """
    structured = next((result[key] for key in _STRUCTURED_KEYS if result.get(key) is not None), None)
    if structured is None:
        return shown
    if shown is None or shown in ("", []):
        return to_json_text(structured)
    if not _repeats(_text_of(shown), structured):
        notes[STRUCTURED] += 1
    return shown


def _repeats(text: str, structured: object) -> bool:
    """Whether a text says what a structuredContent says: '{"t": 20}' and {"t": 20}, or "20" and {"result": 20}."""
    inner = get(structured, "result") if as_object(structured).keys() == {"result"} else structured
    try:
        value = parse_json(text)
    except DataError:
        value = text
    return value in (structured, inner)


def without_filled(value: object, notes: Counter[str], depth: int = 0) -> object:
    """A value without the null keys of its objects of Arrow, which has all keys of a column in each. They are counted.

    ArrowStruct({"t": 20, "sum": None}) -> {"t": 20}
    """
    if depth > MAX_DEPTH:  # no column is that deep
        return value
    if isinstance(value, list):
        return [without_filled(item, notes, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    kept = without_nulls(value) if isinstance(value, ArrowStruct) else value
    if len(kept) < len(value):
        notes[FILLED] += len(value) - len(kept)
    return {key: without_filled(item, notes, depth + 1) for key, item in kept.items()}
