"""`gemma-dist stats --html`: a corpus as a page, with the numbers of the terminal's tables and their histograms."""

from collections.abc import Iterator
from pathlib import Path

from gemma_dist.show.duplicates import Example
from gemma_dist.show.stats_report import CorpusStats, Spread
from gemma_dist.static_page import bars, heading, histogram, paragraph, section, table, text, write_page

NUM_TOOLS = 50  # the JSON has all of them
DRAWN = (
    "tokens",
    "image_tokens",
    "trained_tokens",
    "messages",
    "calls",
    "images",
)  # of the lengths, where not all are 0


def write_stats_page(path: Path, stats: CorpusStats) -> None:
    """Write the page of a corpus."""
    data = ", ".join(stats.data)
    facts = [f"{stats.num_rows:,} rows", f"{stats.num_refused:,} refused"]
    if stats.trained_share is not None:
        facts.append(f"{stats.trained_share:.1%} of the tokens are trained")
    write_page(path, f"{data}: rows", [heading(data, "What is in it", facts), *_sections(stats)])


def _sections(stats: CorpusStats) -> Iterator[str]:
    if stats.refused:
        rows = [(reason, f"{refusal.num_rows:,}", refusal.first) for reason, refusal in stats.refused.items()]
        yield section("Refused", table(("reason", "rows", "first in"), rows))
    if stats.notes:
        told = [(note, f"{count:,}") for note, count in sorted(stats.notes.items())]
        yield section("What was changed", table(("what", "how often"), told))
    drawn = "".join(_histograms(stats.per_row))
    yield section("Each row", _lengths(stats.per_row), f'<div class="two">{drawn}</div>')
    if stats.tools:
        called = [(tool.name, tool.num_calls) for tool in stats.tools[:NUM_TOOLS]]
        note = f"{len(stats.tools):,} tools" + (f", the first {NUM_TOOLS}" if len(stats.tools) > NUM_TOOLS else "")
        yield section("Tools", bars(("tool", "calls"), called), note=note)
    conflicts = [tool for tool in stats.tools if tool.num_declarations > 1]
    if conflicts:
        rows = [(tool.name, ", ".join(tool.differing), f"{tool.num_declarations:,}") for tool in conflicts]
        yield section("Tools that are declared in several ways", table(("tool", "differing in", "ways"), rows, 2))
    named = {
        "Exact duplicates": stats.exact,
        "Near duplicates": stats.near,
        "Same prompt, another answer": stats.same_prompt,
    }
    for title, found in named.items():
        if found.num_rows:
            note = f"{found.num_rows:,} rows in {found.num_groups:,} group{'s' * (found.num_groups > 1)}"
            yield section(title, _examples(found.examples), note=note)
    if stats.against is not None:
        yield from _overlap(stats)


def _lengths(per_row: dict[str, Spread]) -> str:
    rows = [
        (name.replace("_", " "), f"{spread.total:,}", f"{spread.mean:,.1f}", *(f"{value:,}" for value in
         (spread.p50, spread.p90, spread.p99, spread.max)))
        for name, spread in per_row.items()
    ]  # fmt: skip
    return table(("", "total", "mean", "p50", "p90", "p99", "max"), rows)


def _histograms(per_row: dict[str, Spread]) -> Iterator[str]:
    for name in DRAWN:
        if name in per_row and per_row[name].max:
            spread = per_row[name]
            drawn = histogram(spread.bins, f"{spread.max:,}")
            yield f"<div><h3>{text(name.replace('_', ' '))} of a row</h3>{drawn}</div>"


def _overlap(stats: CorpusStats) -> Iterator[str]:
    """Rows that the held-out corpus holds, too."""
    overlap = stats.against
    assert overlap is not None
    parts = []
    for title, found in (("Exactly", overlap.exact), ("Nearly", overlap.near), ("Same prompt", overlap.same_prompt)):
        parts.append(f"<h3>{title}: {found.num_rows:,} rows</h3>" + _examples(found.examples))
    yield section("In both", paragraph(f"Against {', '.join(overlap.data)}, {overlap.num_rows:,} rows."), *parts)


def _examples(examples: list[Example]) -> str:
    if not examples:
        return ""
    rows = [
        (
            "  ".join(row["place"] for row in example.rows),
            "" if example.similarity is None else f"{example.similarity:.0%}",
        )
        for example in examples
    ]
    return table(("rows, the first of them", "alike"), rows)
