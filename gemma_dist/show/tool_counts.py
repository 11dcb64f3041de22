"""Tools over a corpus: which rows declare each, how often it is called, and whether its declarations agree."""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from gemma_dist.data.trajectory import Trajectory
from gemma_dist.data.types import Function, Json, JsonObject
from gemma_dist.show.fingerprints import hash_json

MAX_KEYS = 20  # in which declarations of a tool differ: more are not collected


@dataclass(frozen=True)
class ToolCount:
    """One name, over all rows."""

    name: str
    num_rows: int  # that declare it
    num_calls: int
    num_declarations: int  # different ones
    differing: list[str]  # keys in which these differ from the first one: `parameters.properties.city.type`
    places: list[str]  # of the first row, and of the first one with another declaration


@dataclass
class _Seen:
    """What is known of a name while rows come in."""

    num_rows: int = 0
    num_calls: int = 0
    first: bytes = b""  # the first declaration: JSON, deflated
    declarations: set[int] = field(default_factory=set)  # hashes of the different ones
    differing: set[str] = field(default_factory=set)
    places: list[str] = field(default_factory=list)


class ToolCounts:
    """Counts the tools of the rows that it is given. Of each name one declaration is held, whatever the rows."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self.num_rows_without_declarations = 0  # rows that call tools and declare none

    def add(self, trajectory: Trajectory, place: str) -> None:
        """Count a row, which stands at `place`."""
        for tool in trajectory.tools:
            self._add_declaration(tool["function"], place)
        num_calls = 0
        for message in trajectory.messages:
            for call in message.get("tool_calls", []):
                self._of(call["function"]["name"]).num_calls += 1
                num_calls += 1
        if num_calls and not trajectory.tools:
            self.num_rows_without_declarations += 1

    def counts(self) -> list[ToolCount]:
        """One for each name, those that are called most first."""
        found = []
        for name, seen in self._seen.items():
            differing = sorted(seen.differing)
            num_declarations = len(seen.declarations)
            found.append(ToolCount(name, seen.num_rows, seen.num_calls, num_declarations, differing, seen.places[:2]))
        return sorted(found, key=lambda tool: (-tool.num_calls, -tool.num_rows, tool.name))

    def _of(self, name: str) -> _Seen:
        """What is known of a name; nothing yet where it is new."""
        return self._seen.setdefault(name, _Seen())

    def _add_declaration(self, function: Function, place: str) -> None:
        """Count a declaration, and what sets it apart from the first one of its name."""
        seen = self._of(function["name"])
        seen.num_rows += 1
        text = json.dumps(function)
        declaration: JsonObject = json.loads(text)
        digest = hash_json(declaration)
        if digest in seen.declarations:
            return
        if not seen.declarations:
            seen.first = zlib.compress(text.encode())
            seen.places.append(place)
        else:
            if len(seen.differing) < MAX_KEYS:
                seen.differing.update(_differing_keys(json.loads(zlib.decompress(seen.first)), declaration))
            if len(seen.places) < 2:
                seen.places.append(place)
        seen.declarations.add(digest)


def _differing_keys(one: Json, other: Json, path: str = "") -> Iterator[str]:
    """The keys below which two JSON values differ, as deep as both are objects.

    {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}} -> "a.c"
    """
    if not isinstance(one, dict) or not isinstance(other, dict):
        yield path
        return
    for key in sorted(one.keys() | other.keys()):
        below = f"{path}.{key}".removeprefix(".")
        if key not in one or key not in other:
            yield below
        elif one[key] != other[key]:
            yield from _differing_keys(one[key], other[key], below)
