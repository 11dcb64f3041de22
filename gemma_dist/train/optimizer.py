"""The optimizer's state in a checkpoint: the same files for every launch, so that any launch can resume from any other.

Each rank writes what its optimizer holds, without an exchange: a slice of the elements of each trained parameter, as
the optimizer updates them (`weight`: float32 at ZeRO), and the same slice of each of their states (AdamW: `exp_avg`,
`exp_avg_sq`). One process, or DDP's rank 0, holds every parameter whole; at ZeRO a rank holds some of them, or slices
that begin and end anywhere; at FSDP2 some rows of each. To resume, a rank copies from the mapped files what overlaps
with its own slices.

`optimizer-<rank>-of-<world size>.safetensors` names tensors `<parameter>/<state>@<first element>`. States that do not
follow the elements have `#` there: the number of steps, and the scales of an 8-bit optimizer, which at ZeRO can be
read back only where the same elements lie together (`resolve.state_layout`).
"""

import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gemma_dist import world
from gemma_dist.errors import CheckpointError
from gemma_dist.model.zero3 import is_partitioned
from gemma_dist.tensorfile import write_tensors
from gemma_dist.train.weights import num_elements


@dataclass(frozen=True)
class Slice:
    """Elements `start` to `start + num_elements` of a parameter, which this rank's optimizer holds in the tensor `flat`
    from `offset` on. A parameter that is held whole is its own `flat`."""

    name: str
    start: int
    num_elements: int
    flat: torch.Tensor
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """(num_elements,): this slice of `tensor`, which is laid out like `flat`; written to, `tensor` changes."""
        held = tensor.detach()
        held = held.to_local() if isinstance(held, DTensor) else held
        return held.view(-1).narrow(0, self.offset, self.num_elements)


@dataclass(frozen=True)
class SavedTensor:
    """One tensor of a checkpoint's files."""

    name: str
    file: Any  # safetensors' open file
    start: int  # the first element of the parameter that it belongs to
    follows_elements: bool  # a value for each element from `start` on; else something beside them


def save_optimizer(folder: Path, model: torch.nn.Module, optimizer: Any) -> None:
    """Write this rank's part of the state of `optimizer` (torch's, or DeepSpeed's around it). All ranks call it."""
    zero = _zero(optimizer)
    base = optimizer.optimizer if zero else optimizer
    tensors = {}
    for held in _slices(model, optimizer):
        tensors[f"{held.name}/weight@{held.start}"] = held.of(held.flat)
        for state, value in base.state[held.flat].items():
            follows_elements = isinstance(value, torch.Tensor) and value.shape == held.flat.shape
            if follows_elements:
                tensors[f"{held.name}/{state}@{held.start}"] = held.of(value)
            elif value is not None and (held.offset == 0 or state == "step"):
                # What belongs to `flat` as a whole goes with the first slice in it, but every slice counts its steps.
                tensors[f"{held.name}/{state}#{held.start}"] = torch.as_tensor(value)
    if zero or is_partitioned(model) or world.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)  # no rank waits for another here
        write_tensors(folder / f"optimizer-{world.rank():05d}-of-{world.world_size():05d}.safetensors", tensors)


def optimizer_bytes(model: torch.nn.Module, optimizer: Any) -> int:
    """What all ranks together write with `save_optimizer`, after the first step, if the other ranks' elements take as
    many bytes as this one's: 8-bit states are for large parameters alone."""
    zero = _zero(optimizer)
    base = optimizer.optimizer if zero else optimizer
    num_bytes = num_held = 0
    for held in _slices(model, optimizer):
        states = [value for value in base.state[held.flat].values() if torch.is_tensor(value)]
        an_element = sum(one.element_size() for one in (held.flat, *states) if one.shape == held.flat.shape)
        num_bytes += an_element * held.num_elements
        num_held += held.num_elements
    trained = sum(num_elements(one) for one in model.parameters() if one.requires_grad)
    return math.ceil(trained * num_bytes / num_held) if num_held else 0


