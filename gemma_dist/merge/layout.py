"""The files of a result: which tensors stand in which, in what dtype. The base's own, unless others are asked for."""

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gemma_dist.merge.folders import BaseModel
from gemma_dist.merge.four_bit import PackedWeight
from gemma_dist.model.folder import WEIGHTS
from gemma_dist.tensorfile import TORCH_DTYPES, Entry


@dataclass(frozen=True)
class File:
    """A safetensors file of a result. Each entry's `begin` is of no meaning."""

    name: str
    entries: dict[str, Entry]  # in the order of their bytes
    metadata: dict[str, str]


@dataclass(frozen=True)
class Layout:
    """The safetensors files of a result and their index, where it is loaded by one."""

    files: list[File]
    index: dict[str, Any] | None

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(entry.num_bytes for file in self.files for entry in file.entries.values())


def lay_out(
    base: BaseModel,
    *,
    dtype: str | None,
    max_shard_size: str | None,
    packed: Mapping[str, PackedWeight] = types.MappingProxyType({}),
) -> Layout:
    """The files of a model with the tensors of `base`.

    Args:
        packed: tensors of the base that are stored in 4 bits.
        dtype: `bfloat16`, `float16` or `float32`, which all floating-point tensors get; None: each keeps its own.
        max_shard_size: of a file, such as 5GB (of 10^9 bytes), cut as transformers cuts; None: the base's files.
    """
    files = []
    for shard in base.shards:
        entries: dict[str, Entry] = {}
        for name, entry in shard.entries.items():
            entries |= packed[name].entries() if name in packed else {name: _in_dtype(entry, dtype)}
        files.append(File(shard.path.name, entries, shard.metadata))
    if max_shard_size is not None:
        files = _cut(files, max_shard_size)
    layout = Layout(files, None)
    if len(files) == 1 and (max_shard_size is not None or base.index is None):
        return layout
    known = base.index or {}
    metadata = known.get("metadata", {}) | {"total_size": layout.num_bytes}  # without headers
    weight_map = {name: file.name for file in files for name in file.entries}
    return replace(layout, index={**known, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def _in_dtype(entry: Entry, dtype: str | None) -> Entry:
    """The entry of a tensor in another dtype; what holds no floating-point numbers stays as it is."""
    if dtype is None or entry.dtype not in TORCH_DTYPES:
        return entry
    name = next(name for name, known in TORCH_DTYPES.items() if str(known) == f"torch.{dtype}")
    return replace(entry, dtype=name, num_bytes=math.prod(entry.shape) * TORCH_DTYPES[name].itemsize)


def _cut(files: list[File], max_shard_size: str) -> list[File]:
    """The tensors of some files, in their order, in files of at most so many bytes; a larger tensor gets its own."""
    from huggingface_hub import split_state_dict_into_shards_factory

    entries = {name: entry for file in files for name, entry in file.entries.items()}
    cut = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.num_bytes,
        filename_pattern=WEIGHTS.replace(".", "{suffix}."),
        max_shard_size=max_shard_size,
    )
    return [
        File(name, {tensor: entries[tensor] for tensor in tensors}, files[0].metadata)
        for name, tensors in cut.filename_to_tensors.items()
    ]


def config_in_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A model's config.json with another dtype, in its parts as well where they name one."""

    def changed(part: Mapping[str, Any]) -> dict[str, Any]:
        """One level of it; transformers 4 wrote torch_dtype."""
        return {
            key: dtype if key in ("dtype", "torch_dtype") else changed(value) if isinstance(value, dict) else value
            for key, value in part.items()
        }

    return {"dtype": dtype} | changed(config)
