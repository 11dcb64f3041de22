"""Which trajectories share a sequence: pure arithmetic on their lengths.

The samples of a block (`order.py`) are packed by best fit, longest first: each goes to the pack with the least room
that still takes it. All blocks are packed at once, one numpy operation for all of them, since how many packs each has
is needed before the first step: ten million samples take seconds, once for a corpus and a length.
"""

import numpy as np

BLOCKS_AT_ONCE = 4096  # bounds the memory of counting: this many blocks x samples x 4 bytes


def pack(lengths: np.ndarray, packing_length: int) -> list[list[int]]:
    """Packs of at most `packing_length` tokens, as positions in `lengths` (n,), ascending in each pack.

    A trajectory that is longer has a pack to itself.
    """
    (packs,) = pack_all([lengths], packing_length)
    return packs


def pack_all(blocks: list[np.ndarray], packing_length: int) -> list[list[list[int]]]:
    """What `pack` makes of each of several blocks, all at once: a rank that starts needs one for each of its lanes.

    Args:
        blocks: the lengths (n,) of each, in tokens.
    """
    if not blocks:
        return []
    matrix = np.zeros((len(blocks), max(map(len, blocks))), np.int64)
    for row, lengths in zip(matrix, blocks, strict=True):
        row[: len(lengths)] = lengths
    numbers, counts = _best_fit(matrix, packing_length)
    packs: list[list[list[int]]] = [[[] for _ in range(count)] for count in counts.tolist()]
    for lengths, pack_numbers, packs_of_block in zip(blocks, numbers, packs, strict=True):
        for position, number in enumerate(pack_numbers[: len(lengths)].tolist()):
            packs_of_block[number].append(position)
    return packs


def count_packs(lengths: np.ndarray, starts: np.ndarray, packing_length: int) -> np.ndarray:
    """(NB,): how many packs `pack` makes of each block.

    Args:
        lengths: (N,) tokens of each sample, block by block.
        starts: (NB + 1,) where each block begins.
    """
    sizes = np.diff(starts)
    counts = np.empty(len(sizes), np.int64)
    by_size = np.argsort(sizes, kind="stable")  # blocks of like size lie in one matrix with little padding
    for first in range(0, len(sizes), BLOCKS_AT_ONCE):
        chosen = by_size[first : first + BLOCKS_AT_ONCE]
        columns = np.arange(sizes[chosen].max())
        inside = columns < sizes[chosen][:, None]
        places = np.where(inside, starts[chosen][:, None] + columns, 0)
        counts[chosen] = _best_fit(np.where(inside, lengths[places], 0), packing_length)[1]
    return counts


def _best_fit(lengths: np.ndarray, packing_length: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of the rows of `lengths` (B, n): the pack of each item (B, n), and the number of packs (B,).

    Items of length 0 are padding; their pack means nothing.
    """
    num_rows, num_items = lengths.shape
    lengths = np.minimum(lengths, packing_length).astype(np.int32)
    order = np.argsort(-lengths, axis=1, kind="stable")
    room = np.full((num_rows, 1 + int(lengths.sum(1).max()) // packing_length), packing_length, np.int32)
    numbers = np.empty((num_rows, num_items), np.int64)
    rows = np.arange(num_rows)
    for i in range(num_items):
        item = order[:, i]
        length = lengths[rows, item]
        left = room - length[:, None]
        # As unsigned numbers, those that do not fit are the largest. An untouched pack has the most room, so it is
        # taken last.
        best = left.view(np.uint32).argmin(axis=1)
        if (left[rows, best] < 0).any():
            room = np.pad(room, ((0, 0), (0, 1 + room.shape[1] // 4)), constant_values=packing_length)
            left = room - length[:, None]
            best = left.view(np.uint32).argmin(axis=1)
        room[rows, best] -= length
        numbers[rows, item] = best
    return numbers, (room < packing_length).sum(axis=1)