def state_crc32(model: torch.nn.Module, optimizer: Any) -> dict[str, int]:
    """The CRC-32 of each weight and state that this rank's optimizer holds, by `<parameter>/<state>@<element>`."""
    zero = _zero(optimizer)
    base = optimizer.optimizer if zero else optimizer
    found = {}
    for held in _slices(model, optimizer):
        found[f"{held.name}/weight@{held.start}"] = _crc32(held.of(held.flat))
        for state, value in base.state[held.flat].items():
            if value is not None:
                follows_elements = isinstance(value, torch.Tensor) and value.shape == held.flat.shape
                part = held.of(value) if follows_elements else torch.as_tensor(value)
                found[f"{held.name}/{state}@{held.start}"] = _crc32(part)
    return found


def forget_state(model: torch.nn.Module, optimizer: Any) -> None:
    """Set what this rank's optimizer holds, weights and states, to 0, as if it had never been."""
    zero = _zero(optimizer)
    base = optimizer.optimizer if zero else optimizer
    for held in _slices(model, optimizer):
        held.of(held.flat).zero_()
        for state, value in base.state[held.flat].items():
            if isinstance(value, torch.Tensor):
                value.zero_()
            elif value is not None:
                base.state[held.flat][state] = 0


def _crc32(tensor: torch.Tensor) -> int:
    """Of a tensor's bytes, on whatever device."""
    return zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)


def load_optimizer(folder: Path, model: torch.nn.Module, optimizer: Any) -> None:
    """Take states, and the weights of trained parameters, from what any launch saved. All ranks call it.

    Raises:
        CheckpointError: elements of this rank are not in the files.
    """
    zero = _zero(optimizer)
    base = optimizer.optimizer if zero else optimizer
    with ExitStack() as files:
        saved = _index(folder, files)
        for held in _slices(model, optimizer):
            of_parameter = saved.get(held.name, {})
            _copy(held, "weight", of_parameter.get("weight", []), held.of(held.flat))
            for state, tensors in of_parameter.items():
                if state != "weight":
                    _load_state(base, held, state, tensors)
    if zero:
        recount_steps(base)
        _hand_weights_to_model(zero)


def _load_state(base: Any, held: Slice, state: str, saved: list[SavedTensor]) -> None:
    """Fill one state of a slice, such as `exp_avg`, in torch's optimizer `base`."""
    states = base.state[held.flat]
    if state == "step":
        states[state] = _step(base, held.flat, int(_read(saved[0])))
    elif saved[0].follows_elements:
        if state not in states:
            dtype = saved[0].file.get_slice(saved[0].name)[:0].dtype  # without reading it
            states[state] = _zeros(base, held.flat, dtype)
        _copy(held, state, saved, held.of(states[state]))
    elif held.offset == 0:
        (beside,) = (tensor for tensor in saved if tensor.start == held.start)
        states[state] = _read(beside).to(held.flat.device)


def _zero(optimizer: Any) -> Any:
    """`optimizer` if it is one of DeepSpeed's, which hold torch's as their `optimizer`; else None."""
    return optimizer if hasattr(optimizer, "optimizer") else None


def _slices(model: torch.nn.Module, optimizer: Any) -> Iterator[Slice]:
    """What this rank's optimizer holds of each trained parameter, in the order of the model."""
    zero = _zero(optimizer)
    parameters: Iterable[tuple[str, Any]] = model.named_parameters()  # with DeepSpeed's attributes
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        if isinstance(parameter, DTensor):
            if held := _rows(name, parameter):
                yield held
        elif zero is None:
            yield Slice(name, 0, parameter.numel(), parameter, 0)
        elif hasattr(parameter, "ds_id"):  # ZeRO-3: equal slices of each parameter, the last one filled up
            group, offset, num_elements = zero.grad_position[zero.get_param_id(parameter)]
            start = parameter.ds_zero_partition_rank * num_elements
            left = min(num_elements, parameter.ds_numel - start)
            if left > 0:
                yield Slice(name, start, left, zero.fp32_partitioned_groups_flat[group], offset)
        elif (piece := parameter._hp_mapping) is not None:  # ZeRO-1 and 2: equal slices of all parameters in a row
            (flat,) = zero.optimizer.param_groups[piece.param_group_index]["params"]
            place, held = piece.lp_fragment_address, piece.hp_fragment_address
            yield Slice(name, place.start, held.numel, flat, held.start)


