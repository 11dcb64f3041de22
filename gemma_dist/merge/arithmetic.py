"""The sum itself: what one tensor of the base becomes, in the order of operations that PEFT and bitsandbytes use.

Held at a time: one tensor as the base stores it, and its sum in float32.
"""

import torch

from gemma_dist.errors import CheckpointError
from gemma_dist.merge.plan import Lora, TensorOp
from gemma_dist.model.record import Quantization
from gemma_dist.tensorfile import Entry, TensorFile


def four_bit_round_trip(weight: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """`weight` as a 4-bit layer of bitsandbytes holds it, made full again.

    Bit-equal to `dequantize_4bit(layer.weight.data, layer.weight.quant_state)` of the loaded layer: same block size
    (64, its default), same double quantization, from and to the dtype that the weight was loaded in. Takes the whole
    tensor, since double quantization subtracts the mean of all its block scales; a stack of experts goes one by one.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from gemma_dist.model.experts import BLOCK_SIZE, quantize_stack

    if dtype := quantization.get("weights_dtype"):
        weight = weight.to(getattr(torch, dtype))
    quant_type = quantization["bnb_4bit_quant_type"]
    double = quantization.get("bnb_4bit_use_double_quant", False)
    if weight.dim() == 3:
        packed, state = quantize_stack(weight, quant_type=quant_type, compress_statistics=double)
    else:
        packed, state = quantize_4bit(weight, blocksize=BLOCK_SIZE, compress_statistics=double, quant_type=quant_type)
    return dequantize_4bit(packed, state)


def add_lora(weight: torch.Tensor, lora: Lora, adapter: TensorFile) -> torch.Tensor:
    """W + s * (B @ A) in float32; with DoRA, each row scaled from its norm to its trained magnitude.

    In PEFT's order of operations (`get_delta_weight` of `Linear` and `ParamWrapper`, `DoraLinearVariant.merge_unsafe`),
    so that the bits agree.
    """
    a, b = adapter.read(lora.a).float(), adapter.read(lora.b).float()
    if lora.num_experts is None:
        delta = b @ a
    else:
        a, b = a.view(lora.num_experts, -1, a.shape[1]), b.view(len(b), -1, lora.num_experts)
        delta = torch.einsum("ore,eri->eoi", b, a)
    delta.mul_(lora.scale)
    merged = delta.add_(weight)  # summed in float32, whatever the weight's dtype
    if lora.magnitude is None:
        return merged
    scale = adapter.read(lora.magnitude).float() / torch.linalg.norm(merged, dim=1)
    return merged.mul_(scale.view(-1, 1))


def merged_tensor(
    op: TensorOp, entry: Entry, shard: TensorFile, adapter: TensorFile, quantization: Quantization | None
) -> torch.Tensor:
    """One changed tensor, in the shape and dtype of the base's."""
    base = shard.read(op.name)
    if op.replaced_by is not None:
        result = adapter.read(op.replaced_by)
    else:
        result = base
        if op.quantized:
            assert quantization is not None
            result = four_bit_round_trip(result, quantization)
        if op.lora is not None:
            result = add_lora(result, op.lora, adapter)
    result = result.to(base.dtype)
    if not torch.stack(torch.aminmax(result)).isfinite().all():  # a NaN anywhere is both its least and its greatest
        raise CheckpointError(
            f"{op.name} would hold NaN or infinity after the merge: the training diverged, or {base.dtype} cannot "
            "hold the sum. Merge an earlier checkpoint of the adapter"
        )
    assert tuple(result.shape) == entry.shape
    return result
