"""Names of six tools, as data: what each calls a setting that a recipe, or `gemma-dist shard`, has here.

Read in the tools' own examples and config classes (TRL 1.16, axolotl, LLaMA-Factory, ms-swift, unsloth's command line,
NeMo Automodel). Names that a tool has from Hugging Face's TrainingArguments are ours as well and stand in no table;
`aliases.py` answers all others.
"""

SHARD, ROWS, HELD_OUT, SPLIT = "shard.", "rows", "held_out", "split"  # beside the keys of a recipe: `shard.max_length`
FOUR_BITS, ADAPTER = "4 bits", "adapter"  # from which `tuning` follows

TRL, AXOLOTL, LLAMA_FACTORY, SWIFT, UNSLOTH, AUTOMODEL = TOOLS = (
    "TRL",
    "axolotl",
    "LLaMA-Factory",
    "ms-swift",
    "unsloth",
    "NeMo Automodel",
)
# Keys that a config of the tool has, and those of the others have not: any of them gives it away. In this order.
TELLTALES = {
    AUTOMODEL: ("step_scheduler", "packed_sequence", "freeze_config"),
    UNSLOTH: ("training", "max_seq_length"),
    AXOLOTL: ("base_model", "sequence_len", "micro_batch_size"),
    LLAMA_FACTORY: ("finetuning_type", "cutoff_len", "stage", "quantization_bit", "lora_target"),
    SWIFT: ("train_type", "tuner_type", "split_dataset_ratio", "attn_impl", "model"),
    TRL: ("model_name_or_path", "dataset_name", "use_peft"),
}

