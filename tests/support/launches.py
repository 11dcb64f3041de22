"""Launches of kernels, counted on fakes of a model's true shape: what a GPU is asked to run, without one.

A launch is an operator that is no view and does not only allocate. Attention takes the kernels that CUDA would choose
(`plan/kernels.py`); a call of one is a launch forward and a launch backward, though torch itself launches three to five
kernels for the latter.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_dist.model import attention
from gemma_dist.plan import kernels

# Operators that only allocate, or only look.
QUIET = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
    "device",
)
Sizes = list[tuple[int, int]]  # of documents: tokens of text, and of the image behind it
PACKS: dict[str, Sizes] = {  # 4,096 tokens or about as many
    "one document": [(4096, 0)],
    "8 documents": [(512, 0)] * 8,
    "8, of any length": [(n, 0) for n in (1500, 900, 640, 420, 300, 200, 96, 40)],
    "60 short ones": [(30 + 76 * (n % 7) // 6, 0) for n in range(60)],
    "9 with images": [(175, 280)] * 9,
    "images, long": [(700, 280), (1, 280), (300, 280), (1000, 280), (900, 75)],
}


class Launches(TorchDispatchMode):
    """Within, counts launches by the operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.counts.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in QUIET:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def counting_attention(self) -> Iterator[None]:
        """Within, a scaled dot product counts as one launch, and as another one backward."""
        real = functional.scaled_dot_product_attention

        def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.counts["attention"] += 1
            output: torch.Tensor = real(*args, **kwargs)
            if output.requires_grad:
                output.register_hook(lambda gradient: self.counts.update(["attention backward"]))
            return output

        with patch.object(functional, "scaled_dot_product_attention", counted):
            yield


def pack(sizes: Sizes) -> dict[str, torch.Tensor]:
    """`position_ids` and `mm_token_type_ids` (1, T) of documents; each image is one run of tokens."""
    positions: list[int] = []
    types: list[int] = []
    for text, image in sizes:
        positions += range(text + image)
        types += [0] * text + [1] * image
    return {"position_ids": torch.tensor([positions]), "mm_token_type_ids": torch.tensor([types])}


def of_attention(text: Any, sizes: Sizes, *, checkpointing: bool) -> dict[str, int]:
    """Launches of the attention function alone in a micro-batch of one pack, forward and backward, over all layers.

    Args:
        text: a text config.
        checkpointing: whether each layer's forward pass runs twice.

    Returns:
        `once`: what is made once for all layers. `layers`: the sum over the layers. `calls`: of SDPA, forward, as a
        sum over the layers.
    """
    batch = pack(sizes)
    length = batch["position_ids"].shape[1]
    inputs = batch | {attention.LAYOUT: attention.lay_out(**batch)}
    found = {"once": 0, "layers": 0, "calls": 0}
    settings = {"dropout": 0.0, "scaling": 1.0, "sliding_window": text.sliding_window}

    class Model(torch.nn.Module):
        dtype = torch.bfloat16
        config = type("Config", (), {"text_config": text})

    once = Launches()
    with once:
        _, kwargs = attention.add_documents(Model(), (), inputs)
    found["once"] = once.total
    for layer_type in set(text.layer_types):
        number = text.layer_types.index(layer_type)
        layer = text.per_layer_config[number]
        module: Any = torch.nn.Module()
        module.layer_type, module.is_causal = layer_type, True
        module.num_key_value_groups = text.num_attention_heads // layer.num_key_value_heads
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            patch.object(functional, "scaled_dot_product_attention", kernels._attention),
        ):
            heads = (text.num_attention_heads, layer.num_key_value_heads, layer.num_key_value_heads)
            shapes = [(1, length, count, layer.head_dim) for count in heads]
            states = [torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
            forward, backward = Launches(), Launches()
            with forward, forward.counting_attention():
                turned = [one.transpose(1, 2) for one in states]
                query, key, value = turned
                output, _ = attention.packed_attention(
                    module, query, key, value, None, documents=kwargs["documents"], **settings
                )
            calls = forward.counts["attention"]
            with backward, backward.counting_attention():
                output.backward(torch.empty_like(output))
        count = text.layer_types.count(layer_type)
        calls_back = forward.counts["attention backward"]
        in_forward = forward.total - calls_back
        found["layers"] += count * (in_forward * (2 if checkpointing else 1) + backward.total + calls_back)
        found["calls"] += count * calls
    return found
