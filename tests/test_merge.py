"""Merging: the plan refuses what it cannot sum, the sum has PEFT's bits, and the folder is whole or absent."""

import errno
import fcntl
import json
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer

from gemma_dist.__main__ import main
from gemma_dist.errors import CheckpointError, ConfigError
from gemma_dist.files import whole_folder
from gemma_dist.merge import arithmetic, stream
from gemma_dist.merge import run as merge_run
from gemma_dist.merge.four_bit import four_bit_rows
from gemma_dist.merge.plan import Replacement, plan_merge
from gemma_dist.merge.run import merge
from gemma_dist.merge.stream import Workers, row_blocks
from gemma_dist.merge.verify import verify
from gemma_dist.model.fingerprint import fingerprint_base
from gemma_dist.model.four_bit_cpu import dequantize_as_gpus_do
from gemma_dist.model.load import keep_four_bit_exact
from gemma_dist.model.record import Quantization

TARGETS = r"model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\..*": 2, "up_proj": 5},
        "alpha_pattern": {"o_proj": 7, r"layers\.[02]\.mlp.down_proj": 1.5},
    },
    "dora": {"use_dora": True},
}


# --- the plan: names, shapes and settings only -------------------------------------------------------------------

Q = "model.language_model.layers.0.self_attn.q_proj"
K = "model.language_model.layers.0.self_attn.k_proj"
EMBEDDING = "model.language_model.embed_tokens"
BASE = {
    f"{EMBEDDING}.weight": ("BF16", (50, 8)),
    f"{Q}.weight": ("BF16", (12, 8)),
    f"{K}.weight": ("BF16", (6, 8)),
    "model.language_model.layers.0.layer_scalar": ("BF16", (1,)),
    "model.embed_vision.embedding_projection.weight": ("BF16", (8, 5)),
}
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": TARGETS}


def factors(module: str, out_features: int, in_features: int = 8, rank: int = 2) -> dict[str, Any]:
    return {
        f"base_model.model.{module}.lora_A.weight": ("F32", (rank, in_features)),
        f"base_model.model.{module}.lora_B.weight": ("F32", (out_features, rank)),
    }


def plan(adapter: dict[str, Any], quantized: tuple[str, ...] = (), tied: bool = True, **settings: Any) -> list[Any]:
    return plan_merge(BASE, adapter, SETTINGS | settings, tied_embeddings=tied, quantized_modules=quantized)


def test_every_base_tensor_has_one_step_in_order() -> None:
    ops = plan(factors(Q, 12) | factors(K, 6), quantized=(K,))
    assert [op.name for op in ops] == list(BASE)
    assert [op.name for op in ops if not op.untouched] == [f"{Q}.weight", f"{K}.weight"]
    assert [op.quantized for op in ops] == [False, False, True, False, False]
    assert all(lora.scale == 2.0 for op in ops for lora in op.loras)


def test_scale_follows_rank_and_its_root_for_rslora() -> None:
    wide = factors(Q, 12, rank=4)
    (q,) = [lora for op in plan(wide, r=4) for lora in op.loras]
    (root,) = [lora for op in plan(wide, r=4, use_rslora=True) for lora in op.loras]
    (own,) = [lora for op in plan(wide, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 3}) for lora in op.loras]
    assert (q.scale, root.scale, own.scale) == (1.0, 2.0, 0.75)


def test_modules_to_save_replaces_the_weight() -> None:
    name = "model.embed_vision.embedding_projection.weight"
    ops = plan(factors(Q, 12) | {f"base_model.model.{name}": ("F32", (8, 5))}, modules_to_save=["embedding_projection"])
    (op,) = [op for op in ops if op.replaced_by]
    assert (op.name, op.replaced_by) == (name, Replacement(f"base_model.model.{name}"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"peft_type": "ADALORA"}, "ADALORA"),
        ({"peft_type": "VERA"}, "VERA"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters names .*q_proj.weight, and only gate_up_proj"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"use_superlora": True}, "use_superlora"),
    ],
)
def test_kinds_without_a_known_sum_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        plan(factors(Q, 12), **settings)


