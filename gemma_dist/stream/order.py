"""Which sample comes when: pure arithmetic on a few integers for each row group.

A global batch has L = `global_batch_size` sequences, one from each of L lanes. The corpus is shuffled and laid out in a
row; lane l owns the l-th of L equal slices of it, and step s takes the next sequence of each lane. A rank serves L/W
neighboring lanes. So the global batch of a step is the same for every world size, each rank reads its own part of the
corpus, and a run that resumes needs no more state than the step.

    row groups --(seed: shuffle, cut)--> blocks --(seed, epoch: shuffle blocks, then units in each)--> lanes

A unit is what makes one sequence: a sample, or with packing several (`packing.py`). Units are shuffled within a block
of a few row groups, which a lane holds in memory while it goes through it, and blocks over the whole corpus. Every
other lane goes through its slice backwards: neighbors then come to the block that they share at the same time.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeVar

import numpy as np

T = TypeVar("T")
NEVER = 1 << 62  # a step that does not come
BLOCKS, BLOCK_ORDER, UNIT_ORDER = range(3)  # what a shuffle is for: none shares its random words with another


@dataclass(frozen=True)
class Blocks:
    """Row groups, shuffled once for a run and cut into NB blocks."""

    row_groups: np.ndarray  # (R,): all row groups, block by block
    starts: np.ndarray  # (NB + 1,): where in `row_groups` each block begins

    def __len__(self) -> int:
        """NB, the number of blocks."""
        return len(self.starts) - 1

    def __getitem__(self, block: int) -> list[int]:
        """The row groups of a block."""
        return self.row_groups[self.starts[block] : self.starts[block + 1]].tolist()

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(NB,): the sums of `values` (R,), one a row group, over each block."""
        return np.add.reduceat(values[self.row_groups], self.starts[:-1])


def cut_blocks(num_bytes: np.ndarray, num_samples: np.ndarray, seed: int, max_bytes: int, max_samples: int) -> Blocks:
    """Shuffle the row groups and cut them into blocks that end when they hold `max_bytes` or `max_samples`.

    Args:
        num_bytes, num_samples: (R,), of each row group.
    """
    order = _shuffled(len(num_bytes), seed, BLOCKS)
    size = np.maximum(num_bytes[order] / max_bytes, num_samples[order] / max_samples)  # 1: as large as a block may be
    begin = np.cumsum(size) - size
    number = np.floor(begin)  # of the block: row groups that begin in the same unit of size are one
    starts = np.flatnonzero(np.diff(number, prepend=-1.0, append=np.inf))
    return Blocks(order, starts)


