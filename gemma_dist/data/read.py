"""Read the text that Gemma 4 generated: calls, content, reasoning and whether it could be read at all.

In the walk from JSONL to checkpoint this is the first step of evaluation. The format is the inverse of Gemma's chat
template (`format_argument` in TRL's chat_templates/gemma4_v5.jinja):

    <|channel>thought\n…<channel|>text<|tool_call>call:NAME{key:<|"|>text<|"|>,n:1,xs:[true,null]}<tool_call|>text

Nothing inside <|"|> is an escape, keys are bare, bare scalars are typed. Beyond what the template writes, blanks
around separators, trailing commas, delimited or JSON-quoted keys, JSON strings and Python's None, True and False are
read, since they can mean only one thing. Everything else (single quotes, parentheses, key=value, bare words, a missing
brace or closing token) makes the call unreadable: it is dropped, the calls beside it are kept, and the status tells.
Calls in the syntax of another model (`foreign.py`) are unreadable too.

No function here raises on any text, and all take time linear in its length. Decode with special tokens kept.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from gemma_dist.data.foreign import holds_foreign_call
from gemma_dist.data.read_call import Unreadable, read_call
from gemma_dist.errors import DataError
from gemma_dist.gemma_format import (
    CALL,
    CALL_END,
    CHANNEL,
    CHANNEL_END,
    EOS,
    RESPONSE,
    RESPONSE_END,
    TURN,
    TURN_END,
)

Status = Literal["ok", "no_call", "malformed", "truncated"]

BLOCKS = (CALL, CALL_END, CHANNEL, CHANNEL_END, RESPONSE, RESPONSE_END, TURN, TURN_END, EOS)
BLOCKS_OF_TOOLS = (CALL, CALL_END, RESPONSE, RESPONSE_END)

# All tokens that never show in content; a stray turn opener goes with the role behind it.
_TOKEN = re.compile(
    r"<\|turn>(?:\w*\n)?|<turn\|>|<eos>|<bos>|<pad>|<\|think\|>"
    r"|<\|(?:tool_call|tool_response|channel|tool)>|<(?:tool_call|tool_response|channel|tool)\|>"
    r"|<\|(?:image|audio|video)\|?>|<(?:image|audio|video)\|>"
)
_LABEL = re.compile(r"\s*thought[ \t]*(?:\n|\Z)")
_BARE_CALL = re.compile(r"^[ \t]*call:[ \t]*[^\s{(]+[ \t]*[{(]", re.MULTILINE)


@dataclass(frozen=True)
class Call:
    """A call that could be read."""

    name: str
    arguments: dict[str, Any]  # JSON values: str, int, finite float, bool, None, list, dict
    span: tuple[int, int]  # characters of the output, from <|tool_call> to behind <tool_call|>


@dataclass(frozen=True)
class Reading:
    """What one generated turn says."""

    calls: tuple[Call, ...]
    content: str  # text before, between and after calls, joined and stripped
    reasoning: str  # all thinking blocks, joined and stripped
    attempted: bool  # a call was begun, readable or not
    # ok: calls, all readable. no_call: plain text, or none at all. malformed: a call that cannot be read, or the wait
    # for a tool that nobody called. truncated: the output ends inside a call, or the caller says that its budget was
    # spent.
    status: Status
    # Where words of the content attempt a call: the reading that takes them for text, as `score` does if gold has them.
    as_text: "Reading | None" = None


def read_output(output: str, prefix: str = "", budget_spent: bool = False, tool_names: Iterable[str] = ()) -> Reading:
    """Read one generated turn. `prefix` is the end of the prompt: where it left a thinking block or a call open, the
    output begins inside it. `budget_spent` says that generation ended at its token limit. `tool_names` are the tools
    declared, by which a call in another model's syntax is told from data."""
    reader = _Reader(open_block(prefix), output)
    for token in _tokens(reader.text):
        reader.read(token)
    return reader.reading(budget_spent, tool_names)


def read_whole_call(text: str) -> Call | None:
    """The call that is the whole of `text`, from <|tool_call> to <tool_call|>; None where it cannot be read as one."""
    if not text.startswith(CALL):
        return None
    try:
        name, arguments, end = read_call(text, len(CALL))
    except Unreadable:
        return None
    return Call(name, arguments, (0, end)) if end == len(text) else None


def open_block(prefix: str) -> str:
    """The end of a prompt from the thinking block or call on that it leaves open, "" if it leaves none."""
    last = max(prefix.rfind(token) for token in BLOCKS)
    return prefix[last:] if last >= 0 and prefix.startswith((CHANNEL, CALL), last) else ""


@dataclass(frozen=True)
class _Token:
    """One of Gemma's tokens in the text, and the nearest ones behind it that decide what it means."""

    kind: str
    start: int
    end: int
    next_channel: re.Match[str] | None  # <|channel> or <channel|>
    next_block: re.Match[str] | None  # any of BLOCKS
    next_response_end: re.Match[str] | None


def _tokens(text: str) -> list[_Token]:
    """All tokens, in order. Looked at from the end, so that each is looked at once."""
    tokens = []
    channel = block = response_end = None
    for match in reversed(list(_TOKEN.finditer(text))):
        kind = match.group()
        tokens.append(_Token(kind, match.start(), match.end(), channel, block, response_end))
        if kind in (CHANNEL, CHANNEL_END):
            channel = match
        if kind == RESPONSE_END:
            response_end = match
        if kind.startswith(BLOCKS):  # a turn opener has its role behind it
            block = match
    return tokens[::-1]


