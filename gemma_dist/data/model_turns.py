"""The assistant's messages of one model turn, in an order and in pieces that the chat template keeps as they are.

{"tool_calls": [A]}, {"tool_calls": [B]}                ->  {"tool_calls": [A, B]}
{"content": "I look it up.", "tool_calls": […]}         ->  {"content": "I look it up."}, {"tool_calls": […]}
{"content": "Done."}, {"content": "Anything else?"}     ->  {"content": "Done.\\n\\nAnything else?"}
"""

from collections import Counter
from typing import Literal

from gemma_dist.data.content import content_parts, content_text, says_something
from gemma_dist.data.types import Content, Message, Part
from gemma_dist.errors import DataError

BETWEEN_MESSAGES = "\n\n"
PARALLEL = "assistant messages with calls that follow one another were made parallel calls of one message"
JOINED = "assistant messages that follow one another were joined, with a blank line between their texts"


def merge_parallel_calls(
    places: list[str], messages: list[Message], notes: Counter[str]
) -> tuple[list[str], list[Message]]:
    """The places and messages with neighboring messages that hold calls made one: the calls wait for the same answers.

    Qwen-Agent writes each call as a message of its own: [call A, call B, answer A, answer B].

    Args:
        places: how errors name each message.

    Raises:
        DataError: one of the two is trained and the other is not, which one message cannot be.
    """
    kept_places: list[str] = []
    merged: list[Message] = []
    for place, message in zip(places, messages, strict=True):
        if not merged or "tool_calls" not in merged[-1] or "tool_calls" not in message:
            kept_places.append(place)
            merged.append(message)
            continue
        if merged[-1].get("train", True) != message.get("train", True):
            raise DataError(
                f"{place}: follows the calls of {kept_places[-1]} before their answers, but one of the two is trained "
                "and the other is not; put the answers of the first calls between them, or mark both alike"
            )
        merged[-1] = _with_calls(merged[-1], message)
        notes[PARALLEL] += 1
    return kept_places, merged


def _with_calls(first: Message, second: Message) -> Message:
    """Two messages with calls as one: texts with a blank line between them, reasoning line by line, then all calls."""
    merged: Message = {**first, "tool_calls": first["tool_calls"] + second["tool_calls"]}
    if not says_something(first["content"]):
        merged["content"] = second["content"]
    elif says_something(second["content"]):
        merged["content"] = _join_content(first["content"], second["content"])
    thoughts = [message["reasoning_content"] for message in (first, second) if "reasoning_content" in message]
    if thoughts:
        merged["reasoning_content"] = "\n".join(thoughts)
    return merged


def text_before_calls(message: Message, text_beside_call: Literal["message", "reasoning"]) -> list[Message]:
    """The message, its content moved in front of its calls: the template would write it behind them.

    As "reasoning" it is appended to the reasoning; content with images always becomes a message of its own. The
    reasoning stays with the first of the two.
    """
    content = message["content"]
    if "tool_calls" not in message:
        return [message]
    calling: Message = {**message, "content": ""}
    if not says_something(content):
        return [calling]
    holds_images = any(part["type"] == "image" for part in content_parts(content))
    if text_beside_call == "reasoning" and not holds_images:
        text = content_text(content).strip()
        if "reasoning_content" in message:
            text = f"{message['reasoning_content']}\n{text}"
        calling["reasoning_content"] = text
        return [calling]
    saying: Message = {**message}
    del saying["tool_calls"]
    calling.pop("reasoning_content", None)
    return [saying, calling]


def join_neighbors(messages: list[Message]) -> tuple[list[Message], int]:
    """The messages with texts of neighboring assistant messages made one, and how many were joined to another.

    The template writes such messages into one turn and trims each: "done" and "more" would be trained as "donemore".
    What makes a call stays a message of its own, as its opening token parts it from the text before it.

    Raises:
        DataError: one of the two is trained and the other is not, which one text cannot be.
    """
    joined: list[Message] = []
    num_joined = 0
    for message in messages:
        before = joined[-1] if joined else None
        if before is None or not _runs_into(before, message):
            joined.append(message)
            continue
        if before.get("train", True) != message.get("train", True):
            raise DataError(
                "two assistant messages follow one another, of which one is trained and one is not, but both are one "
                "turn of the model; put the user's or a tool's message between them, or train neither"
            )
        joined[-1] = {**before, "content": _join_content(before["content"], message["content"])}
        num_joined += 1
    return joined, num_joined


def _runs_into(before: Message, message: Message) -> bool:
    """Whether the template would write the two messages' texts as one word."""
    if before["role"] != "assistant" or message["role"] != "assistant":
        return False
    parts_them = "tool_calls" in before or "reasoning_content" in message
    return not parts_them and says_something(before["content"]) and says_something(message["content"])


def _join_content(first: Content, second: Content) -> Content:
    """Both contents with a blank line between them; two strings make one string."""
    if isinstance(first, str) and isinstance(second, str):
        return first.rstrip() + BETWEEN_MESSAGES + second.lstrip()
    parts: list[Part] = [*content_parts(first)]
    rest: list[Part] = [*content_parts(second)]
    if parts[-1]["type"] == "text" and rest[0]["type"] == "text":
        text = parts[-1]["text"].rstrip() + BETWEEN_MESSAGES + rest[0]["text"].lstrip()
        parts[-1] = {"type": "text", "text": text}
        rest = rest[1:]
    return parts + rest
