"""The settings of the package with their defaults: what a YAML recipe may say, and the options of the commands. The
section `data`, and settings of single commands, are in `config_*.py`.

A recipe (`launch/*.yaml`) says what a run is: model, data, what trains, batch, schedule. `accelerate_configs/` say how
its processes share memory, `slurm/` where they run. Names are Hugging Face's wherever one exists. A key that is unknown
(recipe.py) or contradicts another is refused before a model is touched, with its value and a remedy.

Relative paths in a recipe are relative to the current directory, not to the recipe.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from gemma_dist.aliases import current_value
from gemma_dist.config_data import EncodingConfig, TrainDataConfig
from gemma_dist.contradictions import contradictions
from gemma_dist.settings import EvalInTraining, Section
from gemma_dist.visible import masked_in

# Linear layers of the language model alone. Bare names ("q_proj") also match the vision tower, whose wrapped linears
# PEFT refuses; "all-linear" adapts the tower and the gates of the per-layer embeddings as well.
LANGUAGE_MODEL_LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

# Stacked weights of the experts, of shape (experts, out, in): parameters, not linear layers. In transformers' order.
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
FOUR_BIT_BLOCK_SIZE = 64  # 4-bit weights that share a scale: bitsandbytes' default


def option(name: str) -> str:
    """What the command line calls a setting: --max-length is max_length."""
    return "--" + name.replace("_", "-")


class ModelConfig(Section):
    """Which model, and how its weights are held."""

    model_name_or_path: str = Field(description="Folder or Hub name of a Gemma 4 model with its processor.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Dtype in which the weights are loaded; in float16, Gemma overflows."
    )
    attn_implementation: Literal["sdpa", "flex_attention", "eager"] = Field(
        "sdpa",
        description="Attention kernel; flex_attention: packs on GPUs. FlashAttention-2 ends at head dimension 256.",
    )
    experts: Literal["gpu", "host"] = Field(
        "gpu", description="Where 4-bit experts (26B-A4B) lie; host: there, each layer copied ahead of its use."
    )
    ple: Literal["auto", "host", "gpu"] = Field(
        "auto", description="Where per-layer embeddings (E2B, E4B) are; host, auto if frozen: in the base's file."
    )


class RowConfig(EncodingConfig):
    """How a raw row becomes a checked trajectory, then tokens: settings of every command that reads raw rows."""

    max_row_bytes: int = Field(
        256 << 20, gt=0, description="Largest row that is read, in bytes: its JSON, or its columns, images included."
    )
    max_image_pixels: int = Field(50_000_000, gt=0, description="Largest image that is decoded, in pixels.")
    max_row_pixels: int = Field(
        1_000_000_000, gt=0, description="Most pixels of a row: all of its images together, decoded one at a time."
    )
    text_beside_call: Literal["message", "reasoning"] = Field(
        "message", description="Text in a call's message is moved before the call: as its own message, or as reasoning."
    )
    control_tokens: Annotated[Literal["reject", "escape"], BeforeValidator(current_value)] = Field(
        "reject",
        description="A control token of Gemma inside a string: reject the row, or escape it by a zero-width space.",
    )
    arrow_nulls: Literal["auto", "drop", "keep"] = Field(
        "auto",
        description="Null arguments, as Arrow fills them in: drop or keep all; auto: as the tool's schema shows.",
    )
    media_root: Path | None = Field(
        None,
        description="Folder that image paths are relative to and must stay inside; default: the data file's folder.",
    )
    schemas: Literal["as_given", "simplify"] = Field(
        "as_given", description="Schemas of tools as given, or in an equal spelling that the chat template can show."
    )
    unroll: Literal["none", "reasoning"] = Field(
        "none", description="reasoning: make one sample for each user turn that has thoughts, so that all are trained."
    )


class ShardConfig(RowConfig):
    """Settings of `shard`, which its manifest records, and of `inspect`, which shows what `shard` would write."""

    max_length: int | None = Field(
        None, gt=0, description="Maximum length of a trajectory, in tokens of text and images; default: no limit."
    )
    too_long: Literal["drop", "error", "cut_turns"] = Field(
        "error", description="What to do with a longer trajectory; cut_turns removes whole turns from its end."
    )


class QuantizationConfig(Section):
    """The frozen 4-bit base under a QLoRA adapter (bitsandbytes)."""

    load_in_4bit: bool = Field(True, description="Load the frozen linear layers in 4 bits, as qlora requires.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type.")
    bnb_4bit_use_double_quant: bool = Field(True, description="Quantize the scales as well: saves 0.4 bits per weight.")
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16"] = Field(
        description="Dtype that 4-bit weights are dequantized to; default: model.dtype. In float16, Gemma overflows."
    )
    quantize_moe_experts: bool = Field(
        True, description="Load the experts of 26B-A4B, nearly all of its weights, in 4 bits as well."
    )


class LoraConfig(Section):
    """The adapter of `tuning: lora` and `tuning: qlora` (PEFT)."""

    r: int = Field(16, gt=0, description="Rank of the low-rank update of each adapted layer.")
    lora_alpha: float = Field(32, gt=0, description="Scaling: the update is multiplied by lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability on the adapter's input.")
    target_modules: str = Field(
        LANGUAGE_MODEL_LINEARS,
        description="Regular expression over full module names; default: the linear layers of the language model.",
    )
    target_parameters: list[str] = Field(
        [],
        description="Weights of experts (26B-A4B) to adapt as well: experts.gate_up_proj, experts.down_proj.",
    )
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead (rank-stabilized LoRA).")
    use_dora: bool = Field(False, description="Also train a magnitude for each output feature (DoRA).")
    bias: Literal["none"] = Field("none", description="Which biases to train: Gemma 4's linear layers have none.")

    @field_validator("target_modules", mode="before")
    @classmethod
    def _is_a_regex(cls, value: object) -> object:
        remedy = f"write one regular expression over full module names, such as {LANGUAGE_MODEL_LINEARS!r}"
        if isinstance(value, list):
            raise ValueError(
                f"a list of bare names also matches the vision tower, whose linears PEFT refuses; {remedy}"
            )
        if value == "all-linear":
            raise ValueError(f"this also adapts the vision tower and the gates of the per-layer embeddings; {remedy}")
        if not isinstance(value, str):
            raise ValueError(f"not a regular expression; {remedy}")
        try:
            re.compile(value)
        except re.error as error:
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


class TrainConfig(EvalInTraining):
    """Steps, batch, schedule, checkpoints, evaluation: names and meanings of Hugging Face's TrainingArguments."""

    output_dir: Path = Field(description="Folder for checkpoints, metrics.jsonl and the trained adapter or model.")
    num_train_epochs: float = Field(1.0, gt=0, description="Number of passes over the data, unless max_steps is set.")
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps of the whole run; -1: num_train_epochs decides.")
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate; adapters usually want ten times this.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="Learning rate schedule after warmup."
    )
    warmup_steps: float = Field(
        0.0, ge=0, description="Optimizer steps until the peak learning rate; below 1: a fraction of the whole run."
    )
    weight_decay: float = Field(
        0.0, ge=0, description="AdamW's decoupled weight decay, multiplied by the learning rate."
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta1: decay of the first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW beta2: decay of the second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW epsilon, added to the denominator.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping threshold (global L2 norm); 0 disables it.")
    optim: Literal[
        "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor", "sgd"
    ] = Field("adamw_torch", description="Optimizer, by its name in transformers.")
    per_device_train_batch_size: int = Field(
        1, gt=0, description="Sequences per rank in one forward pass: the micro-batch."
    )
    global_batch_size: int | None = Field(
        None, gt=0, description="Sequences per optimizer step, all ranks; default: ranks x micro-batch x accumulation."
    )
    gradient_accumulation_steps: int | None = Field(
        None, gt=0, description="Micro-batches per rank and optimizer step; default: from global_batch_size, or 1."
    )
    packing: bool = Field(False, description="Pack several trajectories into each sequence; none attends to another.")
    packing_length: int | None = Field(
        None, gt=0, description="Maximum length of a packed sequence, in tokens; default: the longest trajectory."
    )
    sequence_parallel_size: int = Field(1, gt=0, description="Ranks that share each packed sequence, in slices.")
    dataloader_num_workers: int = Field(
        4, ge=0, description="Threads per rank that prepare micro-batches; 0: prepare them in the main thread."
    )
    gradient_checkpointing: bool = Field(
        True, description="Recompute activations in the backward pass: less memory, about a third more time."
    )
    activation_offloading: bool = Field(
        False,
        description="Keep the inputs of recomputed layers in host memory until the backward pass: saves GPU memory, "
        "costs the copies.",
    )
    torch_compile: bool = Field(False, description="Compile the text layers; for full and lora, one process or DDP.")
    bf16: bool = Field(description="Compute in bfloat16; default: whether model.dtype is bfloat16.")
    seed: int = Field(42, ge=0, description="Random seed of initial weights, dropout and data order.")
    save_steps: int = Field(
        500, gt=0, description="Optimizer steps between checkpoints; the last step is always saved."
    )
    save_total_limit: int | None = Field(2, gt=0, description="Number of newest checkpoints to keep; null: all.")
    step_timeout_s: float = Field(
        1800, gt=0, description="Seconds that a step may take before the run ends and says where every rank stands."
    )
    stop_grace_s: float | None = Field(
        None, gt=0, description="Seconds from a signal to stop until the run is killed; null: no limit is known."
    )
    logging_steps: int = Field(1, gt=0, description="Optimizer steps between printed lines.")
    report_to: Literal["none", "tensorboard", "wandb", "trackio", "mlflow", "swanlab"] = Field(
        "none", description="Where to log metrics besides metrics.jsonl."
    )
    resume_from_checkpoint: str = Field(
        "auto", description="A checkpoint folder, never, or auto: the newest complete checkpoint in output_dir, if any."
    )

    @field_validator("resume_from_checkpoint", mode="before")
    @classmethod
    def _yes_and_no(cls, value: object) -> object:
        """Take true for auto, and false or an empty value for never."""
        if value in ("auto", True):
            return "auto"
        if value in ("never", False, None):
            return "never"
        return value


class RunConfig(Section):
    """One training run."""

    tuning: Literal["full", "lora", "qlora"] = Field(
        description="What to train: all weights (full), an adapter (lora), or an adapter on a 4-bit base (qlora)."
    )
    model: ModelConfig
    data: TrainDataConfig
    train: TrainConfig
    lora: LoraConfig | None = Field(None, description="The adapter; filled in for lora and qlora.")
    quantization: QuantizationConfig | None = Field(None, description="The 4-bit base; filled in for qlora.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Mapping[str, object]) -> dict[str, object]:
        """Settings whose default follows from another setting. What is no section is left to pydantic to refuse."""
        filled = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
        tuning = filled.get("tuning")
        if tuning in ("lora", "qlora"):
            filled.setdefault("lora", {})
        if tuning == "qlora":
            filled.setdefault("quantization", {})
        model, quantization, train = filled.get("model"), filled.get("quantization"), filled.get("train")
        dtype = None
        if isinstance(model, dict):
            dtype = model.get("dtype", ModelConfig.model_fields["dtype"].default)
        if isinstance(quantization, dict):
            quantization.setdefault("bnb_4bit_compute_dtype", dtype)
        if isinstance(train, dict):
            train.setdefault("bf16", dtype == "bfloat16")
        return filled

    @model_validator(mode="after")
    def _no_contradiction(self) -> "RunConfig":
        if problems := list(contradictions(self)):
            raise ValueError("\n".join(problems))
        return self

    @property
    def ple_on_host(self) -> bool:
        """Whether per-layer embeddings, where the model has some, stay in the base's file."""
        return self.model.ple == "host" or (self.model.ple == "auto" and self.tuning != "full")

    def to_json(self) -> dict[str, Any]:
        """The resolved run as plain JSON values, for `check`, checkpoints and logs: without credentials, which may be
        others when it goes on."""
        return masked_in(self.model_dump(mode="json", exclude_none=True))


class EvaluateConfig(RowConfig):
    """Settings of `evaluate`: they belong to the command, not to a recipe. Those of rows are for held-out raw rows."""

    max_new_tokens: int = Field(
        1024, gt=0, description="Maximum number of tokens to generate; an answer that reaches it counts as cut off."
    )
    per_device_eval_batch_size: int = Field(32, gt=0, description="Most answers that one rank writes at a time.")
    max_batch_tokens: int = Field(
        131_072,
        gt=0,
        description="Most tokens of prompts and answers (as long as they may get) that one rank holds at a time; fewer "
        "where memory is short.",
    )
    num_samples: int = Field(1, gt=0, description="Answers to each decision point; several need a temperature.")
    temperature: float = Field(
        0.0, ge=0, validate_default=True, description="Of sampling; 0: always the likeliest token."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Sample among the likeliest tokens of this share; 1: all.")
    top_k: int = Field(0, ge=0, description="Sample among so many of the likeliest tokens; 0: all.")
    seed: int = Field(42, ge=0, description="Random seed of sampling; each answer has random numbers of its own.")
    ple: Literal["auto", "host", "gpu"] = Field(
        "auto", description="Where per-layer embeddings (E2B, E4B) are; host and auto: mapped in the model's file."
    )
    images: Literal["as_is", "blank", "swapped"] = Field(
        "as_is", description="What answers owe to images: blank: all are white; swapped: they are those of another row."
    )
    loss: bool = Field(True, description="Also measure the loss of gold's answers: one pass over each trajectory.")
    probes: int = Field(
        0, ge=0, description="So many probes of each kind beside the rows: tool withheld, similar ones, none needed."
    )
    general: Path | None = Field(
        None, description="A general set (BFCL's files, say) that is asked beside the rows, and reported apart."
    )
    answer_tolerance: float = Field(
        0.01, ge=0, description="How far a number may be from that of an expected answer, as a share of it."
    )

    @field_validator("temperature")
    @classmethod
    def _samples_differ(cls, value: float, info: ValidationInfo) -> float:
        num_samples = info.data.get("num_samples", 1)
        if num_samples > 1 and value == 0:
            raise ValueError(f"it would write the same {num_samples} times; sample at 1.0, or take one answer")
        return value


class HealthConfig(Section):
    """Settings of `health`."""

    num_gpus: int | None = Field(
        None, ge=0, description="GPUs that each node should have; default: as Slurm gave (SLURM_GPUS_ON_NODE), or any."
    )
    output_dir: Path | None = Field(
        None, description="Folder that all nodes should share, as train.output_dir; it need not be there yet."
    )
    min_free_gb: float = Field(10, ge=0, description="Room that its disk should have, in GB.")
    timeout_s: float = Field(
        120, gt=0, description="Seconds after which a node that has not answered is unfit, and so is one that hangs."
    )
