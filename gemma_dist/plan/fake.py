"""A recipe's model at its true size, of fake tensors: every weight where training would have it, and none in memory."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gemma_dist.config import RunConfig
from gemma_dist.model.load import add_adapter, prepare_for_micro_batches
from gemma_dist.model.shapes import without_weights
from gemma_dist.model.towers import Tower
from gemma_dist.plan.allocator import Allocator

FOUR_BIT_BLOCK, SCALES_BLOCK = 64, 256  # elements that share a scale, and scales that share one


def fake_model(
    config: RunConfig, mode: FakeTensorMode, allocator: Allocator, *, unneeded: Collection[Tower], table: bool
) -> Any:
    """The model of a recipe as `train` would load it, its adapter included, each weight counted as its part.

    Args:
        unneeded: towers that are not loaded.
        table: whether it has its per-layer embeddings.

    Raises:
        CheckpointError, ConfigError: as `model.shapes.size_by_part`.
    """
    model = without_weights(config, unneeded, table=table)
    prepare_for_micro_batches(model, packing=config.train.packing)
    if config.lora is not None:
        with torch.device("meta"):
            model = add_adapter(model, config.lora, zero3=False)
    _give_storage(model, config, mode, allocator)
    return model


def part_of(name: str, *, of_adapter: bool, four_bit: bool = False) -> str:
    """What a weight is for, by its name in the model.

    Args:
        of_adapter: whether it is of an adapter.
        four_bit: whether it is held in 4 bits.
    """
    if of_adapter:
        return "adapter"
    for fragment, part in (
        (".experts.", "experts"),
        (".embed_tokens_per_layer.", "per-layer embeddings"),
        (".embed_tokens.", "token embedding"),
        ("lm_head.", "token embedding"),
        ("vision", "vision tower"),
        ("audio", "audio tower"),
    ):
        if fragment in name:
            return part
    return "quantized weights" if four_bit else "other weights"


def _give_storage(model: Any, config: RunConfig, mode: FakeTensorMode, allocator: Allocator) -> None:
    """Put fakes in the place of all parameters and buffers; tied ones stay tied."""
    from bitsandbytes.nn import Params4bit

    shared = _experts_in_turn(model) if config.model.experts == "host" else {}
    given: dict[object, torch.Tensor] = {}
    for path, module in model.named_modules():
        for name, tensor in _own_tensors(module):
            key = shared.get(tensor, tensor)
            if key not in given:
                four_bit, of_adapter = isinstance(tensor, Params4bit), config.lora is not None and tensor.requires_grad
                part = part_of(f"{path}.{name}", of_adapter=of_adapter, four_bit=four_bit)
                with mode, allocator, allocator.counting_as(part):
                    given[key] = _four_bit(tensor, config) if four_bit else _fake(tensor)
            place = module._parameters if name in module._parameters else module._buffers
            place[name] = given[key]


def _experts_in_turn(model: Any) -> dict[object, tuple[int, str]]:
    """Experts in host memory: the place on the GPU that each stack takes when it is its turn (`host_experts.py`)."""
    from gemma_dist.model.experts import FourBitExperts

    modules = [module for module in model.modules() if isinstance(module, FourBitExperts)]
    return {tensor: (layer % 2, name) for layer, one in enumerate(modules) for name, tensor in _own_tensors(one)}


def _own_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and buffers that a module holds itself."""
    for tensors in (module._parameters, module._buffers):
        yield from [(name, tensor) for name, tensor in tensors.items() if tensor is not None]


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


def _four_bit(weight: torch.Tensor, config: RunConfig) -> torch.Tensor:
    """A weight as bitsandbytes holds it: two elements a byte, and their scales beside it."""
    from bitsandbytes.functional import QuantState

    quantization = config.quantization
    assert quantization is not None
    blocks = -(-weight.numel() // FOUR_BIT_BLOCK)
    scales, offset, outer = torch.empty(blocks), None, None
    if quantization.bnb_4bit_use_double_quant:
        scales, offset = torch.empty(blocks, dtype=torch.uint8), torch.empty(())
        outer = QuantState(
            absmax=torch.empty(-(-blocks // SCALES_BLOCK)),
            code=torch.empty(256),
            blocksize=SCALES_BLOCK,
            dtype=torch.float32,
        )
    packed = torch.nn.Parameter(torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = QuantState(  # type: ignore[attr-defined]
        absmax=scales,
        shape=weight.shape,
        code=torch.empty(16),
        blocksize=FOUR_BIT_BLOCK,
        quant_type=quantization.bnb_4bit_quant_type,
        dtype=getattr(torch, config.model.dtype),
        offset=offset,
        state2=outer,
    )
    return packed
