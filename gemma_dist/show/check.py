"""`gemma-dist check`: what a recipe comes to, before a GPU is touched.

The resolved settings, the batch arithmetic, how much data there is and how many steps that makes, what trains, and
what the weights take.
"""

import yaml

from gemma_dist.config import BatchPlan, RunConfig, batch_plan
from gemma_dist.model.load import describe_training
from gemma_dist.stream.schedule import open_schedule
from gemma_dist.train.checkpoint import require_folder


def describe_run(config: RunConfig, world_size: int) -> str:
    """The run as text for a terminal.

    Raises:
        ConfigError: the batch sizes do not agree on `world_size` ranks, or train.output_dir is no place to write to.
        DataError: a folder of data.train holds no finished shards, or the quarantine names what is not in them.
        CheckpointError: the model folder is absent or holds no Gemma 4.
    """
    plan = batch_plan(config, world_size)
    require_folder(config)
    settings = yaml.safe_dump(config.to_json(), sort_keys=False, allow_unicode=True, width=120)
    return "\n".join([settings, str(plan), *_data_lines(config, plan), *describe_training(config)])


def _data_lines(config: RunConfig, plan: BatchPlan) -> list[str]:
    """Totals of the shards from their manifest, and the length of the run."""
    schedule = open_schedule(config, plan)
    shards = schedule.shards
    packs = f"; packs of at most {schedule.packing_length:,} tokens" if schedule.packing else ""
    return [
        f"{', '.join(shards.folders)}: {len(shards):,} trajectories, {shards.num_text_tokens.sum():,} text tokens, "
        f"{shards.num_image_tokens.sum():,} image tokens in {shards.num_images.sum():,} images; "
        f"{shards.num_target_tokens.sum():,} tokens are trained",
        f"{schedule.num_steps(config.train):,} optimiser steps, {schedule.steps_per_epoch:,} to an epoch{packs}",
    ]
