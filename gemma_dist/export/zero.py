"""The folders that DeepSpeed's engine writes (`engine.save_checkpoint`, as TRL, axolotl and LLaMA-Factory have it do):
which values of which rank's file make up each tensor.

    mp_rank_00_model_states.pt                        ZeRO-1 and 2: the module, whole, in its own dtype
    zero_pp_rank_0_mp_rank_00_model_states.pt         ZeRO-3: of each rank, with its part of what is frozen
    bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt    of each rank: its part of the float32 weights

The layout is that of DeepSpeed 0.19 (`runtime/engine.py`, `runtime/zero/stage_1_and_2.py`, `stage3.py`, and
`utils/zero_to_fp32.py`, which reads it). At ZeRO-1 and 2 the float32 weights of a group of parameters follow one
another in one flat tensor, of which rank 0 has the first part, rank 1 the next. At ZeRO-3 each parameter is cut into as
many parts as there are ranks, and a rank's flat tensors hold its part of each.

Files are mapped, not read. Nothing in them is run: of a pickle's classes, stand-ins are made that keep data alone.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemma_dist.errors import CheckpointError, GemmaDistError

MODEL_FILE = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<split>\d+)_model_states\.pt")
OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<split>\d+)_optim_states\.pt")
ALIGNMENT = 64  # values that a rank may add at the end of a flat tensor


class _Kept:
    """Stands for an object of DeepSpeed: what its file says of it is kept, and not used."""

    def __new__(cls, *_: object) -> "_Kept":
        """Takes what the class in the file takes."""
        return object.__new__(cls)


_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}  # DeepSpeed's ZeroStageEnum


def _member(kind: object, name: str) -> int:
    """What `getattr` stands for in these files: Python 3.11.2, as Debian 12 has it, writes a stage as the enum and a
    name. Of anything else it is refused, as torch refuses what is not allowed."""
    if kind is not int or name not in _STAGES:
        raise ValueError("GLOBAL builtins.getattr")
    return _STAGES[name]


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_member, "builtins.getattr"),
    (_Kept, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Kept, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Kept, "deepspeed.utils.tensor_fragment.fragment_address"),
]


@dataclass(frozen=True)
class Pieces:
    """A tensor that lies in several flat ones, in this order; behind its own values, the last may have others."""

    shape: tuple[int, ...]
    flat: list[torch.Tensor]
    is_trained: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of all pieces."""
        return self.flat[0].dtype

    def values(self, start: int, stop: int) -> torch.Tensor:
        """Flat: values start … stop-1."""
        found, at = [], 0
        for piece in self.flat:
            first, last = max(start - at, 0), min(stop - at, len(piece))
            if first < last:
                found.append(piece[first:last])
            at += len(piece)
        return found[0] if len(found) == 1 else torch.cat(found)


@dataclass(frozen=True)
class ZeroFolder:
    """What such a folder holds, by the names of the module that was trained."""

    folder: Path
    tensors: dict[str, Pieces]  # in the order of the module; tied ones once
    tied: dict[str, str]  # name -> the one of `tensors` that it is
    stage: int
    num_ranks: int
    step: int

    @property
    def is_adapter(self) -> bool:
        """Whether PEFT adapted the model."""
        return any(".lora_" in name for name in self.tensors)


def find_zero_folder(checkpoint: Path) -> Path | None:
    """The folder of the rank's files: `checkpoint` itself, or the one in it that `latest` names. None: there is none.

    Raises:
        CheckpointError: there are several, or the one that `latest` names is gone, or it is of a kind that is not read.
    """
    _refuse_universal(checkpoint)
    if any(checkpoint.glob("*_model_states.pt")) or any(checkpoint.glob("*_optim_states.pt")):
        return checkpoint
    inner = sorted({path.parent for path in checkpoint.glob("*/*_states.pt")})
    latest = checkpoint / "latest"
    if latest.is_file():
        named = checkpoint / latest.read_text(encoding="utf-8", errors="replace").strip()
        if inner and named not in inner:
            raise CheckpointError(
                f"{latest} names {named.name}, which is not there; give one of {', '.join(map(str, inner))}"
            )
    elif len(inner) > 1:
        raise CheckpointError(f"{checkpoint} holds several checkpoints; give one of {', '.join(map(str, inner))}")
    else:
        named = next(iter(inner), checkpoint)
    if not inner:
        return None
    _refuse_universal(named)
    return named


