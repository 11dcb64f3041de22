"""A decision point as a request in OpenAI's form, and what stands in the answer.

    {"model", "messages", "tools", "chat_template_kwargs": {"enable_thinking"}, "max_tokens", "temperature", …}
    ->  {"choices": [{"message": {"content", "reasoning_content", "tool_calls"}, "finish_reason"}], "usage"}

The history holds what the row holds: thoughts as `reasoning_content` (and as `reasoning`, which newer servers read),
images as data: URLs in the content, in that of tools as well. What the server's template makes of it is the server's.
"""

import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import ExifTags, Image

from gemma_dist.config import EvaluateConfig
from gemma_dist.config_act import ActConfig
from gemma_dist.data.content import content_parts
from gemma_dist.data.images import decode_image
from gemma_dist.data.strict import as_list, as_object, get, short
from gemma_dist.data.types import Content, Message
from gemma_dist.evaluate.message import ERROR, MESSAGE_KEYS, kept_call

ENDED = ("stop", "tool_calls", "function_call")  # finish_reason of an answer that is whole


class Misanswer(Exception):
    """An answer that is not of OpenAI's form, or says that it is none."""

    def __init__(self, words: str, value: object) -> None:
        """`value` is what the server said, whole, as long as no one has hidden the key in it."""
        super().__init__(f"{words} {short(value)}")
        self.words, self.value = words, value


@dataclass(frozen=True)
class Served:
    """What a server answered."""

    output: str  # of completions: the text; of chat: the message as JSON text
    raw: str | None  # what the model wrote, control tokens kept, where the server of a chat says it as well
    stopped: bool
    prompt_tokens: int  # as the server counts; 0 where it does not say
    output_tokens: int


def chat_fields(history: Sequence[Message], images: Sequence[bytes], tools: Sequence[Any], thinking: bool) -> dict:
    """The fields of a request for chat that a decision point decides.

    Args:
        images: those of the history, in order.
    """
    sources = iter(images)
    fields: dict[str, Any] = {"messages": [_message(message, sources) for message in history]}
    if tools:
        fields |= {"tools": list(tools), "tool_choice": "auto"}
    return {**fields, "chat_template_kwargs": {"enable_thinking": thinking}}


def sampling_fields(settings: EvaluateConfig | ActConfig, place: str, sample: int) -> dict[str, Any]:
    """The fields of any request that say how to sample; servers take their own defaults for what is not said.

    Args:
        place: of the decision point in the data: with the number of the sample, it decides the seed.
    """
    fields: dict[str, Any] = {"max_tokens": settings.max_new_tokens, "temperature": settings.temperature}
    if settings.temperature:
        hashed = hashlib.sha256(f"{settings.seed} {sample} {place}".encode()).digest()
        seed = int.from_bytes(hashed[:4], "big") >> 1
        fields |= {"top_p": settings.top_p, "top_k": settings.top_k or -1, "seed": seed}
    return fields


def with_extra(body: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """A request with more fields, or others; null takes one out."""
    return {name: value for name, value in {**body, **extra}.items() if value is not None}


def data_url(image: bytes) -> str:
    """An image as a URL: the file itself where every server reads it as we do, else a PNG of what we see in it."""
    with Image.open(io.BytesIO(image)) as opened:
        is_upright = opened.getexif().get(ExifTags.Base.Orientation, 1) == 1
        is_plain = opened.mode in ("RGB", "L") and "transparency" not in opened.info
        kind = opened.format if is_upright and is_plain and getattr(opened, "n_frames", 1) == 1 else None
    if kind not in ("PNG", "JPEG"):
        buffer = io.BytesIO()
        decode_image(image).save(buffer, format="PNG")
        image, kind = buffer.getvalue(), "PNG"
    return f"data:image/{kind.lower()};base64,{base64.b64encode(image).decode()}"


def read_chat(answer: Mapping[str, Any], decode: Callable[[list[int]], str] | None) -> Served:
    """What a server of chat answered.

    Args:
        decode: text of token ids, which some servers give as well.

    Raises:
        Misanswer
    """
    choice, stopped = _choice(answer)
    message = get(choice, "message")
    if not isinstance(message, dict):
        raise Misanswer("an answer without a message:", choice)
    kept = {key: message[key] for key in MESSAGE_KEYS if message.get(key) not in (None, "", [])}
    if "tool_calls" in kept:
        kept["tool_calls"] = [kept_call(call) for call in as_list(kept["tool_calls"])] or kept["tool_calls"]
    ids, verbose = get(choice, "token_ids"), get(get(answer, "__verbose"), "content")  # vLLM, llama.cpp
    raw = verbose if isinstance(verbose, str) else None
    if decode is not None and isinstance(ids, list) and all(type(one) is int for one in ids):
        raw = decode(ids)
    return Served(json.dumps(kept, ensure_ascii=False), raw, stopped, *_usage(answer))


def failed_answer(words: str) -> Served:
    """What stands for an answer in whose place the server sent an error."""
    return Served(json.dumps({ERROR: words}, ensure_ascii=False), None, True, 0, 0)


def read_completion(answer: Mapping[str, Any]) -> Served:
    """What a server of completions answered. Raises Misanswer."""
    choice, stopped = _choice(answer)
    text = get(choice, "text")
    if not isinstance(text, str):
        raise Misanswer("an answer without a text:", choice)
    return Served(text, None, stopped, *_usage(answer))


def _choice(answer: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The first choice, and whether it ended by itself."""
    choices = as_list(answer.get("choices"))
    if not choices or not isinstance(choices[0], dict):
        raise Misanswer("an answer without `choices`:", dict(answer))
    reason = choices[0].get("finish_reason")
    if reason not in (*ENDED, "length"):
        raise Misanswer("the answer was broken off: finish_reason", reason)
    return choices[0], reason != "length"


def _usage(answer: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens of prompt and answer."""
    usage = as_object(answer.get("usage"))
    prompt, output = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
    return _count(prompt), _count(output)


def _count(value: object) -> int:
    """A number of tokens; 0 where it is none that can be."""
    return value if type(value) is int and 0 <= value < 2**53 else 0


def _message(message: Message, images: Iterator[bytes]) -> dict[str, Any]:
    sent: dict[str, Any] = {"role": message["role"], "content": _content(message["content"], images)}
    if "reasoning_content" in message:
        sent |= {"reasoning_content": message["reasoning_content"], "reasoning": message["reasoning_content"]}
    if "tool_calls" in message:
        sent["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                },
            }
            for call in message["tool_calls"]
        ]
    for key in ("tool_call_id", "name"):
        if key in message:
            sent[key] = message[key]
    return sent


def _content(content: Content, images: Iterator[bytes]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [
        {"type": "image_url", "image_url": {"url": data_url(next(images))}} if part["type"] == "image" else dict(part)
        for part in content_parts(content)
    ]
