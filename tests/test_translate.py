"""Configs of other tools in our words: what a recipe gets, what `shard` gets; and nothing is lost without a word."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from gemma_dist import recipe, translate_names
from gemma_dist.config import RunConfig, ShardConfig
from gemma_dist.errors import ConfigError
from gemma_dist.recipe import load_config
from gemma_dist.start.theirs import init_from
from gemma_dist.translate import PAGE, Translated, translate, translate_file, with_name_tables

MODEL = "google/gemma-4-E4B-it"
# As the tools' own examples are written, for one and the same run: QLoRA of rank 32, 2 x 4 sequences, three epochs.
CONFIGS = {
    "TRL": f"""
        model_name_or_path: {MODEL}
        dataset_name: org/rows
        use_peft: true
        load_in_4bit: true
        lora_r: 32
        lora_target_modules: all-linear
        max_length: 2048
        per_device_train_batch_size: 2
        gradient_accumulation_steps: 4
        num_train_epochs: 3
        learning_rate: 2.0e-4
        output_dir: out
        assistant_only_loss: true
        """,
    "axolotl": f"""
        base_model: {MODEL}
        load_in_4bit: true
        adapter: qlora
        datasets: [{{path: org/rows, type: chat_template}}]
        sequence_len: 2048
        lora_r: 32
        lora_target_modules: 'language_model.model.layers.[0-9]+.mlp.up_proj'
        micro_batch_size: 2
        gradient_accumulation_steps: 4
        num_epochs: 3
        learning_rate: 0.0002
        fp16:
        evals_per_epoch: 2
        output_dir: out
        """,
    "LLaMA-Factory": f"""
        model_name_or_path: {MODEL}
        quantization_bit: 4
        stage: sft
        lora_rank: 32
        lora_target: all
        dataset: org/rows
        cutoff_len: 2048
        per_device_train_batch_size: 2
        gradient_accumulation_steps: 4
        num_train_epochs: 3.0
        learning_rate: 2.0e-4
        output_dir: out
        plot_loss: true
        """,
    "ms-swift": f"""
        model: {MODEL}
        tuner_type: lora
        quant_bits: 4
        lora_rank: 32
        target_modules: all-linear
        dataset: org/rows
        max_length: 2048
        per_device_train_batch_size: 2
        gradient_accumulation_steps: 4
        num_train_epochs: 3
        learning_rate: 2e-4
        output_dir: out
        deepspeed: zero3
        """,
    "unsloth": f"""
        model: {MODEL}
        data: {{dataset: org/rows}}
        training: {{max_seq_length: 2048, num_epochs: 3, batch_size: 2, gradient_accumulation_steps: 4,
                   learning_rate: 2.0e-4, max_steps: 0, output_dir: out, train_on_completions: true}}
        lora: {{lora_r: 32, target_modules: "q_proj,k_proj"}}
        """,
    "NeMo Automodel": f"""
        step_scheduler: {{global_batch_size: 8, local_batch_size: 2, num_epochs: 3}}
        model: {{_target_: x, pretrained_model_name_or_path: {MODEL}, torch_dtype: torch.bfloat16}}
        peft: {{_target_: y, match_all_linear: true, dim: 32}}
        quantization: {{load_in_4bit: true}}
        packed_sequence: {{max_length: 2048}}
        optimizer: {{_target_: z, lr: 2.0e-4, betas: [0.9, 0.95]}}
        dataset: {{_target_: d, path_or_dataset: org/rows}}
        checkpoint: {{checkpoint_dir: out}}
        distributed: {{strategy: fsdp2}}
        """,
}


def translated(tool: str) -> Translated:
    return translate(yaml.safe_load(CONFIGS[tool]))


@pytest.mark.parametrize("tool", CONFIGS)
def test_one_run_in_the_words_of_six_tools_is_one_recipe(tool: str, tmp_path: Path) -> None:
    found = translated(tool)
    assert (found.tool, found.problems) == (tool, [])
    assert (found.rows, found.shard) == (["hf://datasets/org/rows"], {"max_length": 2048})
    assert found.shard_commands(MODEL) == [
        f"gemma-dist shard hf://datasets/org/rows --model {MODEL} --max-length 2048 --out shards/train"
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(found.to_yaml(), encoding="utf-8")
    config = load_config(path)
    assert (config.tuning, config.model.model_name_or_path, config.data.paths) == ("qlora", MODEL, ["shards/train"])
    assert config.lora is not None
    assert (config.lora.r, config.lora.target_modules) == (32, type(config.lora)().target_modules)
    train = config.train
    assert train.per_device_train_batch_size == 2
    assert train.gradient_accumulation_steps == 4 or train.global_batch_size == 8
    assert (train.num_train_epochs, train.learning_rate, str(train.output_dir)) == (3, 2e-4, "out")


@pytest.mark.parametrize("tool", CONFIGS)
def test_every_setting_is_carried_over_or_left_out_with_a_reason(tool: str) -> None:
    """Whatever the tool names that has a value and is not spoken of by another setting of the recipe."""
    found = translated(tool)
    said = {line.partition(":")[0] for line in found.left_out}
    assert all(found.left_out.values())
    expected = {
        "TRL": {"lora_target_modules", "assistant_only_loss"},
        "axolotl": {"lora_target_modules", "evals_per_epoch"},
        "LLaMA-Factory": {"stage", "lora_target", "plot_loss"},
        "ms-swift": {"target_modules", "deepspeed"},
        "unsloth": {"lora.target_modules", "training.train_on_completions"},
        "NeMo Automodel": {"peft.match_all_linear", "distributed.strategy"},
    }
    assert said == expected[tool]
    for line in found.left_out:
        assert f"#   {line}" in found.to_yaml()


def test_a_value_that_a_recipe_refuses_is_left_out_with_its_rule() -> None:
    found = translate({"base_model": MODEL, "optimizer": "muon", "lr_scheduler": "cosine", "lora_r": 8})
    assert found.recipe["tuning"] == "full"
    assert "lora" not in found.recipe, "without an adapter its rank says nothing"
    assert found.recipe["train"] == {"lr_scheduler_type": "cosine", "output_dir": "runs/translated"}
    ((said, why),) = found.left_out.items()
    assert said == "optimizer: muon"
    assert "adamw_torch" in why


def test_held_out_rows_bring_their_settings_along() -> None:
    values = {"model": MODEL, "train_type": "full", "eval_steps": 10, "save_steps": 20, "output_dir": "o"}
    without = translate(values)
    assert "eval_steps" not in without.recipe["train"]
    assert "data.eval" in without.left_out["eval_steps: 10"]
    for more in ({"val_dataset": "held.jsonl"}, {"split_dataset_ratio": 0.1}):
        found = translate({**values, **more})
        assert found.recipe["data"]["eval"] == "shards/held_out"
        assert (found.recipe["train"]["eval_strategy"], found.recipe["train"]["eval_steps"]) == ("steps", 10)
    assert (found.split, found.held_out) == (0.1, [])
    assert found.shard_commands("M")[0].endswith("--model M --split 0.1 --out shards"), "what the recipe names"
    both = translate({**values, "val_dataset": "my held.jsonl", "split_dataset_ratio": 0.1, "max_length": 8})
    assert both.left_out == {"split_dataset_ratio: 0.1": "held-out rows are named, and evaluated on"}
    command = "gemma-dist shard 'my held.jsonl' --model M --max-length 8 --out shards/held_out"
    assert both.shard_commands("M")[1:] == [command], "the recipe's data.eval is made, too, by words that a shell takes"


@pytest.mark.parametrize(
    ("values", "tuning", "said"),
    [
        ({"finetuning_type": "freeze", "model_name_or_path": "m"}, "full", "finetuning_type: freeze"),
        ({"quantization_bit": 8, "model_name_or_path": "m"}, "lora", "quantization_bit: 8"),
        ({"model": "m", "train_type": "adalora"}, "lora", "train_type: adalora"),
        ({"base_model": "m", "load_in_4bit": True}, "full", "load_in_4bit: True"),
        ({"base_model": "m", "val_set_size": 500}, "full", "val_set_size: 500"),
        ({"base_model": "m", "val_set_size": "some"}, "full", "val_set_size: some"),
        ({"base_model": "m", "datasets": [{"path": "a/b", "split": "x"}]}, "full", "datasets: split: x"),
        ({"base_model": "m", "hub_token": "hf_secret"}, "full", "hub_token: ***"),
        ({"step_scheduler": {}, "optimizer": {"betas": 0.9}}, "full", "optimizer.betas: 0.9"),
        ({"base_model": "m", "warmup_ratio": 0.1, "warmup_steps": 2}, "full", "warmup_ratio: 0.1"),
    ],
)
def test_what_is_not_the_same_here_is_said(values: dict[str, Any], tuning: str, said: str) -> None:
    found = translate(values)
    assert (found.recipe["tuning"], found.split) == (tuning, None)
    assert list(found.left_out) == [said]
    assert "hf_secret" not in found.to_yaml()


def test_a_switch_that_is_off_does_not_undo_one_that_is_on() -> None:
    found = translate({"model": "m", "training": {}, "logging": {"enable_tensorboard": True, "enable_wandb": False}})
    assert (found.recipe["train"]["report_to"], found.left_out) == ("tensorboard", {})


def test_what_contradicts_itself_is_said() -> None:
    values = {"base_model": MODEL, "bf16": False, "output_dir": "o"}
    assert any("train.bf16: false contradicts" in line for line in translate(values).problems)
    assert translate({"base_model": "", "sequence_len": 5}).problems == ["model.model_name_or_path: missing"]


@pytest.mark.parametrize(
    ("values", "tool", "told"),
    [
        ({"a": 1, "b": 2}, None, "none of their keys is among a, b"),
        ({"base_model": "m"}, "other", "'other' is none of"),
        ({"tuning": "lora", "model": {"model_name_or_path": "m"}}, None, "as recipes of this package have"),
    ],
)
def test_what_is_of_no_tool_is_refused(values: dict[str, Any], tool: str | None, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        translate(values, tool)
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=told):
        translate_file(path, tool)


def test_the_tables_name_settings_that_are_there() -> None:
    special = {translate_names.ROWS, translate_names.HELD_OUT, translate_names.SPLIT}
    special |= {translate_names.ADAPTER, translate_names.FOUR_BITS}
    assert set(translate_names.NAMES) == set(translate_names.TELLTALES) == set(translate_names.TOOLS)
    for names in translate_names.NAMES.values():
        for ours in set(names.values()) - special:
            section, _, name = ours.partition(".")
            assert ours in recipe.KEYS or (section == "shard" and name in ShardConfig.model_fields), ours
    optimizers = str(RunConfig.model_fields["train"].annotation.model_fields["optim"].annotation)  # type: ignore[union-attr]
    assert all(f"'{name}'" in optimizers for name in translate_names.OPTIMIZERS.values())


def test_the_page_has_the_tables_of_today() -> None:
    page = (Path(__file__).parents[1] / PAGE).read_text(encoding="utf-8")
    assert with_name_tables(page) == page, "write it anew: python -m gemma_dist.translate"


@pytest.mark.parametrize("tool", CONFIGS)
def test_init_writes_a_recipe_and_says_what_comes_next(tmp_path: Path, tool: str) -> None:
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text(CONFIGS[tool])
    said = init_from(tmp_path / "out", theirs)
    written = load_config(tmp_path / "out" / "recipe.yaml")
    assert (written.tuning, written.lora.r if written.lora else None) == ("qlora", 32)
    assert f"a config of {tool}\n" in said
    assert f"--model {MODEL}" in said
    with pytest.raises(ConfigError, match="is there already"):
        init_from(tmp_path / "out", theirs)
