"""Fetching: one request a row group, patience with what may pass, and never a byte that was not written."""

import hashlib
import logging
import multiprocessing
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gemma_dist.config import ShardConfig
from gemma_dist.errors import ConfigError, DataError
from gemma_dist.shards import fetch as module
from gemma_dist.shards import sharding
from gemma_dist.shards.fetch import Fetcher, FetchError
from gemma_dist.shards.manifest import digest
from gemma_dist.shards.ranged_s3 import RangedS3
from gemma_dist.shards.reader import open_shards
from gemma_dist.shards.sharding import run_shard
from tests.support.corpus import row, shard_rows, write_rows
from tests.support.machines import free_port
from tests.support.store import Server, serve

DATA = bytes(range(256)) * 40
PIECE = slice(1000, 3000)
DIGEST = digest(DATA[PIECE])
WHERE = (1000, 2000, DIGEST)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.001)
    with serve({"data": DATA}) as server:
        yield server


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What is logged; `start_logging` of another test may have sent it elsewhere."""
    monkeypatch.setattr(module.log, "propagate", True)
    return caplog


def kept(cache_dir: Path) -> list[Path]:
    """The row groups in a cache."""
    return [path for path in (cache_dir / "gemma_dist-row-groups").iterdir() if path.suffix != ".lock"]


def num_kept_bytes(cache_dir: Path) -> int:
    return sum(path.stat().st_size for path in kept(cache_dir))


def reads_well(fetcher: Fetcher, url: str, start: int, num_bytes: int) -> bool:
    expected = DATA[start : start + num_bytes]
    return fetcher.read(url, start, num_bytes, digest(expected)) == expected


def test_a_local_file_is_read_and_checked(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(DATA)
    path = str(tmp_path / "data")
    fetcher = Fetcher(None, 0)
    assert fetcher.read(path, *WHERE) == DATA[PIECE]
    assert fetcher.size(path) == len(DATA)
    assert fetcher.download(path) == Path(path)
    with pytest.raises(FetchError, match="checksum"):
        fetcher.read(path, 1001, 2000, DIGEST)
    with pytest.raises(FetchError, match="ends early: 240 bytes"):
        fetcher.read(path, 10_000, 2000, DIGEST)
    with pytest.raises(FileNotFoundError):
        fetcher.read(path + "x", *WHERE)


def test_one_ranged_request_a_piece(server: Server) -> None:
    fetcher = Fetcher(None, 0)
    assert fetcher.read(f"{server.url}/data", *WHERE) == DATA[PIECE]
    assert server.requests == [("data", "bytes=1000-2999")]
    assert fetcher.size(f"{server.url}/data") == len(DATA)


def test_a_whole_file_is_fetched_anew_and_leaves_the_mapped_one_alone(server: Server, tmp_path: Path) -> None:
    import pyarrow as pa

    for cache_dir in (None, tmp_path):
        server.files["data"] = DATA
        fetcher = Fetcher(cache_dir, 10**6)
        path = fetcher.download(f"{server.url}/data")
        assert cache_dir is None or cache_dir in path.parents
        with pa.memory_map(str(path)) as mapped:
            server.files["data"] = DATA[::-1]
            assert fetcher.download(f"{server.url}/data") == path
            assert mapped.read() == DATA
        assert path.read_bytes() == DATA[::-1]
    with pytest.raises(FileNotFoundError):
        fetcher.download(f"{server.url}/absent")


def test_a_server_without_ranges_is_named_as_such(server: Server) -> None:
    server.ranges = False
    with pytest.raises(FetchError, match=r"more than the 2,000 bytes came .*no ranges"):
        Fetcher(None, 0).read(f"{server.url}/data", *WHERE)


@pytest.mark.parametrize("trouble", [["503", "503"], ["short"], ["flip", "429"]])
def test_what_may_pass_is_tried_again(server: Server, trouble: list[str], log: pytest.LogCaptureFixture) -> None:
    server.trouble = list(trouble)
    assert Fetcher(None, 0).read(f"{server.url}/data", *WHERE) == DATA[PIECE]
    assert len(server.requests) == len(trouble) + 1
    assert ["trying again" in message for message in log.messages] == [True] * len(trouble)


def test_what_does_not_pass_is_an_error(server: Server) -> None:
    url = f"{server.url}/data"
    with pytest.raises(FetchError, match=rf"{url} cannot be fetched, tried 6 times: .*checksum"):
        Fetcher(None, 0).read(url, 1000, 2000, digest(b""))
    assert len(server.requests) == module.NUM_TRIES
    server.trouble = ["503"] * 20
    with pytest.raises(FetchError, match="tried 6 times"):
        Fetcher(None, 0).read(url, *WHERE)
    dead = f"http://127.0.0.1:{free_port()}/data"
    with pytest.raises(FetchError, match="tried 6 times: Cannot connect"):
        Fetcher(None, 0).read(dead, *WHERE)
    with pytest.raises(FetchError, match="tried 6 times: Cannot connect"):
        Fetcher(None, 0).size(dead)


def test_a_clear_no_is_not_asked_again(server: Server) -> None:
    with pytest.raises(FileNotFoundError):
        Fetcher(None, 0).read(f"{server.url}/absent", *WHERE)
    assert len(server.requests) == 1
    server.trouble = ["403"] * 5
    with pytest.raises((FetchError, PermissionError)):
        Fetcher(None, 0).read(f"{server.url}/data", *WHERE)
    assert len(server.requests) == 2
    server.trouble = []
    with pytest.raises(FetchError, match="404"):
        Fetcher(None, 0).size(f"{server.url}/absent")


def test_an_unknown_protocol_and_a_missing_package_are_plain_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        Fetcher(None, 0).size("nonsense://x/y")
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # what an import of it meets where it is not installed
    with pytest.raises(ConfigError, match=r"pip install 'gemma-dist\[gcs\]'"):
        Fetcher(None, 0).read("gs://bucket/data", *WHERE)


def test_a_forked_process_goes_on_with_connections_of_its_own(server: Server) -> None:
    fetcher = Fetcher(None, 0)
    assert reads_well(fetcher, f"{server.url}/data", 0, 100)

    def child() -> None:
        assert reads_well(fetcher, f"{server.url}/data", 100, 100)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert reads_well(fetcher, f"{server.url}/data", 200, 100)
    assert len(server.requests) == 3


def test_memory_files_work_from_many_threads() -> None:
    import fsspec

    fsspec.filesystem("memory").pipe_file("/many", DATA)
    fetcher = Fetcher(None, 0)
    places = [(start, 100, digest(DATA[start : start + 100])) for start in range(0, 10_000, 50)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda place: fetcher.read("memory://many", *place), places))
    assert found == [DATA[start : start + 100] for start, _, _ in places]


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_what_is_cached_is_not_asked_for_again_and_heals(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/data"
    for fetcher in (Fetcher(tmp_path, 10**6), Fetcher(tmp_path, 10**6)):
        assert fetcher.read(url, *WHERE) == DATA[PIECE]
    assert len(server.requests) == 1
    (file,) = kept(tmp_path)
    for damaged in (b"", DATA[PIECE][:-1], bytes(2000)):
        file.write_bytes(damaged)
        assert fetcher.read(url, *WHERE) == DATA[PIECE]
        assert file.read_bytes() == DATA[PIECE]
    assert len(server.requests) == 4
    shutil.rmtree(file.parent)
    assert fetcher.read(url, *WHERE) == fetcher.read(url, *WHERE) == DATA[PIECE]
    assert len(server.requests) == 5


def test_damage_on_the_way_is_not_cached(server: Server, tmp_path: Path) -> None:
    server.trouble = ["flip"]
    fetcher = Fetcher(tmp_path, 10**6)
    assert fetcher.read(f"{server.url}/data", *WHERE) == fetcher.read(f"{server.url}/data", *WHERE) == DATA[PIECE]
    assert len(server.requests) == 2
    with pytest.raises(FetchError, match="checksum"):
        fetcher.read(f"{server.url}/data", 0, 2000, DIGEST)
    assert len(kept(tmp_path)) == 1


def test_the_cache_stays_within_its_size_and_drops_what_was_used_longest_ago(server: Server, tmp_path: Path) -> None:
    url, fetcher = f"{server.url}/data", Fetcher(tmp_path, 3500)

    def read(start: int) -> None:
        assert reads_well(fetcher, url, start, 1000)
        assert num_kept_bytes(tmp_path) <= 3500
        time.sleep(0.01)

    for start in (0, 1000, 2000, 0, 3000, 0):  # 1000 goes for 3000
        read(start)
    assert len(server.requests) == 4
    read(1000)
    assert len(server.requests) == 5
    assert reads_well(fetcher, url, 0, 5000), "larger than the cache: not kept"
    assert num_kept_bytes(tmp_path) == 3000
    Fetcher(tmp_path, 2000)
    assert num_kept_bytes(tmp_path) == 1000, "a smaller one removes until a tenth is free"


def test_readers_and_evictions_do_not_disturb_one_another(
    server: Server, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    url, fetchers = f"{server.url}/data", [Fetcher(tmp_path, 3000), Fetcher(tmp_path, 3000)]
    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(lambda i: reads_well(fetchers[i % 2], url, i * 37 % 20 * 500, 500), range(120)))
    assert 2000 <= num_kept_bytes(tmp_path) <= 3000
    assert not log.messages


def test_nothing_else_in_the_cache_folder_is_touched(server: Server, tmp_path: Path) -> None:
    (tmp_path / "results.tmp").write_bytes(DATA)
    (tmp_path / "own").mkdir()
    fetcher = Fetcher(tmp_path, 1000)
    assert reads_well(fetcher, f"{server.url}/data", 0, 1000)
    assert reads_well(fetcher, f"{server.url}/data", 1000, 1000)
    assert (tmp_path / "results.tmp").read_bytes() == DATA
    assert (tmp_path / "own").is_dir()


def test_a_folder_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.cache_dir = .*file"):
        Fetcher(tmp_path / "file", 1000)


def test_a_full_disk_stops_nothing(server: Server, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    fetcher, before = Fetcher(tmp_path, 10**6), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # larger files fail as on a full disk
    try:
        assert [reads_well(fetcher, f"{server.url}/data", start, 1500) for start in (0, 0, 100)] == [True] * 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ["File too large" in message for message in log.messages] == [True], "said once"
    assert not kept(tmp_path)


def test_what_a_killed_process_left_is_removed(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/data"
    manifest = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-data"
    for left in ("gemma_dist-row-groups/abc.77.tmp", f"gemma_dist-manifests/{manifest}.77.tmp"):
        (tmp_path / left).parent.mkdir()
        (tmp_path / left).write_bytes(DATA)
    fetcher = Fetcher(tmp_path, 10**6)
    fetcher.download(url)
    assert not list(tmp_path.rglob("*.tmp"))
    assert fetcher.read(f"{server.url}/data", *WHERE) == DATA[PIECE]


READER = """
import sys
from pathlib import Path
from gemma_dist.shards.fetch import Fetcher
from gemma_dist.shards.manifest import digest
data, fetcher = bytes(range(256)) * 40, Fetcher(Path(sys.argv[2]), 10**6)
print("ready", flush=True)
sys.stdin.readline()
for start in range(0, 10_000, 500):
    assert fetcher.read(sys.argv[1], start, 500, digest(data[start : start + 500])) == data[start : start + 500]
