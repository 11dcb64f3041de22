"""What `gemma-dist stats` says of a corpus: its numbers, as JSON or as tables for a terminal."""

import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from gemma_dist.show.duplicates import Duplicates, Example, Leaks, Overlap
from gemma_dist.show.tool_counts import ToolCount

TOKENS = ("tokens", "text_tokens", "image_tokens", "trained_tokens")  # of rows that were encoded
LENGTHS = ("characters", "messages", "user_turns", "calls", "images")  # of every row
NUM_BINS = 40  # of a histogram
NUM_SHOWN = 20  # tools, reasons: the JSON has all of them
NUM_KEYS_SHOWN = 4
NUMBER = 13  # characters of a column of numbers
WIDTH, INDENT = 120, "    "


@dataclass(frozen=True)
class Spread:
    """How a number is spread over the rows. Percentiles are values of rows, none is interpolated."""

    total: int
    mean: float
    p50: int
    p90: int
    p99: int
    max: int
    bins: list[int] = field(default_factory=list, compare=False)  # rows in each of NUM_BINS equal ranges from 0 to max


@dataclass
class Refusal:
    """Rows that were refused for one reason."""

    first: str  # place of the first one
    num_rows: int = 0


@dataclass(frozen=True)
class Weights:
    """By which the losses of rows are multiplied."""

    num_rows: int  # of which it is not 1
    min: float
    max: float
    mean: float  # of all rows


@dataclass(frozen=True)
class CorpusStats:
    """What the rows of a corpus are like."""

    data: list[str]
    num_rows: int  # without those that are refused
    num_refused: int
    refused: dict[str, Refusal]  # by reason
    notes: dict[str, int]  # what parsing changed or left out of raw rows: how often
    num_encoded: int  # rows whose tokens are known
    trained_share: float | None  # of all tokens
    per_row: dict[str, Spread]
    tools: list[ToolCount]
    never_called: list[str]
    num_rows_without_declarations: int  # that call tools and declare none
    exact: Duplicates
    near: Duplicates
    same_prompt: Duplicates
    against: Overlap | None
    weights: Weights | None  # None: no row has one

    def to_json(self) -> dict[str, Any]:
        """All of it, as `--json` prints it."""
        return asdict(self)

    def render(self) -> str:
        """Tables for a terminal."""
        parts = [_rows(self), _lengths(self), _tools(self), _conflicts(self), _duplicates(self), _overlap(self)]
        blocks = []
        for lines in parts:
            text = "\n".join(lines)
            if text:
                blocks.append(text)
        return "\n\n".join(blocks)


def _rows(stats: CorpusStats) -> Iterator[str]:
    """How many rows, why others are refused, and what parsing changed."""
    yield _corpus(stats.data, stats.num_rows, stats.num_refused)
    for reason, refusal in list(stats.refused.items())[:NUM_SHOWN]:
        yield f"  {refusal.num_rows:,} x {reason}, first in {refusal.first}"
    yield from _more(len(stats.refused), "reasons")
    for note, count in sorted(stats.notes.items()):
        yield f"{count:,} x {note}"
    if weights := stats.weights:
        rows = _count(weights.num_rows, "row")
        yield f"weights: {rows} with one, from {weights.min:g} to {weights.max:g}; mean of all rows {weights.mean:.3g}"


def _lengths(stats: CorpusStats) -> Iterator[str]:
    """A line for each number that rows have."""
    if not stats.per_row:
        return
    columns = ("total", "mean", "p50", "p90", "p99", "max")
    yield _line("each row", columns)
    for name, spread in stats.per_row.items():
        numbers = [f"{getattr(spread, column):,}" for column in columns if column != "mean"]
        yield _line(name.replace("_", " "), [numbers[0], f"{spread.mean:,.1f}", *numbers[1:]])
    if stats.trained_share is None:
        yield "tokens are counted with --model, and in shards"
    else:
        yield f"trained: {stats.trained_share:.1%} of the tokens"
        if stats.num_encoded < stats.num_rows:
            yield f"tokens: of {stats.num_encoded:,} rows alone; --model counts those of raw rows, too"


