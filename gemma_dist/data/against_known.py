"""What a chat template of strangers makes of a row, against what the newest known one makes of it.

A template is a program: it may put words of its own into any turn, or change the row's. Known revisions are proved by
tests. Of any other one, what is trained must be what the known one writes, but for blanks, which are shown; and of the
turns of others, the row's own words are taken out of both renderings, so that what is left are the templates': where
these differ, the template adds something. That is no fault (a company's system prompt, the date), but nobody should
train on it unseen.
"""

import functools
import re
from collections import Counter
from dataclasses import dataclass

from gemma_dist.data.content import content_parts
from gemma_dist.data.emitted import Emitted, Span, find_emitted
from gemma_dist.data.strict import without_spaces
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.data.types import Message, Tool
from gemma_dist.errors import DataError
from gemma_dist.gemma_format import CHANNEL_END, QUOTE, STOP_TOKENS, THOUGHT, TURN

_DECLARED = re.compile(r"declaration:([^{]*)\{")
_ANSWERED = re.compile(r"response:([^{]*)\{")
_QUOTED = re.compile(rf"(type:)?{re.escape(QUOTE)}(.*?){re.escape(QUOTE)}", re.DOTALL)
MAX_SHOWN = 200  # characters of what is added, in `inspect`
REMEDY = "use a template that keeps them, such as the model's own or gemma4_v5"


@dataclass(frozen=True)
class Added:
    """What a template writes into one turn besides the row's words and those of the known template."""

    place: str  # "turn 3 (user)"
    role: str
    text: str  # "" where it only leaves out
    instead_of: str  # "" where it only adds

    def __str__(self) -> str:
        if not self.instead_of:
            return f"{self.place}: the chat template adds {_short(self.text)}"
        if not self.text:
            return f"{self.place}: the chat template leaves out {_short(self.instead_of)}"
        return f"{self.place}: the chat template writes {_short(self.text)} for {_short(self.instead_of)}"


@dataclass(frozen=True)
class Rendering:
    """A row as one template renders it."""

    text: str
    emitted: Emitted

    @functools.cached_property
    def spans(self) -> dict[int, list[Span]]:
        """Those of each assistant message of which something is rendered, by its index."""
        spans: dict[int, list[Span]] = {}
        for span in self.emitted.spans:
            spans.setdefault(span.message_index, []).append(span)
        return spans


def compare(text: str, emitted: Emitted, known_text: str, trajectory: Trajectory) -> list[Added]:
    """What a rendered trajectory holds in the turns of others that the known template's does not.

    Raises:
        DataError: what is trained is not what the row says, or a tool's name or description is lost.
    """
    if text == known_text:
        return []
    messages, tools = trajectory.messages, trajectory.tools
    given, known = Rendering(text, emitted), Rendering(known_text, find_emitted(known_text, messages))
    added: list[Added] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            added += _blanks(_said(given, index), _said(known, index), message, index)
    _require_declarations(given, tools, messages)
    both = given.spans.keys() & known.spans.keys()
    for (index, gap), (_, expected) in zip(_gaps(given, messages, both), _gaps(known, messages, both), strict=True):
        if without_spaces(gap) != without_spaces(expected):
            if index < len(messages) and messages[index]["role"] == "tool":
                _require_name(gap, expected, index)
            added += _differences(gap, expected, messages, index)
    return added


def count_added(added: list[Added]) -> Counter[str]:
    """What is added, as the notes of a report count it."""
    return Counter(
        f"words of the chat template's own in a turn of the {one.role}, as `gemma-dist inspect` shows" for one in added
    )


# ---- what is trained -------------------------------------------------------------------------------------------------


def _said(rendering: Rendering, index: int) -> tuple[str, bool]:
    """All that a message's spans hold but for the token with which the model stops, and whether there is one."""
    text = "".join(rendering.text[span.start : span.end] for span in rendering.spans.get(index, []))
    for token in STOP_TOKENS:
        if text.endswith(token):
            return text.removesuffix(token), True
    return text, False


def _blanks(given: tuple[str, bool], known: tuple[str, bool], message: Message, index: int) -> list[Added]:
    """Blanks in which what is trained differs, as in a call; DataError where it differs in more."""
    (text, stops), (expected, should_stop) = given, known
    thought = f"{THOUGHT}{message.get('reasoning_content', '')}\n{CHANNEL_END}"  # some show it where others do not
    text, expected = text.removeprefix(thought), expected.removeprefix(thought)
    if without_spaces(text) != without_spaces(expected):
        start = _common_prefix(text, expected)
        raise DataError(
            f"turn {index + 1}: the chat template writes {_short(text[start:])} where the row says "
            f"{_short(expected[start:])}; {REMEDY}"
        )
    if should_stop and text and not stops:
        raise DataError(
            f"turn {index + 1}: the chat template writes something between what the model says and the token with "
            f"which it stops, so that a model would not learn to stop; {REMEDY}"
        )
    if text == expected:
        return []
    return [Added(f"turn {index + 1} (assistant)", "assistant", *_difference(text, expected))]


