"""The weights of a result: which files are linked, and which tensors are written, from where and in which dtype."""

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gemma_dist.config_merge import ExportConfig
from gemma_dist.data.strict import reason
from gemma_dist.errors import CheckpointError
from gemma_dist.export.zero import Pieces, ZeroFolder
from gemma_dist.files import link_or_copy
from gemma_dist.logs import progress, write_json
from gemma_dist.merge.folders import ADAPTER_WEIGHTS, BaseModel
from gemma_dist.merge.layout import config_in_dtype
from gemma_dist.merge.names import FACTOR
from gemma_dist.merge.stream import Computed, Copied, Rows, Workers, as_matrix, stored_rows, write_weights
from gemma_dist.model.folder import WEIGHTS, WEIGHTS_INDEX
from gemma_dist.model.vision import name_in_file, name_in_model
from gemma_dist.tensorfile import DTYPE_NAMES, TORCH_DTYPES, Entry, TensorFile

LM_HEAD = "lm_head.weight"
EMBEDDING = re.compile(r"(model\.|language_model\.)*embed_tokens\.weight")
SAVED_MODULE = re.compile(r"(?P<path>.+)\.modules_to_save\.[^.]+\.(?P<rest>.+)")
UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Result:
    """What a folder is going to hold. Nothing of it is read yet."""

    tensors: dict[str, Copied | Computed]  # to be written
    linked: list[TensorFile] = field(default_factory=list)  # files that are taken as they are
    model_type: str = ""
    tied: bool = True  # whether the LM head is the token embedding
    config: dict[str, Any] | None = None  # where it is another than that of the checkpoint
    is_adapter: bool = False
    num_from_base: int = 0

    @property
    def headers(self) -> dict[str, Entry]:
        """Of all tensors."""
        found = {name: entry for file in self.linked for name, entry in file.entries.items()}
        return found | {name: tensor.entry for name, tensor in self.tensors.items()}

    def source(self, name: str) -> Copied | Computed:
        """Where a tensor comes from."""
        if name in self.tensors:
            return self.tensors[name]
        return next(Copied(file, name) for file in self.linked if name in file.entries)


def from_model(model: BaseModel, settings: ExportConfig) -> Result:
    """The weights of a model folder: its files as they are, or in another dtype."""
    empty = [name for name, (_, shape) in model.headers.items() if 0 in shape]
    if empty:
        raise CheckpointError(
            f"{model.folder} holds {len(empty)} empty tensors, such as {empty[0]}: they were saved at ZeRO-3 without "
            "being gathered. Give the folder of DeepSpeed's *_model_states.pt, if there is one, or another checkpoint"
        )
    kind, tied = model.config.get("model_type", ""), model.tied_embeddings
    if settings.dtype == "auto":
        return Result({}, model.shards, kind, tied)
    wanted = getattr(torch, settings.dtype)
    tensors: dict[str, Copied | Computed] = {}
    for shard in model.shards:
        for name in shard.entries:
            tensors[name] = _converted(shard, name, wanted)
    return Result(tensors, [], kind, tied, config_in_dtype(model.config, settings.dtype))


def from_zero(zero: ZeroFolder, config: dict[str, Any], settings: ExportConfig) -> Result:
    """The model that DeepSpeed's engine held, under the names that its files have, in the dtype of `config`."""
    kind = config.get("model_type", "")
    dtype = _dtype_of(config) if settings.dtype == "auto" else settings.dtype
    tensors: dict[str, Copied | Computed] = {}
    for name, pieces in zero.tensors.items():
        tensors[name_in_file(name.replace("_orig_mod.", ""), kind)] = _joined(name, pieces, getattr(torch, dtype))
    text = config.get("text_config") or {}
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    if tied and LM_HEAD in zero.tensors and zero.tensors[LM_HEAD].is_trained:
        raise CheckpointError(
            f"{zero.folder}: {LM_HEAD} was trained apart from the token embedding, but config.json says that they are "
            "tied; put the config.json of the trained model beside the checkpoint"
        )
    if not tied and LM_HEAD in zero.tied:
        raise CheckpointError(
            f"{zero.folder}: {LM_HEAD} was tied to {zero.tied[LM_HEAD]}, but config.json says that it is not; put the "
            "config.json of the trained model beside the checkpoint"
        )
    return Result(tensors, [], kind, tied, config_in_dtype(config, dtype) if settings.dtype != "auto" else None)


