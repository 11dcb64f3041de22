"""The order of the samples: exactly once an epoch, the same for every world size, a function of the step alone."""

import subprocess
import sys
from itertools import chain, pairwise

from hypothesis import given
from hypothesis import strategies as st

from gemma_dist.data.order import epoch_of, global_batch, micro_batches, steps_per_epoch

sizes = st.integers(1, 200)
few = st.integers(1, 6)
seeds = st.integers(0, 2**63)


@given(num_samples=sizes, global_batch_size=st.integers(1, 50), seed=seeds, epoch=st.integers(0, 5))
def test_each_sample_comes_exactly_once_an_epoch(
    num_samples: int, global_batch_size: int, seed: int, epoch: int
) -> None:
    steps = steps_per_epoch(num_samples, global_batch_size)
    epoch_steps = range(epoch * steps, (epoch + 1) * steps)
    batches = [global_batch(step, num_samples, global_batch_size, seed) for step in epoch_steps]
    assert sorted(chain.from_iterable(batches)) == list(range(num_samples))
    assert all(len(batch) == global_batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= global_batch_size
    assert {epoch_of(step, num_samples, global_batch_size) for step in epoch_steps} == {epoch}


@given(num_samples=sizes, world_size=few, micro=few, accumulation=few, seed=seeds)
def test_the_ranks_share_a_batch_without_loss_or_repeat(
    num_samples: int, world_size: int, micro: int, accumulation: int, seed: int
) -> None:
    global_batch_size = world_size * micro * accumulation
    for step in range(steps_per_epoch(num_samples, global_batch_size)):
        batch = global_batch(step, num_samples, global_batch_size, seed)
        ranks = [micro_batches(batch, rank, world_size, micro, accumulation) for rank in range(world_size)]
        assert [len(mine) for mine in ranks] == [accumulation] * world_size
        assert all(len(samples) <= micro for mine in ranks for samples in mine)
        assert sorted(sample for mine in ranks for samples in mine for sample in samples) == sorted(batch)


@given(num_samples=sizes, micro=few, seed=seeds, step=st.integers(0, 100))
def test_the_same_global_batch_for_every_world_size(num_samples: int, micro: int, seed: int, step: int) -> None:
    batch = global_batch(step, num_samples, 12 * micro, seed)
    for world_size in (1, 2, 3, 4, 6, 12):
        ranks = [micro_batches(batch, rank, world_size, micro, 12 // world_size) for rank in range(world_size)]
        assert {sample for mine in ranks for samples in mine for sample in samples} == set(batch)


def test_the_epochs_and_the_seeds_differ_and_the_tail_of_an_epoch_is_a_smaller_batch() -> None:
    first, second, other_seed = global_batch(0, 100, 64, 1), global_batch(2, 100, 64, 1), global_batch(0, 100, 64, 2)
    assert first != second
    assert first != other_seed
    assert len(global_batch(1, 100, 64, 1)) == 36
    assert micro_batches([7], 1, 2, 2, 2) == [[], []]


def test_the_order_is_pinned() -> None:
    """A changed shuffle would break the resume of runs that exist, so it must not change by accident."""
    assert global_batch(0, 10, 10, 0) == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


def test_the_shuffle_looks_random() -> None:
    """Neighbours of the corpus land anywhere: the mean jump of a random permutation of n is about n / 3."""
    order = global_batch(0, 3000, 3000, 5)
    jumps = [abs(a - b) for a, b in pairwise(order)]
    assert 900 < sum(jumps) / len(jumps) < 1100


def test_order_imports_no_torch() -> None:
    code = "import sys, gemma_dist.data.order; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
