"""Sharding in pieces: the same bytes on any number of cores, killed or not, at once or appended."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemma_dist.config import ShardConfig
from gemma_dist.data.rows import read_ranges, read_rows, split_input
from gemma_dist.errors import DataError
from gemma_dist.shards import assemble
from gemma_dist.shards import folder as folder_module
from gemma_dist.shards import sharding as module
from gemma_dist.shards.folder import Part, at_work
from gemma_dist.shards.manifest import read_manifest
from gemma_dist.shards.pieces import PIECE_FORMAT
from gemma_dist.shards.reader import open_shards
from gemma_dist.shards.sharding import run_shard
from tests.support.corpus import row, write_rows

ROWS = [row(number, num_calls=1 + number % 3) for number in range(60)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """About four rows a piece, two a row group."""
    for name, size in (("PIECE_BYTES", 6000), ("ROW_GROUP_BYTES", 3000), ("SHARD_BYTES", 5000)):
        monkeypatch.setattr(module, name, size)


def shard(inputs: list[Path], out: Path, model: str, skip_invalid: bool = False, **options: Any) -> Any:
    return run_shard(inputs, out, model, ShardConfig(), skip_invalid, **{"num_workers": 1, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def train_files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.startswith("train-")}


def ids(folder: Path) -> list[str]:
    shards = open_shards(folder)
    assert [shards.read(index).id for index in range(len(shards))] == [shards.id(index) for index in range(len(shards))]
    return [shards.id(index) for index in range(len(shards))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: str) -> tuple[Path, Path]:
    """The rows, and the shards that an uninterrupted run on one core makes of them."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_rows(folder / "rows.jsonl", ROWS)
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("PIECE_BYTES", 6000), ("ROW_GROUP_BYTES", 3000), ("SHARD_BYTES", 5000)):
            patch.setattr(module, name, size)
        shard([source], folder / "shards", model)
    return source, folder / "shards"


def test_the_bytes_do_not_depend_on_the_number_of_processes(
    whole: tuple[Path, Path], model: str, tmp_path: Path
) -> None:
    source, folder = whole
    assert len(list(folder.glob("train-*.parquet"))) > 10
    report = shard([source], tmp_path / "shards", model, num_workers=2)
    assert contents(tmp_path / "shards") == contents(folder)
    assert ids(folder) == [row["id"] for row in ROWS]
    assert (report.num_read, report.num_written) == (60, 60)
    assert report.num_shards == len(list(folder.glob("train-*.parquet")))


KILLED = """
import os, signal, sys
from pathlib import Path
from gemma_dist.config import ShardConfig
from gemma_dist.shards import sharding
if record := os.environ.get("KILLED_AT"):  # in the first call to the system after that one
    sys.addaudithook(lambda *_: os.path.exists(record) and signal.raise_signal(signal.SIGKILL))
sharding.PIECE_BYTES, sharding.ROW_GROUP_BYTES, sharding.SHARD_BYTES = 6000, 3000, 5000
options = {"append": len(sys.argv) > 4, "num_workers": 1}
sharding.run_shard([Path(sys.argv[1])], Path(sys.argv[2]), sys.argv[3], ShardConfig(), False, **options)
"""


def kill_at(record: Path, *words: object) -> None:
    """A run that ends by kill -9 when `record` is there."""
    environment = os.environ | {"KILLED_AT": str(record)}
    run = subprocess.run([sys.executable, "-c", KILLED, *map(str, words)], capture_output=True, env=environment)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()[-4000:]


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(whole: tuple[Path, Path], model: str, tmp_path: Path) -> None:
    source, folder = whole
    out = tmp_path / "shards"
    number = random.Random().randrange(1, 8)
    kill_at(out / f".piece-{number:05d}.arrow", source, out, model)
    assert not list(out.glob("train-*.parquet")), "nothing shows up before all of it is there"
    with pytest.raises(DataError, match="interrupted"):
        open_shards(out)
    finished = (out / ".piece-00000-000.parquet").stat().st_ino
    shard([source], out, model)
    assert contents(out) == contents(folder)
    assert (out / "train-00000.parquet").stat().st_ino == finished, "what was done is not done again"


# ---- in parts --------------------------------------------------------------------------------------------------------


