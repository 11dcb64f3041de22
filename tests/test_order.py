"""The order of the samples: exactly once an epoch, the same for every world size, a function of the step alone."""

import subprocess
import sys
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_dist.stream.order import NEVER, Order, cut_blocks, lanes_of, micro_batches, split_lanes, spread_lanes

blocks = st.lists(st.integers(1, 12), min_size=1, max_size=40).map(np.array)
lanes = st.integers(1, 24)
seeds = st.integers(0, 2**63)


def batch(order: Order, step: int) -> list[tuple[int, int]]:
    found = (order.at(step, lane) for lane in range(order.num_lanes))
    return [unit for unit in found if unit is not None]


@given(num_units=blocks, num_lanes=lanes, seed=seeds, epoch=st.integers(0, 5))
@settings(deadline=None)
def test_each_unit_comes_exactly_once_an_epoch(num_units: np.ndarray, num_lanes: int, seed: int, epoch: int) -> None:
    order = Order(num_units, num_lanes, seed)
    steps = range(epoch * order.steps_until(1), (epoch + 1) * order.steps_until(1))
    batches = [batch(order, step) for step in steps]
    every_unit = [(block, unit) for block, count in enumerate(num_units) for unit in range(count)]
    assert sorted(chain.from_iterable(batches)) == every_unit
    assert all(len(units) == num_lanes for units in batches[:-1]), "only the last step of an epoch is smaller"


@given(
    num_units=blocks,
    seed=seeds,
    num_lanes=st.integers(0, 9),
    changes=st.lists(st.tuples(st.integers(1, 25), st.integers(0, 9)), max_size=4),
    first_epoch=st.integers(0, 2),
)
@settings(deadline=None)
def test_lanes_that_change_leave_no_unit_out_and_give_none_twice(
    num_units: np.ndarray, seed: int, num_lanes: int, changes: list[tuple[int, int]], first_epoch: int
) -> None:
    """All units of an epoch, then all of the next: whatever the lanes are, and where they change."""
    first_step = 7 * first_epoch
    steps = np.cumsum([first_step, *(after for after, _ in changes)]).tolist()
    changes = [*zip(steps[1:], (lanes for _, lanes in changes), strict=True), (steps[-1] + 40, 5)]  # in the end, some
    order = Order(num_units, num_lanes, seed, tuple(changes), first_step, first_epoch)
    every_unit = [(block, unit) for block, count in enumerate(num_units) for unit in range(count)]
    given_so_far: list[tuple[int, int]] = []
    begins = {first_epoch: first_step}
    for step in range(first_step, steps[-1] + 60):
        assert int(order.epochs(step) + 1e-9) == first_epoch + len(given_so_far) // order.total
        num_now = [num for first, num in [(first_step, num_lanes), *changes] if first <= step][-1]
        units = [unit for lane in range(num_now) if (unit := order.at(step, lane)) is not None]
        whole, in_epoch = divmod(len(given_so_far), order.total)
        given_so_far += units
        assert in_epoch + len(units) <= order.total, "no step has units of two epochs"
        assert len(units) == min(num_now, order.total - in_epoch), "only the last step of an epoch is smaller"
        if in_epoch + len(units) == order.total and units:
            assert sorted(given_so_far[whole * order.total :]) == every_unit
            epoch = first_epoch + whole + 1
            begins[epoch] = step + 1
            assert order.epochs(step + 1) == epoch
    del begins[first_epoch]
    for epoch, step in begins.items():
        assert order.steps_until(epoch) == step
        assert order.next_epoch(step) == (step, epoch)
        if order.epochs(step - 1) % 1:  # else it rested between two epochs, or the epoch had one step
            assert order.next_epoch(step - 1) == (step, epoch)


def test_lanes_that_do_not_change_count_as_ever() -> None:
    order = Order(np.array([7, 4]), num_lanes=3, seed=0)
    assert [order.steps_until(epochs) for epochs in (0.5, 1, 1.1, 2.26, 3)] == [2, 4, 5, 10, 12]
    assert [order.epochs(step) for step in (0, 1, 4, 10)] == [0, 0.25, 1, 2.5]
    assert Order(np.array([7]), 2, 0, changes=((2, 0),)).steps_until(1) == NEVER


@given(num_lanes=lanes, per_rank=st.integers(1, 6), world_size=st.integers(1, 8))
def test_the_ranks_share_the_lanes(num_lanes: int, per_rank: int, world_size: int) -> None:
    ranges = [lanes_of(rank, world_size, num_lanes) for rank in range(world_size)]
    assert list(chain.from_iterable(ranges)) == list(range(num_lanes))
    even = [len(lanes_of(rank, world_size, world_size * per_rank)) for rank in range(world_size)]
    assert even == [per_rank] * world_size


