"""One raw message of a row in normal form: role, content, reasoning, calls."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from gemma_dist.data import marks
from gemma_dist.data.calls import call_id, first_of, parse_calls
from gemma_dist.data.content import ParsedContent, parse_content, says_something
from gemma_dist.data.reasoning import read_reasoning, split_think_tags
from gemma_dist.data.results import KEYS as RESULT_KEYS
from gemma_dist.data.results import result_content
from gemma_dist.data.strict import get_string, short
from gemma_dist.data.types import Clean, Message, RawRow
from gemma_dist.errors import DataError

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
_OPENAI_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name"}
_KNOWN_KEYS = {
    *("role", "content", "name", "tool_name", "tool_calls", "function_call"),
    *("reasoning_content", "reasoning", "thinking", "reasoning_details", "thinking_blocks", "tools"),
    *("tool_call_id", "call_id", "toolCallId", "tool_use_id"),
    *RESULT_KEYS,
    *marks.ON_MESSAGE,
    *marks.OFF_MESSAGE,
    *marks.UNCLEAR,
}
# What a tool's message may hold besides: its tool's name, and the arguments that it was called with.
_TOOL_NAME_KEYS = ("name", "tool_name", "function_name", "toolName", "tool", "function")
_ECHO_KEYS = ("arguments", "tool_input", "toolInput", "tool_args", "tool_arguments")
# What servers and loggers put beside a message, which says nothing about it; also as `finishReason`.
_SILENT_KEYS = {
    *("finish_reason", "native_finish_reason", "stop_reason", "reasoning_effort", "reasoning_format"),
    *("content_type", "content_filter_results", "content_filter_offsets", "content_format"),
    *("tool_choice", "thought_signature", "thinking_signature", "reasoning_signature"),
}
# A key of such a name, with more in it than a number, most likely holds something that belongs to the message.
_LIKE_OURS = re.compile(r"tool|function|call|reason|think|thought|argument|image|content")
_OTHER_WORDS = re.compile(r"functional(?:ity)?|malfunction|callsign|caller|callback|recall|toolkit|unreasonable")
# Such a key tells of them: tools_used, thinking_time, content_hash. Its value is a label, no call and no thought.
_IS_ABOUT = re.compile(r"_(?:id|hash|time|type|mode|tokens|version|used|names)$")
_IS_LABEL = re.compile(r"[^(){}\[\]<>\n]{1,80}")
_STOP_REASONS = (
    *("stop", "length", "end", "eos", "end_turn", "tool_calls", "tool_use", "function_call", "max_tokens"),
    *("stop_sequence", "content_filter"),
)


@dataclass(frozen=True)
class ParsedMessage:
    """A message in normal form, and what each of its image parts says of its image (None: nothing)."""

    message: Message
    image_sources: list[object]
    notes: Counter[str] = field(default_factory=Counter)  # what was changed or left out: how often


def parse_message(raw: object, clean: Clean, keeps_nulls: bool = False) -> ParsedMessage:
    """One message in normal form, but for ids: they are as given, and "" where there are none.

    Args:
        keeps_nulls: whether a null that stands in a result is the row's own where Arrow may have filled it in.

    Raises:
        DataError: for the first thing that is wrong with it, without its place.
    """
    if not isinstance(raw, dict):
        raise DataError(f"the message is {short(raw)}; write an object with role and content")
    has_content = "content" in raw
    raw = {key: value for key, value in raw.items() if value is not None}  # Arrow fills absent keys with null
    role = raw.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"the role is {short(role)}; roles are {', '.join(_ROLES)}")
    _refuse_keys(raw)
    notes: Counter[str] = Counter()
    if _ROLES[role] == "assistant":
        return _parse_assistant(raw, clean, notes)
    content = result_content(raw, notes, keeps_nulls) if _ROLES[role] == "tool" else raw.get("content")
    if not has_content and not content:
        _refuse_other_content(raw)
    parsed = parse_content(content, clean, notes)
    message: Message = {"role": _ROLES[role], "content": parsed.content}
    if parsed.reasoning or read_reasoning(raw, [], notes) or parse_calls(raw, clean):
        raise DataError("only an assistant's message may hold calls or reasoning; move them to one")
    if message["role"] == "system" and parsed.image_sources:
        raise DataError("the chat template drops images of a system message; move them to the first user message")
    if message["role"] == "tool":
        given_id = first_of(raw, ("tool_call_id", "call_id", "toolCallId", "tool_use_id"))
        message["tool_call_id"] = call_id(given_id)
        message["name"] = _tool_name(raw)
    marks.note_others(raw, notes)
    return ParsedMessage(message, parsed.image_sources, notes)


def _parse_assistant(raw: RawRow, clean: Clean, notes: Counter[str]) -> ParsedMessage:
    """An assistant's message: its reasoning is taken out of the content, wherever it stands."""
    parsed = _split_reasoning(raw.get("content"), clean, notes)
    message: Message = {"role": "assistant", "content": parsed.content}
    reasoning = read_reasoning(raw, parsed.reasoning, notes)
    calls = parse_calls(raw, clean)
    if calls:
        message["tool_calls"] = calls
    if reasoning:
        message["reasoning_content"] = clean(reasoning.strip("\n"))  # the template writes the line breaks around it
    if not marks.is_trained(raw):
        message["train"] = False
    elif not (calls or reasoning or says_something(parsed.content)):
        raise DataError("says nothing: no text, no call, no reasoning; remove it or set train: false")
    return ParsedMessage(message, parsed.image_sources, notes)


