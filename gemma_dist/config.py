"""Every setting of the package with its default: what a YAML recipe may say, and where the verbs' options start from.

A recipe (`launch/*.yaml`) says what a run is: model, data, what trains, batch, schedule. How processes share memory
stands in `accelerate_configs/`, where they run in `slurm/`. Names are Hugging Face's wherever one exists. A key that is
unknown or contradicts another is refused before a model is touched, with its value and the nearest valid key.

    config = load_config("launch/cpu_lora.yaml", ["learning_rate=1e-4", "lora.r=8"])
    plan = batch_plan(config, world_size=2)

Relative paths in a recipe are relative to the current directory, not to the recipe.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from gemma_dist.errors import ConfigError

# Linear layers of the language model alone. Bare names ("q_proj") also match the vision tower, whose wrapped linears
# PEFT refuses; "all-linear" adapts the tower and the gates of the per-layer embeddings as well.
LANGUAGE_MODEL_LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

# Stacked weights of the experts, of shape (experts, out, in): parameters, not linear layers. In transformers' order.
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


class Section(BaseModel):
    """A group of settings: immutable, and closed to keys that it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True, protected_namespaces=()
    )


class ModelConfig(Section):
    """Which model, and how its weights are held."""

    model_name_or_path: str = Field(description="Folder or hub name of a Gemma 4 model with its processor.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Number format of the weights that are loaded; in float16, Gemma overflows."
    )
    attn_implementation: Literal["sdpa", "eager"] = Field(
        "sdpa",
        description="Attention code; FlashAttention-2 ends at head dimension 256, Gemma 4's global layers have 512.",
    )


class SourceConfig(Section):
    """One source of a mixture."""

    path: str = Field(description="Folder, or URL of one, that `gemma-dist shard` wrote.")
    weight: float = Field(gt=0, description="Share of the sequences of each step, relative to the other sources.")