class _Reader:
    """Reads one turn from token to token: what lies between two of them is content, or reasoning."""

    def __init__(self, opening: str, output: str) -> None:
        """`opening` is the block that the prompt left open, from its token on, or ""; the output goes on from there."""
        self.text = opening + output
        self.start_of_output = len(opening)
        self.position = 0  # all text before it is dealt with
        self.thinking = not opening and output.startswith("thought\n")  # some outputs lack the <|channel>
        self.seen_channel = self.thinking
        self.calls: list[Call] = []
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.attempted = False
        self.malformed = False
        self.ends_in_call = False

    def read(self, token: _Token) -> None:
        """Deal with everything up to behind `token`, and with the call or tool response that it opens."""
        if token.start < self.position or self._is_thought(token):
            return
        self._take_text(token.start)
        self.position = token.end
        if token.kind in (TURN_END, EOS):
            self.position = len(self.text)
        elif token.kind == CHANNEL:
            self.thinking = True
            self.seen_channel = True
        elif token.kind == CHANNEL_END:
            self._end_thinking()
        elif token.kind == CALL:
            self._read_call(token)
        elif token.kind in (CALL_END, RESPONSE):
            self._note_call_missing()
        if token.kind == RESPONSE:
            self._skip_response(token)

    def _is_thought(self, token: _Token) -> bool:
        """A call inside a closed thinking block is a thought. In a block that is never closed, it ends the thinking."""
        if not self.thinking or token.kind not in BLOCKS_OF_TOOLS:
            return False
        return token.next_channel is not None and token.next_channel.group() == CHANNEL_END

    def _take_text(self, end: int) -> None:
        """Add what lies between `position` and `end` to content or reasoning, without what the prompt opened with."""
        piece = self.text[max(self.position, self.start_of_output) : end]
        if self.thinking:
            self.reasoning.append(_without_label(piece))
        else:
            self.content.append(piece)

    def _end_thinking(self) -> None:
        """Behind a <channel|>; one without an opener turns what came before it into reasoning."""
        if not self.seen_channel and not self.attempted:  # never opened: what came so far was the thinking
            self.reasoning = [_without_label("".join(self.content))]
            self.content = []
        self.thinking = False
        self.seen_channel = True

    def _read_call(self, token: _Token) -> None:
        """Keep the call behind a <|tool_call>, or skip it if it cannot be read."""
        self.thinking = False
        self.attempted = True
        try:
            name, arguments, end = read_call(self.text, token.end)
        except Unreadable:
            self._skip_call(token.next_block)
            return
        start = max(token.start - self.start_of_output, 0)
        self.calls.append(Call(name, arguments, (start, end - self.start_of_output)))
        self.position = end

    def _skip_call(self, next_block: re.Match[str] | None) -> None:
        """Continue behind the end of an unreadable call, or at the next block if it has none."""
        if next_block is None:
            self.ends_in_call = True
            self.position = len(self.text)
            return
        self.malformed = True
        self.position = next_block.end() if next_block.group() == CALL_END else next_block.start()

    def _note_call_missing(self) -> None:
        """The end of a call, or the wait for its response, where none was begun."""
        if not self.attempted:
            self.attempted = True
            self.malformed = True

    def _skip_response(self, token: _Token) -> None:
        """Leave out what the model wrote in the tool's name: not content."""
        if not self.text.startswith("response:", self.position):
            return
        end = token.next_response_end
        self.position = len(self.text) if end is None else end.end()

    def reading(self, budget_spent: bool, tool_names: Iterable[str]) -> Reading:
        """What was read, once the last token is."""
        self._take_text(len(self.text))
        content = "".join(self.content).strip()
        status: Status = "ok" if self.attempted else "no_call"
        if self.malformed:
            status = "malformed"
        elif self.ends_in_call or budget_spent:
            status = "truncated"
        reasoning = "".join(self.reasoning).strip()
        reading = Reading(tuple(self.calls), content, reasoning, self.attempted, status)
        bare_call = any(_BARE_CALL.search(piece) for piece in self.content)
        if bare_call or holds_foreign_call(content, tool_names):
            return replace(reading, attempted=True, status="malformed", as_text=reading)
        return reading


def _without_label(thought: str) -> str:
    """A thinking block without the line "thought" that the template begins it with."""
    label = _LABEL.match(thought)
    return thought[label.end() :] if label else thought


def reading_to_json(reading: Reading) -> dict[str, Any]:
    """What `gemma-dist read-calls` prints for one output."""
    calls = [{"name": call.name, "arguments": call.arguments} for call in reading.calls]
    return {"calls": calls, "content": reading.content, "reasoning": reading.reasoning, "status": reading.status}


def read_calls_lines(lines: Iterable[str | bytes]) -> Iterator[str]:
    """For each JSON line {"output": string, "prefix"?: string} the line that says what was read. Skips blank lines.

    Raises:
        DataError: a line is of another shape, with its number.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        rule = 'each line is a JSON object {"output": string, "prefix"?: string}'
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"stdin:{number}: not JSON ({error}); {rule}; got {_short(line)}") from None
        if not isinstance(row, dict) or not isinstance(row.get("output"), str):
            raise DataError(f'stdin:{number}: no string under "output"; {rule}; got {_short(line)}')
        prefix = row.get("prefix")
        if not isinstance(prefix, (str, type(None))):
            raise DataError(f'stdin:{number}: "prefix" must be a string or absent; {rule}; got {_short(line)}')
        # ASCII only: a lone surrogate from a \ud800 escape cannot be printed otherwise.
        yield json.dumps(reading_to_json(read_output(row["output"], prefix or "")))


def _short(line: str | bytes) -> str:
    """A line for a message: 80 characters at most, bytes that are no UTF-8 replaced."""
    text = line if isinstance(line, str) else line.decode(errors="replace")
    text = text.strip()
    return text if len(text) <= 80 else text[:77] + "..."
