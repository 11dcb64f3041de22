"""Names that people bring along from other tools, as data: what they are called here, or why there is no such setting.

They come from LLaMA-Factory, axolotl, ms-swift, TRL, unsloth and DeepSpeed. `python -m gemma_dist.aliases` writes the
tables of docs/coming_from.md from them.
"""

from collections.abc import Mapping
from pathlib import Path

PAGE = Path("docs/coming_from.md")
BEGIN, END = "<!-- begin: python -m gemma_dist.aliases -->", "<!-- end -->"


def _by_name(answers: Mapping[str, str]) -> dict[str, str]:
    """The answer to each single name, where the keys of `answers` hold several with blanks between them."""
    by_name = {}
    for names, answer in answers.items():
        for name in names.split():
            by_name[name] = answer
    return by_name


# Names elsewhere -> the key of a recipe.
_KEYS = {
    "finetuning_type adapter tuner_type train_type use_peft use_lora quantization_bit quant_bits": "tuning",
    "model base_model model_id model_path model_name pretrained_model_name_or_path": "model.model_name_or_path",
    "torch_dtype model_dtype precision": "model.dtype",
    "attn_impl flash_attn flash_attention use_flash_attention_2": "model.attn_implementation",
    "local_cache cache cache_path": "data.cache_dir",
    "dataset datasets dataset_name dataset_path dataset_dir data_path data_files train_file": "data.train",
    "eval_dataset eval_datasets test_datasets val_dataset validation_file": "data.eval",
    "template chat_template_path chat_template_jinja": "data.chat_template",
    "lora_rank lora_r rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "lora_target lora_target_modules lora_target_linear": "lora.target_modules",
    "lora_target_parameters": "lora.target_parameters",
    "out_dir output save_dir": "train.output_dir",
    "micro_batch_size batch_size train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
    "train_batch_size total_batch_size effective_batch_size": "train.global_batch_size",
    "grad_accum gradient_accumulation grad_accumulation_steps": "train.gradient_accumulation_steps",
    "sample_packing neat_packing padding_free": "train.packing",
    "pack_length packing_max_length": "train.packing_length",
    "context_parallel_size sequence_parallel_degree cp_size sp_size": "train.sequence_parallel_size",
    "num_workers dataloader_workers preprocessing_num_workers": "train.dataloader_num_workers",
    "enable_activation_offloading offload_activations": "train.activation_offloading",
    "activation_checkpointing use_gradient_checkpointing": "train.gradient_checkpointing",
    "num_epochs epochs max_epochs n_epochs": "train.num_train_epochs",
    "lr": "train.learning_rate",
    "lr_scheduler scheduler": "train.lr_scheduler_type",
    "warmup_ratio lr_warmup_steps": "train.warmup_steps",
    "gradient_clipping grad_clip clip_grad_norm": "train.max_grad_norm",
    "optimizer optimiser": "train.optim",
    "use_wandb wandb_project use_tensorboard use_swanlab": "train.report_to",
    "evaluate do_eval evaluation_strategy": "train.eval_strategy",
    "evals_per_epoch eval_interval": "train.eval_steps",
    "eval_batch_size micro_eval_batch_size": "train.per_device_eval_batch_size",
    "eval_samples num_eval_samples": "train.max_eval_samples",
    "resume auto_resume_from_checkpoints": "train.resume_from_checkpoint",
}
RENAMED = _by_name(_KEYS)

# Names elsewhere -> the setting of `gemma-dist shard`, which no recipe holds.
_SHARD_SETTINGS = {
    "cutoff_len sequence_len max_seq_length max_seq_len seq_length seq_len model_max_length": "max_length",
}
RENAMED_OPTIONS = _by_name(_SHARD_SETTINGS)