_ADAPTER_SIZES = {"lora_r": "lora.r", "lora_target_modules": "lora.target_modules"}
_RANK = {"lora_rank": "lora.r"}
NAMES: dict[str, dict[str, str]] = {
    TRL: {
        "model_name_or_path": "model.model_name_or_path",
        "dtype": "model.dtype",
        "torch_dtype": "model.dtype",
        "dataset_name": ROWS,
        "max_length": SHARD + "max_length",
        "use_peft": ADAPTER,
        "load_in_4bit": FOUR_BITS,
        **_ADAPTER_SIZES,
        "lora_target_parameters": "lora.target_parameters",
        "use_bnb_nested_quant": "quantization.bnb_4bit_use_double_quant",
        "chat_template_path": "data.chat_template",
    },
    AXOLOTL: {
        "base_model": "model.model_name_or_path",
        "datasets": ROWS,
        "test_datasets": HELD_OUT,
        "val_set_size": SPLIT,
        "sequence_len": SHARD + "max_length",
        "sample_packing": "train.packing",
        "adapter": ADAPTER,
        "load_in_4bit": FOUR_BITS,
        **_ADAPTER_SIZES,
        "lora_target_linear": "lora.target_modules",
        "peft_use_rslora": "lora.use_rslora",
        "peft_use_dora": "lora.use_dora",
        "micro_batch_size": "train.per_device_train_batch_size",
        "eval_batch_size": "train.per_device_eval_batch_size",
        "num_epochs": "train.num_train_epochs",
        "optimizer": "train.optim",
        "lr_scheduler": "train.lr_scheduler_type",
        "warmup_ratio": "train.warmup_steps",
        "context_parallel_size": "train.sequence_parallel_size",
        "activation_offloading": "train.activation_offloading",
    },
    LLAMA_FACTORY: {
        "model_name_or_path": "model.model_name_or_path",
        "flash_attn": "model.attn_implementation",
        "dataset": ROWS,
        "eval_dataset": HELD_OUT,
        "val_size": SPLIT,
        "cutoff_len": SHARD + "max_length",
        "media_dir": SHARD + "media_root",
        "neat_packing": "train.packing",
        "finetuning_type": ADAPTER,
        "quantization_bit": FOUR_BITS,
        "double_quantization": "quantization.bnb_4bit_use_double_quant",
        "quantization_type": "quantization.bnb_4bit_quant_type",
        **_RANK,
        "lora_target": "lora.target_modules",
        "warmup_ratio": "train.warmup_steps",
    },
    SWIFT: {
        "model": "model.model_name_or_path",
        "torch_dtype": "model.dtype",
        "attn_impl": "model.attn_implementation",
        "dataset": ROWS,
        "val_dataset": HELD_OUT,
        "split_dataset_ratio": SPLIT,
        "max_length": SHARD + "max_length",
        "train_type": ADAPTER,
        "tuner_type": ADAPTER,
        "quant_bits": FOUR_BITS,
        **_RANK,
        "target_modules": "lora.target_modules",
        "warmup_ratio": "train.warmup_steps",
    },
    UNSLOTH: {
        "model": "model.model_name_or_path",
        "data.dataset": ROWS,
        "data.local_dataset": ROWS,
        "training.training_type": ADAPTER,
        "training.load_in_4bit": FOUR_BITS,
        "training.max_seq_length": SHARD + "max_length",
        "training.num_epochs": "train.num_train_epochs",
        "training.batch_size": "train.per_device_train_batch_size",
        "training.random_seed": "train.seed",
        "lora.lora_r": "lora.r",
        "logging.enable_wandb": "train.report_to",
        "logging.enable_tensorboard": "train.report_to",
    },
    AUTOMODEL: {
        "model.pretrained_model_name_or_path": "model.model_name_or_path",
        "model.torch_dtype": "model.dtype",
        "dataset.path_or_dataset": ROWS,
        "dataset.path_or_dataset_id": ROWS,
        "validation_dataset.path_or_dataset": HELD_OUT,
        "validation_dataset.path_or_dataset_id": HELD_OUT,
        "packed_sequence.max_length": SHARD + "max_length",
        "packed_sequence.pack_size": "train.packing_length",
        "packed_sequence.packed_sequence_size": "train.packing_length",
        "peft._target_": ADAPTER,
        "peft.dim": "lora.r",
        "peft.alpha": "lora.lora_alpha",
        "peft.dropout": "lora.lora_dropout",
        "peft.target_modules": "lora.target_modules",
        "peft.match_all_linear": "lora.target_modules",
        "peft.use_dora": "lora.use_dora",
        "quantization.load_in_4bit": FOUR_BITS,
        "step_scheduler.global_batch_size": "train.global_batch_size",
        "step_scheduler.local_batch_size": "train.per_device_train_batch_size",
        "step_scheduler.num_epochs": "train.num_train_epochs",
        "step_scheduler.max_steps": "train.max_steps",
        "step_scheduler.ckpt_every_steps": "train.save_steps",
        "step_scheduler.val_every_steps": "train.eval_steps",
        "optimizer.lr": "train.learning_rate",
        "optimizer.eps": "train.adam_epsilon",
        "lr_scheduler.lr_decay_style": "train.lr_scheduler_type",
        "lr_scheduler.lr_warmup_steps": "train.warmup_steps",
        "clip_grad_norm.max_norm": "train.max_grad_norm",
        "rng.seed": "train.seed",
        "dataloader.num_workers": "train.dataloader_num_workers",
        "checkpoint.checkpoint_dir": "train.output_dir",
        "distributed.cp_size": "train.sequence_parallel_size",
    },
}

# What a tool does where its config says nothing of it.
DEFAULTS: dict[str, dict[str, object]] = {
    LLAMA_FACTORY: {ADAPTER: "lora"},
    SWIFT: {ADAPTER: "lora"},
    UNSLOTH: {ADAPTER: "lora", FOUR_BITS: True},
}

OPTIMIZERS = {
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "adamw_hf": "adamw_torch",
    "paged_adamw": "paged_adamw_32bit",
}
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "float": "float32"}
CHECKPOINTING = {"unsloth": True, "true": True, "none": False, "false": False}

# Names of theirs, or of sections of theirs -> why they have no place; beside those of `aliases.py`.
LAUNCH = "how processes share memory is set by an accelerate config (accelerate_configs/)"
TEMPLATE = "the model's own chat template is taken; data.chat_template names another"
REASONS = {
    "evals_per_epoch": "a count; train.eval_steps is in optimizer steps, train.eval_strategy: epoch is once an epoch",
    "saves_per_epoch": "a count; train.save_steps is in optimizer steps",
    "chat_template": TEMPLATE,
    "template": TEMPLATE,
    "plot_loss": "`gemma-dist plot RUN` draws it",
    "max_samples": "shard fewer rows",
    "overwrite_output_dir": "nothing is overwritten: name another train.output_dir",
    "dist_env": LAUNCH,
    "distributed": LAUNCH,
    "freeze_config": "lora and qlora leave the towers alone; full trains them",
}
