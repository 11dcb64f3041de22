"""An adapter for vLLM: its names and shapes are those of vLLM's modules, and its sum is that of the adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from gemma_dist.__main__ import main
from gemma_dist.errors import CheckpointError
from gemma_dist.export.lora import export_adapter
from gemma_dist.merge.run import merge
from tests.test_merge import write_adapter

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\..*": 2, "up_proj": 5},
        "alpha_pattern": {"o_proj": 7, r"layers\.[02]\.mlp.down_proj": 1.5},
    },
}
PREFIX = "base_model.model."


def vllm_slots(base: Path) -> dict[str, tuple[str, int, int]]:
    """What vLLM 0.33 takes of an adapter's module: its name -> the module there, outputs and inputs of its slice.

    By `Gemma4Attention`, `Gemma4MLP` and `Gemma4DecoderLayer` of model_executor/models/gemma4.py, the names that
    `hf_to_vllm_mapper` and `packed_modules_mapping` of gemma4_mm.py give, and `build_expert_params_mapping`.
    """
    config = json.loads((base / "config.json").read_text())["text_config"]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    first_shared = config["num_hidden_layers"] - (config.get("num_kv_shared_layers") or 0)
    found = {}
    for number in range(config["num_hidden_layers"]):
        here, there = f"model.language_model.layers.{number}", f"language_model.model.layers.{number}"
        of_layer = config | config["per_layer_config"].get(str(number), {})
        size, kv_heads = of_layer["head_dim"], of_layer["num_key_value_heads"]
        attention = f"{there}.self_attn"
        packed = "q_proj" if number >= first_shared else "qkv_proj"
        found[f"{here}.self_attn.q_proj"] = (f"{attention}.{packed}", heads * size, hidden)
        if number < first_shared:
            for name in ("k_proj", "v_proj"):
                found[f"{here}.self_attn.{name}"] = (f"{attention}.qkv_proj", kv_heads * size, hidden)
        found[f"{here}.self_attn.o_proj"] = (f"{attention}.o_proj", hidden, heads * size)
        doubled = config.get("use_double_wide_mlp") and number >= first_shared
        width = config["intermediate_size"] * (2 if doubled else 1)
        for name in ("gate_proj", "up_proj"):
            found[f"{here}.mlp.{name}"] = (f"{there}.mlp.gate_up_proj", width, hidden)
        found[f"{here}.mlp.down_proj"] = (f"{there}.mlp.down_proj", hidden, width)
        for expert in range(config.get("num_experts") or 0):
            small = config["moe_intermediate_size"]
            for name, shape in {"gate": (small, hidden), "up": (small, hidden), "down": (hidden, small)}.items():
                found[f"{here}.experts.{expert}.{name}_proj"] = (f"{there}.experts", *shape)
    return found


def deltas(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """What vLLM would add to each of its slices: module of the adapter -> B @ A, scaled as PEFTHelper does."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    tensors, slots = load_file(folder / "adapter_model.safetensors"), vllm_slots(base)
    modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}
    assert len(tensors) == 2 * len(modules)
    found = {}
    for module in modules:
        a, b = (tensors[f"{PREFIX}{module}.lora_{kind}.weight"] for kind in "AB")
        _, num_outputs, num_inputs = slots[module]
        assert a.shape == (settings["r"], num_inputs)
        assert b.shape == (num_outputs, settings["r"])
        assert a.dtype == b.dtype == torch.float32
        found[module] = settings["lora_alpha"] / settings["r"] * (b @ a)
    return found


def require_sum_of(folder: Path, base: Path, merged: Path) -> set[str]:
    """What vLLM adds is what merging adds, in every weight; gives the modules of the adapter."""
    found = deltas(folder, base)
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    expected = {}
    for name in [name for name, value in before.items() if not torch.equal(value, after[name])]:
        change = after[name] - before[name]
        if name.endswith("experts.gate_up_proj"):
            for expert, own in enumerate(change):
                path = name.replace("gate_up_proj", str(expert))
                expected[f"{path}.gate_proj"], expected[f"{path}.up_proj"] = own.chunk(2)
        elif name.endswith("experts.down_proj"):
            expected |= {name.replace("down_proj", f"{expert}.down_proj"): own for expert, own in enumerate(change)}
        else:
            expected[name.removesuffix(".weight")] = change
    for module, value in found.items():
        as_key = module.replace("v_proj", "k_proj")
        change = expected.get(module, expected.get(as_key) if "v_proj" in module else None)
        torch.testing.assert_close(value, torch.zeros_like(value) if change is None else change, atol=2e-6, rtol=0)
    assert expected.keys() <= found.keys()
    return set(found)


