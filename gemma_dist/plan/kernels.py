"""What CUDA's kernels take of memory where the CPU's take something else, for a step that is simulated on a fake CPU.

Read in the sources of torch 2.14 (attention: `flash_api.cpp`, `attention.cu`, `attention_backward.cu`,
`mem_eff_attention/kernel_backward.h`), bitsandbytes 0.50 (`backends/cuda/ops.py`) and TRL 1.16
(`kernels/chunked_logprob.py`). Each takes its scratch memory from the same allocator as the tensors.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

LARGEST_FLASH_HEAD = 256  # dimension; FlashAttention-2 ends there
LARGEST_REGISTER_HEAD = 128  # above, the memory-efficient kernels accumulate in memory
QUERIES, KEYS = 128, 64  # of a block of the memory-efficient backward kernel for large heads
MAX_SPLITS = 200  # of its keys, over all heads
MASK_ALIGNMENT = 8  # elements of a row of an attention mask


@contextmanager
def cuda_kernels(loss_head: Any) -> Iterator[None]:
    """Within, attention, the fused LM head and autocast allocate what they do on CUDA.

    Args:
        loss_head: the module `trl.kernels.chunked_logprob`.
    """
    from trl.trainer import utils

    with ExitStack() as patches:
        patches.enter_context(patch.object(F, "scaled_dot_product_attention", _attention))
        for module in (loss_head, utils):
            patches.enter_context(patch.object(module, "_use_triton", lambda device: True))
        for kernel in ("_forward_kernel", "_backward_kernel"):  # in place, on one tile
            patches.enter_context(patch.object(loss_head, kernel, _InPlace()))
        patches.enter_context(patch.object(loss_head, "_addmm_fp32", lambda total, a, b: None))
        if not hasattr(loss_head, "triton"):
            patches.enter_context(patch.object(loss_head, "triton", _Triton, create=True))
        patches.enter_context(_CudaAutocast())
        yield


def scratch(device: str, func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that an operator takes while it runs, beside its results; `device` is cpu or cuda."""
    if func is torch.ops.bitsandbytes.gemm_4bit.default:
        return _four_bit_matmul(device, *args)
    if device == "cuda" and func is torch.ops.aten.masked_scatter.default:
        return args[1].numel() * 8  # how many are set before each
    return 0


def _four_bit_matmul(
    device: str, inputs: torch.Tensor, weight: torch.Tensor, shape: Any, scales: torch.Tensor, block: int, *more: Any
) -> int:
    """The weight in the dtype of the inputs, and its scales if they are quantized themselves: on CUDA before and after
    their offset is added."""
    num_elements = math.prod(shape)
    nested = len(more) > 2 and more[2] is not None
    return num_elements * inputs.dtype.itemsize + nested * (2 if device == "cuda" else 1) * 4 * (num_elements // block)


class _InPlace:
    """A Triton kernel that allocates nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


class _Triton:
    """What `chunked_logprob` asks of Triton, where it is not installed."""

    cdiv = staticmethod(lambda a, b: -(-a // b))


class _CudaAutocast(TorchFunctionMode):
    """CUDA's autocast computes these in float32, the CPU's in the dtype that they come in."""

    IN_FLOAT32 = frozenset(
        getattr(place, name)
        for place in (torch, torch.Tensor)
        for name in ("sum", "prod", "cumsum", "pow", "rsqrt", "reciprocal", "exp", "log", "softmax", "log_softmax")
    ) | {F.softmax, F.log_softmax, F.layer_norm}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.IN_FLOAT32 and torch.is_autocast_enabled("cpu") and kwargs.get("dtype") is None:
            first, *rest = args
            if isinstance(first, torch.Tensor) and first.dtype == torch.bfloat16:
                args = (first.float(), *rest)
        return func(*args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """SDPA (batch, heads, tokens, head_dim) by the kernel that CUDA would choose."""
    in_16_bits, head_dim = query.dtype.itemsize == 2, query.shape[-1]
    if attn_mask is None and in_16_bits and head_dim <= LARGEST_FLASH_HEAD:
        return _Flash.apply(query, key, value)
    if enable_gqa and key.shape[1] != query.shape[1]:
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True
        )[0]
    if attn_mask is not None:
        attn_mask = _as_bias(attn_mask, query.dtype)
    return _Efficient.apply(query, key, value, attn_mask)


def _as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as numbers to add, its rows aligned."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask.logical_not(), -math.inf, torch.zeros((), dtype=dtype))
    missing = -mask.shape[-1] % MASK_ALIGNMENT
    return F.pad(mask, (0, missing)) if missing else mask


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """(batch, heads, tokens, head_dim), in memory by tokens, as the kernels write it."""
    batch, heads, tokens, head_dim = tensor.shape
    return torch.empty(batch, tokens, heads, head_dim, dtype=tensor.dtype).transpose(1, 2)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class _Flash(torch.autograd.Function):
    """FlashAttention-2: no mask, 16 bits; keys and values may have fewer heads."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, tokens, _ = query.shape
        output = _like(query)
        log_sums = torch.empty(batch, heads, tokens)
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        batch, heads, tokens, head_dim = query.shape
        grads = [_like(query), _like(key), _like(value)]
        rounded = _up(tokens, 128)
        delta = torch.empty(batch, heads, rounded)
        grad_query = torch.empty(batch, rounded, heads, _up(head_dim, 32))
        if key.shape[1] != heads:
            shape = batch, key.shape[2], heads, head_dim
            expanded = [torch.empty(shape, dtype=key.dtype) for _ in range(2)]
            del expanded
        del delta, grad_query
        return tuple(grads)


class _Efficient(torch.autograd.Function):
    """The memory-efficient kernel: any head dimension, and a mask as numbers; all have the same heads."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        batch, heads, tokens, head_dim = query.shape
        output = _like(query)
        log_sums = torch.empty(batch, heads, _up(tokens, 32))
        if head_dim > LARGEST_REGISTER_HEAD and query.dtype.itemsize == 2:
            total = torch.empty(batch, tokens, heads, head_dim)
            del total
        ctx.save_for_backward(query, key, value, output, log_sums, bias)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        batch, heads, tokens, head_dim = query.shape
        grads = [_like(query), _like(key), _like(value)]
        delta = torch.empty(batch, heads, tokens)
        workspace = _up(tokens, QUERIES) * _up(head_dim, KEYS)
        if head_dim > LARGEST_REGISTER_HEAD:
            splits = max(1, min(-(-key.shape[2] // KEYS), MAX_SPLITS // (batch * heads)))
            workspace += 2 * splits * KEYS * _up(head_dim, QUERIES)
        scratch = torch.empty(batch * heads * workspace)
        del delta, scratch
        return (*grads, None)
