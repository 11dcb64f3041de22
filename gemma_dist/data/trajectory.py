"""One raw row becomes one checked trajectory: the first arrow of the walk from JSONL to checkpoint.

    for where, row in read_rows(["train.jsonl"]):
        trajectory = parse_row(row, where=where, media_root=None, ...)

Everything that could go wrong later, silently, is refused here with file, line, turn (counted from 1), rule and remedy:
answers without a call, calls that Gemma's format cannot carry, control tokens in a tool's output, pictures that do not
decode. What comes out is in the normal form that the chat template takes as it is, and that the shards store.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemma_dist.data.convert import to_openai, turn_name
from gemma_dist.data.images import check_image, load_image
from gemma_dist.data.rows import Where
from gemma_dist.data.schema import check_calls, parse_tools, tool_name
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


@dataclass(frozen=True)
class Trajectory:
    """A checked trajectory in normal form.

    `messages`: {"role": system|user|assistant|tool, "content": str or list of {"type": "text", "text"} and
    {"type": "image"}}; an assistant's may have "tool_calls" [{"id", "type", "function": {"name", "arguments": dict}}],
    "reasoning_content" and "train": False; a tool's has "tool_call_id" and "name". Absent is absent, never None.
    """

    id: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]  # {"type": "function", "function": {"name", "description", "parameters"?}}
    images: list[bytes]  # files as they came, one for each image part, in the order of the messages


@dataclass(frozen=True)
class _Picture:
    """Where an image part of a row was found; `source` is None where the row's `images` column has to fill it."""

    place: str
    source: Any


def parse_row(
    row: Any,
    *,
    where: Where | str,
    media_root: Path | None,
    text_beside_call: Literal["message", "reasoning"],
    control_tokens: Literal["reject", "escape"],
    max_image_pixels: int,
) -> Trajectory:
    """The trajectory in a raw row of any shape that is taken (OpenAI, sharegpt, Anthropic).

    `where` is "file:line"; it opens every message and names a row without id ("<file name>:<line>"). `media_root` is
    the folder that image paths start from and must stay inside, None the folder of the file in `where`.
    Raises DataError for the first thing that is wrong.
    """
    with error_context(where):
        if not isinstance(row, dict):
            raise DataError(f"the row is {short(row)}, not a JSON object; write one object a line")
        clean = functools.partial(_clean_text, escape=control_tokens == "escape")
        row_id = name_row(row.get("id"), where)
        row, turns = to_openai(row)
        raw_messages = row.get("messages")
        if not isinstance(raw_messages, list) or not raw_messages:
            raise DataError(
                f"`messages` is {short(raw_messages)}; a row holds a list of messages (OpenAI or Anthropic), "
                f"or `conversations` (sharegpt); this one has the keys {short(list(row))}"
            )
        tools = parse_tools(row.get("tools"), clean)
        messages: list[dict[str, Any]] = []
        pictures: list[_Picture] = []
        places = [turn_name(turn, _get(raw, "role")) for turn, raw in zip(turns, raw_messages, strict=True)]
        for place, raw in zip(places, raw_messages, strict=True):
            with error_context(place):
                message, sources = _parse_message(raw, clean)
            messages.append(message)
            pictures += [_Picture(place, source) for source in sources]
        _check_order(places, messages)
        _link_answers(places, messages)
        if tools:
            check_calls(places, messages, tools)
        images = _load_images(pictures, row.get("images"), _media_root(media_root, where), max_image_pixels)
        moved = [part for message in messages for part in _text_before_call(message, text_beside_call)]
        return Trajectory(row_id, moved, tools, images)


def name_row(given: Any, where: Where | str) -> str:
    """The id of a row that gives `given` as its `id`, or nothing. DataError where that is no text or integer."""
    if given is None or given == "":
        return Path(str(where)).name
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise DataError(f"`id` is {short(given)}; write text or an integer, or leave it out")
    with error_context("`id`"):
        return _encodable(str(map_json(given, str, str)))


def _media_root(given: Path | None, where: Where | str) -> Path:
    if given is not None:
        return given
    file = Path(str(where).rpartition(":")[0])
    return file if file.is_dir() else file.parent


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


# ---- texts ----


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{short(text[max(0, error.start - 20) : error.end + 20])} holds half of a surrogate pair, which UTF-8 "
            "cannot encode; write the whole character"
        ) from None
    return text


def _clean_text(text: str, escape: bool) -> str:
    """The text, if it can be encoded and holds no control token; these are broken by a zero-width space on request."""
    _encodable(text)
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
        kind = _get(part, "type")
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


def _says(content: str | list[dict[str, Any]]) -> bool:
    """Whether anything of the content is left once the template has trimmed it."""
    if isinstance(content, str):
        return bool(content.strip())
    return any(part["type"] == "image" or part["text"].strip() for part in content)


# ---- messages ----


def _parse_message(raw: Any, clean: Clean) -> tuple[dict[str, Any], list[Any]]:
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
        elif not (calls or reasoning or _says(content)):
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
    return _encodable(str(map_json(given, str, str)))


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
        function = _get(call, "function") or call
        if not isinstance(function, dict) or _get(call, "type") not in (None, "function"):
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


