"""Experts in 4 bits: the function of a model whose experts were taken to NF4 and back, wherever the codes lie."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file
from transformers.integrations.moe import _grouped_linear
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

from gemma_dist.config import EXPERT_WEIGHTS, LoraConfig, ModelConfig, QuantizationConfig
from gemma_dist.errors import CheckpointError, ConfigError
from gemma_dist.merge.run import merge
from gemma_dist.model import load
from gemma_dist.model.experts import FourBitExperts, quantize_stack
from gemma_dist.model.host_experts import HostExperts
from gemma_dist.model.record import four_bit_modules, four_bit_stacks
from gemma_dist.recipe import load_config
from gemma_dist.resolve import resolve
from gemma_dist.topology import Topology
from tests.support.corpus import row, shard_rows

ROOT = Path(__file__).resolve().parents[1]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
NF4 = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4"}


def load_26b(model: Path, where: str, dtype: str, lora: LoraConfig | None = None) -> Any:
    """The tiny 26b in 4 bits with experts on `gpu` or `host`, or in full after a way there and back (`reference`)."""
    quantization = QuantizationConfig(bnb_4bit_compute_dtype=dtype, quantize_moe_experts=where != "reference")
    experts = "host" if where == "host" else "gpu"
    settings = ModelConfig(model_name_or_path=str(model), dtype=dtype, experts=experts)
    loaded = load.load_model(settings, quantization, packing=False)
    if where == "reference":
        for module in loaded.modules():
            if isinstance(module, Gemma4TextExperts):
                for name in EXPERT_WEIGHTS:
                    weight = getattr(module, name)
                    weight.data = dequantize_4bit(*quantize_4bit(weight.data, **NF4))
    if lora is None:
        return loaded.eval()
    adapted = load.add_adapter(loaded, lora, zero3=False)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(trained(adapted).items()):
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return adapted.train()


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one step, after another one, in which the experts had their turns."""
    ids = torch.randint(50, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            loss = model(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids), labels=ids).loss
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in trained(model).items()}
    return loss.item(), {name: gradient for name, gradient in gradients.items() if gradient is not None}


