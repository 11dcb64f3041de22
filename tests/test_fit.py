"""Recipes and launches that do not go together are refused by `check`, with the reason and what to do."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemma_dist.batch_plan import batch_plan
from gemma_dist.errors import ConfigError
from gemma_dist.recipe import load_config
from gemma_dist.topology import Topology, current_topology, read_topology, require_fit, write_recipe_into
from tests.support.ranks import gemma_dist

ROOT = Path(__file__).parents[1]
FULL_BF16 = ("cpu_full", "model.dtype=bfloat16")
# Stages of the package's own configs; None: not by DeepSpeed.
STAGES = {"single": None, "ddp": None, "fsdp2": None, "zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def recipe(name: str, *overrides: str) -> Any:
    return load_config(ROOT / f"launch/{name}.yaml", overrides)


def launch(stage: int | None = None, **changed: Any) -> Topology:
    """A launch whose DeepSpeed config is that of the package, with changes."""
    if stage is None:
        return Topology("here", 2, **({"distributed_type": "MULTI_GPU"} | changed))
    settings = json.loads((ROOT / f"accelerate_configs/deepspeed_zero{stage}.json").read_text())
    zero = settings["zero_optimization"] | changed.pop("zero", {})
    precision = changed.pop("mixed_precision", "no")
    return Topology("here", 2, "DEEPSPEED", precision, settings | {"zero_optimization": zero} | changed)


@pytest.mark.parametrize(
    ("config", "launched", "reason"),
    [
        (FULL_BF16, launch(), r"tuning: full with model.dtype: bfloat16 needs DeepSpeed or FSDP2.*zero1.yaml"),
        (("cpu_lora",), launch(mixed_precision="fp16"), r"fp16: float16 overflows on Gemma.*train.bf16"),
        (("cpu_lora",), launch(2, fp16={"enabled": True}), r"fp16: float16 overflows on Gemma"),
        (("cpu_lora",), launch(mixed_precision="bf16"), r"bf16: the recipe computes in float32"),
        (("cpu_lora",), launch(distributed_type="TP"), r"TP is not supported; accelerate_configs/zero3.yaml and fsdp2"),
        (("cpu_lora",), launch(2, zero={"stage": 0}), r"stage: 0 partitions nothing; use accelerate_configs/ddp.yaml"),
        (
            ("cpu_lora",),
            launch(3, zero={"stage3_gather_16bit_weights_on_model_save": False}),
            r"must be true, or the result would hold empty tensors",
        ),
        (("cpu_lora",), launch(3, zero={"offload_param": {"device": "nvme"}}), r"offload_param.device: nvme .*use cpu"),
        (("cpu_lora",), launch(2, optimizer={"type": "AdamW"}), r"would silently override the recipe's train.optim"),
        (
            ("cpu_lora",),
            launch(2, scheduler={"type": "WarmupLR"}),
            r"would silently override the recipe's train.lr_scheduler",
        ),
        (
            ("cpu_lora",),
            launch(2, gradient_clipping=0.5),
            r"gradient_clipping: 0.5, but train.max_grad_norm .* is 1.0;",
        ),
        (("cpu_lora",), launch(2, train_batch_size=8), r"train_batch_size: 8, but train.global_batch_size .* is 16;"),
        (("cpu_lora",), launch(2, train_micro_batch_size_per_gpu=2), r"_per_gpu: 2, but .*_train_batch_size .* is 4;"),
        (("cpu_lora",), launch(2, gradient_accumulation_steps=4), r"accumulation_steps: 4, but .* of the recipe is 2;"),
        (
            ("cpu_lora",),
            launch(2, bf16={"enabled": True}),
            r"bf16.enabled: true, but train.bf16 of the recipe is false",
        ),
        (FULL_BF16, launch(2, bf16={"enabled": False}), r"bf16.enabled: false, but train.bf16 of the recipe is true"),
        (("cpu_lora",), launch(2, amp={"enabled": True}), r"amp: may change what is learned"),
        (("cpu_lora",), launch(2, torch_autocast={"enabled": True, "dtype": "float16"}), r"torch_autocast: may change"),
        (("cpu_lora",), launch(2, prescale_gradients=True), r"prescale_gradients: may change"),
        (("cpu_lora",), launch(2, bfloat16={"enabled": True}), r"bfloat16: may change"),
        (("cpu_lora",), launch(2, zero={"zero_quantized_gradients": True}), r"zero_quantized_gradients: may change"),
        (("cpu_lora", "optim=adafactor"), launch(2), r"adafactor would not be Adafactor.*ddp.yaml"),
        (("cpu_lora", "optim=sgd"), launch(2, zero_allow_untested_optimizer=False), r"zero_allow_untested_optimizer"),
        (
            ("cpu_lora", "optim=adamw_8bit"),
            launch(3, zero={"offload_optimizer": {"device": "cpu"}}),
            r"adamw_8bit would be replaced by DeepSpeed's CPU Adam.*adamw_torch",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(config: tuple[str, ...], launched: Topology, reason: str) -> None:
    with pytest.raises(ConfigError, match=r"here: 1 problem\n.*" + reason):
        require_fit(recipe(*config), launched)


@pytest.mark.parametrize("clipping", [1.0, 1, "auto"])
def test_what_both_say_alike_goes_together(clipping: Any) -> None:
    agreeing = {"gradient_clipping": clipping, "train_batch_size": 16, "gradient_accumulation_steps": 2}
    require_fit(recipe("cpu_lora"), launch(2, **agreeing))


def test_settings_that_are_off_or_only_tell_go_together() -> None:
    off = {"prescale_gradients": False, "torch_autocast": {"enabled": False}, "communication_data_type": None}
    telling = {"steps_per_print": 10, "wall_clock_breakdown": True, "sequence_parallel_size": 1}
    require_fit(recipe("cpu_lora"), launch(2, **off, **telling))


def test_the_recipe_is_written_into_what_a_deepspeed_config_leaves_out() -> None:
    config, deepspeed = recipe("cpu_lora", "max_grad_norm=0.5"), {"zero_optimization": {"stage": 2}}
    write_recipe_into(deepspeed, config, batch_plan(config, 2))
    assert deepspeed == {
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 0.5,
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": False},
    }


def test_check_compares_a_deepspeed_config_with_the_recipe(shared: Path, tmp_path: Path) -> None:
    """Before anything is read: there is no model and no data."""
    file = shared / "cases" / "data" / "deepspeed_mismatch.json"
    path = tmp_path / "config.yaml"
    section = {"deepspeed_config_file": str(file)}
    path.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": section}))
    for words, launched in (
        (("check", "launch/cpu_full.yaml", "--accelerate-config", path), None),
        (("train", "launch/cpu_full.yaml", f"output_dir={tmp_path}/out"), path),
    ):
        output = gemma_dist(*words, launch=launched, fails=True)
        assert "gradient_clipping: 0.5, but train.max_grad_norm of the recipe is 1.0" in output
        assert "gradient_accumulation_steps: 4, but train.gradient_accumulation_steps of the recipe is 1" in output
        assert "a bug in gemma_dist" not in output
    assert not (tmp_path / "out").exists()


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match="2 problems") as caught:
        require_fit(recipe(*FULL_BF16), launch(mixed_precision="fp16"))
    assert "overflows" in str(caught.value)
    assert "needs DeepSpeed" in str(caught.value)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_full_training_in_bfloat16_goes_with_deepspeed(stage: int) -> None:
    require_fit(recipe(*FULL_BF16), launch(stage))


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_configs_are_read_as_accelerate_reads_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = read_topology(path)
    assert found.zero_stage == STAGES[path.stem.removeprefix("cpu_")]
    assert found.offloads_optimizer == ("offload" in path.stem)
    assert (found.fsdp is not None) == ("fsdp2" in path.stem)
    assert found.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    require_fit(recipe("cpu_lora", "global_batch_size=32"), found)


def test_accelerates_own_keys_are_read_too(tmp_path: Path) -> None:
    section = {"zero_stage": 3, "offload_optimizer_device": "cpu", "zero3_save_16bit_model": True}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "num_processes": 4, "deepspeed_config": section}))
    found = read_topology(path)
    assert (found.zero_stage, found.offloads_optimizer, found.num_processes) == (3, True, 4)
    require_fit(recipe("cpu_lora", "global_batch_size=32"), found)
    section |= {"gradient_clipping": 0.3, "gradient_accumulation_steps": 1}  # as `accelerate config` writes them
    path.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "num_processes": 4, "deepspeed_config": section}))
    with pytest.raises(ConfigError, match=r"1 problem\ngradient_clipping: 0.3, but"):
        require_fit(recipe("cpu_lora"), read_topology(path))
    path.write_text("just words")
    with pytest.raises(ConfigError, match="not an accelerate config"):
        read_topology(path)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ([], "not a DeepSpeed config"),
        ({"train_batch_size": 8}, "it has no section zero_optimization"),
        ({"zero_optimization": None}, "it has no section zero_optimization"),
        ({"zero_optimization": {"stage": "auto"}}, 'stage is "auto"; write 1, 2 or 3'),
        ({"zero_optimization": {"stage": 2}, "bf16": True}, "bf16 is true; write a section"),
        ({"zero_optimization": {"stage": 2, "offload_param": "cpu"}}, 'zero_optimization.offload_param is "cpu"'),
    ],
)
def test_a_deepspeed_config_of_another_shape_is_refused(tmp_path: Path, settings: Any, reason: str) -> None:
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    section = {"deepspeed_config_file": str(tmp_path / "deepspeed.json")}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "deepspeed_config": section}))
    with pytest.raises(ConfigError, match=reason):
        read_topology(path)


def test_a_launch_is_known_from_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert current_topology().zero_stage is None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "accelerate_configs/deepspeed_zero3_offload.json")
    assert (current_topology().zero_stage, current_topology().offloads_optimizer) == (3, True)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "gone.json")
    with pytest.raises(ConfigError, match="no DeepSpeed config can be read there"):
        current_topology()


def test_check_refuses_before_anything_is_loaded(tmp_path: Path) -> None:
    words = ["launch/cpu_full.yaml", "model.dtype=bfloat16", "--accelerate-config", "accelerate_configs/ddp.yaml"]
    output = gemma_dist("check", *words, fails=True)
    assert "needs DeepSpeed" in output
    assert "Traceback" not in output
