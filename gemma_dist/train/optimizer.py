"""The optimiser's state in a checkpoint: the same files for every launch, so that any launch can go on from any other.

Each rank writes what its optimiser holds, without an exchange: of each trained parameter a run of its elements, as the
optimiser updates them (`weight`: float32 at ZeRO), and the same run of each of their states (AdamW: `exp_avg`,
`exp_avg_sq`). One process, or DDP's rank 0, holds every parameter whole; at ZeRO a rank holds some of them, or pieces
cut through the middle. To go on, a rank copies from the mapped files what overlaps with its own runs.

`optimizer-<rank>-of-<world size>.safetensors` names tensors `<parameter>/<state>@<first element>`. States that do not
follow the elements have `#` there: the number of steps, and the scales of an 8-bit optimiser, which at ZeRO can be
read back only where the same elements lie together (`resolve.state_layout`).
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from gemma_dist import world
from gemma_dist.errors import CheckpointError
from gemma_dist.tensorfile import write_tensors


@dataclass(frozen=True)
class Slice:
    """Elements `start` to `start + num_elements` of a parameter, from `offset` on in `flat`, by which the optimiser
    knows them; of a parameter that is held whole, `flat` is itself."""

    name: str
    start: int
    num_elements: int
    flat: torch.Tensor
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This run in `tensor`, which is laid out like `flat`; written to, `tensor` changes."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.num_elements)


@dataclass(frozen=True)
class Saved:
    """A tensor of a checkpoint's files: a run of elements from `start` on, or (`runs` false) what stands beside it."""

    start: int
    runs: bool
    tensor: str
    file: Any


def save_optimizer(folder: Path, model: Any, optimizer: Any) -> None:
    """Write this rank's part of the state of `optimizer` (torch's, or DeepSpeed's around it). To be called by all."""
    zero = _zero(optimizer)
    state = (optimizer.optimizer if zero else optimizer).state
    tensors = {}
    for run in _runs(model, optimizer):
        tensors[f"{run.name}/weight@{run.start}"] = run.of(run.flat)
        for key, value in state[run.flat].items():
            if isinstance(value, torch.Tensor) and value.shape == run.flat.shape:
                tensors[f"{run.name}/{key}@{run.start}"] = run.of(value)
            elif value is not None and (run.offset == 0 or key == "step"):
                tensors[f"{run.name}/{key}#{run.start}"] = torch.as_tensor(value)
    if zero or world.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)  # no rank waits for another here
        write_tensors(folder / f"optimizer-{world.rank():05d}-of-{world.world_size():05d}.safetensors", tensors)


def load_optimizer(folder: Path, model: Any, optimizer: Any) -> None:
    """Take states, and the weights of trained parameters, from what any launch saved. To be called by all ranks.

    Raises:
        CheckpointError: elements of this rank are not in the files.
    """
    base = optimizer.optimizer if _zero(optimizer) else optimizer
    with ExitStack() as files:
        saved = _index(folder, files)
        for run in _runs(model, optimizer):
            state = base.state[run.flat]
            for key, pieces in saved.get(run.name, {"weight": []}).items():
                if key == "weight":
                    _copy(run, key, pieces, run.of(run.flat))
                elif key == "step":
                    state[key] = _step(base, run.flat, int(pieces[0].file.get_tensor(pieces[0].tensor)))
                elif pieces[0].runs:
                    if key not in state:
                        dtype = pieces[0].file.get_slice(pieces[0].tensor)[:0].dtype
                        state[key] = _zeros(base, run.flat, dtype)
                    _copy(run, key, pieces, run.of(state[key]))
                elif run.offset == 0:
                    (piece,) = (piece for piece in pieces if piece.start == run.start)
                    state[key] = piece.file.get_tensor(piece.tensor).to(run.flat.device)
    if zero := _zero(optimizer):
        _hand_weights_to_model(zero)


