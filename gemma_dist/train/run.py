"""One training run, from a recipe to an adapter or a model in `train.output_dir`.

OUT/checkpoint-<step>/       what a run needs to go on; complete or absent
OUT/metrics.jsonl            one line a step
OUT/adapter_model.safetensors or model.safetensors …, with config, processor and template: the result
OUT/gemma_dist.json          base, quantisation, data: written last, so it marks a finished run
"""

import shutil
from pathlib import Path
from typing import Any

from gemma_dist import world
from gemma_dist.config import RunConfig, batch_plan
from gemma_dist.data.encode import load_encoder
from gemma_dist.logs import RunLog, log
from gemma_dist.model.fingerprint import fingerprint_base
from gemma_dist.model.load import ADAPTER_RECORD, add_adapter, load_model
from gemma_dist.stream.loader import TrajectoryLoader
from gemma_dist.stream.schedule import open_schedule
from gemma_dist.topology import current_topology, require_fit
from gemma_dist.train.checkpoint import (
    alone_in,
    changed_settings,
    find_checkpoint,
    require_folder,
    require_one_start,
)
from gemma_dist.train.optimizer import layout
from gemma_dist.train.trainer import ToolCallTrainer, training_arguments

# What a checkpoint holds to go on from, and a result does not need.
STATE_FILES = (
    "complete.json",
    "optimizer*",
    "README.md",
)


def train(config: RunConfig) -> None:
    """Train as `config` says, alone or as one rank of many, from the newest complete checkpoint if there is one.

    Raises:
        ConfigError, DataError, CheckpointError: before any weight is read, where the run could not work.
        CheckpointError: the ranks did not find the same checkpoint.
        TrainingError: a loss or a gradient is not finite.
    """
    topology = current_topology()
    require_fit(config, topology)
    require_folder(config)
    plan = batch_plan(config, world.world_size())
    schedule = open_schedule(config, plan)
    shards = schedule.shards
    num_steps = schedule.num_steps(config.train)
    encoder = load_encoder(
        config.model.model_name_or_path,
        chat_template=config.data.chat_template,
        enable_thinking=config.data.enable_thinking,
    )
    state = {
        **fingerprint_base(config.model.model_name_or_path),
        "dtype": config.model.dtype,
        "four_bit": config.quantization.model_dump() if config.quantization else None,
        "manifest": shards.manifest_hash,
        "num_samples": len(shards),
        "encoding": shards.fingerprint,
        "weights": shards.weights,
        "packing_length": schedule.packing_length,
        "seed": config.train.seed,
        "global_batch_size": plan.global_batch_size,
        "tuning": config.tuning,
        "lora": {name: value for name, value in (config.lora or {}) if value},  # options that come later are off
        "optim": config.train.optim.removesuffix("_fused"),
        "optimizer": layout(config.train.optim, topology.zero_stage, plan.world_size),
    }
    checkpoint, start_step = find_checkpoint(config.train.output_dir, config.train.resume_from_checkpoint, state)
    if checkpoint and (changed := changed_settings(checkpoint, config)):
        log.info("resuming from %s with other settings: %s", checkpoint, "; ".join(changed))
    rank = world.rank()
    loader = TrajectoryLoader(
        schedule,
        encoder,
        rank,
        start_step,
        max(0, num_steps - start_step),
        num_workers=config.train.dataloader_num_workers,
    )
    log.info("%d trajectories, %s, %d of %d steps done", len(shards), plan, min(start_step, num_steps), num_steps)

    with alone_in(config.train.output_dir):
        if start_step < num_steps:
            arguments = training_arguments(config, plan, num_steps)
            world.note_processes()
            require_one_start(start_step)
            model = _model(config, arguments)
            run_log = RunLog(config.train.output_dir / "metrics.jsonl", start_step=start_step, num_steps=num_steps)
            trainer = ToolCallTrainer(config, arguments, model, loader, state, run_log)
            trainer.train(resume_from_checkpoint=checkpoint)
            run_log.close()
            checkpoint = config.train.output_dir / f"checkpoint-{num_steps}"
        else:
            log.info(
                "%s is the end of this run: nothing is left to train. For another run set train.output_dir", checkpoint
            )
        if rank == 0:
            _publish(checkpoint, config.train.output_dir)
    world.disconnect()


def _model(config: RunConfig, arguments: Any) -> Any:
    """The model with everything frozen that does not train."""
    from transformers import set_seed

    set_seed(config.train.seed)
    model = load_model(config.model, config.quantization, packing=config.train.packing)
    if config.lora is not None:
        zero3 = arguments.deepspeed_plugin is not None and arguments.deepspeed_plugin.zero_stage == 3
        model = add_adapter(model, config.lora, zero3=zero3)
    return model


def _publish(checkpoint: Path | None, output_dir: Path) -> None:
    """Copy the result of the last checkpoint to `output_dir`, each file whole or absent, the record last."""
    assert checkpoint is not None, "a run of no steps"
    result = [
        path
        for path in checkpoint.iterdir()
        if path.is_file() and not any(path.match(pattern) for pattern in STATE_FILES)
    ]
    for path in sorted(result, key=lambda path: path.name == ADAPTER_RECORD):
        temporary = output_dir / f".{path.name}.tmp"
        shutil.copyfile(path, temporary)
        temporary.replace(output_dir / path.name)
    log.info("the result is in %s", output_dir)