def _rows(name: str, parameter: DTensor) -> Slice | None:
    """The rows of a parameter that this rank holds at FSDP2; None where there are fewer rows than ranks."""
    shape, start = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    row = math.prod(parameter.shape[1:])
    return Slice(name, start[0] * row, shape[0] * row, parameter, 0) if math.prod(shape) else None


def _index(folder: Path, files: ExitStack) -> dict[str, dict[str, list[SavedTensor]]]:
    """parameter -> state -> its tensors in the checkpoint's files, which stay open as long as `files`."""
    index: dict[str, dict[str, list[SavedTensor]]] = {}
    for path in sorted(folder.glob("optimizer-*.safetensors")):
        try:
            file = files.enter_context(safe_open(path, framework="pt"))
            for name in file.keys():  # noqa: SIM118
                mark = "@" if "@" in name else "#"
                parameter_and_state, _, start = name.rpartition(mark)  # model.norm.weight/exp_avg@0
                parameter, _, state = parameter_and_state.rpartition("/")
                saved = SavedTensor(name, file, int(start), follows_elements=mark == "@")
                index.setdefault(parameter, {}).setdefault(state, []).append(saved)
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not what training wrote ({error}); resume from another checkpoint, or start afresh with "
                "another train.output_dir"
            ) from error
    return index


def _read(saved: SavedTensor) -> torch.Tensor:
    """The whole tensor, on the CPU."""
    return saved.file.get_tensor(saved.name)


def _copy(held: Slice, state: str, saved: list[SavedTensor], target: torch.Tensor) -> None:
    """Fill `target`, the elements of a slice, from the saved tensors that overlap with it."""
    num_copied = 0
    for tensor in saved:
        stored = tensor.file.get_slice(tensor.name)
        begin = max(held.start, tensor.start)
        end = min(held.start + held.num_elements, tensor.start + stored.get_shape()[0])
        if begin < end:
            part = stored[begin - tensor.start : end - tensor.start]
            target[begin - held.start : end - held.start].copy_(part)
            num_copied += end - begin
    if num_copied != held.num_elements:
        raise CheckpointError(
            f"the checkpoint holds {num_copied} of the {held.num_elements} elements of {held.name}/{state} that this "
            "rank needs; it belongs to another model or kind of tuning. Resume from another one, or start afresh with "
            "another train.output_dir"
        )


def _zeros(base: Any, flat: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Room for a state of `flat`; where bitsandbytes pages its states out of the GPU, in its pages."""
    if hasattr(base, "get_state_buffer"):
        return base.get_state_buffer(flat, dtype=dtype)
    return torch.zeros_like(flat, dtype=dtype, requires_grad=False)


def _step(base: Any, flat: torch.Tensor, step: int) -> Any:
    """The number of steps as the optimizer counts them: torch's AdamW in a tensor, others in an integer."""
    if not isinstance(base, torch.optim.Adam):  # AdamW is one
        return step
    return torch.tensor(float(step), device=flat.device if base.defaults.get("fused") else "cpu")


def _hand_weights_to_model(zero: Any) -> None:
    """What DeepSpeed does at the end of a step: the model's own weights, in its dtype, from the optimizer's."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):  # stages 1 and 2
        zero.update_lp_params()
        return
    # Small ones, which are kept whole between steps, stay partitioned until the first: DeepSpeed sees in the first
    # forward pass which of them are used outside of their own layer (DoRA), by their not being there.
    for group in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(group)


def recount_steps(optimizer: Any) -> None:
    """Let DeepSpeed's CPU Adam, once its states were loaded, correct its moments as if it had made their steps itself;
    nothing to do for any other optimizer.

    It keeps the powers of its betas as running products in float32, and after a jump takes the power itself, which
    differs in the last bits: so a resumed run would part from the uninterrupted one.
    """
    operator = getattr(optimizer, "ds_opt_adam", None)
    if operator is None or not optimizer.state:
        return
    group, num_steps = optimizer.param_groups[0], next(iter(optimizer.state.values()))["step"]
    nothing = [torch.zeros(1) for _ in range(4)]  # weight, gradient, moments
    for step in range(1, num_steps + 1):
        operator.adam_update(
            optimizer.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, group["bias_correction"], *nothing
        )
