"""Fetching: one request a row group, patience with what may pass, and never a byte that was not written."""

import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from corpus import row, shard_rows
from store import Server, serve

from gemma_dist.data import fetch as module
from gemma_dist.data import sharding
from gemma_dist.data.fetch import Fetcher, FetchError
from gemma_dist.data.shards import open_shards
from gemma_dist.errors import ConfigError, DataError

DATA = bytes(range(256)) * 40
PIECE = slice(1000, 3000)
CRC = zlib.crc32(DATA[PIECE])
WHERE = (1000, 2000, CRC)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.001)
    with serve({"data": DATA}) as server:
        yield server


def test_a_local_file_is_read_and_checked(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(DATA)
    path = str(tmp_path / "data")
    fetcher = Fetcher(None, 0)
    assert fetcher.read(path, *WHERE) == DATA[PIECE]
    assert fetcher.size(path) == len(DATA)
    assert fetcher.download(path) == Path(path)
    with pytest.raises(FetchError, match="checksum"):
        fetcher.read(path, 1001, 2000, CRC)
    with pytest.raises(FetchError, match="ends early: 240 bytes"):
        fetcher.read(path, 10_000, 2000, CRC)
    with pytest.raises(FileNotFoundError):
        fetcher.read(path + "x", *WHERE)


def test_one_ranged_request_a_piece(server: Server) -> None:
    fetcher = Fetcher(None, 0)
    assert fetcher.read(f"{server.url}/data", *WHERE) == DATA[PIECE]
    assert server.requests == [("data", "bytes=1000-2999")]
    assert fetcher.size(f"{server.url}/data") == len(DATA)


def test_a_server_without_ranges_is_named_as_such(server: Server) -> None:
    server.ranges = False
    with pytest.raises(FetchError, match="10,240"):
        Fetcher(None, 0).read(f"{server.url}/data", *WHERE)


@pytest.mark.parametrize("trouble", [["503", "503"], ["short"], ["flip", "429"]])
def test_what_may_pass_is_tried_again(server: Server, trouble: list[str]) -> None:
    server.trouble = list(trouble)
    assert Fetcher(None, 0).read(f"{server.url}/data", *WHERE) == DATA[PIECE]
    assert len(server.requests) == len(trouble) + 1


def test_what_does_not_pass_is_an_error(server: Server) -> None:
    url = f"{server.url}/data"
    with pytest.raises(FetchError, match=rf"{url} cannot be fetched, tried 6 times: .*checksum"):
        Fetcher(None, 0).read(url, 1000, 2000, CRC + 1)
    assert len(server.requests) == module.NUM_TRIES
    server.trouble = ["503"] * 20
    with pytest.raises(FetchError, match="tried 6 times"):
        Fetcher(None, 0).read(url, *WHERE)


def test_a_clear_no_is_not_asked_again(server: Server) -> None:
    with pytest.raises(FileNotFoundError):
        Fetcher(None, 0).read(f"{server.url}/absent", *WHERE)
    assert len(server.requests) == 1
    server.trouble = ["403"] * 5
    with pytest.raises((FetchError, PermissionError)):
        Fetcher(None, 0).read(f"{server.url}/data", *WHERE)
    assert len(server.requests) == 2


def test_an_unknown_protocol_and_a_missing_package_are_plain_errors() -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        Fetcher(None, 0).size("nonsense://x/y")


def test_memory_files_work_from_many_threads() -> None:
    import fsspec

    fsspec.filesystem("memory").pipe_file("/many", DATA)
    fetcher = Fetcher(None, 0)
    places = [(start, 100, zlib.crc32(DATA[start : start + 100])) for start in range(0, 10_000, 50)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda place: fetcher.read("memory://many", *place), places))
    assert found == [DATA[start : start + 100] for start, _, _ in places]


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_what_is_cached_is_not_asked_for_again_and_heals(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/data"
    for fetcher in (Fetcher(tmp_path, 10**6), Fetcher(tmp_path, 10**6)):
        assert fetcher.read(url, *WHERE) == DATA[PIECE]
    assert len(server.requests) == 1
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size == 2000]
    for damaged in (b"", DATA[PIECE][:-1], bytes(2000)):
        file.write_bytes(damaged)
        assert fetcher.read(url, *WHERE) == DATA[PIECE]
    assert len(server.requests) == 4