"""


@pytest.fixture
def readers(server: Server, tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Three processes that wait for a line before they read 20 pieces through one cache."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READER, f"{server.url}/data", str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def begin(reader: subprocess.Popen[str]) -> None:
    assert reader.stdin is not None
    reader.stdin.write("go\n")
    reader.stdin.flush()


def test_the_ranks_of_a_node_fetch_each_piece_once(server: Server, readers: list[subprocess.Popen[str]]) -> None:
    server.pause_s = 0.01
    for reader in readers:
        begin(reader)
    assert [reader.wait(60) for reader in readers] == [0, 0, 0]
    assert len(server.requests) == len(set(server.requests)) == 20


def test_a_process_that_is_killed_while_it_fetches_holds_up_nobody(
    server: Server, readers: list[subprocess.Popen[str]]
) -> None:
    server.pause_s = 60
    begin(readers[0])
    while not server.requests:
        time.sleep(0.01)
    begin(readers[1])
    time.sleep(0.1)
    assert len(server.requests) == 1, "the second waits for the first"
    server.pause_s = 0
    readers[0].kill()
    assert readers[1].wait(30) == 0
    assert len(server.requests) == 21


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


def test_a_manifest_that_is_kept_is_taken_while_the_store_has_the_same(
    server: Server, shard_folder: Path, model: str, tmp_path: Path
) -> None:
    def put() -> None:
        server.files = {f"corpus/{path.name}": path.read_bytes() for path in shard_folder.iterdir()}

    def manifest_requests() -> list[str | None]:
        """The ranges that were asked for since the last time."""
        found = [wanted for name, wanted in server.requests if name == "corpus/manifest.arrow"]
        server.requests.clear()
        return found

    put()
    url, fetcher = f"{server.url}/corpus", Fetcher(tmp_path / "cache", 10**8)
    check(url, shard_folder, fetcher)
    assert manifest_requests() == [None]
    size = (shard_folder / "manifest.arrow").stat().st_size
    for process in (fetcher, Fetcher(tmp_path / "cache", 10**8)):
        check(url, shard_folder, process)
        assert manifest_requests() == [f"bytes={size - 40}-{size}"], "its last 40 bytes, and none behind them"
    (kept,) = (tmp_path / "cache").rglob("*manifest.arrow")
    damaged = bytearray(kept.read_bytes())
    damaged[100] ^= 1
    kept.unlink()
    kept.write_bytes(damaged)
    check(url, shard_folder, fetcher)
    assert manifest_requests() == [None], "what the disk damaged is fetched again"
    source = write_rows(tmp_path / "more.jsonl", [row(number) for number in range(20, 24)])
    run_shard([source], shard_folder, model, ShardConfig(), False, append=True)
    put()
    assert len(open_shards(url, fetcher=fetcher)) == 24
    assert manifest_requests()[-1] is None, "what was appended to is fetched again"


REFUSALS = [
    (404, "NoSuchBucket", "there is no such bucket .*check its name"),
    (403, "InvalidAccessKeyId", "does not know these credentials .*AWS_ACCESS_KEY_ID"),
    (403, "SignatureDoesNotMatch", "secret key .*AWS_SECRET_ACCESS_KEY"),
    (400, "ExpiredToken", "have expired .*renew"),
    (403, "RequestTimeTooSkewed", "clock is wrong .*set it"),
    (403, "AccessDenied", "may not do that .*s3:GetObject"),
    (400, "AuthorizationHeaderMalformed", "another region .*AWS_DEFAULT_REGION"),
]


@pytest.fixture
def s3_of_now() -> Iterator[None]:
    """s3fs keeps its clients, with the endpoint and the credentials of then."""

    RangedS3.clear_instance_cache()
    yield
    RangedS3.clear_instance_cache()


def test_a_refusal_of_a_store_is_told_with_its_cause_and_no_word_of_damage(
    s3_of_now: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve({}) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        for status, code, words in REFUSALS:
            server.refusal = status, code
            with pytest.raises(DataError, match=f"not given: s3://bucket/corpus/manifest.arrow: .*{words}") as caught:
                open_shards("s3://bucket/corpus")
            assert "make shards" not in str(caught.value)
            assert "restore" not in str(caught.value).lower()
            with pytest.raises(FetchError, match=words):
                Fetcher(None, 0).read("s3://bucket/data", *WHERE)


def test_credentials_that_are_not_there_are_told_as_such(
    s3_of_now: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(FetchError, match=r"no credentials were found .*AWS_PROFILE"):
        Fetcher(None, 0).read("s3://bucket/data", *WHERE)


def test_damage_in_a_store_is_named(server: Server, shard_folder: Path) -> None:
    server.files = {f"corpus/{path.name}": path.read_bytes() for path in shard_folder.iterdir()}
    whole = server.files["corpus/train-00000.parquet"]
    server.files["corpus/train-00000.parquet"] = whole[: len(whole) // 2]
    with pytest.raises(DataError, match=r"train-00000\.parquet, row group \d: .*(early|Range|416).*row-"):
        list(map(open_shards(f"{server.url}/corpus").read, range(20)))
    del server.files["corpus/manifest.arrow"]
    with pytest.raises(DataError, match=r"holds no manifest\.arrow"):
        open_shards(f"{server.url}/corpus")


def test_shards_in_an_s3_store(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
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
        client.put_object(Bucket="bucket", Key="data", Body=DATA)
        fetcher = Fetcher(None, 0)
        assert fetcher.size("s3://bucket/data") == len(DATA)
        caplog.clear()
        with caplog.at_level(logging.INFO, "werkzeug"):
            assert fetcher.read("s3://bucket/data", *WHERE) == DATA[PIECE]
        served = [record.getMessage() for record in caplog.records if record.name == "werkzeug"]
        assert ["GET /bucket/data" in line for line in served] == [True], "one request"
        with pytest.raises(FileNotFoundError):
            fetcher.read("s3://bucket/absent", *WHERE)
        with pytest.raises(FetchError, match=r"s3://absent/data: there is no such bucket .*AWS_ENDPOINT_URL"):
            fetcher.read("s3://absent/data", *WHERE)
        with pytest.raises(FetchError, match=r"s3://bucket/data cannot be fetched: .*range"):
            fetcher.read("s3://bucket/data", len(DATA) + 10, 10, b"")
        with pytest.raises(DataError, match=r"holds no manifest\.arrow"):
            open_shards("s3://bucket/elsewhere")
    finally:
        server.stop()