def test_parts_that_are_done_apart_and_joined_give_the_same_bytes(
    whole: tuple[Path, Path], model: str, tmp_path: Path
) -> None:
    source, folder = whole
    out = tmp_path / "shards"
    started = KILLED.replace('"append": len(sys.argv) > 4', '"part": Part(int(sys.argv[4]), 3)')
    script = "from gemma_dist.shards.folder import Part\n" + started
    words = [sys.executable, "-c", script, str(source), str(out), model]
    others = [subprocess.Popen([*words, number], stderr=subprocess.PIPE, text=True) for number in "13"]
    report = shard([source], out, model, part=Part(2, 3))
    assert 0 < report.num_written < 60
    for other in others:
        _, errors = other.communicate()
        assert other.returncode == 0, errors
    assert not (out / "manifest.arrow").exists()
    assert len(list(out.glob(".piece-?????.arrow"))) == 8
    pieces = {path: path.stat().st_ino for path in out.glob(".piece-*-000.parquet")}
    assert shard([source], out, model).num_written == 60
    assert contents(out) == contents(folder)
    assert {path.stat().st_ino for path in out.glob("train-*.parquet")} >= set(pieces.values()), "nothing is done twice"


def test_a_folder_is_not_worked_on_twice_at_a_time(model: str, tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "a.jsonl", ROWS[:8]), tmp_path / "shards"
    with at_work(out, Part(1, 2)):
        with pytest.raises(DataError, match="another `gemma-dist shard` is at work; wait"):
            shard([source], out, model)
        with pytest.raises(DataError, match="part 1 of 2 is at work already"):
            shard([source], out, model, part=Part(1, 2))
        shard([source], out, model, part=Part(2, 2))
    with at_work(out, None), pytest.raises(DataError, match="another `gemma-dist shard` is at work"):
        shard([source], out, model, part=Part(2, 2))
    (out / ".part-1-of-2").touch()  # as a killed one leaves it
    assert shard([source], out, model).num_written == 8
    assert list(out.glob(".*")) == [out / ".finished"]


# ---- killed with everything in place ---------------------------------------------------------------------------------


def kill_while_clearing(num_removed: int, *arguments: Any, **options: Any) -> None:
    """A run that ends once its manifest is there, and so many of its work files are gone."""

    def killed(out: Path) -> None:
        for path in folder_module.work_files(out)[:num_removed]:
            path.unlink()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "tidy", killed)
        with pytest.raises(KeyboardInterrupt):
            shard(*arguments, **options)


@pytest.mark.parametrize("num_removed", [0, 1])
def test_a_run_that_was_killed_with_its_manifest_in_place_is_done(
    num_removed: int, whole: tuple[Path, Path], model: str, tmp_path: Path
) -> None:
    source, folder = whole
    out = tmp_path / "shards"
    kill_while_clearing(num_removed, [source], out, model)
    assert ids(out) == [row["id"] for row in ROWS], "it can be read as it is"
    report = shard([source], out, model)
    assert (report.num_written, report.num_shards) == (60, len(list(out.glob("train-*.parquet"))))
    assert contents(out) == contents(folder)
    more = write_rows(tmp_path / "more.jsonl", [row(number) for number in range(60, 66)])
    kill_while_clearing(num_removed, [more], out, model, append=True)
    assert shard([more], out, model, append=True).num_written == 6
    assert ids(out) == [f"row-{number}" for number in range(66)]
    assert list(out.glob(".*")) == [out / ".finished"]


def test_the_same_command_again_says_that_all_is_there(model: str, tmp_path: Path) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "shards"
    write_rows(source, ROWS[:8])
    first = shard([source], out, model)
    before = contents(out)
    assert shard([source], out, model) == first
    more = write_rows(tmp_path / "b.jsonl", ROWS[8:12])
    second = shard([more], out, model, append=True)
    after = contents(out)
    assert shard([more], out, model, append=True) == second
    assert contents(out) == after != before
    kept = next(iter(sorted(out.glob("*.parquet"))))
    whole = kept.read_bytes()
    for left in (whole[:-1], None):
        kept.write_bytes(left) if left else kept.unlink()
        with pytest.raises(DataError, match="was written whole, and is no longer"):
            shard([more], out, model, append=True)
    kept.write_bytes(whole)
    source.write_text(source.read_text() + json.dumps(ROWS[12]) + "\n")
    with pytest.raises(DataError, match="finished shards already"):
        shard([source], out, model)


def test_what_an_earlier_version_finished_is_finished(model: str, tmp_path: Path) -> None:
    """Its plan says nothing of the format of pieces, of which none is left."""
    source, out = write_rows(tmp_path / "a.jsonl", ROWS[:8]), tmp_path / "shards"
    first = shard([source], out, model)
    plan = json.loads((out / ".finished").read_text())
    assert plan.pop("pieces") == PIECE_FORMAT
    (out / ".finished").write_text(json.dumps(plan))
    assert shard([source], out, model) == first