def open_zero_folder(folder: Path) -> ZeroFolder:
    """Map the files of all ranks and find the pieces of each tensor.

    Raises:
        CheckpointError: a rank's file is missing, broken, of another step, or asks for code; or the model was split in
            another way than by ZeRO.
    """
    try:
        return _open(folder)
    except GemmaDistError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # what a file should have is not in it
        raise CheckpointError(
            f"{folder}: its files are not those of a DeepSpeed that is known here, 0.19 or earlier ({error!r}); "
            "convert it with the tool that wrote it"
        ) from error


def _open(folder: Path) -> ZeroFolder:
    models, optimizers = _files(folder, MODEL_FILE), _files(folder, OPTIMIZER_FILE)
    if not models:
        raise CheckpointError(f"{folder} has no *_model_states.pt, which name the tensors; copy the whole folder")
    states = {rank: _load(path) for rank, path in models.items()}
    first = states[min(states)]
    _check_split(first, models[min(models)])
    if first.get("param_shapes") is None:  # no ZeRO: the module holds everything
        return _zero_folder(folder, first, {}, stage=0, num_ranks=1)

    num_ranks = _require(first, "dp_world_size", models[min(models)])
    _require_ranks(folder, optimizers, num_ranks, "optim_states.pt")
    optimizer_states = [
        _require(_load(optimizers[rank]), "optimizer_state_dict", optimizers[rank]) for rank in range(num_ranks)
    ]
    _check_steps(folder, [state["global_steps"] for state in states.values()], "of the model")
    _check_steps(folder, [_optimizer_step(state) for state in optimizer_states], "of the optimizer")
    stage = int(optimizer_states[0].get("zero_stage", 1))  # BF16_Optimizer, an old kind of ZeRO-1, has none
    if stage < 3:
        trained = _groups_in_a_row(first, optimizer_states, folder)
    else:
        _require_ranks(folder, models, num_ranks, "model_states.pt")
        trained = _parts_of_each(first, optimizer_states, folder)
        trained |= _frozen_parts([states[rank] for rank in range(num_ranks)], folder)
    return _zero_folder(folder, first, trained, stage=stage, num_ranks=num_ranks)


def _zero_folder(
    folder: Path, first: Mapping[str, Any], pieces: Mapping[str, Pieces], *, stage: int, num_ranks: int
) -> ZeroFolder:
    """All tensors in the order of the module, buffers and what is frozen at ZeRO-1 and 2 from the module itself."""
    buffers = set(first.get("buffer_names") or ())
    tied = dict(first.get("shared_params") or {})
    tensors: dict[str, Pieces] = {}
    places: dict[tuple[int, torch.Size], str] = {}  # of the module's whole tensors
    for name, tensor in (first["module"] or {}).items():
        if name in tied or not torch.is_tensor(tensor):
            continue
        # ZeRO-3 leaves an empty tensor in the place of a parameter.
        is_whole = name in buffers or (stage < 3 and tensor.numel() > 0)
        twin = places.setdefault((tensor.data_ptr(), tensor.shape), name) if is_whole else name
        if twin != name:
            tied[name] = twin
        elif name in pieces:
            tensors[name] = pieces[name]
        elif is_whole:
            tensors[name] = Pieces(tuple(tensor.shape), [tensor.reshape(-1)])
    tensors |= {name: found for name, found in pieces.items() if name not in tensors}  # the module left it out
    return ZeroFolder(folder, tensors, tied, stage, num_ranks, int(first.get("global_steps", 0)))


