"""A wrong recipe is refused whole, early and helpfully; a right one means the same however it is written."""

import contextlib
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gemma_dist import config as settings
from gemma_dist.__main__ import main
from gemma_dist.aliases import NOT_SETTINGS, PAGE, RENAMED, RENAMED_OPTIONS, with_name_table
from gemma_dist.batch_plan import BatchPlan, batch_plan
from gemma_dist.config import (
    LANGUAGE_MODEL_LINEARS,
    EvaluateConfig,
    RunConfig,
    ShardConfig,
)
from gemma_dist.config_merge import ExportConfig, MergeConfig
from gemma_dist.errors import ConfigError
from gemma_dist.recipe import KEYS, SECTIONS, load_config, load_section
from gemma_dist.topology import read_topology

RECIPE = """
tuning: lora
model:
  model_name_or_path: some/model
data:
  train: shards/train
train:
  output_dir: runs/x
"""


@pytest.fixture
def load(tmp_path):
    """Load RECIPE, or another text, with overrides."""

    def load(*overrides: str, text: str = RECIPE) -> RunConfig:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return load


@pytest.fixture
def problems(load):
    """What is wrong with RECIPE, or another text, with overrides."""

    def problems(*overrides: str, text: str = RECIPE) -> str:
        with pytest.raises(ConfigError) as error:
            load(*overrides, text=text)
        return str(error.value)

    return problems


# ---- a right recipe --------------------------------------------------------------------------------------------------


def test_a_minimal_recipe_has_every_default(load):
    config = load()
    assert config.data.train == ["shards/train"]
    assert config.lora is not None
    assert config.lora.target_modules == LANGUAGE_MODEL_LINEARS
    assert config.quantization is None
    assert config.train.bf16
    assert config.train.resume_from_checkpoint == "auto"


def test_the_dumped_run_loads_as_the_same_run(load):
    config = load("tuning=qlora", "max_steps=7")
    assert load(text=yaml.safe_dump(config.to_json())) == config


@pytest.mark.parametrize("key", ["learning_rate", "train.learning_rate"])
@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_an_override_is_a_number_in_every_notation(load, key, text):
    assert load(f"{key}={text}").train.learning_rate == pytest.approx(1e-4)


def test_numbers_in_a_file_are_those_of_yaml_1_2(load):
    config = load(text=RECIPE + "  learning_rate: 1e-4\n  seed: 010\n")
    assert config.train.learning_rate == pytest.approx(1e-4)
    assert config.train.seed == 10, "a leading zero does not mean octal"


def test_text_that_looks_like_a_date_or_a_no_stays_text(load):
    assert str(load("output_dir=2026-01-31").train.output_dir) == "2026-01-31"
    assert load("model_name_or_path=no").model.model_name_or_path == "no"


def test_an_override_may_open_a_section_replace_one_or_hold_a_list(load):
    config = load("r=4", "data={train: other}")
    assert config.lora is not None
    assert config.lora.r == 4
    assert config.data.train == ["other"]
    assert load("data.train=[a, b]").data.train == ["a", "b"]
    mixture = load("data.train=[{path: a, weight: 2}, {path: s3://b, weight: 0.5}]").data.train
    assert [(source.path, source.weight) for source in mixture] == [("a", 2), ("s3://b", 0.5)]
    by_step = "weights=[{from_step: 0, one: 2, b: 1}, {from_step: 7, b: 0.5, one: 0}]"
    assert load("data.train=[{path: a, name: one}, b]", by_step).data.weights_by_step == [(0, [2, 1]), (7, [0, 0.5])]


def test_a_section_with_all_lines_commented_out_is_no_section(load):
    assert load("tuning=full", text=RECIPE + "lora:\n").lora is None


@pytest.mark.parametrize(("text", "meaning"), [("false", "never"), ("true", "auto"), ("runs/x/checkpoint-5",) * 2])
def test_resume_takes_the_words_of_other_tools(load, text, meaning):
    assert load(f"resume_from_checkpoint={text}").train.resume_from_checkpoint == meaning