def _line(name: str, cells: "tuple[str, ...] | list[str]") -> str:
    """A line of the table of lengths, its cells aligned to the right."""
    return f"{name:<15}" + "".join(f" {cell:>{NUMBER - 1}}" for cell in cells)


def _tools(stats: CorpusStats) -> Iterator[str]:
    """The tools that are called most, and those that never are."""
    if stats.tools:
        yield f"{'rows with it':>12}{'calls':>{NUMBER}}  tool ({len(stats.tools):,})"
    for tool in stats.tools[:NUM_SHOWN]:
        yield f"{tool.num_rows:>12,}{tool.num_calls:>{NUMBER},}  {tool.name}"
    yield from _more(len(stats.tools), "tools")
    if stats.never_called:
        yield f"never called: {_count(len(stats.never_called), 'tool')}"
        names = ", ".join(stats.never_called[:NUM_SHOWN])
        yield textwrap.fill(names, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT, break_on_hyphens=False)
        yield from _more(len(stats.never_called), "tools that are never called")
    if stats.num_rows_without_declarations:
        yield f"tools called and none declared: {_count(stats.num_rows_without_declarations, 'row')}"


def _conflicts(stats: CorpusStats) -> Iterator[str]:
    """Names that stand for several declarations."""
    conflicts = [tool for tool in stats.tools if tool.num_declarations > 1]
    if conflicts:
        yield f"{'declarations':>12}  tool that is declared in several ways ({len(conflicts):,})"
    for tool in conflicts[:NUM_SHOWN]:
        keys = ", ".join(tool.differing[:NUM_KEYS_SHOWN])
        more = ", …" if len(tool.differing) > NUM_KEYS_SHOWN else ""
        yield f"{tool.num_declarations:>12,}  {tool.name}: they differ in {keys}{more}"
        yield f"{'':>14}{'  '.join(tool.places)}"
    yield from _more(len(conflicts), "names")


def _duplicates(stats: CorpusStats) -> Iterator[str]:
    """Rows that are there twice, or nearly."""
    yield from _groups("exact duplicates", stats.exact)
    yield from _groups("near duplicates", stats.near)
    yield from _groups("same prompt, another answer", stats.same_prompt)


def _groups(name: str, found: Duplicates) -> Iterator[str]:
    """exact duplicates: 4 rows in 2 groups; and the first groups, one a line."""
    groups = f" in {_count(found.num_groups, 'group')}" if found.num_groups else ""
    yield f"{name}: {_count(found.num_rows, 'row')}{groups}"
    yield from map(_example, found.examples)


def _overlap(stats: CorpusStats) -> Iterator[str]:
    """Rows that the other corpus has, too."""
    overlap = stats.against
    if overlap is None:
        return
    yield f"against {_corpus(overlap.data, overlap.num_rows, overlap.num_refused)}"
    yield from _leaks("in both, exactly", overlap.exact)
    yield from _leaks("in both, nearly", overlap.near)
    yield from _leaks("in both, same prompt, another answer", overlap.same_prompt)


def _leaks(name: str, found: Leaks) -> Iterator[str]:
    """in both, exactly: 2 rows; and the first of them, one a line."""
    yield f"{name}: {_count(found.num_rows, 'row')}"
    yield from map(_example, found.examples)


def _example(example: Example) -> str:
    """One line: the places of its rows, with their ids where the place does not say them."""
    names = []
    for row in example.rows:
        is_named_by_place = row["place"].endswith(row["id"])
        names.append(row["place"] if is_named_by_place else f"{row['place']} ({row['id']})")
    similarity = "" if example.similarity is None else f"  {example.similarity:.0%} alike"
    return f"{INDENT}{'  '.join(names)}{similarity}"


def _corpus(data: list[str], num_rows: int, num_refused: int) -> str:
    """train.jsonl: 1,000 rows, 3 refused."""
    refused = f", {num_refused:,} refused" if num_refused else ""
    return f"{', '.join(data)}: {_count(num_rows, 'row')}{refused}"


def _count(number: int, noun: str) -> str:
    """1 row, 2 rows."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _more(number: int, noun: str) -> Iterator[str]:
    """That there are more than NUM_SHOWN."""
    if number > NUM_SHOWN:
        yield f"  … and {number - NUM_SHOWN:,} more {noun}: --json has them all"
