"""Attention inside each document of a pack, exactly as if it were alone, and without a mask over the pack.

A pack is a row of documents one behind the other, whose `position_ids` each start at 0 (`stream/collate.py`). Gemma 4's
own attention would need a mask of row x row tokens for it, and for the styles with bidirectional images the mask that
it builds from such positions is wrong. Here each document is cut out and attended to by itself, so the cost is the sum
of the squares of the documents' lengths; in sliding layers less: a document longer than the window is attended to
window by window. A mask is built only for a window that holds an image, or that begins behind the start of its
document.

What may see what is Gemma 4's own rule (transformers, `create_masks_for_vision_model`): full layers are causal, and
sliding layers see `q - k < sliding_window`, k before q or, where `use_bidirectional_attention` is "vision", in the same
image. Rows that are no packs follow it by `use_image_rule` of vision.py, which says why.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# No mask function is registered under this name, so transformers builds none.
PACKED_ATTENTION = "gemma_dist_packed"
LAYOUT = "layout"  # of a batch, beside its position_ids


@dataclass(frozen=True)
class QueryBlock:
    """Queries of one document and the keys that they see, counted from the document's first token."""

    queries: slice
    keys: slice
    mask: torch.Tensor | None  # (1, 1, queries, keys), True where a query sees a key; None: causal, keys = queries


@dataclass(frozen=True)
class Layout:
    """Where the documents and the images of a batch of packs lie, as numbers of the host."""

    spans: list[tuple[int, int]]  # of each document, in the order of rows and documents: its tokens of B * T
    images: list[int]  # which image each of the B * T tokens is of, 0 for none


# The blocks of each document, in the order of rows and documents, by layer type.
Documents = dict[str, list[list[QueryBlock]]]


def use_packed_attention(model: Any) -> None:
    """Make a Gemma 4 take packs: `position_ids` that restart, and no `attention_mask`.

    The documents are found once in a forward pass and reach every layer as a keyword argument that Gemma 4 passes down.
    Where the batch has its `LAYOUT`, nothing waits for the device.
    """
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    model.set_attn_implementation({"text_config": PACKED_ATTENTION})
    model.model.register_forward_pre_hook(add_documents, with_kwargs=True)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    documents: Documents,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA on each block of each document.

    Args:
        query: (B, heads, T, head_dim); `key` and `value` the same with the key heads.
        settings: scale and dropout, as the layer sets them.

    Returns:
        (B, T, heads, head_dim), and no weights.
    """
    batch_size, _, length, _ = query.shape
    assert attention_mask is None, "a pack has no mask"
    assert key.shape[2] == length, "a pack is read at once: no cache, all logits"
    blocks = documents[module.layer_type]  # type: ignore[index]
    lengths = [document[-1].queries.stop for document in blocks]

    def split(states: torch.Tensor) -> list[torch.Tensor]:
        """One (1, heads, t, head_dim) a document. The gradient of a split is one concatenation, whereas that of
        slices would fill a tensor of the whole pack for each."""
        tokens = states.transpose(1, 2).flatten(0, 1)
        return [document.transpose(0, 1)[None] for document in tokens.split(lengths)]

    outputs = []
    for q, k, v, document in zip(split(query), split(key), split(value), blocks, strict=True):
        for block in document:
            queries, keys, values = q[:, :, block.queries], k[:, :, block.keys], v[:, :, block.keys]
            output, _ = sdpa_attention_forward(module, queries, keys, values, block.mask, **settings)
            outputs.append(output)
    return torch.cat(outputs, dim=1).unflatten(1, (batch_size, length))[0], None


def lay_out(position_ids: torch.Tensor, mm_token_type_ids: torch.Tensor) -> Layout:
    """The layout of a batch of packs. With tensors on a GPU it waits for it: to be made before they are sent there.

    Args:
        position_ids, mm_token_type_ids: as for `find_documents`.
    """
    positions, images = torch.stack([position_ids.flatten(), _number_images(mm_token_type_ids)]).tolist()
    starts = [token for token, position in enumerate(positions) if position == 0]
    assert not any(positions[:: position_ids.shape[1]]), "a row begins with a document"
    return Layout(list(pairwise([*starts, len(positions)])), images)


def find_documents(
    position_ids: torch.Tensor, mm_token_type_ids: torch.Tensor, sliding_window: int, layout: Layout | None = None
) -> Documents:
    """Where the documents of a batch of packs lie, and what their tokens see of one another.

    Args:
        position_ids: (B, T), 0 at the first token of each document, and of each row.
        mm_token_type_ids: (B, T), not 0 on the soft tokens of images that see themselves in both directions. A run of
            them inside a document is one image.
        layout: theirs, if it is known.
    """
    layout = layout or lay_out(position_ids, mm_token_type_ids)
    images = _number_images(mm_token_type_ids)
    whole = [slice(0, end - start) for start, end in layout.spans]
    return {
        "full_attention": [[QueryBlock(document, document, None)] for document in whole],
        "sliding_attention": [
            _windows(images[start:end], layout.images[start:end], sliding_window) for start, end in layout.spans
        ],
    }


def _number_images(mm_token_type_ids: torch.Tensor) -> torch.Tensor:
    """(B, T) -> (B * T,): which image a token is of, 0 for none. Between two images of a document there are other
    tokens, so the number of those tells them apart."""
    is_image = mm_token_type_ids.flatten() != 0
    return torch.where(is_image, 1 + (~is_image).cumsum(0), 0)


def _windows(images: torch.Tensor, numbers: list[int], window: int) -> list[QueryBlock]:
    """One document (T,) of a sliding layer, `window` queries at a time; `numbers` are `images` on the host."""
    blocks = []
    for first in range(0, len(numbers), window):
        end = min(first + window, len(numbers))
        seen, seen_end = max(0, first - window + 1), end
        while seen_end < len(numbers) and numbers[seen_end] == numbers[end - 1] != 0:
            seen_end += 1  # the last query's image continues
        mask = None
        if seen < first or any(numbers[first:end]):
            queries = torch.arange(first, end, device=images.device)[:, None]
            keys = torch.arange(seen, seen_end, device=images.device)
            same_image = (images[first:end, None] == images[seen:seen_end]) & (images[seen:seen_end] != 0)
            mask = (queries - keys < window) & ((keys <= queries) | same_image)
            mask = mask[None, None]
        blocks.append(QueryBlock(slice(first, end), slice(seen, seen_end), mask))
    return blocks


def add_documents(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What is to be done before each forward pass of `Gemma4Model` or `Gemma4UnifiedModel` on packs."""
    assert kwargs.get("attention_mask") is None, "a pack has no attention_mask"
    config, layout = model.config.text_config, kwargs.pop(LAYOUT, None)
    types = kwargs["mm_token_type_ids"]
    if config.use_bidirectional_attention != "vision":
        types = torch.zeros_like(types)
        layout = layout and replace(layout, images=[0] * len(layout.images))
    documents = find_documents(kwargs["position_ids"], types, config.sliding_window, layout)
    return args, kwargs | {"documents": documents}
