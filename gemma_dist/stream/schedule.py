"""What every rank trains on at every step: a corpus, its order and its packs put together, still without reading a row.

schedule = open_schedule(config, batch_plan(config, world_size=8))
schedule.micro_batches(step=1000, rank=3)     [[[17, 4], [250]], …]: micro-batches of packs of sample numbers
"""

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gemma_dist.batch_plan import BatchPlan
from gemma_dist.config import RunConfig, SourceConfig, TrainConfig
from gemma_dist.errors import ConfigError, DataError, setting
from gemma_dist.files import writing
from gemma_dist.shards.fetch import Fetcher
from gemma_dist.shards.reader import Shards, open_shards
from gemma_dist.stream.order import Blocks, Order, cut_blocks, lanes_of, micro_batches, split_lanes, spread_lanes
from gemma_dist.stream.packing import count_packs, pack_all

# A lane holds one block in memory. Large blocks shuffle better and pack tighter (each leaves one pack half full); the
# samples bound the time that packing takes where rows are short.
BLOCK_BYTES, BLOCK_SAMPLES = 8 << 20, 256
PACKED_BLOCK_BYTES, PACKED_BLOCK_SAMPLES = 32 << 20, 512


class BlockId(NamedTuple):
    """A block of a corpus, which may be a mixture of several sources."""

    source: int
    number: int  # in the source


@dataclass(frozen=True)
class PackedSequence:
    """What one lane gives at one step: a sample of the corpus, or a pack of several."""

    samples: list[int]  # numbers in the corpus, ascending; none where all of them are in quarantine
    block: BlockId  # where the lane is


@dataclass(frozen=True)
class _Source:
    """One source of a mixture, or the whole corpus."""

    first_row_group: int
    blocks: Blocks
    order: Order


class Schedule:
    """The sequences of every step, for all ranks: a pure function of the manifest, the plan and the seed. Samples in
    quarantine are left out of them, and all others come when they would have come.

    Where `shards` has weights, each of its folders is a source of its own, with lanes by weight and epochs of its own;
    an epoch of the whole is then one of the source that takes longest.
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
    ) -> None:
        """Args:
            cache_dir: where the counts of packs are kept, so that only the first start of a run takes the time.
            quarantine: samples that nobody trains on.

        Raises:
            ConfigError, DataError: the corpus does not fit the batch or the length of packs.
        """
        self.shards, self.plan, self.packing, self._cache_dir = shards, plan, packing, cache_dir
        self.packing_length = packing_length or self._longest() if packing else 0
        self.quarantine = quarantine
        ranges, weights = shards.sources()
        try:
            num_lanes = split_lanes(weights, plan.global_batch_size)
        except ValueError as error:
            raise ConfigError(
                f"train.global_batch_size: {error}; raise it, or leave data.train without weights"
            ) from None
        self._sources = [self._source(rows, lanes, seed) for rows, lanes in zip(ranges, num_lanes, strict=True)]
        self._lanes = spread_lanes(num_lanes)
        self._packs: OrderedDict[BlockId, list[list[int]]] = OrderedDict()  # of blocks, last used last
        self._lock = threading.Lock()  # the watchdog asks from a thread of its own

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch: of a mixture, of the source that takes longest."""
        return max(source.order.steps_per_epoch for source in self._sources)

    def num_steps(self, train: TrainConfig) -> int:
        """Optimizer steps of a whole run."""
        if train.max_steps > 0:
            return train.max_steps
        return math.ceil(train.num_train_epochs * self.steps_per_epoch)

    def epochs(self, num_steps: int) -> list[float]:
        """How often each source was gone through after `num_steps` steps, to four digits."""
        return [round(num_steps / source.order.steps_per_epoch, 4) for source in self._sources]

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
        return [source.first_row_group + number for number in source.blocks[block.number]]

    def _kept(self, samples: list[int]) -> list[int]:
        """A unit without its samples in quarantine: they leave after packing, so that no other changes its pack."""
        return [sample for sample in samples if sample not in self.quarantine]

    def _source(self, rows: range, num_lanes: int, seed: int) -> _Source:
        """The blocks and the order of one source of a mixture, which has the row groups `rows` of the corpus."""
        shards, part = self.shards, slice(rows.start, rows.stop)
        num_bytes, num_samples = shards.row_group_bytes[part], shards.row_group_samples[part]
        limits = (PACKED_BLOCK_BYTES, PACKED_BLOCK_SAMPLES) if self.packing else (BLOCK_BYTES, BLOCK_SAMPLES)
        blocks = cut_blocks(num_bytes, num_samples, seed, *limits)
        num_units = self._count_packs(rows, blocks, seed) if self.packing else blocks.sums(num_samples)
        return _Source(rows.start, blocks, Order(num_units, num_lanes, seed))

    def _count_packs(self, rows: range, blocks: Blocks, seed: int) -> np.ndarray:
        """(NB,): the packs of each block of a source, from `cache_dir` if they were counted before."""
        shards, part = self.shards, slice(rows.start, rows.stop)
        kept: Path | None = None  # the file of the counts
        if self._cache_dir:
            limits = f"{self.packing_length} {PACKED_BLOCK_BYTES} {PACKED_BLOCK_SAMPLES}"
            key = f"{shards.manifest_hash} {rows} {seed} {limits}"
            kept = self._cache_dir / f"gemma_dist-packs-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
            if kept.exists():
                return np.load(kept)
        # (n,): the samples of the source, block by block, and where in them each block begins.
        num_samples = shards.row_group_samples[part]
        starts = np.concatenate([[0], np.cumsum(blocks.sums(num_samples))])
        samples = np.repeat(shards.first_sample[part][blocks.row_groups], num_samples[blocks.row_groups])
        samples += _count_up(num_samples[blocks.row_groups])
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

    def _num_tokens(self, samples: np.ndarray) -> np.ndarray:
        """The lengths (n,) of samples (n,), in tokens of text and images."""
        return self.shards.num_text_tokens[samples] + self.shards.num_image_tokens[samples]

    def _longest(self) -> int:
        """Tokens of the corpus's longest sample."""
        return int((self.shards.num_text_tokens + self.shards.num_image_tokens).max())

    def _place(self, step: int, lane: int) -> tuple[BlockId, int] | None:
        """The block, as its source and number, that `lane` is in, and the unit in it; None in the tail of an epoch."""
        source, lane_in_source = self._lanes[lane]
        place = self._sources[source].order.at(step, lane_in_source)
        if place is None:
            return None
        number, unit = place
        return BlockId(source, number), unit

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


def open_schedule(config: RunConfig, plan: BatchPlan) -> Schedule:
    """The schedule of a recipe's corpus, without its quarantine.

    Raises:
        DataError: the corpus or the quarantine is unreadable.
        ConfigError: they do not fit the batch plan.
    """
    paths: list[str] = []
    weights: list[float] = []
    for source in config.data.train:
        if isinstance(source, SourceConfig):
            paths.append(source.path)
            weights.append(source.weight)
        else:
            paths.append(source)
    fetcher = Fetcher(config.data.cache_dir, round(config.data.cache_gb * 1e9))
    shards = open_shards(*paths, weights=weights or None, fetcher=fetcher)  # all have a weight, or none
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


def _one_by_one(num_samples: int) -> list[list[int]]:
    """The units of a block without packing: each sample for itself."""
    return [[position] for position in range(num_samples)]


def _count_up(sizes: np.ndarray) -> np.ndarray:
    """0 … size-1 for each of the sizes, one behind the other."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
