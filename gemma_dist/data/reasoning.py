"""What an assistant thought, wherever a row keeps it: it goes to the thought channel, and is never literal text.

{"reasoning_content": "…"}                      also `reasoning`, `thinking`
{"reasoning_details": [{"type": "reasoning.text", "text": "…"}]}         OpenRouter
{"content": [{"type": "thinking", "thinking": "…"}, …]}                  Anthropic, LangChain
{"content": "<think>…</think>answer"}           DeepSeek, Qwen; the prompt may hold the first tag
"""

import re
from collections import Counter

from gemma_dist.data.strict import get, get_string, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

KEYS = ("reasoning_content", "reasoning", "thinking")
PART_TYPES = ("thinking", "reasoning")
ENCRYPTED_TYPES = ("redacted_thinking", "reasoning.encrypted")
ENCRYPTED = "encrypted blocks of reasoning, which nobody can read, were dropped"

_OPENER = re.compile(r"\s*<(?:think|thinking)>")
_CLOSER = re.compile(r"</(?:think|thinking)>")
_TAG = re.compile(r"</?(?:think|thinking)>")
_BACKTICKS = re.compile(r"`+")


def split_think_tags(text: str) -> tuple[str, str]:
    """(reasoning, rest) of an assistant's text: "<think>why</think>answer" is ("why", "answer").

    Raises:
        DataError: a tag stands elsewhere than around the beginning, so what was thought cannot be told.
    """
    if not _TAG.search(text):
        return "", text
    thoughts: list[str] = []
    position = 0  # up to which the text is thoughts
    tag = _TAG.search(_blank_code(text))
    if tag and _CLOSER.fullmatch(tag[0]):  # the prompt held the opening tag
        thoughts.append(text[: tag.start()].strip())
        position = tag.end()
    while opener := _OPENER.match(text, position):
        closer = _CLOSER.search(text, opener.end())
        if closer is None:
            break
        thoughts.append(text[opener.end() : closer.start()].strip())
        position = closer.end()
    rest = text[position:]
    stray = _TAG.search(_blank_code(rest))
    if stray:
        raise DataError(
            f"the tag {stray[0]} stands inside of the text, so what was thought cannot be told from what was said; "
            "put the thoughts in front, in <think>…</think> or as reasoning_content, or the tag in `backticks`"
        )
    return "\n".join(filter(None, thoughts)), rest.lstrip() if thoughts else text


def _blank_code(text: str) -> str:
    """The text, of the same length, without what stands in backticks: tags there are talked about.

    As in Markdown, as many backticks end a piece of code as began it; others are backticks. Time is linear.
    """
    runs = list(_BACKTICKS.finditer(text))
    next_alike: list[int | None] = [None] * len(runs)  # the next run of the same length
    last_of_length: dict[int, int] = {}
    for number in reversed(range(len(runs))):
        length = len(runs[number][0])
        next_alike[number] = last_of_length.get(length)
        last_of_length[length] = number
    pieces: list[str] = []
    copied = number = 0
    while number < len(runs):
        closing = next_alike[number]
        if closing is None:
            number += 1
            continue
        start, end = runs[number].start(), runs[closing].end()
        pieces += [text[copied:start], " " * (end - start)]
        copied = end
        number = closing + 1
    return "".join(pieces) + text[copied:]


def read_reasoning(message: RawRow, from_content: list[str], notes: Counter[str]) -> str:
    """All reasoning of an assistant's message; "" where there is none.

    Args:
        from_content: what its content held, in order.

    Raises:
        DataError: one of the keys holds no string, or two of them say different things.
    """
    given: dict[str, str] = {}
    for key in KEYS:
        text = get_string(message, key)
        if text.strip():
            given[key] = text
    details = _from_details(message.get("reasoning_details"), notes)
    if details:
        given.setdefault("reasoning", details)  # OpenRouter sends the same text as `reasoning`
    said = "\n".join(text for text in from_content if text.strip())
    if said:
        given["the content"] = said
    if len({text.strip() for text in given.values()}) > 1:
        raise DataError(f"{' and '.join(given)} say different things about the reasoning; keep reasoning_content")
    return next(iter(given.values()), "")


def _from_details(details: object, notes: Counter[str]) -> str:
    """The text of OpenRouter's `reasoning_details`: of each item its `text` or `summary`.

    [{"type": "reasoning.summary", "summary": "why"}, {"type": "reasoning.encrypted", "data": "…"}] -> "why"
    """
    if not details:
        return ""
    if not isinstance(details, list):
        raise DataError(f"`reasoning_details` is {short(details)}; write a list, or reasoning_content")
    texts: list[str] = []
    for item in details:
        kind = get(item, "type")
        if kind in ENCRYPTED_TYPES:
            notes[ENCRYPTED] += 1
            continue
        text = get(item, "text") or get(item, "summary") or ""
        if not isinstance(text, str):
            raise DataError(f"an item of `reasoning_details` is {short(item)}; write its text as reasoning_content")
        texts.append(text)
    return "\n".join(text for text in texts if text)


def read_part(part: RawRow) -> str:
    """The text of a part of content that is reasoning: "why" of {"type": "thinking", "thinking": "why"}.

    Raises:
        DataError: it has none.
    """
    for key in ("thinking", "reasoning", "text", "summary"):
        value = part.get(key)
        if isinstance(value, str):
            return value
    raise DataError(f"the reasoning part {short(part)} holds no text; write its text or remove it")