def test_the_compute_type_of_4_bit_weights_follows_the_model(load):
    for dtype in ("float32", "bfloat16"):
        config = load("tuning=qlora", f"dtype={dtype}")
        assert config.quantization is not None
        assert config.quantization.load_in_4bit
        assert config.quantization.bnb_4bit_compute_dtype == dtype
        assert config.train.bf16 == (dtype == "bfloat16")


def test_bare_keys_name_one_setting_each():
    names = [key.rpartition(".")[2] for key in KEYS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "section", [RunConfig, *SECTIONS.values(), EvaluateConfig, ExportConfig, MergeConfig], ids=lambda c: c.__name__
)
def test_every_setting_says_what_it_is(section):
    for name, field in section.model_fields.items():
        if name not in SECTIONS:
            assert field.description, name
            assert field.description.endswith("."), name


def test_default_targets_are_the_linears_of_the_language_model_alone():
    layer = "model.language_model.layers.3"
    adapted = [f"{layer}.self_attn.{x}_proj" for x in "qkvo"] + [
        f"{layer}.mlp.{x}_proj" for x in ("gate", "up", "down")
    ]
    left = [
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
        "model.audio_tower.layers.0.self_attn.q_proj",
        f"{layer}.per_layer_input_gate",
        "lm_head",
    ]
    assert [name for name in adapted + left if re.fullmatch(LANGUAGE_MODEL_LINEARS, name)] == adapted


def test_names_are_those_of_hugging_face():
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    ours = {"global_batch_size", "packing_length", "sequence_parallel_size", "step_timeout_s", "stop_grace_s"}
    ours |= {"max_eval_samples"}  # as transformers' examples call it
    train = set(settings.TrainConfig.model_fields)
    assert train - ours <= set(SFTConfig.__dataclass_fields__)
    assert set(settings.LoraConfig.model_fields) <= set(LoraConfig.__dataclass_fields__)
    quantization = BitsAndBytesConfig(load_in_4bit=True).to_dict()
    of_axolotl = {"quantize_moe_experts"}
    assert set(settings.QuantizationConfig.model_fields) - of_axolotl <= set(quantization)


def test_choices_are_known_to_hugging_face():
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    fields = settings.TrainConfig.model_fields
    assert set(get_args(fields["lr_scheduler_type"].annotation)) <= {name.value for name in SchedulerType}
    assert set(get_args(fields["optim"].annotation)) <= {name.value for name in OptimizerNames}


# ---- a wrong one -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("foreign", "key"), (RENAMED | RENAMED_OPTIONS).items())
def test_names_of_other_tools_lead_to_ours(problems, foreign, key):
    assert key in KEYS or key in ShardConfig.model_fields
    if foreign not in SECTIONS:
        assert f"{foreign} = 7: unknown key; here it is {key}" in problems(f"{foreign}=7")


@pytest.mark.parametrize(("foreign", "reason"), NOT_SETTINGS.items())
def test_what_is_no_setting_here_says_why(problems, foreign, reason):
    assert f"train.{foreign} = 7: unknown key; {reason}" in problems(f"train.{foreign}=7")


def test_the_names_in_the_docs_are_those_of_the_code():
    page = (Path(__file__).parents[1] / PAGE).read_text(encoding="utf-8")
    assert with_name_table(page) == page, "write it anew: python -m gemma_dist.aliases"


def test_foreign_names_are_no_names_of_ours():
    bare = {key.rpartition(".")[2] for key in KEYS}
    assert not bare & {*RENAMED, *RENAMED_OPTIONS, *NOT_SETTINGS}


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("learning_rat=1", "train.learning_rate"),
        ("train.learning-rate=1", "train.learning_rate"),
        ("lora.targets_module=x", "lora.target_modules"),
        ("train.max_length=8", "give --max-length to `gemma-dist shard`"),
        ("data.max_lenght=8", "did you mean max_length?"),
        ("model.seed=8", "train.seed"),
        ("data.model_name_or_paht=8", "model.model_name_or_path"),
    ],
)
def test_a_misspelt_or_misplaced_key_names_the_nearest_one(problems, override, nearest):
    key, _, value = override.partition("=")
    message = problems(override)
    assert f"{key} = {value!r}" in message or f"{key} = {value}" in message
    assert nearest in message


