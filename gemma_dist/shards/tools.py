"""`tools.json` of a shard folder: each declaration that its rows show to the model, once, as a server should send it.

    [
    {"type":"function","function":{"name":"add","description":"Adds.","parameters":{…}}},
    {"type":"function","function":{"name":"now","description":""}}
    ]

They stand in the order in which they are first used. A name that rows declare in different ways has a line for each.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import pyarrow.parquet as pq

from gemma_dist.errors import DataError
from gemma_dist.files import begin, publish
from gemma_dist.shards.manifest import Manifest

TOOLS = "tools.json"


class Declaration(NamedTuple):
    """A tool's declaration as it is written, and what two share that differ in the order of their keys alone. A piece
    keeps the three side by side, between tabs: neither a name nor JSON holds one."""

    digest: str
    name: str
    text: str  # JSON

    @classmethod
    def of(cls, tool: Any) -> Self:
        """Of a tool in normal form."""
        canonical = json.dumps(tool, sort_keys=True).encode()
        digest = hashlib.blake2b(canonical, digest_size=16).hexdigest()
        text = json.dumps(tool, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return cls(digest, tool["function"]["name"], text)

    def line(self) -> str:
        """In a piece."""
        return "\t".join(self)


class SeenTools:
    """Which declarations came before: of each, no more is held than a hash and its name."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def is_new(self, tool: Declaration) -> bool:
        """Whether the declaration came for the first time; the order of its keys does not count."""
        if tool.digest in self._seen:
            return False
        self._seen[tool.digest] = tool.name
        return True

    def __len__(self) -> int:
        return len(self._seen)

    def names_declared_twice(self) -> list[str]:
        """The names with several declarations, in alphabetical order."""
        once: set[str] = set()
        twice: set[str] = set()
        for name in self._seen.values():
            (twice if name in once else once).add(name)
        return sorted(twice)


def _of_piece(path: Path) -> Iterator[Declaration]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield Declaration(*line[:-1].split("\t"))


def refuse_foreign_tools(out: Path, before: Manifest) -> None:
    """Refuse to append where an earlier version made the shards and `tools.json` is a file of the user's."""
    if "num_tools" not in before.header and (out / TOOLS).exists():
        raise DataError(
            f"{out / TOOLS} is no file of these shards, and would be replaced by the tools that their rows declare; "
            "move it to another folder"
        )


def write_tools(out: Path, before: Manifest | None, new: Iterable[Path]) -> SeenTools:
    """Write the distinct declarations of the corpus `before` and of the pieces' lists to `out`/tools.json, whole or not
    at all; no file where there is none."""
    seen = SeenTools()
    temporary = out / f".{TOOLS}.tmp"
    begin(temporary)
    with temporary.open("w", encoding="utf-8") as file:
        for tool in _old_and_new(out, before, new):
            if seen.is_new(tool):
                lead = ",\n" if len(seen) > 1 else "[\n"
                file.write(lead + tool.text)
        file.write("\n]\n")
    if len(seen):
        publish(temporary, out / TOOLS)
    else:
        temporary.unlink()
    return seen


def _old_and_new(out: Path, before: Manifest | None, new: Iterable[Path]) -> Iterator[Declaration]:
    if before:
        yield from map(Declaration.of, _tools_of(out, before))
    for path in new:
        if path.exists():
            yield from _of_piece(path)


def _tools_of(out: Path, before: Manifest) -> Iterator[Any]:
    """The declarations of a finished corpus: from its tools.json, or from its rows where an earlier version made it."""
    num_tools = before.header.get("num_tools")
    if num_tools is not None and (out / TOOLS).is_file():
        try:
            tools = json.loads((out / TOOLS).read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{out / TOOLS} is damaged ({error}); remove it, and it is made again") from None
        yield from tools[:num_tools]  # an append that was killed may have put its own behind them
        return
    for shard in before.header["shards"]:
        with pq.ParquetFile(out / shard["name"]) as file:
            for batch in file.iter_batches(columns=["tools"]):
                for text in batch.column("tools").to_pylist():
                    yield from json.loads(text)
