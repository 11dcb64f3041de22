"""`adapter_config.json` and `gemma_dist.json` of anyone: each value is of its kind, or refused by its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_dist.__main__ import main
from gemma_dist.errors import CheckpointError
from gemma_dist.model.adapter_config import read_adapter_config
from gemma_dist.model.record import why_not_in_4_bits
from gemma_dist.tensorfile import open_tensors
from tests.support.corpus import row, write_rows
from tests.support.damages import truncate
from tests.test_merge import write_adapter

QUANTIZATION = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
    "modules": ["model.language_model.layers.0.mlp.up_proj"],
}


def write(folder: Path, **settings: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | settings))
    return folder


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("alpha_pattern", "q_proj", "an object of regular expressions"),
        ("alpha_pattern", {"q_proj": "8"}, "an object of regular expressions"),
        ("base_model_name_or_path", 7, "a text or null"),
        ("exclude_modules", [["q_proj"]], "a list of texts or null"),
        ("lora_alpha", None, "a finite number"),
        ("lora_alpha", 10**400, "a finite number"),
        ("lora_dropout", 1.5, "a number from 0 to 1"),
        ("modules_to_save", "embed_tokens", "a list of texts or null"),
        ("peft_type", ["LORA"], "a text"),
        ("r", 0, "a whole number above 0"),
        ("r", True, "a whole number above 0"),
        ("rank_pattern", {"(": 8}, "an object of regular expressions"),
        ("rank_pattern", {"(?i)q_proj": 8}, "an object of regular expressions"),
        ("target_modules", "(" * 20_000, "a regular expression, a list of texts or null"),
        ("target_parameters", 0.5, "a list of texts or null"),
        ("trainable_token_indices", {"embed_tokens": -1}, "a list of tokens' ids"),
        ("use_dora", "false", "true, false or null"),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_file(key: str, value: Any, kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        read_adapter_config(write(tmp_path, **{key: value}))
    said = str(refused.value)
    assert said.startswith(f"{tmp_path}/adapter_config.json: {key} = {json.dumps(value)[:100]}")
    assert kind in said
    assert "take the file from the training's result once more" in said


def test_what_peft_writes_is_taken(tmp_path: Path) -> None:
    from peft import AdaLoraConfig, LoraConfig

    settings = {"rank_pattern": {r"layers\.\d.q_proj": 4}, "alpha_pattern": {"q_proj": 0.5}, "lora_dropout": 0.1}
    for targets, tokens in ((["q_proj"], [1, 2]), (".*q_proj", {"embed_tokens": [1]})):
        written = LoraConfig(target_modules=targets, trainable_token_indices=tokens, **settings)
        written.save_pretrained(str(tmp_path))
        assert read_adapter_config(tmp_path)["trainable_token_indices"] == tokens
    AdaLoraConfig(total_step=9, rank_pattern={"q_proj": [True]}).save_pretrained(str(tmp_path))
    assert read_adapter_config(tmp_path)["peft_type"] == "ADALORA"


def test_json_deeper_than_any_parser_goes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"a":' * 20_000)
    with pytest.raises(CheckpointError, match=r"adapter_config.json is not JSON \(maximum recursion depth"):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"load_in_4bit": 1}, "quantization.load_in_4bit = 1 is not true"),
        ({"bnb_4bit_quant_type": ["nf4"]}, "is not nf4 or fp4"),
        ({"bnb_4bit_compute_dtype": "float8"}, "is not float32 or bfloat16"),
        ({"weights_dtype": None}, "is not float32 or bfloat16"),
        ({"bnb_4bit_use_double_quant": "yes"}, "is not true or false"),
        ({"modules": []}, "quantization has no modules"),
        ({"modules": {"a": 1}}, "is not a list of names"),
        ({"parameters": [1]}, "is not a list of names"),
    ],
)
def test_a_record_says_how_the_base_was_held_or_what_keeps_it_from_that(changed: dict[str, Any], told: str) -> None:
    assert why_not_in_4_bits(QUANTIZATION) == ""
    assert told in why_not_in_4_bits(QUANTIZATION | changed)
    assert why_not_in_4_bits([]) == "quantization is no object"


@pytest.fixture(scope="module")
def pair(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and an adapter of it."""
    folder = tmp_path_factory.mktemp("pair")
    write_adapter(tiny_model("e4b"), folder / "adapter")
    return tiny_model("e4b"), folder / "adapter"


@pytest.mark.parametrize("verb", ["merge", "evaluate", "export", "push"])
def test_every_command_says_which_setting_is_wrong(
    verb: str, pair: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (base, adapter), rows = pair, write_rows(tmp_path / "rows.jsonl", [row(0)])
    words = {
        "merge": ["--base", base, "--adapter", tmp_path, "--out", tmp_path / "out"],
        "evaluate": ["--model", base, "--adapter", tmp_path, "--data", rows, "--out", tmp_path / "out"],
        "export": ["--base", base, "--adapter", tmp_path, "--for", "vllm", "--out", tmp_path / "out"],
        "push": [tmp_path, "owner/name"],
    }[verb]
    (tmp_path / "adapter_model.safetensors").symlink_to(adapter / "adapter_model.safetensors")
    write(tmp_path, **json.loads((adapter / "adapter_config.json").read_text()) | {"alpha_pattern": "x"})
    assert main([verb, *map(str, words)]) == 2
    assert f'{tmp_path}/adapter_config.json: alpha_pattern = "x" is not an object' in capfd.readouterr().err


def test_weights_cut_short_are_refused_before_the_model_is_loaded(
    pair: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (base, adapter), rows = pair, write_rows(tmp_path / "rows.jsonl", [row(0)])
    shutil.copytree(adapter, tmp_path / "cut")
    truncate(tmp_path / "cut/adapter_model.safetensors")
    words = ["--model", base, "--adapter", tmp_path / "cut", "--data", rows, "--out", tmp_path / "out"]
    assert main(["evaluate", *map(str, words)]) == 2
    said = capfd.readouterr().err
    assert "adapter_model.safetensors is not a whole safetensors file" in said
    assert "Loading weights" not in said


def test_a_setting_that_peft_alone_knows_is_refused_in_words(
    pair: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (base, adapter), out = pair, tmp_path / "out"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_model.safetensors").symlink_to(adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {
        "target_modules": "x",
        "layers_pattern": "y",
    }
    broken = write(tmp_path / "adapter", **settings)
    assert main(["merge", "--base", str(base), "--adapter", str(broken), "--out", str(out), "--verify"]) == 2
    assert f"{broken}/adapter_config.json holds no settings that PEFT takes" in capfd.readouterr().err
    assert not out.exists()


def test_a_name_that_utf_8_cannot_say_is_no_tensor(tmp_path: Path) -> None:
    header = json.dumps({"lora\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"not a whole safetensors file .*surrogates not allowed"):
        open_tensors(path)


@pytest.mark.parametrize(
    "item",
    [
        "F32",
        {"dtype": "F32", "shape": [2]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F\ud800", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [True, 8]},
    ],
)
def test_a_header_of_weights_says_where_each_tensor_lies_or_is_refused(item: Any, tmp_path: Path) -> None:
    header = json.dumps({"lora": item}).encode()
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"not a whole safetensors file \(lora is .* no place of a tensor\)"):
        open_tensors(path)
