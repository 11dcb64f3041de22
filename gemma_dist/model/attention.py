"""Attention inside each document of a pack, exactly as if it were alone, and without a mask over the pack.

A pack is a row of documents one behind the other, whose `position_ids` each start at 0 (`stream/collate.py`). Gemma 4's
own attention would need a mask of row x row tokens for it, and for the styles with bidirectional images the mask that
it builds from such positions is wrong. Here each document is cut out and attended to by itself, so the cost is the sum
of the squares of the documents' lengths; in sliding layers less: a document longer than the window is attended to
window by window. Pieces of like length are attended to in one call (`pieces.py`), so that a layer takes a handful of
launches whatever is packed.

What may see what is Gemma 4's own rule (transformers, `create_masks_for_vision_model`): full layers are causal, and
sliding layers see `q - k < sliding_window`, k before q or, where `use_bidirectional_attention` is "vision", in the same
image. Rows that are no packs follow it by `use_image_rule` of vision.py, which says why.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gemma_dist.model.pieces import Calls, Group, Heads, calls_of

# No mask function is registered under this name, so transformers builds none.
PACKED_ATTENTION = "gemma_dist_packed"
LAYOUT, PLACES = "layout", "layout_places"  # of a batch, beside its position_ids


@dataclass(frozen=True)
class Layout:
    """Where the documents and the images of a batch of packs lie, as numbers of the host."""

    spans: list[tuple[int, int]]  # of each document, in the order of rows and documents: its tokens of B * T
    images: list[int]  # which image each of the B * T tokens is of, 0 for none
    calls: dict[str, Calls] | None = field(default=None, compare=False)  # of a model, whose places are in the batch


@dataclass(frozen=True)
class Shape:
    """What of a model decides on its calls of attention."""

    window: int
    heads: dict[str, Heads]  # by layer type
    sees_images: bool  # in both directions

    @classmethod
    def of(cls, text: Any) -> "Shape":
        """Of a text config."""
        heads = {}
        for layer_type, layer in zip(text.layer_types, text.per_layer_config, strict=True):
            heads[layer_type] = Heads(text.num_attention_heads, layer.num_key_value_heads)
        return cls(text.sliding_window, heads, text.use_bidirectional_attention == "vision")


@dataclass(frozen=True)
class DeviceCalls:
    """The calls of a layer type with their places (`Calls.arrays`) and masks on the device."""

    groups: list[Group]
    heads: Heads
    is_padded: bool
    places: dict[str, torch.Tensor]
    masks: list[torch.Tensor | None]  # of each group: numbers to add, (1 or pieces, 1, queries, keys)


Documents = dict[str, DeviceCalls]  # by layer type


def use_packed_attention(model: Any) -> None:
    """Make a Gemma 4 take packs: `position_ids` that restart, and no `attention_mask`.

    The calls are found once in a forward pass, or by whoever made the batch (`add_layout`), so that nothing waits for
    the device, and reach every layer as a keyword argument that Gemma 4 passes down.
    """
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    model.set_attn_implementation({"text_config": PACKED_ATTENTION})
    model.model.register_forward_pre_hook(_add_documents, with_kwargs=True)


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
    """SDPA on each group of pieces: transformers' own where nothing is masked.

    Args:
        query: (B, heads, T, head_dim); `key` and `value` the same with the key heads.
        settings: scaling and dropout, as the layer sets them.

    Returns:
        (B, T, heads, head_dim), and no weights.
    """
    batch_size, num_heads, length, head_dim = query.shape
    assert attention_mask is None, "a pack has no mask"
    assert key.shape[2] == length, "a pack is read at once: no cache, all logits"
    calls: DeviceCalls = documents[module.layer_type]  # type: ignore[index]
    key_rows, key_places = calls.places.get("key_rows"), calls.places.get("key_places")
    rows, places = calls.places.get("query_rows"), calls.places.get("query_places")
    queries = _take(query.transpose(1, 2).reshape(-1, head_dim), rows, places)
    keys, values = (_take(states.transpose(1, 2).flatten(0, 1), key_rows, key_places) for states in (key, value))
    outputs = []
    for group, mask, q, k, v in zip(
        calls.groups, calls.masks, *_split(calls, queries, keys, values), strict=True
    ):
        if mask is None:
            output, _ = sdpa_attention_forward(module, q, k, v, None, **settings)
        else:
            dropout, scale = settings["dropout"], settings["scaling"]
            output = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask.to(q.dtype), dropout_p=dropout, scale=scale
            ).transpose(1, 2)
        outputs.append(output.reshape(-1, head_dim))
    output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    output = _take(output, places, rows, is_padded=calls.is_padded)
    return output.view(batch_size, length, num_heads, head_dim), None


def _split(calls: DeviceCalls, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Any:
    """Of each group the queries, keys and values, (pieces, heads, tokens, head_dim)."""
    heads, groups = calls.heads, calls.groups
    num_queries = [group.pieces * group.queries * heads.queries for group in groups]
    num_keys = [group.pieces * group.keys for group in groups]
    if len(keys) > sum(num_keys):
        num_keys.append(len(keys) - sum(num_keys))
    parts = []
    for states, sizes in ((queries, num_queries), (keys, num_keys), (values, num_keys)):
        pieces = []
        for group, part in zip(groups, states.split(sizes) if len(sizes) > 1 else [states], strict=False):
            of_key_head = states is not queries or group.kind != "causal"
            shape = (group.pieces, -1, heads.keys if of_key_head else heads.queries, queries.shape[-1])
            pieces.append(part.view(shape).transpose(1, 2))
        parts.append(pieces)
    return parts


class _Take(torch.autograd.Function):
    """Rows of a tensor, (N, …) -> (M, …). The gradient is gathered as well: torch's own adds each row to where it was
    taken from, in an order that changes from run to run on a GPU."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, is_padded: bool
    ) -> torch.Tensor:
        ctx.rows, ctx.places, ctx.is_padded = rows, places, is_padded
        return states.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        places = ctx.places
        if ctx.is_padded:
            padded = gradient.new_zeros(len(places), *gradient.shape[1:])
            return padded.index_copy_(0, ctx.rows, gradient), None, None, None
        taken = gradient.index_select(0, places.flatten())
        return (taken if places.dim() == 1 else taken.unflatten(0, places.shape).sum(1)), None, None, None


