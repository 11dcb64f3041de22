"""Which sample comes when: a few integers in, a list of sample numbers out.

The position in the corpus is a function of the optimiser step alone. Nothing here knows of files, tensors or processes,
so any world size sees the same global batch at a step, and a resumed run needs no more state than the step.

Samples are numbered 0 … num_samples-1 in manifest order. An epoch is one shuffled pass: its batches hold
`global_batch_size` samples each, the last one what is left, so nothing is dropped and nothing comes twice.
"""

from functools import lru_cache

import numpy as np


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Optimiser steps of one pass over the corpus; the last one may have a smaller batch."""
    return -(-num_samples // global_batch_size)


def epoch_of(step: int, num_samples: int, global_batch_size: int) -> int:
    """The pass, from 0, that optimiser step `step` belongs to."""
    return step // steps_per_epoch(num_samples, global_batch_size)


def global_batch(step: int, num_samples: int, global_batch_size: int, seed: int) -> list[int]:
    """The sample numbers of optimiser step `step` (from 0, counted on over the epochs), all ranks together.

    `global_batch_size` of them, or the rest of the epoch at its last step. Every epoch has a shuffle of its own.
    """
    epoch, step_in_epoch = divmod(step, steps_per_epoch(num_samples, global_batch_size))
    start = step_in_epoch * global_batch_size
    samples: list[int] = _shuffled(num_samples, seed, epoch)[start : start + global_batch_size].tolist()
    return samples


def micro_batches(
    batch: list[int],
    rank: int,
    world_size: int,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int,
) -> list[list[int]]:
    """The part of a global batch that `rank` works on, one list a micro-batch.

    Always `gradient_accumulation_steps` lists of at most `per_device_train_batch_size` samples, so that all ranks do
    the same number of forward passes. In the tail of an epoch some are shorter or empty; those get fillers.
    """
    room = world_size * per_device_train_batch_size * gradient_accumulation_steps
    assert len(batch) <= room, f"{len(batch)} samples do not fit into {room} places"
    mine = batch[rank::world_size]
    size = per_device_train_batch_size
    return [mine[i * size : (i + 1) * size] for i in range(gradient_accumulation_steps)]


@lru_cache(maxsize=2)  # this epoch and the one that is being fetched ahead; 80 MB each at 10 million samples
def _shuffled(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of all sample numbers. Sorting raw Philox words keeps it the same under every numpy version:
    numpy fixes the streams of its bit generators for good, but not those of `Generator.permutation`."""
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_samples)
    return np.argsort(words, kind="stable")
