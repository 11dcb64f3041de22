"""What every rank evaluates while a run trains: held-out shards, or an evenly spread part of them, in their order.

A `HeldOut` is a schedule, so that its micro-batches are prepared as those of training are. Its steps are rounds, in
each of which every rank takes a micro-batch; who has none left in the last one takes a filler, so that all ranks run
the model equally often.
"""

import shlex
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import numpy as np

from gemma_dist.batch_plan import BatchPlan
from gemma_dist.config import RunConfig, option
from gemma_dist.errors import DataError
from gemma_dist.shards.fetch import Fetcher
from gemma_dist.shards.reader import Shards, open_shards
from gemma_dist.stream.packing import pack
from gemma_dist.stream.schedule import BlockId, PackedSequence, Schedule

NUM_NAMED = 5  # ids in a message
PACKED_AT_ONCE = 512  # samples: what is packed together lies together in the shards


class HeldOut(Schedule):
    """The sequences of each round of an evaluation: whatever the number of ranks, the same ones in the same order."""

    def __init__(self, shards: Shards, samples: list[int], plan: BatchPlan, packing_length: int) -> None:
        """Args:
        samples: their numbers in `shards`, ascending.
        plan: of a round: one micro-batch a rank.
        packing_length: tokens; 0: each sample is a sequence of its own.
        """
        self.shards, self.samples, self.plan = shards, samples, plan
        self.packing, self.packing_length, self.quarantine = packing_length > 0, packing_length, frozenset()
        self._row_groups: dict[int, list[int]] = {}  # of rounds: a loader asks again and again
        self._units = [[sample] for sample in samples]
        if self.packing:
            parts = [samples[start : start + PACKED_AT_ONCE] for start in range(0, len(samples), PACKED_AT_ONCE)]
            self._units = [unit for part in parts for unit in self._packed(part)]

    @property
    def identity(self) -> str:
        """What an evaluation is of: values of another one do not compare."""
        return f"{self.shards.manifest_hash} {len(self.samples)}"

    @property
    def num_rounds(self) -> int:
        """How often every rank runs the model in one evaluation."""
        return -(-len(self._units) // self.plan.global_batch_size)

    @property
    def num_target_tokens(self) -> int:
        """Of all samples."""
        return int(self.shards.num_target_tokens[self.samples].sum())

    @property
    def num_tokens(self) -> int:
        """Of text and images, of all samples."""
        return int(self._num_tokens(np.array(self.samples)).sum())

    def sequences(self, step: int, lanes: range) -> list[PackedSequence]:
        """Those of a round, from 0."""
        first = step * self.plan.global_batch_size
        numbers = [first + lane for lane in lanes if first + lane < len(self._units)]
        return [PackedSequence(self._units[number], BlockId(0, step)) for number in numbers]

    def row_groups(self, block: BlockId) -> list[int]:
        """The row groups that a round lies in."""
        if block.number not in self._row_groups:
            sequences = self.sequences(block.number, range(self.plan.global_batch_size))
            samples = chain.from_iterable(sequence.samples for sequence in sequences)
            self._row_groups[block.number] = sorted({self.shards.row_group_of(sample) for sample in samples})
        return self._row_groups[block.number]

    def longest_round(self) -> "HeldOut":
        """One round of the longest sequences: what takes most memory."""
        lengths = [int(self._num_tokens(np.array(unit)).sum()) for unit in self._units]
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        units = [self._units[number] for number in order[: self.plan.global_batch_size]]
        chosen = object.__new__(HeldOut)
        chosen.__dict__.update(self.__dict__, _units=units, samples=sorted(chain.from_iterable(units)), _row_groups={})
        return chosen

    def _packed(self, samples: list[int]) -> list[list[int]]:
        """Some samples as packs."""
        positions = pack(self._num_tokens(np.array(samples)), self.packing_length)
        return [[samples[position] for position in unit] for unit in positions]


def open_held_out(config: RunConfig, plan: BatchPlan, train: Schedule) -> HeldOut | None:
    """What a recipe evaluates while it trains on the schedule `train`, as `plan` says; None: nothing.

    Raises:
        DataError: the shards cannot be read, or were made with another encoding than those that are trained on.
    """
    settings = config.train
    if settings.eval_strategy == "no" and not settings.eval_on_start:
        return None
    shards = open_shards(*config.data.eval, fetcher=Fetcher(config.data.cache_dir, round(config.data.cache_gb * 1e9)))
    if shards.fingerprint != train.shards.fingerprint:
        raise DataError(
            f"data.eval: {', '.join(shards.folders)} were made with another tokenizer, chat template, image processor "
            f"or enable_thinking ({shards.fingerprint}) than data.train ({train.shards.fingerprint}), so that their "
            "losses would not compare; run `gemma-dist shard` again with the settings of data.train"
        )
    num_samples = min(settings.max_eval_samples or len(shards), len(shards))
    if not len(shards):
        raise DataError(f"data.eval: {', '.join(shards.folders)} hold no samples; name shards that have some")
    samples = [number * len(shards) // num_samples for number in range(num_samples)]
    per_rank = settings.per_device_eval_batch_size or settings.per_device_train_batch_size
    of_round = replace(
        plan,
        per_device_train_batch_size=per_rank,
        gradient_accumulation_steps=1,
        global_batch_size=per_rank * plan.data_world_size,
    )
    return HeldOut(shards, samples, of_round, train.packing_length)


def describe_held_out(held_out: HeldOut) -> str:
    """What is evaluated, in words."""
    part = len(held_out.samples)
    of = f"{part:,} of {len(held_out.shards):,}" if part < len(held_out.shards) else f"{part:,}"
    rounds = held_out.num_rounds
    return (
        f"data.eval: {of} trajectories, {held_out.num_target_tokens:,} target tokens, "
        f"in {rounds:,} batch{'es' * (rounds > 1)} a rank"
    )


class SharedIds(NamedTuple):
    """Samples that are evaluated and, by their ids, trained on as well."""

    num_samples: int
    words: str  # what to say of them, and how to find others


def find_shared_ids(held_out: HeldOut, train: Schedule) -> SharedIds:
    """By ids alone: what is nearly the same would have to be read, which `stats` does once for good."""
    found = sorted(train.shards.find({held_out.shards.id(sample) for sample in held_out.samples}))
    against = " ".join(f"{option('against')} {shlex.quote(folder)}" for folder in held_out.shards.folders)
    command = f"`gemma-dist stats {shlex.join(train.shards.folders)} {against}` finds rows alike under other ids"
    if not found:
        return SharedIds(0, f"data.eval: no sample has an id of data.train; {command}")
    more = f" and {len(found) - NUM_NAMED:,} more" if len(found) > NUM_NAMED else ""
    return SharedIds(
        len(found),
        f"data.eval: {len(found):,} of {len(held_out.samples):,} samples have ids of data.train: "
        f"{', '.join(found[:NUM_NAMED])}{more}. Where they are the same rows, their loss says nothing of new ones; "
        f"{command}",
    )
