"""The micro-batches of one rank, in order, ready for the model: order -> shards -> encode -> batch.

The loader holds no state but the step that it starts from: which samples come is arithmetic (`order.py`), so a run that
resumes at step s gets what it would have got, on any world size. It must not pass through `accelerate.prepare`, whose
dispatcher cuts the tensors of images by the number of samples.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch.utils.data import IterableDataset, get_worker_info

from gemma_dist.config import BatchPlan
from gemma_dist.data.batch import Sample, collate, control_ids
from gemma_dist.data.encode import Encoder
from gemma_dist.data.order import global_batch, micro_batches, steps_per_epoch
from gemma_dist.data.shards import Shards
from gemma_dist.errors import DataError

# Decoding pictures and tokenising release the interpreter's lock, so threads help and nothing needs to be pickled.
NUM_THREADS = 4
NUM_AHEAD = 8  # micro-batches that are prepared before they are asked for


class TrajectoryLoader(IterableDataset):
    """This rank's micro-batches of `num_steps` optimiser steps from `start_step` on, as `collate` makes them.

    Each iteration starts at `start_step` again. For `torch.utils.data.DataLoader(loader, batch_size=None)` without
    workers: the threads are its own.
    """

    def __init__(
        self, shards: Shards, encoder: Encoder, rank: int, plan: BatchPlan, seed: int, start_step: int, num_steps: int
    ) -> None:
        """Raises DataError where the shards were measured with another tokenizer, template or image processor."""
        if shards.fingerprint != encoder.fingerprint:
            raise DataError(
                f"{', '.join(map(str, shards.folders))}: sharded with another tokenizer, chat template or image "
                f"processor than this run's (fingerprint {shards.fingerprint}, here {encoder.fingerprint}), so the "
                "lengths do not hold; run `gemma-dist shard` again with this model and template"
            )
        self.shards, self.encoder = shards, encoder
        self.rank, self.plan, self.seed = rank, plan, seed
        self.start_step, self.num_steps = start_step, num_steps
        self._ids = control_ids(encoder.processor)

    def __len__(self) -> int:
        """Micro-batches of one iteration."""
        return self.num_steps * self.plan.gradient_accumulation_steps

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Raises DataError, with the sample's id, where a sample is damaged."""
        assert get_worker_info() is None, "worker processes would each give out every micro-batch"
        steps = range(self.start_step, self.start_step + self.num_steps)
        wanted = (samples for step in steps for samples in self.samples_at(step))
        pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="loader")
        ahead: deque[Future[dict[str, torch.Tensor]]] = deque()
        try:
            for samples in wanted:
                ahead.append(pool.submit(self._prepare, samples))
                if len(ahead) > NUM_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def samples_at(self, step: int) -> list[list[int]]:
        """The sample numbers of this rank's micro-batches at `step`; an empty list is a filler."""
        plan = self.plan
        batch = global_batch(step, len(self.shards), plan.global_batch_size, self.seed)
        return micro_batches(
            batch, self.rank, plan.world_size, plan.per_device_train_batch_size, plan.gradient_accumulation_steps
        )

    def ids_at(self, step: int) -> list[list[str]]:
        """The sample ids of this rank's micro-batches at `step`."""
        return [[self.shards.id(index) for index in samples] for samples in self.samples_at(step)]

    def num_target_tokens_at(self, step: int) -> int:
        """Trained tokens of the global batch of `step`, all ranks together: what its loss is divided by."""
        batch = global_batch(step, len(self.shards), self.plan.global_batch_size, self.seed)
        return int(self.shards.num_target_tokens[batch].sum())

    def num_tokens_at(self, step: int) -> int:
        """Tokens of the global batch of `step`, text and images, without padding."""
        batch = global_batch(step, len(self.shards), self.plan.global_batch_size, self.seed)
        return int(self.shards.num_text_tokens[batch].sum() + self.shards.num_image_tokens[batch].sum())

    @property
    def num_steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.shards), self.plan.global_batch_size)

    def _prepare(self, samples: list[int]) -> dict[str, torch.Tensor]:
        return collate([self._sample(index) for index in samples], self._ids)

    def _sample(self, index: int) -> Sample:
        sample_id = self.shards.id(index)
        try:
            trajectory = self.shards.read(index)
            pixels = self.encoder.pixels(trajectory.images) if trajectory.images else {}
            return Sample(sample_id, self.encoder.encode(trajectory), pixels)
        except DataError as error:
            raise DataError(f"sample {sample_id!r} ({self.shards.place(index)}): {error}") from error
        except Exception as error:
            error.add_note(f"while sample {sample_id!r} ({self.shards.place(index)}) was prepared")
            raise
