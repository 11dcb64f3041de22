"""How a Gemma 4 takes images. 12B (`gemma4_unified`) has no vision tower and differs from its sisters in four ways,
which are asked here alone:

- its image processor joins 3 x 3 patches to one of 48 x 48 pixels before the model sees them, so that a patch is a
  soft token (`Patches`);
- transformers gives it another image mask than the family has (`use_image_rule`);
- bitsandbytes must leave the projection of its pixels alone (`towers.whole_modules`);
- the files have other names for that part than transformers' modules, and so than an adapter (`name_in_model`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gemma_dist.model.towers import UNIFIED


@dataclass(frozen=True)
class Patches:
    """What an image is cut into for a model."""

    num_values: int  # of a patch: 3 colors of its pixels
    pooling: int  # so many patches, squared, become one soft token

    def image(self, width: int, height: int, values: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """An image of `width` x `height` soft tokens, as an image processor gives it: P patches, row by row.

        Args:
            values: (P, num_values), the colors from 0 to 1; None: black.

        Returns:
            `pixel_values` (1, P, num_values) float32, and `image_position_ids` (1, P, 2) int64, the (x, y) of each.
        """
        rows, columns = self.pooling * height, self.pooling * width
        positions = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
        if values is None:
            values = torch.zeros(len(positions), self.num_values)
        return {"pixel_values": values[None], "image_position_ids": positions[None]}

    def num_patches(self, soft_tokens: int) -> int:
        """Of an image of so many soft tokens."""
        return soft_tokens * self.pooling**2


def patches_of_processor(processor: Any) -> Patches:
    """The patches that a `Gemma4Processor` or a `Gemma4UnifiedProcessor` makes."""
    from transformers import Gemma4UnifiedProcessor

    settings = processor.image_processor
    joined = isinstance(processor, Gemma4UnifiedProcessor)
    return _patches(settings.patch_size, settings.pooling_kernel_size, joined)


def patches_of_config(config: Mapping[str, Any]) -> Patches:
    """The patches that a model takes, by its config with all defaults in it (`to_dict` of transformers' class)."""
    vision = config["vision_config"]
    return _patches(vision["patch_size"], vision["pooling_kernel_size"], config["model_type"] == UNIFIED)


def _patches(patch_size: int, pooling: int, joined: bool) -> Patches:
    if joined:
        return Patches(3 * (pooling * patch_size) ** 2, 1)
    return Patches(3 * patch_size**2, pooling)


def name_in_model(tensor: str, model_type: str) -> str:
    """The name in transformers' model of a tensor in Google's files: of 12B's `vision_embedder`, another one."""
    if model_type != UNIFIED:
        return tensor
    tensor = re.sub(
        r"\bembed_vision\.embedding_projection", "embed_vision.multimodal_embedder.embedding_projection", tensor
    )
    return re.sub(r"\bvision_embedder\.", "embed_vision.", tensor)


def name_in_file(name: str, model_type: str) -> str:
    """The name in Google's files of a tensor of transformers' model: `name_in_model` the other way."""
    if model_type != UNIFIED:
        return name
    name = name.replace("embed_vision.multimodal_embedder.embedding_projection", "embed_vision.embedding_projection")
    return re.sub(r"\bembed_vision\.(?!embedding_projection\b)", "vision_embedder.", name)


def use_image_rule(model: Any) -> None:
    """Let a 12B that takes rows attend its images as the rest of the family does; no other model is changed.

    The family's rule, which `attention.py` has for packs: full layers are causal; sliding layers see
    `q - k < sliding_window`, k before q or in the same image. `Gemma4UnifiedModel.forward` (transformers 5.23) lets
    full layers see whole images in both directions, and sliding ones beyond the window. Which of the two 12B was made
    with cannot be measured without its weights. For the family's rule speak Google's own code, which keeps global
    layers causal; vLLM, which serves 12B so; and transformers itself, which mended the other models and takes this
    very function where `generate` compiles. So what is trained and evaluated here is what is served.

    Passes without `mm_token_type_ids`, or with masks that are ready, stay as they are.
    """
    if model.config.model_type == UNIFIED:
        model.model.register_forward_pre_hook(_add_masks, with_kwargs=True)


def _add_masks(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before each forward pass of `Gemma4UnifiedModel`, which takes masks by layer type."""
    from transformers.models.gemma4_unified import modeling_gemma4_unified as unified

    types, mask = kwargs.get("mm_token_type_ids"), kwargs.get("attention_mask")
    text = model.config.text_config
    if types is None or isinstance(mask, dict) or text.use_bidirectional_attention != "vision":
        return args, kwargs
    embeddings, cache = model.get_input_embeddings().weight, kwargs.get("past_key_values")
    if (positions := kwargs.get("position_ids")) is None:
        seen = cache.get_seq_length() if cache is not None else 0
        positions = torch.arange(seen, seen + types.shape[1], device=types.device)[None]
    masks = unified.create_masks_for_vision_model(
        config=text,
        inputs_embeds=embeddings.new_empty(1).expand(*types.shape, 1),  # of which shape, dtype and device are read
        attention_mask=mask,
        past_key_values=cache,
        position_ids=positions,
        block_sequence_ids=unified.get_block_sequence_ids_for_mask(types, device=types.device),
    )
    return args, kwargs | {"attention_mask": masks}