def _split_reasoning(content: object, clean: Clean, notes: Counter[str]) -> ParsedContent:
    """The content without what stands in <think> tags at its beginning, which becomes reasoning."""
    parsed = parse_content(content, clean, notes)
    if isinstance(parsed.content, str):
        thought, parsed.content = split_think_tags(parsed.content)
        parsed.reasoning += [thought] if thought else []
        return parsed
    for number, part in enumerate(parsed.content):
        if part["type"] == "text":
            thought, part["text"] = split_think_tags(part["text"])
            if thought and number > 0:
                raise DataError("reasoning stands behind an image of the message; put it in front of everything else")
            parsed.reasoning += [thought] if thought else []
    return parsed


def _refuse_other_content(message: RawRow) -> None:
    """DataError for a message without content that says something under a key which nobody knows."""
    for key, value in message.items():
        is_number = isinstance(value, (bool, int, float))
        if key not in _KNOWN_KEYS and value and not is_number:
            raise DataError(
                f"has no content, but `{key}`, {short(value)}; write what it says as content, or content: "
                '"" if it says nothing'
            )


def _refuse_keys(message: RawRow) -> None:
    """DataError for a key that changes what the message says, or that looks as if it did under another name."""
    if message.keys() <= _OPENAI_KEYS:
        return
    is_result = message["role"] in ("tool", "function")
    for key, value in message.items():
        if key in _REFUSED_KEYS and value:
            raise DataError(
                f"`{key}` of a message has no place in a trajectory; move what it says into content or remove it"
            )
        is_known = key in _KNOWN_KEYS or not value or isinstance(value, (bool, int, float))
        is_name = key in (*_TOOL_NAME_KEYS, "tool_status") and isinstance(value, str)
        if is_result and (is_name or key in _ECHO_KEYS):
            continue
        if not is_known and value != message.get("content") and _is_like_ours(marks.snake_case(str(key)), value):
            raise DataError(
                f"the key {short(key)} of a message is not known ({short(value)}); calls stand under tool_calls, a "
                "tool's name under name, thoughts under reasoning_content: rename it, or remove it if it says "
                "nothing of the kind"
            )


def _is_like_ours(name: str, value: object) -> bool:
    """Whether a key that is not known may hold a call, a result, a thought or content under another name."""
    if name in _SILENT_KEYS or (name == "reason" and value in _STOP_REASONS):
        return False
    labels = value if isinstance(value, list) else [value]
    are_labels = all(isinstance(label, str) and _IS_LABEL.fullmatch(label) for label in labels)
    is_about = _IS_ABOUT.search(name) and are_labels
    return not is_about and _LIKE_OURS.search(_OTHER_WORDS.sub("", name)) is not None


def _tool_name(answer: RawRow) -> str:
    """The name that a tool's message gives, "" where it gives none. DataError where it gives two."""
    given = {key: get_string(answer, key) for key in _TOOL_NAME_KEYS}
    said = {key: name for key, name in given.items() if name}
    if len(set(said.values())) > 1:
        raise DataError(f"{' and '.join(said)} name two tools; keep `name`")
    return next(iter(said.values()), "")
