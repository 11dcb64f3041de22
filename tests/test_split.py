"""Rows that are put aside: whole groups of rows that are alike, the same ones in any order; nothing in both parts."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_dist.__main__ import main
from gemma_dist.config import RowConfig, ShardConfig
from gemma_dist.errors import DataError
from gemma_dist.shards.reader import open_shards
from gemma_dist.show.split import choose_groups, choose_held_out
from gemma_dist.show.stats import collect_stats
from tests.support.corpus import write_rows

WORDS = [f"word{number}" for number in range(4000)]


def spoken(number: int, seed: int | None = None, **fields: Any) -> dict[str, Any]:
    """A row of 120 words of its own; rows of one `seed` differ in the last one alone."""
    chosen = random.Random(number if seed is None else 10_000 + seed).choices(WORDS, k=120)
    question, answer = " ".join(chosen[:60]), " ".join([*chosen[60:], f"end{number}"])
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"row-{number}", "messages": messages, **fields}


# Alone: 0 to 19. Nearly the same: 20 to 24. Of one pair, other words: 25 and 26.
ROWS = [
    *map(spoken, range(20)),
    *(spoken(number, seed=1) for number in range(20, 25)),
    *(spoken(number, pair="p") for number in (25, 26)),
]
TOGETHER = [set(range(20, 25)), {25, 26}]


def held_out_of(path: Path, share: float) -> set[int]:
    """The numbers of the rows that are put aside."""
    found = choose_held_out([path], share, ShardConfig())
    lines = path.read_text().splitlines()
    return {int(json.loads(lines[line - 1])["id"][4:]) for line in found.get(str(path), ())}


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.6, 0.9])
def test_what_is_alike_stays_together_in_any_order(share: float, tmp_path: Path) -> None:
    chosen = held_out_of(write_rows(tmp_path / "rows.jsonl", ROWS), share)
    assert 1 <= len(chosen) <= max(1, round(share * len(ROWS)))
    for group in TOGETHER:
        assert group <= chosen or not group & chosen
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    assert held_out_of(write_rows(tmp_path / "shuffled.jsonl", shuffled), share) == chosen


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.floats(0.01, 0.99), st.integers(0, 99))
def test_groups_are_taken_whole_never_all_and_no_more_than_the_share(
    labels: list[int], share: float, seed: int
) -> None:
    group_of = np.array(labels)
    hashes = np.random.default_rng(seed).integers(0, 2**63, len(labels), np.uint64)
    chosen = choose_groups(group_of, hashes, share)
    taken, left = set(group_of[chosen].tolist()), set(np.delete(group_of, chosen).tolist())
    assert not taken & left
    if len(set(labels)) == 1:
        assert len(chosen) == 0
    else:
        assert taken
        assert left
        least = min(labels.count(label) for label in labels)
        assert len(chosen) <= max(least, round(share * len(labels)))


def test_both_parts_are_shards_without_a_row_in_common(tmp_path: Path, model: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"messages": []}])
    words = [
        "shard",
        data,
        "--model",
        model,
        "--split",
        0.3,
        "--out",
        tmp_path / "out",
        "--skip-invalid",
        "--num-workers",
        1,
    ]
    assert main(list(map(str, words))) == 0
    parts = {name: open_shards(tmp_path / "out" / name) for name in ("train", "held_out")}
    ids = {name: {shards.id(index) for index in range(len(shards))} for name, shards in parts.items()}
    assert not ids["train"] & ids["held_out"]
    assert ids["train"] | ids["held_out"] == {row["id"] for row in ROWS}
    assert len((tmp_path / "out/train/rejected.jsonl").read_text().splitlines()) == 1, "what is refused stays behind"
    stats = collect_stats([str(tmp_path / "out/train")], [str(tmp_path / "out/held_out")], None, RowConfig())
    assert stats.against is not None
    assert (stats.against.exact.num_rows, stats.against.near.num_rows, stats.against.same_prompt.num_rows) == (0, 0, 0)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    assert main(list(map(str, words))) == 0, "the same command has nothing left to do"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")} == before
    assert main([str({0.3: 0.5}.get(word, word)) for word in words]) == 2, "another share is another corpus"  # type: ignore[call-overload]


def test_where_all_are_alike_nothing_can_be_put_aside(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [spoken(number, seed=1) for number in range(5)])
    with pytest.raises(DataError, match="all 5 rows are alike"):
        choose_held_out([data], 0.2, ShardConfig())


@pytest.mark.parametrize("more", [["--append"], ["--part", "1/2"]])
def test_a_part_of_the_rows_is_not_split(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS[:1])
    assert main(["shard", str(data), "--model", "m", "--split", "0.1", "--out", "o", *more]) == 2
    assert "puts aside of all rows at once" in capsys.readouterr().err
