"""The micro-batches of one rank, in order, ready for the model: schedule -> row groups -> encode -> batch.

The loader holds no state but the step that it starts from: which samples come is arithmetic (`schedule.py`), so a run
that resumes at step s gets what it would have got, on any world size. It must not pass through `accelerate.prepare`,
whose dispatcher cuts the tensors of images by the number of samples.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import pyarrow as pa
import torch
from torch.utils.data import IterableDataset, get_worker_info

from gemma_dist.data.encode import Encoder
from gemma_dist.errors import DataError
from gemma_dist.model.per_layer import PerLayerTable
from gemma_dist.stream.collate import Sample, collate, collate_packs, control_ids
from gemma_dist.stream.cut import cut
from gemma_dist.stream.schedule import BlockId, Schedule

NUM_FETCHERS = 32  # requests at a time: with 30 ms each, a store gives some 1,000 row groups a second
STEPS_AHEAD = 32  # optimizer steps whose row groups are asked for before they are needed

# Row groups by number, as far as they have come.
Tables: TypeAlias = dict[int, Future[pa.Table]]


class TrajectoryLoader(IterableDataset):
    """This rank's micro-batches of `num_steps` optimizer steps from `start_step` on, as `collate` makes them, or, with
    packing, `collate_packs`, or, where ranks share sequences, `cut`.

    Each iteration starts at `start_step` again. For `torch.utils.data.DataLoader(loader, batch_size=None)` without
    workers: the threads are its own. Decoding images and tokenizing release the interpreter's lock, so threads help
    and nothing needs to be pickled. The order does not depend on their number.
    """

    def __init__(
        self,
        schedule: Schedule,
        encoder: Encoder,
        rank: int,
        start_step: int,
        num_steps: int,
        *,
        num_workers: int,
        table: PerLayerTable | None = None,
        filler: bool = True,
    ) -> None:
        """Args:
            num_workers: threads that prepare micro-batches; 0: the one that asks for them.
            table: of per-layer embeddings, whose rows travel with the micro-batches.
            filler: whether the model has a vision tower, which every rank has to run every time.

        Raises:
            DataError: the shards were measured with another tokenizer, template or image processor.
        """
        self.schedule, self.encoder, self.rank = schedule, encoder, rank
        self.start_step, self.num_steps = start_step, num_steps
        self.num_workers, self.filler = num_workers, filler
        self.table = table
        self.shards = shards = schedule.shards
        shards.require_encoding(encoder)
        self._ids = control_ids(encoder.processor)

    def __len__(self) -> int:
        """Micro-batches of one iteration."""
        return self.num_steps * self.schedule.plan.gradient_accumulation_steps

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Raises DataError, with the sample's id, where a sample is damaged."""
        assert get_worker_info() is None, "worker processes would each give out every micro-batch"
        fetchers = ThreadPoolExecutor(NUM_FETCHERS, thread_name_prefix="loader-fetch")
        workers = ThreadPoolExecutor(max(1, self.num_workers), thread_name_prefix="loader")
        steps = range(self.start_step, self.start_step + self.num_steps)
        row_groups = RowGroups(self.schedule, self.rank, steps, fetchers)
        ahead: deque[Future[dict[str, torch.Tensor]]] = deque()
        try:
            for step in steps:
                tables = row_groups.of_step(step)
                for packs in self.schedule.micro_batches(step, self.rank):
                    if not self.num_workers:
                        yield self._prepare(packs, tables)
                        continue
                    ahead.append(workers.submit(self._prepare, packs, tables))
                    if len(ahead) > 2 * self.num_workers:
                        yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            fetchers.shutdown(wait=True, cancel_futures=True)
            workers.shutdown(wait=True, cancel_futures=True)

    def counts_at(self, step: int) -> tuple[int, int]:
        """Target tokens, and tokens without padding, of the global batch of `step`, all ranks together."""
        shards, batch = self.shards, self.schedule.global_batch(step)
        num_tokens = shards.num_text_tokens[batch].sum() + shards.num_image_tokens[batch].sum()
        return int(shards.num_target_tokens[batch].sum()), int(num_tokens)

    def _prepare(self, packs: list[list[int]], tables: Tables) -> dict[str, torch.Tensor]:
        """One micro-batch, from the numbers of its samples and the row groups that they lie in. Runs in a worker."""
        samples = [[self._sample(index, tables) for index in pack] for pack in packs]
        if (num_ranks := self.schedule.plan.sequence_parallel_size) > 1:
            whole = collate_packs(samples, self._ids, filler=False)
            batch = cut(whole, self._ids, self.rank % num_ranks, num_ranks, filler=self.filler)
        elif self.schedule.packing:
            batch = collate_packs(samples, self._ids, filler=self.filler)
        else:
            batch = collate([sample for pack in samples for sample in pack], self._ids, filler=self.filler)
        return batch if self.table is None else self.table.add_rows(batch)

    def _sample(self, index: int, tables: Tables) -> Sample:
        """Sample `index`, once its row group has come. Any error says which sample it is."""
        sample_id = self.shards.id(index)
        try:
            trajectory = self.shards.trajectory(tables[self.shards.row_group_of(index)].result(), index)
            pixels = self.encoder.pixels(trajectory.images) if trajectory.images else {}
            return Sample(sample_id, self.encoder.encode(trajectory), pixels, trajectory.weight)
        except DataError as error:
            raise DataError(f"sample {sample_id!r} ({self.shards.place(index)}): {error}") from error
        except Exception as error:
            error.add_note(f"while sample {sample_id!r} ({self.shards.place(index)}) was prepared")
            raise


