"""Models at FSDP2: torch's `fully_shard`, which partitions each weight by its first dimension over the ranks.

accelerate does the sharding for training. Added here: that it does so on CPU processes too, that gradients are summed
in float32, which layers are gathered at a time, and a model that is sharded for evaluation alone.
"""

import os
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from gemma_dist import world


def is_launched() -> bool:
    """Whether this process is one of several that were launched with FSDP."""
    return world.world_size() > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"


def prepare_arguments(arguments: Any, *, reduce_each_micro_batch: bool) -> None:
    """Let `arguments` (a `TrainingArguments`) make an accelerator that shards as we want it to. Called before that.

    Left to itself, accelerate would sum gradients in bfloat16 where that is computed with, round the loss of each token
    to it as well, and take an FSDP launch on CPU processes for DDP, without a word: it looks for FSDP only where it has
    found several GPUs (`AcceleratorState.__init__`, accelerate 1.15), so it is told that it has.

    Args:
        reduce_each_micro_batch: so that no rank holds more than its share of the gradients; else once a step.
    """
    from accelerate import DistributedType
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy()
    if arguments.bf16:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    arguments.fsdp_plugin_args = {"mixed_precision_policy": policy}
    arguments.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": reduce_each_micro_batch}
    if arguments.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU


def gather_layer_by_layer(plugin: Any, model: torch.nn.Module) -> None:
    """Let accelerate's FSDP `plugin` make a unit of each layer of `model`: what is gathered at a time.

    It would take the classes that transformers names, and stop where one of them is in a tower that was left out.
    """
    plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in _layers(model)})


def _layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of `model` that transformers wants to stay in one piece: its layers, and those of its towers."""
    names = set(model._no_split_modules)  # type: ignore[arg-type]
    return [module for module in model.modules() if type(module).__name__ in names]


def let_4_bits_be_sharded(model: torch.nn.Module, *, sent_in: torch.dtype | None) -> None:
    """Call the bytes of 4-bit weights numbers, which FSDP2 partitions: accelerate leaves bytes whole on every rank.

    As numbers they mean nothing, and nothing computes with them. Nor are they converted: they get the dtype that
    weights are sent in, if there is one; else the one that is computed in, as a patch embedder turns its pixels into
    the dtype of its weight.
    """
    from bitsandbytes.nn import Params4bit

    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(parameter, Params4bit):
                dtype = sent_in or module.compute_dtype
                parameter.data = parameter.data.view(1, -1).view(dtype).view(-1, 1)
                parameter.quant_storage = dtype


def compute_in_bfloat16(model: Any, device: torch.device) -> None:
    """Let a sharded `model` run under autocast, as accelerate lets it in every other launch: weights come in bfloat16,
    but rows of embeddings from the host, pixels and buffers may be float32."""
    model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)


def reshard(model: torch.nn.Module) -> None:
    """Let a sharded `model` hold its shares alone again, as after a backward pass; others are left as they are. A
    forward pass without one leaves the root gathered, where weights are looked at by their names."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def require_sharded(model: torch.nn.Module) -> None:
    """Assert that every parameter of `model` is partitioned: what accelerate leaves whole is summed by nobody."""
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    assert not whole, f"not sharded by FSDP2: {len(whole)} parameters, such as {whole[0]}"


def shard_for_evaluation(model: Any, device: torch.device) -> None:
    """Partition a loaded `model` over the ranks, and let it gather each layer on `device` while it generates."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.requires_grad_(False)  # weights of one unit that train would have to be of one dtype
    let_4_bits_be_sharded(inner, sent_in=None)
    mesh = init_device_mesh(device.type, (world.world_size(),))
    for layer in _layers(inner):
        fully_shard(layer, mesh=mesh)
    fully_shard(inner, mesh=mesh, reshard_after_forward=False)
    require_sharded(inner)
    register_fsdp_forward_method(inner, "generate")
