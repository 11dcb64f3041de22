"""The newest chat template, gemma4_v5, in Python: what Jinja makes of it, to the letter, and sooner.

Jinja is what decides. This is taken for two texts alone, by their digests: those whose output it was compared with
(tests/test_newest.py), and for messages in normal form. It leaves to Jinja what is not plain: whatever a declaration or
a message holds that the template would print as Python does, or not at all.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from gemma_dist.data.types import JsonObject, Message, ToolCall
from gemma_dist.gemma_format import (
    CALL,
    CALL_END,
    CHANNEL,
    CHANNEL_END,
    IMAGE,
    MODEL_TURN,
    QUOTE,
    RESPONSE,
    RESPONSE_END,
    THINK,
    THOUGHT,
    TOOL,
    TOOL_END,
    TURN,
    TURN_END,
)

# Of its text as TRL ships it, that of E2B and E4B, and as 12B, 26B-A4B and 31B have it (`newest_template`).
_SMALL = "0a2c8073c878ab1da004bee933a998606537bbb62016310352c7285c3f01c5b5"
_LARGE = "e3233d5b7fb83939db450499b5630ec83894b4df69a05f29abc657b3d96bd243"
_NO_PROPERTIES = ("description", "type", "properties", "required", "nullable")  # in an object that names none as such
OTHER_NAMES = {"preserve_thinking", "namespace", "range"}  # that it asks for, and nobody gives


class NotPlainError(Exception):
    """Something that is left to Jinja."""


@functools.cache
def opens_empty_thought(template: str) -> bool | None:
    """Whether a new turn of the model opens with an empty thought where thinking is off; None: the template is not one
    of the two that are known here."""
    return {_SMALL: False, _LARGE: True}.get(hashlib.sha256(template.encode()).hexdigest())


def conversation(
    messages: Sequence[Message],
    declarations: list[str],
    *,
    bos: str,
    thinking: bool,
    prompts: bool,
    opens_empty_thought: bool,
) -> str:
    """All messages as the template writes them.

    Args:
        declarations: those of the tools, as `declaration` writes them.
        prompts: whether a generation prompt follows.

    Raises:
        NotPlainError: Jinja is to do it.
    """
    if not messages or messages[0]["role"] not in ("system", "user", "assistant", "tool"):
        raise NotPlainError
    has_system = messages[0]["role"] == "system"
    written = [bos]
    if has_system or thinking or declarations:
        written += TURN, "system\n", f"{THINK}\n" if thinking else "", _system(messages[0]) if has_system else ""
        for one in declarations:
            written += TOOL, one, TOOL_END
        written.append(f"{TURN_END}\n")
    last = _write_turns(messages[has_system:], written)
    if prompts and not last:
        written.append(MODEL_TURN)
        written += (THOUGHT, CHANNEL_END) if opens_empty_thought and not thinking else ()
    elif prompts and last == "results" and thinking:
        written.append(THOUGHT)
    return "".join(written)


def _write_turns(messages: Sequence[Message], written: list[str]) -> Literal["calls", "results", ""]:
    """Write all messages behind the system's, and say what of the last one came last, but for its content."""
    roles = [message["role"] for message in messages]
    last_user = max((index for index, role in enumerate(roles) if role == "user"), default=-1)
    before = ""  # the role of the last message that is no tool's
    last: Literal["calls", "results", ""] = ""
    for index, message in enumerate(messages):
        role = roles[index]
        if role == "tool":
            continue
        if "reasoning" in message or "tool_responses" in message:
            raise NotPlainError
        is_model = role == "assistant"
        if not (is_model and before == "assistant"):
            written.append(MODEL_TURN if is_model else f"{TURN}{role}\n")
        thought = message.get("reasoning_content")
        if thought and index > last_user:
            written += THOUGHT, thought, "\n", CHANNEL_END
        after = index + 1
        while after < len(roles) and roles[after] == "tool":
            after += 1
        calls = message.get("tool_calls") or ()
        results = messages[index + 1 : after] if calls else ()
        written += map(_call, calls)
        written += [_result(result, calls) for result in results]
        content = _content(message["content"], _without_thoughts if is_model else str.strip)
        written.append(content)
        following = roles[after] if after < len(roles) else ""
        last = "results" if results else "calls" if calls else ""
        if last == "calls":
            written.append(RESPONSE)
        elif is_model and following == "assistant":
            pass  # one turn
        elif following or not results or content.strip():
            written.append(f"{TURN_END}\n")
        before = role
    return last


def _system(message: Message) -> str:
    content = message["content"]
    return content.strip() if isinstance(content, str) else "".join(f"{_text(part).strip()} " for part in content)


def _text(part: Any) -> str:
    if part["type"] != "text":
        raise NotPlainError
    text: str = part["text"]
    return text


def _call(call: ToolCall) -> str:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    if not isinstance(arguments, dict):
        raise NotPlainError
    return f"{CALL}call:{name}{_object(arguments)}{CALL_END}"