def _sources(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class RowConfig(Section):
    """How a raw row becomes a checked trajectory, then tokens: settings of every verb that reads raw rows."""

    chat_template: str | None = Field(
        None,
        description="A Jinja file, or the name of a revision (gemma4_v5); absent: the adapter's or the model's own.",
    )
    enable_thinking: bool = Field(False, description="Render with the template's switch that asks for reasoning.")
    max_image_pixels: int = Field(50_000_000, gt=0, description="Largest picture that is decoded, in pixels.")
    text_beside_call: Literal["message", "reasoning"] = Field(
        "message",
        description="Text beside a tool call moves in front of it: as a message of its own, or as reasoning.",
    )
    control_tokens: Literal["reject", "neutralise"] = Field(
        "reject",
        description="A control token of Gemma inside a text: refuse the row, or break it by a zero-width blank.",
    )
    media_root: Path | None = Field(
        None,
        description="Folder that image paths start from and must stay inside; absent: the folder of the data file.",
    )


class DataConfig(RowConfig):
    """Which trajectories, and how a row becomes tokens. What is decided at sharding is also offered by `shard`."""

    train: Annotated[list[str | SourceConfig], BeforeValidator(_sources)] = Field(
        default=[],
        description="Folders or URLs that `gemma-dist shard` wrote: one, a list, or a list of {path, weight}.",
    )
    quarantine: Path | None = Field(
        None,
        description="File that names what is left out: one id, or damaged row group, a line.",
    )
    cache_dir: Path | None = Field(
        None,
        description="Folder that keeps row groups of URLs, and how many packs there are, for all ranks of a node.",
    )
    cache_gb: float = Field(50, gt=0, description="Size of cache_dir, in GB; what was used longest ago goes first.")
    max_length: int | None = Field(
        None, gt=0, description="Longest trajectory, in tokens, text and images together; absent: no limit."
    )
    too_long: Literal["drop", "error", "cut_turns"] = Field(
        "error",
        description="What happens to a trajectory above max_length; cut_turns removes whole turns from its end.",
    )


# The rest is decided when rows are sharded, and recorded there: in a recipe it would do nothing.
TRAINING_ONLY = {"train", "quarantine", "cache_dir", "cache_gb"}
SHARDING_ONLY = set(DataConfig.model_fields) - TRAINING_ONLY - {"chat_template", "enable_thinking"}


class QuantizationConfig(Section):
    """The frozen 4-bit base under a QLoRA adapter (bitsandbytes)."""

    load_in_4bit: bool = Field(
        True, description="Hold the frozen linear layers in 4 bits; `tuning: qlora` means just this."
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit number format.")
    bnb_4bit_use_double_quant: bool = Field(True, description="Quantise the scales too: saves 0.4 bit a weight.")
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16"] = Field(
        description="Number format that 4-bit weights become; absent: model.dtype. In float16, Gemma overflows."
    )


class LoraConfig(Section):
    """The adapter of `tuning: lora` and `tuning: qlora` (PEFT)."""

    r: int = Field(16, gt=0, description="Rank of the two factors of each adapted layer.")
    lora_alpha: float = Field(32, gt=0, description="Scale: the update is multiplied by lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Share of the adapter's inputs set to zero in training.")
    target_modules: str = Field(
        LANGUAGE_MODEL_LINEARS,
        description="Regular expression over full module names; default: the language model's linears.",
    )
    target_parameters: list[str] = Field(
        [],
        description="Stacked weights to adapt as well, by the end of their names: experts.gate_up_proj and "
        "experts.down_proj of 26B-A4B.",
    )
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead.")
    use_dora: bool = Field(False, description="Train a magnitude for each output feature as well (DoRA).")
    bias: Literal["none"] = Field("none", description="Gemma 4's linears have no bias to train.")

    @field_validator("target_modules", mode="before")
    @classmethod
    def _is_a_regex(cls, value: Any) -> Any:
        remedy = f"write one regular expression over full module names, such as {LANGUAGE_MODEL_LINEARS!r}"
        if isinstance(value, list):
            raise ValueError(
                f"a list of bare names also matches the vision tower, whose linears PEFT refuses; {remedy}"
            )
        if value == "all-linear":
            raise ValueError(f"this also adapts the vision tower and the gates of the per-layer embeddings; {remedy}")
        try:
            re.compile(value)
        except (re.error, TypeError) as error:
            raise ValueError(f"not a regular expression ({error}); {remedy}") from None
        return value

    @field_validator("target_parameters")
    @classmethod
    def _are_expert_weights(cls, value: list[str]) -> list[str]:
        for name in value:
            if name.rpartition(".")[2] not in EXPERT_WEIGHTS:
                raise ValueError(
                    f"{name!r} is not a stacked weight of the experts; write some of "
                    f"{[f'experts.{weight}' for weight in EXPERT_WEIGHTS]}, and name linear layers in target_modules"
                )
        return value


class TrainConfig(Section):
    """Steps, batch, schedule, checkpoints: names and meanings of Hugging Face's TrainingArguments."""

    output_dir: Path = Field(description="Folder of checkpoints, metrics.jsonl and the result.")
    num_train_epochs: float = Field(
        1.0, gt=0, description="Times that each trajectory is seen, where max_steps is not set."
    )
    max_steps: int = Field(-1, ge=-1, description="Optimiser steps of the whole run; -1: num_train_epochs decides.")
    learning_rate: float = Field(
        2e-5, gt=0, description="Peak of the schedule; adapters usually want ten times the default."
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="Shape of the learning rate after the warm-up."
    )
    warmup_steps: float = Field(
        0.0, ge=0, description="Optimiser steps up to the peak learning rate; below 1: a share of the whole run."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay per step, times the learning rate.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the mean of gradients.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the mean of squared gradients.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's guard against division by zero.")
    max_grad_norm: float = Field(1.0, ge=0, description="Longer gradients are scaled down to this norm; 0: never.")
    optim: Literal[
        "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor", "sgd"
    ] = Field("adamw_torch", description="Optimiser, by Hugging Face's names.")
    per_device_train_batch_size: int = Field(
        1, gt=0, description="Sequences that one rank takes through the model at once."
    )
    global_batch_size: int | None = Field(
        None,
        gt=0,
        description="Sequences per optimiser step, all ranks together; absent: what the other two sizes make.",
    )
    gradient_accumulation_steps: int | None = Field(
        None,
        gt=0,
        description="Micro-batches of a rank per optimiser step; absent: follows from global_batch_size, or 1.",
    )
    packing: bool = Field(
        False, description="Put several trajectories into each sequence, exactly as if each stood alone."
    )
    packing_length: int | None = Field(
        None, gt=0, description="Most tokens of a packed sequence; absent: the longest trajectory of the corpus."
    )
    dataloader_num_workers: int = Field(
        4, ge=0, description="Threads of each rank that prepare micro-batches; 0: none beside the one that trains."
    )
    gradient_checkpointing: bool = Field(
        True, description="Recompute activations in the backward pass: less memory, about a third more time."
    )
    bf16: bool = Field(description="Compute in bfloat16; absent: as model.dtype says.")
    seed: int = Field(42, ge=0, description="Seed of initial weights, dropout and the order of the data.")
    save_steps: int = Field(
        500, gt=0, description="Optimiser steps between checkpoints; the last step is always saved."
    )
    save_total_limit: int | None = Field(2, gt=0, description="Newest checkpoints that are kept; null: all.")
    step_timeout_s: float = Field(
        1800, gt=0, description="Seconds without a finished step after which every rank says where it stands."
    )
    logging_steps: int = Field(1, gt=0, description="Optimiser steps between printed lines.")
    report_to: Literal["none", "tensorboard"] = Field("none", description="Where metrics go besides metrics.jsonl.")
    resume_from_checkpoint: str = Field(
        "auto",
        description="auto: the newest complete checkpoint in output_dir, if any; never; or a checkpoint's folder.",
    )

    @field_validator("resume_from_checkpoint", mode="before")
    @classmethod
    def _yes_and_no(cls, value: Any) -> Any:
        return {True: "auto", False: "never", None: "never"}.get(value, value) if not isinstance(value, str) else value


class RunConfig(Section):
    """One training run."""

    tuning: Literal["full", "lora", "qlora"] = Field(
        description="What trains: every weight, an adapter (lora), or an adapter on a 4-bit base (qlora)."
    )
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    lora: LoraConfig | None = Field(None, description="The adapter; filled in for lora and qlora.")
    quantization: QuantizationConfig | None = Field(None, description="The 4-bit base; filled in for qlora.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Settings whose default follows from another setting."""
        values = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
        tuning, model = values.get("tuning"), values.get("model")
        dtype = model.get("dtype", ModelConfig.model_fields["dtype"].default) if isinstance(model, dict) else None
        if tuning in ("lora", "qlora"):
            values.setdefault("lora", {})
        if tuning == "qlora":
            values.setdefault("quantization", {})
        if isinstance(values.get("quantization"), dict):
            values["quantization"].setdefault("bnb_4bit_compute_dtype", dtype)
        if isinstance(values.get("train"), dict):
            values["train"].setdefault("bf16", dtype == "bfloat16")
        return values

    @model_validator(mode="after")
    def _no_contradiction(self) -> "RunConfig":
        if problems := list(_contradictions(self)):
            raise ValueError("\n".join(problems))
        return self

    def to_json(self) -> dict[str, Any]:
        """The resolved run as plain JSON values, for `check`, checkpoints and logs."""
        return self.model_dump(mode="json", exclude_none=True, exclude={"data": SHARDING_ONLY})


def option(name: str) -> str:
    """What the command line calls a setting: --max-length is max_length."""
    return "--" + name.replace("_", "-")


def _at_sharding(name: str) -> str:
    return f"decided when rows are sharded, so give {option(name)} to `gemma-dist shard`"


def _contradictions(config: RunConfig) -> Iterator[str]:
    """What no single section can see, one message each."""
    tuning, train = config.tuning, config.train
    if not config.data.train:
        yield "data.train: nothing to train on; name a folder that `gemma-dist shard` wrote"
    if len({type(source) for source in config.data.train}) > 1:
        yield "data.train: some sources have a weight and some have none; give each one {path: …, weight: …}, or none"
    if train.packing_length is not None and not train.packing:
        yield f"train.packing_length: {train.packing_length}, but packing is off; set train.packing: true, or remove it"
    for name in sorted(SHARDING_ONLY):
        if getattr(config.data, name) != DataConfig.model_fields[name].default:
            yield f"data.{name}: {_at_sharding(name)}"
    if tuning == "full" and config.lora is not None:
        yield "lora: an adapter needs tuning: lora or qlora, but tuning is full; remove the section or change tuning"
    if config.lora is not None and config.lora.target_parameters:
        # PEFT adds the adapter to the weight itself, so it never sees the inputs that dropout acts on.
        for name, value in (("lora_dropout", config.lora.lora_dropout), ("use_dora", config.lora.use_dora)):
            if value:
                yield (
                    f"lora.{name}: {str(value).lower()}, which PEFT has for linear layers alone, but "
                    "lora.target_parameters names experts; remove one of the two"
                )
    if tuning != "qlora" and config.quantization is not None:
        yield f"quantization: a 4-bit base needs tuning: qlora, but tuning is {tuning}; remove it or change tuning"
    if tuning == "qlora" and config.quantization is not None and not config.quantization.load_in_4bit:
        yield "quantization.load_in_4bit: false contradicts tuning: qlora; remove it, or set tuning: lora"
    if config.model.dtype == "bfloat16" and not train.bf16:
        yield "train.bf16: false contradicts model.dtype: bfloat16; set train.bf16: true or model.dtype: float32"
    if train.lr_scheduler_type == "constant" and train.warmup_steps:
        yield (
            f"train.warmup_steps: {train.warmup_steps:g}, but lr_scheduler_type constant has no warm-up; "
            "set lr_scheduler_type: constant_with_warmup"
        )
    if train.max_steps == 0:
        yield "train.max_steps: 0 would train nothing; give a number of steps, or -1 to let num_train_epochs decide"


class EvaluateConfig(RowConfig):
    """Settings of `evaluate`: they belong to the command, not to a recipe. Those of rows are for held-out raw rows."""

    max_new_tokens: int = Field(1024, gt=0, description="Longest answer, in tokens, before it counts as cut off.")
    per_device_eval_batch_size: int = Field(8, gt=0, description="Prompts that one rank answers at once.")
    images: Literal["as_is", "blank"] = Field(
        "as_is", description="blank: empty white pictures instead, to see which answers need the real ones."
    )


class MergeConfig(Section):
    """Settings of `merge`."""

    base_weights: Literal["as_trained", "original"] = Field(
        "as_trained",
        description="Add to the base as training saw it (after QLoRA: through 4 bits and back), or as it is.",
    )


@dataclass(frozen=True)
class BatchPlan:
    """How the sequences of an optimiser step are spread: ranks x micro-batch x accumulation = global batch."""

    world_size: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch_size} = {self.world_size} ranks x {self.per_device_train_batch_size} "
            f"micro-batch x {self.gradient_accumulation_steps} accumulation"
        )


def batch_plan(config: RunConfig, world_size: int) -> BatchPlan:
    """Spread the global batch over `world_size` ranks. ConfigError where the sizes do not agree."""
    train = config.train
    micro, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    at_once = world_size * micro
    total = train.global_batch_size or at_once * (accumulation or 1)
    if total % at_once:
        below, above = total - total % at_once, total - total % at_once + at_once
        raise ConfigError(
            f"train.global_batch_size: global batch {total} is not a multiple of {world_size} ranks x {micro} "
            f"micro-batch = {at_once}; use {f'{below} or ' if below else ''}{above}"
        )
    if accumulation and (made := at_once * accumulation) != total:
        raise ConfigError(
            f"train.gradient_accumulation_steps: {world_size} ranks x {micro} micro-batch x {accumulation} steps "
            f"= {made}, but train.global_batch_size is {total}; leave gradient_accumulation_steps out (it becomes "
            f"{total // at_once}) or set global_batch_size: {made}"
        )
    return BatchPlan(world_size, micro, total // at_once, total)


# ---- reading a recipe ------------------------------------------------------------------------------------------------

S = TypeVar("S", bound=Section)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file and `key=value` overrides describe. ConfigError lists every problem that was found."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; recipes to start from are in launch/") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise ConfigError(f"{path}: not a text file; a recipe is a YAML file like those in launch/") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections (model, data, train …), not {values!r}")
    problems = list(_apply_overrides(values, overrides))
    return _validated(RunConfig, values, problems, origin=str(path))


def load_section(kind: type[S], options: Mapping[str, Any]) -> S:
    """A section of its own, from the options of a verb (`max_length` stands for --max-length in messages)."""
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        raise ConfigError(
            "\n".join(
                f"{option(str(item['loc'][0]))} {item['input']}: {item['msg']}. "
                f"{kind.model_fields[str(item['loc'][0])].description}"
                for item in error.errors()
            )
        ) from None


def _validated(kind: type[S], values: dict[str, Any], problems: list[str], *, origin: str) -> S:
    """`values` as a `kind`. Unknown keys are taken out first, so that pydantic can report the rest in the same go."""
    problems += _take_out_unknown(kind, values)
    config = None
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        reported = tuple(problem.partition(" = ")[0] for problem in problems)
        problems += [
            message for message in _messages(error) if not message.startswith(tuple(f"{k}: missing" for k in reported))
        ]
    if config is None or problems:
        raise ConfigError("\n".join([f"{origin}: {len(problems)} problem{'s' * (len(problems) > 1)}", *problems]))
    return config


def _messages(error: ValidationError) -> Iterator[str]:
    """Pydantic's findings as `dotted.key = value: rule (what the setting means)`."""
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "value_error" and not item["loc"]:
            yield from str(item["ctx"]["error"]).splitlines()  # our own cross-checks name their keys themselves
        elif item["type"] == "missing":
            yield f"{key}: missing. {_description(key)}".rstrip()
        else:
            rule = str(item["ctx"]["error"]) if item["type"] == "value_error" else item["msg"]
            yield f"{key} = {item['input']!r}: {rule}. {_description(key)}".rstrip()


# ---- keys: what exists, and what people bring along ------------------------------------------------------------------

SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "quantization": QuantizationConfig,
    "lora": LoraConfig,
    "train": TrainConfig,
}
KEYS = ["tuning", *(f"{section}.{name}" for section, kind in SECTIONS.items() for name in kind.model_fields)]

