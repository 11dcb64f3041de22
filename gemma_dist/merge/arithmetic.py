"""The sum itself: what the rows of one tensor of the base become, in the order of operations of PEFT and bitsandbytes.

Each step takes a tensor's rows and gives its rows (`stream.Rows`), so that a block of them goes through all steps while
it is in the processor's cache: stored, taken to 4 bit and back, with the adapter added.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch

from gemma_dist.merge.four_bit import four_bit_rows
from gemma_dist.merge.plan import Lora, Replacement, TensorOp
from gemma_dist.merge.stream import MIN_ROWS, Computed, Rows, Workers, as_matrix, stored_rows
from gemma_dist.model.record import Quantization
from gemma_dist.tensorfile import Entry, TensorFile


def merged(
    op: TensorOp, shard: TensorFile, adapters: Sequence[TensorFile], quantization: Quantization | None, entry: Entry
) -> Computed:
    """A tensor of the base, which `shard` has, as the adapters change it; of the dtype of `entry`."""
    shape = entry.shape

    def rows(workers: Workers) -> Rows:
        if (new := op.replaced_by) is not None:
            source = adapters[new.adapter]
            if new.rows is None:
                return stored_rows(workers, source, new.tensor)
            return token_rows(stored_rows(workers, shard, op.name), new, source)
        found = stored_rows(workers, shard, op.name)
        if op.quantized:
            assert quantization is not None
            found = four_bit_rows(workers, found, op.name, shape, quantization)
        for lora in op.loras:
            found = lora_rows(workers, found, lora, adapters[lora.adapter], shape)
        return found

    return Computed(entry, rows, converted=op.untouched)


def token_rows(weight: Rows, new: Replacement, adapter: TensorFile) -> Rows:
    """An embedding with the rows of some tokens in the place of its own."""
    assert new.rows is not None
    trained = adapter.read(new.tensor).float()
    place = {token: number for number, token in enumerate(new.rows)}

    def rows(start: int, stop: int) -> torch.Tensor:
        found, here = weight(start, stop), sorted(place.keys() & range(start, stop))
        if here:
            found = found.float()  # so that what is rounded is rounded once, to the dtype of the result
            found[[token - start for token in here]] = trained[[place[token] for token in here]]
        return found

    return rows


def lora_rows(workers: Workers, weight: Rows, lora: Lora, adapter: TensorFile, shape: tuple[int, ...]) -> Rows:
    """W + s * (B @ A) in float32; with DoRA, each row scaled from its norm to its trained magnitude.

    In PEFT's order of operations (`get_delta_weight` of `Linear` and `ParamWrapper`, `DoraLinearVariant.merge_unsafe`),
    so that the bits agree.
    """
    in_factor = lora.scale >= 1 and math.frexp(lora.scale)[0] == 0.5  # by a power of two, each bit is the same
    factors = _factors(lora, adapter, as_matrix(shape)[1], lora.scale if in_factor else 1.0)
    magnitude = adapter.read(lora.magnitude).float() if lora.magnitude is not None else None

    def rows(start: int, stop: int) -> torch.Tensor:
        found = weight(start, stop)
        if found.dtype != torch.float32:
            found = workers.room("sum", tuple(found.shape), torch.float32).copy_(found)
        b, a = factors(start, stop)
        if in_factor and adds_with_product(len(a), a.shape[1]):
            torch.addmm(found, b, a, out=found)
        else:
            change = torch.mm(b, a, out=workers.room("delta", tuple(found.shape), torch.float32))
            found.add_(change if in_factor else change.mul_(lora.scale))
        if magnitude is None:
            return found
        return found.mul_((magnitude[start:stop] / torch.linalg.norm(found, dim=1)).view(-1, 1))

    return rows


def _factors(
    lora: Lora, adapter: TensorFile, in_matrix: int, scale: float
) -> Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """Of rows of a weight, or of a stack of experts: their rows of scale * B, and A."""
    a, b = adapter.read(lora.a).float(), adapter.read(lora.b).float().mul_(scale)
    if lora.num_experts is None:
        return lambda start, stop: (b[start:stop], a)
    a = a.view(lora.num_experts, -1, a.shape[1])
    b = b.view(len(b), -1, lora.num_experts).permute(2, 0, 1).contiguous()  # (experts, out, r)

    def factors(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        expert = start // in_matrix
        first = expert * in_matrix
        return b[expert, start - first : stop - first], a[expert]

    return factors


@functools.cache
def adds_with_product(rank: int, num_columns: int) -> bool:
    """Whether here W + B @ A in one call has the bits of two, which take a fifth longer: tried on random numbers.

    It has where a value's products are summed in one go and then added. MKL does so up to some 200 of them.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((MIN_ROWS, min(num_columns, 4096)), (MIN_ROWS, rank), (rank, min(num_columns, 4096)))
    weight, b, a = (torch.randn(shape, generator=generator) for shape in shapes)
    return torch.equal(torch.addmm(weight, b, a), weight + b @ a)
