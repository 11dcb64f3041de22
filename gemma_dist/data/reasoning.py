"""What an assistant thought, wherever a row keeps it: it goes to the thought channel, and is never literal text.

{"reasoning_content": "…"}                      also `reasoning`, `thinking`
{"reasoning_details": [{"type": "reasoning.text", "text": "…"}]}         OpenRouter
{"thinking_blocks": [{"type": "thinking", "thinking": "…"}]}             LiteLLM
{"content": [{"type": "thinking", "thinking": "…"}, …]}                  Anthropic, LangChain; Mistral has parts in it
{"content": "<think>…</think>answer"}           DeepSeek, Qwen; the prompt may hold the first tag
{"content": "[THINK]…[/THINK]answer"}           Mistral; other models' tags are below
"""

import re
from collections import Counter

from gemma_dist.data.strict import as_object, error_context, get, get_list, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

KEYS = ("reasoning_content", "reasoning", "thinking")
_ALL_KEYS = {*KEYS, "reasoning_details", "thinking_blocks"}
PART_TYPES = ("thinking", "reasoning")
ENCRYPTED_TYPES = ("redacted_thinking", "reasoning.encrypted")
ENCRYPTED = "encrypted blocks of reasoning, which nobody can read, were dropped"

_NAME = r"(?:\w+:)?think(?:ing)?"  # also seed:think
# Seed and Qwen, Mistral, Kimi, OpenThoughts, Command A
_OPEN = (
    rf"(?:(?i:<{_NAME}(?:\s+[\w:-]+\s*=[^<>]*)?>)"
    r"|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|START_THINKING\|>|<\|channel\|>analysis<\|message\|>)"
)
_CLOSE = rf"(?:(?i:</{_NAME}\s*>)|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>)"
_OPENER = re.compile(rf"\s*{_OPEN}")
_CLOSER = re.compile(_CLOSE)
_TAG = re.compile(rf"{_OPEN}|{_CLOSE}")
_ENDS_CLOSED = re.compile(rf"{_CLOSE}\s*\Z")
# XML that may be words as well: thoughts only where it is whole and stands in front.
_XML = re.compile(r"\s*<(?P<name>reasoning|thoughts?)\s*>(?P<thought>.*?)</(?P=name)\s*>", re.IGNORECASE | re.DOTALL)
_XML_TAG = re.compile(rf"{_TAG.pattern}|(?i:</?(?:reasoning|thoughts?)\s*>)")
# gpt-oss: its thoughts, and what opens the answer behind them; other models' openings of an answer; all their ends.
_ANALYSIS = re.compile(
    r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>((?:(?!<\|channel\|>).)*?)<\|end\|>", re.DOTALL
)
_ANSWER = re.compile(
    r"\s*(?:(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>|<\|begin_of_solution\|>|<\|START_RESPONSE\|>)\s*"
)
_ANSWER_ENDS = ("<|return|>", "<|end|>", "<|end_of_solution|>", "<|END_RESPONSE|>")
_LONE_CLOSER = re.compile(rf"^[ \t]*{_CLOSE}[ \t]*$", re.MULTILINE)
_BACKTICKS = re.compile(r"`+")


def split_think_tags(text: str) -> tuple[str, str]:
    """(reasoning, rest) of an assistant's text: "<think>why</think>answer" is ("why", "answer").

    Raises:
        DataError: a tag stands elsewhere than around the beginning, so what was thought cannot be told.
    """
    given = text
    text = _ANALYSIS.sub(r"<think>\1</think>", text) if "<|channel|>" in text else text
    xml = _XML.match(text)
    if not xml and not _TAG.search(text):
        return "", _without_frame(text)
    thoughts: list[str] = []
    position = 0  # up to which the text is thoughts
    while xml:
        thoughts.append(xml["thought"].strip())
        position = xml.end()
        xml = _XML.match(text, position)
    tag = _TAG.search(_blank_code(text))
    if not thoughts and tag and _CLOSER.fullmatch(tag[0]):  # the prompt held the opening tag
        thoughts.append(text[: tag.start()].strip())
        position = tag.end()
    while opener := _OPENER.match(text, position):
        closer = _find_closer(text, opener.end())
        if closer is None:
            break
        thoughts.append(text[opener.end() : closer.start()].strip())
        position = closer.end()
    rest = text[position:]
    stray = (_XML_TAG if thoughts and _XML.match(text) else _TAG).search(_blank_code(rest)) or _closer_in_code(rest)
    if stray:
        raise DataError(
            f"the tag {stray[0]} stands inside of the text, so what was thought cannot be told from what was said; "
            "put the thoughts in front, in <think>…</think> or as reasoning_content, or the tag in `backticks`"
        )
    return "\n".join(filter(None, thoughts)), _without_frame(rest.lstrip()) if thoughts else given


def _find_closer(text: str, start: int) -> re.Match[str] | None:
    """The first closing tag from a place on, but for those that a thought talks about: `</think>`, in backticks."""
    counted, num_ticks = start, 0  # up to where the backticks of the tag's line are counted
    for closer in _CLOSER.finditer(text, start):
        line_start = text.rfind("\n", counted, closer.start()) + 1
        if line_start:
            counted, num_ticks = line_start, 0
        num_ticks += text.count("`", counted, closer.start())
        counted = closer.start()
        is_quoted = num_ticks % 2 == 1 and text[counted - 1] == "`" and text.startswith("`", closer.end())
        if not is_quoted:
            return closer
    return None


