"""What a checkpoint keeps of the model: what trains, in the memory of the rank that writes it and of no other.

Trainer copies the whole model to the host memory of every rank at ZeRO-1 and 2, for an adapter of a few MB too.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from gemma_dist import world
from gemma_dist.errors import CheckpointError
from gemma_dist.model.zero3 import is_partitioned

GATHERED_AT_ONCE = 64  # parameters of an adapter


def weights_to_save(model: torch.nn.Module, engine: Any | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors for `model.save_pretrained`, by the names in `model`: of a PEFT model its adapter, else all.

    At ZeRO-3 and FSDP2 every rank is to call it, and all but rank 0 get nothing; elsewhere only the one that saves.

    Args:
        engine: DeepSpeed's, around `model`; None without DeepSpeed.
        dtype: of the model as it was loaded: FSDP2 trains a float32 copy of it.
    """
    is_adapter = isinstance(model, PeftModel)
    if engine is None and is_partitioned(model):
        if is_adapter:
            return _gather_rows(_trained(model), None)
        return _gather_rows(model.state_dict(keep_vars=True), dtype)
    if engine is not None and engine.zero_optimization_partition_weights():
        if is_adapter:
            return _gather(_trained(model), engine)
        return engine._zero3_consolidated_16bit_state_dict() or {}  # None on all ranks but 0
    tensors = _trained(model) if is_adapter else model.state_dict()
    return tensors if engine is None else _copies(tensors)


def bytes_to_save(model: torch.nn.Module, dtype: torch.dtype) -> int:
    """What the parameters of `weights_to_save` take on the disk, all ranks' together. Nothing is gathered for it."""
    if isinstance(model, PeftModel):
        return sum(num_elements(parameter) * parameter.element_size() for parameter in _trained(model).values())
    saved_in = [dtype if isinstance(parameter, DTensor) else parameter.dtype for parameter in model.parameters()]
    return sum(num_elements(one) * saved.itemsize for one, saved in zip(model.parameters(), saved_in, strict=True))


def num_elements(parameter: Any) -> int:
    """Of the whole parameter, also where a rank holds a part of it (ZeRO-3)."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def require_gathered(folder: Path) -> None:
    """Raises CheckpointError where a saved tensor is empty: at ZeRO-3 that is what a weight looks like that nobody
    gathered."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            empty = [name for name in file.keys() if 0 in file.get_slice(name).get_shape()]  # noqa: SIM118
        if empty:
            raise CheckpointError(
                f"{path} holds {len(empty)} empty tensors, such as {empty[0]!r}: the weights were not gathered. Set "
                "stage3_gather_16bit_weights_on_model_save: true in the DeepSpeed config"
            )


def _trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that train: of a PEFT model those of its adapter, as the base is frozen."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _gather(adapter: dict[str, torch.Tensor], engine: Any) -> dict[str, torch.Tensor]:
    """The whole of parameters that lie partitioned, on rank 0. The frozen base is not gathered for it.

    A group of them at a time: each group is an exchange of all ranks, and in memory whole on every one of them.
    """
    from deepspeed.runtime.zero import GatheredParameters

    whole: dict[str, torch.Tensor] = {}
    engine.optimizer.checkpoint_event_prologue()  # small parameters, whole between steps, are partitioned again
    names = list(adapter)
    for start in range(0, len(names), GATHERED_AT_ONCE):
        group = names[start : start + GATHERED_AT_ONCE]
        with GatheredParameters([adapter[name] for name in group]):
            if engine.global_rank != 0:
                continue
            for name in group:
                whole[name] = adapter[name].detach().to("cpu", copy=True)
    engine.optimizer.checkpoint_event_epilogue()
    return whole


def _gather_rows(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The whole of `tensors` in host memory, on rank 0: parameters, of which FSDP2 gives each rank some rows, in
    `dtype` (None: their own), and buffers, which every rank has. One is gathered at a time; tied ones stay tied."""
    whole: dict[int, torch.Tensor] = {}
    for tensor in {id(tensor): tensor for tensor in tensors.values()}.values():
        gathered = tensor.detach()
        if isinstance(gathered, DTensor):
            gathered = gathered.full_tensor().to(dtype or tensor.dtype)
        if world.rank() == 0:
            whole[id(tensor)] = gathered.to("cpu", copy=True)
    return {name: whole[id(tensor)] for name, tensor in tensors.items() if id(tensor) in whole}


def _copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` in host memory, each with bytes of its own: at ZeRO-1 and 2 they are views of one flat tensor, which
    safetensors refuses. Tied ones stay tied."""
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for tensor in tensors.values():
        place = tensor.data_ptr(), tensor.shape
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
    return {name: copies[tensor.data_ptr(), tensor.shape] for name, tensor in tensors.items()}
