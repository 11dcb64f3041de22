"""Attention of answers that are being written: each token sees its prompt where the tree has it, and its own answer.

The prompts of a tree share almost all of their tokens, so keys and values of a tree are read once for all rows that
answer one of its prompts: R rows against N tokens are one product of matrices for each head. Beside them each row has
the few tokens of its answer. One softmax, in float32, goes over both.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TREE_ATTENTION = "gemma_dist_tree"


@dataclass(frozen=True)
class Sight:
    """What the next token of each of B rows sees: in the place of a mask."""

    rows: list[torch.Tensor]  # of each tree: which rows, (R,), answer one of its prompts
    hidden: (
        torch.Tensor
    )  # (B, 1, S + N) bool: what is not seen of the S slots of answers and of the tree, N the longest


@dataclass(frozen=True)
class States:
    """Keys or values that are seen: in the place of one tensor."""

    own: torch.Tensor  # (heads, B, S, width)
    of_trees: list[torch.Tensor]  # of each tree: (heads, tokens, width)


def use_tree_attention(model: Any) -> None:
    """Let a Gemma 4 write with a `RowCache`; whatever comes as tensors is attended to by SDPA as before."""
    AttentionInterface.register(TREE_ATTENTION, tree_attention)
    AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
    model.set_attn_implementation({"text_config": TREE_ATTENTION})


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | States,
    value: torch.Tensor | States,
    attention_mask: torch.Tensor | Sight | None,
    *,
    scaling: float,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """One query in each row.

    Args:
        query: (B, heads, 1, width); a head of keys and values is that of several of these.

    Returns:
        (B, 1, heads, width), and no weights.
    """
    if not isinstance(key, States) or not isinstance(value, States) or not isinstance(attention_mask, Sight):
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
        return output, None
    num_rows, num_heads, _, width = query.shape
    queries = (query * scaling).view(num_rows, len(key.own), -1, width).transpose(0, 1).contiguous()
    num_own = key.own.shape[2]
    scores = queries.new_empty((*queries.shape[:3], attention_mask.hidden.shape[-1]), dtype=torch.float32)
    scores[..., :num_own] = _product(queries, key.own.mT)
    for rows, states in zip(attention_mask.rows, key.of_trees, strict=True):
        product = _product(queries.index_select(1, rows), states.mT)
        scores[..., num_own : num_own + states.shape[1]].index_copy_(1, rows, product)
    shares = scores.masked_fill_(attention_mask.hidden, -math.inf).softmax(-1).to(query.dtype)
    output = _product(shares[..., :num_own], value.own)
    for rows, states in zip(attention_mask.rows, value.of_trees, strict=True):
        of_tree = shares[..., num_own : num_own + states.shape[1]].index_select(1, rows)
        output.index_add_(1, rows, _product(of_tree, states))
    return output.to(query.dtype).transpose(0, 1).reshape(num_rows, 1, num_heads, width), None


def _product(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(heads, rows, M, K) x (heads, rows, K, N), or (heads, K, N) for all rows, -> (heads, rows, M, N) in float32, in
    which sums are made whatever these are in."""
    flat, second = (first.flatten(1, 2), second) if second.ndim == 3 else (first.flatten(0, 1), second.flatten(0, 1))
    if first.is_cuda and first.dtype != torch.float32:
        product = torch.bmm(flat, second, out_dtype=torch.float32)
    else:
        product = torch.bmm(flat.float(), second.float())
    return product.view(*first.shape[:3], -1)