def test_a_run_that_was_killed_in_its_first_write_is_in_nobodys_way(model: str, tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "a.jsonl", ROWS[:2]), tmp_path / "shards"
    out.mkdir()
    (out / "..unfinished.77.tmp").write_text("{")
    assert shard([source], out, model).num_written == 2
    assert list(out.glob(".*")) == [out / ".finished"]


def test_a_folder_that_was_emptied_by_rm_is_empty(model: str, tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "a.jsonl", ROWS[:2]), tmp_path / "shards"
    shard([source], out, model)
    for path in out.glob("[!.]*"):
        path.unlink()
    assert shard([source], out, model).num_written == 2
    assert ids(out) == ["row-0", "row-1"]


def test_what_another_run_left_beside_its_manifest_is_cleared_away(model: str, tmp_path: Path) -> None:
    first, second = write_rows(tmp_path / "a.jsonl", ROWS[:8]), write_rows(tmp_path / "b.jsonl", ROWS[8:12])
    out = tmp_path / "shards"
    kill_while_clearing(1, [first], out, model)
    with pytest.raises(DataError, match="finished shards already"):
        shard([second], out, model)
    assert list(out.glob(".*")) == [out / ".finished"]
    kill_while_clearing(1, [second], out, model, append=True)
    third = write_rows(tmp_path / "c.jsonl", ROWS[12:16])
    assert shard([third], out, model, append=True).num_written == 4
    assert ids(out) == [row["id"] for row in ROWS[:16]]
    assert list(out.glob(".*")) == [out / ".finished"]


def test_workers_end_with_a_killed_run(whole: tuple[Path, Path], model: str, tmp_path: Path) -> None:
    source, folder = whole
    out = tmp_path / "shards"
    script = KILLED.replace('"num_workers": 1', '"num_workers": 2').replace("sharding.run", "if main: sharding.run")
    (tmp_path / "run.py").write_text('main = __name__ == "__main__"\n' + script)
    words = [tmp_path / "run.py", source, out, model]
    run = subprocess.Popen([sys.executable, *map(str, words)], stderr=subprocess.DEVNULL)
    while not (out / ".piece-00000.arrow").exists():
        assert run.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    workers = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    assert len(workers) >= 2
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/exe").exists() for pid in workers):
        assert time.monotonic() < until, "a worker outlives its run"
        time.sleep(0.05)
    shard([source], out, model)
    assert contents(out) == contents(folder)