@pytest.mark.parametrize(
    ("adapter", "settings", "named"),
    [
        ({}, {}, "no tensors"),
        (factors(Q, 12, rank=0), {}, "ZeRO-3"),
        (
            factors(Q, 12, in_features=9),
            {},
            r"q_proj.lora_A.weight in the adapter has shape \[2, 9\].*must be \[2, 8\]",
        ),
        (factors(Q, 13), {}, r"lora_B.weight in the adapter has shape \[13, 2\]"),
        (factors(Q, 12, rank=3), {}, "with r = 2"),
        (dict(list(factors(Q, 12).items())[:1]), {}, "needs exactly lora_A.weight, lora_B.weight"),
        (factors(Q, 12), {"use_dora": True}, "lora_magnitude_vector"),
        (factors(Q, 12) | {f"base_model.model.{Q}.lora_magnitude_vector": ("F32", (12,))}, {}, "LoRA needs exactly"),
        (factors("model.layers.0.self_attn.q_proj", 12), {}, f"it has {Q}.weight"),
        (factors("model.language_model.layers.9.self_attn.q_proj", 12), {}, "layers.9"),
        (factors("lm_head", 50), {}, "ties"),
        (factors(EMBEDDING, 50), {}, "ties"),
        ({f"base_model.model.{EMBEDDING}.lora_embedding_A": ("F32", (2, 50))}, {}, "lora_embedding_A"),
        ({f"base_model.model.{EMBEDDING}.weight": ("F32", (50, 8))}, {}, "neither lora_A"),
        ({f"base_model.model.{EMBEDDING}.weight": ("F32", (50, 8))}, {"modules_to_save": ["embed_tokens"]}, "ties"),
        ({f"base_model.model.{Q}.lora_B.bias": ("F32", (12,))}, {}, "lora_B.bias"),
        ({f"{Q}.lora_A.default.weight": ("F32", (2, 8))}, {}, "lora_A.default"),
    ],
)
def test_tensors_without_their_place_are_refused(adapter: dict[str, Any], settings: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        plan(adapter, **settings)


EXPERTS = "model.language_model.layers.0.experts"
STACKS = BASE | {f"{EXPERTS}.down_proj": ("BF16", (3, 8, 5)), f"{EXPERTS}.gate_up_proj": ("BF16", (3, 10, 8))}
GATE_UP, DOWN = factors(f"{EXPERTS}.base_layer", 10, 8, 3 * 2), factors(EXPERTS, 8, 5, 3 * 2)


def plan_experts(adapter: dict[str, Any], *weights: str, **settings: Any) -> dict[str, Any]:
    targets = {"target_parameters": [f"experts.{weight}" for weight in weights]}
    ops = plan_merge(STACKS, adapter, SETTINGS | targets | settings, tied_embeddings=True, quantized_modules=())
    return {op.name.rpartition(".")[2]: lora for op in ops for lora in op.loras}


def test_stacked_experts_find_their_factors_however_peft_nests_them() -> None:
    both = plan_experts(DOWN | GATE_UP, "down_proj", "gate_up_proj")
    assert both["gate_up_proj"].a == f"base_model.model.{EXPERTS}.base_layer.lora_A.weight"
    assert both["down_proj"].b == f"base_model.model.{EXPERTS}.lora_B.weight"
    assert {lora.num_experts for lora in both.values()} == {3}
    (alone,) = plan_experts(factors(EXPERTS, 10, 8, 6), "gate_up_proj").values()
    assert alone.a == f"base_model.model.{EXPERTS}.lora_A.weight"
    scaled = plan_experts(DOWN | GATE_UP, "down_proj", "gate_up_proj", alpha_pattern={"experts.down_proj": 8})
    assert (scaled["gate_up_proj"].scale, scaled["down_proj"].scale) == (2.0, 4.0)


@pytest.mark.parametrize(
    ("adapter", "weights", "named"),
    [
        (DOWN | GATE_UP, ["gate_up_proj"], "base_layer.weight, which the base does not have|must be"),
        (DOWN, ["down_proj", "gate_up_proj"], r"gate_up_proj, but the adapter has no .*experts.base_layer.lora_A"),
        (factors(EXPERTS, 8, 5, 2), ["down_proj"], r"has shape \[2, 5\].*of shape \[3, 8, 5\].*must be \[6, 5\]"),
        (factors(EXPERTS, 5, 8, 6), ["down_proj"], r"must be \[6, 5\]"),
        (DOWN, [], "experts.weight, which the base does not have"),
    ],
)
def test_expert_factors_without_their_place_are_refused(adapter: Any, weights: list[str], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        plan_experts(adapter, *weights)


def test_quantized_bases_and_foreign_records_are_refused() -> None:
    packed = BASE | {f"{Q}.weight": ("U8", (12, 8))}
    with pytest.raises(CheckpointError, match="stored as U8"):
        plan_merge(packed, factors(Q, 12), SETTINGS, tied_embeddings=True, quantized_modules=())
    with pytest.raises(CheckpointError, match=r"layers\.7\.q_proj"):
        plan(factors(Q, 12), quantized=("model.layers.7.q_proj",))


# --- real models and adapters ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of tiny models come in several blocks, too, and what is copied in several ranges."""
    monkeypatch.setattr(stream, "BLOCK_VALUES", 1)
    monkeypatch.setattr(stream, "COPY_BYTES", 10_000)


@pytest.fixture(scope="module")
def bases(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny models by name, made once: a style, optionally with the dtype (`e4b-bfloat16`)."""
    root = tmp_path_factory.mktemp("bases")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            style, _, dtype = name.partition("-")
            shutil.copytree(tiny_model(style, dtype or "float32"), folder)
            if style == "e4b":
                _add_shared_keys_and_values(folder)
        return folder

    return make


def _add_shared_keys_and_values(folder: Path) -> None:
    """Give layers 4 and 5 the K and V that Google's files hold, that transformers neither makes nor saves."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for layer in (4, 5):
        for kind in ("k_proj", "v_proj", "k_norm"):
            name = f"model.language_model.layers.{{}}.self_attn.{kind}.weight"
            tensors[name.format(layer)] = tensors[name.format(layer - 2)] + 1
        # A buffer that a writer of parameters loses, with a value that a reloaded default would not have.
        tensors[f"model.language_model.layers.{layer}.layer_scalar"].fill_(0.75)
    save_file(tensors, path, metadata={"format": "pt"})


def write_adapter(base: Path, out: Path, *, std: float = 0.05, four_bit: bool = False, **settings: Any) -> Any:
    """An adapter of PEFT's own making with random weights; returns the PEFT model."""
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    quantization = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
    }
    arguments = {"quantization_config": BitsAndBytesConfig(**quantization)} if four_bit else {}
    model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto", **arguments)
    modules = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    torch.manual_seed(1)
    peft_model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | settings))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
        elif "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
        elif "modules_to_save" in name or "trainable_tokens" in name:
            parameter.data += 0.1
    peft_model.save_pretrained(out)
    record = {"quantization": quantization | {"modules": modules} if four_bit else None, "base_model": str(base)}
    (out / "gemma_dist.json").write_text(json.dumps(record))
    return peft_model


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["e4b", "e4b-bfloat16", "31b", "26b-bfloat16"])
def test_every_bit_is_the_one_of_peft(bases: Any, name: str, kind: str, tmp_path: Path) -> None:
    base = bases(name)
    peft_model = write_adapter(base, tmp_path / "adapter", **KINDS[kind])
    report = merge(base, tmp_path / "adapter", tmp_path / "out", verify=False, base_weights="as_trained")
    expected = peft_model.merge_and_unload().state_dict()
    before, after = tensors_of(base), tensors_of(tmp_path / "out")

    assert after.keys() == before.keys()
    changed = {tensor for tensor in before if not torch.equal(before[tensor], after[tensor])}
    assert len(changed) == report.num_adapted > 30
    for tensor, value in after.items():
        assert value.dtype == before[tensor].dtype
        assert torch.equal(value, expected.get(tensor, before[tensor])), tensor
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("weights", [["gate_up_proj", "down_proj"], ["down_proj"]])
def test_stacked_experts_have_the_bits_of_peft(bases: Any, weights: list[str], tmp_path: Path) -> None:
    base = bases("26b")
    targets: dict[str, Any] = {
        "target_parameters": [f"experts.{weight}" for weight in weights],
        "use_rslora": len(weights) == 1,
    }
    peft_model = write_adapter(base, tmp_path / "adapter", **targets)
    report = merge(base, tmp_path / "adapter", tmp_path / "out", verify=True, base_weights="as_trained")
    assert report.verification is not None
    assert report.verification["top1_agreement"] == 1.0
    expected = peft_model.merge_and_unload().state_dict()
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert all(torch.equal(value, expected[name]) for name, value in after.items())
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"weight", *weights}


def test_experts_beside_4_bit_layers_are_merged_in_16_bits(bases: Any, tmp_path: Path) -> None:
    base = bases("26b-bfloat16")
    write_adapter(base, tmp_path / "adapter", four_bit=True, target_parameters=["experts.gate_up_proj"])
    report = merge(base, tmp_path / "adapter", tmp_path / "out", verify=True, base_weights="as_trained")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    stacks = {name for name in before if ".experts." in name}
    changed = {name for name in stacks if not torch.equal(before[name], after[name])}
    assert changed == {name for name in stacks if name.endswith("gate_up_proj")}
    assert report.num_quantized == len(
        json.loads((tmp_path / "adapter/gemma_dist.json").read_text())["quantization"]["modules"]
    )


