"""Where the model's own words lie in the text that a chat template rendered: what labels are made from."""

import re
from typing import Any

from gemma_dist.errors import DataError, setting
from gemma_dist.gemma_format import IMAGE

NEWER_TEMPLATE = f"Use a newer template, for example {setting('chat_template', 'gemma4_v5')}"

IMAGE_BLOCK = re.compile(r"\s*<\|image>(?:<\|image\|>)*<image\|>\s*")
CONTEXT = re.compile(  # what a template puts between two assistant messages, none of it the model's own
    r"<\|turn>model\n"
    r"|<\|turn>tool\n.*?<turn\|>\n"  # a turn for each tool message: one old revision
    r"|(?:<\|tool_response>|(?<=<\|tool_response>))response:.*?<tool_response\|>"
    r"|<\|channel>thought\n<channel\|>"  # the empty thought that large models' prompts carry when thinking is off
    r"|\n",
    re.DOTALL,
)

Spans = list[tuple[tuple[int, int], int]]  # ((start, end) in characters, index of the message whose words they are)


def emitted_spans(text: str, messages: list[dict[str, Any]]) -> tuple[Spans, int]:
    """Where in the rendered `text` the model's own words lie.

    Returns:
        A sorted list of ((start, end), index of the message), in characters, and the number of assistant messages whose
        reasoning the template left out.

    Raises:
        DataError: a piece of an assistant message is not where it must be.
    """
    spans: Spans = []
    num_dropped_reasoning = 0
    at = 0
    closed = True  # no model turn is open at `at`
    answered = 0  # the end of the last tool message's text, if that lies behind `at`
    num_tool_images = 0  # returned since the last assistant message
    for turn, message in enumerate(messages):
        if message["role"] in ("system", "user"):
            head = text.find(f"<|turn>{message['role']}\n", max(at, answered))
            at = text.find("<turn|>", head)
            if head < 0 or at < 0 or _find_texts(text, head, turn, message) > at:
                raise _torn(turn, f"the {message['role']} turn")
            at += len("<turn|>")
            closed = True
            num_tool_images = 0  # they lie before this turn
        elif message["role"] == "assistant":
            if turn == 0 or messages[turn - 1]["role"] in ("system", "user"):
                at = text.find("<|turn>model\n", at)
                if at < 0:
                    raise _torn(turn, "the model turn")
            at, opened = _skip_context(text, at, num_images=num_tool_images)
            num_tool_images = 0
            if at < answered:
                raise _torn(turn - 1, "the tool's answer")
            if closed and not opened:
                raise DataError(
                    f"turn {turn + 1}: the chat template closes the model's turn before this assistant message and "
                    f"opens no other, so it would stand outside any turn. {NEWER_TEMPLATE}, or "
                    f"{setting('text_beside_call', 'reasoning')} if this is text that stood beside a call"
                )
            pieces, at, closed, dropped = _walk_message(text, at, turn, message)
            spans += [(piece, turn) for piece in pieces]
            num_dropped_reasoning += dropped
        else:
            answered = _find_texts(text, max(at, answered), turn, message)
            num_tool_images += num_images_of(message)
    return spans, num_dropped_reasoning


def _find_texts(text: str, at: int, turn: int, message: dict[str, Any]) -> int:
    """The end of the message's texts, which stand in their order somewhere behind `at`."""
    for part in _parts(message):
        if part is not IMAGE:
            found = text.find(part, at)
            if found < 0:
                raise _torn(turn, f"the text {part[:60]!r}")
            at = found + len(part)
    return at


def _skip_context(text: str, at: int, *, num_images: int) -> tuple[int, bool]:
    """The first place from `at` on that may be the model's own, and whether a model turn was opened on the way."""
    opened = False
    while found := CONTEXT.match(text, at) or (num_images > 0 and IMAGE_BLOCK.match(text, at)):
        opened = opened or found.group() == "<|turn>model\n"
        num_images -= found.group().count("<|image>")
        at = found.end()
    return at, opened


def _walk_message(
    text: str, at: int, turn: int, message: dict[str, Any]
) -> tuple[list[tuple[int, int]], int, bool, bool]:
    """The spans of one assistant message that begins at `at`; the place behind it; whether it closed the model's turn;
    whether its reasoning was left out."""
    spans = []
    start = at
    dropped = False
    if reasoning := message.get("reasoning_content"):
        block = f"<|channel>thought\n{reasoning}\n<channel|>"
        dropped = not text.startswith(block, at)
        at += 0 if dropped else len(block)
    for call in message.get("tool_calls", []):
        if not text.startswith(f"<|tool_call>call:{call['function']['name']}{{", at):
            raise _torn(turn, f"the call of {call['function']['name']!r}")
        at = text.index("<tool_call|>", at) + len("<tool_call|>")
    for part in _parts(message):
        if part is IMAGE:  # shown to the model, not written by it
            found = IMAGE_BLOCK.match(text, at)
            if not found:
                raise _torn(turn, "an image")
            spans.append((start, at))
            start = at = found.end()
        elif text.startswith(part, at):
            at += len(part)
        else:
            raise _torn(turn, f"the text {part[:60]!r}")
    says = at > start or bool(spans)
    closed = False
    if message.get("tool_calls") and text.startswith("<|tool_response>", at):
        at += len("<|tool_response>")
    elif text.startswith("<turn|>", at):
        at += len("<turn|>")
        closed = True
    if says:  # the end of a turn in which nothing is left is the template's
        spans.append((start, at))
    return [span for span in spans if span[0] < span[1]], at, closed, dropped


def _parts(message: dict[str, Any]) -> list[str]:
    """The text pieces of an assistant message as templates write them (trimmed), IMAGE for each picture."""
    content = message["content"]
    if isinstance(content, str):
        return [content.strip()]
    return [IMAGE if part["type"] == "image" else part["text"].strip() for part in content]


def _torn(turn: int, piece: str) -> DataError:
    return DataError(
        f"turn {turn + 1}: the chat template loses or moves {piece}, so what the model emits cannot be told from the "
        f"rest. {NEWER_TEMPLATE}"
    )


def num_images_of(message: dict[str, Any]) -> int:
    content = message["content"]
    return 0 if isinstance(content, str) else sum(part["type"] == "image" for part in content)