def _closer_in_code(text: str) -> re.Match[str] | None:
    """A closing tag on a line of its own that no tag opens: a thought that left a fence open may end there."""
    lone = _LONE_CLOSER.search(text)
    first = _TAG.search(text)
    return first if lone and first and _CLOSER.fullmatch(first[0]) else None


def _without_frame(text: str) -> str:
    """An answer without what another model puts around one: "<|begin_of_solution|>Hi<|end_of_solution|>" is "Hi"."""
    opening = _ANSWER.match(text)
    if not opening:
        return text
    text = text[opening.end() :].rstrip()
    for end in _ANSWER_ENDS:
        text = text.removesuffix(end)
    return text.rstrip()


def _without_tags(text: str) -> str:
    """Reasoning that stands alone, without tags around it: "<think>why</think>" is "why".

    Raises:
        DataError: what stands behind a closing tag is not thought.
    """
    is_open = _OPENER.match(text) is not None
    is_closed = _ENDS_CLOSED.search(text) is not None
    if not (is_open or is_closed or _XML.match(text)):
        return text
    thought, rest = split_think_tags(f"{text}</think>" if is_open and not is_closed else text)
    if rest.strip():
        raise DataError(f"goes on behind the thoughts with {short(rest)}; write that as content")
    return thought


def _blank_code(text: str) -> str:
    """The text, of the same length, without what stands in backticks: tags there are talked about.

    As in Markdown, as many backticks end a piece of code as began it; others are backticks. Less than three do so on
    one line: a lone backtick is not to swallow the next paragraphs. Time is linear.
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
        start, end = runs[number].start(), runs[closing].end() if closing is not None else len(text)
        is_inline = len(runs[number][0]) < 3
        if closing is None or (is_inline and text.find("\n", start, end) >= 0):
            number += 1
            continue
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
    if not from_content and message.keys().isdisjoint(_ALL_KEYS):
        return ""
    given: dict[str, str] = {}
    for key in KEYS:
        text = _key_text(message, key)
        if text.strip():
            with error_context(f"`{key}`"):
                text = _without_tags(text)
        if text.strip():
            given[key] = text
    details = _from_details(message.get("reasoning_details"), notes)
    if details:
        given.setdefault("reasoning", details)  # OpenRouter sends the same text as `reasoning`
    blocks = "\n".join(read_part(block, notes) for block in get_list(message, "thinking_blocks"))
    if blocks:
        given["thinking_blocks"] = blocks
    said = "\n".join(text for text in from_content if text.strip())
    if said:
        given["the content"] = said
    if len({"".join(text.split()) for text in given.values()}) > 1:  # some join the same blocks by a line break
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
    last_block: tuple[object, object] | None = None
    for item in details:
        kind = get(item, "type")
        if kind in ENCRYPTED_TYPES:
            notes[ENCRYPTED] += 1
            continue
        text = get(item, "text") or get(item, "summary") or ""
        if not isinstance(text, str):
            raise DataError(f"an item of `reasoning_details` is {short(item)}; write its text as reasoning_content")
        block = (kind, get(item, "index"))
        if texts and block == last_block and block[1] is not None:  # the next piece of a stream
            texts[-1] += text
        else:
            texts.append(text)
        last_block = block
    return "\n".join(text for text in texts if text)


def _key_text(message: RawRow, key: str) -> str:
    """The text of `reasoning_content` and its like; "" where it says whether or how much to think.

    "why", [{"type": "text", "text": "why"}] -> "why";      false, {"type": "enabled", "budget_tokens": 1024} -> ""
    """
    value = message.get(key)
    if value is None:
        return ""
    is_setting = isinstance(value, bool) or as_object(value).keys() & {"budget_tokens", "effort"}
    is_switch = get(value, "type") in ("enabled", "disabled", "adaptive")
    if is_setting or is_switch:
        return ""
    text = _joined_text(value)
    if text is None:
        raise DataError(f"`{key}` is {short(value)}; write it as a string")
    return text


def _joined_text(value: object) -> str | None:
    """The text of a string or of text parts, [{"text": "why"}]; None of anything else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return None
    texts = [get(item, "text") for item in value]
    is_summary = any(get(item, "type") == "summary_text" for item in value)
    if not all(isinstance(text, str) for text in texts):
        return None
    return ("\n" if is_summary else "").join(texts)


def read_part(part: object, notes: Counter[str]) -> str:
    """The text of a part of content that is reasoning: "why" of {"type": "thinking", "thinking": "why"}.

    Raises:
        DataError: it has none.
    """
    if get(part, "type") in ENCRYPTED_TYPES:
        notes[ENCRYPTED] += 1
        return ""
    texts = [_joined_text(get(part, key)) for key in ("thinking", "reasoning", "text", "summary", "content")]
    found = [text for text in texts if text is not None]
    text = next(filter(None, found), "")
    is_encrypted = get(part, "encrypted_content") or get(part, "signature")
    if not text and is_encrypted:
        notes[ENCRYPTED] += 1
    elif not found:
        raise DataError(f"the reasoning part {short(part)} holds no text; write its text or remove it")
    return text
