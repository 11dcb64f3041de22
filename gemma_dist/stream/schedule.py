"""What every rank trains on at every step: a corpus, its order and its packs put together, still without reading a row.

schedule = open_schedule(config, batch_plan(config, world_size=8))
schedule.micro_batches(step=1000, rank=3)     [[[17, 4], [250]], …]: micro-batches of packs of sample numbers
"""

import hashlib
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gemma_dist.batch_plan import BatchPlan
from gemma_dist.config import RunConfig, TrainConfig
from gemma_dist.errors import ConfigError, DataError, setting
from gemma_dist.files import writing
from gemma_dist.shards.fetch import Fetcher
from gemma_dist.shards.reader import Shards, open_shards
from gemma_dist.stream.order import NEVER, Blocks, Order, cut_blocks, lanes_of, micro_batches, split_lanes, spread_lanes
from gemma_dist.stream.packing import count_packs, pack_all

# A lane holds one block in memory. Large blocks shuffle better and pack tighter (each leaves one pack half full); the
# samples bound the time that packing takes where rows are short.
BLOCK_BYTES, BLOCK_SAMPLES = 8 << 20, 256
PACKED_BLOCK_BYTES, PACKED_BLOCK_SAMPLES = 32 << 20, 512


class BlockId(NamedTuple):
    """A block of a corpus, which may be a mixture of several sources."""

    source: int  # which, and where it has grown, as of when
    number: int  # in the source


class Edition(NamedTuple):
    """A corpus as it is from a step on: it may be added to, at the end of each of its folders."""

    from_step: int  # each source takes it up at its first epoch that begins there or later
    num_row_groups: list[int]  # of each folder


@dataclass(frozen=True)
class PackedSequence:
    """What one lane gives at one step: a sample of the corpus, or a pack of several."""

    samples: list[int]  # numbers in the corpus, ascending; none where all of them are in quarantine
    block: BlockId  # where the lane is


@dataclass(frozen=True)
class _Source:
    """One source of a mixture, or the whole corpus, as it is from the first step of its order on."""

    row_groups: np.ndarray  # (R,): their numbers in the corpus
    blocks: Blocks
    order: Order


