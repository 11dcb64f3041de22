"""Weights of the base in 4 bits, as bitsandbytes holds them in training: made full again, or as checkpoints hold them.

A scale belongs to a block of 64 values. With double quantization the scales less their mean are held in 8 bits, a scale
to 256 of them: it hangs on all scales of a tensor, so a tensor is gone through twice.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gemma_dist.config import FOUR_BIT_BLOCK_SIZE as BLOCK_SIZE
from gemma_dist.errors import CheckpointError, setting
from gemma_dist.merge.folders import model_class
from gemma_dist.merge.stream import Computed, Rows, Workers, as_matrix, row_blocks, stored_rows
from gemma_dist.model.record import Quantization
from gemma_dist.tensorfile import DTYPE_NAMES, Entry, TensorFile

BLOCKS_AT_ONCE = 1 << 10  # of 4-bit values: bitsandbytes goes through a dozen tensors of their size
SCALES_AT_ONCE = 1 << 14  # a multiple of 256; bitsandbytes takes a KiB of memory for each that it quantizes on a CPU
SCALES_PER_SCALE = 256
NUMBER_BYTES = 25  # of the longest number in JSON


def four_bit_rows(
    workers: Workers, stored: Rows, name: str, shape: tuple[int, ...], quantization: Quantization
) -> Rows:
    """Rows as a 4-bit layer of bitsandbytes holds them, made full again.

    Bit-equal to `dequantize_4bit(layer.weight.data, layer.weight.quant_state)` of the loaded layer on a GPU: same block
    size (64, its default), same double quantization, from and to the dtype that the weight was loaded in. Given as rows
    of 64 values, since of others a CPU may take the wrong scales (`model/four_bit_cpu.py`).
    """
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit

    _, in_matrix, num_columns = as_matrix(shape)
    if len(shape) == 3 and in_matrix * num_columns % BLOCK_SIZE:
        raise CheckpointError(
            f"{name} has matrices of {in_matrix * num_columns} values, and blocks of {BLOCK_SIZE} would lie in two of "
            f"them; use {setting('base_weights', 'original')}"
        )
    quantize = partial(quantize_4bit, blocksize=BLOCK_SIZE, quant_type=quantization["bnb_4bit_quant_type"])
    loaded = partial(_loaded, stored, dtype=_loaded_dtype(quantization))
    scales = _scales(workers, loaded, shape)
    if quantization.get("bnb_4bit_use_double_quant", False):
        mean = scales.mean()

        def round_off(start: int) -> None:
            piece = scales[start : start + SCALES_AT_ONCE]
            piece.copy_(dequantize_blockwise(*_scales_in_8_bits(piece, mean)) + mean)

        workers.map(round_off, ((start,) for start in range(0, len(scales), SCALES_AT_ONCE)))

    def rows(start: int, stop: int) -> torch.Tensor:
        values, first = loaded(start, stop), start * num_columns // BLOCK_SIZE
        found = workers.room("four bit", values.shape, values.dtype)
        for at in range(0, len(values), BLOCKS_AT_ONCE):
            packed, state = quantize(values[at : at + BLOCKS_AT_ONCE])
            state.absmax = scales[first + at :][: len(state.absmax)]
            found[at : at + BLOCKS_AT_ONCE] = dequantize_4bit(packed, state)
        num_values = (stop - start) * num_columns
        return found.view(-1)[:num_values].view(stop - start, num_columns)

    return rows


def linears_left_whole(base: Path, quantization: Quantization) -> list[str]:
    """Paths of the linear layers of a model that training did not hold in 4 bits."""
    from transformers import AutoConfig

    with torch.device("meta"):
        skeleton = model_class(base)(AutoConfig.from_pretrained(base, trust_remote_code=False))
    linears = {name for name, module in skeleton.named_modules() if type(module) is torch.nn.Linear}
    return sorted(linears - set(quantization["modules"]))


def _loaded_dtype(quantization: Quantization) -> torch.dtype | None:
    """In which training loaded the weights; None: in that of their file."""
    return getattr(torch, quantization["weights_dtype"]) if quantization.get("weights_dtype") else None


def _loaded(stored: Rows, start: int, stop: int, *, dtype: torch.dtype | None) -> torch.Tensor:
    """Rows as blocks, (blocks, 64), of the dtype that training loaded them in."""
    values = stored(start, stop).reshape(-1)
    values = values if dtype is None else values.to(dtype)
    missing = -len(values) % BLOCK_SIZE
    return (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, BLOCK_SIZE)


def _scales(workers: Workers, loaded: Rows, shape: tuple[int, ...]) -> torch.Tensor:
    """Of each block of a tensor its largest absolute value, in float32.

    One tensor, filled in place: thousands of small ones between the blocks would keep the memory of these from reuse.
    """
    num_columns = as_matrix(shape)[2]
    scales = torch.empty(-(-math.prod(shape) // BLOCK_SIZE))

    def measure(start: int, stop: int) -> None:
        found = loaded(start, stop).abs().amax(1)
        first = start * num_columns // BLOCK_SIZE
        scales[first : first + len(found)] = found

    workers.map(measure, row_blocks(shape))
    return scales


def _scales_in_8_bits(scales: torch.Tensor, mean: torch.Tensor) -> Any:
    """(codes, state) of scales, a multiple of 256 of them unless they are the last."""
    from bitsandbytes.functional import quantize_blockwise

    return quantize_blockwise(scales - mean, blocksize=SCALES_PER_SCALE)


class PackedWeight:
    """A weight of the base as the tensors that a checkpoint of transformers has of a 4-bit layer.

    They are what `QuantState.as_dict(packed=True)` of bitsandbytes gives: the codes, two to a byte, under the weight's
    own name; the scales; and numbers as JSON, which are filled up with blanks, since their length must be known before.
    """

    def __init__(self, shard: TensorFile, name: str, quantization: Quantization) -> None:
        self.shard, self.name, self.quantization = shard, name, quantization
        self.shape = shard.entries[name].shape
        self.num_blocks = math.prod(self.shape) // BLOCK_SIZE
        self._stats: dict[str, torch.Tensor] | None = None
        if len(self.shape) != 2 or math.prod(self.shape) % BLOCK_SIZE:
            raise CheckpointError(
                f"{name} of shape {list(self.shape)} is no matrix of blocks of {BLOCK_SIZE} values, and "
                "transformers loads no other in 4 bits; merge without --save-in-4bit"
            )

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Names, dtypes and shapes of the tensors, in the order in which they are written."""
        yield self.name, _entry(torch.uint8, math.prod(self.shape) // 2, 1)
        for key, (dtype, length) in self._kinds().items():
            yield f"{self.name}.{key}", _entry(dtype, length)

    def computed(self, tensor: str, entry: Entry) -> Computed:
        """One of the tensors."""
        key = tensor.removeprefix(self.name).removeprefix(".")
        return Computed(entry, partial(self._stat_rows, key=key) if key else self._codes)

    def _kinds(self) -> dict[str, tuple[torch.dtype, int]]:
        """Dtype and length of each tensor beside the codes; the last is the JSON."""
        double = self.quantization.get("bnb_4bit_use_double_quant", False)
        kinds = {
            "absmax": (torch.uint8 if double else torch.float32, self.num_blocks),
            "quant_map": (torch.float32, 16),
        }
        if double:
            kinds["nested_absmax"] = (torch.float32, -(-self.num_blocks // SCALES_PER_SCALE))
            kinds["nested_quant_map"] = (torch.float32, 256)
        numbers = len(self._numbers(torch.zeros(())))
        return kinds | {f"quant_state.bitsandbytes__{self.quantization['bnb_4bit_quant_type']}": (torch.uint8, numbers)}

    def _blocks(self, workers: Workers) -> Rows:
        """The weight as it was loaded, a row for each block."""
        entry = replace(self.shard.entries[self.name], shape=(self.num_blocks, BLOCK_SIZE))
        file = replace(self.shard, entries={self.name: entry})
        return partial(_loaded, stored_rows(workers, file, self.name), dtype=_loaded_dtype(self.quantization))

    def _codes(self, workers: Workers) -> Rows:
        """The codes, a row of one byte for each two values."""
        from bitsandbytes.functional import quantize_4bit

        blocks, bytes_per_block = self._blocks(workers), BLOCK_SIZE // 2
        kind = self.quantization["bnb_4bit_quant_type"]

        def rows(start: int, stop: int) -> torch.Tensor:
            values = blocks(start // bytes_per_block, stop // bytes_per_block)
            found = workers.room("codes", (stop - start, 1), torch.uint8)
            for at in range(0, len(values), BLOCKS_AT_ONCE):
                codes, _ = quantize_4bit(values[at : at + BLOCKS_AT_ONCE], blocksize=BLOCK_SIZE, quant_type=kind)
                found[at * bytes_per_block :][: len(codes)] = codes
            return found

        return rows

    def _stat_rows(self, workers: Workers, *, key: str) -> Rows:
        """One of the tensors beside the codes. They are made together, and dropped with the last."""
        stats = self._stats or self._measure(workers)
        last = key.startswith("quant_state")
        self._stats = None if last else stats
        found = stats[key].view(-1, 1)
        return lambda start, stop: found[start:stop]

    def _measure(self, workers: Workers) -> dict[str, torch.Tensor]:
        """All tensors beside the codes."""
        from bitsandbytes.functional import get_4bit_type

        kind = self.quantization["bnb_4bit_quant_type"]
        scales = _scales(workers, self._blocks(workers), (self.num_blocks, BLOCK_SIZE))
        stats = {"absmax": scales, "quant_map": get_4bit_type(kind, device="cpu", blocksize=BLOCK_SIZE)}
        mean = scales.mean()
        if self.quantization.get("bnb_4bit_use_double_quant", False):
            starts = range(0, len(scales), SCALES_AT_ONCE)
            pieces = workers.map(lambda at: _scales_in_8_bits(scales[at : at + SCALES_AT_ONCE], mean), zip(starts))
            stats["absmax"] = torch.cat([codes for codes, _ in pieces])
            stats["nested_absmax"] = torch.cat([state.absmax for _, state in pieces])
            stats["nested_quant_map"] = pieces[0][1].code
        numbers = torch.frombuffer(bytearray(self._numbers(mean)), dtype=torch.uint8)
        return stats | {f"quant_state.bitsandbytes__{kind}": numbers}

    def _numbers(self, mean: torch.Tensor) -> bytes:
        """What is no tensor, as JSON with blanks behind it; as long for every `mean` of the scales."""
        dtype = _loaded_dtype(self.quantization) or self.shard.dtype(self.name)
        numbers = {
            "quant_type": self.quantization["bnb_4bit_quant_type"],
            "blocksize": BLOCK_SIZE,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        if not self.quantization.get("bnb_4bit_use_double_quant", False):
            return json.dumps(numbers).encode()
        numbers |= {"nested_blocksize": SCALES_PER_SCALE, "nested_dtype": "float32"}
        length = len(json.dumps(numbers | {"nested_offset": 0})) + NUMBER_BYTES
        return json.dumps(numbers | {"nested_offset": mean.item()}).ljust(length).encode()


def _entry(dtype: torch.dtype, *shape: int) -> Entry:
    """Of a tensor of a result."""
    return Entry(DTYPE_NAMES[dtype], shape, 0, math.prod(shape) * dtype.itemsize)