# ---- what others say -------------------------------------------------------------------------------------------------


def _gaps(rendering: Rendering, messages: list[Message], spoken: set[int]) -> list[tuple[int, str]]:
    """What stands in front of each of the row's words, and the index of the message that has them; at last what stands
    behind all of them.

    Args:
        spoken: indices of the assistant messages of which something is rendered.
    """
    text, position = rendering.text, 0
    gaps: list[tuple[int, str]] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            spans = rendering.spans[index] if index in spoken else []
            places = [(spans[0].start, spans[-1].end)] if spans else []
        else:
            places = _places(text, message, position)
        for start, end in places:
            gaps.append((index, text[position:start]))
            position = end
    return [*gaps, (len(messages), text[position:])]


def _places(text: str, message: Message, position: int) -> list[tuple[int, int]]:
    """Where a message's texts stand; `find_emitted` has found each of them."""
    places = []
    for part in content_parts(message["content"]):
        if part["type"] == "text":
            words = part["text"].strip()
            start = max(text.find(words, position), position)
            position = start + len(words)
            places.append((start, position))
    return places


def _differences(gap: str, expected: str, messages: list[Message], index: int) -> list[Added]:
    """What a gap holds that another does not. Declarations are gone through word by word."""
    quoted = _QUOTED.findall(expected) if _DECLARED.search(expected) else []
    words = [text for is_type, text in quoted if not is_type and text.strip()]  # types are the template's own words
    words = _in_order(gap, words)
    added = []
    for piece, other in zip(_split(gap, words), _split(expected, words), strict=True):
        if without_spaces(piece) == without_spaces(other):
            continue
        text, instead_of = (one.strip() for one in _difference(piece, other))
        if text or instead_of:
            is_opened = TURN in piece[: _common_prefix(piece, other)]
            place, role = _turn(messages, index, is_opened=is_opened)
            added.append(Added(place, role, text, instead_of))
    return added


def _split(text: str, words: list[str]) -> list[str]:
    """The text between the words, which stand in it in this order: as many pieces, and one more."""
    pieces, position = [], 0
    for word in words:
        start = text.index(word, position)
        pieces.append(text[position:start])
        position = start + len(word)
    return [*pieces, text[position:]]


def _in_order(text: str, words: list[str]) -> list[str]:
    """Those of the words that stand in the text behind one another."""
    found, position = [], 0
    for word in words:
        start = text.find(word, position)
        if start >= 0:
            found.append(word)
            position = start + len(word)
    return found


def _turn(messages: list[Message], index: int, *, is_opened: bool) -> tuple[str, str]:
    """How to name the turn of a difference in front of message `index`: the turn before it, unless its own is open."""
    if index == 0 and messages[0]["role"] != "system":
        return "in front of turn 1", "system"
    if not is_opened and index > 0 and (index == len(messages) or messages[index]["role"] != "tool"):
        index -= 1
    index = min(index, len(messages) - 1)
    return f"turn {index + 1} ({messages[index]['role']})", messages[index]["role"]


def _require_declarations(given: Rendering, tools: list[Tool], messages: list[Message]) -> None:
    """DataError where a tool's name or description does not stand in front of the first turn of a user or the model."""
    first = next(message["role"] for message in messages if message["role"] != "system")
    head = given.text.partition(f"{TURN}{'model' if first == 'assistant' else first}\n")[0]
    names = [tool["function"]["name"] for tool in tools]
    declared = _DECLARED.findall(head)
    if declared and declared != names:
        raise DataError(f"the chat template declares the tools {_short(', '.join(declared))} for the row's; {REMEDY}")
    descriptions = [tool["function"]["description"].strip() for tool in tools]
    for words in names + descriptions:
        if words not in head:
            raise DataError(f"the chat template leaves {_short(words)} out of the tools that it declares; {REMEDY}")


def _require_name(gap: str, expected: str, index: int) -> None:
    """DataError where a tool's result stands under another name."""
    found, right = _ANSWERED.findall(gap), _ANSWERED.findall(expected)
    if found and right and found != right:
        raise DataError(
            f"turn {index + 1}: the chat template writes the result of {_short(right[-1])} as one of "
            f"{_short(found[-1])}; {REMEDY}"
        )


def _difference(one: str, other: str) -> tuple[str, str]:
    """Both without what they begin and end with alike."""
    start = _common_prefix(one, other)
    end = -_common_prefix(one[start:][::-1], other[start:][::-1]) or None
    return one[start:end], other[start:end]


def _common_prefix(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _short(text: str) -> str:
    return repr(text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…")
