"""Masks of rows that are padded on the right, made without asking the device whether anything is padded.

Attention is causal, and images attend within themselves alone, so no token sees the padding behind a row: full layers
need no mask at all, and sliding ones the same for every row. transformers looks at the padding of each micro-batch, for
which the host waits for a GPU, and makes masks of (B, T, T) where it finds some.
"""

from typing import Any

import torch

PADDED_RIGHT = "padded_right"  # of a micro-batch: True, in the place of its attention_mask


def use_right_padding(model: Any) -> None:
    """Let a Gemma 4 take rows that say `PADDED_RIGHT`. To be called before `vision.use_image_rule`, whose rule the
    masks follow."""
    model.model.register_forward_pre_hook(_add_masks, with_kwargs=True)


def _add_masks(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before each forward pass of `Gemma4Model` or `Gemma4UnifiedModel`, which take masks by layer type."""
    if not kwargs.pop(PADDED_RIGHT, False):
        return args, kwargs
    text, token_types = model.config.text_config, kwargs["mm_token_type_ids"]
    if text._attn_implementation != "sdpa":  # others take masks of other kinds, for which transformers does not look
        return args, kwargs | {"attention_mask": torch.ones_like(token_types)}
    joins_images = text.use_bidirectional_attention == "vision" and model.embed_vision is not None
    sliding = sliding_mask(token_types, text.sliding_window, joins_images=joins_images)
    return args, kwargs | {"attention_mask": {"full_attention": None, "sliding_attention": sliding}}


def sliding_mask(mm_token_type_ids: torch.Tensor, window: int, *, joins_images: bool) -> torch.Tensor | None:
    """What the tokens (B, T) of rows see of one another in sliding layers.

    Args:
        mm_token_type_ids: (B, T), not 0 on the soft tokens of images.
        joins_images: whether each of them sees its whole image.

    Returns:
        (B, 1, T, T), or (1, 1, T, T) for all rows, True where a query sees a key; None: causal.
    """
    length = mm_token_type_ids.shape[1]
    if length <= window and not joins_images:
        return None
    tokens = torch.arange(length, device=mm_token_type_ids.device)
    behind = tokens[:, None] - tokens  # how far a key lies behind a query
    sees = (behind >= 0)[None]
    if joins_images:
        is_image = mm_token_type_ids != 0
        images = torch.where(is_image, (~is_image).cumsum(1), -1)  # other tokens lie between two images
        sees = sees | ((images[:, :, None] == images[:, None]) & is_image[:, None])
    return (sees & (behind < window))[:, None]
