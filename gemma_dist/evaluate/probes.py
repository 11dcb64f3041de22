"""Probes: decision points made of the rows themselves, at which a model that calls by habit shows it.

    withheld    gold's tool is taken out of the declarations: no call of it is possible, and the answer has to say so
    similar     tools of other rows that resemble gold's are offered beside it: gold's is still the one to call
    unneeded    gold answers in words, and tools of another row that have nothing to do with it are offered as well

A row makes at most one probe of each kind, at a point that its id alone decides, and the rows whose ids hash lowest are
taken. Tools are added from the declarations of all rows that were read, in whatever order. So all runs on the same rows
ask the same probes.
"""

import hashlib
import heapq
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from gemma_dist.data.content import content_text
from gemma_dist.data.expected import NO_CALL_EXPECTED
from gemma_dist.data.served import decision_points
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.data.types import Message, Tool
from gemma_dist.data.unroll import first_messages
from gemma_dist.evaluate.beside import PROBES, SIMILAR, UNNEEDED, WITHHELD
from gemma_dist.evaluate.runs import tools_key

NUM_ADDED = 4  # tools that a probe adds to the row's own, at most
SPARE = 4  # times as many points are kept, since some turn out to have no tools to add
MAX_TOOL_SETS = 1000  # that are kept to add tools from: those whose hashes are lowest

WHY_NONE = {
    WITHHELD: "no row calls a declared tool for the first time",
    SIMILAR: "no row calls a tool that shares a word with one that another row declares; a general set brings more",
    UNNEEDED: "no row answers in words where tools of another could be offered; a general set brings more",
}
_WORD = re.compile(r"[^\W\d_]+")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")  # in getWeather


@dataclass(frozen=True)
class _Point:
    """A decision point that a probe may be made of."""

    row: Trajectory
    index: int  # of the first message that answers it
    gold: list[Message]

    @property
    def called(self) -> set[str]:
        """Names of the tools that gold calls."""
        return _called(self.gold)

    @property
    def offered(self) -> set[str]:
        """Names of the tools that the row declares."""
        return {_name(tool) for tool in self.row.tools}


@dataclass
class Probes:
    """Sees rows one after the other; then makes the probes of them all."""

    num_probes: int  # of each kind, at most
    # Of each kind a heap of (hash of the row's id, negative), (number of the row, negative) and point: the first to go
    # has the highest hash, and of rows with one id the first stays.
    _chosen: dict[str, list[tuple[int, int, _Point]]] = field(default_factory=lambda: {kind: [] for kind in PROBES})
    _tool_sets: dict[str, list[Tool]] = field(default_factory=dict)
    _num_rows: int = 0

    def see(self, row: Trajectory) -> None:
        """Note a row's tools, and the points of which it may make probes."""
        self.see_tools(row)
        self._num_rows += 1
        points = [_Point(row, index, gold) for index, gold in decision_points(row.messages)]
        for kind, chosen in self._chosen.items():
            fitting = [point for point in points if _FITS[kind](point)]
            if fitting:
                point = min(fitting, key=lambda point: _hash(kind, row.id, point.index))
                heapq.heappush(chosen, (-_hash(kind, row.id), -self._num_rows, point))
            if len(chosen) > SPARE * self.num_probes:
                heapq.heappop(chosen)

    def see_tools(self, row: Trajectory) -> None:
        """Note a row's tools alone, to be added to others'."""
        if row.tools:
            self._tool_sets[tools_key(row.tools)] = row.tools
        if len(self._tool_sets) > MAX_TOOL_SETS:
            del self._tool_sets[max(self._tool_sets)]

    def make(self) -> Iterator[Trajectory]:
        """The probes, kind by kind: each a row with one decision point. Where no tools can be added to a row, it makes
        none."""
        tool_sets = [self._tool_sets[key] for key in sorted(self._tool_sets)]
        every = {_name(tool): tool for tools in reversed(tool_sets) for tool in tools}
        for kind, chosen in self._chosen.items():
            points = [point for _, _, point in sorted(chosen, key=lambda one: one[:2], reverse=True)]
            made: Iterator[Trajectory | None]
            if kind == WITHHELD:
                made = map(_withheld, points)
            elif kind == SIMILAR:
                made = (_with_tools(point, kind, _similar(point, every)) for point in points)
            else:
                made = (_with_tools(point, kind, _foreign(point, tool_sets)) for point in points)
            yield from islice(filter(None, made), self.num_probes)


