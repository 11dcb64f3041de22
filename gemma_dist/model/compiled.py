"""The layers of the text model, compiled (`train.torch_compile`).

Each layer's forward pass is compiled by itself, for any length: layers of one kind (sliding or full; with keys and
values of their own, that others share, or of others) share their graphs, so that their number does not grow with the
model's depth. Attention over packs stays as it is, since its calls differ from pack to pack: the one graph break of a
layer; FlexAttention makes none. In a layer that is recomputed (checkpointing) torch gives up at that break and compiles
nothing of it, without a word, so `contradictions.py` refuses both together. Counted, and held against layers that are
not compiled, on a CPU by torch's `eager` backend; never run on a GPU.
"""

from typing import Any

import torch
from transformers import AttentionInterface

from gemma_dist.model.attention import PACKED_ATTENTION, packed_attention


def compile_layers(model: Any, *, backend: str = "inductor") -> None:
    """Compile the layers of a Gemma 4's text model, with or without an adapter, when they first run.

    Args:
        backend: of `torch.compile`.
    """
    AttentionInterface.register(PACKED_ATTENTION, torch.compiler.disable(packed_attention))
    for name, module in model.named_modules():
        if name.endswith("language_model.layers"):
            for layer in module:
                layer.forward = torch.compile(layer.forward, backend=backend, dynamic=True)
