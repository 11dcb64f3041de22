"""4-bit weights on a CPU as on a GPU.

The CPU kernel of bitsandbytes 0.50 multiplies with the scales of other blocks where the values of a row are no multiple
of the block size, 64: in the vision towers of 26B-A4B and 31B, whose MLPs are 4,304 wide, nine values in ten come out
wrong. A GPU takes the values one after the other, whatever the rows are. So here they are given as rows of 64.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch


@cache
def dequantize_as_gpus_do() -> torch.library.Library:
    """Let bitsandbytes' 4-bit weights be made full on a CPU from the scales of their own blocks. For this process; to
    be called before, and as often as one likes."""
    import bitsandbytes  # noqa: F401 (it registers what is replaced)

    kernel = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")

    def dequantize(
        keys: Any,
        codes: torch.Tensor,
        absmax: torch.Tensor,
        blocksize: int,
        quant_type: str,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> Any:
        if shape[-1] % blocksize == 0:
            return kernel.call_boxed(keys, codes, absmax, blocksize, quant_type, shape, dtype)
        num_values = math.prod(shape)
        codes = codes.view(torch.uint8).view(-1)
        codes = torch.nn.functional.pad(codes, (0, len(absmax) * blocksize // 2 - len(codes)))
        rows = [len(absmax), blocksize]
        full = kernel.call_boxed(keys, codes, absmax, blocksize, quant_type, rows, dtype)
        return full.view(-1)[:num_values].view(*shape)

    library = torch.library.Library("bitsandbytes", "IMPL")
    library.impl("dequantize_4bit", dequantize, "CPU", with_keyset=True)
    return library  # what it registers goes with it
