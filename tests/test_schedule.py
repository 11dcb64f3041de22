"""The schedule of a corpus: the same on every world size, by arithmetic alone, balanced when packed, and elastic."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_dist.batch_plan import BatchPlan, batch_plan
from gemma_dist.errors import ConfigError, DataError
from gemma_dist.recipe import load_config
from gemma_dist.shards import sharding
from gemma_dist.shards.reader import open_shards
from gemma_dist.stream.schedule import Schedule, open_schedule, read_quarantine
from tests.support.corpus import ids_at, row, shard_rows
from tests.support.ranks import gemma_dist


def corpus(
    lengths: Any, row_group_sizes: Any, weights: list[float] | None = None, later: Any = (), half: int | None = None
) -> Any:
    """What a schedule asks of an open corpus, for lengths that are only numbers. With weights, the row groups from
    `half` on are a source of its own; `later` weights come from their steps on."""
    lengths, sizes = np.asarray(lengths), np.asarray(row_group_sizes)
    assert sizes.sum() == len(lengths)
    half = len(sizes) // 2 if half is None else half
    ranges = [[range(len(sizes))]] if weights is None else [[range(half)], [range(half, len(sizes))]]
    return SimpleNamespace(
        num_text_tokens=lengths,
        num_image_tokens=np.zeros_like(lengths),
        row_group_bytes=np.full(len(sizes), 1 << 20),
        row_group_samples=sizes,
        first_sample=np.concatenate([[0], np.cumsum(sizes)]),
        sources=lambda: (ranges, [(0, weights or [1.0]), *later]),
        place=lambda index: f"place {index}",
        id=str,
        manifest_hash="0123456789abcdef",
    )


def plan(world_size: int, micro: int, global_batch_size: int) -> BatchPlan:
    return BatchPlan(world_size, micro, global_batch_size // (world_size * micro), global_batch_size)


def schedule(shards: Any, world_size: int, global_batch_size: int, packing: bool, seed: int = 1) -> Schedule:
    return Schedule(shards, plan(world_size, 1, global_batch_size), seed, packing=packing, packing_length=None)


def of_rank(found: Schedule, step: int, rank: int) -> list[int]:
    return list(chain.from_iterable(chain.from_iterable(found.micro_batches(step, rank))))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    packing=st.booleans(),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_each_sample_once_an_epoch_and_the_same_batches_on_every_world_size(
    sizes: list[int], packing: bool, seed: int, data: Any
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=sum(sizes), max_size=sum(sizes)))
    shards = corpus(lengths, sizes)
    alone = schedule(shards, 1, 12, packing, seed)
    epoch = data.draw(st.integers(0, 3))
    steps = range(epoch * alone.steps_per_epoch, (epoch + 1) * alone.steps_per_epoch)
    batches = [of_rank(alone, step, 0) for step in steps]
    assert sorted(chain.from_iterable(batches)) == list(range(len(lengths)))
    for world_size in (2, 3, 4, 12):
        together = schedule(shards, world_size, 12, packing, seed)
        for step, batch in zip(steps, batches, strict=True):
            micro_batches = [together.micro_batches(step, rank) for rank in range(world_size)]
            assert {len(mine) for mine in micro_batches} == {12 // world_size}, "no rank waits for another"
            assert list(chain.from_iterable(of_rank(together, step, rank) for rank in range(world_size))) == batch


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    packing=st.booleans(),
    world_size=st.sampled_from([1, 2, 6]),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_a_quarantine_takes_out_its_samples_and_moves_no_other(
    sizes: list[int], packing: bool, world_size: int, data: Any
) -> None:
    num_samples = sum(sizes)
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=num_samples, max_size=num_samples))
    gone = data.draw(st.frozensets(st.integers(0, num_samples - 1)))
    shards, batch = corpus(lengths, sizes), plan(world_size, 2, 12)
    whole, rest = (
        Schedule(shards, batch, 1, packing=packing, packing_length=None, quarantine=quarantine)
        for quarantine in (frozenset[int](), gone)
    )
    assert rest.steps_per_epoch == whole.steps_per_epoch
    for step in range(2 * whole.steps_per_epoch):
        assert rest.global_batch(step) == [sample for sample in whole.global_batch(step) if sample not in gone]
        for rank in range(world_size):
            kept = [
                [[sample for sample in pack if sample not in gone] for pack in packs]
                for packs in whole.micro_batches(step, rank)
            ]
            assert rest.micro_batches(step, rank) == kept
            blocks = [sequence.block for sequence in whole.rank_sequences(step, rank)]
            assert [sequence.block for sequence in rest.rank_sequences(step, rank)] == blocks


def lengths_of(distribution: str, shared: Path) -> np.ndarray:
    rng = np.random.default_rng(0)
    if distribution == "long tail":  # mean 2.4k, 99 % below 9.3k
        return np.minimum(rng.lognormal(7.56, 0.67, 8000), 16_384).astype(int)
    # About as many tokens as the real tokenizer makes of the rows of the shared data: a token for 3.3 characters.
    rows = (shared / "data" / "toolcalls" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return rng.permutation([max(16, round(len(line) / 3.3)) for line in rows])


@pytest.mark.parametrize("distribution", ["long tail", "toolcalls"])
def test_packs_are_full_and_ranks_are_even(distribution: str, shared: Path) -> None:
    lengths = lengths_of(distribution, shared)
    sizes = np.full(len(lengths) // 32, 32)
    lengths = lengths[: sizes.sum()]
    found = schedule(corpus(lengths, sizes), world_size=8, global_batch_size=16, packing=True)
    steps = range(found.steps_per_epoch - 1)  # the last one holds what is left
    tokens = np.array([[lengths[of_rank(found, step, rank)].sum() for rank in range(8)] for step in steps])
    num_packs = sum(len(found.sequences(step, range(16))) for step in steps)
    assert tokens.sum() / (num_packs * found.packing_length) > 0.95
    assert np.mean(tokens.max(1) / tokens.mean(1)) < 1.1


def test_a_mixture_keeps_its_weights_and_counts_epochs_for_each_source() -> None:
    sizes = [10] * 20
    found = schedule(corpus(np.ones(200, int), sizes, weights=[3, 1]), 2, 16, packing=False)
    other = schedule(corpus(np.ones(200, int), sizes, weights=[3, 1]), 4, 16, packing=False)
    seen = Counter[int]()
    for step in range(found.steps_per_epoch):
        batch = found.global_batch(step)
        assert Counter(sample < 100 for sample in batch)[True] in (4, 12)  # 100 samples in 12 lanes: the 9th step has 4
        assert batch == [sample for rank in range(4) for sample in of_rank(other, step, rank)]
        seen.update(batch)
    assert found.steps_per_epoch == 25, "100 samples in 4 lanes"
    assert found.epochs(25) == [round(25 / 9, 4), 1]
    assert {seen[sample] for sample in range(100, 200)} == {1}
    assert {seen[sample] for sample in range(100)} == {2, 3}


@given(
    sizes=st.lists(st.integers(1, 20), min_size=2, max_size=8),
    packing=st.booleans(),
    changes=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=3),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_weights_that_change_at_a_step_keep_every_epoch_whole_on_any_number_of_ranks(
    sizes: list[int], packing: bool, changes: list[tuple[int, int, int]], data: Any
) -> None:
    """A source goes on where it is: each of its samples comes once before one comes again. And a step is the same to
    whoever starts there, on 1 to 6 ranks."""
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=sum(sizes), max_size=sum(sizes)))
    steps = np.cumsum([after for after, _, _ in changes]).tolist()
    later = [(step, [one, two]) for step, (_, one, two) in zip(steps, changes, strict=True)]
    shards = corpus(lengths, sizes, [3, 1], later)
    of_first = range(sum(sizes[: len(sizes) // 2]))
    alone = schedule(shards, 1, 12, packing)
    num_steps = steps[-1] + 12
    batches = [alone.global_batch(step) for step in range(num_steps)]
    for source in (of_first, range(len(of_first), len(lengths))):
        seen: list[int] = []
        for batch in batches:
            new = [sample for sample in batch if sample in source]
            in_epoch = seen[len(seen) - len(seen) % len(source) :]
            assert len(in_epoch) + len(new) <= len(source)
            assert not set(in_epoch) & set(new)
            seen += new
    for world_size in (2, 3, 4, 6, 12):
        for start in (0, *(step + around for step in steps for around in (-1, 0, 1))):
            together = schedule(shards, world_size, 12, packing)
            for step in range(start, start + 2):
                parts = [of_rank(together, step, rank) for rank in range(world_size)]
                assert list(chain.from_iterable(parts)) == batches[step]
                micro_batches = {len(together.micro_batches(step, rank)) for rank in range(world_size)}
                assert micro_batches == {12 // world_size}, "no rank waits for another"


def test_lanes_and_epochs_follow_weights_that_change() -> None:
    shards = corpus(np.ones(200, int), [10] * 20, [3, 1], later=[(4, [1, 3]), (10, [0, 1])])
    found = schedule(shards, 2, 16, packing=False)
    shares = [Counter(sample < 100 for sample in found.global_batch(step))[True] for step in range(12)]
    assert shares == [12] * 4 + [4] * 6 + [0] * 2
    assert found.epochs(4) == [0.48, 0.16]
    assert found.epochs(10) == [0.72, 0.88]
    assert found.steps_per_epoch == 11, "the first source rests for good, and the second has 12 left at step 10"
    assert [step for step in range(40) if found.ends_epoch(step)] == [11, 18, 25, 32, 39]
    assert found.epoch(18) == 2
    assert found.num_steps(SimpleNamespace(max_steps=-1, num_train_epochs=2.5)) == 22  # type: ignore[arg-type]


def test_more_sources_than_sequences_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch_size: 2 sources"):
        schedule(corpus(np.ones(20, int), [10, 10], weights=[1, 1]), 1, 1, packing=False)


def test_a_trajectory_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(DataError, match=r"place 1: sample '1' has 900 tokens.*train\.packing_length is 500"):
        Schedule(corpus([20, 900], [2]), plan(1, 1, 1), 0, packing=True, packing_length=500)


# ---- gemma-dist batches ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schedule")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "ROW_GROUP_BYTES", 4000)
        shard_rows(folder, model, [row(number, num_calls=1 + number % 4) for number in range(50)])
    return folder / "shards"


def ids(ranks: Any) -> Iterator[str]:
    for rank in ranks:
        for packs in rank:
            for pack in packs:
                yield from pack


@pytest.mark.parametrize("packing", ["false", "true"])
def test_batches_says_what_the_schedule_gives(shards: Path, packing: str) -> None:
    words = ["launch/cpu_full.yaml", "global_batch_size=8", f"packing={packing}", "per_device_train_batch_size=2"]
    words.append("max_steps=8")
    output = gemma_dist("batches", shards, *words, "--step", 1, "--num-steps", 8, "--world-size", 2, "--json")
    steps = [json.loads(line) for line in output.splitlines()]
    assert [step["step"] for step in steps] == list(range(1, 9))
    found = Schedule(open_shards(shards), plan(2, 2, 8), 42, packing=packing == "true", packing_length=None)
    for step in steps:
        assert step["ranks"] == [ids_at(found, step["step"] - 1, rank) for rank in range(2)]
    per_epoch = Counter(chain.from_iterable(ids(step["ranks"]) for step in steps if step["epoch"] <= 1))
    assert per_epoch == {f"row-{number}": 1 for number in range(50)}


def test_batches_honours_a_quarantine_and_prints_for_people(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("row-7\n\nrow-9\n")
    words = ["batches", "-", "launch/cpu_full.yaml", f"data.train={shards}", "--step", 1, "--num-steps", 7]
    whole = gemma_dist(*words)
    rest = gemma_dist(*words, "--quarantine", tmp_path / "bad.txt")
    assert "row-7 " in whole.replace("\n", " ")
    assert "row-7 " not in rest.replace("\n", " ")
    assert whole.count("row-") == rest.count("row-") + 2 == 50
    assert "names 'row-7000'" in gemma_dist(*words, "--quarantine", _file(tmp_path, "row-7000"), fails=True)


def test_a_quarantine_of_everything_is_refused(model: str, tmp_path: Path) -> None:
    shard_rows(tmp_path, model, [row(0), row(1)])
    (tmp_path / "bad.txt").write_text("\ufeffrow-0\nrow-1\n", encoding="utf-8")  # as an editor on Windows saves it
    words = [f"data.train={tmp_path}/shards", f"data.quarantine={tmp_path}/bad.txt", f"output_dir={tmp_path}/out"]
    config = load_config("launch/cpu_lora.yaml", words)
    with pytest.raises(DataError, match="leaves nothing of"):
        open_schedule(config, batch_plan(config, 1))


def test_a_quarantine_names_any_id(model: str, tmp_path: Path) -> None:
    names = ["a\u2028b", "c\u2029d", "e\x85f", "g\rh"]
    shard_rows(tmp_path, model, [row(number, num_calls=1) | {"id": name} for number, name in enumerate(names)])
    (tmp_path / "bad.txt").write_bytes("\r\n".join(names[1:]).encode())
    shards = open_shards(tmp_path / "shards")
    assert {shards.id(sample) for sample in read_quarantine(tmp_path / "bad.txt", shards)} == set(names[1:])


def test_a_recipe_mixes_sources_by_weight(shards: Path, model: str, tmp_path: Path) -> None:
    shard_rows(tmp_path, model, [row(number) for number in range(100, 112)])
    sources = f"data.train=[{{path: {shards}, weight: 3}}, {{path: {tmp_path / 'shards'}, weight: 1}}]"
    words = ["-", "launch/cpu_full.yaml", sources, "global_batch_size=8", "--step", 1, "--num-steps", 8, "--json"]
    steps = [json.loads(line) for line in gemma_dist("batches", *words).splitlines()]
    for step in steps[:6]:
        assert [len(name) for name in ids(step["ranks"])].count(len("row-100")) == 2, "of twelve in lanes of six steps"
    assert len({name for step in steps for name in ids(step["ranks"]) if len(name) < 7}) > 40


def test_a_recipe_changes_its_weights_at_a_step(shards: Path, model: str, tmp_path: Path) -> None:
    shard_rows(tmp_path, model, [row(number) for number in range(100, 112)])
    sources = f"data.train=[{{path: {shards}, name: plots}}, {{path: {tmp_path / 'shards'}, name: more}}]"
    weights = "data.weights=[{from_step: 0, plots: 3, more: 1}, {from_step: 2, plots: 0, more: 1}]"
    words = ["batches", "-", "launch/cpu_full.yaml", sources, "global_batch_size=8", "--step", 1, "--num-steps", 3]
    first, rest = gemma_dist(*words, weights).split("\nstep 3")
    assert first.count("sequences of each source: [6, 2]") == 2
    assert len(set(re.findall(r"row-1\d\d", first))) == 4
    assert "sequences of each source: [0, 8]" in rest
    assert len(set(re.findall(r"row-1\d\d", first + rest))) == 12, "the other 8 in one step"
    unnamed = "data.weights=[{from_step: 0, plots: 3}]"
    assert "from_step 0 names ['plots'], but the sources of data.train are ['plots', 'more']" in gemma_dist(
        *words, unnamed, fails=True
    )


def test_packs_are_counted_once_for_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = corpus(range(10, 90), [20] * 4, [1.0, 1.0])

    def opened(seed: int, **changed: Any) -> Schedule:
        return Schedule(shards, plan(1, 1, 2), seed, packing=True, packing_length=120, **changed)

    expected = [opened(1).micro_batches(step, 0) for step in range(30)]
    counted = opened(1, cache_dir=tmp_path)
    monkeypatch.setattr("gemma_dist.stream.schedule.count_packs", None)
    remembered = opened(1, cache_dir=tmp_path)
    for found in (counted, remembered):
        assert [found.micro_batches(step, 0) for step in range(30)] == expected
    assert len(list(tmp_path.iterdir())) == 2, "one file for each source, nothing half written"
    with pytest.raises(TypeError):  # counted anew
        opened(2, cache_dir=tmp_path)


def _file(folder: Path, text: str) -> Path:
    (folder / "unknown.txt").write_text(text)
    return folder / "unknown.txt"


def test_batches_reads_the_manifest_alone(shards: Path, tmp_path: Path) -> None:
    """No shard, no model and no torch: on a login node it answers at once."""
    (tmp_path / "manifest.arrow").write_bytes((shards / "manifest.arrow").read_bytes())
    code = (
        "import sys; from gemma_dist.__main__ import cli\n"
        f"cli(['batches', {str(tmp_path)!r}, 'launch/cpu_full.yaml', '--step', '3'], standalone_mode=False)\n"
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "row-" in done.stdout