class Schedule:
    """The sequences of every step, for all ranks: a pure function of the manifest, the plan and the seed. Samples in
    quarantine are left out of them, and all others come when they would have come.

    Where `shards` has weights, each of its folders is a source of its own, with lanes by weight and epochs of its own;
    an epoch of the whole is then one of the source that takes longest, of those that do not rest for good.
    """

    def __init__(
        self,
        shards: Shards,
        plan: BatchPlan,
        seed: int,
        *,
        packing: bool,
        packing_length: int | None,
        cache_dir: Path | None = None,
        quarantine: frozenset[int] = frozenset(),
        editions: Sequence[Edition] = (),
    ) -> None:
        """Args:
            cache_dir: where the counts of packs are kept, so that only the first start of a run takes the time.
            quarantine: samples that nobody trains on.
            editions: how the corpus has grown, from step 0 on; the last one is what is there now. Empty: as it is now.

        Raises:
            ConfigError, DataError: the corpus does not fit the batch or the length of packs.
        """
        self.shards, self.plan, self.packing, self._cache_dir = shards, plan, packing, cache_dir
        sources, weights = shards.sources()
        self.editions = list(editions) or [Edition(0, [len(folder) for source in sources for folder in source])]
        self.packing_length = packing_length or self._longest(sources) if packing else 0
        self.quarantine = quarantine
        try:
            num_lanes = [split_lanes(of_sources, plan.global_batch_size) for _, of_sources in weights]
        except ValueError as error:
            raise ConfigError(
                f"train.global_batch_size: {error}; raise it, or leave data.train without weights"
            ) from None
        self._from_steps = [from_step for from_step, _ in weights]
        self._lanes = [spread_lanes(of_sources) for of_sources in num_lanes]  # for each of these steps
        self._sources: list[_Source] = []
        self._editions: list[range] = []  # of each source: which of `_sources` it is, one after the other
        for number in range(len(sources)):
            lanes = [(step, of_sources[number]) for step, of_sources in zip(self._from_steps, num_lanes, strict=True)]
            first = len(self._sources)
            self._sources += self._as_it_grows(sources, number, lanes, seed)
            self._editions.append(range(first, len(self._sources)))
        self._counted = [number for number in range(len(sources)) if num_lanes[-1][number]]  # in epochs of the whole
        self._packs: OrderedDict[BlockId, list[list[int]]] = OrderedDict()  # of blocks, last used last
        self._lock = threading.Lock()  # the watchdog asks from a thread of its own

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the first epoch, and of each where nothing changes: of a mixture, of the source that takes
        longest."""
        return self._steps_until(1)

    def num_steps(self, train: TrainConfig) -> int:
        """Optimizer steps of a whole run."""
        if train.max_steps > 0:
            return train.max_steps
        return self._steps_until(train.num_train_epochs)

    def epochs(self, num_steps: int) -> list[float]:
        """How often each source was gone through after `num_steps` steps, to four digits."""
        return [round(self._order(source, num_steps).epochs(num_steps), 4) for source in range(len(self._editions))]

    def epoch(self, num_steps: int) -> float:
        """How often the whole was gone through after `num_steps` steps."""
        return min(self._order(source, num_steps).epochs(num_steps) for source in self._counted)

    def ends_epoch(self, num_steps: int) -> bool:
        """Whether an epoch of the whole ends with step `num_steps`, counted from 1."""
        epoch = int(self.epoch(num_steps))
        return epoch > 0 and self._steps_until(epoch) == num_steps

    def num_lanes(self, step: int) -> list[int]:
        """How many of the sequences of `step` are each source's."""
        of_sources = [source for source, _ in self._lanes_at(step)]
        return [of_sources.count(source) for source in range(len(self._editions))]

    def sequences(self, step: int, lanes: range) -> list[PackedSequence]:
        """The sequences that `lanes` give at `step`, as they are trained on; in the tail of an epoch some give none."""
        places = [place for lane in lanes if (place := self._place(step, lane)) is not None]
        with self._lock:
            packs = self._packs_of({block for block, _ in places})
        return [PackedSequence(self._kept(packs[block][unit]), block) for block, unit in places]

    def rank_sequences(self, step: int, rank: int) -> list[PackedSequence]:
        """The sequences of a rank's lanes at `step`; ranks that share them have the same."""
        plan = self.plan
        return self.sequences(step, lanes_of(plan.data_rank(rank), plan.data_world_size, plan.global_batch_size))

    def micro_batches(self, step: int, rank: int) -> list[list[list[int]]]:
        """The micro-batches of `rank` at `step`: lists of packs, which are lists of sample numbers. Without packing a
        pack is one sample; a micro-batch without any is a filler."""
        packs = [sequence.samples for sequence in self.rank_sequences(step, rank)]
        return micro_batches(packs, self.plan.per_device_train_batch_size, self.plan.gradient_accumulation_steps)

    def global_batch(self, step: int) -> list[int]:
        """All samples that are trained on at `step`, of all ranks together."""
        sequences = self.sequences(step, range(self.plan.global_batch_size))
        return [sample for sequence in sequences for sample in sequence.samples]

    def row_groups(self, block: BlockId) -> list[int]:
        """The row groups that a sequence's block lies in."""
        source = self._sources[block.source]
        return source.row_groups[source.blocks[block.number]].tolist()

    def _kept(self, samples: list[int]) -> list[int]:
        """A unit without its samples in quarantine: they leave after packing, so that no other changes its pack."""
        return [sample for sample in samples if sample not in self.quarantine]

    def _as_it_grows(
        self, sources: list[list[range]], number: int, lanes: list[tuple[int, int]], seed: int
    ) -> list[_Source]:
        """One source of a mixture: as it is at step 0, and as it is from later steps on.

        Args:
            sources: the row groups of each folder, source by source.
            number: which of them.
            lanes: steps, each with how many lanes the source has from there on.
        """
        found: list[_Source] = []
        folders: tuple[range, ...] = ()
        for edition in self.editions:
            now = tuple(_in_edition(sources, edition)[number])
            if now == folders:
                continue
            folders = now
            step, epoch = found[-1].order.next_epoch(edition.from_step) if found else (0, 0)
            if step == NEVER:
                break
            found.append(self._source(folders, lanes, seed, step, epoch))
        return found

    def _source(
        self, folders: tuple[range, ...], lanes: list[tuple[int, int]], seed: int, first_step: int, first_epoch: int
    ) -> _Source:
        """The blocks and the order of one source of a mixture, of these row groups of the corpus."""
        shards, row_groups = self.shards, np.concatenate([np.arange(rows.start, rows.stop) for rows in folders])
        num_bytes, num_samples = shards.row_group_bytes[row_groups], shards.row_group_samples[row_groups]
        limits = (PACKED_BLOCK_BYTES, PACKED_BLOCK_SAMPLES) if self.packing else (BLOCK_BYTES, BLOCK_SAMPLES)
        blocks = cut_blocks(num_bytes, num_samples, seed, *limits)
        if self.packing:
            num_units = self._count_packs(" ".join(map(str, folders)), row_groups, blocks, seed)
        else:
            num_units = blocks.sums(num_samples)
        num_lanes = [num for step, num in lanes if step <= first_step][-1]
        later = [(step, num) for step, num in lanes if step > first_step]
        changes = [one for before, one in pairwise([(0, num_lanes), *later]) if one[1] != before[1]]
        return _Source(row_groups, blocks, Order(num_units, num_lanes, seed, tuple(changes), first_step, first_epoch))

    def _order(self, source: int, step: int) -> Order:
        """The order of a source at a step."""
        return self._sources[self._number(source, step)].order

    def _number(self, source: int, step: int) -> int:
        """Which of `_sources` a source is at a step."""
        numbers = reversed(self._editions[source])
        return next(number for number in numbers if self._sources[number].order.first_step <= step)

    def _steps_until(self, epochs: float) -> int:
        """Optimizer steps until the whole was gone through `epochs` times."""
        return max(self._steps_of_source(source, epochs) for source in self._counted)

    def _steps_of_source(self, source: int, epochs: float) -> int:
        """Optimizer steps until a source, which does not rest for good, was gone through `epochs` times."""
        orders = [self._sources[number].order for number in self._editions[source]]
        for order, following in zip(orders, [*orders[1:], None], strict=True):
            step = order.steps_until(epochs)
            if following is None or step <= following.first_step:
                return step
        raise AssertionError("the last order has no end")

    def _count_packs(self, name: str, row_groups: np.ndarray, blocks: Blocks, seed: int) -> np.ndarray:
        """(NB,): the packs of each block of a source, from `cache_dir` if they were counted before.

        Args:
            name: of the row groups (R,) of the source.
        """
        shards = self.shards
        kept: Path | None = None  # the file of the counts
        if self._cache_dir:
            limits = f"{self.packing_length} {PACKED_BLOCK_BYTES} {PACKED_BLOCK_SAMPLES}"
            key = f"{shards.manifest_hash} {name} {seed} {limits}"
            kept = self._cache_dir / f"gemma_dist-packs-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
            if kept.exists():
                return np.load(kept)
        # (n,): the samples of the source, block by block, and where in them each block begins.
        in_blocks = row_groups[blocks.row_groups]
        num_samples = shards.row_group_samples[in_blocks]
        starts = np.concatenate([[0], np.cumsum(blocks.sums(shards.row_group_samples[row_groups]))])
        samples = np.repeat(shards.first_sample[in_blocks], num_samples) + _count_up(num_samples)
        lengths = self._num_tokens(samples)
        if lengths.max() > self.packing_length:
            index = int(samples[lengths.argmax()])
            raise DataError(
                f"{shards.place(index)}: sample {shards.id(index)!r} has {lengths.max():,} tokens, but "
                f"train.packing_length is {self.packing_length:,}; raise it, or shard the rows again with "
                f"{setting('max_length', self.packing_length)}"
            )
        counts = count_packs(lengths, starts, self.packing_length)
        if kept:
            with writing(kept) as temporary, temporary.open("wb") as file:
                np.save(file, counts)
        return counts

    def _num_tokens(self, samples: np.ndarray | slice) -> np.ndarray:
        """The lengths (n,) of samples (n,), in tokens of text and images."""
        return self.shards.num_text_tokens[samples] + self.shards.num_image_tokens[samples]

    def _longest(self, sources: list[list[range]]) -> int:
        """Tokens of the longest sample that the corpus has at step 0."""
        first, longest = self.shards.first_sample, 0
        for folder in chain.from_iterable(_in_edition(sources, self.editions[0])):
            longest = max(longest, int(self._num_tokens(slice(first[folder.start], first[folder.stop])).max()))
        return longest

    def _lanes_at(self, step: int) -> list[tuple[int, int]]:
        """Which source, and which of its lanes, each lane is at a step."""
        return self._lanes[bisect_right(self._from_steps, step) - 1]

    def _place(self, step: int, lane: int) -> tuple[BlockId, int] | None:
        """The block, as its source and number, that `lane` is in, and the unit in it; None in the tail of an epoch."""
        source, lane_in_source = self._lanes_at(step)[lane]
        number = self._number(source, step)
        place = self._sources[number].order.at(step, lane_in_source)
        if place is None:
            return None
        block, unit = place
        return BlockId(number, block), unit

    def _packs_of(self, blocks: set[BlockId]) -> dict[BlockId, list[list[int]]]:
        """All units of each block, as sample numbers. The blocks that are not in memory are packed at once."""
        packs = {block: self._packs[block] for block in blocks & self._packs.keys()}
        missing = sorted(blocks - packs.keys())
        samples = [np.fromiter(self._samples(self.row_groups(block)), np.int64) for block in missing]
        if self.packing:
            lengths = [self._num_tokens(samples_of_block) for samples_of_block in samples]
            positions = pack_all(lengths, self.packing_length)
        else:
            positions = [_one_by_one(len(samples_of_block)) for samples_of_block in samples]
        for block, samples_of_block, units in zip(missing, samples, positions, strict=True):
            packs[block] = [samples_of_block[unit].tolist() for unit in units]
        for block in packs:
            self._packs[block] = packs[block]
            self._packs.move_to_end(block)
        while len(self._packs) > 2 * self.plan.global_batch_size:
            self._packs.popitem(last=False)
        return packs

    def _samples(self, row_groups: list[int]) -> Iterator[int]:
        """The samples of these row groups, in the order of the file."""
        first = self.shards.first_sample
        for row_group in row_groups:
            yield from range(first[row_group], first[row_group + 1])


