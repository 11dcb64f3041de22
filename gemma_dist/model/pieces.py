"""Which pieces of a pack's documents one call of attention takes together: arithmetic on the host.

A full layer attends to whole documents, a sliding one to windows of them. Pieces of like length are padded to one length
and make a batch, so that a layer needs a handful of calls however many documents there are. What is padded changes
nothing: its keys are seen by padded queries alone, whose results are dropped and whose gradients are 0.

- A `causal` piece begins with its document: queries are the keys, nothing masks them.
- A `band` piece is a later window, of `window` queries and the `window - 1` keys before the first of them; all such
  pieces share one mask.
- An `images` piece holds tokens that see later ones of their image, which may go on behind its last query; each has a
  mask of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

SCORES_A_CALL = 2**20  # that padding may add, rather than make another call: a GPU's time for them is a launch's
PADDING_A_CALL = 1 / 8  # of the pack's tokens
# Calls of a kind, at most, and one more for each so many tokens: a long pack keeps a GPU busy for longer.
CALLS, TOKENS_A_CALL = 3, 8192
ALIGNMENT = 8  # elements of a row of a mask, as CUDA's kernels want it

Kind = Literal["causal", "band", "images"]
Numbers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class Heads:
    """Of a layer type."""

    queries: int
    keys: int


class Piece(NamedTuple):
    """Queries, and the keys that they see, as tokens of the pack."""

    first: int  # query
    num_queries: int
    first_key: int
    num_keys: int


@dataclass(frozen=True)
class Group:
    """The pieces of one call, each padded to so many queries and keys."""

    kind: Kind
    pieces: int
    queries: int
    keys: int


@dataclass(frozen=True)
class Calls:
    """The calls of a layer type, and the places of tokens in them. Rows are what a gather takes at once.

    `arrays`: int64, by name, absent where the tokens stand as they are:
        query_rows: of each row of the calls (a token's head), the row of the pack that stands there.
        query_places: of each row of the pack, where in the calls it stands.
        key_rows: the same by token, for keys and values; one more at the end if tokens stand in several places.
        key_places: (tokens, places): where each stands, filled up with the last row, which no call takes.
        images: of the pieces with images, positions and images of the queries, then of the keys (-1: padding).
    """

    groups: list[Group]
    is_padded: bool  # whether some queries are
    arrays: dict[str, Numbers] = field(repr=False)


def calls_of(
    spans: Sequence[tuple[int, int]], images: Sequence[int], heads: dict[str, Heads], window: int
) -> dict[str, Calls]:
    """The calls of each layer type.

    Args:
        spans: the documents, as (first token, end), one behind the other.
        images: which image each token is of, 0 for none; not all 0 only for a model whose images see themselves.
        heads: by layer type.
        window: of the sliding layers.
    """
    numbers = np.asarray(images)
    # Whether a token is of the same image as the one before; documents are told apart by whoever asks.
    continues = np.append(False, (numbers[1:] == numbers[:-1]) & (numbers[1:] != 0))
    whole = [Piece(start, end - start, start, end - start) for start, end in spans]
    windows: dict[Kind, list[Piece]] = {"causal": [], "band": [], "images": []}
    for start, end in spans:
        for kind, piece in _windows(start, end, continues, window):
            windows[kind].append(piece)
    by_type: dict[str, dict[Kind, list[Piece]]] = {"full_attention": {"causal": whole}, "sliding_attention": windows}
    return {name: _calls(pieces, numbers, spans, heads[name], window) for name, pieces in by_type.items()}


def _windows(start: int, end: int, continues: Numbers, window: int) -> Iterator[tuple[Kind, Piece]]:
    """The pieces of one document of a sliding layer, `window` queries each."""
    for first in range(start, end, window):
        last = min(first + window, end)
        seen, seen_end = max(start, first - window + 1), last
        while seen_end < end and continues[seen_end]:
            seen_end += 1  # the last query's image goes on
        piece = Piece(first, last - first, seen, seen_end - seen)
        if continues[first + 1 : seen_end].any():
            yield "images", piece
        else:
            yield "causal" if first == start else "band", piece


def _calls(
    pieces: dict[Kind, list[Piece]], images: Numbers, spans: Sequence[tuple[int, int]], heads: Heads, window: int
) -> Calls:
    num_tokens = spans[-1][1]
    grouped: list[tuple[Kind, list[Piece]]] = []
    for kind, of_kind in pieces.items():
        grouped += [(kind, group) for group in _batches(of_kind, num_tokens)]
    groups = [_group(kind, group, window) for kind, group in grouped]
    queries = [_tokens([(one.first, one.num_queries) for one in part], group.queries)
               for group, (_, part) in zip(groups, grouped, strict=True)]  # fmt: skip
    keys = [_tokens([(one.first_key, one.num_keys) for one in part], group.keys)
            for group, (_, part) in zip(groups, grouped, strict=True)]  # fmt: skip
    arrays = _query_arrays(groups, queries, heads, num_tokens) | _key_arrays(keys, num_tokens)
    if masked := [number for number, group in enumerate(groups) if group.kind == "images"]:
        position = np.concatenate([np.arange(end - start) for start, end in spans])
        arrays["images"] = np.concatenate(
            [_known(source, part[number]) for number in masked for part in (queries, keys) for source in (position, images)]
        )
    return Calls(groups, any((tokens < 0).any() for tokens in queries), arrays)


def _batches(pieces: list[Piece], num_tokens: int) -> list[list[Piece]]:
    """Pieces of like length together: as few batches as the padding of one may pay for, and no more than `CALLS`."""
    in_order = sorted(pieces, key=lambda piece: (-piece.num_queries, -piece.num_keys))
    slack = 1
    while True:
        batches: list[list[Piece]] = []
        for piece in in_order:
            if batches:
                longest = batches[-1][0]
                most_keys = max(keys, piece.num_keys)
                padding += longest.num_queries - piece.num_queries
                scores += longest.num_queries * most_keys - piece.num_queries * piece.num_keys
                if padding <= slack * PADDING_A_CALL * num_tokens and scores <= slack * SCORES_A_CALL:
                    batches[-1].append(piece)
                    keys = most_keys
                    continue
            batches.append([piece])
            padding, scores, keys = 0, 0, piece.num_keys
        if len(batches) <= CALLS + num_tokens // TOKENS_A_CALL:
            return batches
        slack *= 2


def _group(kind: Kind, pieces: list[Piece], window: int) -> Group:
    queries = max(piece.num_queries for piece in pieces)
    keys = window - 1 + queries if kind == "band" else max(piece.num_keys for piece in pieces)
    if kind != "causal":
        keys += -keys % ALIGNMENT
    return Group(kind, len(pieces), queries, keys)


def _tokens(runs: list[tuple[int, int]], width: int) -> Numbers:
    """(runs, width): the tokens of runs of (first token, number); -1 behind their ends."""
    first, count = np.array(runs).T[:, :, None]
    column = np.arange(width)
    return np.where(column < count, first + column, -1)


def _known(source: Numbers, tokens: Numbers) -> Numbers:
    """A number of each token, flat; -1 of padding."""
    return np.where(tokens < 0, -1, source[tokens]).ravel()


def _query_arrays(groups: list[Group], queries: list[Numbers], heads: Heads, num_tokens: int) -> dict[str, Numbers]:
    """Rows are heads of tokens. Where there is a mask, query heads that share a key head stand as further queries of it:
    so keys and values need no copy for each of them."""
    in_order = np.arange(heads.queries)
    by_place_in_share = in_order.reshape(heads.keys, -1).T.ravel()
    rows = []
    for group, tokens in zip(groups, queries, strict=True):
        order = in_order if group.kind == "causal" else by_place_in_share
        flat = tokens.reshape(-1, 1)
        rows.append(np.where(flat < 0, -1, flat * heads.queries + order).ravel())
    all_rows = np.concatenate(rows)
    return _unless_in_order(all_rows, num_tokens * heads.queries, "query")


def _key_arrays(keys: list[Numbers], num_tokens: int) -> dict[str, Numbers]:
    return _unless_in_order(np.concatenate([tokens.ravel() for tokens in keys]), num_tokens, "key")


def _unless_in_order(rows: Numbers, number: int, name: str) -> dict[str, Numbers]:
    """`rows` of the calls, each of `number` of the pack or -1, and the places of these, unless both are the same."""
    if np.array_equal(rows, np.arange(number)):
        return {}
    places = np.flatnonzero(rows >= 0)
    held = rows[places]
    counts = np.bincount(held, minlength=number)
    if (most := counts.max()) == 1:
        of_each = np.empty(number, dtype=np.int64)
        of_each[held] = places
    else:
        by_row = np.argsort(held, kind="stable")
        of_each = np.full((number, most), len(rows))
        nth = np.arange(len(held)) - np.repeat(counts.cumsum() - counts, counts)
        of_each[held[by_row], nth] = places[by_row]
        rows = np.append(rows, -1)
    return {f"{name}_rows": rows.clip(0), f"{name}_places": of_each}