def test_the_cache_stays_within_its_size_and_drops_what_was_used_longest_ago(server: Server, tmp_path: Path) -> None:
    url, fetcher = f"{server.url}/data", Fetcher(tmp_path, 3500)

    def read(start: int) -> None:
        assert fetcher.read(url, start, 1000, zlib.crc32(DATA[start : start + 1000])) == DATA[start : start + 1000]
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 3600
        time.sleep(0.01)

    for start in (0, 1000, 2000, 0, 3000, 0):  # 1000 goes for 3000
        read(start)
    assert len(server.requests) == 4
    read(1000)
    assert len(server.requests) == 5
    assert fetcher.read(url, 0, 5000, zlib.crc32(DATA[:5000])) == DATA[:5000], "larger than the cache: not kept"


def test_what_a_killed_process_left_is_removed(server: Server, tmp_path: Path) -> None:
    Fetcher(tmp_path, 10**6)
    (tmp_path / "gemma_dist-row-groups" / "abc.77.tmp").write_bytes(DATA)
    fetcher = Fetcher(tmp_path, 10**6)
    assert not list(tmp_path.rglob("*.tmp"))
    assert fetcher.read(f"{server.url}/data", *WHERE) == DATA[PIECE]


READER = """
import sys, zlib
from pathlib import Path
from gemma_dist.data.fetch import Fetcher
data, fetcher = bytes(range(256)) * 40, Fetcher(Path(sys.argv[2]), 10**6)
print("ready", flush=True)
sys.stdin.readline()
for start in range(0, 10_000, 500):
    assert fetcher.read(sys.argv[1], start, 500, zlib.crc32(data[start : start + 500])) == data[start : start + 500]
"""


def test_the_ranks_of_a_node_fetch_each_piece_once(server: Server, tmp_path: Path) -> None:
    server.pause_s = 0.01
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, f"{server.url}/data", str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
    os.kill(readers[2].pid, signal.SIGKILL)  # one that dies holds up nobody
    for reader in readers[:2]:
        assert reader.stdin is not None
        reader.stdin.write("go\n")
        reader.stdin.flush()
    assert [reader.wait(60) for reader in readers[:2]] == [0, 0]
    assert len(server.requests) == len(set(server.requests)) == 20


# ---- shards from a store ---------------------------------------------------------------------------------------------


@pytest.fixture
def shard_folder(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sharding, "ROW_GROUP_BYTES", 2500)
    shard_rows(tmp_path, model, [row(number) for number in range(20)])
    return tmp_path / "shards"


def check(url: str, folder: Path, fetcher: Fetcher) -> None:
    local, remote = open_shards(folder), open_shards(url, fetcher=fetcher)
    assert remote.manifest_hash == local.manifest_hash
    assert [remote.read(index) for index in range(20)] == [local.read(index) for index in range(20)]


def test_shards_over_http_cost_one_request_a_row_group(server: Server, shard_folder: Path) -> None:
    server.files = {f"corpus/{path.name}": path.read_bytes() for path in shard_folder.iterdir()}
    check(f"{server.url}/corpus", shard_folder, Fetcher(None, 0))
    num_row_groups = len(open_shards(shard_folder).row_group_samples)
    assert num_row_groups > 3
    assert len(server.requests) == 1 + num_row_groups, "the manifest, and each row group once"


def test_damage_in_a_store_is_named(server: Server, shard_folder: Path) -> None:
    server.files = {f"corpus/{path.name}": path.read_bytes() for path in shard_folder.iterdir()}
    whole = server.files["corpus/train-00000.parquet"]
    server.files["corpus/train-00000.parquet"] = whole[: len(whole) // 2]
    with pytest.raises(DataError, match=r"train-00000\.parquet, row group \d: .*(early|Range|416).*row-"):
        list(map(open_shards(f"{server.url}/corpus").read, range(20)))
    del server.files["corpus/manifest.arrow"]
    with pytest.raises(DataError, match=r"holds no manifest\.arrow"):
        open_shards(f"{server.url}/corpus")


def test_shards_in_an_s3_store(shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="bucket")
        for path in shard_folder.iterdir():
            client.upload_file(str(path), "bucket", f"corpus/{path.name}")
        check("s3://bucket/corpus", shard_folder, Fetcher(tmp_path / "cache", 10**8))
        with pytest.raises(DataError, match=r"holds no manifest\.arrow"):
            open_shards("s3://bucket/elsewhere")
    finally:
        server.stop()
