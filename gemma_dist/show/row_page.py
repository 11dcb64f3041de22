"""`gemma-dist inspect --html`: one row as a page. Turns with their borders, pictures in their places, what is trained
in color by its kind, and what was cut for its length.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from gemma_dist.data.images import image_size, thumbnail
from gemma_dist.data.kinds import KINDS
from gemma_dist.gemma_format import TURN
from gemma_dist.show.row import Inspection, Piece
from gemma_dist.static_page import heading, paragraph, picture, section, table, text, write_page

LONGEST_SIDE = 768  # pixels of a picture in the page
ROLES = {"model": "assistant"}  # as the chat template calls it -> as rows and the style sheet do
MEANINGS = {
    "text": "words to the user, and the end of the turn",
    "reasoning": "thoughts",
    "call": "that a tool is called, and which",
    "argument": "with which arguments",
}


def write_row_page(path: Path, row: Inspection, source: str) -> None:
    """Write the page of a row of `source`, a file or a folder as a person calls it."""
    facts = [
        f"{len(row.ids):,} tokens = {row.num_text_tokens:,} text + {row.num_image_tokens:,} image",
        f"{row.num_images} image{'' if row.num_images == 1 else 's'}",
        f"{row.num_target_tokens:,} trained",
        f"thinking {'on' if row.enable_thinking else 'off'}",
    ]
    if row.weight != 1:
        facts.append(f"weight {row.weight:g}")
    parts = [heading(row.id, f"A row of {source}, as the model sees it", facts), _legend(row)]
    if row.notes or row.added:
        told = [f"{count:,} x {note}" for note, count in sorted(row.notes.items())]
        parts.append(section("What was changed", *map(paragraph, [*told, *row.added])))
    parts.append(section("The row", *_turns(row), note="colored: trained; a line at the left: one turn"))
    if row.cut:
        cut = [message.partition(": ")[::2] for message in row.cut]
        title = f"Cut from its end for its length: {len(cut)} message{'' if len(cut) == 1 else 's'}"
        parts.append(section(title, table(("role", "what it says"), cut, numbers_from=2)))
    if len(row.samples) > 1:
        parts.append(section("All samples of the row", paragraph(", ".join(row.samples))))
    write_page(path, row.id, parts)


def _legend(row: Inspection) -> str:
    """What each color means, and how many tokens have it."""
    counts: Counter[str] = Counter()
    for piece in row.pieces:
        counts[KINDS.get(piece.kind, "")] += piece.num_tokens
    marks = [
        f'<span class="tokens"><span class="{kind}">{kind}</span></span> {MEANINGS[kind]}: {counts[kind]:,} tokens'
        for kind in KINDS.values()
        if counts[kind]
    ]
    return '<p class="legend">' + "".join(f"<span>{mark}</span>" for mark in marks) + "</p>"


def _turns(row: Inspection) -> Iterator[str]:
    """Each turn as a block of its own."""
    images = iter(enumerate(row.images, start=1))
    for _, group in groupby(row.pieces, lambda piece: piece.turn):
        pieces = list(group)
        opening = pieces[0].text.removeprefix(TURN).partition("\n")[0] if pieces[0].text.startswith(TURN) else ""
        role = opening if opening in ("system", "user", "model", "tool") else ""
        inner = "".join(_shown(piece, images, len(row.images)) for piece in pieces)
        yield f'<div class="turn {ROLES.get(role, role)}"><div class="tokens">{inner}</div></div>'


def _shown(piece: Piece, images: "Iterator[tuple[int, bytes]]", num_images: int) -> str:
    """A piece as HTML. An image takes the next file; its begin and end tokens are text."""
    if piece.is_image:
        number, data = next(images)
        height, width = image_size(data)
        told = f"image {number} of {num_images}: {piece.num_tokens} tokens, {width} x {height} pixels"
        return picture(thumbnail(data, LONGEST_SIDE), told)
    kind = KINDS.get(piece.kind)
    return f'<span class="{kind}">{text(piece.text)}</span>' if kind else text(piece.text)