@dataclass(frozen=True)
class _Stretch:
    """Steps in which the lanes of an order are the same: what is left of an epoch first, then whole epochs."""

    first_step: int
    num_lanes: int  # 0: it rests
    epoch: int  # that it begins in
    left: tuple[range, ...]  # the places of that epoch which are to come, in order
    total: int  # places of a whole epoch

    def row(self, step: int) -> tuple[int, int, tuple[range, ...]]:
        """The epoch of a step, how many steps of it came before in this stretch, and the places that lanes share."""
        since = step - self.first_step
        if not self.num_lanes:
            return self.epoch, 0, self.left
        if since < self._steps_of_left:
            return self.epoch, since, self.left
        epochs, steps_before = divmod(since - self._steps_of_left, self._steps_of_whole)
        return self.epoch + 1 + epochs, steps_before, self._whole

    @cached_property
    def _whole(self) -> tuple[range, ...]:
        """All places of an epoch."""
        return (range(self.total),)

    @cached_property
    def _steps_of_whole(self) -> int:
        return self.num_steps(self._whole)

    @cached_property
    def _steps_of_left(self) -> int:
        return self.num_steps(self.left)

    def num_steps(self, row: tuple[range, ...]) -> int:
        """Steps that the lanes take for all places of `row`."""
        return -(-_num_places(row) // self.num_lanes)

    def epochs(self, step: int) -> float:
        """How often all places have come before `step`."""
        epoch, steps_before, row = self.row(step)
        share = _num_places(row) / self.total  # that the epoch had to give when its row was laid out
        return epoch + 1 - share + (share * (steps_before / self.num_steps(row)) if steps_before else 0)

    def steps_until(self, epochs: float) -> int:
        """Steps of this stretch until all places have come `epochs` times; 0: they have before."""
        share = _num_places(self.left) / self.total
        if share == 1:
            return max(0, math.ceil((epochs - self.epoch) * self._steps_of_whole))
        missing = epochs - self.epoch - 1
        if missing > 0:
            return self._steps_of_left + math.ceil(missing * self._steps_of_whole)
        return max(0, math.ceil((1 + missing / share) * self._steps_of_left))

    def then(self, step: int, num_lanes: int) -> "_Stretch":
        """What comes from `step` on with other lanes: they share what these leave of the epoch."""
        epoch, steps_before, row = self.row(step)
        left = row
        if steps_before:
            left = ()
            for lane in range(self.num_lanes):
                first, end = _share(row, self.num_lanes, lane)
                rest = (first + steps_before, end) if _goes_forward(lane) else (first, end - steps_before)
                left += _part(row, *rest)
        return _Stretch(step, num_lanes, epoch, left, self.total)


@dataclass(frozen=True, eq=False)
class Order:
    """The sequences of every step of a corpus (or of one source of a mixture).

    Lanes may change: what the old ones have left of the epoch is laid out in a row again, and the new ones share it. So
    each unit still comes once an epoch.
    """

    num_units: np.ndarray  # (NB,): of each block
    num_lanes: int  # at the first step; 0: it rests
    seed: int
    changes: tuple[tuple[int, int], ...] = ()  # later steps, rising, each with the number of lanes from there on
    first_step: int = 0  # that it has sequences for
    first_epoch: int = 0  # which begins there

    @cached_property
    def total(self) -> int:
        """Units of an epoch."""
        return int(self.num_units.sum())

    @cached_property
    def _stretches(self) -> list[_Stretch]:
        whole = (range(self.total),)
        stretches = [_Stretch(self.first_step, self.num_lanes, self.first_epoch, whole, self.total)]
        for step, num_lanes in self.changes:
            stretches.append(stretches[-1].then(step, num_lanes))
        return stretches

    @cached_property
    def _first_steps(self) -> list[int]:
        return [stretch.first_step for stretch in self._stretches]

    def _stretch(self, step: int) -> _Stretch:
        return self._stretches[bisect_right(self._first_steps, step) - 1]

    def at(self, step: int, lane: int) -> tuple[int, int] | None:
        """The block, and the unit in it, that `lane` gives at `step` (from 0, counted on over the epochs).

        None where the lane has nothing left in this epoch.
        """
        num_lanes, epoch, steps_before, row = _row_of(self, step)
        first, end = _share(row, num_lanes, lane)
        if steps_before >= end - first:
            return None
        number = first + steps_before if _goes_forward(lane) else end - 1 - steps_before
        # Among the epoch's units. Nearly always there is one range.
        position = row[0][number] if len(row) == 1 else _part(row, number, number + 1)[0].start
        blocks, starts = _epoch_order(self, epoch)
        slot = bisect_right(starts, position) - 1
        block = int(blocks[slot])
        units = _shuffled(int(self.num_units[block]), self.seed, UNIT_ORDER, epoch, block)
        return block, int(units[position - int(starts[slot])])

    def epochs(self, step: int) -> float:
        """How often the units have come before `step`."""
        return self._stretch(step).epochs(step)

    def steps_until(self, epochs: float) -> int:
        """The first step before which the units have come `epochs` times; NEVER where they rest for good before."""
        for stretch, end in zip(self._stretches, [*self._first_steps[1:], NEVER], strict=True):
            if stretch.num_lanes and (step := stretch.first_step + stretch.steps_until(epochs)) <= end:
                return step
        return NEVER

    def next_epoch(self, step: int) -> tuple[int, int]:
        """The first step from `step` on at which an epoch begins (NEVER: none does), and that epoch."""
        for stretch, end in zip(self._stretches, [*self._first_steps[1:], NEVER], strict=True):
            if end <= step:
                continue
            start = max(step, stretch.first_step)
            epoch, steps_before, row = stretch.row(start)
            if not steps_before and _num_places(row) == self.total:
                return start, epoch
            if stretch.num_lanes and (begin := start - steps_before + stretch.num_steps(row)) <= end:
                return begin, epoch + 1
        return NEVER, 0


@lru_cache(maxsize=64)  # all lanes ask for a step
def _row_of(order: Order, step: int) -> tuple[int, int, int, tuple[range, ...]]:
    """The number of lanes at a step, and what `_Stretch.row` says of it."""
    stretch = order._stretch(step)
    return stretch.num_lanes, *stretch.row(step)


def _share(row: tuple[range, ...], num_lanes: int, lane: int) -> tuple[int, int]:
    """Where the slice of `lane` begins and ends among the places of `row`."""
    num_places = _num_places(row)
    return lane * num_places // num_lanes, (lane + 1) * num_places // num_lanes


def _goes_forward(lane: int) -> bool:
    """Whether a lane goes through its slice from the beginning to the end."""
    return lane % 2 == 0


def _num_places(row: tuple[range, ...]) -> int:
    return len(row[0]) if len(row) == 1 else sum(map(len, row))


def _part(row: tuple[range, ...], first: int, end: int) -> tuple[range, ...]:
    """The places `first` … `end` - 1 of those of a row."""
    parts = []
    for places in row:
        if part := places[max(0, first) : max(0, end)]:
            parts.append(part)
        first, end = first - len(places), end - len(places)
    return tuple(parts)


@lru_cache(maxsize=4)  # this epoch and the next, for each of a few sources
def _epoch_order(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(NB,) each: the blocks in the order of an epoch, and the number of units before each."""
    blocks = _shuffled(len(order.num_units), order.seed, BLOCK_ORDER, epoch)
    units = order.num_units[blocks]
    return blocks, np.cumsum(units) - units


def split_lanes(weights: list[float], num_lanes: int) -> list[int]:
    """How many lanes each source of a mixture gets: by weight, the largest remainders rounded up, at least one each,
    but for those of weight 0.

    Raises:
        ValueError: there are fewer lanes than sources.
    """
    num_sources = sum(weight > 0 for weight in weights)
    if num_lanes < num_sources:
        raise ValueError(f"{num_sources} sources need as many sequences in a global batch, not {num_lanes}")
    shares = np.array(weights) / sum(weights) * num_lanes
    lanes = np.maximum(shares > 0, np.floor(shares)).astype(int)
    while lanes.sum() > num_lanes:  # many small sources were lifted to one lane
        lanes[np.argmax(np.where(lanes > 1, lanes - shares, -np.inf))] -= 1
    while lanes.sum() < num_lanes:
        lanes[np.argmax(shares - lanes)] += 1
    return lanes.tolist()


def spread_lanes(num_lanes: list[int]) -> list[tuple[int, int]]:
    """Which source, and which of its lanes, each lane of the whole is: the sources are dealt evenly over the lanes, so
    that every rank has its share of each."""
    places = []
    for source, count in enumerate(num_lanes):
        for lane in range(count):
            middle = (lane + 0.5) / count  # of the lane's share, where all lanes of the source share 0 … 1 evenly
            places.append((middle, source, lane))
    return [(source, lane) for _, source, lane in sorted(places)]


def lanes_of(rank: int, world_size: int, num_lanes: int) -> range:
    """The lanes that a rank serves: neighbors, so that ranks share as few blocks as can be."""
    return range(rank * num_lanes // world_size, (rank + 1) * num_lanes // world_size)


def micro_batches(sequences: list[T], num_sequences: int, num_micro_batches: int) -> list[list[T]]:
    """The sequences of a rank at a step, `num_sequences` to a micro-batch.

    Always `num_micro_batches` lists, so that all ranks do the same number of forward passes. In the tail of an epoch
    some are shorter or empty; those get fillers.
    """
    assert len(sequences) <= num_sequences * num_micro_batches
    return [sequences[i * num_sequences : (i + 1) * num_sequences] for i in range(num_micro_batches)]


@lru_cache(maxsize=4096)  # the blocks that lanes are in
def _shuffled(num: int, seed: int, purpose: int, epoch: int = 0, block: int = 0) -> np.ndarray:
    """(num,): a permutation of 0 … num-1, another one for each combination of the other integers.

    Sorting raw Philox words keeps it the same under every numpy version: numpy fixes the streams of its bit generators
    for good, but not those of `Generator.permutation`.
    """
    counter = np.array([0, 0, purpose, block], dtype=np.uint64)
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=counter).random_raw(num)
    # Each number rides in the low bits of its word: sorting is several times faster than argsort, and no two are equal.
    low = np.uint64((1 << num.bit_length()) - 1)
    return (np.sort((words & ~low) | np.arange(num, dtype=np.uint64)) & low).astype(np.int64)