@pytest.mark.parametrize(
    ("style", "kind"),
    [*(("e4b", kind) for kind in KINDS), *((style, "patterns") for style in ("e2b", "31b", "12b"))],
)
def test_vllm_would_add_what_merging_adds(
    tiny_model: Callable[..., Path], tmp_path: Path, style: str, kind: str
) -> None:
    base = tiny_model(style)
    write_adapter(base, tmp_path / "adapter", **KINDS[kind])
    merge(base, tmp_path / "adapter", tmp_path / "merged", verify=False, base_weights="as_trained")
    report = export_adapter(tmp_path / "adapter", base, tmp_path / "out", "vllm")
    modules = require_sum_of(tmp_path / "out", base, tmp_path / "merged")
    assert report.num_modules == len(modules)
    # Where a layer's values are its keys, both slices of vLLM's qkv_proj get the same.
    config = json.loads((base / "config.json").read_text())["text_config"]
    found = deltas(tmp_path / "out", base)
    pairs = [name for name in found if name.endswith("k_proj") and config.get("attention_k_eq_v")]
    same = [name for name in pairs if torch.equal(found[name], found[name.replace("k_proj", "v_proj")])]
    assert len(same) == (config["layer_types"].count("full_attention") if config.get("attention_k_eq_v") else 0)
    assert "--max-lora-rank 8" in report.summary()  # the least of those that vLLM takes


@pytest.mark.parametrize("weights", [["gate_up_proj", "down_proj"], ["down_proj"], ["gate_up_proj"]])
def test_experts_are_written_one_by_one(tiny_model: Callable[..., Path], tmp_path: Path, weights: list[str]) -> None:
    base = tiny_model("26b")
    write_adapter(base, tmp_path / "adapter", target_parameters=[f"experts.{weight}" for weight in weights])
    merge(base, tmp_path / "adapter", tmp_path / "merged", verify=False, base_weights="as_trained")
    export_adapter(tmp_path / "adapter", base, tmp_path / "out", "vllm")
    modules = require_sum_of(tmp_path / "out", base, tmp_path / "merged")
    of_experts = {name for name in modules if ".experts." in name}
    assert of_experts == {name for name in vllm_slots(base) if ".experts." in name}  # all three of each, as vLLM asks


def test_peft_answers_alike_with_what_was_exported(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from peft import PeftModel

    base = tiny_model("e4b")
    before = write_adapter(base, tmp_path / "adapter", use_rslora=True, **KINDS["patterns"]).eval()
    export_adapter(tmp_path / "adapter", base, tmp_path / "out", "vllm")
    model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
    after = PeftModel.from_pretrained(model, tmp_path / "out").eval()
    ids = torch.arange(50, 80)[None]
    with torch.no_grad():
        one, two = (each(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids)).logits for each in (before, after))
        without = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")(input_ids=ids).logits
    torch.testing.assert_close(one, two, atol=1e-4, rtol=0)
    assert (one - without).abs().max() > 0.1


def test_keys_and_values_that_nothing_uses_are_left_out(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    tensors = load_file(tiny_model("e4b") / "model.safetensors")
    (base / "config.json").write_text((tiny_model("e4b") / "config.json").read_text())
    write_adapter(tiny_model("e4b"), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    factors = load_file(path)
    for name in [name for name in factors if "layers.2.self_attn.k_proj" in name]:
        factors[name.replace("layers.2", "layers.4")] = factors[name].clone()
    of_layer = "model.language_model.layers.{}.self_attn.k_proj.weight"
    tensors[of_layer.format(4)] = tensors[of_layer.format(2)].clone()  # as Google's files have it
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    save_file(factors, path, {"format": "pt"})
    report = export_adapter(tmp_path / "adapter", base, tmp_path / "out", "vllm")
    assert not [name for name in deltas(tmp_path / "out", base) if "layers.4.self_attn.k_proj" in name]
    assert "1 adapted k_proj and v_proj of layers that share others' were left out" in report.summary()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, r"adapted with DoRA, which vLLM does not have .*`gemma-dist merge --base"),
        ({"modules_to_save": ["embed_vision"]}, r"trained as a whole \(modules_to_save.*`gemma-dist merge --base"),
        (
            {"target_modules": "model.embed_vision.embedding_projection"},
            r"embedding_projection.weight was adapted.*merge",
        ),
        (
            {"target_modules": r".*per_layer_input_gate"},
            r"per_layer_input_gate.weight was adapted, and vLLM has LoRA for",
        ),
        ({"r": 513}, r"rank 513, and vLLM takes up to 512"),
    ],
)
def test_what_vllm_cannot_load_is_refused_by_name(
    tiny_model: Callable[..., Path], tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    write_adapter(tiny_model("e4b"), tmp_path / "adapter", **settings)
    with pytest.raises(CheckpointError, match=reason):
        export_adapter(tmp_path / "adapter", tiny_model("e4b"), tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()


def test_sglang_and_odd_words_are_refused(tiny_model: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    base = tiny_model("e4b")
    write_adapter(base, tmp_path / "adapter")
    words = ["export", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    for more, reason in {
        ("--base", str(base), "--for", "sglang"): "SGLang (0.5.23) loads no LoRA adapter for Gemma 4",
        ("--for", "vllm"): "--adapter needs the --base that it was trained on",
        ("--base", str(base)): "and a server: --for vllm",
        ("--base", str(base), "--for", "vllm", str(base)): "give a CHECKPOINT, or --adapter",
    }.items():
        assert main([*words, *more]) == 2
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    inside = ["export", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "adapter" / "out")]
    assert main([*inside, "--base", str(base), "--for", "vllm"]) == 2
    assert "which is read; name a folder outside it" in capsys.readouterr().err
    assert main([*words, "--base", str(base), "--for", "vllm"]) == 0
    assert "--enable-lora --max-lora-rank 8" in capsys.readouterr().out