def count_targets(schedule: Schedule, step: int) -> tuple[int, float]:
    """The target tokens of the global batch of `step`, all ranks together, and what they weigh by the weights of their
    rows: what the loss is divided by. At least 1 in a step of fillers."""
    weights, batch = schedule.shards.row_weights, schedule.global_batch(step)
    of_samples = schedule.shards.num_target_tokens[batch]
    num_targets = int(of_samples.sum())
    if weights is None or not num_targets:
        return num_targets, max(1, num_targets)
    return num_targets, float((weights[batch] * of_samples).sum())


@dataclass(frozen=True)
class _StepData:
    """What a rank needs for one step."""

    step: int
    blocks: set[BlockId]  # that its lanes are in
    tables: Tables


class RowGroups:
    """The row groups that a rank is working on, each fetched once, a few steps ahead, and dropped with its block."""

    def __init__(self, schedule: Schedule, rank: int, steps: range, pool: ThreadPoolExecutor) -> None:
        """`steps` are those that `of_step` will be asked for; `pool` fetches."""
        self._schedule, self._rank, self._pool = schedule, rank, pool
        self._steps = iter(steps)
        self._window: deque[_StepData] = deque()
        self._blocks_in_use: set[BlockId] = set()  # those of the steps in the window
        self._tables: Tables = {}

    def of_step(self, step: int) -> Tables:
        """The row groups of a step, and a start on those of the next ones. Steps come in order."""
        while len(self._window) <= STEPS_AHEAD:
            next_step = next(self._steps, None)
            if next_step is None:
                break
            self._window.append(self._ask_for(next_step))
        current = self._window.popleft()
        assert current.step == step, (current.step, step)
        self._drop_unused()
        return current.tables

    def _drop_unused(self) -> None:
        """Forget the row groups of blocks that no step in the window needs."""
        blocks = set[BlockId]().union(*(data.blocks for data in self._window))
        if blocks == self._blocks_in_use:
            return
        self._blocks_in_use = blocks
        needed = {row_group for block in blocks for row_group in self._schedule.row_groups(block)}
        self._tables = {row_group: table for row_group, table in self._tables.items() if row_group in needed}

    def _ask_for(self, step: int) -> _StepData:
        """Have the row groups of a step fetched, but for those that are here or on their way. Waits for none."""
        shards = self._schedule.shards
        sequences = self._schedule.rank_sequences(step, self._rank)
        tables: Tables = {}
        for sequence in sequences:
            for sample in sequence.samples:
                row_group = shards.row_group_of(sample)
                if row_group not in self._tables:
                    self._tables[row_group] = self._pool.submit(shards.read_row_group, row_group)
                tables[row_group] = self._tables[row_group]
        return _StepData(step, {sequence.block for sequence in sequences}, tables)