def test_all_problems_are_told_at_once(problems):
    message = problems("cutoff_len=1", "lora.rank=1", "max_steps=many", "seed=-1", "dtype=float16", "nonsense")
    assert "6 problems" in message
    for key in (
        "cutoff_len = 1",
        "lora.rank = 1",
        "max_steps = 'many'",
        "seed = -1",
        "dtype = 'float16'",
        "'nonsense'",
    ):
        assert key in message


def test_a_section_given_as_a_value_is_told_once(problems):
    message = problems("model=google/gemma-4-E4B-it")
    assert "1 problem\n" in message
    assert "model.model_name_or_path" in message


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["tuning=full", "lora_alpha=8"], "lora: an adapter needs tuning"),
        (["tuning=full", "load_in_4bit=true"], "quantization: a 4-bit base needs tuning: qlora"),
        (["tuning=lora", "load_in_4bit=true"], "quantization: a 4-bit base needs tuning: qlora"),
        (["tuning=qlora", "load_in_4bit=false"], "quantization.load_in_4bit: false contradicts tuning: qlora"),
        (["bf16=false"], "train.bf16: false contradicts model.dtype: bfloat16"),
        (["lr_scheduler_type=constant", "warmup_steps=10"], "constant_with_warmup"),
        (["max_steps=0"], "train.max_steps: 0"),
        (["data.train=[]"], "data.train: nothing to train on"),
        (["data.train=[a, {path: b, weight: 2}]"], "data.train: some sources have a weight and some have none"),
        (["data.train=[{path: a, weight: 2}]", "weights=[{from_step: 0, a: 1}]"], "sources of data.train have weights"),
        (["data.train=[a, a]", "weights=[{from_step: 0, a: 1}]"], "two sources have one name"),
        (["data.train=[a, b]", "weights=[{from_step: 0, a: 1, c: 1}]"], "sources of data.train are ['a', 'b']"),
        (["weights=[{from_step: 5, a: 1}]"], "the first begins at from_step 5; begin at 0"),
        (["weights=[{from_step: 0, a: 1}, {from_step: 0, a: 2}]"], "each a later one than before it"),
        (["weights=[{a: 1}]"], "give each a from_step"),
        (["weights=[{from_step: 0, a: 0}]"], "from_step 0 has weights below 0, or none above"),
        (
            ["data.train=[{path: a, name: from_step}, b]", "weights=[{from_step: 0, b: 1}]"],
            "no source can have the name from_step",
        ),
        (["train.packing_length=4096"], "train.packing_length: 4096, but packing is off"),
        (
            ["data.too_long=drop"],
            "data.too_long = 'drop': unknown key; too_long is decided when rows are sharded, so give --too-long to "
            "`gemma-dist shard`",
        ),
        (["cutoff_len=4096"], "so give --max-length to `gemma-dist shard`"),
        (["target_modules=[q_proj, v_proj]"], "bare names also matches the vision tower"),
        (["target_modules=all-linear"], "also adapts the vision tower"),
        (["target_modules='(q_proj'"], "not a regular expression"),
        (["target_parameters=[q_proj.weight]"], "'q_proj.weight' is not a stacked weight of the experts"),
        (
            ["target_parameters=[experts.down_proj]", "lora_dropout=0.1"],
            "lora.lora_dropout: 0.1, which PEFT has for linear layers alone, but lora.target_parameters names experts",
        ),
        (["target_parameters=[experts.down_proj]", "use_dora=true"], "lora.use_dora: true, which PEFT has for linear"),
        (["attn_implementation=flash_attention_2"], "FlashAttention-2 ends at head dimension 256"),
        (["fp16=true"], "overflows on Gemma"),
        (["model.dtype=float16"], "in float16, Gemma overflows"),
        (["gradient_checkpointing_kwargs={use_reentrant: true}"], "always non-reentrant"),
        (["learning_rate=.nan"], "finite"),
        (["--learning_rate", "1e-4"], "write key=value"),
    ],
)
def test_contradictions_and_dead_ends_come_with_a_remedy(problems, overrides, told):
    assert told in problems(*overrides)


