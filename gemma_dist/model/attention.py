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
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gemma_dist.model.pieces import Calls, Group, Heads, calls_of

# No mask function is registered under these names, so transformers builds none.
PACKED_ATTENTION, PACKED_FLEX = "gemma_dist_packed", "gemma_dist_packed_flex"
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


class Slots(NamedTuple):
    """Where the queries or keys of a pack stand in the calls of a layer type: `pieces.Calls`."""

    numbers: torch.Tensor  # of the pack's, in each slot of the calls
    places: torch.Tensor  # (states, N, places): the slots of each of the pack's N


@dataclass(frozen=True)
class DeviceCalls:
    """The calls of a layer type, with their places and masks on the device."""

    groups: list[Group]
    heads: Heads
    is_padded: bool
    queries: Slots | None  # None: all stand as in the pack
    keys: Slots | None
    masks: list[torch.Tensor | None]  # of each group: numbers to add, (1 or rows, 1, queries, keys)


Documents = dict[str, DeviceCalls]  # by layer type


def use_packed_attention(model: Any, implementation: str = "sdpa") -> None:
    """Make a Gemma 4 take packs: `position_ids` that restart, and no `attention_mask`.

    Args:
        implementation: `flex_attention` (`flex.py`), or any other for what is described here.

    The calls are found once in a forward pass, or by whoever made the batch (`add_calls`), so that nothing waits for
    the device, and reach every layer as a keyword argument that Gemma 4 passes down.
    """
    if is_flex := implementation == "flex_attention":
        from gemma_dist.model.flex import flex_attention_of_packs

        AttentionInterface.register(PACKED_FLEX, flex_attention_of_packs)
    else:
        AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    model.set_attn_implementation({"text_config": PACKED_FLEX if is_flex else PACKED_ATTENTION})
    model.model.register_forward_pre_hook(_add_block_masks if is_flex else add_documents, with_kwargs=True)


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
    outputs = []
    for group, mask, (q, k, v) in zip(calls.groups, calls.masks, _spread(calls, query, key, value), strict=True):
        if group.kind == "causal":
            output, _ = sdpa_attention_forward(module, q, k, v, None, **settings)
        else:
            assert mask is not None
            output = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask.to(q.dtype), dropout_p=settings["dropout"], scale=settings["scaling"]
            ).transpose(1, 2)
        outputs.append(output.reshape(-1, head_dim))
    output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    if calls.queries is not None:
        output = _Collect.apply(output, calls.queries, calls.is_padded)
    return output.view(batch_size, length, num_heads, head_dim), None


