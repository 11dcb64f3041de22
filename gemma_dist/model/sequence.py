"""Attention in a pack that lies over several ranks: each has a slice of its tokens, and gets from the others the keys
and values that its queries see.

A rank of N computes T / N neighboring tokens through all layers; only attention looks beyond them. On a global layer a
slice sees all tokens of its documents up to its own end, on a sliding one those of a window before it, and the rest of
an image that its last token lies in. So one exchange a layer (`all_to_all`, keys and values together) brings each rank
one run of tokens; in the backward pass their gradients go the other way and are added up. Layers that share keys and
values (E2B, E4B) exchange them again. What is exchanged is known to the host of every rank, so no rank asks another.

No mask of slice x pack is made: on global layers a kernel aligns causality at the lower right corner (torch's
`causal_lower_right`; on a CPU, which has no such kernel, it is a mask), one head of keys at a time, so that keys and
values are never repeated for the heads of queries. Sliding layers attend in bands: a window of queries, all windows in
one call, over the keys of two windows.

The slices are of equal length, which is equal work but in the attention of global layers: of one document over N ranks
the last has (2 N - 1) / N times the mean, 1.9 times with 8.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gemma_dist.model.attention import add_documents, packed_attention

# No mask function is registered under this name, so transformers builds none.
SEQUENCE_ATTENTION = "gemma_dist_sequence"
SHARE, NUMBERS = "share", "token_numbers"  # of a batch, beside its position_ids
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Share:
    """Which tokens of a pack are a rank's own, and what the pack looks like, as numbers of the host."""

    rank: int  # among those of the pack
    num_tokens: int  # of each rank
    spans: list[tuple[int, int]]  # of each document, one behind the other: its tokens of the pack
    images: list[int]  # which image each token of the pack is of, 0 for none

    @property
    def num_ranks(self) -> int:
        """That the pack lies over."""
        return len(self.images) // self.num_tokens

    @property
    def own(self) -> range:
        """The tokens of the rank."""
        return self.of(self.rank)

    def of(self, rank: int) -> range:
        """The tokens of another rank."""
        return range(rank * self.num_tokens, (rank + 1) * self.num_tokens)

    def document(self, token: int) -> tuple[int, int]:
        """The span that a token is in."""
        return self.spans[bisect_right(self.spans, token, key=lambda span: span[0]) - 1]

    def rest_of_image(self, end: int) -> int:
        """How many tokens from `end` on are of the image that the token before is of."""
        number, stop, last = self.images[end - 1], self.document(end - 1)[1], end
        while number and last < stop and self.images[last] == number:
            last += 1
        return last - end

    def seen(self, window: int | None, *, whole_images: bool) -> list[range]:
        """The keys that each rank's queries see between them.

        Args:
            window: of a sliding layer; None: of a global one.
            whole_images: whether a sliding layer sees images in both directions.
        """
        found = []
        for rank in range(self.num_ranks):
            own = self.of(rank)
            begin, end = self.document(own.start)[0], own.stop
            if window is not None:
                begin = max(begin, own.start - window + 1)
                end += self.rest_of_image(own.stop) if whole_images else 0
            found.append(range(begin, end))
        return found


@dataclass(frozen=True)
class Exchange:
    """Who sends what to whom, so that each rank gets the run of tokens that it needs."""

    rank: int
    num_tokens: int  # of each rank
    needs: list[range]  # of each rank, tokens of the pack
    group: Any

    @cached_property
    def sent(self) -> list[slice]:
        """What of this rank's own tokens each rank gets."""
        return [self._common(self.rank, needed) for needed in self.needs]

    @cached_property
    def num_received(self) -> list[int]:
        """How many tokens come from each rank."""
        parts = [self._common(rank, self.needs[self.rank]) for rank in range(len(self.needs))]
        return [part.stop - part.start for part in parts]

    @cached_property
    def num_sent(self) -> list[int]:
        """How many tokens go to each rank."""
        return [part.stop - part.start for part in self.sent]

    def gather(self, states: torch.Tensor) -> torch.Tensor:
        """(T / N, …) of this rank's tokens -> (tokens that it needs, …)."""
        sent = torch.cat([states[part] for part in self.sent])
        received = states.new_empty(sum(self.num_received), *states.shape[1:])
        torch.distributed.all_to_all_single(received, sent, self.num_received, self.num_sent, group=self.group)
        return received

    def add_up(self, gradients: torch.Tensor) -> torch.Tensor:
        """The gradients of what `gather` gave, of all ranks, for this rank's tokens."""
        returned = gradients.new_empty(sum(self.num_sent), *gradients.shape[1:])
        torch.distributed.all_to_all_single(
            returned, gradients.contiguous(), self.num_sent, self.num_received, group=self.group
        )
        total = gradients.new_zeros(self.num_tokens, *gradients.shape[1:])
        for part, gradient in zip(self.sent, returned.split(self.num_sent), strict=True):
            total[part] += gradient
        return total

    def _common(self, rank: int, needed: range) -> slice:
        """The tokens of `rank` in `needed`, counted from its first one."""
        first = rank * self.num_tokens
        start, stop = max(first, needed.start), min(first + self.num_tokens, needed.stop)
        return slice(start - first, max(start, stop) - first)