def open_schedule(config: RunConfig, plan: BatchPlan, editions: Sequence[Edition] = ()) -> Schedule:
    """The schedule of a recipe's corpus, without its quarantine.

    Args:
        editions: as `Schedule` takes them.

    Raises:
        DataError: the corpus or the quarantine is unreadable.
        ConfigError: they do not fit the batch plan.
    """
    fetcher = Fetcher(config.data.cache_dir, round(config.data.cache_gb * 1e9))
    shards = open_shards(*config.data.paths, weights=config.data.weights_by_step, fetcher=fetcher)
    train = config.train
    quarantine = read_quarantine(config.data.quarantine, shards)
    if len(quarantine) == len(shards):
        raise DataError(f"data.quarantine: {config.data.quarantine} leaves nothing of data.train to train on")
    return Schedule(
        shards,
        plan,
        train.seed,
        packing=train.packing,
        packing_length=train.packing_length,
        cache_dir=config.data.cache_dir,
        quarantine=quarantine,
        editions=editions,
    )


def read_quarantine(path: Path | None, shards: Shards) -> frozenset[int]:
    """The samples that a file names, one a line: by id, or a whole row group as the message about its damage names it.

    Raises:
        DataError: the file cannot be read, or names what the corpus does not have.
    """
    if path is None:
        return frozenset()
    try:
        text = path.read_bytes().decode("utf-8-sig")
        names = {line.strip() for line in text.split("\n")} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.quarantine = {str(path)!r}: cannot be read: {error}") from error
    found = shards.find(names)
    if unknown := sorted(names - found.keys()):
        raise DataError(
            f"data.quarantine: {path} names {unknown[0]!r}, which data.train does not have; write one id a line, or a "
            "row group as the message about it does"
        )
    return frozenset(chain.from_iterable(found.values()))


def _in_edition(sources: list[list[range]], edition: Edition) -> list[list[range]]:
    """The row groups that an edition has of each folder, source by source."""
    counts = iter(edition.num_row_groups)
    return [[folder[: next(counts)] for folder in source] for source in sources]


def _one_by_one(num_samples: int) -> list[list[int]]:
    """The units of a block without packing: each sample for itself."""
    return [[position] for position in range(num_samples)]


def _count_up(sizes: np.ndarray) -> np.ndarray:
    """0 … size-1 for each of the sizes, one behind the other."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