def from_adapter(zero: ZeroFolder, settings: ExportConfig) -> Result:
    """The adapter that DeepSpeed's engine trained, under the names that PEFT gives its tensors; in float32."""
    dtype = torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    tensors: dict[str, Copied | Computed] = {}
    for name, pieces in zero.tensors.items():
        short = name.replace("_orig_mod.", "")
        if factor := FACTOR.fullmatch(short):
            ending = "" if factor["kind"] == "magnitude_vector" else ".weight"
            short = f"{factor['path']}.lora_{factor['kind']}{ending}"
        elif saved := SAVED_MODULE.fullmatch(short):
            short = f"{saved['path']}.{saved['rest']}"
        elif pieces.is_trained:
            raise CheckpointError(
                f"{zero.folder}: {name} was trained beside the adapter and is no part of one; save the adapter with "
                "PEFT's save_pretrained instead"
            )
        else:
            continue
        if short in tensors:
            raise CheckpointError(f"{zero.folder}: several adapters were trained, which both have {short}")
        tensors[short] = _joined(name, pieces, dtype)
    return Result(tensors, is_adapter=True)


def from_base(result: Result, base: BaseModel) -> Result:
    """With what the base has and the checkpoint lacks, byte for byte: the keys and values of layers that share those of
    another, which transformers neither makes nor saves; and what was frozen and left out.

    Raises:
        CheckpointError: a tensor has another shape in the base, or another name.
    """
    have = result.headers
    added: dict[str, Copied | Computed] = {}
    for shard in base.shards:
        for name, entry in shard.entries.items():
            if name not in have:
                if name != LM_HEAD or not result.tied:
                    added[name] = Copied(shard, name)
            elif have[name].shape != entry.shape:
                raise CheckpointError(
                    f"{name} has shape {list(have[name].shape)} in the checkpoint and {list(entry.shape)} in "
                    f"{base.folder}; give the base that was trained as --base"
                )
    strange = [name for name in have if name not in base.headers and name != LM_HEAD]
    if added and strange:  # names of another class or tool: the base's weights would stand in for trained ones
        raise CheckpointError(
            f"the checkpoint has {strange[0]}, which {base.folder} does not have, and lacks its {next(iter(added))}; "
            "give the base that was trained as --base"
        )
    return replace(result, tensors=result.tensors | added, num_from_base=len(added))


def with_lm_head(result: Result) -> Result:
    """With lm_head.weight, which is the token embedding once more."""
    if LM_HEAD in result.headers:
        return result
    name = next((name for name in result.headers if EMBEDDING.fullmatch(name)), None)
    if name is None or not result.tied:
        raise CheckpointError(f"the model has no token embedding that {LM_HEAD} is tied to; leave out --with-lm-head")
    source = result.source(name)
    if isinstance(source, Copied):  # under another name
        entries = {LM_HEAD: source.entry}
        source = Copied(TensorFile(source.file.path, entries, {}), LM_HEAD)
    return replace(result, tensors=result.tensors | {LM_HEAD: source})


def require_complete(result: Result, config: Path, checkpoint: Path) -> None:
    """Raises CheckpointError where a tensor is missing that the model's class has, or is of another shape: transformers
    would load random values in its place, with a warning at most."""
    import transformers

    try:
        settings = transformers.AutoConfig.from_pretrained(config.parent, trust_remote_code=False)
        name = (settings.architectures or ["AutoModelForImageTextToText"])[0]
        with torch.device("meta"):
            model = getattr(transformers, name)(settings)
    except Exception as error:  # a broken config may raise anything
        raise CheckpointError(
            f"transformers makes no model of {config} ({type(error).__name__}: {reason(error)}); put the "
            "config.json of the trained model there, or update transformers"
        ) from error
    tied = model.all_tied_weights_keys if result.tied else {}
    have = {name_in_model(name, result.model_type): entry for name, entry in result.headers.items()}
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key not in tied}
    if missing := [key for key in wanted if key not in have]:
        raise CheckpointError(
            f"{checkpoint} lacks {len(missing)} of the {len(wanted)} tensors of {name}, such as {missing[0]}: what was "
            "frozen was not saved. Give the model that was trained as --base"
        )
    for key, shape in wanted.items():
        if have[key].shape != shape:
            raise CheckpointError(
                f"{key} has shape {list(have[key].shape)} in {checkpoint}, and by {config} {list(shape)}; put the "
                "config.json of the trained model there"
            )


def num_bytes_of(result: Result) -> int:
    """Of all tensors."""
    return sum(entry.num_bytes for entry in result.headers.values())


def bytes_to_write(result: Result, parent: Path) -> int:
    """What a result takes on the disk of `parent`: a linked file takes nothing where it is already on that."""
    copied = [file for file in result.linked if file.path.stat().st_dev != parent.stat().st_dev]
    return num_bytes_of(replace(result, linked=copied))