# Names of LLaMA-Factory, axolotl, ms-swift, TRL, unsloth and DeepSpeed for settings that exist here.
RENAMED = {
    foreign: key
    for key, names in {
        "tuning": "finetuning_type adapter tuner_type train_type use_peft use_lora quantization_bit quant_bits",
        "model.model_name_or_path": "model base_model model_id model_path model_name pretrained_model_name_or_path",
        "model.dtype": "torch_dtype model_dtype precision",
        "model.attn_implementation": "attn_impl flash_attn flash_attention use_flash_attention_2",
        "data.cache_dir": "local_cache cache cache_path",
        "data.train": "dataset datasets dataset_name dataset_path dataset_dir data_path data_files train_file",
        "data.chat_template": "template chat_template_path chat_template_jinja",
        "data.max_length": "cutoff_len sequence_len max_seq_length max_seq_len seq_length seq_len model_max_length",
        "lora.r": "lora_rank lora_r rank",
        "lora.lora_alpha": "alpha",
        "lora.lora_dropout": "dropout",
        "lora.target_modules": "lora_target lora_target_modules lora_target_linear",
        "lora.target_parameters": "lora_target_parameters",
        "train.output_dir": "out_dir output save_dir",
        "train.per_device_train_batch_size": "micro_batch_size batch_size train_micro_batch_size_per_gpu",
        "train.global_batch_size": "train_batch_size total_batch_size effective_batch_size",
        "train.gradient_accumulation_steps": "grad_accum gradient_accumulation grad_accumulation_steps",
        "train.packing": "sample_packing neat_packing padding_free",
        "train.packing_length": "pack_length packing_max_length",
        "train.dataloader_num_workers": "num_workers dataloader_workers preprocessing_num_workers",
        "train.gradient_checkpointing": "activation_checkpointing use_gradient_checkpointing",
        "train.num_train_epochs": "num_epochs epochs max_epochs n_epochs",
        "train.learning_rate": "lr",
        "train.lr_scheduler_type": "lr_scheduler scheduler",
        "train.warmup_steps": "warmup_ratio lr_warmup_steps",
        "train.max_grad_norm": "gradient_clipping grad_clip clip_grad_norm",
        "train.optim": "optimizer optimiser",
        "train.report_to": "use_wandb wandb_project use_tensorboard use_swanlab",
        "train.resume_from_checkpoint": "resume auto_resume_from_checkpoints",
    }.items()
    for foreign in names.split()
}