@given(num_sequences=st.integers(0, 40), micro=st.integers(1, 6), accumulation=st.integers(1, 8))
def test_every_rank_has_the_same_number_of_micro_batches(num_sequences: int, micro: int, accumulation: int) -> None:
    sequences = list(range(min(num_sequences, micro * accumulation)))
    cut = micro_batches(sequences, micro, accumulation)
    assert len(cut) == accumulation
    assert list(chain.from_iterable(cut)) == sequences
    assert all(len(part) <= micro for part in cut)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 90)), min_size=1, max_size=60),
    seed=seeds,
    max_bytes=st.integers(1, 9000),
    max_samples=st.integers(1, 200),
)
def test_blocks_hold_every_row_group_once_and_stay_small(
    sizes: list[tuple[int, int]], seed: int, max_bytes: int, max_samples: int
) -> None:
    num_bytes, num_samples = map(np.array, zip(*sizes, strict=True))
    cut = cut_blocks(num_bytes, num_samples, seed, max_bytes, max_samples)
    assert sorted(chain.from_iterable(cut[block] for block in range(len(cut)))) == list(range(len(sizes)))
    for block in range(len(cut)):
        inside = cut[block]
        assert len(inside) >= 1
        assert num_bytes[inside[:-1]].sum() <= max_bytes, "the last one may reach over"
        assert num_samples[inside[:-1]].sum() <= max_samples
    assert cut.sums(num_samples).sum() == num_samples.sum()


def test_neighboring_lanes_come_to_the_block_between_them_at_the_same_time() -> None:
    order = Order(
        np.full(10, 8), num_lanes=4, seed=0
    )  # 20 units a lane: a block is shared by lanes 0 and 1, and 2 and 3
    seen: dict[int, list[int]] = {}
    for step in range(order.steps_until(1)):
        for block, _ in batch(order, step):
            seen.setdefault(block, []).append(step)
    assert all(max(steps) - min(steps) < 8 for steps in seen.values()), "no block is held or read twice"


def test_each_block_is_read_by_one_rank_but_for_those_between_two() -> None:
    order = Order(np.full(97, 11), num_lanes=32, seed=1)
    for world_size in (2, 4, 8):
        reads = 0
        for rank in range(world_size):
            mine = lanes_of(rank, world_size, 32)
            units = (order.at(step, lane) for step in range(order.steps_until(1)) for lane in mine)
            reads += len({unit[0] for unit in units if unit})
        assert reads <= 97 + world_size - 1


def test_epochs_and_seeds_differ() -> None:
    order = Order(np.full(9, 7), num_lanes=4, seed=1)
    first, second = batch(order, 0), batch(order, order.steps_until(1))
    assert first != second
    assert first != batch(Order(np.full(9, 7), num_lanes=4, seed=2), 0)


def test_the_order_is_pinned() -> None:
    """A changed shuffle would break the resume of runs that exist, so it must not change by accident."""
    order = Order(np.array([3, 4, 2]), num_lanes=2, seed=0)
    assert [batch(order, step) for step in range(2)] == [[(1, 0), (0, 0)], [(1, 2), (0, 1)]]
    assert cut_blocks(np.ones(6), np.ones(6), 0, 2, 9).row_groups.tolist() == [0, 2, 1, 5, 4, 3]


@pytest.mark.parametrize("num_lanes", [16, 48, 128])
def test_a_batch_comes_from_as_many_shards_as_a_random_one(num_lanes: int) -> None:
    """40 shards of 16 row groups of 32 rows: distinct shards in a batch, against a true permutation."""
    num_shards, per_shard, rows = 40, 16, 32
    shard_of = np.repeat(np.arange(num_shards), per_shard)
    cut = cut_blocks(np.ones(640), np.full(640, rows), 3, 2, 10_000)
    order = Order(cut.sums(np.full(640, rows)), num_lanes, 3)
    found = []
    for step in range(0, order.steps_until(1) - 1, 7):
        groups = [cut[block][unit // rows] for block, unit in batch(order, step)]
        found.append(len(set(shard_of[groups])))
    rng = np.random.default_rng(0)
    samples = rng.permutation(np.repeat(shard_of, rows))
    true = [len(set(samples[i : i + num_lanes])) for i in range(0, len(samples) - num_lanes, num_lanes)]
    assert abs(np.mean(found) / np.mean(true) - 1) < 0.05


def test_neighbors_of_the_corpus_land_anywhere() -> None:
    """The mean jump of a random permutation of n is n / 3."""
    order = Order(np.full(100, 30), num_lanes=20, seed=5)
    places = [block * 30 + unit for step in range(order.steps_until(1)) for block, unit in batch(order, step)]
    jumps = [abs(a - b) for a, b in pairwise(places)]
    assert 900 < sum(jumps) / len(jumps) < 1100


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=8), num_lanes=st.integers(8, 300))
def test_lanes_follow_the_weights(weights: list[float], num_lanes: int) -> None:
    split = split_lanes(weights, num_lanes)
    assert sum(split) == num_lanes
    assert min(split) >= 1
    if min(weights) / sum(weights) * num_lanes >= 1:
        assert all(
            abs(count - weight / sum(weights) * num_lanes) <= 1 for count, weight in zip(split, weights, strict=True)
        )
    spread = spread_lanes(split)
    assert Counter(source for source, _ in spread) == dict(enumerate(split))
    assert len(set(spread)) == num_lanes


def test_a_source_of_weight_0_has_no_lane() -> None:
    assert split_lanes([1, 0, 3], 4) == [1, 0, 3]
    assert split_lanes([1, 0, 0], 1) == [1, 0, 0]


def test_a_mixture_is_spread_over_the_ranks() -> None:
    spread = spread_lanes([24, 8])
    for rank in range(4):
        sources = Counter(spread[lane][0] for lane in lanes_of(rank, 4, 32))
        assert sources == {0: 6, 1: 2}


def test_too_many_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="3 sources"):
        split_lanes([1, 1, 1], 2)


def test_order_and_packing_import_no_torch() -> None:
    code = "import sys, gemma_dist.stream.order, gemma_dist.stream.packing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