@pytest.mark.parametrize("double_quantized", [True, False])
@pytest.mark.parametrize("shape", [(4, 32, 64), (3, 10, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_gets_the_codes_of_bitsandbytes(shape: Any, dtype: torch.dtype, double_quantized: bool) -> None:
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, state = quantize_stack(stack, quant_type="nf4", compress_statistics=double_quantized)
    expected, expected_state = quantize_4bit(stack, **NF4 | {"compress_statistics": double_quantized})
    assert torch.equal(codes, expected)
    assert torch.equal(state.absmax, expected_state.absmax)
    assert torch.equal(dequantize_4bit(codes, state), dequantize_4bit(expected, expected_state))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_and_gradients_are_those_of_dequantized_experts(
    tiny_model: Callable[..., Path], dtype: str, checkpointing: bool
) -> None:
    """To the last bit, though the stacks are made anew in the backward pass."""
    loss, gradients = loss_and_gradients(load_26b(tiny_model("26b"), "reference", dtype, LoraConfig(r=4)))
    for where in ("gpu", "host"):
        model = load_26b(tiny_model("26b"), where, dtype, LoraConfig(r=4))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        found_loss, found = loss_and_gradients(model)
        assert found_loss == loss
        assert found.keys() == gradients.keys()
        assert all(torch.equal(found[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("targets", [BOTH, BOTH[1:]], ids=["both", "down"])
@pytest.mark.parametrize("where", ["gpu", "host"])
def test_adapters_of_experts_are_those_of_peft(
    tiny_model: Callable[..., Path], where: str, targets: list[str], tmp_path: Path
) -> None:
    settings = LoraConfig(r=4, target_parameters=targets)
    reference = load_26b(tiny_model("26b"), "reference", "float32", settings)
    loss, gradients = loss_and_gradients(reference)
    model = load_26b(tiny_model("26b"), where, "float32", settings)
    model.activation_checkpointing_enable({"use_reentrant": False})
    found_loss, found = loss_and_gradients(model)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    for one, folder in ((model, "ours"), (reference, "peft")):
        one.save_pretrained(tmp_path / folder)
    assert (tmp_path / "ours/adapter_model.safetensors").read_bytes() == (
        tmp_path / "peft/adapter_model.safetensors"
    ).read_bytes()
    assert not any("experts" in name for name, _ in model.named_buffers())


def test_in_bfloat16_an_adapter_of_experts_is_not_rounded_with_the_weight() -> None:
    """PEFT rounds weight + update to bfloat16, where an update below 1/256 of the weight is lost; ours adds results."""
    config = tiny_experts_config()
    experts = FourBitExperts(config, torch.bfloat16, torch.bfloat16, quant_type="nf4", compress_statistics=True)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 64, 32, generator=generator).bfloat16()
    codes, state = quantize_stack(weight, quant_type="nf4", compress_statistics=True)
    experts.down_proj.data, experts.down_proj.quant_state = codes, state
    b, a = 1e-2 * torch.randn(4, 64, 5, generator=generator), 1e-2 * torch.randn(4, 5, 32, generator=generator)
    rows, ends = torch.randn(40, 32, generator=generator).bfloat16(), torch.tensor([10, 10, 25, 40], dtype=torch.int32)

    def product(weight: torch.Tensor) -> torch.Tensor:
        return _grouped_linear(rows, weight, ends).double()

    full = dequantize_4bit(codes, state)
    update = torch.bmm(b, a)
    exact = _grouped_linear(rows.float(), update, ends).double()
    experts.adapters["down_proj"] = [(b, a, 1.0)]
    with_adapter = experts._product("down_proj", rows, ends).double()
    del experts.adapters["down_proj"]
    ours = with_adapter - experts._product("down_proj", rows, ends).double()
    pefts = product((full + update.bfloat16()).bfloat16()) - product(full)
    assert (ours - exact).norm() < (pefts - exact).norm()


def tiny_experts_config() -> Any:
    from transformers import Gemma4TextConfig

    return Gemma4TextConfig(hidden_size=64, num_experts=4, moe_intermediate_size=32, hidden_activation="gelu")


def test_the_codes_on_the_host_are_no_parameters(tiny_model: Callable[..., Path]) -> None:
    """So neither DDP nor ZeRO copies them, and none of them goes into a checkpoint."""
    held = load_26b(tiny_model("26b"), "gpu", "float32")
    on_host = load_26b(tiny_model("26b"), "host", "float32")
    stacks = set(four_bit_stacks(held))
    assert len(stacks) == 2 * 6
    assert stacks == set(four_bit_stacks(on_host))
    names = {name for name, _ in held.named_parameters()}
    assert names - stacks == {name for name, _ in on_host.named_parameters()}
    assert names >= stacks
    assert not {name for name, _ in held.named_modules() if "parametrizations" in name}


@pytest.mark.parametrize("order", ["steps", "any"])
def test_a_layer_has_its_own_codes_whenever_its_turn_is(order: str) -> None:
    host, modules = HostExperts(), [torch.nn.Module() for _ in range(5)]
    stacks = {}
    for number, module in enumerate(modules):
        for name in EXPERT_WEIGHTS:
            module.register_parameter(name, None)
            stack = torch.full((2, 8, 8), number + 1.0) + torch.arange(64.0).view(8, 8)
            stacks[number, name] = quantize_stack(stack, quant_type="nf4", compress_statistics=False)
            host.add(module, name, *stacks[number, name])
    host.settle()
    copies = []
    copy_layer = host._copy
    host._copy = lambda layer: (copies.append(layer), copy_layer(layer))[1]  # type: ignore[method-assign, func-returns-value]
    up_and_down = [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
    turns = 3 * up_and_down if order == "steps" else random.Random(0).choices(range(5), k=60)
    for number in turns:
        for name in EXPERT_WEIGHTS:
            codes, state = host.stack(modules[number], name)
            assert torch.equal(dequantize_4bit(codes, state), dequantize_4bit(*stacks[number, name]))
    if order == "steps":  # each layer is copied ahead of its turn, and the two at each end stay
        assert copies == [0, 1, 2, 3, 4, 2, 1, 0, 2, 3, 4, 2, 1, 0, 2, 3, 4, 2, 1, 0]


def test_experts_are_quantized_while_they_are_read(tmp_path: Path) -> None:
    """A process of its own never holds what its experts take in 16 bits: a quarter of it, and one expert at work."""
    code = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.loading import Memory
from gemma_dist.model.tiny import write_tiny_model
from tests.test_experts import load_26b
from pathlib import Path
small, large = Path({str(tmp_path / "small")!r}), Path({str(tmp_path / "large")!r})
write_tiny_model(small, style="26b", dtype="bfloat16", num_hidden_layers=2)
import gemma_dist.model.tiny as tiny
text_config = tiny._text_config
tiny._text_config = lambda *words: text_config(*words) | dict(num_experts=64, moe_intermediate_size=256)
write_tiny_model(large, style="26b", dtype="bfloat16", hidden_size=256, num_hidden_layers=4)
load_26b(small, "gpu", "bfloat16")
memory = Memory()
model = load_26b(large, "gpu", "bfloat16")
print("peak", int(memory.stop()["peak"]))
"""
    environment = {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ | environment
    )
    peak = int(done.stdout.rpartition("peak ")[2])
    in_16_bits = 4 * 64 * 3 * 256 * 256 * 2
    assert 0.25 * in_16_bits < peak < 0.5 * in_16_bits, f"{peak / 1e6:.0f} of {in_16_bits / 1e6:.0f} MB"


@pytest.mark.parametrize("targets", [[], BOTH], ids=["linears", "experts"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_evaluated_and_merged_as_trained(
    tiny_model: Callable[..., Path], dtype: str, targets: list[str], tmp_path: Path
) -> None:
    """What a model of `dtype` learned is what its record lets evaluation load and merging write."""
    base, adapter = tiny_model("26b", dtype), tmp_path / "adapter"
    model = load_26b(base, "gpu", dtype, LoraConfig(r=4, target_parameters=targets))
    model.save_pretrained(adapter)
    quantization = QuantizationConfig(bnb_4bit_compute_dtype=dtype).model_dump()
    quantization |= {"weights_dtype": dtype, "modules": four_bit_modules(model), "parameters": four_bit_stacks(model)}
    (adapter / "gemma_dist.json").write_text(json.dumps({"quantization": quantization, "base_model": str(base)}))

    ids = torch.arange(60, 90)[None]
    evaluated = load.load_for_evaluation(str(base), adapter)
    with torch.no_grad():
        logits = [one.eval()(input_ids=ids, mm_token_type_ids=0 * ids).logits for one in (model, evaluated)]
    assert torch.equal(*logits)

    report = merge(base, adapter, tmp_path / "merged", verify=True, base_weights="as_trained")
    assert report.verification is not None
    assert report.num_quantized == len(quantization["modules"]) + len(quantization["parameters"])
    if not targets:
        stored = load_file(tmp_path / "merged/model.safetensors")
        for path in quantization["parameters"]:
            module, _, name = path.rpartition(".")
            saw = model.get_base_model().get_submodule(module).full(name)
            assert torch.equal(stored[path], saw), path


def test_a_record_without_names_is_refused_by_evaluation_and_merge(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base, adapter = tiny_model("26b", "float32"), tmp_path / "adapter"
    model = load_26b(base, "gpu", "float32", LoraConfig(r=4))
    model.save_pretrained(adapter)
    quantization = QuantizationConfig(bnb_4bit_compute_dtype="float32").model_dump()
    quantization |= {"weights_dtype": "float32", "modules": four_bit_modules(model)}
    for wrong in ({"parameters": None}, {"parameters": [1]}, {"parameters": "experts"}, {"modules": None}):
        (adapter / "gemma_dist.json").write_text(json.dumps({"quantization": quantization | wrong}))
        with pytest.raises(CheckpointError, match=r"gemma_dist\.json"):
            load.load_for_evaluation(str(base), adapter)
        with pytest.raises(CheckpointError, match=r"gemma_dist\.json"):
            merge(base, adapter, tmp_path / "merged", verify=False, base_weights="as_trained")


def test_experts_on_the_host_are_for_models_that_have_some(model: str) -> None:
    settings = ModelConfig(model_name_or_path=model, dtype="float32", experts="host")
    with pytest.raises(ConfigError, match=r"model.experts: host, but .* has no experts, .*: remove it"):
        load.load_model(settings, QuantizationConfig(bnb_4bit_compute_dtype="float32"), packing=False)


@pytest.mark.parametrize(
    ("style", "setting", "named"), [("e4b", "true", False), ("26b", "true", True), ("26b", "false", False)]
)
def test_runs_of_earlier_versions_resume_where_experts_are_as_they_were(
    tiny_model: Callable[..., Path], style: str, setting: str, named: bool, tmp_path: Path
) -> None:
    """Their identity has no word of experts, which then stayed whole."""
    shard_rows(tmp_path, str(tiny_model(style)), [row(number) for number in range(4)])
    overrides = [f"model_name_or_path={tiny_model(style)}", f"data.train={tmp_path}/shards", f"output_dir={tmp_path}"]
    config = load_config(ROOT / "launch/cpu_qlora.yaml", [*overrides, f"quantize_moe_experts={setting}"])
    identity = resolve(config, Topology("", 1)).identity
    assert identity.four_bit is not None
    assert ("quantize_moe_experts" in identity.four_bit) == named


def test_experts_on_the_host_are_4_bit_ones() -> None:
    words = ["model_name_or_path=x", "data.train=x", "output_dir=x", "model.experts=host"]
    for recipe, more in (("cpu_lora", []), ("cpu_qlora", ["quantize_moe_experts=false"])):
        with pytest.raises(ConfigError, match=r"model.experts: host, which is for experts in 4 bits .*; remove it"):
            load_config(ROOT / f"launch/{recipe}.yaml", [*words, *more])