def _take(
    states: torch.Tensor, rows: torch.Tensor | None, places: torch.Tensor | None, *, is_padded: bool = False
) -> torch.Tensor:
    """The `rows` of `states`; all as they stand if None.

    Args:
        places: (N,) where each row of `states` stands in the result, or (N, k), where it may stand in several places
            and what fills them up is a row that gets no gradient.
        is_padded: whether some rows of `states` are not taken, and `places` say nothing of them.
    """
    if rows is None or places is None:
        return states
    taken: torch.Tensor = _Take.apply(states, rows, places, is_padded)
    return taken


def lay_out(position_ids: torch.Tensor, mm_token_type_ids: torch.Tensor) -> Layout:
    """The layout of a batch of packs. With tensors on a GPU it waits for it: to be made before they are sent there.

    Args:
        position_ids: (B, T), 0 at the first token of each document, and of each row.
        mm_token_type_ids: (B, T), not 0 on the soft tokens of images. A run of them inside a document is one image.
    """
    positions, images = torch.stack([position_ids.flatten(), _number_images(mm_token_type_ids)]).tolist()
    starts = [token for token, position in enumerate(positions) if position == 0]
    assert not any(positions[:: position_ids.shape[1]]), "a row begins with a document"
    return Layout(list(pairwise([*starts, len(positions)])), images)


def add_calls(layout: Layout, shape: Shape) -> tuple[Layout, torch.Tensor]:
    """`layout` with the calls of attention, and their places in one tensor, to be sent to the device at once."""
    images = layout.images if shape.sees_images else [0] * len(layout.images)
    calls = calls_of(layout.spans, images, shape.heads, shape.window)
    arrays = [array.ravel() for of_type in calls.values() for array in of_type.arrays.values()]
    places = torch.from_numpy(np.concatenate(arrays)) if arrays else torch.empty(0, dtype=torch.int64)
    return Layout(layout.spans, layout.images, calls), places


def find_documents(layout: Layout, places: torch.Tensor, shape: Shape, dtype: torch.dtype) -> Documents:
    """The calls of `layout` with their places, as `add_calls` gives them, on a device, and masks in `dtype`."""
    assert layout.calls is not None
    documents, at = {}, 0
    for layer_type, calls in layout.calls.items():
        parts = {}
        for name, array in calls.arrays.items():
            parts[name] = places[at : at + array.size].view(array.shape)
            at += array.size
        heads = shape.heads[layer_type]
        masks = _masks(calls.groups, parts.pop("images", None), shape.window, heads, places.device, dtype)
        documents[layer_type] = DeviceCalls(calls.groups, heads, calls.is_padded, parts, masks)
    return documents


def _masks(
    groups: list[Group], images: torch.Tensor | None, window: int, heads: Heads, device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor | None]:
    """Of each group, (1 or pieces, 1, queries, keys), each query once for every query head of its key head."""
    masks: list[torch.Tensor | None] = []
    for group in groups:
        if group.kind == "causal":
            masks.append(None)
            continue
        if group.kind == "band":
            ahead = torch.arange(group.keys, device=device) - torch.arange(group.queries, device=device)[:, None]
            seen = ((ahead >= 0) & (ahead < window))[None]
        else:
            assert images is not None
            num_queries, num_keys = group.pieces * group.queries, group.pieces * group.keys
            parts = images[: 2 * (num_queries + num_keys)].split([num_queries, num_queries, num_keys, num_keys])
            images = images[2 * (num_queries + num_keys) :]
            position, image = (part.view(group.pieces, -1, 1) for part in parts[:2])
            key_position, key_image = (part.view(group.pieces, 1, -1) for part in parts[2:])
            seen = (position - key_position < window) & (key_position <= position)
            seen = (seen | ((image == key_image) & (image > 0) & (position - key_position < window)))
            seen = (seen & (key_position >= 0)) | (position < 0)
        mask = torch.where(seen, 0.0, -math.inf).to(dtype)
        masks.append(mask.repeat_interleave(heads.queries // heads.keys, dim=1)[:, None])
    return masks


def _number_images(mm_token_type_ids: torch.Tensor) -> torch.Tensor:
    """(B, T) -> (B * T,): which image a token is of, 0 for none. Between two images of a document there are other
    tokens, so the number of those tells them apart."""
    is_image = mm_token_type_ids.flatten() != 0
    return torch.where(is_image, 1 + (~is_image).cumsum(0), 0)


def _add_documents(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before each forward pass of `Gemma4Model` or `Gemma4UnifiedModel`."""
    assert kwargs.get("attention_mask") is None, "a pack has no attention_mask"
    shape = Shape.of(model.config.text_config)
    positions = kwargs["position_ids"]
    layout, places = kwargs.pop(LAYOUT, None), kwargs.pop(PLACES, None)
    if places is None:
        layout, places = add_calls(layout or lay_out(positions, kwargs["mm_token_type_ids"]), shape)
        places = places.to(positions.device)
    kind = positions.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    return args, kwargs | {"documents": find_documents(layout, places, shape, dtype)}
