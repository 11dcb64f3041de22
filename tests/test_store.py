"""Shards that go to a store: an S3 one, in this process, whose every request is seen."""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from gemma_dist.__main__ import main
from gemma_dist.config import ShardConfig
from gemma_dist.errors import DataError
from gemma_dist.shards import fetch, sharding, store
from gemma_dist.shards.folder import Part
from gemma_dist.shards.ranged_s3 import RangedS3
from gemma_dist.shards.reader import open_shards
from gemma_dist.shards.sharding import run_shard
from tests.support.corpus import row, write_rows

URL = "s3://bucket/corpus"
ROWS = [row(number, num_calls=1 + number % 3) for number in range(24)]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket, as boto3 knows it; caches are in `tmp_path`, pieces are small."""

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    for name, value in (("AWS_DEFAULT_REGION", "us-east-1"), ("AWS_ENDPOINT_URL", endpoint)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(fetch, "FIRST_WAIT_S", 0.001)
    for name, size in (("PIECE_BYTES", 6000), ("ROW_GROUP_BYTES", 3000), ("SHARD_BYTES", 5000)):
        monkeypatch.setattr(sharding, name, size)
    RangedS3.clear_instance_cache()
    found = boto3.resource("s3", endpoint_url=endpoint).Bucket("bucket")
    found.create()
    found.objects.all().delete()  # moto's servers of one process share what they hold
    monkeypatch.chdir(tmp_path)
    yield found
    found.objects.all().delete()
    found.delete()
    RangedS3.clear_instance_cache()


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The names of what was written to the bucket since the last time, in order."""
    caplog.set_level(logging.INFO, "werkzeug")

    def names() -> list[str]:
        said = [record.getMessage() for record in caplog.records if record.name == "werkzeug"]
        caplog.clear()
        return [found[1] for line in said if (found := re.search(r"PUT /bucket/corpus/(\S+)", line))]

    return names