_WHAT_TRAINS_ON = "always so: the loss is on what the model itself emits; `train: false` on a message leaves it out"
_PROCESSES = (
    "how processes share memory stands in an accelerate config: accelerate launch --config_file accelerate_configs/…"
)
_NON_REENTRANT = (
    "remove it: checkpointing is always non-reentrant here, "
    "since reentrant recomputation gives wrong gradients where layers share keys and values"
)
_EVALUATION = "there is no evaluation inside training; run `gemma-dist evaluate` on a checkpoint"
_VISION = "lora and qlora leave the vision tower alone unless lora.target_modules names it; full trains it"
_PIXELS = "pictures are resized by the model's own image processor; data.max_image_pixels only refuses larger ones"
NOT_SETTINGS = {
    name: reason
    for reason, names in {
        "fp16 overflows on Gemma; use train.bf16, or model.dtype: float32": "fp16 float16 half",
        "8-bit weights are not offered; tuning: qlora holds them in 4 bits": "load_in_8bit",
        _NON_REENTRANT: "gradient_checkpointing_kwargs activation_checkpointing_kwargs use_reentrant use_reentrant_gc",
        _PROCESSES: "deepspeed deepspeed_config zero_stage fsdp fsdp_config device_map num_processes "
        "ddp_find_unused_parameters",
        "not a setting: train.packing leaves no padding to save": "group_by_length length_grouped_sampler",
        "not a setting: shards are always read as a stream, and row groups are shuffled": "streaming buffer_size",
        _WHAT_TRAINS_ON: "assistant_only_loss completion_only_loss train_on_prompt train_on_inputs roles_to_train "
        "train_on_eos mask_history loss_scale train_on_last_turn_only",
        _EVALUATION: "evaluate eval do_eval eval_strategy evaluation_strategy eval_steps eval_dataset val_set_size "
        "test_datasets max_new_tokens per_device_eval_batch_size",
        _VISION: "freeze_vision_tower freeze_vit freeze_multi_modal_projector freeze_aligner finetune_vision_layers",
        _PIXELS: "image_max_pixels max_pixels image_size image_resolution",
        "remove it: this package has one stage, supervised fine-tuning": "stage do_train rlhf_type",
        "remove it: no code from a model folder is ever run": "trust_remote_code",
    }.items()
    for name in names.split()
}


