"""The card beside every result: what it says, that it is the same each time, and that nobody's own is overwritten."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from gemma_dist.__main__ import main
from gemma_dist.merge.run import merge
from gemma_dist.model.card import CARD, license_of, public_name, publish_card, render_card, write_card
from gemma_dist.serving.check import check_model
from tests.support.corpus import row, write_rows
from tests.test_merge import write_adapter

RECORD = {
    "base_model": "google/gemma-4-E4B-it",
    "quantization": {"bnb_4bit_quant_type": "nf4", "modules": ["a"]},
    "base_weights_hash": "0123456789abcdef",
    "manifest": "fedcba9876543210",
    "num_samples": 1234,
    "tuning": "lora",
    "lora": {"r": 16, "lora_alpha": 32, "use_rslora": True},
    "recipe": {"learning_rate": 2e-4, "packing": True},
    "versions": {"gemma_dist": "0.1.0", "torch": "2.13.0"},
}
ADAPTER = {"base_model_name_or_path": "google/gemma-4-E4B-it", "r": 16, "lora_alpha": 32}


def head_of(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---")[1])


def test_an_adapters_card_says_what_the_record_says() -> None:
    text = render_card(RECORD, ADAPTER, None)
    head = head_of(text)
    assert (head["base_model"], head["base_model_relation"]) == ("google/gemma-4-E4B-it", "adapter")
    assert head["library_name"] == "peft"
    assert "license" not in head
    assert "datasets" not in head
    assert head["tags"] == ["gemma4", "gemma_dist", "lora", "tool-calling"]
    for said in (
        "r 16, alpha 32, use_rslora",
        "4 bits (nf4)",
        "1,234 samples",
        "fedcba9876543210",
        "| torch | 2.13.0 |",
    ):
        assert said in text
    assert "| license | as its base |" in text
    assert ModelCard(text).data.to_dict()["base_model"] == "google/gemma-4-E4B-it"  # as the hub reads it


@pytest.mark.parametrize(
    ("model", "public"),
    [
        ("google/gemma-4-E4B-it", "google/gemma-4-E4B-it"),
        ("/home/me/secret/gemma-4-E4B-it", "gemma-4-E4B-it"),
        ("/hub/models--google--gemma-4-E4B-it/snapshots/0a1b", "google/gemma-4-E4B-it"),
        ("runs/mine", "runs/mine"),
    ],
)
def test_a_card_names_no_place_on_this_machine(model: str, public: str) -> None:
    assert public_name(model) == public
    assert "/home" not in render_card(RECORD | {"base_model": model}, ADAPTER, None)


def test_a_folder_that_is_named_like_a_model_of_the_hub_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/mine").mkdir(parents=True)
    assert public_name("runs/mine") == "mine"
    assert "base_model" not in head_of(render_card(RECORD | {"base_model": "runs/mine"}, ADAPTER, None))


def test_the_license_is_what_the_bases_own_card_says(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(
        "---\nlicense: apache-2.0\nlicense_link: https://example.org/terms\ntags: [x]\n---\nHi"
    )
    said = {"license": "apache-2.0", "license_link": "https://example.org/terms"}
    assert license_of(str(tmp_path)) == said
    text = render_card(RECORD | {"base_model": str(tmp_path)}, ADAPTER, None)
    assert head_of(text) | said == head_of(text)
    assert "as its base: apache-2.0 |" in text
    (tmp_path / "LICENSE.txt").write_text("Terms")
    text = render_card(RECORD | {"base_model": str(tmp_path)}, ADAPTER, None)
    assert "as its base: apache-2.0 (LICENSE.txt in its folder)" in text
    for broken in ("---\n: [\n---", "no head", "---\n- a\n---\n", f"---\nlicense: {'[' * 9000}\n---\n"):
        (tmp_path / CARD).write_text(broken)
        assert license_of(str(tmp_path)) == {}


def test_pefts_template_is_replaced_and_a_users_own_card_stays(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from torch import nn

    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    assert isinstance(model, PeftModel)
    model.save_pretrained(tmp_path)
    assert "[More Information Needed]" in (tmp_path / CARD).read_text()
    assert write_card(tmp_path, RECORD)
    first = (tmp_path / CARD).read_bytes()
    assert b"More Information" not in first
    assert write_card(tmp_path, RECORD)
    assert (tmp_path / CARD).read_bytes() == first
    result = tmp_path / "result"
    result.mkdir()
    publish_card(tmp_path, result)
    assert (result / CARD).read_bytes() == first
    (result / CARD).unlink()
    model.save_pretrained(result)
    begun = (result / CARD).read_text().replace("[More Information Needed]", "It draws charts.", 1)
    for own in (
        "Mine. [More Information Needed]",
        begun,
        first.decode() + "And a word of mine.\n",
        first.decode().replace("16", "8", 1),
    ):
        (result / CARD).write_text(own)
        publish_card(tmp_path, result)
        assert not write_card(result, RECORD)
        assert (result / CARD).read_text() == own


@pytest.mark.parametrize("record", [
    {"base_model": "/models/a|b: [\"c\"\n---\n# d", "recipe": {"optim": "x\n| y |"}},
    {"base_model": 7, "training": 5, "recipe": [1], "versions": "v"},
    {"training": {"manifest": "m", "lora": 3, "recipe": None}, "verification": {"kl": "?"}},
    {"base_model": "\ud800/\0", "versions": {"\udc00": "\u202e"}, "adapters": {"\0": 1, "\ud800": 2}},
    {"base_model": "a/" + "b" * 5000},
    {},
])  # fmt: skip
def test_a_record_of_anyones_breaks_no_card(record: dict[str, Any], tmp_path: Path) -> None:
    report = {"metrics": {"overall": {"value": "all"}, "tool_f1": 3}}
    for adapter in (None, ADAPTER):
        text = render_card(record, adapter, report)
        assert isinstance(head_of(text)["tags"], list)
        assert len([line for line in text.splitlines() if line.startswith("# ")]) == 1
        assert all(line.replace("\\|", "").count("|") in (0, 3, 4) for line in text.splitlines())
    (tmp_path / "gemma_dist.json").write_text(json.dumps(record))
    assert main(["card", str(tmp_path)]) == 0
    (tmp_path / CARD).unlink()
    (tmp_path / "adapter_config.json").write_text("{")
    assert main(["card", str(tmp_path)]) == 2


@pytest.fixture(scope="module")
def merged(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged model, by an adapter with a record of its training."""
    folder = tmp_path_factory.mktemp("merged")
    write_adapter(tiny_model("e4b"), folder / "adapter")
    record = json.loads((folder / "adapter/gemma_dist.json").read_text())
    record |= {key: value for key, value in RECORD.items() if key not in record}
    (folder / "adapter/gemma_dist.json").write_text(json.dumps(record))
    merge(tiny_model("e4b"), folder / "adapter", folder / "out", verify=False, base_weights="as_trained")
    return folder


