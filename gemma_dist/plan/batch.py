"""The largest micro-batch that a recipe may get: full sequences, whose text is trained from end to end."""

import torch

from gemma_dist.config import RunConfig
from gemma_dist.data.encode import IGNORE_INDEX, Encoded
from gemma_dist.model.load import read_config
from gemma_dist.stream.collate import ControlIds, Sample, collate, collate_packs


def full_batch(
    config: RunConfig, *, num_tokens: int, num_images: int, tokens_per_image: int
) -> dict[str, torch.Tensor]:
    """One micro-batch as the loader makes it, each sequence one document of `num_tokens`, its images at the end.

    Raises:
        CheckpointError: there is no Gemma 4 at model.model_name_or_path.
        ValueError: the images do not fit into the sequence.
    """
    model = read_config(config.model.model_name_or_path)
    ids = ControlIds(
        model.text_config.pad_token_id, model.boi_token_id, model.image_token_id, _one(model, "eoi_token")
    )
    num_text = num_tokens - num_images * (tokens_per_image + 2)
    if num_text < 1:
        raise ValueError(f"{num_images} images of {tokens_per_image} tokens do not fit into {num_tokens} tokens")
    word = next(number for number in range(1, 10) if number not in (ids.pad, ids.begin_image, ids.image, ids.end_image))
    image = [ids.begin_image, *[ids.image] * tokens_per_image, ids.end_image]
    input_ids = [word] * num_text + image * num_images
    labels = [IGNORE_INDEX, *[word] * (num_text - 1), *[IGNORE_INDEX] * (len(input_ids) - num_text)]
    types = [int(token == ids.image) for token in input_ids]
    encoded = Encoded(input_ids, labels, types, num_images=num_images, num_dropped_reasoning=0)
    sample = Sample("", encoded, _pixels(model, num_images, tokens_per_image))
    rows = [[sample] for _ in range(config.train.per_device_train_batch_size)]
    return collate_packs(rows, ids) if config.train.packing else collate([row[0] for row in rows], ids)


def _one(model: object, name: str) -> int:
    """A token's id, which configs name in either way."""
    return next(getattr(model, f"{name}_{end}") for end in ("id", "index") if hasattr(model, f"{name}_{end}"))


def _pixels(model: object, num_images: int, tokens_per_image: int) -> dict[str, torch.Tensor]:
    """Images in one row of soft tokens, with nothing to see."""
    vision = model.vision_config  # type: ignore[attr-defined]
    pooling = vision.pooling_kernel_size
    grid = torch.cartesian_prod(torch.arange(pooling), torch.arange(pooling * tokens_per_image)).flip(-1)
    values = 3 * vision.patch_size**2
    return {
        "pixel_values": torch.empty(num_images, len(grid), values),
        "image_position_ids": grid.expand(num_images, -1, -1),
    }