def _can_be_withheld(point: _Point) -> bool:
    """Whether gold calls declared tools, which nothing that was said before hangs on."""
    before = _called(point.row.messages[: point.index])
    return bool(point.called) and point.called <= point.offered and not point.called & before


def _calls_declared(point: _Point) -> bool:
    return bool(point.called) and point.called <= point.offered


def _answers_in_words(point: _Point) -> bool:
    return not point.called and not point.row.any_call


_FITS: Mapping[str, Callable[[_Point], bool]] = {
    WITHHELD: _can_be_withheld,
    SIMILAR: _calls_declared,
    UNNEEDED: _answers_in_words,
}


def _alone(point: _Point, gold: Sequence[Message]) -> Trajectory:
    """The row up to this point and with this answer, and no other decision point."""
    row = first_messages(point.row, point.index)
    history: list[Message] = [
        {**message, "train": False} if message["role"] == "assistant" else message for message in row.messages
    ]
    return replace(row, messages=[*history, *gold])


def _with_tools(point: _Point, kind: str, added: Sequence[Tool]) -> Trajectory | None:
    """The row with more tools, in an order that does not tell which are its own; None: there are none to add."""
    if not added:
        return None
    tools = sorted([*point.row.tools, *added], key=lambda tool: _hash(point.row.id, _name(tool)))
    return replace(_alone(point, point.gold), part=kind, tools=tools)


def _withheld(point: _Point) -> Trajectory:
    """The row without the tools that gold calls here, and any words for gold."""
    gold: Message = {"role": "assistant", "content": NO_CALL_EXPECTED}
    if "reasoning_content" in point.gold[0]:  # so that the model thinks here as it does at the row's own point
        gold["reasoning_content"] = point.gold[0]["reasoning_content"]
    tools = [tool for tool in point.row.tools if _name(tool) not in point.called]
    return replace(_alone(point, [gold]), part=WITHHELD, tools=tools, is_outline=True, answers=())


def _similar(point: _Point, every: Mapping[str, Tool]) -> list[Tool]:
    """The tools most like the first that gold calls, of those under other names and with other descriptions."""
    own = {_spelling(name) for name in point.offered}
    called = next(tool for tool in point.row.tools if _name(tool) in point.called)
    ranked = []
    for name in sorted(every):
        tool = every[name]
        is_another = _spelling(name) not in own and _described(tool) != _described(called)
        if is_another and (likeness := _likeness(tool, called)):
            ranked.append((-likeness, name))
    return [every[name] for _, name in sorted(ranked)[:NUM_ADDED]]


def _foreign(point: _Point, tool_sets: Sequence[Sequence[Tool]]) -> list[Tool]:
    """Tools of the row that has the smallest share of its tools' words in common with what was said here."""
    own = {_spelling(name) for name in point.offered}
    said = _words(" ".join(content_text(message["content"]) for message in point.row.messages[: point.index]))
    best: tuple[float, int, list[Tool]] | None = None
    for tools in tool_sets:
        if any(_spelling(_name(tool)) in own for tool in tools):
            continue
        words = set[str]().union(*(_words(f"{_name(tool)} {_described(tool)}") for tool in tools))
        shared = len(words & said) / max(1, len(words))
        ranked = shared, _hash(point.row.id, tools_key(tools)), list(tools[:NUM_ADDED])
        best = ranked if best is None else min(best, ranked, key=lambda one: one[:2])
    return best[2] if best else []


def _likeness(one: Tool, other: Tool) -> float:
    """How many words two tools share: of their names, and of their descriptions (0 to 2)."""
    pairs = (_name(one), _name(other)), (_described(one), _described(other))
    return sum(_overlap(_words(first), _words(second)) for first, second in pairs)


def _overlap(one: set[str], other: set[str]) -> float:
    """The share of all words that both have (Jaccard)."""
    return len(one & other) / max(1, len(one | other))


def _words(text: str) -> set[str]:
    """The words of a text or of a name, however it joins them: get_weather, getWeather."""
    return {word.casefold() for word in _WORD.findall(_HUMP.sub(" ", text))}


def _spelling(name: str) -> str:
    """What names of one tool have in common: neither case nor signs count."""
    return "".join(filter(str.isalnum, name.casefold()))


def _called(messages: Sequence[Message]) -> set[str]:
    return {call["function"]["name"] for message in messages for call in message.get("tool_calls", [])}


def _name(tool: Tool) -> str:
    return tool["function"]["name"]


def _described(tool: Tool) -> str:
    return tool["function"].get("description") or ""


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8])
