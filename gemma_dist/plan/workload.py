"""The largest micro-batch of a run: from its shards where they exist, else from its recipe."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gemma_dist.config import RunConfig
from gemma_dist.errors import ConfigError, DataError
from gemma_dist.plan.activations import MicroBatch
from gemma_dist.topology import Topology

if TYPE_CHECKING:
    from gemma_dist.resolve import Run

ASSUMED_TOKENS, TOKENS_PER_IMAGE = 4096, 280
MOST_PACKS = 4096  # that are looked at for the one with the most images


@dataclass(frozen=True)
class Workload:
    """What a run puts through its model."""

    batch: MicroBatch  # the largest
    has_images: bool  # anywhere in the run
    origin: str  # where the numbers come from, for people
    num_steps: int | None = None  # of the run; None: there are no shards
    steps_per_epoch: int | None = None
    tokens_per_epoch: int | None = None  # text and images


def workload(
    config: RunConfig,
    topology: Topology,
    *,
    num_tokens: int | None = None,
    num_images: int | None = None,
    tokens_per_image: int | None = None,
) -> Workload:
    """The largest micro-batch of `config` on `topology`.

    Args:
        num_tokens: of a micro-batch, images included; None: what the recipe and its shards say.
        num_images: of a micro-batch; None: what the shards say, and 0 without any.
        tokens_per_image: soft tokens; None: as in the shards, or 280.

    Raises:
        ConfigError: the batch does not divide among the ranks, or packing does not fit the corpus.
    """
    from gemma_dist.resolve import resolve

    try:
        run: Run | None = resolve(config, topology)
    except (DataError, OSError):  # no shards yet: the plan comes before them
        run = None
    return workload_of(config, run, num_tokens=num_tokens, num_images=num_images, tokens_per_image=tokens_per_image)


def workload_of(
    config: RunConfig,
    run: "Run | None",
    *,
    num_tokens: int | None = None,
    num_images: int | None = None,
    tokens_per_image: int | None = None,
) -> Workload:
    """As `workload`, of a run that is resolved, or of a recipe without shards."""
    sequences = config.train.per_device_train_batch_size
    length, origin = _length(config, run)
    tokens = num_tokens or sequences * length
    found = _images(run) if run else (0, 0, False)
    images = found[0] if num_images is None else num_images
    if num_tokens or num_images is not None:
        origin = "as given" if num_tokens else f"{origin}; images as given"
    elif run is None:
        origin += "; text alone: there are no shards that say more"
    if tokens_per_image and not images:
        raise ConfigError(
            f"--tokens-per-image {tokens_per_image} says nothing of a micro-batch without images; give --num-images, "
            "or leave it out"
        )
    of_image, num_ranks = tokens_per_image or found[1] or TOKENS_PER_IMAGE, config.train.sequence_parallel_size
    if images * of_image > tokens:
        raise ConfigError(
            f"{images} images of {of_image} tokens are {images * of_image} tokens, and the "
            f"micro-batch has {tokens}; give fewer --num-images, or more --num-tokens"
        )
    slice_tokens = -(-tokens // num_ranks)
    batch = MicroBatch(
        num_tokens=slice_tokens,
        num_images=min(images, 2 + slice_tokens // of_image) if num_ranks > 1 else images,  # two are cut
        tokens_per_image=of_image,
        num_sequences=sequences,
        num_documents=sequences,
        num_ranks=num_ranks,
    )
    has_images = bool(images) or found[2]
    if run is None:
        return Workload(batch, has_images, origin)
    shards = run.schedule.shards
    of_all = int(shards.num_text_tokens.sum() + shards.num_image_tokens.sum())
    return Workload(batch, has_images, origin, run.num_steps, run.schedule.steps_per_epoch, of_all)


def _length(config: RunConfig, run: "Run | None") -> tuple[int, str]:
    """Tokens of the longest sequence, and where that comes from."""
    if config.train.packing and config.train.packing_length:
        return config.train.packing_length, "train.packing_length"
    if run is not None:
        shards = run.schedule.shards
        return int((shards.num_text_tokens + shards.num_image_tokens).max()), "the longest trajectory of the shards"
    return ASSUMED_TOKENS, f"{ASSUMED_TOKENS:,} tokens assumed: neither packing_length nor shards say more"


def _images(run: "Run") -> tuple[int, int, bool]:
    """Images of the micro-batch with the most image tokens, the tokens of each, and whether there are any at all."""
    shards, plan = run.schedule.shards, run.plan
    images, tokens = np.asarray(shards.num_images), np.asarray(shards.num_image_tokens)
    if not images.any():
        return 0, 0, False
    num_steps = min(run.schedule.steps_per_epoch, -(-MOST_PACKS // plan.global_batch_size))
    most, number = 0, 0
    for step in range(num_steps):
        for rank in range(plan.world_size):
            for packs in run.schedule.micro_batches(step, rank):
                samples = [sample for pack in packs for sample in pack]
                most, number = max((most, number), (int(tokens[samples].sum()), int(images[samples].sum())))
    return number, math.ceil(most / max(1, number)), True
