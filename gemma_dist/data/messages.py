"""One raw message of a row in normal form: role, content, reasoning, calls."""

import re
from collections.abc import Callable
from typing import Any

from gemma_dist.data.schema import tool_name
from gemma_dist.data.strict import error_context, map_json, parse_json, short
from gemma_dist.errors import DataError, setting
from gemma_dist.gemma_format import CONTROL_TOKENS

_CONTROL = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))
_UNCARRIED = re.compile(r'[:,{}\[\]"\r\n]')  # ends a bare key of Gemma's calls, or opens something else

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_REFUSED_KEYS = ("audio", "images", "videos", "tool_responses", "refusal")  # would change what the message says
_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")

Clean = Callable[[str], str]


def get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


# ---- texts ----


def require_encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{short(text[max(0, error.start - 20) : error.end + 20])} holds half of a surrogate pair, which UTF-8 "
            "cannot encode; write the whole character"
        ) from None
    return text


def clean_text(text: str, neutralise: bool) -> str:
    """The text, if it can be encoded and holds no control token; these are broken by a zero-width space on request."""
    require_encodable(text)
    found = _CONTROL.search(text)
    if not found:
        return text
    if neutralise:
        return _CONTROL.sub(lambda token: f"{token[0][0]}\u200b{token[0][1:]}", text)
    around = text[max(0, found.start() - 20) : found.end() + 20]
    raise DataError(
        f"the control token {found[0]} stands in {short(around)}; the model would read it as structure: "
        f"remove it or use {setting('control_tokens', 'neutralise')}"
    )


def _parse_content(content: Any, clean: Clean) -> tuple[str | list[dict[str, Any]], list[Any]]:
    """Content in normal form, and for each image part what the part says of its picture."""
    if content is None or content == []:
        return "", []
    if isinstance(content, str):
        return clean(content), []
    if not isinstance(content, list):
        raise DataError(
            f"the content is {short(content)} ({type(content).__name__}); write it as text, such as its JSON"
        )
    parts: list[dict[str, Any]] = []
    sources = []
    for part in content:
        kind = get(part, "type")
        if kind == "text":
            text = part.get("text")
            if text is not None and not isinstance(text, str):
                raise DataError(f"the text of a part is {short(text)}; write it as text")
            parts.append({"type": "text", "text": clean(text or "")})
        elif kind in ("image", "image_url"):
            parts.append({"type": "image"})
            sources.append(next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None))
        else:
            raise DataError(
                f"the part {short(part)} is of type {short(kind)}; parts are text, image and image_url objects"
            )
    texts = [part["text"] for part in parts if part["type"] == "text"]
    # The template joins the texts of a message, some of them trimmed, so a token may come together only there.
    if any(_CONTROL.search("".join(joined)) for joined in (texts, map(str.strip, texts))):
        raise DataError(
            "text parts of the message make up a control token together; merge them into one part and mend it"
        )
    return parts, sources


def says_something(content: str | list[dict[str, Any]]) -> bool:
    """Whether anything of the content is left once the template has trimmed it."""
    if isinstance(content, str):
        return bool(content.strip())
    return any(part["type"] == "image" or part["text"].strip() for part in content)


# ---- messages ----


def parse_message(raw: Any, clean: Clean) -> tuple[dict[str, Any], list[Any]]:
    """One message in normal form, with ids as given, and what each of its image parts says of its picture."""
    if not isinstance(raw, dict):
        raise DataError(f"the message is {short(raw)}; write an object with role and content")
    raw = {key: value for key, value in raw.items() if value is not None}  # Arrow fills absent keys with null
    role = raw.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"the role is {short(role)}; roles are {', '.join(_ROLES)}")
    for key in _REFUSED_KEYS:
        if raw.get(key):
            raise DataError(
                f"`{key}` of a message has no place in a trajectory; move what it says into content or remove it"
            )
    content, sources = _parse_content(raw.get("content"), clean)
    message: dict[str, Any] = {"role": _ROLES[role], "content": content}
    reasoning = _parse_reasoning(raw, clean)
    calls = _parse_calls(raw, clean)
    if message["role"] == "assistant":
        if calls:
            message["tool_calls"] = calls
        if reasoning:
            message["reasoning_content"] = reasoning
        if not _is_trained(raw):
            message["train"] = False
        elif not (calls or reasoning or says_something(content)):
            raise DataError("says nothing: no text, no call, no reasoning; remove it or set train: false")
    elif calls or reasoning:
        raise DataError("only an assistant's message may hold calls or reasoning; move them to one")
    if message["role"] == "system" and sources:
        raise DataError("the chat template drops pictures of a system message; move them to the first user message")
    if message["role"] == "tool":
        message |= {"tool_call_id": _call_id(raw.get("tool_call_id")), "name": _text_or_none(raw, "name")}
    return message, sources


