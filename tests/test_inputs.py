"""What `shard` takes as input beside files: patterns, and datasets of the hub."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from gemma_dist.__main__ import main
from gemma_dist.config import RowConfig
from gemma_dist.data.inputs import find_inputs, identity
from gemma_dist.data.rows import read_rows
from gemma_dist.data.trajectory import parse_row
from gemma_dist.errors import DataError
from gemma_dist.shards.reader import open_shards
from tests.support.corpus import picture, row, write_rows

COMMIT, LATER = "0123456789abcdef" * 2 + "01234567", "f" * 40


def test_a_pattern_is_the_files_that_match_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt", "deep/er/d.jsonl", "odd[1].jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    assert find_inputs(["?.jsonl"]) == [Path("a.jsonl"), Path("b.jsonl")]
    assert find_inputs(["**/d.jsonl", f"{tmp_path}/a*"]) == [Path("deep/er/d.jsonl"), tmp_path / "a.jsonl"]
    assert find_inputs(["odd[1].jsonl"]) == [Path("odd[1].jsonl")], "a file of this very name goes first"
    with pytest.raises(DataError, match=r"logs/\*\.jsonl: no file matches; check the pattern"):
        find_inputs(["logs/*.jsonl"])


def test_a_pattern_gives_the_bytes_of_its_files(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, numbers in (("a", range(4)), ("b", range(4, 8))):
        write_rows(tmp_path / f"{name}.jsonl", [row(number) for number in numbers])
    words = ["--model", model, "--num-workers", "1"]
    assert main(["shard", "*.jsonl", "--out", "one", *words]) == 0
    assert main(["shard", "a.jsonl", "b.jsonl", "--out", "two", *words]) == 0
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), "what was done is the same, too"
    assert main(["shard", "a.jsonl", "*.jsonl", "--out", "three", *words]) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.jsonl", "none.jsonl: no such file; check the path"),
        ("org/name", "no such file; check the path, or for a dataset of the hub write hf://datasets/org/name"),
        ("s3://bucket/rows.jsonl", "rows are read from disks and from hf://datasets/"),
        ("hf://org/name", "names no dataset; write hf://datasets/ORG/NAME"),
        ("hf://datasets/name", "names no dataset; write hf://datasets/ORG/NAME"),
    ],
)
def test_what_is_no_input_ends_with_2(name: str, words: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shard", name, "--out", "out", "--model", model]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


# ---- the hub ---------------------------------------------------------------------------------------------------------


class Hub:
    """The cache of the hub as `snapshot_download` fills it: files are links into `blobs`."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "datasets--org--name"
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, Any, Any]] = []
        self.commit = COMMIT

    def download(self, repo: str, *, repo_type: str, revision: str | None, allow_patterns: Any) -> str:
        assert (repo, repo_type) == ("org/name", "dataset")
        self.asked.append((repo, revision, allow_patterns))
        snapshot = self.cache / "snapshots" / (COMMIT if revision == COMMIT else self.commit)
        snapshot.mkdir(parents=True, exist_ok=True)
        for number, (name, data) in enumerate(self.files.items()):
            blob = self.cache / "blobs" / f"{number}"
            blob.parent.mkdir(exist_ok=True)
            blob.write_bytes(data)
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).unlink(missing_ok=True)
            (snapshot / name).symlink_to(blob)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    return hub


def lines(*numbers: int) -> bytes:
    return "".join(json.dumps(row(number)) + "\n" for number in numbers).encode()


def names(paths: list[Path], hub: Hub) -> list[str]:
    return [str(path.relative_to(hub.cache / "snapshots" / hub.commit)) for path in paths]


def test_files_folders_and_patterns_of_a_dataset_of_the_hub(hub: Hub) -> None:
    split = {f"data/train-{number:05d}-of-00002.jsonl": lines(number) for number in (1, 0)}
    hub.files = split | {"README.md": b"", "dataset_infos.json": b"{}"}
    sorted_names = sorted(split)
    assert names(find_inputs(["hf://datasets/org/name"]), hub) == sorted_names
    assert names(find_inputs(["hf://datasets/org/name@main/data/"]), hub) == sorted_names
    assert names(find_inputs(["hf://datasets/org/name@refs%2Fpr%2F1/data/*.jsonl"]), hub) == sorted_names
    assert names(find_inputs([f"hf://datasets/org/name/{sorted_names[1]}"]), hub) == sorted_names[1:]
    assert [revision for _, revision, _ in hub.asked] == [None, "main", "refs/pr/1", None]
    hub.files["data/test-00000-of-00001.jsonl"] = lines(2)
    with pytest.raises(
        DataError, match=r"several kinds of files; name those that you mean: hf://datasets/org/name/data/test-\*"
    ):
        find_inputs(["hf://datasets/org/name"])
    with pytest.raises(DataError, match="no such file at the commit"):
        find_inputs(["hf://datasets/org/name/none.jsonl"])
    with pytest.raises(DataError, match="leads out of the dataset"):
        find_inputs(["hf://datasets/org/name/../../x.jsonl"])


def test_a_rerun_knows_the_commit_in_whatever_cache(hub: Hub, tmp_path: Path, model: str, caplog: Any) -> None:
    hub.files = {"train.jsonl": lines(0, 1)}
    words = ["shard", "hf://datasets/org/name", "--model", model, "--num-workers", "1", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    done = json.loads((tmp_path / "out" / ".finished").read_text())
    assert done["inputs"][0][0] == f"hf://datasets/org/name@{COMMIT}/train.jsonl"
    (tmp_path / "elsewhere").mkdir()
    hub.cache = tmp_path / "elsewhere" / "datasets--org--name"
    assert main(words) == 0, "the same commit, fetched anew into another cache"
    hub.commit = LATER
    assert main(words) == 2, "another commit is another input"
    assert main([words[0], f"{words[1]}@{COMMIT}", *words[2:]]) == 0
    assert len(open_shards(tmp_path / "out")) == 2


def test_images_of_a_dataset_of_the_hub_are_links_and_lead_nowhere_else(hub: Hub, tmp_path: Path) -> None:
    def asked(name: str) -> bytes:
        content = [{"type": "image", "image": name}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "ok"}]
        return json.dumps({"messages": messages}).encode() + b"\n"

    (tmp_path / "out.png").write_bytes(picture(1))
    outside = ["../../../../out.png", "../../blobs/1", str(tmp_path / "out.png")]
    hub.files = {"train.jsonl": asked("a/1.png") + b"".join(map(asked, outside)), "a/1.png": picture(1)}
    (file,) = find_inputs(["hf://datasets/org/name"])
    (where, first), *others = read_rows([file])
    assert parse_row(first, where, RowConfig()).images == [picture(1)]
    for where, other in others:
        with pytest.raises(DataError, match="lies outside the media root"):
            parse_row(other, where, RowConfig())


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_that_cannot_be_asked_is_said_plainly(
    offline: bool, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The client's own `snapshot_download`, with an empty cache and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["shard", "hf://datasets/org/name/a.jsonl", "--out", str(tmp_path / "out"), "--model", model]) == 2
    said = capsys.readouterr().err
    assert ("HF_HUB_OFFLINE is set" if offline else "cannot be fetched") in said
    assert "Traceback" not in said


def test_a_folder_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    file = write_rows(tmp_path / "saved" / "a.arrow", [row(0)])
    before = identity(tmp_path / "saved")
    file.write_bytes(file.read_bytes() + b"x")
    assert identity(tmp_path / "saved") != before
