"""Repeated ids are found in bounded memory and left out without encoding again; manifests are joined in parts."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gemma_dist.config import ShardConfig
from gemma_dist.shards import hashes as hashes_module
from gemma_dist.shards import pieces, repeated, sharding
from gemma_dist.shards.hashes import Place, equal_hashes, hash_ids, write_hashes
from gemma_dist.shards.joined import write_joined
from gemma_dist.shards.sharding import run_shard
from tests.support.corpus import row, write_rows

REPEATED = {7: 1, 9: 4, 21: 3, 22: 3, 30: 28}  # rows that get the ids of others


def strings(*values: str) -> pa.Array:
    return pa.array(values, pa.large_string())


def test_ids_have_one_hash_each_wherever_they_lie() -> None:
    names = [f"row-{number}" for number in range(100_000)] + [f"row-{number}#turn-2" for number in range(100_000)]
    ids = strings(*names, "", "\0", "é✓" * 5000)
    found = hash_ids(ids)
    assert len(np.unique(found)) == len(ids)
    assert hash_ids(ids.slice(7, 100)).tolist() == found[7:107].tolist()
    assert hash_ids(strings()).tolist() == []
    counts, _ = np.histogram(found, bins=8, range=(0.0, 2.0**64))
    assert counts.min() > 0.95 * len(ids) / 8, "spread over the whole range, so that its steps are of one size"


@pytest.mark.parametrize("at_once", [2, 5, 1 << 20])
def test_equal_hashes_are_found_over_all_files(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes_module, "HASHES_AT_ONCE", at_once)
    monkeypatch.setattr(hashes_module, "IDS_AT_ONCE", 3)
    parts = [["a", "b", "c", "b"], [], ["d", "a"], ["e", "b", "f", "g", "a"]]
    files = [tmp_path / str(number) for number in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        write_hashes(file, strings(*part))
    found = sorted(equal_hashes(files, 11))
    assert found == [[Place(0, 0), Place(2, 1), Place(3, 4)], [Place(0, 1), Place(0, 3), Place(3, 1)]]


def test_tables_in_parts_make_the_bytes_of_one_batch(tmp_path: Path) -> None:
    kinds = {"n": pa.int64(), "digest": pa.binary(), "id": pa.large_list(pa.large_string())}
    schema = pa.schema(kinds | {"count": pa.large_list(pa.int32())}, metadata={"header": "{}"})
    rows = [
        {
            "n": n,
            "digest": b"x" * n if n % 2 else None,
            "id": ["é" * (n + i) for i in range(n % 4)],
            "count": [*range(n % 4)],
        }
        for n in range(40)
    ]
    whole = pa.Table.from_pylist(rows, schema)
    with pa.ipc.new_file(tmp_path / "whole", schema) as file:
        file.write_table(whole)
    for cuts in ([0, 40], [0, 1, 2, 17, 17, 40]):
        tables = [whole[start:end] for start, end in pairwise(cuts)]
        write_joined(tmp_path / "parts", schema, lambda tables=tables: tables)  # type: ignore[misc]
        assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


# ---- pieces without the rows -----------------------------------------------------------------------------------------


def make_rows(*, refused_at_once: bool) -> list[dict[str, Any]]:
    """Rows of which some have the ids of earlier ones; or in their places, of the same length, rows that are none."""
    rows = [row(number, num_calls=1 + number % 3) for number in range(32)]
    for number in range(0, 32, 3):
        rows[number]["messages"][1]["reasoning_content"] = "Hm."
        rows[number]["messages"] += [{"role": "user", "content": "More?"}, {"role": "assistant", "content": "No."}]
        rows[number]["tools"] = [{"type": "function", "function": {"name": "plot", "description": str(number)}}]
    rows[19] = {"id": "bad", "messages": []}
    for number, earlier in REPEATED.items():
        rows[number]["id"] = rows[earlier]["id"]
        if refused_at_once:
            rows[number] = {"messages": [], "more": "x" * (len(json.dumps(rows[number])) - 28)}
    return rows


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("PIECE_BYTES", 6000), ("ROW_GROUP_BYTES", 3000), ("SHARD_BYTES", 5000)):
        monkeypatch.setattr(sharding, name, size)


SETTINGS = [
    ShardConfig(),
    ShardConfig(max_length=185, too_long="cut_turns"),
    ShardConfig(unroll="reasoning", max_length=215, too_long="drop"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["whole", "cut", "unrolled"])
def test_repeated_rows_leave_the_bytes_of_a_run_that_refused_them_at_once(
    settings: ShardConfig, small_pieces: None, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []

    def counted(sample: Any, encoder: Any) -> Any:
        encoded.append(sample.id)
        return encode(sample, encoder)

    encode = pieces.encode_trained
    monkeypatch.setattr(pieces, "encode_trained", counted)
    reports, contents = [], []
    for refused_at_once in (False, True):
        source = write_rows(tmp_path / "rows.jsonl", make_rows(refused_at_once=refused_at_once))
        out = tmp_path / str(refused_at_once)
        report = run_shard([source], out, model, settings, True, num_workers=1)
        reports.append(report.to_json() | {"out": ""})
        files = {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".finished"}
        lines = [json.loads(line) for line in files.pop("rejected.jsonl").splitlines()]
        contents.append((files, [line["line"] for line in lines]))
        if not refused_at_once and settings.unroll == "none":
            assert len(encoded) == 31, "each row but the one that is none, once"
    assert reports[0] == reports[1]
    assert reports[0]["num_rejected"] == len(REPEATED) + 1
    assert contents[0] == contents[1]


def test_a_run_that_was_killed_while_it_left_rows_out_goes_on(
    small_pieces: None, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", make_rows(refused_at_once=False))

    def files(out: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.iterdir()}

    run_shard([source], tmp_path / "whole", model, ShardConfig(), True, num_workers=1)
    expected = files(tmp_path / "whole")
    out, close = tmp_path / "out", pieces.ShardWriter.close

    for num_copies in (0, 1, 0):  # before it is killed
        left = num_copies

        def killed(writer: pieces.ShardWriter, *arguments: Any) -> None:
            nonlocal left
            if writer._job.again and left == 0:
                raise KeyboardInterrupt
            left -= writer._job.again
            close(writer, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(pieces.ShardWriter, "close", killed)
            with pytest.raises(KeyboardInterrupt):
                run_shard([source], out, model, ShardConfig(), True, num_workers=1)
    monkeypatch.setattr(sharding, "run_job", None)  # nothing is encoded again
    run_shard([source], out, model, ShardConfig(), True, num_workers=1)
    assert files(out) == expected


def test_two_ids_of_one_hash_are_two_ids(
    small_pieces: None, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes_module, "hash_ids", lambda ids: np.zeros(len(ids), np.uint64))
    rows = make_rows(refused_at_once=False)
    report = run_shard(
        [write_rows(tmp_path / "rows.jsonl", rows)], tmp_path / "out", model, ShardConfig(), True, num_workers=1
    )
    assert (report.num_written, report.num_rejected) == (26, 6)
    monkeypatch.setattr(repeated, "OLD_IDS_AT_ONCE", 5)
    more = write_rows(tmp_path / "more.jsonl", [row(40), row(4), row(41), row(40)])
    report = run_shard([more], tmp_path / "out", model, ShardConfig(), True, append=True, num_workers=1)
    assert (report.num_written, report.num_rejected) == (2, 2)
