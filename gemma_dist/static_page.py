"""Pages to look at that need no script: one file, in one style (`page.css`, that of an evaluation's page, too), dark or
light as the browser is, with nothing loaded from elsewhere.

    write_page(path, "a title", [heading("A title"), section("What", paragraph("words"))])

Texts of rows and files pass through `text`: markup in them is shown, what would hide is written out. The content
security policy names the style by its hash and allows nothing else, so that a browser would run no script either.
"""

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

from gemma_dist.files import writing
from gemma_dist.visible import shown, visible

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
<footer class="bottom">Made by gemma-dist.</footer>
</main>
</body>
</html>
"""


@cache
def style() -> str:
    """The style sheet of every page."""
    return resources.files("gemma_dist").joinpath("page.css").read_text(encoding="utf-8")


def policy(script: str | None = None) -> str:
    """The content security policy of a page with the style, and with this script alone."""
    rules = ["default-src 'none'", f"style-src '{_hash(style())}'"]
    if script is not None:
        rules.append(f"script-src '{_hash(script)}'")
    return "; ".join([*rules, "img-src data:", "base-uri 'none'", "form-action 'none'"])


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def text(words: str) -> str:
    """A text of whoever wrote it, as HTML that shows it."""
    return html.escape(visible(words))


def heading(title: str, eyebrow: str = "", facts: Iterable[str] = ()) -> str:
    """The top of a page; facts stand below the title."""
    told = "".join(f"<span>{text(shown(fact))}</span>" for fact in facts)
    above = f'<p class="eyebrow">{text(eyebrow)}</p>' if eyebrow else ""
    return f'<header class="top">{above}<h1>{text(shown(title))}</h1><div class="facts">{told}</div></header>'


def section(title: str, *parts: str, note: str = "") -> str:
    """A card with a title. Parts are HTML."""
    beside = f'<span class="soft small">{text(note)}</span>' if note else ""
    return f'<section class="card"><header><h2>{text(title)}</h2>{beside}</header>{"".join(parts)}</section>'


def paragraph(words: str) -> str:
    """A paragraph of plain words."""
    return f"<p>{text(shown(words))}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 1) -> str:
    """A table of texts; columns from `numbers_from` on (from 0) are set as numbers, those before it as words."""

    def cells(row: Sequence[str], tag: str) -> str:
        classes = ["" if place < numbers_from else ' class="num"' for place in range(len(row))]
        return "".join(f"<{tag}{kind}>{text(shown(cell))}</{tag}>" for kind, cell in zip(classes, row, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def bar(share: float) -> str:
    """A bar as long as a share of 1, for a cell of `rows_of_bars`."""
    return (
        '<svg class="share" viewBox="0 0 200 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{200 * share:.1f}" height="10" rx="2"/></svg>'
    )


def bars(head: tuple[str, str], rows: Sequence[tuple[str, int]]) -> str:
    """Names and numbers, each with a bar as long as its share of the largest."""
    most = max((number for _, number in rows), default=0) or 1
    body = "".join(
        f'<tr><td>{text(shown(name))}</td><td class="num">{number:,}</td><td>{bar(number / most)}</td></tr>'
        for name, number in rows
    )
    titles = f'<th>{text(head[0])}</th><th class="num">{text(head[1])}</th><th></th>'
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def histogram(counts: Sequence[int], last: str) -> str:
    """Columns as high as their counts, over a line from 0 to `last`."""
    width, most = 600 / max(1, len(counts)), max(counts, default=0) or 1
    columns = "".join(
        f'<rect class="mark" x="{place * width + 0.5:.1f}" y="{100 - 96 * count / most:.1f}" '
        f'width="{width - 1:.1f}" height="{96 * count / most:.1f}"><title>{count:,}</title></rect>'
        for place, count in enumerate(counts)
        if count
    )
    return (
        f'<svg class="chart" viewBox="0 0 600 118" role="img">{columns}'
        '<line class="grid" x1="0" x2="600" y1="100" y2="100"/><text x="0" y="114">0</text>'
        f'<text x="600" y="114" text-anchor="end">{text(last)}</text></svg>'
    )


def picture(jpeg: bytes, caption: str) -> str:
    """A JPEG in the page, with words below it."""
    source = base64.b64encode(jpeg).decode()
    return (
        f'<figure><img src="data:image/jpeg;base64,{source}" alt="{text(caption)}" loading="lazy">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write a page of these parts, which are HTML, complete or not at all."""
    one_line = "".join(sign if sign.isprintable() else " " for sign in shown(title))
    page = _PAGE.format(policy=policy(), title=html.escape(one_line), style=style(), body="\n".join(parts))
    with writing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