def contents(bucket: Any) -> dict[str, bytes]:
    return {found.key.removeprefix("corpus/"): found.get()["Body"].read() for found in bucket.objects.all()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shard(rows: Path, out: Path | str, model: str, **options: Any) -> Any:
    return run_shard([rows], out, model, ShardConfig(), options.pop("skip_invalid", False), num_workers=1, **options)


def test_a_store_gets_the_files_of_a_folder_and_the_manifest_last(
    bucket: Any, puts: Callable[[], list[str]], model: str, tmp_path: Path
) -> None:
    first, more = write_rows(tmp_path / "a.jsonl", ROWS[:16]), write_rows(tmp_path / "b.jsonl", [*ROWS[16:], ROWS[0]])
    local, report = shard(first, tmp_path / "local", model), shard(first, URL, model)
    assert report.to_json() | {"out": ""} == local.to_json() | {"out": ""}
    assert f"shards: {URL}\n" in report.summary()
    assert contents(bucket) == files(tmp_path / "local")
    written = puts()
    assert written[0] == ".writable"
    assert written[-1] == "manifest.arrow"
    assert len(written) == len(set(written)) == len(contents(bucket)) + 1
    assert not list((tmp_path / "caches").rglob("*.*")), "nothing is left on the disk"
    assert shard(first, URL, model) == report
    assert puts() == [".writable"], "the same command again says that all is there"
    with pytest.raises(DataError, match=f"^{URL} holds finished shards already; .*--append$"):
        shard(more, URL, model)

    opened = open_shards(URL)
    for out in (URL, tmp_path / "local"):
        with pytest.raises(DataError, match=rf"b\.jsonl:9: the id 'row-0' belongs to {out} already") as caught:
            shard(more, out, model, append=True)
        assert f"All of them are in {out}/append_rejected.jsonl" in str(caught.value)
        report = shard(more, out, model, append=True, skip_invalid=True)
        assert (report.num_written, report.num_rejected) == (8, 1)
    expected = files(tmp_path / "local")
    expected["rejected.jsonl"] = expected["rejected.jsonl"].replace(str(tmp_path / "local").encode(), URL.encode())
    assert contents(bucket) == expected
    assert puts()[-1] == "manifest.arrow"
    assert [opened.read(index).id for index in range(16)] == [row["id"] for row in ROWS[:16]], "readers go on"
    assert len(open_shards(URL)) == 24
    assert shard(more, URL, model, append=True, skip_invalid=True) == replace(report, out=URL)
    assert not list(tmp_path.glob("s3:*"))


def putting_until(last: str) -> Callable[[store.Store, str], None]:
    """A way to send files that ends at one of them."""
    put = store.Store._put

    def put_or_end(self: store.Store, name: str) -> None:
        if name == last:
            raise KeyboardInterrupt
        put(self, name)

    return put_or_end


def test_a_killed_upload_goes_on_where_it_was(
    bucket: Any, puts: Callable[[], list[str]], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "a.jsonl", ROWS)
    shard(source, tmp_path / "local", model)
    for last in ("train-00003.parquet", "train-00005.parquet", ".finished", "manifest.arrow"):
        with monkeypatch.context() as patch:
            patch.setattr(store.Store, "_put", putting_until(last))
            with pytest.raises(KeyboardInterrupt):
                shard(source, URL, model)
        assert "manifest.arrow" not in contents(bucket)
    bucket.Object("corpus/train-00002.parquet").put(Body=b"torn")
    shard(source, URL, model)
    assert contents(bucket) == files(tmp_path / "local")
    shards = [name for name in puts() if name.startswith("train-")]
    assert shards.count("train-00002.parquet") == 3, "sent, torn, sent again"
    assert all(shards.count(name) == 1 for name in set(shards) - {"train-00002.parquet"})


def test_another_plan_takes_over_what_a_killed_upload_left(
    bucket: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = write_rows(tmp_path / "a.jsonl", ROWS[:8]), write_rows(tmp_path / "b.jsonl", ROWS[8:])
    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "_require_unchanged", killed)
        with pytest.raises(KeyboardInterrupt):
            shard(first, URL, model)
    assert shard(second, URL, model).num_written == 16
    assert [open_shards(URL).id(index) for index in range(16)] == [row["id"] for row in ROWS[8:]]


def killed(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("removed", [".finished", "manifest.arrow"])
def test_a_kill_while_the_folder_is_removed_leaves_nothing_to_do(
    removed: str, bucket: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "a.jsonl", ROWS[:8])
    shard(source, URL, model)
    there = contents(bucket)

    def remove_one(folder: Path, **_: object) -> None:
        (folder / "shards" / removed).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "rmtree", remove_one)
        with pytest.raises(KeyboardInterrupt):
            shard(source, URL, model)
    assert shard(source, URL, model).num_written == 8
    assert contents(bucket) == there


def test_what_another_call_finished_meanwhile_is_not_written_over(
    bucket: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = write_rows(tmp_path / "a.jsonl", ROWS[:8]), write_rows(tmp_path / "b.jsonl", ROWS[8:])
    publish = store.Store.publish

    def late(self: store.Store) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(store.Store, "publish", publish)
            shard(second, URL, model, work_dir=tmp_path / "other")
        publish(self)

    monkeypatch.setattr(store.Store, "publish", late)
    with pytest.raises(DataError, match=f"^{URL}: another call has written its manifest meanwhile"):
        shard(first, URL, model)
    monkeypatch.setattr(store.Store, "publish", publish)
    assert len(open_shards(URL)) == 16
    with pytest.raises(DataError, match="holds finished shards already"):
        shard(first, URL, model)
    assert shard(first, URL, model, append=True).num_written == 8
    assert len(open_shards(URL)) == 24


def test_parts_meet_in_a_folder_that_is_named(bucket: Any, model: str, tmp_path: Path) -> None:
    source, work = write_rows(tmp_path / "a.jsonl", ROWS), tmp_path / "work"
    shard(source, tmp_path / "local", model)
    with pytest.raises(DataError, match="name one that all of them share by --work-dir"):
        shard(source, URL, model, part=Part(1, 2))
    for number in (1, 2):
        shard(source, URL, model, part=Part(number, 2), work_dir=work)
    assert not contents(bucket)
    shard(source, URL, model, work_dir=work)
    assert contents(bucket) == files(tmp_path / "local")
    assert not list(work.rglob("*.*"))


def test_refused_rows_are_listed_in_the_store_and_nothing_else_is_written(
    bucket: Any, model: str, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "a.jsonl", [ROWS[0], {"messages": []}])
    with pytest.raises(DataError, match=f"All of them are in {URL}/rejected.jsonl"):
        shard(source, URL, model)
    assert set(contents(bucket)) == {"rejected.jsonl"}
    assert shard(source, URL, model, skip_invalid=True).num_written == 1


def test_shards_that_no_manifest_names_are_left_alone(bucket: Any, model: str, tmp_path: Path) -> None:
    bucket.Object("corpus/train-00000.parquet").put(Body=b"of others")
    with pytest.raises(DataError, match=rf"{URL} holds 'train-00000\.parquet', which no manifest there names"):
        shard(write_rows(tmp_path / "a.jsonl", ROWS[:2]), URL, model)
    assert contents(bucket) == {"train-00000.parquet": b"of others"}


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("s3://nowhere/corpus", "there is no such bucket .*; check its name"),
        ("nonsense://x/y", "nonsense"),
        ("s3:/bucket/corpus", "one slash too few for a URL; write it as in s3://bucket/train"),
    ],
)
def test_a_store_that_takes_nothing_is_told_before_a_row_is_read(
    out: str, words: str, bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rows(tmp_path / "a.jsonl", ROWS[:2])
    assert main(["shard", str(source), "--out", out, "--model", "no model is read"]) == 2
    said = capsys.readouterr().err
    assert re.search(f"error: .*{words}", said)
    assert "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl"}, "nor is a folder made"


def test_a_work_dir_is_for_stores(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", ROWS[:2])
    with pytest.raises(DataError, match="leave it out"):
        shard(source, tmp_path / "out", "no model is read", work_dir=tmp_path / "work")
