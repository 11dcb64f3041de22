"""Every setting of the package with its default: what a YAML recipe may say, and the options of the commands.

A recipe (`launch/*.yaml`) says what a run is: model, data, what trains, batch, schedule. How processes share memory
stands in `accelerate_configs/`, where they run in `slurm/`. Names are Hugging Face's wherever one exists. A key that is
unknown (recipe.py) or contradicts another is refused before a model is touched, with its value and a remedy.

Relative paths in a recipe are relative to the current directory, not to the recipe.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

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


class EncodingConfig(Section):
    """How the chat template turns a trajectory into tokens."""

    chat_template: str | None = Field(
        None,
        description="A Jinja file, or the name of a revision (gemma4_v5); absent: the adapter's or the model's own.",
    )
    enable_thinking: bool = Field(False, description="Render with the template's switch that asks for reasoning.")


class TrainDataConfig(EncodingConfig):
    """Which shards a run trains on. How rows became shards is decided before: see ShardConfig."""

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


class RowConfig(EncodingConfig):
    """How a raw row becomes a checked trajectory, then tokens: settings of every command that reads raw rows."""

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


class ShardConfig(RowConfig):
    """Settings of `shard`, which its manifest records, and of `inspect`, which shows what `shard` would write."""

    max_length: int | None = Field(
        None, gt=0, description="Longest trajectory, in tokens, text and images together; absent: no limit."
    )
    too_long: Literal["drop", "error", "cut_turns"] = Field(
        "error",
        description="What happens to a trajectory above max_length; cut_turns removes whole turns from its end.",
    )


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
    data: TrainDataConfig
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
        return self.model_dump(mode="json", exclude_none=True)


def option(name: str) -> str:
    """What the command line calls a setting: --max-length is max_length."""
    return "--" + name.replace("_", "-")


def _contradictions(config: RunConfig) -> Iterator[str]:
    """What no single section can see, one message each."""
    tuning, train = config.tuning, config.train
    if not config.data.train:
        yield "data.train: nothing to train on; name a folder that `gemma-dist shard` wrote"
    if len({type(source) for source in config.data.train}) > 1:
        yield "data.train: some sources have a weight and some have none; give each one {path: …, weight: …}, or none"
    if train.packing_length is not None and not train.packing:
        yield f"train.packing_length: {train.packing_length}, but packing is off; set train.packing: true, or remove it"
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