class _Exchanged(torch.autograd.Function):
    """`Exchange.gather`, with its gradient."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange.gather(states)

    @staticmethod
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.exchange.add_up(gradients), None


@dataclass(frozen=True)
class Documents:
    """What a slice attends to on a global layer."""

    exchange: Exchange
    num_queries: list[int]  # of each document in the slice
    num_keys: list[int]  # those before them included
    masks: list[torch.Tensor | None]  # causal at the lower right corner; None: a document that begins in the slice


@dataclass(frozen=True)
class Bands:
    """What a slice attends to on a sliding layer: W queries at a time, and those that are left."""

    exchange: Exchange
    window: int  # W
    num_windows: int
    before: int  # keys that are missing in front of the first window's, and
    after: int  # behind the last one's
    masks: list[torch.Tensor]  # (windows, 1, W, keys), True where a query sees a key; (1, 1, queries, keys) of the rest


Parts = dict[str, Documents | Bands]  # by layer type


def use_sequence_attention(model: Any, group: Any) -> None:
    """Make a Gemma 4 take shares of packs (`stream/cut.py`), whose other parts the ranks of `group` have. Packs that
    are whole it takes as well, as after `use_packed_attention`."""
    AttentionInterface.register(SEQUENCE_ATTENTION, sequence_attention)
    model.set_attn_implementation({"text_config": SEQUENCE_ATTENTION})
    model.model.register_forward_pre_hook(_add_parts(group), with_kwargs=True)


def _add_parts(group: Any) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Arguments]:
    """What is to be done before each forward pass of `Gemma4Model` or `Gemma4UnifiedModel`."""

    def add_parts(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        share = kwargs.pop(SHARE, None)
        if share is None:
            return add_documents(model, args, kwargs)
        assert kwargs.get("attention_mask") is None, "a pack has no attention_mask"
        text, numbers = model.config.text_config, kwargs.pop(NUMBERS)
        whole_images = text.use_bidirectional_attention == "vision"
        kwargs["parts"] = {
            "full_attention": _documents(share, numbers.device, group),
            "sliding_attention": _bands(share, numbers, text.sliding_window, group, whole_images=whole_images),
        }
        return args, kwargs

    return add_parts


def sequence_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    parts: Parts | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a slice's queries to all keys of the pack that they see, or, without `parts`, of a whole pack.

    Args:
        query: (1, heads, T / N, head_dim); `key` and `value` the same with the key heads.
        settings: scaling and dropout, as the layer sets them.

    Returns:
        (1, T / N, heads, head_dim), and no weights.
    """
    if parts is None:
        return packed_attention(module, query, key, value, attention_mask, **settings)
    assert attention_mask is None, "a pack has no mask"
    assert query.shape[0] == 1, "a slice is one row"
    part = parts[module.layer_type]  # type: ignore[index]
    if torch.is_autocast_enabled(query.device.type):
        # Rotations are float32 beside float32 weights. What is exchanged would be, too, and autocast does not see
        # torch's `causal_lower_right`, which calls its kernel with what it is given.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (states.to(dtype) for states in (query, key, value))
    states = torch.stack([key[0].transpose(0, 1), value[0].transpose(0, 1)], dim=1)  # (T / N, 2, key heads, head_dim)
    states = _Exchanged.apply(states, part.exchange)
    if isinstance(part, Bands):
        return _attend_bands(module, query, states, part, settings), None
    return _attend_documents(module, query, states, part, settings), None