def _spread(
    calls: DeviceCalls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> Iterator[list[torch.Tensor]]:
    """Of each group the queries, keys and values, (rows, heads, tokens, head_dim)."""
    heads, head_dim = calls.heads, query.shape[-1]
    num_queries = [group.rows * group.queries * heads.queries for group in calls.groups]
    num_keys = [group.rows * group.keys for group in calls.groups]
    queries = _parts(calls.queries, num_queries, query.transpose(1, 2).reshape(-1, head_dim))
    keys = _parts(calls.keys, num_keys, *(states.transpose(1, 2).flatten(0, 1) for states in (key, value)))
    count = len(calls.groups)
    for group, q, k, v in zip(calls.groups, queries, keys[:count], keys[count:], strict=True):
        num_heads = heads.queries if group.kind == "causal" else heads.keys
        parts = ((q, num_heads), (k, heads.keys), (v, heads.keys))
        yield [part.view(group.rows, -1, number, head_dim).transpose(1, 2) for part, number in parts]


def _parts(slots: Slots | None, sizes: list[int], *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What groups of so many slots take of states (N, …), for one of these after the other."""
    if slots is None:
        return states if len(sizes) == 1 else tuple(part for one in states for part in one.split(sizes))
    parts: tuple[torch.Tensor, ...] = _Spread.apply(slots, sizes, *states)
    return parts


class _Spread(torch.autograd.Function):
    """`_parts`. The gradient is gathered as well: torch's own would add up what stands in several places in an order
    that changes from run to run on a GPU, and for each state by itself."""

    @staticmethod
    def forward(ctx: Any, slots: Slots, sizes: list[int], *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.places = slots.places
        return tuple(part for one in states for part in one.index_select(0, slots.numbers).split(sizes))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        picked = torch.cat(gradients).index_select(0, ctx.places.flatten()).unflatten(0, ctx.places.shape)
        each = picked.sum(2) if picked.shape[2] > 1 else picked.squeeze(2)
        return None, None, *each.unbind()


class _Collect(torch.autograd.Function):
    """The pack's queries out of the slots of the calls. Padded ones get a gradient of 0."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, slots: Slots, is_padded: bool) -> torch.Tensor:
        ctx.slots, ctx.is_padded = slots, is_padded
        return states.index_select(0, slots.places.flatten())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        slots: Slots = ctx.slots
        if not ctx.is_padded:
            return gradient.index_select(0, slots.numbers), None, None
        padded = gradient.new_zeros(len(slots.numbers), *gradient.shape[1:])
        return padded.index_copy_(0, slots.places.flatten(), gradient), None, None


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
        arrays = {}
        for name, array in calls.arrays.items():
            arrays[name] = places[at : at + array.size].view(array.shape)
            at += array.size
        heads = shape.heads[layer_type]
        query_slots, key_slots = (
            Slots(arrays[f"{name}_slots"], arrays[f"{name}_places"]) if f"{name}_slots" in arrays else None
            for name in ("query", "key")
        )
        masks = list(_masks(calls, arrays.get("masks"), heads, places.device, dtype))
        documents[layer_type] = DeviceCalls(calls.groups, heads, calls.is_padded, query_slots, key_slots, masks)
    return documents


def _masks(
    calls: Calls, codes: torch.Tensor | None, heads: Heads, device: torch.device, dtype: torch.dtype
) -> Iterator[torch.Tensor | None]:
    """Of each group, (1 or rows, 1, queries, keys), each query once for every query head of its key head."""
    at = 0
    for group in calls.groups:
        if group.kind == "causal":
            yield None
            continue
        if group.kind == "band":
            ahead = torch.arange(group.keys, device=device) - torch.arange(group.queries, device=device)[:, None]
            seen = ((ahead >= 0) & (ahead < calls.window))[None]
        else:
            assert codes is not None
            parts = []
            for width, shape in ((group.queries, (group.rows, -1, 1)), (group.keys, (group.rows, 1, -1))):
                for _ in range(2):
                    parts.append(codes[at : at + group.rows * width].view(shape))
                    at += group.rows * width
            query, image, key, image_of_key = parts
            behind = query - key  # of keys in other documents, far off
            before_or_image = (behind >= 0) | ((image == image_of_key) & (image >= 0))
            seen = (before_or_image & (behind < calls.window) & (key >= 0)) | (query < 0)
        mask = torch.where(seen, 0.0, -math.inf).to(dtype)
        yield mask.repeat_interleave(heads.queries // heads.keys, dim=1)[:, None]


def _number_images(mm_token_type_ids: torch.Tensor) -> torch.Tensor:
    """(B, T) -> (B * T,): which image a token is of, 0 for none. Between two images of a document there are other
    tokens, so the number of those tells them apart."""
    is_image = mm_token_type_ids.flatten() != 0
    return torch.where(is_image, 1 + (~is_image).cumsum(0), 0)


def add_documents(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What is to be done before each forward pass of `Gemma4Model` or `Gemma4UnifiedModel` on packs."""
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


def _add_block_masks(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As `add_documents`, for FlexAttention."""
    from gemma_dist.model.flex import block_masks

    assert kwargs.get("attention_mask") is None, "a pack has no attention_mask"
    shape = Shape.of(model.config.text_config)
    kwargs = {name: value for name, value in kwargs.items() if name not in (LAYOUT, PLACES)}
    positions, types = kwargs["position_ids"], kwargs["mm_token_type_ids"]
    masks = block_masks(positions, types, shape.window, sees_images=shape.sees_images)
    return args, kwargs | {"documents": masks}
