"""One raw message of a row in normal form: role, content, reasoning, calls."""

import re
from dataclasses import dataclass
from typing import Literal

from gemma_dist.data.schema import tool_name
from gemma_dist.data.strict import error_context, get, map_json, map_json_object, parse_json, short
from gemma_dist.data.types import CalledFunction, Clean, Content, JsonObject, Message, Part, RawRow, ToolCall
from gemma_dist.errors import DataError, setting
from gemma_dist.gemma_format import CONTROL_TOKENS

_CONTROL = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))
_UNCARRIED = re.compile(r'[:,{}\[\]"\r\n]')  # ends a bare key of Gemma's calls, or opens something else

Role = Literal["system", "user", "assistant", "tool"]
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_REFUSED_KEYS = ("audio", "images", "videos", "tool_responses", "refusal")  # would change what the message says
_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")


@dataclass(frozen=True)
class ParsedMessage:
    """A message in normal form, and what each of its image parts says of its image (None: nothing)."""

    message: Message
    image_sources: list[object]


def parse_message(raw: object, clean: Clean) -> ParsedMessage:
    """One message in normal form, but for ids: they are as given, and "" where there are none.

    Raises:
        DataError: for the first thing that is wrong with it, without its place.
    """
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
    content, image_sources = _parse_content(raw.get("content"), clean)
    message: Message = {"role": _ROLES[role], "content": content}
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
    if message["role"] == "system" and image_sources:
        raise DataError("the chat template drops images of a system message; move them to the first user message")
    if message["role"] == "tool":
        message["tool_call_id"] = _call_id(raw.get("tool_call_id"))
        message["name"] = _string(raw, "name")
    return ParsedMessage(message, image_sources)


# ---- content ---------------------------------------------------------------------------------------------------------


def content_parts(content: Content) -> list[Part]:
    """The parts of a message's content; a string is one part."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def content_text(content: Content) -> str:
    """The text of all parts, as the template joins it, but not trimmed."""
    return "".join(part["text"] for part in content_parts(content) if part["type"] == "text")


def count_images(message: Message) -> int:
    """How many images a message shows."""
    return sum(part["type"] == "image" for part in content_parts(message["content"]))


def says_something(content: Content) -> bool:
    """Whether anything of the content is left once the template has trimmed it."""
    return any(part["type"] == "image" or part["text"].strip() for part in content_parts(content))


def require_encodable(text: str) -> str:
    """The string itself. DataError if UTF-8 cannot encode it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{short(text[max(0, error.start - 20) : error.end + 20])} holds half of a surrogate pair, which UTF-8 "
            "cannot encode; write the whole character"
        ) from None
    return text


def clean_text(text: str, escape: bool) -> str:
    """The string, if it can be encoded and holds no control token; with `escape`, a zero-width space breaks them.

    Raises:
        DataError: it cannot be encoded, or holds a control token.
    """
    require_encodable(text)
    found = _CONTROL.search(text)
    if not found:
        return text
    if escape:
        return _CONTROL.sub(lambda token: f"{token[0][0]}\u200b{token[0][1:]}", text)
    around = text[max(0, found.start() - 20) : found.end() + 20]
    raise DataError(
        f"the control token {found[0]} stands in {short(around)}; the model would read it as structure: "
        f"remove it or use {setting('control_tokens', 'escape')}"
    )


def _parse_content(content: object, clean: Clean) -> tuple[Content, list[object]]:
    """Content in normal form, and for each image part what the part says of its image."""
    if content is None or content == []:
        return "", []
    if isinstance(content, str):
        return clean(content), []
    if not isinstance(content, list):
        raise DataError(
            f"the content is {short(content)} ({type(content).__name__}); write it as text, such as its JSON"
        )
    parts: list[Part] = []
    image_sources: list[object] = []
    for part in content:
        kind = get(part, "type")
        if kind == "text":
            parts.append({"type": "text", "text": _part_text(part, clean)})
        elif kind in ("image", "image_url"):
            parts.append({"type": "image"})
            image_sources.append(next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None))
        else:
            raise DataError(
                f"the part {short(part)} is of type {short(kind)}; parts are text, image and image_url objects"
            )
    _refuse_joined_token(parts)
    return parts, image_sources


