"""Names of settings that people bring along from other tools, and what is no setting here."""

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
