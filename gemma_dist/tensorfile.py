"""Safetensors files, read and written one tensor at a time, so that no more than the largest one is held beside them.

The format (https://huggingface.co/docs/safetensors, "Format"): 8 bytes with the length N of the header, unsigned and
little-endian; N bytes of JSON, {name: {"dtype", "shape", "data_offsets": [begin, end]}} with offsets from the end of
the header, "__metadata__" for a map of strings, spaces at the end allowed; then the data, without gaps, little-endian.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from gemma_dist.errors import CheckpointError, brief
from gemma_dist.files import naming, writing

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {
    **{dtype: name for name, dtype in TORCH_DTYPES.items()},
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
DTYPE_OF = {name: dtype for dtype, name in DTYPE_NAMES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference reader


@dataclass(frozen=True)
class Entry:
    """One tensor's place in its file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    num_bytes: int


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header has been read. `entries` are in the order of their bytes."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor. Only those that can be merged are known."""
        stored = self.entries[name].dtype
        if stored not in TORCH_DTYPES:
            raise CheckpointError(f"{name} in {self.path} is stored as {stored}; use one of {list(TORCH_DTYPES)}")
        return TORCH_DTYPES[stored]

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU."""
        entry, dtype = self.entries[name], self.dtype(name)
        data = bytearray(entry.num_bytes)
        with naming(self.path), self.path.open("rb") as file:
            file.seek(entry.begin)
            file.readinto(data)
        return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)


def open_tensors(path: Path) -> TensorFile:
    """Read the header of a safetensors file.

    Raises:
        CheckpointError: the file is absent, cut short or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > min(size, MAX_HEADER_BYTES):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(header_bytes))
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(one, str) for one in metadata.values()):
            raise ValueError(f"__metadata__ is {brief(metadata)}, which is no object of texts")
        "".join([*header, *metadata, *metadata.values()]).encode()  # ValueError where UTF-8 cannot
        start = 8 + header_bytes
        entries = {}
        end = start
        for name, item in header.items():
            _require_entry(name, item)
        for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
            offsets = item["data_offsets"]
            entry = Entry(item["dtype"], tuple(item["shape"]), start + offsets[0], offsets[1] - offsets[0])
            if entry.begin != end:
                raise ValueError(f"{name} does not begin where the tensor before it ends")
            entries[name] = entry
            end += entry.num_bytes
        if end != size:
            raise ValueError(f"it has {size} bytes, its header says {end}")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the folder's name") from error
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); download or save it again") from None
    return TensorFile(path, entries, metadata)


def _require_entry(name: str, item: object) -> None:
    """Raises ValueError unless an item of a header says where a tensor lies, in as many bytes as its shape takes."""
    if isinstance(item, dict) and isinstance(item.get("dtype"), str) and item["dtype"].isascii():
        shape, offsets = _counts(item.get("shape")), _counts(item.get("data_offsets"))
        if shape is not None and offsets is not None and len(offsets) == 2 and offsets[0] <= offsets[1]:
            dtype = DTYPE_OF.get(item["dtype"])
            if dtype is None or offsets[1] - offsets[0] == math.prod(shape) * dtype.itemsize:
                return
    raise ValueError(f"{name} is {brief(item)}, which is no place of a tensor")


def _counts(value: object) -> list[int] | None:
    """A list of numbers from 0; None for anything else."""
    return value if isinstance(value, list) and all(type(one) is int and one >= 0 for one in value) else None


def header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str], multiple_of: int = 8) -> bytes:
    """What a safetensors file begins with; the tensors' bytes must follow in the order of `entries` (whose `begin` is
    ignored).

    Args:
        multiple_of: bytes that the data begins at a multiple of; 8 as in files of the reference writer.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.num_bytes
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % multiple_of)
    return struct.pack("<Q", len(text)) + text


def write_tensor(target: BinaryIO, tensor: torch.Tensor) -> None:
    """Append one tensor's bytes."""
    target.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a whole file, under a temporary name until it is complete."""
    entries = {}
    for name, tensor in tensors.items():
        entries[name] = Entry(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)
    with writing(path) as temporary, temporary.open("wb") as target:
        target.write(header_bytes(entries, {"format": "pt"}))
        for tensor in tensors.values():
            write_tensor(target, tensor)