def _check_order(places: list[str], messages: list[dict[str, Any]]) -> None:
    """An optional system message, then a user's; something to train on."""
    for index, (place, message) in enumerate(zip(places, messages, strict=True)):
        with error_context(place):
            if message["role"] == "system" and index > 0:
                raise DataError("a system message may only stand first; merge it into the first message")
    first = 1 if messages[0]["role"] == "system" else 0
    if len(messages) == first:
        raise DataError("holds a system message alone; a trajectory goes on with a user message")
    with error_context(places[first]):
        if messages[first]["role"] != "user":
            raise DataError(
                "a trajectory opens with a user message, after an optional system message; put the task first"
            )
    if not any(message["role"] == "assistant" and message.get("train", True) for message in messages):
        raise DataError("no assistant message is trained; add one or remove train: false")


def _link_answers(places: list[str], messages: list[dict[str, Any]]) -> None:
    """Give each call an id and each tool message the id and name of the call that it answers, in place.

    The calls of a message are answered before the next user or assistant message, each once. Answers keep their order,
    in which the template renders them. Only the last assistant's calls may stay without answers, and then all of them.
    """
    calls_of = [message.get("tool_calls", []) for message in messages]
    given_ids = {call["id"] for calls in calls_of for call in calls} - {None}
    fresh_ids = (name for name in (f"call_{number}" for number in itertools.count()) if name not in given_ids)
    calling_place = ""
    waiting: list[dict[str, Any]] = []
    answered: list[dict[str, Any]] = []
    for place, message, calls in zip(places, messages, calls_of, strict=True):
        if message["role"] == "tool":
            with error_context(place):
                call = _answered_call(message, waiting, answered, given_ids)
            waiting.remove(call)
            answered.append(call)
            message |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
            continue
        if waiting:
            raise DataError(
                f"{calling_place}: {_names(waiting)} without an answer before {place}; add a tool message for it"
            )
        for call in calls:
            call["id"] = call["id"] or next(fresh_ids)
        with error_context(place):
            if len({call["id"] for call in calls}) < len(calls):
                raise DataError(f"two calls of the message have one id: {_names(calls)}; make ids unique")
        calling_place, waiting, answered = place, list(calls), []
    if waiting and answered:
        raise DataError(
            f"{calling_place}: {_names(waiting)} without an answer, while others of the message are answered; "
            "answer all or none of the last calls"
        )


def _answered_call(
    message: dict[str, Any], waiting: list[dict[str, Any]], answered: list[dict[str, Any]], given_ids: set[str]
) -> dict[str, Any]:
    """The open call that a tool message answers: by id, else the first of its name, else the only one."""
    id, name = message["tool_call_id"], message["name"]
    if id is not None:
        # An id that we gave to a call is not one that the row can mean.
        call = next((call for call in waiting if call["id"] == id and id in given_ids), None)
        if call is None:
            if any(done["id"] == id for done in answered):
                why = "is already answered"
            else:
                why = "is not open here" if id in given_ids else "no earlier turn made"
            raise DataError(
                f"answers call {short(id)}, which {why}; open calls: {_names(waiting)}; "
                "a call is answered once, right after the message that makes it"
            )
        if name is not None and name != call["function"]["name"]:
            raise DataError(f"is named {short(name)} but answers {_names([call])}; make the two agree")
        return call
    if name is not None:
        call = next((call for call in waiting if call["function"]["name"] == name), None)
        if call is None:
            raise DataError(
                f"answers a call of {short(name)}, which is not open; open calls: {_names(waiting)}; mend the name"
            )
        return call
    if len(waiting) != 1:
        raise DataError(
            f"has neither tool_call_id nor name, and one call has to be open; open calls: {_names(waiting)}; add the id"
        )
    return waiting[0]


def _names(calls: list[dict[str, Any]]) -> str:
    return ", ".join(f"call {short(call['id'])} of {call['function']['name']}" for call in calls) or "none"


def _text_before_call(message: dict[str, Any], text_beside_call: str) -> Iterator[dict[str, Any]]:
    """The message, its content moved in front of its calls: the template would write it behind them.

    As "reasoning" it is appended to the reasoning; a content with pictures always becomes a message of its own.
    Reasoning stays with the first of the two.
    """
    content = message["content"]
    if "tool_calls" not in message:
        yield message
        return
    if not _says(content):
        yield message | {"content": ""}
        return
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if text_beside_call == "reasoning" and all(part["type"] == "text" for part in parts):
        reasoning = [message["reasoning_content"]] if "reasoning_content" in message else []
        reasoning.append("".join(part["text"] for part in parts).strip())
        yield message | {"content": "", "reasoning_content": "\n".join(reasoning)}
        return
    yield {key: value for key, value in message.items() if key != "tool_calls"}
    yield {key: value for key, value in message.items() if key != "reasoning_content"} | {"content": ""}


# ---- pictures ----


def _load_images(pictures: list[_Picture], column: Any, media_root: Path, max_image_pixels: int) -> list[bytes]:
    """The files of all image parts in order; parts without their own picture are filled from the row's `images`."""
    if column is not None and not isinstance(column, list):
        raise DataError(f"`images` is {short(column)}; write a list")
    num_empty = sum(picture.source is None for picture in pictures)
    if num_empty != len(column or []):
        raise DataError(
            f"`images` holds {len(column or [])} pictures for {num_empty} image parts without one of their own; "
            "the numbers must agree"
        )
    spare = iter(column or [])
    images = []
    for picture in pictures:
        with error_context(picture.place):
            data = load_image(next(spare) if picture.source is None else picture.source, media_root)
            check_image(data, max_image_pixels)
        images.append(data)
    return images