def test_a_merged_model_has_a_card_and_is_fit_for_servers(merged: Path, tiny_model: Callable[..., Path]) -> None:
    text = (merged / "out" / CARD).read_text()
    head = head_of(text)
    assert head["library_name"] == "transformers"
    assert "base_model" not in head  # a folder, which nobody else has
    assert str(merged) not in text
    assert "fedcba9876543210" in text
    assert "learning_rate | 0.0002" in text
    assert not check_model(merged / "out").faults
    merge(tiny_model("e4b"), merged / "adapter", merged / "again", verify=False, base_weights="as_trained")
    assert (merged / "again" / CARD).read_text() == text


def test_the_card_takes_the_metrics_of_an_evaluation_of_these_very_weights(
    merged: Path, tiny_model: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    model = Path(shutil.copytree(merged / "out", tmp_path / "model"))
    data = write_rows(tmp_path / "rows.jsonl", [row(1), row(2)])
    words = ["--data", str(data), "--max-new-tokens", "2", "--no-loss"]
    assert main(["evaluate", "--model", str(model), *words, "--out", str(tmp_path / "eval")]) == 0
    assert main(["card", str(model), "--evaluation", str(tmp_path / "eval")]) == 0
    text = (model / CARD).read_text()
    assert "## Evaluation" in text
    assert "4 decision points of 2 held-out trajectories" in text
    assert "(`overall`)" in text
    assert str(tmp_path) not in text
    assert main(["card", str(model)]) == 0
    assert "## Evaluation" not in (model / CARD).read_text()

    assert main(["card", str(merged / "adapter"), "--evaluation", str(tmp_path / "eval")]) == 2
    assert "evaluated other weights" in capsys.readouterr().err
    assert main(["card", str(tiny_model("e4b"))]) == 2
    assert "has no gemma_dist.json" in capsys.readouterr().err
    (model / CARD).write_text("Mine.")
    assert main(["card", str(model)]) == 2
    assert "was written by hand" in capsys.readouterr().err
    assert (model / CARD).read_text() == "Mine."
