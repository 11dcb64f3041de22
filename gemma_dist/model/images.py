"""The soft tokens of images put in their places among the text, without asking the device where these are.

transformers finds them on the device: it chooses those of an image that are no padding by a mask, counts them, compares
that with the text, and sets them by a mask, forward and backward; each time the host waits for a GPU. All of it is
known when a micro-batch is made. So the host says (`places_of`), and around transformers' modules stand hooks that take
its word. A micro-batch that does not say goes transformers' own way, as in generation.
"""

from dataclasses import dataclass
from typing import Any

import torch

from gemma_dist.errors import DataError
from gemma_dist.model.towers import UNIFIED

# Of a micro-batch with S soft tokens: where each stands of the B * T tokens, and which it is of what the vision tower
# gives: N images, each with as many rows as the most of any image.
IMAGE_PLACES, SOFT_TOKENS = "image_places", "soft_tokens"
Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a module


def places_of(
    mm_token_type_ids: torch.Tensor,
    image_position_ids: torch.Tensor,
    *,
    pooling: int | None = None,
    used: slice = slice(None),
) -> dict[str, torch.Tensor]:
    """IMAGE_PLACES and SOFT_TOKENS (S,) int64. To be made on the host.

    Args:
        mm_token_type_ids: (B, T), 1 on soft tokens.
        image_position_ids: (N, P, 2), -1 where an image has fewer than P patches.
        pooling: so many patches, squared, are a soft token; None: as many as the text has places for.
        used: those of the images' soft tokens that are in the text.

    Raises:
        DataError: the text has no place for each soft token that is used.
    """
    places = (mm_token_type_ids.flatten() == 1).nonzero()[:, 0]
    patches = (image_position_ids != -1).all(dim=-1).sum(dim=1)  # (N,)
    pooled = max(1, int(patches.sum()) // max(1, len(places)) if pooling is None else pooling**2)
    most = image_position_ids.shape[1] // pooled
    rows = torch.arange(most).expand(len(patches), -1)
    is_real = rows < (patches // pooled)[:, None]
    soft_tokens = (rows + most * torch.arange(len(patches))[:, None])[is_real][used]
    if len(soft_tokens) != len(places) or (patches % pooled).any():
        raise DataError(f"{len(places)} soft tokens in the text, for images of {patches.tolist()} patches")
    return {IMAGE_PLACES: places, SOFT_TOKENS: soft_tokens}


def use_known_places(model: Any) -> None:
    """Let a Gemma 4 for images and text take IMAGE_PLACES and SOFT_TOKENS beside its images, if it has what reads
    them."""
    inner = model.model
    if inner.embed_vision is None:
        return
    images = _Images()
    inner.register_forward_pre_hook(images.read, with_kwargs=True)
    if model.config.model_type != UNIFIED:
        inner.vision_tower.encoder.register_forward_pre_hook(images.mask, with_kwargs=True)
        inner.vision_tower.pooler.register_forward_hook(images.choose)


@dataclass
class _Images:
    """Those of one forward pass, on their way from hook to hook."""

    places: torch.Tensor | None = None
    soft_tokens: torch.Tensor | None = None
    features: torch.Tensor | None = None  # (S, width)
    hook: Any = None  # behind the token embedding, until it was called

    def read(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Before `Gemma4Model` and `Gemma4UnifiedModel`: the images become features, and the model sees text alone."""
        self.places, self.soft_tokens = kwargs.pop(IMAGE_PLACES, None), kwargs.pop(SOFT_TOKENS, None)
        if self.places is None or self.soft_tokens is None:
            return args, kwargs
        pixels, positions = kwargs.pop("pixel_values"), kwargs.pop("image_position_ids")
        if model.config.model_type == UNIFIED:
            patches = model.embed_vision(pixels, positions).pooler_output
            self.features = patches.flatten(0, 1).index_select(0, self.soft_tokens)
        else:
            tower = model.vision_tower(pixel_values=pixels, pixel_position_ids=positions)
            self.features = model.embed_vision(inputs_embeds=tower.last_hidden_state)
        self.soft_tokens = None
        if self.hook is None:  # on the outermost module: an adapter of the embedding came later than these hooks
            self.hook = model.get_input_embeddings().register_forward_hook(self.put)
        return args, kwargs

    def mask(self, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Before `Gemma4VisionEncoder`: the mask that transformers would make of the (N, P) patches that are real, and
        none where all are, for which it would look."""
        real = kwargs["attention_mask"]
        if self.soft_tokens is None or encoder.config._attn_implementation != "sdpa":
            return args, kwargs
        whole = len(self.soft_tokens) * encoder.config.pooling_kernel_size**2 == real.numel()
        mask = None if whole else real[:, None, None, :].expand(-1, 1, real.shape[1], -1)
        return args, kwargs | {"attention_mask": mask}

    def choose(self, pooler: Any, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> Any:
        """Behind `Gemma4VisionPooler`: its rows that are soft tokens, for the model to take all of."""
        if self.soft_tokens is None:
            return output
        return output[0].flatten(0, 1).index_select(0, self.soft_tokens), slice(None)

    def put(self, embedding: Any, args: Any, embeddings: torch.Tensor) -> torch.Tensor:
        """Behind the token embedding (B, T, width): the features in their places."""
        assert self.places is not None
        assert self.features is not None
        places, features, self.places, self.features = self.places, self.features, None, None
        self.hook.remove()
        self.hook = None
        return embeddings.flatten(0, 1).index_copy(0, places, features.to(embeddings.dtype)).view_as(embeddings)
