"""`gemma-dist check`: what a recipe comes to, before a GPU is touched.

The resolved settings, the batch arithmetic, how much data there is and how many steps that makes, what trains, and
what the weights take.
"""

import yaml

from gemma_dist.config import RunConfig
from gemma_dist.data.encode import load_encoder
from gemma_dist.errors import CheckpointError
from gemma_dist.model.devices import card_at_hand, impossible, slow
from gemma_dist.model.shapes import describe_training
from gemma_dist.resolve import Run, require_output_dir
from gemma_dist.stream.held_out import describe_held_out, find_shared_ids


def describe_run(run: Run) -> str:
    """The run as text for a terminal.

    Raises:
        ConfigError: train.output_dir is no place to write to.
        CheckpointError: the model folder is absent or holds no Gemma 4.
        DataError: the shards were made with another encoding.
    """
    require_output_dir(run.config)
    settings = yaml.safe_dump(run.config.to_json(), sort_keys=False, allow_unicode=True, width=120)
    data = [*_data_lines(run), *_held_out_lines(run), *_encoding_lines(run)]
    training = describe_training(run.config, run.unneeded_towers)
    return "\n".join([settings, str(run.plan), *data, *training, *_card_lines(run.config)])


def _data_lines(run: Run) -> list[str]:
    """Totals of the shards from their manifest, and the length of the run."""
    schedule, shards = run.schedule, run.schedule.shards
    packs = f"; packs of at most {schedule.packing_length:,} tokens" if schedule.packing else ""
    return [
        f"{', '.join(shards.folders)}: {len(shards):,} trajectories, {shards.num_text_tokens.sum():,} text tokens, "
        f"{shards.num_image_tokens.sum():,} image tokens in {shards.num_images.sum():,} images; "
        f"{shards.num_target_tokens.sum():,} tokens are trained",
        f"{run.num_steps:,} optimizer steps, {schedule.steps_per_epoch:,} to an epoch{packs}",
    ]


def _held_out_lines(run: Run) -> list[str]:
    """What is evaluated meanwhile, how often, and what of it is trained on as well."""
    if run.held_out is None:
        return []
    often = run.num_evaluations()
    tokens = often * run.held_out.num_tokens
    evaluated = f"{describe_held_out(run.held_out)}; evaluated {often:,} times, {tokens:,} tokens without gradients"
    return [evaluated, find_shared_ids(run.held_out, run.schedule).words]


def _encoding_lines(run: Run) -> list[str]:
    """Nothing where the model's processor gives the tokens that the shards were measured with, or why it is not known.

    Raises:
        DataError: it gives others.
    """
    try:
        encoder = load_encoder(run.config.model.model_name_or_path, run.config.data)
    except CheckpointError as error:
        return [f"the shards were not compared with the model's processor: {error}"]
    run.schedule.shards.require_encoding(encoder)
    return []


def _card_lines(config: RunConfig) -> list[str]:
    """What the GPU of this machine, if it has one, cannot do for the recipe. The run may be meant for another."""
    card = card_at_hand()
    if card is None:
        return []
    return [f"this machine's GPU: {card}", *impossible(config, card), *slow(card)]