def _hint(key: str) -> str:
    """What to write instead of an unknown `key`: another tool's name, a forgotten section, or the nearest spelling."""
    bare = key.rpartition(".")[2].replace("-", "_").lower()
    if bare in NOT_SETTINGS:
        return NOT_SETTINGS[bare]
    if same := [known for known in KEYS if known.rpartition(".")[2] == bare]:
        return f"here it is {' or '.join(same)}"
    if bare in RENAMED:
        ours = RENAMED[bare]
        name = ours.removeprefix("data.")
        return f"here it is {ours}{f', {_at_sharding(name)}' if name in SHARDING_ONLY else ''}. {_description(ours)}"
    by_name = {name: known for known in KEYS for name in (known, known.rpartition(".")[2])}
    close = difflib.get_close_matches(key, by_name, 1) or difflib.get_close_matches(bare, by_name, 1)
    return f"did you mean {by_name[close[0]]}?" if close else "`gemma-dist check` shows every setting of a recipe"


def _description(key: str) -> str:
    """The sentence under a setting, or the first line about a section."""
    section, _, name = key.partition(".")
    if section in SECTIONS and not name:
        return (SECTIONS[section].__doc__ or "").partition("\n")[0]
    field = SECTIONS.get(section, RunConfig).model_fields.get(name.partition(".")[0] or section)
    return (field.description or "") if field else ""


