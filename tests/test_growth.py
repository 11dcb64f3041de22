"""A corpus that was added to is taken up at the next epoch of its source: the same order on any number of ranks, from
wherever a run resumes."""

import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_dist.__main__ import main
from gemma_dist.config import RunConfig, ShardConfig
from gemma_dist.errors import CheckpointError
from gemma_dist.recipe import load_config
from gemma_dist.resolve import resolve
from gemma_dist.shards import sharding
from gemma_dist.shards.reader import open_shards
from gemma_dist.shards.sharding import run_shard
from gemma_dist.stream.growth import editions_from, has_grown, remember
from gemma_dist.stream.schedule import Edition, Schedule
from gemma_dist.topology import Topology
from gemma_dist.train.run import train
from tests.support.corpus import row, shard_rows, write_rows
from tests.support.ranks import gemma_dist, long
from tests.test_schedule import corpus, of_rank, plan

EPOCHS = 3


def grown(
    sizes: list[int], lengths: list[int], half: int, weights: Any, editions: Any, world_size: int, **how: Any
) -> Schedule:
    """The schedule of two folders, of which the second begins with row group `half`."""
    shards = corpus(lengths, sizes, weights, half=half)
    folders = [range(half), range(half, len(sizes))]
    _, by_step = shards.sources()
    shards.sources = lambda: ([folders] if weights is None else [[folder] for folder in folders], by_step)
    how = {"packing": False, "packing_length": 300} | how
    return Schedule(shards, plan(world_size, 1, 12), 1, editions=editions, **how)


@given(
    first=st.lists(st.integers(1, 15), min_size=2, max_size=5),
    second=st.lists(st.integers(1, 15), min_size=1, max_size=4),
    has=st.tuples(st.integers(1, 2), st.integers(1, 1)),
    steps=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    weights=st.sampled_from([None, [3.0, 1.0], [1.0, 1.0]]),
    packing=st.booleans(),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_an_epoch_is_of_what_was_there_when_it_began(
    first: list[int],
    second: list[int],
    has: tuple[int, int],
    steps: tuple[int, int],
    weights: list[float] | None,
    packing: bool,
    data: Any,
) -> None:
    """Each folder grows once or twice, whichever row groups others have before them then."""
    sizes, half = first + second, len(first)
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=sum(sizes), max_size=sum(sizes)))
    later = sum(steps)
    editions = [Edition(0, list(has)), Edition(steps[0], [half, has[1]]), Edition(later, [half, len(second)])]
    how: dict[str, Any] = {"packing": packing}
    alone = grown(sizes, lengths, half, weights, editions, 1, **how)
    batches = [alone.global_batch(step) for step in range(later + 30)]
    starts = np.cumsum([0, *sizes])

    def samples(edition: Edition, folders: list[int]) -> set[int]:
        found: set[int] = set()
        for folder in folders:
            begin = folder * half
            found |= set(range(starts[begin], starts[begin + edition.num_row_groups[folder]]))
        return found

    for source in [[0, 1]] if weights is None else [[0], [1]]:
        whole = samples(editions[-1], source)
        epoch: set[int] = set()
        expected = samples(editions[0], source)
        for step, batch in enumerate(batches):
            if not epoch:  # one begins
                expected = samples([one for one in editions if one.from_step <= step][-1], source)
            new = whole & set(batch)
            assert not new & epoch
            assert new <= expected
            epoch |= new
            if epoch == expected:
                epoch = set()
        assert expected == whole
    for world_size in (2, 3, 4, 6):
        together = grown(sizes, lengths, half, weights, editions, world_size, **how)
        for step in range(later + 3):
            parts = [of_rank(together, step, rank) for rank in range(world_size)]
            assert list(chain.from_iterable(parts)) == batches[step]
    before = grown(sizes, lengths, half, weights, editions[:2], 1, **how)
    assert [before.global_batch(step) for step in range(later)] == batches[:later], "what was trained stays"


@pytest.fixture
def shards(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sharding, "ROW_GROUP_BYTES", 4000)
    shard_rows(tmp_path, model, [row(number) for number in range(10)])
    return tmp_path / "shards"


def add(shards: Path, model: str, *numbers: int) -> None:
    rows = write_rows(shards.parent / "more.jsonl", [row(number) for number in numbers])
    run_shard([rows], shards, model, ShardConfig(), False, append=True)