def write_result(result: Result, folder: Path, max_shard_size: str) -> None:
    """Link and write the weights of a result; the index, where there are several files, comes last."""
    if result.is_adapter:
        with Workers() as workers:
            _write(folder / ADAPTER_WEIGHTS, result.tensors, workers)
        return
    written = list(_shards(result, int(max_shard_size[:-2]) * UNITS[max_shard_size[-2]]))
    num_files = len(result.linked) + len(written)
    names = [f"model-{number:05d}-of-{num_files:05d}.safetensors" for number in range(1, num_files + 1)]
    if num_files == 1:
        names = [WEIGHTS]
    weight_map: dict[str, str] = {}
    for name, file in zip(names, result.linked, strict=False):
        link_or_copy(file.path, folder / name)
        weight_map |= dict.fromkeys(file.entries, name)
    with Workers() as workers:
        for name, tensors in zip(names[len(result.linked) :], written, strict=True):
            _write(folder / name, tensors, workers)
            weight_map |= dict.fromkeys(tensors, name)
    if num_files > 1:
        total = {"total_size": num_bytes_of(result)}
        write_json(folder / WEIGHTS_INDEX, {"metadata": total, "weight_map": weight_map})


def _write(path: Path, tensors: dict[str, Copied | Computed], workers: Workers) -> None:
    """Write one file."""
    written = write_weights(path, tensors, {"format": "pt"}, workers)
    with contextlib.closing(progress(written, total=len(tensors), desc=path.name, unit="tensor")) as bar:
        for _ in bar:
            pass


def _shards(result: Result, limit: int) -> Iterator[dict[str, Copied | Computed]]:
    """The tensors that are written, file by file: each as many as there is room for, in their order."""
    shard: dict[str, Copied | Computed] = {}
    taken = 0
    for name, tensor in result.tensors.items():
        if shard and taken + tensor.entry.num_bytes > limit:
            yield shard
            shard, taken = {}, 0
        shard[name] = tensor
        taken += tensor.entry.num_bytes
    if shard:
        yield shard


def _joined(name: str, pieces: Pieces, dtype: torch.dtype) -> Computed:
    """A tensor made of its pieces, in `dtype`; the optimizer's weights are to be finite."""
    if pieces.dtype not in DTYPE_NAMES or DTYPE_NAMES[pieces.dtype] not in TORCH_DTYPES:
        raise CheckpointError(f"{name} is of {pieces.dtype}, and a Gemma 4 has tensors of {list(TORCH_DTYPES)} alone")
    num_columns = as_matrix(pieces.shape)[2]

    def rows(start: int, stop: int) -> torch.Tensor:
        values = pieces.values(start * num_columns, stop * num_columns)
        if pieces.is_trained and not torch.stack(torch.aminmax(values)).isfinite().all():
            raise CheckpointError(f"{name} holds NaN or infinity: the training diverged; export an earlier checkpoint")
        return _within(name, values, dtype)

    entry = Entry(DTYPE_NAMES[dtype], pieces.shape, 0, math.prod(pieces.shape) * dtype.itemsize)
    return Computed(entry, lambda _: rows, converted=True)


def _converted(shard: TensorFile, name: str, dtype: torch.dtype) -> Copied | Computed:
    """A tensor of a file in another dtype, or as it is."""
    stored = shard.entries[name]
    if stored.dtype == DTYPE_NAMES[dtype]:
        return Copied(shard, name)

    def rows(workers: Workers) -> Rows:
        found = stored_rows(workers, shard, name)
        return lambda start, stop: _within(name, found(start, stop), dtype)

    shard.dtype(name)  # refuses what is no float
    entry = replace(stored, dtype=DTYPE_NAMES[dtype], num_bytes=math.prod(stored.shape) * dtype.itemsize)
    return Computed(entry, rows, converted=True)


def _within(name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` in `dtype`. Raises CheckpointError where one is too large for it."""
    rounded = values.to(dtype)
    if dtype == torch.float16 and values.isfinite().logical_and(rounded.isinf()).any():
        raise CheckpointError(f"{name} holds values that float16 cannot; use --dtype bfloat16")
    return rounded


def _dtype_of(config: dict[str, Any]) -> str:
    """The dtype that a model's config says its weights have."""
    text = config.get("text_config") or {}
    found = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    found = str(found).removeprefix("torch.")
    if found not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(
            f"config.json has no dtype that weights can be written in ({found}); use --dtype bfloat16"
        )
    return found
