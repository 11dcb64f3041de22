"""Which pieces of a pack's documents one call of attention takes together: arithmetic on the host.

A full layer attends to whole documents, a sliding one to windows of them. A call takes a batch of rows of one length,
so that a layer needs a handful of calls however many documents there are:

- `causal` rows: a document, or its first window. Queries are the keys, and there is no mask. Those of like length are
  padded to one.
- `band` rows: a later window, `window` queries and the `window - 1` keys before the first of them; all share one mask.
- `short` rows: documents no longer than the window, as many in a row as fit; each row has a mask of its own.
- `images` rows: a window of a longer document, with tokens that see later ones of their image, which may go on behind
  the last query; each has a mask of its own.

What is padded changes nothing: its keys are seen by padded queries alone, whose results are dropped and whose gradients
are 0.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

# What another call costs, in scores (queries x keys) that padding may add instead, and what a padded query costs beside
# its scores. A fast GPU does as many in the time that the launches take.
SCORES_A_CALL, SCORES_A_TOKEN = 2**20, 2**11
MASKED = 2  # times as long take scores with a mask (an assumption: nothing here was timed)
SHORT_ROW = 256  # tokens of a row of short documents, or those of the longest of them
# Batches of causal and of band rows, at most, and one more for so many tokens: a long pack keeps a GPU busy for longer.
BATCHES, TOKENS_A_BATCH = 2, 8192
ALIGNMENT = 8  # elements of a row of a mask, as CUDA's kernels want it
FAR = 2**40  # between documents: more than any two tokens of one are apart

Kind = Literal["causal", "band", "short", "images"]
Numbers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class Heads:
    """Of a layer type."""

    queries: int
    keys: int


class Piece(NamedTuple):
    """Queries of one document, and the keys that they see, as tokens of the pack."""

    first: int  # query
    num_queries: int
    first_key: int
    num_keys: int


Row = list[Piece]


@dataclass(frozen=True)
class Group:
    """The rows of one call, each padded to so many queries and keys."""

    kind: Kind
    rows: int
    queries: int
    keys: int

    @property
    def has_masks(self) -> bool:
        """Whether each row has a mask of its own."""
        return self.kind in ("short", "images")


@dataclass(frozen=True)
class Calls:
    """The calls of a layer type, one after the other, and where the pack's tokens stand in them.

    `arrays`: int64, by name; those of queries or keys are absent where all stand as in the pack.
        query_slots: for each head of each query of the calls, which it is of the pack's (token x heads + head).
        query_places: (1, tokens x heads, 1), the other way round.
        key_slots: for each key of the calls, which token it is. Values are the same.
        key_places: (2, tokens, places): where each key, and each value behind all keys, stands. What fills up is a
            place of padding, which gets no gradient.
        masks: for each group that has masks: `codes` of its queries, their images, and the same of its keys.
    """

    groups: list[Group]
    window: int  # of its masks
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
    numbers, num_tokens = np.asarray(images), spans[-1][1]
    # Whether a token is of the same image as the one before; documents are told apart by whoever asks.
    continues = np.append(False, (numbers[1:] == numbers[:-1]) & (numbers[1:] != 0))
    calls = {}
    for layer_type, heads_of_type in heads.items():
        is_full = layer_type == "full_attention"
        pieces: dict[Kind, list[Piece]] = {"causal": [], "band": [], "short": [], "images": []}
        for start, end in spans:
            if is_full:
                pieces["causal"].append(Piece(start, end - start, start, end - start))
            else:
                for kind, piece in _windows(start, end, continues, window):
                    pieces[kind].append(piece)
        seen = (num_tokens, np.zeros_like(numbers)) if is_full else (window, numbers)
        calls[layer_type] = _calls(_rows(pieces, window, num_tokens), spans, heads_of_type, *seen)
    return calls


def _windows(start: int, end: int, continues: Numbers, window: int) -> Iterator[tuple[Kind, Piece]]:
    """The pieces of one document of a sliding layer, `window` queries each."""
    for first in range(start, end, window):
        last = min(first + window, end)
        seen, seen_end = max(start, first - window + 1), last
        while seen_end < end and continues[seen_end]:
            seen_end += 1  # the last query's image goes on
        kind: Kind = "causal" if first == start else "band"
        if continues[first + 1 : seen_end].any():
            kind = "short" if end - start <= window else "images"
        yield kind, Piece(first, last - first, seen, seen_end - seen)


def _rows(pieces: dict[Kind, list[Piece]], window: int, num_tokens: int) -> list[tuple[Kind, list[Row]]]:
    """The rows of each call."""
    most = BATCHES + num_tokens // TOKENS_A_BATCH
    causal, short = _batches(pieces["causal"], most, window)
    rows: list[tuple[Kind, list[Row]]] = [("causal", batch) for batch in causal]
    rows += [("band", batch) for batch in _batches(pieces["band"], most, 0)[0]]
    if short := [*pieces["short"], *short]:
        rows.append(("short", _filled(short, window)))
    if pieces["images"]:
        rows.append(("images", [[piece] for piece in pieces["images"]]))
    return rows


def _batches(pieces: list[Piece], most: int, window: int) -> tuple[list[list[Row]], list[Piece]]:
    """Pieces of like length together, in `most` batches or less, and the shortest, no longer than `window`, that are
    rather put into `short` rows: what costs the least.

    What the first sizes (from the longest) cost in so many batches follows from what fewer of them cost in one less.
    """
    if not pieces:
        return [], []
    in_order = sorted(pieces, key=lambda piece: -piece.num_queries)
    lengths, counts = np.unique([-piece.num_queries for piece in in_order], return_counts=True)
    lengths, ends = -lengths, np.append(0, counts.cumsum())  # in `in_order`, of each length
    extra = in_order[0].num_keys - in_order[0].num_queries  # keys of a band
    costs = np.full((most + 1, len(lengths) + 1), np.inf)  # by number of batches, and of lengths
    costs[0, 0] = 0
    begins = np.zeros(costs.shape, dtype=int)  # of the last of these batches
    for number in range(1, len(lengths) + 1):
        longest = lengths[:number]
        batch = (ends[number] - ends[:number]) * longest * (longest + extra + SCORES_A_TOKEN) + SCORES_A_CALL
        sums = costs[:-1, :number] + batch
        begins[1:, number], costs[1:, number] = sums.argmin(1), sums.min(1)
    tokens = np.append((lengths * counts)[::-1].cumsum()[::-1], 0)  # of that length and shorter ones
    width = np.append(np.clip(lengths, min(SHORT_ROW, window), window), 0)
    in_short_rows = tokens * (MASKED * width + SCORES_A_TOKEN) + SCORES_A_CALL * (tokens > 0)
    in_short_rows[:-1][lengths > window] = np.iinfo(np.int64).max // 2
    left, end = divmod(int((costs + in_short_rows).argmin()), costs.shape[1])
    batches: list[list[Row]] = []
    short = in_order[ends[end] :]
    while end:
        begin = int(begins[left, end])
        batches.insert(0, [[piece] for piece in in_order[ends[begin] : ends[end]]])
        end, left = begin, left - 1
    return batches, short


def _filled(pieces: list[Piece], window: int) -> list[Row]:
    """Rows of about as many tokens, at most `window`, in which documents stand one behind the other."""
    in_order = sorted(pieces, key=lambda piece: -piece.num_queries)
    longest = in_order[0].num_queries
    widest = min(window, max(longest, SHORT_ROW))
    rows = _first_fit(in_order, widest)
    least = max(longest, sum(piece.num_queries for piece in pieces) // len(rows))
    narrower = (_first_fit(in_order, width) for width in range(least, widest, max(1, widest // 32)))
    return next((one for one in narrower if len(one) == len(rows)), rows)


def _first_fit(pieces: list[Piece], width: int) -> list[Row]:
    """Each piece in the first row that has room for it."""
    rows: list[Row] = []
    room: list[int] = []
    for piece in pieces:
        at = next((at for at, left in enumerate(room) if left >= piece.num_queries), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(width)
        rows[at].append(piece)
        room[at] -= piece.num_queries
    return rows


def _calls(
    rows: list[tuple[Kind, list[Row]]], spans: Sequence[tuple[int, int]], heads: Heads, window: int, images: Numbers
) -> Calls:
    groups, queries, keys = [], [], []
    for kind, of_group in rows:
        num_queries = max(sum(piece.num_queries for piece in row) for row in of_group)
        num_keys = max(sum(piece.num_keys for piece in row) for row in of_group)
        if kind == "band":
            num_keys = window - 1 + num_queries
        if kind in ("band", "images"):
            num_keys += 1  # of padding at least: some keys stand in several rows, and others in fewer
        if kind != "causal":
            num_keys += -num_keys % ALIGNMENT
        groups.append(Group(kind, len(of_group), num_queries, num_keys))
        queries.append(_tokens(of_group, num_queries, lambda piece: (piece.first, piece.num_queries)))
        keys.append(_tokens(of_group, num_keys, lambda piece: (piece.first_key, piece.num_keys)))
    num_tokens = spans[-1][1]
    slots = [_slots_of_heads(*each, heads) for each in zip(groups, queries, strict=True)]
    arrays = _unless_in_order(np.concatenate(slots), num_tokens * heads.queries, "query")
    arrays |= _unless_in_order(np.concatenate([tokens.ravel() for tokens in keys]), num_tokens, "key")
    if any(group.has_masks for group in groups):
        document = np.repeat(np.arange(len(spans)), [end - start for start, end in spans]) * FAR
        codes, images = document + np.arange(num_tokens), np.where(images > 0, document + images, -1)
        parts = []
        for group, *tokens in zip(groups, queries, keys, strict=True):
            if group.has_masks:
                parts += [_of_each(numbers, part) for part in tokens for numbers in (codes, images)]
        arrays["masks"] = np.concatenate(parts)
    return Calls(groups, window, any((tokens < 0).any() for tokens in queries), arrays)


def _tokens(rows: list[Row], width: int, run: Callable[[Piece], tuple[int, int]]) -> Numbers:
    """(rows, width): the tokens of the runs (first, number) of each row; -1 behind them."""
    tokens = np.full((len(rows), width), -1)
    for number, row in enumerate(rows):
        at = 0
        for first, count in map(run, row):
            tokens[number, at : at + count] = np.arange(first, first + count)
            at += count
    return tokens


def _of_each(numbers: Numbers, tokens: Numbers) -> Numbers:
    """The number of each token, flat; -1 of padding."""
    return np.where(tokens < 0, -1, numbers[tokens]).ravel()


def _slots_of_heads(group: Group, tokens: Numbers, heads: Heads) -> Numbers:
    """The heads of queries as they stand in a call; -1 of padding. Where there is a mask, query heads that share a key
    head stand as further queries of it: so keys and values need no copy for each of them."""
    order = np.arange(heads.queries)
    if group.kind != "causal":
        order = order.reshape(heads.keys, -1).T.ravel()
    tokens = tokens.reshape(-1, 1)
    return np.where(tokens < 0, -1, tokens * heads.queries + order).ravel()


def _unless_in_order(slots: Numbers, number: int, name: Literal["query", "key"]) -> dict[str, Numbers]:
    """The arrays of `number` queries or keys of a pack that stand in `slots` of the calls."""
    if np.array_equal(slots, np.arange(number)):
        return {}
    places = np.flatnonzero(slots >= 0)
    held = slots[places]
    if name == "query":  # each stands in one place
        of_each = np.empty((number, 1), dtype=np.int64)
        of_each[held, 0] = places
        return {"query_slots": slots.clip(0), "query_places": of_each[None]}
    counts = np.bincount(held, minlength=number)
    by_number = np.argsort(held, kind="stable")
    nth = np.arange(len(held)) - np.repeat(counts.cumsum() - counts, counts)
    of_each = np.full((number, counts.max()), -1)
    of_each[held[by_number], nth] = places[by_number]
    if (of_each < 0).any():
        of_each[of_each < 0] = np.flatnonzero(slots < 0)[0]
    return {"key_slots": slots.clip(0), "key_places": np.stack([of_each, of_each + len(slots)])}
