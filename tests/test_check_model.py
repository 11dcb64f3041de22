"""`gemma-dist check-model`: what we write is fit for servers, and each kind of damage is named."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_dist.__main__ import main
from gemma_dist.data.templates import read_template
from gemma_dist.model.tiny import STYLES, newest_template
from gemma_dist.serving.check import check_model
from gemma_dist.serving.commands import server_commands
from gemma_dist.serving.report import ModelReport

MODEL = "model.safetensors"
LAYER = "model.language_model.layers.0."


def split(folder: Path) -> None:
    """The weights in two files with an index."""
    tensors = load_file(folder / MODEL)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / MODEL).unlink()
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def change(name: str, *keys: str, to: Any) -> Callable[[Path], None]:
    """A damage: another value at `keys` of a JSON file; None takes the key away."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        inner = value
        for key in keys[:-1]:
            inner = inner[key]
        inner.pop(keys[-1], None) if to is None else inner.update({keys[-1]: to})
        write_json(folder / name, value)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text, encoding="utf-8")

    return damage


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """A damage: other tensors in the file."""

    def damage(folder: Path) -> None:
        held = load_file(folder / MODEL)
        edit(held)
        save_file(held, folder / MODEL, {"format": "pt"})

    return damage


def cut_short(folder: Path) -> None:
    path = folder / MODEL
    path.write_bytes(path.read_bytes()[:-100])


def of_a_missing_file(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def of_a_wrong_index(folder: Path) -> None:
    split(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first, second = sorted(index["weight_map"])[:2]
    index["weight_map"][first] = index["weight_map"][second]
    write_json(folder / "model.safetensors.index.json", index)


def of_no_map(folder: Path) -> None:
    split(folder)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}})


def of_two_saves(folder: Path) -> None:
    shutil.copy(folder / MODEL, folder / "model-00001-of-00001.safetensors")


def of_another_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("<|tool_call>", "<|call_of_tool>"), encoding="utf-8")


def rename(old: str, new: str) -> Callable[[Path], None]:
    return tensors(lambda held: held.update({new: held.pop(old)}))