# Names elsewhere -> why there is no such setting.
_REASONS = {
    "fp16 float16 half": "fp16 overflows on Gemma; use train.bf16, or model.dtype: float32",
    "load_in_8bit": "8-bit weights are not offered; tuning: qlora holds them in 4 bits",
    "gradient_checkpointing_kwargs activation_checkpointing_kwargs use_reentrant use_reentrant_gc": (
        "remove it: checkpointing is always non-reentrant here, since reentrant recomputation gives wrong "
        "gradients where layers share keys and values"
    ),
    "deepspeed deepspeed_config zero_stage fsdp fsdp_config device_map num_processes ddp_find_unused_parameters": (
        "how processes share memory is set by an accelerate config: accelerate launch --config_file "
        "accelerate_configs/…"
    ),
    "group_by_length length_grouped_sampler": "not a setting: train.packing leaves no padding to save",
    "streaming buffer_size": "not a setting: shards are always read as a stream, and row groups are shuffled",
    (
        "assistant_only_loss completion_only_loss train_on_prompt train_on_inputs roles_to_train train_on_eos "
        "mask_history loss_scale train_on_last_turn_only"
    ): "always so: the loss is on what the model itself emits; `train: false` on a message leaves it out",
    "val_set_size split_dataset_ratio": (
        "rows are split where they are sharded: `gemma-dist shard --split 0.05`, and data.eval names its held_out"
    ),
    "max_new_tokens predict_with_generate": (
        "training evaluates the loss of data.eval and generates nothing; run `gemma-dist evaluate` on a checkpoint"
    ),
    "freeze_vision_tower freeze_vit freeze_multi_modal_projector freeze_aligner finetune_vision_layers": (
        "lora and qlora leave the vision tower alone unless lora.target_modules names it; full trains it"
    ),
    "image_max_pixels max_pixels image_size image_resolution": (
        "images are resized by the model's own image processor; `gemma-dist shard --max-image-pixels` only refuses "
        "larger ones"
    ),
    (
        "label_smoothing_factor label_smoothing compute_metrics preprocess_logits_for_metrics compute_loss_func "
        "upcast_lmhead_output"
    ): ("remove it: it needs the logits of all tokens at once, which the fused loss never makes"),
    "use_liger_kernel": (
        "remove it: the loss is fused already, and Liger's would take its place in the forward pass; where neither "
        "works, all logits are made"
    ),
    "prepare_model_for_kbit_training upcast_layernorm": (
        "remove it: it makes every weight that is not in 4 bits float32, the embeddings first of all"
    ),
    "neftune_noise_alpha noisy_embedding_alpha": (
        "remove it: noise on the embeddings is not offered; it would also reach images and per-layer embeddings"
    ),
    "stage do_train rlhf_type": "remove it: this package has one stage, supervised fine-tuning",
    "trust_remote_code": "remove it: no code from a model folder is ever run",
}
NOT_SETTINGS = _by_name(_REASONS)

# Value of a setting in earlier versions, whose shards record it -> its name today.
RENAMED_VALUES = {"neutralise": "escape", "neutralize": "escape"}


def current_value(value: object) -> object:
    """The value of a setting as it is written today; values that never had another name are returned as they are."""
    return RENAMED_VALUES.get(value, value) if isinstance(value, str) else value


def as_bool(value: object) -> object:
    """True and False for the words that a command line has for them; other values are returned as they are."""
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def current_values(settings: Mapping[str, object]) -> dict[str, object]:
    """Recorded settings, each with its value as it is written today."""
    return {name: current_value(value) for name, value in settings.items()}


def name_table() -> str:
    """All names of this module as a Markdown table, what they are called elsewhere beside what to write here."""
    rows = ["| elsewhere | here |", "|---|---|"]
    for names, key in _KEYS.items():
        rows.append(_row(names, f"`{key}`"))
    for names, setting in _SHARD_SETTINGS.items():
        rows.append(_row(names, f"`gemma-dist shard --{setting.replace('_', '-')}`"))
    for names, reason in _REASONS.items():
        rows.append(_row(names, reason))
    return "\n".join(rows)


def _row(names: str, here: str) -> str:
    """A row of the table; `names` with blanks between them."""
    elsewhere = ", ".join(f"`{name}`" for name in names.split())
    return f"| {elsewhere} | {here} |"


def with_name_table(page: str) -> str:
    """The Markdown `page` with the table as it is now between BEGIN and END."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{name_table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_name_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
