"""Packs: every sample in one of them, none too long, and little left empty."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_dist.stream.packing import count_packs, pack

lengths = st.lists(st.integers(1, 120), min_size=1, max_size=80)


@given(lengths=lengths, packing_length=st.integers(1, 150))
def test_each_sample_is_in_one_pack_and_packs_fit(lengths: list[int], packing_length: int) -> None:
    packs = pack(np.array(lengths), packing_length)
    assert sorted(chain.from_iterable(packs)) == list(range(len(lengths)))
    for members in packs:
        assert members == sorted(members)
        assert len(members) == 1 or sum(lengths[i] for i in members) <= packing_length


@given(lengths=lengths, packing_length=st.integers(1, 150))
def test_no_two_packs_could_be_one(lengths: list[int], packing_length: int) -> None:
    sums = sorted(
        sum(min(lengths[i], packing_length) for i in pack_) for pack_ in pack(np.array(lengths), packing_length)
    )
    assert len(sums) < 2 or sums[0] + sums[1] > packing_length


@given(blocks=st.lists(lengths, min_size=1, max_size=12), packing_length=st.integers(1, 150))
def test_blocks_together_make_the_packs_that_each_makes_alone(blocks: list[list[int]], packing_length: int) -> None:
    starts = np.cumsum([0, *map(len, blocks)])
    counts = count_packs(np.array(list(chain.from_iterable(blocks))), starts, packing_length)
    assert counts.tolist() == [len(pack(np.array(block), packing_length)) for block in blocks]


@pytest.mark.parametrize("packing_length", [16_384, 32_768])
def test_little_is_left_empty_on_a_long_tail(packing_length: int) -> None:
    """Mean 2.4k tokens, 99 % below 9.3k: blocks of 512 samples leave less than 5 %."""
    rng = np.random.default_rng(0)
    found = np.minimum(rng.lognormal(7.56, 0.67, 512 * 40), 16_384).astype(int)
    assert 2_200 < found.mean() < 2_600
    assert 8_500 < np.quantile(found, 0.99) < 10_000
    num_packs = count_packs(found, np.arange(0, len(found) + 1, 512), packing_length).sum()
    assert found.sum() / (num_packs * packing_length) > 0.95