def test_a_corpus_is_known_by_its_beginning(model: str, shards: Path, tmp_path: Path) -> None:
    config = _config(model, shards, tmp_path / "out")
    run = resolve(config, Topology(""))
    marker = {"step": 4, "corpus": remember(run.schedule)}
    count = run.schedule.shards.num_row_groups
    assert editions_from(marker, run.schedule.shards) == [Edition(0, count)]
    (tmp_path / "other").mkdir()
    shard_rows(tmp_path / "other", model, [row(number + (number == 3)) for number in range(10)], skip_invalid=True)
    other = open_shards(tmp_path / "other" / "shards")
    add(shards, model, 20, 21)
    now = open_shards(shards)
    assert has_grown(marker, now)
    assert editions_from(marker, now) == [Edition(0, count), Edition(4, now.num_row_groups)]
    for shards_now, saved in ((other, marker), (now, {"step": 4})):
        assert editions_from(saved, shards_now) == []
        assert not has_grown(saved, shards_now)
    longer = resolve(config, Topology(""), editions_from(marker, now))
    marker = {"step": 9, "corpus": remember(longer.schedule)}
    assert editions_from(marker, now) == longer.schedule.editions
    assert not has_grown(marker, now)


def _config(model: str, shards: Path, out: Path, *more: str) -> RunConfig:
    words = [f"model_name_or_path={model}", f"data.train={shards}", f"output_dir={out}", "global_batch_size=4"]
    words += [f"num_train_epochs={EPOCHS}", "save_steps=2", "save_total_limit=null", "learning_rate=1e-3"]
    return load_config("launch/cpu_lora.yaml", [*words, "per_device_train_batch_size=2", *more])


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _grown_run(model: str, shards: Path, out: Path) -> list[dict[str, Any]]:
    """Lines of a run whose corpus is added to after its fourth step, and which is told to take that up."""
    train(_config(model, shards, out, "max_steps=4"))
    add(shards, model, 20, 21, 22, 23)
    with pytest.raises(CheckpointError, match=r"had 10 samples and has 14\. Set data\.appended: next_epoch"):
        train(_config(model, shards, out))
    train(_config(model, shards, out, "data.appended=next_epoch"))
    return _lines(out)


def test_a_run_takes_up_what_was_added_where_it_is_told_to(
    model: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """10 rows are 3 steps, and 14 are 4."""
    out = tmp_path / "out"
    lines = _grown_run(model, shards, out)
    assert [line["step"] for line in lines] == list(range(1, 11)), "3 + 3 + 4"
    assert [line["epoch"] for line in lines][5:] == [2, 2.25, 2.5, 2.75, 3]
    marker = json.loads((out / "checkpoint-10" / "complete.json").read_text())
    assert [one["from_step"] for one in marker["corpus"]] == [0, 4]

    words = ["-", "launch/cpu_lora.yaml", f"data.train={shards}", f"output_dir={out}", "global_batch_size=4"]
    capsys.readouterr()
    words += ["per_device_train_batch_size=2", "--step", "1", "--num-steps", "10", "--json"]
    assert main(["batches", *words]) == 0
    listed = capsys.readouterr().out.splitlines()
    ids = [list(chain.from_iterable(chain.from_iterable(json.loads(line)["ranks"][0]))) for line in listed]
    names = [list(chain.from_iterable(packs if isinstance(packs, list) else [packs] for packs in step)) for step in ids]
    old = {f"row-{number}" for number in range(10)}
    assert set(chain.from_iterable(names[:3])) == set(chain.from_iterable(names[3:6])) == old
    assert sorted(chain.from_iterable(names[6:])) == sorted(old | {f"row-{number}" for number in range(20, 24)})


@long
def test_who_resumes_such_a_run_once_more_on_two_ranks_finds_the_same(model: str, shards: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    lines = _grown_run(model, shards, out)
    shutil.copytree(out, again, ignore=shutil.ignore_patterns("checkpoint-10", "checkpoint-8"))
    recipe = ["launch/cpu_lora.yaml", f"model_name_or_path={model}", f"data.train={shards}", f"output_dir={again}"]
    recipe += [
        f"num_train_epochs={EPOCHS}",
        "global_batch_size=4",
        "per_device_train_batch_size=2",
        "learning_rate=1e-3",
    ]
    gemma_dist("train", *recipe, "save_steps=2", "save_total_limit=null", launch="cpu_ddp")
    for one, two in zip(lines, _lines(again), strict=True):
        assert (two["step"], two["target_tokens"], two["epoch"]) == (one["step"], one["target_tokens"], one["epoch"])
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
