"""`gemma-dist push`: what goes to the hub, which a stand-in plays, and what never does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from safetensors.torch import load_file

from gemma_dist.__main__ import main
from gemma_dist.merge.run import merge
from tests.test_merge import write_adapter

NAME = "me/my-agent"
KEY = "hf_" + "a1B2" * 9


class Hub:
    """Takes what is sent, and remembers it."""

    made: dict[str, Any]
    files: dict[str, bytes]
    refuses: str | None = None
    is_public = False  # it has a public model of that name

    def create_repo(self, name: str, **settings: Any) -> str:
        Hub.made = {"name": name, **settings}
        return f"https://hub.example/{name}"

    def model_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(private=not Hub.is_public)

    def upload_folder(self, *, folder_path: Path, **settings: Any) -> None:
        if Hub.refuses:
            raise RuntimeError(Hub.refuses)
        Hub.files = {str(path.relative_to(folder_path)): path.read_bytes() for path in Path(folder_path).rglob("*")}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    Hub.made, Hub.files, Hub.refuses, Hub.is_public = {}, {}, None, False
    return Hub


@pytest.fixture(scope="module")
def results(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged model and its adapter, amid what a run leaves."""
    folder = tmp_path_factory.mktemp("results")
    write_adapter(tiny_model("e4b"), folder / "adapter")
    merge(tiny_model("e4b"), folder / "adapter", folder / "merged", verify=False, base_weights="as_trained")
    for place in (folder / "merged", folder / "adapter"):
        (place / "checkpoint-3").mkdir()
        (place / "checkpoint-3/optimizer-00000-of-00001.safetensors").write_bytes(b"state")
        for name in ("metrics.jsonl", "best.json", ".env", "training_args.bin", "optimizer-00000-of-00001.safetensors"):
            (place / name).write_text(f"{KEY} /home/somebody/secret")
    return folder


@pytest.fixture
def merged(results: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(results / "merged", tmp_path / "merged"))


def test_without_yes_nothing_is_sent(merged: Path, hub: type[Hub], capsys: Any) -> None:
    before = {path: path.read_bytes() for path in merged.rglob("*") if path.is_file()}
    assert main(["push", str(merged), NAME]) == 0
    said = capsys.readouterr().out
    assert "public model" in said
    assert "model.safetensors" in said
    assert "stays here: .env, best.json, checkpoint-3/, metrics.jsonl" in said
    assert "gemma_dist.json   without the places on this machine" in said
    assert "nothing was sent" in said
    assert not hub.made
    assert before == {path: path.read_bytes() for path in merged.rglob("*") if path.is_file()}


def test_what_is_sent_loads_and_names_no_place(merged: Path, hub: type[Hub], tmp_path: Path, capsys: Any) -> None:
    assert main(["push", str(merged), NAME, "--private", "--yes"]) == 0
    assert "sent: https://hub.example/me/my-agent" in capsys.readouterr().out
    assert hub.made == {"name": NAME, "private": True, "exist_ok": True}
    expected = {path.name for path in merged.iterdir() if path.is_file()}
    expected -= {"metrics.jsonl", "best.json", ".env", "training_args.bin", "optimizer-00000-of-00001.safetensors"}
    assert hub.files.keys() == expected
    for name, data in hub.files.items():
        assert b"/pytest-" not in data, name
        assert KEY.encode() not in data, name
    assert hub.files["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    there = tmp_path / "there"
    there.mkdir()
    for name, data in hub.files.items():
        (there / name).write_bytes(data)
    assert main(["check-model", str(there)]) == 0


def test_an_adapter_goes_without_the_path_of_its_base(results: Path, hub: type[Hub], tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(results / "adapter", tmp_path / "adapter"))
    assert main(["push", str(adapter), NAME, "--yes"]) == 2  # PEFT's template is its card
    assert not hub.made
    assert main(["card", str(adapter)]) == 0
    assert main(["push", str(adapter), NAME, "--yes"]) == 0
    assert hub.files.keys() == {"adapter_config.json", "adapter_model.safetensors", "gemma_dist.json", "README.md"}
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "e4b-float32"


def test_weights_of_any_name_go_and_links_are_shown(merged: Path, hub: type[Hub], tmp_path: Path, capsys: Any) -> None:
    weights = load_file(merged / "model.safetensors")
    (merged / "model.safetensors").rename(merged / "weights.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "weights.safetensors")}
    (merged / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "text").write_text("Free.")
    (merged / "LICENSE").symlink_to(tmp_path / "text")
    assert main(["push", str(merged), NAME, "--yes"]) == 0
    assert f"LICENSE   a link to {tmp_path / 'text'}" in capsys.readouterr().out
    assert {"weights.safetensors", "model.safetensors.index.json"} <= hub.files.keys()
    assert hub.files["LICENSE"] == b"Free."
    (merged / "model.safetensors.index.json").write_text('{"weight_map": []}')
    assert main(["push", str(merged), NAME, "--yes"]) == 2


def test_an_adapter_without_settings_is_none(results: Path, tmp_path: Path, hub: type[Hub], capsys: Any) -> None:
    adapter = Path(shutil.copytree(results / "adapter", tmp_path / "adapter"))
    (adapter / "adapter_config.json").write_text("{")
    assert main(["push", str(adapter), NAME, "--yes"]) == 2
    assert "settings are broken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("README.md", f"My key is {KEY}.", "what looks like a token of the hub"),
        ("generation_config.json", '{"key": "sk-ant-' + "x" * 40 + '"}', "what looks like a key of OpenAI's"),
        ("LICENSE", "-----BEGIN RSA PRIVATE KEY-----", "what looks like a private key"),
    ],
)
def test_what_looks_like_a_secret_stops_it(
    name: str, text: str, told: str, merged: Path, hub: type[Hub], capsys: Any
) -> None:
    (merged / name).write_text(text)
    assert main(["push", str(merged), NAME, "--yes"]) == 2
    assert told in capsys.readouterr().err
    assert not hub.made


def test_faults_wrong_names_and_refusals_end_it(merged: Path, hub: type[Hub], capsys: Any, monkeypatch: Any) -> None:
    for name in ("my-agent", "me/", "/abs/path", "a/b/c", "me/ agent"):
        assert main(["push", str(merged), name, "--yes"]) == 2
        assert "is no name of the hub" in capsys.readouterr().err
    hub.refuses = "403 Forbidden: no rights\nmore"
    assert main(["push", str(merged), NAME, "--yes"]) == 2
    assert "did not take me/my-agent (403 Forbidden: no rights)" in capsys.readouterr().err
    hub.refuses, hub.is_public = None, True
    assert main(["push", str(merged), NAME, "--private", "--yes"]) == 2
    assert "is there already and public" in capsys.readouterr().err
    assert not hub.files
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.made = {}
    assert main(["push", str(merged), NAME, "--yes"]) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (merged / "generation_config.json").unlink()
    assert main(["push", str(merged), NAME]) == 1
    assert main(["push", str(merged), NAME, "--yes"]) == 2
    assert "not fit to be served" in capsys.readouterr().err
    assert not hub.made