def test_a_16_bit_adapter_is_summed_in_float32_as_peft_does(bases: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base, adapter = bases("31b-bfloat16"), tmp_path / "adapter"
    write_adapter(base, adapter)
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    merge(base, adapter, tmp_path / "out", verify=False, base_weights="as_trained")
    model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
    expected = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    result = tensors_of(tmp_path / "out")
    assert all(torch.equal(result[name], expected[name]) for name in result)


def test_modules_to_save_are_put_in_place(bases: Any, tmp_path: Path) -> None:
    base = bases("e4b-bfloat16")
    peft_model = write_adapter(base, tmp_path / "adapter", modules_to_save=["embedding_projection"])
    merge(base, tmp_path / "adapter", tmp_path / "out", verify=True, base_weights="as_trained")
    name = "model.embed_vision.embedding_projection.weight"
    expected, result = peft_model.merge_and_unload().state_dict()[name], tensors_of(tmp_path / "out")[name]
    assert torch.equal(result, expected)
    assert not torch.equal(result, tensors_of(base)[name])


@pytest.mark.parametrize("name", ["e4b", "31b", "26b"])
def test_the_merged_folder_loads_whole_and_computes_what_was_trained(bases: Any, name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    base = bases(name)
    write_adapter(base, tmp_path / "adapter")
    report = merge(base, tmp_path / "adapter", tmp_path / "out", verify=True, base_weights="as_trained")
    assert report.verification is not None
    assert report.verification["max_logit_difference"] < 1e-4
    assert report.verification["top1_agreement"] == 1.0
    assert "verified" in report.summary()

    _, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    AutoProcessor.from_pretrained(tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_a_sharded_base_gives_the_same_shards_and_an_index(bases: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    base = tmp_path / "base"
    AutoModelForImageTextToText.from_pretrained(bases("31b")).save_pretrained(base, max_shard_size="2MB")
    write_adapter(bases("31b"), tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out", verify=True, base_weights="as_trained")
    merge(bases("31b"), tmp_path / "adapter", tmp_path / "whole", verify=False, base_weights="as_trained")

    shards = {path.name for path in base.glob("*.safetensors")}
    assert len(shards) > 2
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == shards
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == json.loads((base / "model.safetensors.index.json").read_text())
    after, whole = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    assert after.keys() == whole.keys()
    assert all(torch.equal(after[name], whole[name]) for name in after)

    shutil.copy(bases("31b") / "model.safetensors", base)  # what transformers then loads, whatever the index says
    merge(base, tmp_path / "adapter", tmp_path / "both", verify=False, base_weights="as_trained")
    assert [path.name for path in (tmp_path / "both").glob("*.safetensors*")] == ["model.safetensors"]


# --- QLoRA -------------------------------------------------------------------------------------------------------


def rows_of(matrix: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return matrix[start:stop]


@pytest.mark.parametrize("double_quantized", [True, False])
@pytest.mark.parametrize(("name", "dtype"), [("e4b", "float32"), ("e4b", "bfloat16"), ("31b-bfloat16", "bfloat16")])
def test_four_bit_weights_are_the_loaded_models(bases: Any, name: str, dtype: str, double_quantized: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    dequantize_as_gpus_do()
    four_bit: Quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                              "bnb_4bit_use_double_quant": double_quantized}  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(
        bases(name), dtype=dtype, quantization_config=BitsAndBytesConfig(**four_bit)
    )
    tensors = tensors_of(bases(name))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) > 40
    for path, layer in layers.items():
        real = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        weight = tensors[f"{path}.weight"]
        with Workers() as workers:
            stored = partial(rows_of, weight)
            rows = four_bit_rows(workers, stored, path, weight.shape, {**four_bit, "weights_dtype": dtype})
            ours = torch.cat([rows(*block).clone() for block in row_blocks(weight.shape)])
        assert torch.equal(real, ours), path
        assert real.dtype == ours.dtype


def test_as_trained_is_the_trained_function_and_original_is_not(bases: Any, tmp_path: Path) -> None:
    base, adapter = bases("e4b"), tmp_path / "adapter"
    write_adapter(base, adapter, four_bit=True)
    quantization = json.loads((adapter / "gemma_dist.json").read_text())["quantization"]

    trained = merge(base, adapter, tmp_path / "trained", verify=True, base_weights="as_trained")
    assert trained.verification is not None
    assert trained.verification["max_logit_difference"] < 1e-4
    # Frozen 4-bit modules without an adapter count too: the towers and the gates of the per-layer embeddings.
    assert trained.num_quantized == len(quantization["modules"]) > trained.num_adapted
    assert json.loads((tmp_path / "trained" / "gemma_dist.json").read_text())["base_weights"] == "as_trained"

    original = merge(base, adapter, tmp_path / "original", verify=False, base_weights="original")
    assert original.num_quantized == 0
    assert any("differs from what was trained" in note for note in original.notes)
    assert json.loads((tmp_path / "original" / "gemma_dist.json").read_text())["base_weights"] == "original"
    with pytest.raises(CheckpointError, match="does not compute what base"):
        verify(base, [(adapter, 1.0)], tmp_path / "original", quantization=quantization)


def test_16_bit_qlora_is_verified_against_its_own_rounding(bases: Any, tmp_path: Path) -> None:
    write_adapter(bases("31b-bfloat16"), tmp_path / "adapter", four_bit=True)
    report = merge(
        bases("31b-bfloat16"), tmp_path / "adapter", tmp_path / "out", verify=True, base_weights="as_trained"
    )
    assert report.verification is not None
    assert 0 < report.verification["kl"] < report.verification["limit"]["kl"] < 0.01


def test_a_foreign_adapter_is_added_to_the_original_with_a_word(bases: Any, tmp_path: Path) -> None:
    write_adapter(bases("e4b"), tmp_path / "adapter", four_bit=True)
    (tmp_path / "adapter" / "gemma_dist.json").unlink()
    report = merge(bases("e4b"), tmp_path / "adapter", tmp_path / "out", verify=False, base_weights="as_trained")
    assert (report.plan.base_weights, report.num_quantized) == ("original", 0)
    assert any("gemma_dist.json is absent" in note for note in report.notes)


# --- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.fixture
def pair(bases: Any, tmp_path: Path) -> tuple[Path, Path]:
    write_adapter(bases("31b"), tmp_path / "adapter")
    return bases("31b"), tmp_path / "adapter"


@pytest.mark.parametrize("name", ["31b", "31b-bfloat16"])
@pytest.mark.parametrize("wrong", ["adapter left out", "scale doubled"])
def test_verify_notices_a_wrong_merge(bases: Any, name: str, wrong: str, tmp_path: Path) -> None:
    write_adapter(bases(name), tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", tmp_path / "other")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["lora_alpha"] *= 2 if wrong == "scale doubled" else 1e-6
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(settings))
    merge(bases(name), tmp_path / "other", tmp_path / "out", verify=False, base_weights="as_trained")
    with pytest.raises(CheckpointError, match="does not compute what base"):
        verify(bases(name), [(tmp_path / "adapter", 1.0)], tmp_path / "out", quantization=None)


def test_an_interrupted_merge_leaves_nothing(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = pair
    num_calls = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    real = arithmetic.lora_rows
    monkeypatch.setattr(arithmetic, "lora_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(base, adapter, tmp_path / "out", verify=False, base_weights="as_trained")
    assert num_calls == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_what_a_killed_merge_left_is_cleared(pair: Any, tmp_path: Path) -> None:
    half = tmp_path / ".out.tmp" / uuid.uuid4().hex
    half.mkdir(parents=True)
    (half / "model-00009.safetensors").write_bytes(b"half")
    (tmp_path / "out").mkdir()
    base, adapter = pair
    merge(base, adapter, tmp_path / "out", verify=False, base_weights="as_trained")
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {"model.safetensors"}
    assert not (tmp_path / ".out.tmp").exists()


def test_a_folder_of_the_users_with_the_temporary_name_stays(pair: Any, tmp_path: Path) -> None:
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "notes.txt").write_text("precious")
    base, adapter = pair
    merge(base, adapter, tmp_path / "out", verify=False, base_weights="as_trained")
    assert [path.read_text() for path in (tmp_path / ".out.tmp").iterdir()] == ["precious"]


def test_a_taken_or_nested_out_is_refused(pair: Any, tmp_path: Path) -> None:
    base, adapter = pair
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for out, reason in (
        (tmp_path / "full", "exists already"),
        (base, "base's folder"),
        (base / "merged", "base's folder"),
        (adapter / ".." / "adapter", "adapter's folder"),
    ):
        with pytest.raises(ConfigError, match=reason):
            merge(base, adapter, out, verify=False, base_weights="as_trained")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_the_adapters_own_template_wins_and_is_named(pair: Any, tmp_path: Path) -> None:
    base, adapter = pair
    (adapter / "chat_template.jinja").write_text("{{ 'chosen in training' }}")
    report = merge(base, adapter, tmp_path / "out", verify=False, base_weights="as_trained")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 'chosen in training' }}"
    assert report.plan.side_files["chat_template.jinja"].origin == "adapter"
    assert report.plan.side_files["tokenizer.json"].origin == "base"
    assert "from the adapter: chat_template.jinja" in report.summary()
    for name in ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize(
    ("place", "hidden_by"), [("tokenizer_config.json", "chat_template.jinja"), ("chat_template.jinja", None)]
)
def test_a_template_of_the_base_never_hides_that_of_training(
    bases: Any, place: str, hidden_by: str | None, tmp_path: Path
) -> None:
    """transformers prefers chat_template.json to chat_template.jinja, and that to tokenizer_config.json."""
    base, adapter, chosen = tmp_path / "base", tmp_path / "adapter", "{{ 'chosen in training' }}"
    shutil.copytree(bases("31b"), base)
    write_adapter(base, adapter)
    if hidden_by is None:
        (base / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'of the base' }}"}))
        (adapter / place).write_text(chosen)
    else:
        assert (base / hidden_by).is_file()
        settings = json.loads((base / place).read_text())
        (adapter / place).write_text(json.dumps(settings | {"chat_template": chosen}))
    merge(base, adapter, tmp_path / "out", verify=False, base_weights="as_trained")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == chosen
    if hidden_by is None:  # what a processor's own class reads
        assert AutoProcessor.from_pretrained(tmp_path / "out").chat_template == chosen


def test_an_untrained_adapter_is_remarked_on(bases: Any, tmp_path: Path) -> None:
    write_adapter(bases("31b"), tmp_path / "adapter", std=0.0)
    report = merge(bases("31b"), tmp_path / "adapter", tmp_path / "out", verify=False, base_weights="as_trained")
    assert any("never trained" in note for note in report.notes)


def test_a_sister_of_the_base_is_told_apart_by_the_hash_that_training_recorded(pair: Any, tmp_path: Path) -> None:
    """A fine-tuned base has the names and shapes of the other; a renamed copy is the same one."""
    base, adapter = pair
    (adapter / "gemma_dist.json").write_text(json.dumps(fingerprint_base(str(base))))
    shutil.copytree(base, tmp_path / "renamed")
    shutil.copytree(base, tmp_path / "sister")
    weights = {name: 1.001 * weight for name, weight in load_file(base / "model.safetensors").items()}
    save_file(weights, tmp_path / "sister" / "model.safetensors", {"format": "pt"})
    for name, notes in (("renamed", 0), ("sister", 1)):
        report = merge(tmp_path / name, adapter, tmp_path / f"{name}-merged", verify=False, base_weights="as_trained")
        assert sum("other weights than those that the adapter was trained on" in note for note in report.notes) == notes


def test_broken_files_are_refused(pair: Any, tmp_path: Path) -> None:
    base, adapter = pair

    def refused(match: str, base: Path = base, adapter: Path = adapter) -> None:
        with pytest.raises(CheckpointError, match=match):
            merge(base, adapter, tmp_path / "out", verify=False, base_weights="as_trained")
        assert not (tmp_path / "out").exists()

    cut = tmp_path / "cut"
    shutil.copytree(base, cut)
    whole = (base / "model.safetensors").read_bytes()
    for num_bytes in (0, 5, 100, len(whole) - 1):
        (cut / "model.safetensors").write_bytes(whole[:num_bytes])
        refused("not a whole safetensors file", base=cut)
    (cut / "model.safetensors").unlink()
    refused("cannot be read", base=cut)
    refused("cannot be read", adapter=tmp_path / "nowhere")
    refused("neither a folder nor a model", base=tmp_path / "nowhere")

    quantized = json.loads((base / "config.json").read_text()) | {"quantization_config": {"load_in_4bit": True}}
    (cut / "config.json").write_text(json.dumps(quantized))
    refused("holds quantized weights", base=cut)

    record = adapter / "gemma_dist.json"
    record.write_text(json.dumps({"quantization": {"load_in_8bit": True, "modules": ["x"]}}))
    refused("base_weights: original")
    record.unlink()

    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[next(name for name in tensors if "lora_B" in name)][0, 0] = float("nan")
    save_file(tensors, path)
    refused("NaN or infinity")
    path.rename(adapter / "adapter_model.bin")
    refused("pickle")


# --- two at once, full disks, foreign tokenizers -----------------------------------------------------------------

MERGE_WHEN_TOLD = """
import sys, transformers
from gemma_dist.__main__ import main
from gemma_dist.merge import run
print("code 0", flush=True)
for line in sys.stdin:
    print("code", main(["merge", *line.split()]), flush=True)
"""


def test_of_two_merges_into_one_folder_one_is_refused(bases: Any, tmp_path: Path) -> None:
    base = bases("31b")
    expected = {}
    for std, name in ((0.05, "first"), (0.1, "second")):
        write_adapter(base, tmp_path / name, std=std)
        merge(base, tmp_path / name, tmp_path / f"{name}-alone", verify=False, base_weights="as_trained")
        expected[name] = tensors_of(tmp_path / f"{name}-alone")

    command = [sys.executable, "-c", MERGE_WHEN_TOLD]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as one, subprocess.Popen(command, text=True, **pipes) as two:
        workers: dict[str, Any] = {"first": one, "second": two}

        def codes() -> list[int]:
            """What each says next, in the order of their sizes."""
            lines = [next(line for line in worker.stdout if line.startswith("code ")) for worker in workers.values()]
            return sorted(int(line.split()[1]) for line in lines)

        assert codes() == [0, 0]  # everything is loaded
        for trial in range(4):
            out = tmp_path / "results" / f"out-{trial}"
            for name, worker in workers.items():
                worker.stdin.write(f"--base {base} --adapter {tmp_path / name} --out {out}\n")
                worker.stdin.flush()
            assert codes() == [0, 2]
            (winner,) = [Path(folder).name for folder in json.loads((out / "gemma_dist.json").read_text())["adapters"]]
            result = tensors_of(out)
            assert all(torch.equal(tensor, expected[winner][name]) for name, tensor in result.items())
        said = [worker.communicate()[1] for worker in workers.values()]
    assert sum("name another folder" in line for text in said for line in text.splitlines()) == 4
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [f"out-{trial}" for trial in range(4)]


def test_a_killed_merge_neither_blocks_the_next_nor_stays(pair: Any, tmp_path: Path) -> None:
    base, adapter = pair
    script = (
        "import os, signal, sys; from gemma_dist.__main__ import main; from gemma_dist.merge import arithmetic;"
        "arithmetic.lora_rows = lambda *a: os.kill(os.getpid(), signal.SIGKILL);"
        f"main(['merge', '--base', {str(base)!r}, '--adapter', {str(adapter)!r}, '--out', {str(tmp_path / 'out')!r}])"
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / ".out.tmp").glob("*/*")] == ["model.safetensors"]
    merge(base, adapter, tmp_path / "out", verify=False, base_weights="as_trained")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_without_locks_the_slower_merge_is_refused(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)  # as on NFS, which is not mounted here
    base, adapter = pair
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="was written by another process meanwhile"), whole_folder(out, 0):
        merge(base, adapter, out, verify=False, base_weights="as_trained")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]
    assert (out / "model.safetensors").is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def main_merge(base: Path, adapter: Path, out: Path) -> int:
    return main(["merge", "--base", str(base), "--adapter", str(adapter), "--out", str(out)])