def _part_text(part: RawRow, clean: Clean) -> str:
    text = part.get("text")
    if text is not None and not isinstance(text, str):
        raise DataError(f"the text of a part is {short(text)}; write it as text")
    return clean(text or "")


def _refuse_joined_token(parts: list[Part]) -> None:
    """Refuse a control token that comes together only in the template, which joins texts and trims some of them."""
    texts = [part["text"] for part in parts if part["type"] == "text"]
    as_given = "".join(texts)
    trimmed = "".join(text.strip() for text in texts)
    if _CONTROL.search(as_given) or _CONTROL.search(trimmed):
        raise DataError(
            "text parts of the message make up a control token together; merge them into one part and mend it"
        )


# ---- what stands beside the content ----------------------------------------------------------------------------------


def _string(raw: RawRow, key: str) -> str:
    """A string of a message; "" where there is none."""
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"`{key}` is {short(value)}; write it as text")
    return value or ""


def _parse_reasoning(raw: RawRow, clean: Clean) -> str:
    """`reasoning_content`, or `reasoning` or `thinking`, as other tools call it; "" where there is none."""
    given = {key: _string(raw, key) for key in ("reasoning_content", "reasoning", "thinking")}
    given = {key: text for key, text in given.items() if text}
    if len(set(given.values())) > 1:
        raise DataError(f"{' and '.join(given)} say different things; keep reasoning_content")
    text = next(iter(given.values()), "")
    return clean(text.strip("\n")) if text.strip() else ""  # the template writes the line breaks around it


def _is_trained(raw: RawRow) -> bool:
    """`train: false`, or the `loss: false` and `weight: 0` of other tools, keep a message out of the loss."""
    given = {key: raw[key] for key in ("train", "loss", "weight") if key in raw}
    for key, value in given.items():
        if value not in (0, 1):
            raise DataError(f"`{key}` is {short(value)}; a message is trained (true, 1) or not (false, 0)")
    if len({bool(value) for value in given.values()}) > 1:
        raise DataError(f"{' and '.join(given)} disagree; keep `train`")
    return all(given.values())


# ---- calls -----------------------------------------------------------------------------------------------------------


def _call_id(given: object) -> str:
    if given is None or given == "":
        return ""
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise DataError(f"the call id is {short(given)}; write it as text")
    return require_encodable(str(map_json(given, str, str)))


def _parse_calls(raw: RawRow, clean: Clean) -> list[ToolCall]:
    calls = raw.get("tool_calls") or []
    if raw.get("function_call"):  # OpenAI's form before tool_calls
        if calls:
            raise DataError("holds both function_call and tool_calls; keep tool_calls")
        calls = [{"function": raw["function_call"]}]
    if not isinstance(calls, list):
        raise DataError(f"`tool_calls` is {short(calls)}; write a list of calls")
    return [_parse_call(call, clean) for call in calls]


def _parse_call(call: object, clean: Clean) -> ToolCall:
    function = get(call, "function") or call
    if not isinstance(function, dict) or get(call, "type") not in (None, "function"):
        raise DataError(f'the call {short(call)} is no function call; write {{"function": {{"name", "arguments"}}}}')
    name = tool_name(function.get("name"))
    with error_context(f"call of {name}"):
        arguments = _parse_arguments(function.get("arguments"), clean)
    called: CalledFunction = {"name": name, "arguments": arguments}
    return {"id": _call_id(get(call, "id")), "type": "function", "function": called}


def _parse_arguments(arguments: object, clean: Clean) -> JsonObject:
    """Arguments as an object, from an object or its JSON text; nothing at all stands for no arguments."""
    if isinstance(arguments, str) and arguments.strip():
        with error_context("arguments"):
            arguments = parse_json(arguments)
    elif arguments is None or isinstance(arguments, str):
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(f"the arguments are {short(arguments)}, not an object; write name and value of each")

    def argument_name(key: str) -> str:
        is_bare = bool(key) and key == key.strip() and not _UNCARRIED.search(key)
        if not is_bare:
            raise DataError(
                f"the argument name {short(key)} cannot be carried by Gemma's call format, which writes names bare: "
                'not empty, no blanks around, none of : , { } [ ] " or line breaks; rename it'
            )
        return clean(key)

    return map_json_object(arguments, clean, argument_name)
