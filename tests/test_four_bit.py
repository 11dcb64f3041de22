"""4-bit weights on a CPU are those of a GPU, whatever shape they have."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from gemma_dist.model.four_bit_cpu import dequantize_as_gpus_do


def by_hand(codes: torch.Tensor, state: object) -> torch.Tensor:
    """Two codes a byte, the first in the upper half; one scale for each 64 values in the order of the memory."""
    halves = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], 1).view(-1).long()
    values = state.code[halves][: state.shape.numel()]  # type: ignore[attr-defined]
    scales = state.absmax.repeat_interleave(64)[: len(values)]  # type: ignore[attr-defined]
    return (values * scales).view(state.shape)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 4304), (100, 176), (10, 80), (172, 32), (7, 33), (64, 128), (2, 4, 96)])
def test_each_value_has_the_scale_of_its_own_block(shape: tuple[int, ...], quant_type: str, dtype: torch.dtype) -> None:
    dequantize_as_gpus_do()
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=dtype)
    codes, state = quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=False)
    full = dequantize_4bit(codes, state)
    assert full.dtype == dtype
    assert torch.equal(full, by_hand(codes, state).to(dtype))