def _attend_documents(
    module: Any, query: torch.Tensor, states: torch.Tensor, part: Documents, settings: dict[str, Any]
) -> torch.Tensor:
    """Each document of a slice on a global layer, one head of keys at a time."""
    groups = module.num_key_value_groups
    queries = query[0].unflatten(0, (-1, groups)).split(part.num_queries, dim=2)
    outputs = []
    for of_document, seen, mask in zip(queries, states.split(part.num_keys), part.masks, strict=True):
        how = {"attn_mask": mask, "is_causal": mask is None, "dropout_p": settings["dropout"]}
        keys, values = seen.unbind(1)
        heads = []
        for q, k, v in zip(of_document, keys.unbind(1), values.unbind(1), strict=True):
            k, v = k.expand(1, groups, -1, -1), v.expand(1, groups, -1, -1)
            heads.append(scaled_dot_product_attention(q[None], k, v, **how, scale=settings["scaling"]))
        outputs.append(torch.cat(heads, dim=1).transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _attend_bands(
    module: Any, query: torch.Tensor, states: torch.Tensor, part: Bands, settings: dict[str, Any]
) -> torch.Tensor:
    """A slice on a sliding layer."""
    states = pad(states, (0, 0, 0, 0, 0, 0, part.before, part.after))
    whole = part.num_windows * part.window
    outputs = []
    for mask in part.masks:
        num_windows, _, num_queries, num_keys = mask.shape
        if num_queries * num_windows == whole:
            queries = query[0, :, :whole].unflatten(1, (num_windows, num_queries)).transpose(0, 1)
            seen = states.unfold(0, num_keys, part.window).transpose(-1, -2)
        else:
            queries, seen = query[:, :, whole:], states[whole:].permute(1, 2, 0, 3)[None]
        output, _ = sdpa_attention_forward(module, queries, seen[:, 0], seen[:, 1], mask, **settings)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None]


def _documents(share: Share, device: torch.device, group: Any) -> Documents:
    """What `share` attends to on global layers."""
    needs, own = share.seen(None, whole_images=False), share.own
    num_queries, num_keys, masks = [], [], []
    for start, end in share.spans:
        if start < own.stop and end > own.start:
            end = min(end, own.stop)
            num_queries.append(end - max(start, own.start))
            num_keys.append(end - start)
            masks.append(None if start >= own.start else _lower_right(num_queries[-1], num_keys[-1], device))
    return Documents(Exchange(share.rank, share.num_tokens, needs, group), num_queries, num_keys, masks)


def _lower_right(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """The last queries of a document against all its keys: on a GPU, a word to the kernel and no mask."""
    if device.type == "cuda":
        return causal_lower_right(num_queries, num_keys)
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def _bands(share: Share, numbers: torch.Tensor, window: int, group: Any, *, whole_images: bool) -> Bands:
    """What `share` attends to on sliding layers.

    Args:
        numbers: (2, T), the document and the image of each token of the pack.
    """
    needs, own, num_tokens = share.seen(window, whole_images=whole_images), share.own, len(share.images)
    num_windows = share.num_tokens // window
    ends = [own.start + window * (i + 1) for i in range(num_windows)]
    reach = max(map(share.rest_of_image, [*ends, own.stop])) if whole_images else 0
    first, last = own.start - window + 1, own.stop + reach  # of the keys of all windows
    inside = numbers[:, max(0, first) : last]
    inside = pad(inside, (max(0, -first), max(0, last - num_tokens)), value=-1)
    whole = num_windows * window
    masks = []
    if num_windows:
        of_queries = inside[:, window - 1 : window - 1 + whole].unflatten(1, (num_windows, window))
        of_keys = inside.unfold(1, 2 * window - 1 + reach, window)
        masks.append(_mask(of_queries, of_keys, window, whole_images=whole_images))
    if whole < share.num_tokens:
        of_queries = inside[:, None, window - 1 + whole : window - 1 + share.num_tokens]
        masks.append(_mask(of_queries, inside[:, None, whole:], window, whole_images=whole_images))
    needed = needs[share.rank]
    exchange = Exchange(share.rank, share.num_tokens, needs, group)
    return Bands(exchange, window, num_windows, needed.start - first, last - needed.stop, masks)


def _mask(queries: torch.Tensor, keys: torch.Tensor, window: int, *, whole_images: bool) -> torch.Tensor:
    """Which query sees which key, (B, 1, Q, K).

    Args:
        queries: (2, B, Q), the document and the image of each; `keys` (2, B, K), from W - 1 tokens before them on.
    """
    place = torch.arange(queries.shape[-1], device=queries.device)[:, None] + window - 1
    distance = place - torch.arange(keys.shape[-1], device=queries.device)
    document, image = queries[..., :, None] == keys[..., None, :]
    seen = distance >= 0
    if whole_images:
        seen = seen | (image & (keys[1] > 0)[:, None, :])
    return (document & seen & (distance < window))[:, None]