def _text_or_none(raw: dict[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"`{key}` is {short(value)}; write it as text")
    return value or None


def _call_id(given: Any) -> str | None:
    if given is None or given == "":
        return None
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise DataError(f"the call id is {short(given)}; write it as text")
    return require_encodable(str(map_json(given, str, str)))


def _parse_reasoning(raw: dict[str, Any], clean: Clean) -> str | None:
    """`reasoning_content`, or `reasoning` or `thinking`, as other tools call it."""
    given = {key: text for key in ("reasoning_content", "reasoning", "thinking") if (text := _text_or_none(raw, key))}
    if len(set(given.values())) > 1:
        raise DataError(f"{' and '.join(given)} say different things; keep reasoning_content")
    text = next(iter(given.values()), "")
    return clean(text) if text.strip() else None


def _is_trained(raw: dict[str, Any]) -> bool:
    """`train: false`, or the `loss: false` and `weight: 0` of other tools, keep a message out of the loss."""
    given = {key: raw[key] for key in ("train", "loss", "weight") if key in raw}
    for key, value in given.items():
        if value not in (0, 1):
            raise DataError(f"`{key}` is {short(value)}; a message is trained (true, 1) or not (false, 0)")
    if len({bool(value) for value in given.values()}) > 1:
        raise DataError(f"{' and '.join(given)} disagree; keep `train`")
    return all(given.values())


def _parse_calls(raw: dict[str, Any], clean: Clean) -> list[dict[str, Any]]:
    calls = raw.get("tool_calls") or []
    if raw.get("function_call"):  # OpenAI's form before tool_calls
        if calls:
            raise DataError("holds both function_call and tool_calls; keep tool_calls")
        calls = [{"function": raw["function_call"]}]
    if not isinstance(calls, list):
        raise DataError(f"`tool_calls` is {short(calls)}; write a list of calls")
    parsed = []
    for call in calls:
        function = get(call, "function") or call
        if not isinstance(function, dict) or get(call, "type") not in (None, "function"):
            raise DataError(
                f'the call {short(call)} is no function call; write {{"function": {{"name", "arguments"}}}}'
            )
        name = tool_name(function.get("name"))
        with error_context(f"call of {name}"):
            arguments = _parse_arguments(function.get("arguments"), clean)
        parsed.append(
            {"id": _call_id(call.get("id")), "type": "function", "function": {"name": name, "arguments": arguments}}
        )
    return parsed


def _parse_arguments(arguments: Any, clean: Clean) -> dict[str, Any]:
    """Arguments as an object, from an object or its JSON text; nothing at all stands for no arguments."""
    if isinstance(arguments, str) and arguments.strip():
        with error_context("arguments"):
            arguments = parse_json(arguments)
    elif arguments is None or isinstance(arguments, str):
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(f"the arguments are {short(arguments)}, not an object; write name and value of each")

    def argument_name(key: str) -> str:
        if _UNCARRIED.search(key) or not key or key != key.strip():
            raise DataError(
                f"the argument name {short(key)} cannot be carried by Gemma's call format, which writes names bare: "
                'not empty, no blanks around, none of : , { } [ ] " or line breaks; rename it'
            )
        return clean(key)

    return map_json(arguments, clean, argument_name)
