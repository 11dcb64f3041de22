"""What cannot be timed without a GPU is counted: waits for the device, collectives and the bytes they send.

On a CPU every operator runs at once, so a wait costs nothing there and nobody sees it. Each is found by what it calls,
and belongs to the package whose code called it.
"""

import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

# That a call may belong to: the innermost one whose code is on the stack.
PACKAGES = ("gemma_dist", "trl", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes")


class Counted(TorchDispatchMode):
    """Within, counts per package what this thread does.

    `waits`: a number of the device is read by the host (`.tolist()`, or `_local_scalar_dense`, which .item(), bool()
    and float() come to), or decides on a shape (`nonzero`, a choice by a mask), for which a GPU is waited for as well.
    Not those of `one_hot`, which looks at its numbers on a CPU alone (ATen/native/Onehot.cpp).
    `collectives`, `bytes`: of torch.distributed, by the tensors that a rank gives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.operators = 0
        original = torch.Tensor.tolist
        self._patches = (
            patch.object(torch.Tensor, "tolist", lambda tensor: self._count_list(tensor, original)),
            patch.object(F, "one_hot", self._one_hot),
        )
        self._counts = True

    def __enter__(self) -> "Counted":
        self._thread = threading.get_ident()
        for one in self._patches:
            one.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for one in self._patches:
            one.stop()

    def reset(self) -> None:
        for counter in (self.waits, self.collectives, self.bytes):
            counter.clear()
        self.operators = 0

    def _count_list(self, tensor: torch.Tensor, original: Any) -> Any:
        if threading.get_ident() == self._thread:
            self.waits[_package()] += 1
        return original(tensor)

    def _one_hot(self, *args: Any, original: Any = F.one_hot) -> Any:
        self._counts = False
        try:
            return original(*args)
        finally:
            self._counts = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            tensors = [one for one in torch.utils._pytree.tree_leaves(args[:1]) if torch.is_tensor(one)]
            package = _package()
            self.collectives[package] += 1
            self.bytes[package] += sum(tensor.nbytes for tensor in tensors)
        else:
            self.operators += 1
        waits = name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2") or _by_mask(name, args)
        if waits and self._counts:
            self.waits[_package()] += 1
        return func(*args, **(kwargs or {}))


def _by_mask(name: str, args: Any) -> bool:
    """Whether an operator chooses by a mask, for which it asks where the mask is true."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])


def _package() -> str:
    """Whose code calls."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        for package in PACKAGES:
            if package in parts:
                return package
        frame = frame.f_back
    return "torch"
