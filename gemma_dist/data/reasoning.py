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

_OPENER = re.compile(r"<(think|thinking)>")
_CLOSER = re.compile(r"</(think|thinking)>")
_CODE = re.compile(r"(`+).+?\1", re.DOTALL)  # `quoted` tags are talked about


def split_think_tags(text: str) -> tuple[str, str]:
    """(reasoning, rest) of an assistant's text: "<think>why</think>answer" is ("why", "answer").

    Raises:
        DataError: a tag stands elsewhere than around the beginning, so what was thought cannot be told.
    """
    reasoning: list[str] = []
    rest = text
    if not _OPENER.search(_blank_code(text)):
        closer = _CLOSER.search(_blank_code(text))
        if closer:  # the prompt held the opening tag
            reasoning.append(text[: closer.start()].strip())
            rest = text[closer.end() :].lstrip()
    while opener := _OPENER.match(rest.lstrip()):
        closer = _CLOSER.search(rest)
        if closer is None:
            break
        thought = rest[: closer.start()].lstrip().removeprefix(opener[0])
        reasoning.append(thought.strip())
        rest = rest[closer.end() :].lstrip()
    stray = _OPENER.search(_blank_code(rest)) or _CLOSER.search(_blank_code(rest))
    if stray:
        raise DataError(
            f"the tag {stray[0]} stands inside of the text, so what was thought cannot be told from what was said; "
            "put the thoughts in front, in <think>…</think> or as reasoning_content, or the tag in `backticks`"
        )
    return "\n".join(thought for thought in reasoning if thought), rest if reasoning else text


def _blank_code(text: str) -> str:
    """The text with quoted code blanked out, of the same length."""
    return _CODE.sub(lambda code: " " * len(code[0]), text)


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