def test_a_disk_that_fills_meanwhile_is_named_with_what_is_needed(
    pair: Any, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    base, adapter = pair
    out = small_disk / "out"
    assert main_merge(base, adapter, out) == 2
    assert re.search(r"--out .*out needs \d+\.\d MiB and its disk has 1\.0 MiB free", capfd.readouterr().err)
    with monkeypatch.context() as patch:
        patch.setattr(merge_run, "check_room", lambda *_: None)  # there was room when it looked
        assert main_merge(base, adapter, out) == 2
    said = capfd.readouterr().err
    assert re.search(
        r"disk/out: No space left on device while writing model.safetensors; the folder takes \d+\.\d MiB, and its "
        r"disk has 1\.0 MiB free. Nothing of it is left: make room",
        said,
    )
    assert "Traceback" not in said
    assert list(small_disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert main_merge(base, adapter, out) == 0


def test_a_limit_on_file_sizes_is_a_matter_of_the_users_too(pair: Any, tmp_path: Path) -> None:
    base, adapter = pair
    script = (
        "import resource, sys; from gemma_dist.__main__ import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "sys.exit(main(['merge', *sys.argv[1:]]))"
    )
    words = ["--base", base, "--adapter", adapter, "--out", tmp_path / "o"]
    result = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert re.search(r"^error: .*/o: File too large while writing model.safetensors", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_places_that_are_no_folders_are_refused(pair: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, adapter = pair
    file = tmp_path / "file"
    file.write_text("mine")
    for arguments, told in (
        ((base, adapter, file), "exists already"),
        ((base, adapter, file / "out"), "which is a file"),
        ((base, adapter, file / "deep" / "out"), "which is a file"),
        ((base, adapter, tmp_path / ("long" * 70)), "File name too long"),
        ((base, adapter, Path("/proc/out")), "you may not write in /proc|No such file|disk has 0.0 MiB free"),
        ((base, file, tmp_path / "out"), "the adapter is not a folder"),
        ((file, adapter, tmp_path / "out"), "is a file; name the folder of a model"),
    ):
        assert main_merge(*arguments) == 2
        said = capfd.readouterr().err
        assert re.search(told, said), said
        assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "file"]
    assert file.read_text() == "mine"


@pytest.mark.parametrize("how", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_larger_than_the_embedding_is_refused(bases: Any, how: str, tmp_path: Path) -> None:
    base, adapter, out = bases("e4b"), tmp_path / "adapter", tmp_path / "out"
    write_adapter(base, adapter)
    if how == "tokenizer.json":
        extended = AutoTokenizer.from_pretrained(base)
        extended.add_tokens(["<|own|>"])
        extended.save_pretrained(adapter)
    else:  # a token that tokenizer.json, the base's, does not have: loading gives it the next id
        settings = json.loads((base / how).read_text())
        settings["extra_special_tokens"].append("<|own|>")
        (adapter / how).write_text(json.dumps(settings))
    num_rows = len(AutoTokenizer.from_pretrained(base))
    with pytest.raises(CheckpointError, match=rf"ids up to {num_rows} \('<|own|>'\).* has {num_rows} rows"):
        merge(base, adapter, out, verify=False, base_weights="as_trained")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_the_embedding_of_each_layer_needs_a_row_for_each_token_too(bases: Any, tmp_path: Path) -> None:
    write_adapter(bases("e4b"), tmp_path / "adapter")
    base = tmp_path / "base"
    shutil.copytree(bases("e4b"), base)
    name = "model.language_model.embed_tokens_per_layer.weight"
    tensors = load_file(base / "model.safetensors")
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"but {name} of .* has {len(tensors[name])} rows"):
        merge(base, tmp_path / "adapter", tmp_path / "out", verify=False, base_weights="as_trained")


def test_a_broken_tokenizer_is_not_published(pair: Any, tmp_path: Path) -> None:
    base, adapter = pair
    (adapter / "tokenizer.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"tokenizer of the result cannot be loaded.*tokenizer\.json of the adapter"
    ):
        merge(base, adapter, tmp_path / "out", verify=False, base_weights="as_trained")


# --- adapters of other tools -------------------------------------------------------------------------------------

OTHER_NAMES = {
    "with the adapter's own name": lambda name: re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", name),
    "without PEFT's prefix": lambda name: name.removeprefix("base_model.model."),
    "of the class for text alone": lambda name: name.replace("model.model.language_model.", "model.model."),
    "of transformers 4": lambda name: name.replace("model.model.language_model.", "model.language_model.model."),
    "of the bare language model": lambda name: re.sub(r"base_model\.model\.model\.language_model\.", "", name),
}


def rename(adapter: Path, new_name: Callable[[str], str]) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({new_name(name): tensor for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize("how", list(OTHER_NAMES))
def test_an_adapter_with_other_names_gives_the_same_model(pair: Any, how: str, tmp_path: Path) -> None:
    base, adapter = pair
    merge(base, adapter, tmp_path / "expected", verify=False, base_weights="as_trained")
    rename(adapter, OTHER_NAMES[how])
    report = merge(base, adapter, tmp_path / "out", verify=True, base_weights="as_trained")
    assert any("have names of another tool" in note for note in report.notes)
    expected = tensors_of(tmp_path / "expected")
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert torch.equal(tensor, expected[name]), name


def test_patterns_of_an_adapter_with_another_root_keep_their_modules(pair: Any, tmp_path: Path) -> None:
    """An alpha changes no shape: the sum would be another one without a word."""
    base, adapter = pair
    path = "model.layers.0.self_attn.q_proj"
    settings = json.loads((adapter / "adapter_config.json").read_text())

    def write_pattern(pattern: str) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps(settings | {"alpha_pattern": {pattern: 32}}))

    moved = path.replace("model.", "model.language_model.", 1)
    write_pattern(moved)
    merge(base, adapter, tmp_path / "expected", verify=False, base_weights="as_trained")
    rename(adapter, OTHER_NAMES["of the class for text alone"])
    write_pattern(path)
    merge(base, adapter, tmp_path / "out", verify=True, base_weights="as_trained")
    name = f"{moved}.weight"
    assert torch.equal(tensors_of(tmp_path / "out")[name], tensors_of(tmp_path / "expected")[name])
    write_pattern(r"^model\.layers\.0\..*")
    with pytest.raises(CheckpointError, match="write the pattern for that name"):
        merge(base, adapter, tmp_path / "again", verify=False, base_weights="as_trained")


@pytest.mark.parametrize(
    ("new_name", "told"),
    [
        (lambda name: name.replace("layers.0.", "layers.99."), r"belongs to .*layers\.99.* which the base does not"),
        (lambda name: name.replace(".lora_A.weight", ".lora_A.a.weight").replace(".lora_B.weight", ".lora_B.b.weight"),
         r"holds 2 adapters in one file \(a, b\)"),
        (lambda name: name.replace("q_proj.lora_A.weight", "q_proj.lora_B.bias"), r"bias in the adapter is neither"),
    ],
)  # fmt: skip
def test_names_without_a_place_are_refused_with_the_cause(pair: Any, new_name: Any, told: str, tmp_path: Path) -> None:
    base, adapter = pair
    rename(adapter, new_name)
    with pytest.raises(CheckpointError, match=told):
        merge(base, adapter, tmp_path / "out", verify=False, base_weights="as_trained")


def test_an_adapter_in_a_folder_of_its_own_name_is_pointed_to(pair: Any, tmp_path: Path) -> None:
    base, adapter = pair
    shutil.copytree(adapter, tmp_path / "run" / "tools")
    with pytest.raises(CheckpointError, match=r"but tools in it: give --adapter .*run/tools"):
        merge(base, tmp_path / "run", tmp_path / "out", verify=False, base_weights="as_trained")


# --- several adapters --------------------------------------------------------------------------------------------


def merge_with_peft(base: Path, adapters: dict[Path, float], dtype: str = "float32") -> dict[str, torch.Tensor]:
    """PEFT's own sum, one adapter after the other."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
    names = {f"a{number}": folder for number, folder in enumerate(adapters)}
    peft_model = PeftModel.from_pretrained(model, names["a0"], adapter_name="a0")
    for name, folder in list(names.items())[1:]:
        peft_model.load_adapter(folder, adapter_name=name)
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            for name, folder in names.items():
                module.set_scale(name, adapters[folder])
    peft_model.base_model.set_adapter(list(names))  # for what replaces weights
    merged: dict[str, torch.Tensor] = peft_model.merge_and_unload(adapter_names=list(names)).state_dict()
    return merged


@pytest.fixture
def three(bases: Any, tmp_path: Path) -> tuple[Path, dict[Path, float]]:
    """A base in bfloat16 and adapters of different kinds, ranks and layers, with weights."""
    base = bases("31b-bfloat16")
    write_adapter(base, tmp_path / "a")
    write_adapter(base, tmp_path / "b", r=3, use_rslora=True, target_modules=r".*language_model.*\.(q_proj|up_proj)")
    write_adapter(base, tmp_path / "c", rank_pattern={"q_proj": 2}, modules_to_save=["embedding_projection"])
    return base, {tmp_path / "a": 0.7, tmp_path / "b": -0.3, tmp_path / "c": 1.0}


def test_several_adapters_are_summed_as_peft_does_in_float32(three: Any, tmp_path: Path) -> None:
    base, adapters = three
    merge(base, adapters, tmp_path / "out", verify=True, base_weights="as_trained")
    result, expected, before = tensors_of(tmp_path / "out"), merge_with_peft(base, adapters), tensors_of(base)
    for name, tensor in result.items():
        assert torch.equal(tensor, expected[name].bfloat16()), name
    changed = {name for name in before if not torch.equal(before[name], result[name])}
    assert "model.embed_vision.embedding_projection.weight" in changed
    assert json.loads((tmp_path / "out" / "gemma_dist.json").read_text())["adapters"] == {
        str(folder): weight for folder, weight in adapters.items()
    }


def test_the_sum_of_several_is_pefts_cat(bases: Any, tmp_path: Path) -> None:
    """Which sums up in another order, so the last bits differ."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = bases("31b")
    write_adapter(base, tmp_path / "a")
    write_adapter(base, tmp_path / "b", r=3, lora_alpha=5, target_modules=r".*language_model.*\.(q_proj|up_proj)")
    merge(base, {tmp_path / "a": 0.7, tmp_path / "b": 0.3}, tmp_path / "out", verify=True, base_weights="as_trained")
    model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
    peft_model = PeftModel.from_pretrained(model, tmp_path / "a", adapter_name="a")
    peft_model.load_adapter(tmp_path / "b", adapter_name="b")
    peft_model.base_model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", combination_type="cat")
    peft_model.set_adapter("both")
    expected = peft_model.merge_and_unload(adapter_names=["both"]).state_dict()
    for name, tensor in tensors_of(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)


def test_experts_of_several_adapters_are_summed(bases: Any, tmp_path: Path) -> None:
    base = bases("26b")
    targets: dict[str, Any] = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    write_adapter(base, tmp_path / "a", **targets)
    write_adapter(base, tmp_path / "b", std=0.1, r=2, **targets)
    adapters = {tmp_path / "a": 0.5, tmp_path / "b": 0.25}
    merge(base, adapters, tmp_path / "out", verify=True, base_weights="as_trained")
    expected = merge_with_peft(base, adapters)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(tmp_path / "out").items())


def test_what_peft_does_not_hold_at_once_is_not_verified(bases: Any, tmp_path: Path) -> None:
    base, experts = bases("26b"), ["experts.gate_up_proj", "experts.down_proj"]
    write_adapter(base, tmp_path / "all", target_parameters=experts)
    write_adapter(base, tmp_path / "some", target_parameters=experts[1:])
    write_adapter(base, tmp_path / "tokens", trainable_token_indices=[3, 70])
    two = {tmp_path / "all": 0.5, tmp_path / "some": -1.0}
    with pytest.raises(CheckpointError, match="hold adapters with different target_parameters at once"):
        merge(base, two, tmp_path / "out", verify=True, base_weights="as_trained")
    merge(base, two, tmp_path / "out", verify=False, base_weights="as_trained")
    # An adapter behind one with trained tokens, which PEFT loads in the other order alone.
    report = merge(base, {tmp_path / "tokens": 1.0, tmp_path / "some": -0.5}, tmp_path / "tokens_first", verify=True,
                   base_weights="as_trained")  # fmt: skip
    assert report.num_replaced == 1


def test_one_adapter_with_a_weight_has_the_scale_of_peft(pair: Any, tmp_path: Path) -> None:
    base, adapter = pair
    merge(base, {adapter: 0.3}, tmp_path / "out", verify=True, base_weights="as_trained")
    expected = merge_with_peft(base, {adapter: 0.3})
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(tmp_path / "out").items())


def change_record(adapter: Path, **values: Any) -> None:
    record = json.loads((adapter / "gemma_dist.json").read_text())
    (adapter / "gemma_dist.json").write_text(json.dumps(record | values))


@pytest.mark.parametrize(
    ("second", "change", "weight", "told"),
    [
        ({"use_dora": True}, None, 1.0, "is a DoRA adapter.*no place beside other"),
        ({"modules_to_save": ["embedding_projection"]}, None, 0.5, "which has no weight"),
        ({"target_modules": "all-linear", "exclude_modules": r".*tower.*"}, None, 1.0, "is replaced by .* and changed"),
        ({}, {"quantization": {"load_in_4bit": True}}, 1.0, "held differently.*base_weights: original"),
        ({}, {"base_weights_hash": "other"}, 1.0, "trained on different bases"),
        ({}, "chat_template.jinja", 1.0, "have a chat_template.jinja each"),
    ],
)
def test_adapters_that_have_no_sum_are_refused(
    bases: Any, second: Any, change: Any, weight: float, told: str, tmp_path: Path
) -> None:
    base = bases("31b")
    write_adapter(base, tmp_path / "a", modules_to_save=["embedding_projection"])
    write_adapter(base, tmp_path / "b", **second)
    change_record(tmp_path / "a", base_weights_hash="one")
    if isinstance(change, str):
        for name in "ab":
            (tmp_path / name / change).write_text(name)
    elif change:
        change_record(tmp_path / "b", **change)
    with pytest.raises(CheckpointError, match=told):
        merge(base, {tmp_path / "a": 1.0, tmp_path / "b": weight}, tmp_path / "out", verify=False,
              base_weights="as_trained")  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_weights_are_typed_behind_the_folder(pair: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, adapter = pair
    odd = adapter.with_name("odd=0.5")
    shutil.copytree(adapter, odd)

    def call(out: str, *adapters: object) -> int:
        words = [word for each in adapters for word in ("--adapter", str(each))]
        return main(["merge", "--base", str(base), *words, "--out", str(tmp_path / out)])

    assert call("sum", f"{adapter}=0.7", odd) == 0
    assert call("other", f"{odd}=-2e-1", f"{adapter}=1") == 0
    recorded = [json.loads((tmp_path / name / "gemma_dist.json").read_text())["adapters"] for name in ("sum", "other")]
    assert recorded == [{str(adapter): 0.7, str(odd): 1.0}, {str(odd): -0.2, str(adapter): 1.0}]
    capfd.readouterr()
    for adapters, told in (
        ((f"{adapter}=much",), "'much' is no number"),
        ((f"{adapter}=nan",), "must be finite"),
        ((f"{tmp_path}/nowhere=0.5",), "does not exist"),
        ((adapter, f"{adapter}=2"), "is given twice"),
    ):
        assert call("refused", *adapters) == 2
        assert told in capfd.readouterr().err
    assert not (tmp_path / "refused").exists()


# --- trained tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["e4b", "31b-bfloat16"])
@pytest.mark.parametrize("listed", [[70, 5, 9], {"embed_tokens": [0, 3], "lm_head": [0, 3]}])
def test_trained_tokens_have_the_bits_of_peft(bases: Any, name: str, listed: Any, tmp_path: Path) -> None:
    """Of the tied embedding: its rows are the LM head's too, in training as here."""
    base = bases(name)
    peft_model = write_adapter(base, tmp_path / "adapter", trainable_token_indices=listed)
    report = merge(base, tmp_path / "adapter", tmp_path / "out", verify=True, base_weights="as_trained")
    expected, before, after = peft_model.merge_and_unload().state_dict(), tensors_of(base), tensors_of(tmp_path / "out")
    assert all(torch.equal(tensor, expected.get(name, before[name])) for name, tensor in after.items())
    changed = (after[f"{EMBEDDING}.weight"] != before[f"{EMBEDDING}.weight"]).any(1).nonzero().flatten().tolist()
    assert changed == sorted(listed if isinstance(listed, list) else listed["embed_tokens"])
    assert torch.equal(expected["lm_head.weight"], after[f"{EMBEDDING}.weight"])
    assert report.num_replaced == 1


def test_a_head_that_the_base_has_written_again_gets_the_trained_rows(bases: Any, tmp_path: Path) -> None:
    """transformers ties it whatever its file says; others read it."""
    base, head = tmp_path / "base", "lm_head.weight"
    shutil.copytree(bases("31b"), base)
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {head: tensors[f"{EMBEDDING}.weight"].clone()}, base / "model.safetensors", {"format": "pt"})
    write_adapter(base, tmp_path / "adapter", trainable_token_indices=[70, 5])
    merge(base, tmp_path / "adapter", tmp_path / "out", verify=True, base_weights="as_trained")
    merged = tensors_of(tmp_path / "out")
    assert torch.equal(merged[head], merged[f"{EMBEDDING}.weight"])
    assert not torch.equal(merged[head], tensors[f"{EMBEDDING}.weight"])


TOKENS = "token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("module", "rows", "listed", "told"),
    [
        (EMBEDDING, 2, [1, 50], "replace 2 of its rows, up to 50"),
        (EMBEDDING, 3, [1, 2], r"has shape \[3, 8\]"),
        (EMBEDDING, 2, [1, 1], "does not list once each token"),
        (EMBEDDING, 2, [1, -1], "does not list once each token"),
        (EMBEDDING, 2, None, "does not list once each token"),
        (EMBEDDING, 2, {"lm_head": [1, 2]}, "does not list once each token"),
        ("lm_head", 2, {"lm_head": [1, 2]}, "which this base ties"),
        ("model.other.embed_tokens", 2, [1, 2], "which the base does not have"),
    ],
)
def test_trained_tokens_without_their_place_are_refused(module: str, rows: int, listed: Any, told: str) -> None:
    adapter = {f"base_model.model.{module}.{TOKENS}": ("F32", (rows, 8))}
    with pytest.raises(CheckpointError, match=told):
        plan(factors(Q, 12) | adapter, trainable_token_indices=listed)


def test_tokens_of_an_untied_head_are_its_own() -> None:
    base = BASE | {"lm_head.weight": ("BF16", (50, 8))}
    adapter = {f"base_model.model.lm_head.{TOKENS}": ("F32", (2, 8))}
    settings = SETTINGS | {"trainable_token_indices": {"lm_head": [7, 1]}}
    ops = plan_merge(base, adapter, settings, tied_embeddings=False, quantized_modules=())
    assert [(op.name, op.replaced_by.rows) for op in ops if op.replaced_by] == [("lm_head.weight", (7, 1))]


# --- another dtype, other files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("e4b-bfloat16", "float32"), ("e4b", "bfloat16"), ("e4b", "float16")])
def test_another_dtype_is_the_sum_rounded_once(bases: Any, name: str, dtype: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    base = bases(name)
    write_adapter(base, tmp_path / "adapter", trainable_token_indices=[4])
    merge(base, tmp_path / "adapter", tmp_path / "out", verify=True, base_weights="as_trained", dtype=dtype)
    expected, before, result = (
        merge_with_peft(base, {tmp_path / "adapter": 1.0}),
        tensors_of(base),
        tensors_of(tmp_path / "out"),
    )
    assert result.keys() == before.keys()
    for name, tensor in result.items():
        assert torch.equal(tensor, expected.get(name, before[name]).to(getattr(torch, dtype))), name
    assert any(tensor.isinf().any() for tensor in result.values()), "bounds of clipped layers stay infinite"
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) > 1000


def test_what_float16_cannot_hold_is_named(bases: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases("31b"), base)
    write_adapter(base, tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    tensors[f"{EMBEDDING}.weight"][3, 1] = 70_000
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{EMBEDDING}.weight would hold 70000, and .*float16 ends at 65504"):
        merge(base, tmp_path / "adapter", tmp_path / "out", verify=False, base_weights="as_trained", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_files_of_another_size_are_those_of_save_pretrained(pair: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    base, adapter = pair
    merge(base, adapter, tmp_path / "whole", verify=False, base_weights="as_trained")
    merge(base, adapter, tmp_path / "cut", verify=True, base_weights="as_trained", max_shard_size="900KB")
    merge(tmp_path / "cut", adapter, tmp_path / "one", verify=False, base_weights="as_trained", max_shard_size="1GB")
    whole, cut = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole", dtype="auto")
    model.save_pretrained(tmp_path / "saved", max_shard_size="900KB")
    names = [sorted(path.name for path in (tmp_path / folder).glob("*.safetensors")) for folder in ("cut", "saved")]
    assert names[0] == names[1]
    assert len(names[0]) > 3
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in cut.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "cut" / file, "pt") as shard:
            assert name in set(shard.keys())
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("value", ["5", "5 GB", "0GB", "1.5GB", "5GiB"])
def test_a_size_that_is_none_is_refused(value: str, pair: Any, tmp_path: Path) -> None:
    base, adapter = pair
    words = ["--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--max-shard-size", value]
    assert main(["merge", *map(str, words)]) == 2
    assert not (tmp_path / "out").exists()


# --- the base in 4 bits, with the adapter beside it ---------------------------------------------------------------


@pytest.mark.parametrize(("name", "double"), [("e4b-bfloat16", True), ("31b", False), ("12b-bfloat16", True)])
def test_a_4_bit_folder_loads_as_the_trained_model(
    bases: Any, name: str, double: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By transformers alone, to the last bit of the logits; its tensors are those that transformers would save."""
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    monkeypatch.setattr(stream, "BLOCK_VALUES", 1 << 11)
    base, adapter, out = bases(name), tmp_path / "adapter", tmp_path / "out"
    settings: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                                "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": "float32"}  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(
        base, dtype="float32", quantization_config=BitsAndBytesConfig(**settings)
    )
    model.save_pretrained(tmp_path / "expected")
    modules = [path for path, module in model.named_modules() if isinstance(module, Linear4bit)]
    write_adapter(base, adapter)
    change_record(adapter, quantization=settings | {"modules": modules, "weights_dtype": "float32"})
    merge(base, adapter, out, verify=False, base_weights="as_trained", save_in_4bit=True, max_shard_size="500KB")

    assert len(list(out.glob("model-*.safetensors"))) > 2
    stored = {name: tensor for path in out.glob("model-*") for name, tensor in load_file(path).items()}
    expected = tensors_of(tmp_path / "expected")
    assert expected.keys() <= stored.keys()
    for tensor, value in expected.items():
        if ".quant_state." in tensor:
            ours, theirs = (json.loads(bytes(one.tolist())) for one in (stored[tensor], value))
            assert ours == theirs
        else:
            assert torch.equal(stored[tensor], value), tensor
    from peft import PeftModel

    loaded = AutoModelForImageTextToText.from_pretrained(out, dtype="auto").eval()
    trained = PeftModel.from_pretrained(model, adapter).eval()
    keep_four_bit_exact(loaded)
    keep_four_bit_exact(trained)
    ids = torch.arange(60, 90)[None]
    inputs = {"input_ids": ids, "mm_token_type_ids": 0 * ids}
    with torch.no_grad():
        logits, expected_logits = loaded(**inputs).logits, trained(**inputs).logits
        assert torch.equal(logits, expected_logits)
        with trained.disable_adapter():
            assert not torch.equal(logits, trained(**inputs).logits)


@pytest.mark.parametrize(
    ("settings", "words", "told"),
    [
        ({}, ["--dtype", "float32"], "sums nothing"),
        ({}, ["--verify"], "sums nothing"),
        ({}, ["--base-weights", "original"], "was not trained on a base in 4 bits"),
        ({"use_dora": True}, [], "is a DoRA adapter, of which transformers"),
        ({"trainable_token_indices": [3]}, [], "replaces weights of the base, of which transformers"),
    ],
)
def test_what_does_not_go_with_a_folder_in_4_bits_is_refused(
    settings: Any, words: list[str], told: str, bases: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_adapter(bases("31b"), tmp_path / "adapter", four_bit=True, **settings)
    paths = ["--base", bases("31b"), "--adapter", tmp_path / "adapter", "--out", tmp_path / "out"]
    assert main(["merge", *map(str, paths), "--save-in-4bit", *words]) == 2
    assert told in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_experts_in_4_bits_are_none_that_transformers_loads(bases: Any, tmp_path: Path) -> None:
    write_adapter(bases("26b-bfloat16"), tmp_path / "adapter", four_bit=True)
    held = json.loads((tmp_path / "adapter" / "gemma_dist.json").read_text())["quantization"]
    stacks = ["model.language_model.layers.0.experts.down_proj"]
    change_record(tmp_path / "adapter", quantization=held | {"parameters": stacks})
    with pytest.raises(CheckpointError, match=r"experts.down_proj was held in 4 bits too"):
        merge(bases("26b-bfloat16"), tmp_path / "adapter", tmp_path / "out", verify=False, base_weights="as_trained",
              save_in_4bit=True)  # fmt: skip
