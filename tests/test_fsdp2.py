"""FSDP2: what a config may say, what `plan` makes of it, and that a launch on CPU processes really shards.

That it trains what every other launch trains, and that checkpoints move between them, is in the parity matrix.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gemma_dist.__main__ import main
from gemma_dist.config import RunConfig
from gemma_dist.errors import ConfigError
from gemma_dist.model.fsdp import let_4_bits_be_sharded
from gemma_dist.plan.estimate import ADAPTER, GATHERED, GRADIENTS, LOADING, OPTIMIZER
from gemma_dist.plan.run import Request, make_plan
from gemma_dist.recipe import load_config
from gemma_dist.topology import Topology, current_topology, planned_topology, read_topology, require_fit
from tests.support.ranks import long
from tests.support.steps import Counting, measure, prepare

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "accelerate_configs/fsdp2.yaml"


def recipe(name: str, *overrides: str) -> RunConfig:
    return load_config(ROOT / f"launch/{name}.yaml", ["global_batch_size=32", "data.train=none", *overrides])


def with_settings(folder: Path, settings: dict[str, Any], **changed: Any) -> Topology:
    """The package's config with other settings of FSDP; None: left out."""
    values = yaml.safe_load(CONFIG.read_text()) | changed
    section = values["fsdp_config"] | settings
    values["fsdp_config"] = {name: value for name, value in section.items() if value is not None}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return read_topology(folder / "config.yaml")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"fsdp_version": None}, r"fsdp_version: 1 .*write fsdp_version: 2, accelerate_configs/fsdp2.yaml has it so"),
        ({"fsdp_version": 1}, r"fsdp_version: 1 "),
        (
            {"fsdp_auto_wrap_policy": None},
            r"fsdp_auto_wrap_policy: NO_WRAP would gather the whole model.*TRANSFOR",
        ),
        ({"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}, r"fsdp_auto_wrap_policy: SIZE_BASED_WRAP"),
        ({"fsdp_transformer_layer_cls_to_wrap": "Gemma4TextDecoderLayer"}, r"gemma4textdecoderlayer: leave it out"),
        ({"fsdp_reshard_after_forward": "FULL_SHARD"}, r"fsdp_reshard_after_forward: full_shard is for FSDP1"),
        ({"fsdp_cpu_ram_efficient_loading": None}, r"fsdp_cpu_ram_efficient_loading: must be false"),
        ({"fsdp_offload_params": True}, r"fsdp_offload_params: .*zero3_offload.yaml"),
        ({"fsdp_activation_checkpointing": True}, r"recipe's train.gradient_checkpointing says it"),
        ({"fsdp_ignored_modules": "model.lm_head"}, r"fsdp_ignored_modules: model.lm_head: nobody would sum"),
    ],
)
def test_a_config_that_would_fail_or_train_something_else_is_refused(
    tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        require_fit(recipe("cpu_lora"), with_settings(tmp_path, settings))


@pytest.mark.parametrize(
    ("changed", "overrides", "reason"),
    [
        ({"num_processes": 1}, (), r"num_processes: 1 has nothing to share"),
        ({"parallelism_config": {"parallelism_config_tp_size": 2}}, (), r"parallelism_config: is not supported"),
        ({"mixed_precision": "bf16"}, (), r"bf16: the recipe computes in float32"),
        ({}, ("optim=paged_adamw_8bit",), r"train.optim: paged_adamw_8bit cannot step on slices .*use one of adamw_t"),
        ({}, ("optim=adafactor",), r"train.optim: adafactor cannot step on slices"),
    ],
)
def test_a_recipe_that_is_not_compatible_is_refused(
    tmp_path: Path, changed: dict[str, Any], overrides: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        require_fit(recipe("cpu_lora", *overrides), with_settings(tmp_path, {}, **changed))


def test_full_tuning_in_bfloat16_is_taken_as_it_trains_a_float32_copy() -> None:
    require_fit(recipe("cpu_full", "model.dtype=bfloat16", "bf16=true"), read_topology(CONFIG))


@pytest.mark.parametrize("settings", [{}, {"fsdp_version": None, "fsdp_cpu_ram_efficient_loading": None}])
def test_a_rank_sees_what_its_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Through accelerate's own launcher, up to where it would start the ranks."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    expected = with_settings(tmp_path, settings)
    words = ["--config_file", str(tmp_path / "config.yaml"), "--main_process_port", "1", "-m", "gemma_dist"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = current_topology()
    assert (found.distributed_type, found.num_processes) == ("FSDP", 8)
    assert found.fsdp == {name: value for name, value in (expected.fsdp or {}).items() if name in (found.fsdp or {})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows, of which some have images."""
    folder = tmp_path_factory.mktemp("fsdp2")
    prepare(folder, "e4b")
    return folder


def test_check_and_plan_take_the_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch/cpu_lora.yaml", f"model_name_or_path={folder}/model", f"data.train={folder}/shards"]
    launched = ["--accelerate-config", "accelerate_configs/cpu_fsdp2.yaml"]
    for command, said in (("check", "2 ranks"), ("plan", "on 2 GPUs, FSDP2")):
        more = ["--num-tokens", "512"] if command == "plan" else []
        assert main([command, *words, *launched, *more]) == 0
        assert said in "".join(capsys.readouterr())


def planned(name: str, num: int, *overrides: str, config: str = "fsdp2") -> Any:
    topology = planned_topology(ROOT / f"accelerate_configs/{config}.yaml", num)
    return make_plan(recipe(name, *overrides), topology, request=Request(num_tokens=2048)).estimate


def test_plan_divides_weights_gradients_and_states_over_the_ranks() -> None:
    two, eight = (planned("e4b_full_zero3_offload", num, "optim=adamw_torch").parts for num in (2, 8))
    for part in ("token embedding", "other weights", GRADIENTS, OPTIMIZER):
        assert eight[part] == pytest.approx(two[part] / 4, rel=1e-3), part
    assert eight[GATHERED] == two[GATHERED] > 0
    kept = Topology("", 8, "FSDP", fsdp={**(read_topology(CONFIG).fsdp or {}), "reshard_after_forward": "false"})
    whole = make_plan(recipe("31b_lora_zero3"), kept, request=Request(num_tokens=2048)).estimate
    assert whole.parts[GATHERED] > 55 * 2**30, "all layers stay gathered"


def test_plan_counts_an_adapter_in_float32_and_4_bit_weights_before_they_are_sharded() -> None:
    lora = planned("31b_lora_zero3", 8)
    assert lora.parts[ADAPTER] == pytest.approx(4 * lora.num_trained / 8, abs=8)
    qlora = planned("31b_qlora_80gb", 8, "optim=adamw_torch")
    assert qlora.moment == LOADING
    whole = planned("31b_qlora_80gb", 8, "optim=adamw_torch", config="ddp").parts
    assert qlora.parts == {part: whole[part] for part in qlora.parts}
    assert LOADING not in planned("31b_qlora_80gb", 8, "optim=adamw_torch", config="zero3").moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_bit_weights_are_the_same_bytes_under_another_name(dtype: torch.dtype) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 48, bias=False, compute_dtype=dtype, quant_type="nf4").to("cpu")
    before, full = layer.weight.data.clone(), dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    let_4_bits_be_sharded(layer, sent_in=None)
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight.data.view(torch.uint8).view(-1), before.view(-1))
    assert torch.equal(dequantize_4bit(layer.weight.data, layer.weight.quant_state), full)


@long
def test_a_micro_batch_gathers_layers_twice_and_sums_each_unit_once(folder: Path) -> None:
    """Full tuning, of whose gradients no rank may hold all. None of the exchanges is ours: those of the forward pass
    come from the call of the model (the root, which is ours) and from transformers, those of the backward pass from
    accelerate. The root and the embeddings stay gathered in between."""
    found = measure(folder, Counting("cpu_fsdp2", packing=True))
    micro_batch, end = found["micro_batch"]["collectives"], found["end"]["collectives"]
    num_units = micro_batch["gemma_dist"] + micro_batch["transformers"]
    assert micro_batch["gemma_dist"] == 1
    assert num_units > 6, "each text layer is one"
    assert micro_batch["accelerate"] == (num_units - 2) + num_units
    assert end.pop("gemma_dist") <= 2, "the sums of the step, and the norm of the gradients"
    assert sum(end.values()) <= 1