def test_missing_settings_are_named(problems):
    message = problems(text="model: {dtype: float32}")
    for key in ("tuning: missing", "model.model_name_or_path: missing", "data: missing", "train: missing"):
        assert key in message


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("model:\n  a: 1\n bad\n", "recipe.yaml:3"),
        ("model:\n\tdtype: x\n", "recipe.yaml:2"),
        ("train: [1, 2\n", "recipe.yaml:2"),
        ("train:\n  seed: 1\n  seed: 2\n", "recipe.yaml:3"),
    ],
)
def test_broken_yaml_is_told_with_its_line(problems, text, place):
    assert place in problems(text=text)


@pytest.mark.parametrize(
    "text", ["", "just words", "- a\n- b", "!!python/object:os.system {}", "? [a]\n: b", "\x00", "[" * 20_000]
)
def test_what_is_no_recipe_is_refused(problems, text):
    assert "recipe.yaml" in problems(text=text)


def test_of_a_long_value_its_ends_are_told(problems):
    found = problems(f"lora.r={'a' * 100_000}b")
    assert "lora.r = 'aaaa" in found
    assert "aaab': Input should be a valid integer" in found
    assert len(found) < 1000


@pytest.mark.parametrize("value", ["", "[]", "[null]", "true", "[a, [b]]"])
def test_no_folder_is_told_in_words(problems, value):
    found = problems(f"data.train={value}")
    assert any(words in found for words in ("nothing to train on", "has no value", "names no folder; write the one"))
    assert "Input should" not in found


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("output_dir", "train.output_dir: has no value; write one. Folder for"),
        ("model_name_or_path", "model.model_name_or_path: has no value; write one. Folder or"),
        ("tuning", "tuning: has no value; write one. What to train"),
        ("learning_rate", "train.learning_rate: has no value; write one, or leave the key out for its default. Peak"),
        ("model.dtype", "model.dtype: has no value; write one, or leave the key out for its default. Dtype"),
        ("packing", "train.packing: has no value; write one, or leave the key out for its default. Pack"),
        ("data.train", "data.train: has no value; write one. Folders or URLs"),
        ("data.eval", "data.eval: has no value; write one, or [] for none. Held-out"),
        ("data.weights", "data.weights: has no value; write one, or [] for none. Weights of"),
        ("target_parameters", "lora.target_parameters: has no value; write one, or [] for none. Weights of"),
        ("target_modules", "lora.target_modules: has no value; write one, or leave the key out for its default. Reg"),
    ],
)
@pytest.mark.parametrize("nothing", ["", "''", "'  '"])
def test_a_key_with_nothing_behind_it_is_told_in_words(problems, key, nothing, told):
    found = problems(f"{key}={nothing}")
    assert told in found
    assert "None" not in found


@pytest.mark.parametrize("key", ["data.cache_dir", "data.quarantine", "chat_template", "resume_from_checkpoint"])
def test_empty_text_is_not_the_current_folder(problems, key):
    assert "has no value; write one, or leave the key out" in problems(f"{key}=''")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.train=[a, '']", "data.train.1: has no value; write one"),
        ("data.train={path: ''}", "data.train.0.path: has no value; write one"),
        ("data.train=true", "data.train = True: that names no folder"),
        ("output_dir=5", "train.output_dir = 5: this is no path; write one, such as ./5. Folder"),
        ("output_dir=[a]", "train.output_dir = ['a']: this is no path; write one. Folder"),
    ],
)
def test_what_is_no_folder_is_told_by_its_key(problems, override, told):
    assert told in problems(override)