def _zero(optimizer: Any) -> Any:
    """`optimizer` if it is one of DeepSpeed's, which hold torch's as their `optimizer`; else None."""
    return optimizer if hasattr(optimizer, "optimizer") else None


def _runs(model: Any, optimizer: Any) -> Iterator[Slice]:
    """What this rank's optimiser holds of each trained parameter, in the order of the model."""
    zero = _zero(optimizer)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if zero is None:
            yield Slice(name, 0, parameter.numel(), parameter, 0)
        elif hasattr(parameter, "ds_id"):  # ZeRO-3: equal runs of each parameter, the last one filled up
            group, offset, num_elements = zero.grad_position[zero.get_param_id(parameter)]
            start = parameter.ds_zero_partition_rank * num_elements
            left = min(num_elements, parameter.ds_numel - start)
            if left > 0:
                yield Slice(name, start, left, zero.fp32_partitioned_groups_flat[group], offset)
        elif (piece := parameter._hp_mapping) is not None:  # ZeRO-1 and 2: equal runs of all parameters in a row
            (flat,) = zero.optimizer.param_groups[piece.param_group_index]["params"]
            place, held = piece.lp_fragment_address, piece.hp_fragment_address
            yield Slice(name, place.start, held.numel, flat, held.start)


def _index(folder: Path, files: ExitStack) -> dict[str, dict[str, list[Saved]]]:
    """parameter -> state -> its tensors in the checkpoint's files, which stay open as long as `files`."""
    index: dict[str, dict[str, list[Saved]]] = {}
    for path in sorted(folder.glob("optimizer-*.safetensors")):
        file = files.enter_context(safe_open(path, framework="pt"))
        for tensor in file.keys():  # noqa: SIM118
            mark = "@" if "@" in tensor else "#"
            name, _, start = tensor.rpartition(mark)
            parameter, _, key = name.rpartition("/")
            saved = Saved(int(start), mark == "@", tensor, file)
            index.setdefault(parameter, {}).setdefault(key, []).append(saved)
    return index


def _copy(run: Slice, key: str, pieces: list[Saved], target: torch.Tensor) -> None:
    """Fill `target`, the elements of `run`, from the `pieces` that overlap with it."""
    num_copied = 0
    for piece in pieces:
        stored = piece.file.get_slice(piece.tensor)
        begin = max(run.start, piece.start)
        end = min(run.start + run.num_elements, piece.start + stored.get_shape()[0])
        if begin < end:
            target[begin - run.start : end - run.start].copy_(stored[begin - piece.start : end - piece.start])
            num_copied += end - begin
    if num_copied != run.num_elements:
        raise CheckpointError(
            f"the checkpoint holds {num_copied} of the {run.num_elements} elements of {run.name}/{key} that this rank "
            "needs; it belongs to another model or kind of tuning. Go on from another one, or start afresh with "
            "another train.output_dir"
        )


def _zeros(base: Any, flat: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Room for a state of `flat`; where bitsandbytes pages its states out of the GPU, in its pages."""
    if hasattr(base, "get_state_buffer"):
        return base.get_state_buffer(flat, dtype=dtype)
    return torch.zeros_like(flat, dtype=dtype, requires_grad=False)


def _step(base: Any, flat: torch.Tensor, step: int) -> Any:
    """The number of steps as the optimiser counts them: torch's AdamW in a tensor, others in an integer."""
    if not isinstance(base, torch.optim.Adam):  # AdamW is one
        return step
    return torch.tensor(float(step), device=flat.device if base.defaults.get("fused") else "cpu")


def _hand_weights_to_model(zero: Any) -> None:
    """What DeepSpeed does at the end of a step: the model's own weights, in its number format, from the optimiser's."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):  # stages 1 and 2
        zero.update_lp_params()
        return
    # Small ones, which are kept whole between steps, stay cut until the first: DeepSpeed sees in the first forward pass
    # which of them are used outside of their own layer (DoRA), by their not being there.
    for group in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