def _groups_in_a_row(first: Mapping[str, Any], ranks: list[Mapping[str, Any]], folder: Path) -> dict[str, Pieces]:
    """ZeRO-1 and 2: each group of parameters in one row of values, which the ranks' parts make up."""
    found: dict[str, Pieces] = {}
    paddings = ranks[0].get("param_alignment_paddings")  # behind each parameter; earlier versions have none
    for number, shapes in enumerate(first["param_shapes"]):
        parts = [_groups(rank, "single_partition_of_fp32_groups", folder)[number] for rank in ranks]
        at, num_values = 0, sum(len(part) for part in parts)
        for place, (name, shape) in enumerate(shapes.items()):
            size = math.prod(shape)
            found[name] = Pieces(tuple(shape), list(_cut(parts, at, at + size)), is_trained=True)
            at += size + (paddings[number][place] if paddings else 0)
        _check_num_values(folder, at, num_values, len(ranks))
    return found


def _parts_of_each(first: Mapping[str, Any], ranks: list[Mapping[str, Any]], folder: Path) -> dict[str, Pieces]:
    """ZeRO-3: each parameter in equal parts, one a rank; a rank's parts follow one another in its flat tensors."""
    parts = [_groups(rank, "fp32_flat_groups", folder) for rank in ranks]
    found: dict[str, Pieces] = {}
    at = 0
    for shapes in first["param_shapes"]:
        for name, shape in shapes.items():
            size = -(-math.prod(shape) // len(ranks))
            flat = [piece for own in parts for piece in _cut(own, at, at + size)]
            found[name] = Pieces(tuple(shape), flat, is_trained=True)
            at += size
    for own in parts:
        _check_num_values(folder, at, sum(len(group) for group in own), 1)
    return found


def _frozen_parts(states: list[Mapping[str, Any]], folder: Path) -> dict[str, Pieces]:
    """ZeRO-3: what is frozen, of which each rank's file has a part."""
    found = {}
    for name, shape in (states[0].get("frozen_param_shapes") or {}).items():
        flat = [(state.get("frozen_param_fragments") or {}).get(name) for state in states]
        whole = [part.reshape(-1) for part in flat if part is not None]
        if len(whole) < len(flat) or sum(map(len, whole)) < math.prod(shape):
            raise CheckpointError(f"{folder}: a rank's file lacks its part of {name}; copy the folder again")
        found[name] = Pieces(tuple(shape), whole)
    return found


def _cut(parts: Iterable[torch.Tensor], start: int, stop: int) -> Iterator[torch.Tensor]:
    """Values start … stop-1 of flat tensors that follow one another."""
    at = 0
    for part in parts:
        first, last = max(start - at, 0), min(stop - at, len(part))
        if first < last:
            yield part[first:last]
        at += len(part)


def _groups(rank: Mapping[str, Any], key: str, folder: Path) -> list[torch.Tensor]:
    """The flat float32 tensors of a rank."""
    found = rank.get(key)
    if not isinstance(found, list) or not all(torch.is_tensor(group) and group.ndim == 1 for group in found):
        raise CheckpointError(f"{folder}: an optimizer file has no {key}: its float32 weights lie elsewhere (NVMe?)")
    return found


def _check_num_values(folder: Path, wanted: int, found: int, num_ranks: int) -> None:
    """The flat tensors hold what the shapes ask for, and no more than what fills the last one up."""
    if not wanted <= found <= wanted + ALIGNMENT * num_ranks:
        raise CheckpointError(
            f"{folder}: the tensors of a group have {wanted:,} values, but its ranks hold {found:,}: the files do not "
            "belong together, or experts are split in another way; copy the folder again"
        )


def _files(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """The files of a kind by rank. Refuses those of a model that is split in another way than by ZeRO."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*.pt")):
        if "expert" in path.name or path.name.startswith(("layer_", "expp_rank_")):
            raise CheckpointError(
                f"{path} is of a pipeline, or of experts that are split over ranks, which is not read; convert it with "
                "the tool that wrote it"
            )
        if match := pattern.fullmatch(path.name):
            if int(match["split"]):
                raise CheckpointError(
                    f"{path}: the model was split by tensor parallelism (mp_rank_{match['split']}), which is not read; "
                    "convert it with the tool that wrote it"
                )
            found[int(match["rank"] or 0)] = path
    return found


def _check_split(state: Mapping[str, Any], path: Path) -> None:
    """Refuse a file that says itself that the model was split in another way, or that knows no tensors."""
    dimensions = state.get("checkpoint_parallel_dimensions") or {}
    for name, size in (("mp_world_size", state.get("mp_world_size")), *dimensions.items()):
        if isinstance(size, int) and size > 1:
            raise CheckpointError(f"{path}: {name} is {size}, and only ZeRO is read; convert it with what wrote it")
    if state.get("ds_autoep_layers"):
        raise CheckpointError(f"{path}: its experts are split over ranks, which is not read; convert it with DeepSpeed")
    if not isinstance(state.get("module"), Mapping):
        raise CheckpointError(f"{path} has no module: it is no checkpoint of DeepSpeed's engine")


def _refuse_universal(folder: Path) -> None:
    """Refuse what `ds_to_universal` makes: a folder `zero` with one of each parameter."""
    if (folder / "zero").is_dir() and any((folder / "zero").glob("*/fp32.pt")):
        raise CheckpointError(f"{folder} is a universal checkpoint; give the one that it was made from")


def _require_ranks(folder: Path, files: Mapping[int, Path], num_ranks: int, kind: str) -> None:
    """Each rank's file is there, and no other's."""
    missing = [rank for rank in range(num_ranks) if rank not in files]
    if missing:
        raise CheckpointError(
            f"{folder}: of {num_ranks} ranks, {kind} is missing of rank {', '.join(map(str, missing))}; copy the whole "
            "folder (each node may have kept its own ranks' files)"
        )
    if odd := sorted(files.keys() - set(range(num_ranks))):
        raise CheckpointError(
            f"{files[odd[0]]} is of rank {odd[0]}, but the run had {num_ranks}: files of another run lie here; "
            "move them away"
        )


def _check_steps(folder: Path, steps: list[int | None], kind: str) -> None:
    """All ranks' files are of one step."""
    if len(found := set(steps)) > 1:
        shown = ", ".join(f"rank {rank}: {step}" for rank, step in enumerate(steps))
        raise CheckpointError(f"{folder}: its files {kind} are of {len(found)} steps ({shown}); copy the folder again")


def _optimizer_step(state: Mapping[str, Any]) -> int | None:
    """How many steps a rank's optimizer has taken, where it says so."""
    optimizer = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    if not isinstance(optimizer, Mapping):
        return None
    of_parameters = optimizer.get("state") or {}
    places = [*of_parameters.values(), *(optimizer.get("param_groups") or ())]
    return next((int(one["step"]) for one in places if isinstance(one, Mapping) and "step" in one), None)


def _require(state: Mapping[str, Any], key: str, path: Path) -> Any:
    """A value that every such file has."""
    if not isinstance(state, Mapping) or state.get(key) is None:
        raise CheckpointError(f"{path} has no {key}: it is no checkpoint of DeepSpeed's engine")
    return state[key]


def _load(path: Path) -> Mapping[str, Any]:
    """A file of torch.save, its tensors mapped. Raises CheckpointError where it is broken or asks for code."""
    try:
        with torch.serialization.safe_globals(STAND_INS):
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of zip, of pickle, of torch: a broken file may raise anything
        reason = str(error)
        if asked := re.search(r"GLOBAL (\w+(?:\.\w+)+)", reason):
            raise CheckpointError(
                f"{path} asks for {asked[1]}, which no checkpoint of DeepSpeed needs and which could run code; save it "
                "without that (client_state of save_checkpoint)"
            ) from None
        raise CheckpointError(
            f"{path} is not a whole file of torch.save ({reason.partition('. ')[0]}); copy it again"
        ) from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds no dict: it is no checkpoint of DeepSpeed's engine")
    return state