def _result(message: Message, calls: Sequence[ToolCall]) -> str:
    name = message.get("name") or "unknown"
    for call in calls:
        if call.get("id") == message.get("tool_call_id"):
            name = call["function"]["name"]
    content = message["content"]
    if isinstance(content, str):
        text, images = content, ""
    else:
        text = "".join(part["text"] for part in content if part["type"] == "text")
        images = "".join(map(_image, content))
    return f"{RESPONSE}response:{name}{{value:{QUOTE}{text}{QUOTE}}}{RESPONSE_END}{images}"


def _content(content: Any, write: Callable[[str], str]) -> str:
    if isinstance(content, str):
        return write(content)
    return "".join(write(part["text"]) if part["type"] == "text" else _image(part) for part in content)


def _image(part: Any) -> str:
    if part["type"] not in ("text", "image"):
        raise NotPlainError
    return IMAGE if part["type"] == "image" else ""


def _without_thoughts(text: str) -> str:
    if CHANNEL_END in text or CHANNEL in text:
        text = "".join(part.partition(CHANNEL)[0] for part in text.split(CHANNEL_END))
    return text.strip()


def _object(value: JsonObject) -> str:
    return f"{{{','.join([f'{key}:{_argument(item)}' for key, item in _sorted(value)])}}}"


def _argument(value: Any) -> str:
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, dict):
        return _object(value)
    if isinstance(value, list):
        return f"[{','.join(map(_argument, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _sorted(value: JsonObject) -> list[tuple[str, Any]]:
    """As Jinja's `dictsort`."""
    return sorted(value.items(), key=_key) if len(value) > 1 else [*value.items()]


def _key(item: tuple[str, Any]) -> str:
    return item[0].lower()


# ---- declarations ----------------------------------------------------------------------------------------------------


def declaration(tool: Any) -> str:
    """A tool as the template declares it. Raises NotPlainError where Jinja is to do it."""
    function = tool["function"]
    parameters = function.get("parameters")
    if "response" in function or not isinstance(parameters or {}, dict):
        raise NotPlainError
    name, description = (_string(function.get(key, "")) for key in ("name", "description"))
    written = f"declaration:{name}{{description:{QUOTE}{description}{QUOTE}"
    if parameters:
        properties, required = parameters.get("properties"), parameters.get("required")
        given = [f"properties:{{{_properties(properties)}}}"] if properties else []
        given += [f"required:{_names(required)}"] if required else []
        type_name = _string(parameters.get("type") or "")
        written += f",parameters:{{{''.join(f'{one},' for one in given)}"
        written += f"type:{QUOTE}{type_name.upper()}{QUOTE}}}" if type_name else ""
    return (written + "}").strip()


def _properties(properties: Any, leave_out: Sequence[str] = ()) -> str:
    if not isinstance(properties, dict):
        raise NotPlainError
    return ",".join([f"{key}:{{{_property(value)}}}" for key, value in _sorted(properties) if key not in leave_out])


def _property(value: Any) -> str:
    if not isinstance(value, dict):
        raise NotPlainError
    description, type_name = _string(value.get("description") or ""), _string(value.get("type", "")).upper()
    enum, items, required = value.get("enum"), value.get("items"), value.get("required")
    given = [f"description:{QUOTE}{description}{QUOTE}"] if description else []
    if type_name == "STRING" and enum:
        given.append(f"enum:{_quoted(enum)}")
    if type_name == "ARRAY" and items and isinstance(items, dict):
        given.append(f"items:{{{','.join([_item(*item) for item in _sorted(items) if item[1] is not None])}}}")
    if value.get("nullable"):
        given.append("nullable:true")
    if type_name == "OBJECT":
        properties = value.get("properties")
        is_named = isinstance(properties, dict)
        inner = _properties(properties) if is_named else _properties(value, leave_out=_NO_PROPERTIES)
        given.append(f"properties:{{{inner}}}")
        given += [f"required:{_names(required)}"] if required else []
    return ",".join([*given, f"type:{QUOTE}{type_name}{QUOTE}"])


def _item(key: str, value: Any) -> str:
    """What an array says of its items."""
    if key == "properties":
        return f"properties:{{{_properties(value) if isinstance(value, dict) else ''}}}"
    if key == "required":
        return f"required:{_names(value)}"
    return f"{key}:{_quoted(_string(value).upper() if key == 'type' else value)}"


def _names(names: Any) -> str:
    if not isinstance(names, list):
        raise NotPlainError
    return f"[{','.join([f'{QUOTE}{_string(name)}{QUOTE}' for name in names])}]"


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise NotPlainError
    return value


def _quoted(value: Any) -> str:
    """An argument whose keys are strings, too."""
    if isinstance(value, dict):
        items = [f"{QUOTE}{key}{QUOTE}:{_quoted(item)}" for key, item in _sorted(value)]
        return f"{{{','.join(items)}}}"
    return f"[{','.join(map(_quoted, value))}]" if isinstance(value, list) else _argument(value)