def test_the_home_of_a_user_is_no_folder_of_that_name(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    run = load("output_dir='~/o'", "data.train=[~/a, {path: ~/b}, c~/d]", "model_name_or_path=~/m")
    assert str(run.train.output_dir) == "/home/me/o"
    assert run.data.paths == ["/home/me/a", "/home/me/b", "c~/d"]
    assert run.model.model_name_or_path == "/home/me/m"


def test_an_unknown_key_of_a_source_is_named_once(problems):
    found = problems("data.train=[{path: a, wight: 2}]")
    assert "data.train.0.wight = 2: unknown key" in found
    assert found.count("data.train") == 1


def test_a_key_with_several_values_is_told(capfd, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("tuning: lora\nmodel: {model_name_or_path: m}\ndata: {train: d}\ntrain: {output_dir: o}\n")
    main(["check", str(path), "r=8", "train.seed=1", "lora.r=4", "seed=1"])
    said = capfd.readouterr().err
    assert "lora.r is given 2 times (8, 4): 4, the last, is taken" in said
    assert "seed is given" not in said, "twice the same is once"
    assert load_config(path, ["r=8", "lora.r=4"]) == load_config(path, ["lora.r=4"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("distributed_type: MULTI_GPU\nnum_processes: many\n", "num_processes is 'many'; write how many GPUs"),
        ("distributed_type: MULTI_GPU\nnum_processes: 0\n", "num_processes is 0; write how many GPUs"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: zero3\n", "deepspeed_config is 'zero3'; write a section"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: all}\n", "write a number for zero_stage"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: 3}\n", "no DeepSpeed config"),
        ("distributed_type: 2026-13-45\n", "no accelerate config can be read there"),
        ("[[", "no accelerate config can be read there"),
        ("[" * 20_000, "no accelerate config can be read there"),
    ],
)
def test_a_broken_accelerate_config_is_refused_in_words(tmp_path, text, told):
    path = tmp_path / "accelerate.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(told)):
        read_topology(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="a folder; name a recipe"):
        load_config(tmp_path)


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_override_escapes_as_another_error(key, value):
    path = Path(__file__).parents[1] / "launch" / "cpu_lora.yaml"
    with contextlib.suppress(ConfigError):
        load_config(path, [f"{key}={value}", key, value])


def test_a_verbs_option_is_checked_like_a_setting():
    assert load_section(ShardConfig, {"max_length": 7}).max_length == 7
    with pytest.raises(ConfigError, match=r"--max-length 0: Input should be greater than 0"):
        load_section(ShardConfig, {"max_length": 0})


@pytest.mark.parametrize("old", ["neutralise", "neutralize"])
def test_old_words_for_a_value_mean_todays(old):
    assert ShardConfig(control_tokens=old).control_tokens == "escape"


# ---- batch arithmetic ------------------------------------------------------------------------------------------------


def sizes(micro: int, total: int | None = None, accumulation: int | None = None) -> RunConfig:
    batch = {
        "per_device_train_batch_size": micro,
        "global_batch_size": total,
        "gradient_accumulation_steps": accumulation,
    }
    return RunConfig.model_validate(
        {
            "tuning": "full",
            "model": {"model_name_or_path": "m"},
            "data": {"train": "d"},
            "train": {"output_dir": "o", **{name: size for name, size in batch.items() if size is not None}},
        }
    )


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.one_of(st.none(), st.integers(1, 99)),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_a_plan_keeps_what_was_asked_or_is_refused(world_size, micro, total, accumulation):
    fits = total is None or total % (world_size * micro) == 0
    agrees = total is None or accumulation is None or world_size * micro * accumulation == total
    try:
        plan = batch_plan(sizes(micro, total, accumulation), world_size)
    except ConfigError:
        assert not (fits and agrees)
        return
    assert fits
    assert agrees
    assert (
        plan.world_size * plan.per_device_train_batch_size * plan.gradient_accumulation_steps == plan.global_batch_size
    )
    assert plan.per_device_train_batch_size == micro
    assert plan.global_batch_size == (total or world_size * micro * (accumulation or 1))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 99))
def test_a_refused_global_batch_names_sizes_that_work(world_size, micro, total):
    try:
        batch_plan(sizes(micro, total), world_size)
    except ConfigError as error:
        proposed = [int(size) for size in re.findall(r"\d+", str(error).rpartition("use ")[2])]
        assert proposed
        for size in proposed:
            assert batch_plan(sizes(micro, size), world_size).global_batch_size == size
            assert abs(size - total) < world_size * micro


def test_the_messages_of_batch_arithmetic():
    with pytest.raises(ConfigError, match=r"12 is not a multiple of 2 ranks x 4 micro-batch = 8; use 8 or 16"):
        batch_plan(sizes(4, 12), 2)
    with pytest.raises(ConfigError, match=r"= 8; use 8$"):
        batch_plan(sizes(4, 3), 2)
    with pytest.raises(ConfigError, match=r"it becomes 2\) or set global_batch_size: 32"):
        batch_plan(sizes(4, 16, 4), 2)
    assert batch_plan(sizes(4, 16), 2) == BatchPlan(2, 4, 2, 16)
