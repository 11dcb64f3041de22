"""Activations in host memory between the forward and the backward pass.

With checkpointing a step keeps the inputs of each layer, hidden states of every token: 42 x 20 MiB for E4B at 4,096
tokens, 60 x 42 MiB for 31B. The backward pass asks for them one by one, the last first. Within `activations_on_host`
they are copied to page-locked host memory as they are kept, and back as they are asked for. What moves comes back bit
for bit.

TRL has such a setting of the same name, which moves all saved tensors on a second stream. It is not used: it does not
run without a GPU, so nothing here could be compared with anything, and beside bitsandbytes it empties the allocator's
cache at every micro-batch. Here all copies are on the stream that computes, in their order, which is safe without any
further waiting.
"""

from typing import NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 2**16  # bytes; below, a copy costs more than the memory is worth


class OnHost(NamedTuple):
    """A tensor that was moved."""

    copy: torch.Tensor
    device: torch.device


class activations_on_host(saved_tensors_hooks):
    """Within, what a forward pass keeps for the backward pass lies in host memory: activations, and no weights.

    On the CPU they are copied all the same, so that tests see what a GPU would do.
    """

    def __init__(self) -> None:
        self.num_bytes = 0  # that were moved
        super().__init__(self._pack, _unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | OnHost:
        if isinstance(tensor, torch.nn.Parameter) or tensor.nbytes < SMALLEST:
            return tensor
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copy.copy_(tensor, non_blocking=True)
        self.num_bytes += copy.nbytes
        return OnHost(copy, tensor.device)


def _unpack(packed: torch.Tensor | OnHost) -> torch.Tensor:
    return packed.copy.to(packed.device, non_blocking=True) if isinstance(packed, OnHost) else packed
