"""The largest micro-batch that a recipe may get: full sequences, whose text is trained from end to end."""

from typing import Any

import torch

from gemma_dist.config import RunConfig
from gemma_dist.data.encoded import IGNORE_INDEX, Encoded
from gemma_dist.errors import ConfigError
from gemma_dist.model.load import read_config
from gemma_dist.model.per_layer import INDEX, ROWS
from gemma_dist.model.towers import unneeded_towers
from gemma_dist.model.vision import patches_of_config
from gemma_dist.stream.collate import ControlIds, Sample, collate, collate_packs
from gemma_dist.train.feed import Batch, known_to_host


def full_batch(config: RunConfig, *, num_tokens: int, num_images: int, tokens_per_image: int) -> Batch:
    """One micro-batch as the feed gives it: each sequence one document, its images at the end, no token twice.

    Args:
        num_tokens, num_images: of all its sequences, as for `simulate`.

    Raises:
        CheckpointError: there is no Gemma 4 at model.model_name_or_path.
        ConfigError: the images do not fit into the sequences.
    """
    model = read_config(config.model.model_name_or_path)
    ids, num_rows = _control_ids(model), config.train.per_device_train_batch_size
    samples = []
    for row in range(num_rows):
        images = num_images // num_rows + (row < num_images % num_rows)
        samples.append(_sample(ids, num_tokens // num_rows, images, tokens_per_image))
    filler = "vision" not in unneeded_towers(frozen=config.tuning != "full", has_images=num_images > 0)
    if config.train.packing:
        batch = collate_packs([[one] for one in samples], ids, filler=filler)
    else:
        batch = collate(samples, ids, filler=filler)
    rows = _rows(config, model.get_text_config(), batch["input_ids"]) if config.ple_on_host else {}
    return known_to_host(batch | rows)


def _sample(ids: ControlIds, num_tokens: int, num_images: int, tokens_per_image: int) -> Sample:
    """A document of words and, behind them, black images in one row of soft tokens."""
    num_text = num_tokens - num_images * (tokens_per_image + 2)
    if num_text < 2:
        raise ConfigError(f"{num_images} images of {tokens_per_image} tokens do not fit into {num_tokens} tokens")
    word = next(number for number in range(1, 10) if number not in (ids.pad, ids.begin_image, ids.image, ids.end_image))
    image = [ids.begin_image, *[ids.image] * tokens_per_image, ids.end_image]
    input_ids = [word] * num_text + image * num_images
    labels = [IGNORE_INDEX, *[word] * (num_text - 1), *[IGNORE_INDEX] * (len(input_ids) - num_text)]
    types = [int(token == ids.image) for token in input_ids]
    encoded = Encoded.of_words(input_ids, labels, types, num_images)
    pixels = ids.patches.image(tokens_per_image, 1)
    return Sample("", encoded, {name: tensor.expand(num_images, -1, -1) for name, tensor in pixels.items()})


def _control_ids(model: Any) -> ControlIds:
    """Of a model's config; some name the last of them otherwise."""
    end = next(getattr(model, name) for name in ("eoi_token_id", "eoi_token_index") if hasattr(model, name))
    pad = model.get_text_config().pad_token_id
    return ControlIds(pad, model.boi_token_id, model.image_token_id, end, patches_of_config(model.to_dict()))


def _rows(config: RunConfig, text: Any, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The per-layer embeddings of as many distinct tokens as there are; of a model that has some."""
    width = text.num_hidden_layers * (getattr(text, "hidden_size_per_layer_input", 0) or 0)
    if not width:
        return {}
    num_rows = min(input_ids.numel(), text.vocab_size_per_layer_input)
    rows = torch.empty(num_rows, width, dtype=getattr(torch, config.model.dtype))
    return {ROWS: rows, INDEX: torch.arange(input_ids.numel()).reshape(input_ids.shape) % num_rows}