def _take_out_unknown(kind: type[Section], values: dict[str, Any]) -> Iterator[str]:
    """Remove what RunConfig does not know from `values`, one message each."""
    for key in list(values):
        if key not in kind.model_fields:
            yield f"{key} = {values.pop(key)!r}: unknown key; {_hint(str(key))}"
        elif key in SECTIONS and values[key] is None:
            del values[key]  # a section with all its lines commented out
        elif key in SECTIONS and not isinstance(values[key], dict):
            hint = _hint(key) if key in RENAMED else f"for example {key}.{next(iter(SECTIONS[key].model_fields))}"
            yield f"{key} = {values.pop(key)!r}: {key} is a section of settings; {hint}"
        elif key in SECTIONS:
            section = values[key]
            for name in [name for name in section if name not in SECTIONS[key].model_fields]:
                dotted = f"{key}.{name}"
                yield f"{dotted} = {section.pop(name)!r}: unknown key; {_hint(dotted)}"


def _apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> Iterator[str]:
    """Set each `key=value` in `values`; a bare key finds its section. Yields what cannot be understood."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key or key.startswith("-"):
            yield f"override {override!r}: write key=value, such as learning_rate=1e-4 or lora.r=8"
            continue
        value = _parse_yaml(text, f"override {override!r}")
        homes = [known for known in KEYS if known.rpartition(".")[2] == key]
        section, _, name = (homes[0] if len(homes) == 1 else key).partition(".")
        if not name or section not in SECTIONS:
            values[key] = value
        elif isinstance(values.setdefault(section, {}), dict):
            values[section][name] = value
        elif values[section] is None:
            values[section] = {name: value}


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's scalars, so that 1e-4 is a number and a date is text (PyYAML has 1.1's); repeated keys are refused."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in [
    ("null", r"^(?:~|null|Null|NULL|)$", [*"~nN", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", [*"tTfF"]),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", [*"-+0123456789"]),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$", [*"-+.0123456789"]),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", [*"-+."]),
]:
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Yaml)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and "\n" in text else ""
        raise ConfigError(f"{origin}{line}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{origin}: not YAML: {error}") from None