DAMAGES: Mapping[str, tuple[Callable[[Path], None], str, str]] = {
    "a tensor is missing": (
        tensors(lambda held: held.pop("model.language_model.norm.weight")),
        "norm.weight",
        "missing",
    ),
    "a buffer is missing": (tensors(lambda held: held.pop(f"{LAYER}layer_scalar")), "layer_scalar", "missing"),
    "a tensor too many": (tensors(lambda held: held.update(more=torch.zeros(2))), "more", "no tensor of Gemma4"),
    "a name of the text-only class": (
        rename("model.language_model.norm.weight", "model.norm.weight"),
        "model.norm.weight",
        "no tensor of Gemma4",
    ),
    "another shape": (
        tensors(lambda held: held.update({"model.language_model.norm.weight": torch.ones(64)})),
        "norm.weight",
        "has the shape [64], and config.json makes it [128]",
    ),
    "a float32 left-over": (
        tensors(
            lambda held: held.update(
                {name: tensor.bfloat16() for name, tensor in held.items() if "layers.0.mlp" not in name}
            )
        ),
        "layers.0.mlp",
        "stored as F32, the others as BF16",
    ),
    "another dtype than config.json's": (
        tensors(lambda held: held.update({name: tensor.bfloat16() for name, tensor in held.items()})),
        "config.json",
        "says dtype float32, and the weights are stored as BF16",
    ),
    "weights in integers": (
        tensors(lambda held: held.update({name: tensor.to(torch.int8) for name, tensor in held.items()})),
        "config.json",
        "has no quantization_config, and the weights are stored as I8",
    ),
    "a file cut short": (cut_short, MODEL, "is not a whole safetensors file"),
    "a file of the index is missing": (of_a_missing_file, "model-00002", "named by the index and absent"),
    "an index that says otherwise": (of_a_wrong_index, "index.json", "says otherwise than the files"),
    "an index without a map": (of_no_map, "index.json", "has no weight_map"),
    "a file of an earlier save": (of_two_saves, "model-00001-of-00001", "lies beside"),
    "a larger config": (change("config.json", "text_config", "num_hidden_layers", to=8), "config.json", ""),
    "sizes that make no model": (change("config.json", "text_config", "hidden_size", to="x"), "config.json", ""),
    "no architectures": (change("config.json", "architectures", to=None), "config.json", "architectures is"),
    "code of its own": (
        change("config.json", "auto_map", to={"AutoConfig": "own.Config"}),
        "auto_map",
        "asks for code of its own",
    ),
    "an adapter beside it": (write("adapter_config.json", "{}"), "adapter_config.json", "whole model's folder"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer and processor", ""),
    "a broken tokenizer": (
        write("tokenizer.json", "{"),
        "tokenizer and processor",
        "tokenizer.json holds no tokenizer",
    ),
    "a broken setting of the processor": (
        write("processor_config.json", "["),
        "tokenizer and processor",
        "processor_config.json is not JSON",
    ),
    "sizes of images that are none": (
        change("processor_config.json", "image_processor", "patch_size", to="16"),
        "tokenizer and processor",
        'is broken: patch_size = "16" is not a whole number above 0',
    ),
    "no processor": (remove("processor_config.json"), "tokenizer and processor", "no processor can be loaded"),
    "control tokens that are none": (of_another_tokenizer, "tokenizer.json", "does not read <|tool_call> as"),
    "ids of another tokenizer": (change("config.json", "image_token_id", to=3), "config.json", "image_token_id is 3"),
    "no template": (remove("chat_template.jinja"), "chat_template.jinja", "no chat template"),
    "a template without tools": (
        write("chat_template.jinja", "{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}{% endfor %}"),
        "chat_template.jinja",
        "declares no tools",
    ),
    "a template that is no Jinja": (write("chat_template.jinja", "{% if"), "chat_template.jinja", "cannot render"),
    "a template that loses images": (
        lambda folder: write("chat_template.jinja", read_template("gemma4_v3"))(folder),
        "chat_template.jinja",
        "loses the images",
    ),
    "two templates": (
        change("tokenizer_config.json", "chat_template", to="{{ messages }}"),
        "tokenizer_config.json",
        "another chat template than chat_template.jinja",
    ),
    "no settings of generation": (remove("generation_config.json"), "generation_config.json", "absent"),
    "broken settings of generation": (
        write("generation_config.json", "[]"),
        "generation_config.json",
        "no JSON object",
    ),
    "one stop id": (change("generation_config.json", "eos_token_id", to=1), "generation_config.json", "lacks <turn|>"),
    "no stop after calls": (
        change("generation_config.json", "eos_token_id", to=[1, 12]),
        "generation_config.json",
        "lacks <|tool_response> (17)",
    ),
    "another end in the config": (change("config.json", "eos_token_id", to=3), "config.json", "eos_token_id is [3]"),
}


@pytest.fixture
def copied(model: str, tmp_path: Path) -> Path:
    """A tiny E4B to damage."""
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.mark.parametrize("style", STYLES)
def test_what_we_write_is_fit_to_be_served(style: str, tiny_model: Callable[..., Path], capsys: Any) -> None:
    folder = tiny_model(style)
    capsys.readouterr()
    assert main(["check-model", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_faults"] == 0
    assert report["num_tensors"] == len(load_file(folder / MODEL))
    assert "gemma4_v5" in report["chat_template"]
    assert ("empty thought" in report["chat_template"]) == (style in ("12b", "26b", "31b"))
    assert ("gemma-dist serve" in json.dumps(report["findings"])) == (style == "12b")


def test_extras_that_no_model_loads_are_counted(copied: Path) -> None:
    """Google's files hold keys and values of layers that share them; some tools write the tied head again."""
    held = load_file(copied / MODEL)
    shared = "model.language_model.layers.5.self_attn."
    more = {f"{shared}{name}.weight": torch.zeros(2) for name in ("k_proj", "v_proj", "k_norm")}
    more["lm_head.weight"] = held["model.language_model.embed_tokens.weight"].clone()
    save_file(held | more, copied / MODEL, {"format": "pt"})
    report = check_model(copied)
    assert not report.faults
    assert sorted(report.extras.values()) == [1, 3]
    own = f"{LAYER}self_attn.v_norm.weight"  # of a layer that shares nothing
    save_file(held | {own: torch.zeros(2)}, copied / MODEL, {"format": "pt"})
    assert [finding.where for finding in check_model(copied).faults] == [own]


def test_a_split_model_is_whole_and_a_file_beside_it_a_note(copied: Path) -> None:
    whole = check_model(copied)
    split(copied)
    assert check_model(copied) == whole
    shutil.copy(copied / "model-00001-of-00002.safetensors", copied / "model-00001-of-00003.safetensors")
    report = check_model(copied)
    assert not report.faults
    assert len(report.findings) == len(whole.findings) + 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_named(damage: str, copied: Path) -> None:
    do, where, what = DAMAGES[damage]
    do(copied)
    report = check_model(copied)
    found = [finding for finding in report.faults if where in finding.where and what in finding.what]
    assert found, report.render()
    assert all(finding.why and finding.remedy for finding in report.findings)
    text = report.render()
    assert found[0].remedy in text
    assert "served by" not in text


def test_the_page_on_serving_has_the_commands_that_are_printed() -> None:
    page = " ".join((Path(__file__).parents[1] / "docs/serving.md").read_text(encoding="utf-8").split())
    commands = server_commands("merged")
    for server in ("transformers", "vLLM", "SGLang"):
        assert commands[server] in page
    assert commands["llama.cpp"].partition(" && ")[0] in page


def test_a_null_that_is_pythons_is_a_note(copied: Path) -> None:
    (copied / "chat_template.jinja").write_text(read_template("gemma4_v4"))
    report = check_model(copied)
    assert not report.faults
    assert "gemma4_v4" in str(report.chat_template)
    assert any("null argument" in finding.what for finding in report.findings)


def test_results_in_a_turn_of_their_own_are_a_note(copied: Path) -> None:
    (copied / "chat_template.jinja").write_text(read_template("gemma4_v2"))
    report = check_model(copied)
    assert not report.faults
    assert any("gemma4_v2 does so" in finding.what for finding in report.findings)


def test_a_template_of_a_users_own_is_said_to_be_one(copied: Path) -> None:
    (copied / "chat_template.jinja").write_text("{#- ours -#}" + newest_template("e4b"))
    report = check_model(copied)
    assert not report.faults
    assert "none of the revisions" in str(report.chat_template)


def test_sizes_that_older_readers_miss_are_named_and_read_alike(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A config as transformers saves it is one note; ours says both, and is the same model to transformers."""
    from transformers import AutoConfig

    ours = tiny_model("31b")
    theirs = Path(shutil.copytree(ours, tmp_path / "31b"))
    config = AutoConfig.from_pretrained(ours)
    config.save_pretrained(theirs)
    told = [finding.remedy for finding in check_model(theirs).findings if "per_layer_config" in finding.what]
    assert told == ['add to text_config: "global_head_dim": 64, "num_global_key_value_heads": 1']
    assert not [finding for finding in check_model(ours).findings if "per_layer_config" in finding.what]
    again = AutoConfig.from_pretrained(theirs).to_dict()
    assert again | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        (lambda folder: (folder / MODEL).unlink(), "has neither model.safetensors"),
        (lambda folder: (folder / MODEL).rename(folder / "pytorch_model.bin"), "can run code when read"),
        (remove("config.json"), "not the folder of a whole Gemma 4"),
        (write("config.json", "{"), "is not JSON"),
        (change("config.json", "model_type", to="llama"), "model_type 'llama'"),
        (lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"), "is an adapter"),
    ],
)
def test_what_is_no_model_ends_with_2(prepare: Callable[[Path], object], told: str, copied: Path, capsys: Any) -> None:
    prepare(copied)
    assert main(["check-model", str(copied)]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said


def test_the_exit_code_tells_faults(copied: Path, capsys: Any) -> None:
    remove("generation_config.json")(copied)
    assert main(["check-model", str(copied)]) == 1
    assert "1 fault that a server would stumble over" in capsys.readouterr().out


def test_a_checkpoint_is_no_result(copied: Path) -> None:
    """vLLM and SGLang read every safetensors file where there is no index: the optimizer's, too."""
    (copied / "optimizer-00000-of-00001.safetensors").write_bytes(b"state")
    assert [finding.where for finding in check_model(copied).faults] == ["optimizer-00000-of-00001.safetensors"]
    split(copied)
    assert not check_model(copied).faults


def test_an_index_names_files_of_its_folder_alone(copied: Path) -> None:
    split(copied)
    index = json.loads((copied / f"{MODEL}.index.json").read_text())
    (copied / "model-00002-of-00002.safetensors").rename(copied.parent / "elsewhere.safetensors")
    moved = {
        name: "../elsewhere.safetensors" if "00002-of" in file else file for name, file in index["weight_map"].items()
    }
    write_json(copied / f"{MODEL}.index.json", index | {"weight_map": moved})
    assert "names '../elsewhere.safetensors'" in [finding.what for finding in check_model(copied).faults]


def test_other_shapes_are_one_finding(copied: Path) -> None:
    change("config.json", "text_config", "intermediate_size", to=64)(copied)
    (fault,) = check_model(copied).faults
    assert "more" in fault.where
    assert "the first has the shape" in fault.what


def test_a_model_in_4_bits_is_one(copied: Path, tmp_path: Path) -> None:
    """As transformers saves it by bitsandbytes: other shapes, and names beside the weights."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded = AutoModelForImageTextToText.from_pretrained(copied, quantization_config=settings, device_map="cpu")
    loaded.save_pretrained(tmp_path / "small")
    AutoProcessor.from_pretrained(copied).save_pretrained(tmp_path / "small")
    report = check_model(tmp_path / "small")
    assert report.quantization == "bitsandbytes"
    assert any("does not take these weights" in finding.what for finding in report.findings)
    assert "llama.cpp" not in report.commands
    assert not report.faults, ModelReport.render(report)