def test_files_of_another_plan_are_never_taken_for_those_of_this_one(
    whole: tuple[Path, Path], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "shards"
    kill_at(out / ".piece-00002.arrow", whole[0], out, model)
    other = write_rows(tmp_path / "rows.jsonl", ROWS[30:])

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "clear_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            shard([other], out, model)
    shard([other], out, model)
    assert ids(out) == [row["id"] for row in ROWS[30:]]


def test_inputs_without_rows_and_inputs_named_twice_are_refused(model: str, tmp_path: Path) -> None:
    pq.ParquetWriter(tmp_path / "empty.parquet", pa.schema({"id": pa.string()})).close()
    with pytest.raises(DataError, match=r"empty\.parquet: no row in it; check the path"):
        shard([tmp_path / "empty.parquet"], tmp_path / "shards", model)
    source = write_rows(tmp_path / "rows.jsonl", ROWS[:2])
    with pytest.raises(DataError, match="named twice"):
        shard([source, source], tmp_path / "shards", model, skip_invalid=True)


def test_what_another_run_left_is_replaced(whole: tuple[Path, Path], model: str, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    kill_at(out / ".piece-00001.arrow", whole[0], out, model)
    shard([write_rows(tmp_path / "rows.jsonl", ROWS[50:])], out, model)
    assert ids(out) == [row["id"] for row in ROWS[50:]]
    assert list(out.glob(".*")) == [out / ".finished"]


# ---- append ----------------------------------------------------------------------------------------------------------


def test_appended_rows_come_behind_the_others_which_stay(model: str, tmp_path: Path) -> None:
    first, second = write_rows(tmp_path / "a.jsonl", ROWS[:40]), write_rows(tmp_path / "b.jsonl", ROWS[40:])
    out = tmp_path / "shards"
    shard([first], out, model)
    before = contents(out)
    opened = open_shards(out)
    report = shard([second], out, model, append=True)
    after = contents(out)
    assert all(after[name] == data for name, data in before.items() if name not in ("manifest.arrow", ".finished"))
    assert ids(out) == [row["id"] for row in ROWS]
    assert (report.num_written, report.num_shards) == (20, len(after) - len(before))
    assert len(opened) == 40
    assert opened.read(39).id == "row-39", "a run that has the old corpus open keeps reading it"
    assert open_shards(out).manifest_hash != opened.manifest_hash


def test_a_killed_append_leaves_the_corpus_whole_and_goes_on(model: str, tmp_path: Path) -> None:
    first, second = write_rows(tmp_path / "a.jsonl", ROWS[:20]), write_rows(tmp_path / "b.jsonl", ROWS[20:])
    out = tmp_path / "shards"
    shard([first], out, model)
    kill_at(out / ".piece-00003.arrow", second, out, model, "append")
    assert ids(out) == [row["id"] for row in ROWS[:20]]
    assert pa.concat_tables(map(pq.read_table, sorted(out.glob("train-*.parquet")))).num_rows == 20, (
        "nor do others see more"
    )
    shard([second], out, model, append=True)
    assert ids(out) == [row["id"] for row in ROWS]
    assert list(out.glob(".*")) == [out / ".finished"]


def test_an_append_that_does_not_go_is_refused_and_changes_nothing(model: str, tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "a.jsonl", ROWS[:8]), tmp_path / "shards"
    with pytest.raises(DataError, match="no finished shards to append to"):
        shard([source], out, model, append=True)
    shard([source], out, model)
    before = contents(out)
    more = write_rows(tmp_path / "b.jsonl", [*ROWS[8:12], ROWS[3]])
    with pytest.raises(DataError, match=r"b\.jsonl:5: the id 'row-3' belongs to .*shards already"):
        shard([more], out, model, append=True)
    refused = contents(out)
    assert json.loads(refused.pop("append_rejected.jsonl"))["line"] == 5
    assert refused == before
    with pytest.raises(DataError, match="max_length was None and is 9"):
        run_shard([more], out, model, ShardConfig(max_length=9), False, append=True)
    with pytest.raises(DataError, match="another tokenizer"):
        run_shard([more], out, model, ShardConfig(chat_template="gemma4_v2"), False, append=True)
    report = shard([more], out, model, skip_invalid=True, append=True)
    assert (report.num_written, report.num_rejected) == (4, 1)
    assert ids(out) == [row["id"] for row in ROWS[:12]]
    assert len((out / "rejected.jsonl").read_text().splitlines()) == 1
    shard([write_rows(tmp_path / "c.jsonl", [ROWS[20], ROWS[0]])], out, model, skip_invalid=True, append=True)
    assert len((out / "rejected.jsonl").read_text().splitlines()) == 2


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_shards_that_record_an_old_word_can_be_appended_to(model: str, tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "a.jsonl", ROWS[:2]), tmp_path / "shards"
    old = ShardConfig.model_construct(control_tokens="neutralise")  # type: ignore[arg-type]
    run_shard([source], out, model, old, False, num_workers=1)
    manifest = read_manifest(out / "manifest.arrow", "")
    assert manifest.header["settings"]["control_tokens"] == "neutralise"
    more = write_rows(tmp_path / "b.jsonl", ROWS[2:3])
    run_shard([more], out, model, ShardConfig(control_tokens="escape"), False, append=True, num_workers=1)
    assert ids(out) == [row["id"] for row in ROWS[:3]]


# ---- files of others -------------------------------------------------------------------------------------------------

FOREIGN = [
    *("README.md", "bad.txt", "manifest-before.arrow", "train-notes.parquet", "notes/deep.txt"),
    *(".gitattributes", ".my-piece-00000.txt", ".piece-00000.txt", ".rejected.jsonl", ".notes/deep.txt"),
]


def put_foreign(folder: Path) -> None:
    for name in FOREIGN:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)


def check_foreign(folder: Path) -> None:
    for name in FOREIGN:
        assert (folder / name).read_text() == name
    hidden = {path.name for path in folder.glob(".*")}
    assert hidden <= {".finished", *(Path(name).parts[0] for name in FOREIGN)}, "of ours, nothing is left behind"


def kill_before_the_manifest(*arguments: Any, **options: Any) -> None:
    """A run that ends once its shards have their names."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            shard(*arguments, **options)


def test_an_append_removes_no_file_of_others(model: str, tmp_path: Path) -> None:
    first, out = write_rows(tmp_path / "a.jsonl", ROWS[:8]), tmp_path / "shards"
    shard([first], out, model)
    put_foreign(out)
    inside = write_rows(out / "b.jsonl", ROWS[8:12])
    shard([inside], out, model, append=True)
    assert inside.exists(), "nor its own input"
    check_foreign(out)
    with pytest.raises(DataError, match="belongs to"):
        shard([first], out, model, append=True)
    check_foreign(out)
    third, fourth = write_rows(tmp_path / "c.jsonl", ROWS[12:16]), write_rows(tmp_path / "d.jsonl", ROWS[16:20])
    kill_before_the_manifest([third], out, model, append=True)
    shard([fourth], out, model, append=True)
    check_foreign(out)
    assert ids(out) == [row["id"] for row in ROWS[:12] + ROWS[16:20]]
    named = {shard["name"] for shard in read_manifest(out / "manifest.arrow", "").header["shards"]}
    assert {path.name for path in out.glob("train-0*.parquet")} == named, "what the killed run showed is gone"


@pytest.mark.parametrize("then", ["the same rows", "other rows", "refused rows"])
def test_what_comes_after_a_killed_run_removes_no_file_of_others(then: str, model: str, tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "a.jsonl", ROWS[:8]), tmp_path / "shards"
    kill_before_the_manifest([source], out, model)
    put_foreign(out)
    if then == "refused rows":
        with pytest.raises(DataError, match="1 of 2 rows were refused"):
            shard([write_rows(tmp_path / "b.jsonl", [{"messages": []}, ROWS[0]])], out, model)
        assert not list(out.glob("train-0*"))
    else:
        rows = ROWS[:8] if then == "the same rows" else ROWS[20:24]
        shard([source if then == "the same rows" else write_rows(tmp_path / "b.jsonl", rows)], out, model)
        assert ids(out) == [row["id"] for row in rows]
    check_foreign(out)


def test_shards_that_the_manifest_does_not_name_are_not_written_over(model: str, tmp_path: Path) -> None:
    """As when the manifest from before an append is put back: those of the append may be named by a copy."""
    out = tmp_path / "shards"
    shard([write_rows(tmp_path / "a.jsonl", ROWS[:4])], out, model)
    before = (out / "manifest.arrow").read_bytes()
    shard([write_rows(tmp_path / "b.jsonl", ROWS[4:8])], out, model, append=True)
    later = contents(out)
    (out / "manifest.arrow").write_bytes(before)
    with pytest.raises(DataError, match=r"holds 'train-\d+\.parquet', which no manifest there names"):
        shard([write_rows(tmp_path / "c.jsonl", ROWS[8:12])], out, model, append=True)
    assert contents(out) == later | {"manifest.arrow": before}
    (out / "manifest.arrow").write_bytes(later["manifest.arrow"])
    assert ids(out) == [row["id"] for row in ROWS[:8]]


# ---- refused rows over all pieces ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 2])
def test_refused_rows_are_told_as_they_come_and_stop_a_run_that_has_too_many(
    num_workers: int, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module.log, "propagate", True)
    bad = [{"id": f"bad-{number}", "messages": []} for number in range(4)]
    source = write_rows(tmp_path / "rows.jsonl", [bad[0], *ROWS[:6], bad[1], *ROWS[6:12], *bad[2:], ROWS[0]])
    out = tmp_path / "shards"
    for skip_invalid in [False, True][num_workers - 1 :]:
        with pytest.raises(DataError, match=r"refused rows: \d so far, more than --max-rejected [03]"):
            shard([source], out, model, skip_invalid, num_workers=num_workers, max_rejected=3 * skip_invalid)
    assert not (out / "manifest.arrow").exists()
    told = [message for message in caplog.messages if message.startswith("refused: ")]
    assert f"{source}:1: " in told[0]
    caplog.clear()
    with pytest.raises(DataError, match="refused rows: 5 so far, more than --max-rejected 4"):  # the repeated id
        shard([source], out, model, True, max_rejected=4)
    assert "'row-0' belongs to" in caplog.messages[-1]
    report = shard([source], out, model, True, max_rejected=5)
    assert (report.num_written, report.num_rejected) == (12, 5)


def test_repeated_ids_are_found_over_all_pieces(model: str, tmp_path: Path) -> None:
    rows = [*ROWS[:20], ROWS[2], *ROWS[20:30], {"id": "bad", "messages": []}, ROWS[2], ROWS[29]]
    source, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "shards"
    with pytest.raises(DataError, match="4 of 34 rows"):
        shard([source], out, model)
    report = shard([source], out, model, skip_invalid=True)
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [line["line"] for line in rejected] == [21, 32, 33, 34]
    for line in (rejected[0], rejected[2]):
        assert f"'row-2' belongs to {source}:3 already" in line["error"]
    assert (report.num_read, report.num_written, report.num_rejected) == (34, 30, 4)
    assert ids(out) == [row["id"] for row in ROWS[:30]]


# ---- pieces of each kind of input ------------------------------------------------------------------------------------


def as_gzip(folder: Path) -> Path:
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines()))
    return folder / "rows.jsonl.gz"


def as_zstd(folder: Path) -> Path:
    codec, half = pa.Codec("zstd"), len(lines()) // 2
    frames = [codec.compress(part).to_pybytes() for part in (lines()[:half], lines()[half:])]
    (folder / "rows.jsonl.zst").write_bytes(b"".join(frames))
    return folder / "rows.jsonl.zst"


def as_parquet(folder: Path) -> Path:
    texts = [{**row, "messages": json.dumps(row["messages"]), "tools": json.dumps(row["tools"])} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(texts), folder / "rows.parquet", row_group_size=7)
    return folder / "rows.parquet"


def as_dataset(folder: Path) -> Path:
    from datasets import Dataset

    texts = [{**row, "messages": json.dumps(row["messages"]), "tools": json.dumps(row["tools"])} for row in ROWS]
    Dataset.from_list(texts).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def lines() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.mark.parametrize("write", [as_gzip, as_zstd, as_parquet, as_dataset])
def test_every_kind_of_input_gives_the_same_samples(
    write: Callable[[Path], Path], whole: tuple[Path, Path], model: str, tmp_path: Path
) -> None:
    shard([write(tmp_path)], tmp_path / "shards", model, num_workers=2)
    if write in (as_gzip, as_zstd):  # cut where the lines themselves would be
        assert train_files(tmp_path / "shards") == train_files(whole[1])
    found, expected = open_shards(tmp_path / "shards"), open_shards(whole[1])
    assert [found.read(index) for index in range(60)] == [expected.read(index) for index in range(60)]


@pytest.mark.parametrize("write", [as_gzip, as_zstd, as_parquet])
def test_an_input_that_was_cut_short_is_refused(write: Callable[[Path], Path], model: str, tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=f"{path}: cannot be read to its end"):
        shard([path], tmp_path / "shards", model)


@pytest.mark.parametrize("write", [as_gzip, as_parquet])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_input_that_cannot_be_read_does_not_end_the_others(
    write: Callable[[Path], Path], num_workers: int, model: str, tmp_path: Path
) -> None:
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    others = [write_rows(tmp_path / f"{name}.jsonl", [row(number, id=name)]) for number, name in enumerate("ab")]
    out = tmp_path / "shards"
    report = shard([others[0], path, others[1]], out, model, skip_invalid=True, num_workers=num_workers)
    (refused,) = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    assert refused["error"].startswith(f"{path}: cannot be read to its end")
    assert report.num_rejected == 1
    found = ids(out)
    assert (found[0], found[-1]) == ("a", "b")
    assert len(found) == refused["line"] + 1, "what stands before the damage is there"


@pytest.mark.parametrize("range_bytes", [1, 300, 5000, 10**6])
@pytest.mark.parametrize("end", ["\n", "", "\n\n\n"])
def test_the_ranges_of_a_file_are_the_file(tmp_path: Path, range_bytes: int, end: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(json.dumps({"n": n, "é": "ü" * n}) for n in range(90)).encode())
    path.write_bytes(path.read_bytes() + end.encode())
    ranges = list(split_input(path, range_bytes))
    assert len(ranges) > 1 or range_bytes > 5000
    assert sum(size for _, size in ranges) == path.stat().st_size
    assert list(read_ranges(input_range for input_range, _ in ranges)) == list(read_rows([path]))
    assert [where.line for where, _ in read_rows([path])] == list(range(1, 180, 2))


def test_the_ranges_of_a_parquet_file_are_the_file(tmp_path: Path) -> None:
    path = as_parquet(tmp_path)
    ranges = [input_range for input_range, _ in split_input(path, 1)]
    assert len(ranges) == 9
    assert list(read_ranges(ranges)) == list(read_rows([path]))
