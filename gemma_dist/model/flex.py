"""Attention inside each document of a pack by FlexAttention: one call a layer, of the blocks that anything is seen in.

On a GPU torch compiles it; there it was never run, neither forward nor backward. On a CPU torch has its forward pass
alone, which tests/test_packed_attention.py holds against the other way; training there is refused (`require_cpu` of
devices.py).
"""

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

_on_gpu = torch.compile(flex_attention, dynamic=True)  # compiles when it is first called
_masks_on_gpu = torch.compile(create_block_mask, dynamic=True)


def block_masks(
    position_ids: torch.Tensor, mm_token_type_ids: torch.Tensor, window: int, *, sees_images: bool
) -> dict[str, BlockMask]:
    """What the tokens of packs see of one another, by layer type; nothing of it waits for the device.

    Args:
        position_ids, mm_token_type_ids: as for `attention.lay_out`.
        window: of the sliding layers.
        sees_images: whether an image sees itself in both directions there.
    """
    document = (position_ids == 0).cumsum(1)
    is_image = mm_token_type_ids != 0
    image = torch.where(is_image, 1 + (~is_image).cumsum(1), 0)

    def full(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (document[b, q] == document[b, k]) & (k <= q)

    def sliding(b: Any, h: Any, q: Any, k: Any) -> Any:
        seen = k <= q
        if sees_images:
            seen = seen | ((image[b, q] == image[b, k]) & (image[b, q] > 0))
        return seen & (document[b, q] == document[b, k]) & (q - k < window)

    rows, length = position_ids.shape
    create = _masks_on_gpu if position_ids.is_cuda else create_block_mask
    rules = {"full_attention": full, "sliding_attention": sliding}
    return {name: create(rule, rows, None, length, length, position_ids.device) for name, rule in rules.items()}


def flex_attention_of_packs(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    documents: dict[str, BlockMask],
    scaling: float,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """As `attention.packed_attention`, with `block_masks` as the documents. It has no dropout, nor has any Gemma 4."""
    mask = documents[module.layer_type]  # type: ignore[index]
    attend = _on_gpu if query.is_cuda else flex_attention
    grouped = key.shape[1] != query.shape[1]
    output: Any = attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)
    return output.transpose(1, 2).contiguous(), None
