"""A GPU's memory without the GPU: every tensor of a simulated step is counted while it lives, by what it is for.

Tensors are torch's fakes: they have shapes, dtypes and lifetimes, and no bytes. `Allocator` sees each operation and
sums the storages that are alive, each rounded up as CUDA's allocator rounds. Of integers and booleans (token ids,
positions, masks) it computes the values as well, so that what depends on data, such as where the documents of a pack
begin and which tokens are images, is in the simulation what it is in a run.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map_only

aten, prim = torch.ops.aten, torch.ops.prim
MAX_KNOWN = 2**26  # elements of a tensor whose values are computed
MAX_CONSTANT = 2**10  # of floating-point numbers that depend on no other tensor
ACTIVATIONS = "activations"


class Peak(NamedTuple):
    """The most bytes that were held at once, and what they were for."""

    total: int
    parts: dict[str, int]


class Allocator(TorchDispatchMode):
    """Counts the bytes of all storages alive, and what they were for at the peak of each moment of a step."""

    def __init__(self, granularity: int, scratch: Callable[[Any, tuple[Any, ...]], int]) -> None:
        """
        Args:
            granularity: of an allocation, in bytes.
            scratch: bytes that an operator with these arguments takes while it runs, beside its results.
        """
        super().__init__()
        self.granularity, self.scratch = granularity, scratch
        self.part, self.moment = ACTIVATIONS, ""
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peaks: dict[str, Peak] = {}  # by moment
        self._held: dict[int, list[Any]] = {}  # storage -> [bytes, part]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and what would keep torch from it costs a third of the time."""
        return False

    def __enter__(self) -> "Allocator":
        # torch's own asks for the elements one by one
        self._patch = patch.object(FakeTensor, "tolist", _tolist)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patch.stop()
        super().__exit__(*error)

    @contextmanager
    def counting_as(self, part: str, *, moment: str | None = None) -> Iterator[None]:
        """Within, new tensors are for `part`, and peaks are those of a `moment` of their own, if it has a name."""
        before = self.part, self.moment
        self.part, self.moment = part, self.moment if moment is None else moment
        try:
            yield
        finally:
            self.part, self.moment = before

    def label(self, tensor: torch.Tensor, part: str) -> None:
        """From now on, the storage of a tensor is for `part`; one that is not known yet is counted."""
        self.add(tensor)
        held = self._held[tensor.untyped_storage()._cdata]
        self.live[held[1]] -= held[0]
        self.live[part] += held[0]
        held[1] = part

    def add(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor, if it is a new one, until it dies."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        num_bytes = -(-storage.nbytes() // self.granularity) * self.granularity
        self._held[key] = [num_bytes, self.part]
        self.live[self.part] += num_bytes
        self.total += num_bytes
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        num_bytes, part = self._held.pop(key)
        self.live[part] -= num_bytes
        self.total -= num_bytes

    def _note_peak(self, scratch: int) -> None:
        total = self.total + scratch
        if self.moment not in self.peaks or total > self.peaks[self.moment].total:
            parts = dict(self.live)
            parts[self.part] = parts.get(self.part, 0) + scratch
            self.peaks[self.moment] = Peak(total, parts)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator on fakes."""
        if func is prim.device.default:
            return args[0].fake_device
        kwargs = kwargs or {}
        if func in (aten._local_scalar_dense.default, aten.item.default) and (value := known(args[0])) is not None:
            with _disable_current_modes():
                return value.item()
        indices: list[torch.Tensor] = []
        if func is aten.nonzero.default:
            return self._nonzero(args[0])
        if func is aten.index.Tensor:
            args, indices = self._without_masks(*args)
        result = _grouped_mm(*args, **kwargs) if func is aten._grouped_mm.default else func(*args, **kwargs)
        outputs = list(_fakes(result))
        for tensor in outputs:
            self.add(tensor)
        self._note_peak(self.scratch(func, args))
        del indices
        _compute_values(func, args, kwargs, result, outputs)
        return result

    def _nonzero(self, mask: torch.Tensor) -> torch.Tensor:
        """Where a mask with known values is true: (number, dimensions)."""
        value = known(mask)
        assert value is not None, "the shape of a result depends on numbers that a simulation does not have"
        with _disable_current_modes():
            places = value.nonzero()
        fake = torch.empty(places.shape, dtype=torch.int64)
        self.add(fake)
        _know(fake, places)
        self._note_peak(0)
        return fake

    def _without_masks(self, tensor: torch.Tensor, indices: list[Any]) -> tuple[Any, list[torch.Tensor]]:
        """Arguments of an indexing with masks as places, and the tensors that hold these while it runs."""
        held, plain = [], []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                held.append(self._nonzero(index))
                places = known(held[-1])
                assert places is not None
                with _disable_current_modes():
                    columns = places.unbind(1)
                for column, value in zip(held[-1].unbind(1), columns, strict=True):
                    _know(column, value)
                    plain.append(column)
            else:
                plain.append(index)
        return (tensor, plain), held


def _grouped_mm(first: torch.Tensor, second: torch.Tensor, offs: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The result of `aten._grouped_mm`, whose own shape function knows bfloat16 alone: (rows, columns) by groups of
    rows, or (groups, rows, columns) where the groups are of what is summed over."""
    rows, columns = first.shape[-2], second.shape[-1]
    shape = (rows, columns) if second.dim() == 3 else (offs.shape[0], rows, columns)
    return torch.empty(shape, dtype=first.dtype)


def known(tensor: Any) -> torch.Tensor | None:
    """The real values beside a fake, if there are any."""
    return getattr(tensor, "_known_values", None)


def _tolist(tensor: FakeTensor) -> Any:
    values = known(tensor)
    assert values is not None, "a simulation does not have these numbers"
    with _disable_current_modes():
        return values.tolist()


def _know(fake: Any, values: torch.Tensor | None) -> None:
    fake._known_values = values


def fake_of(real: torch.Tensor) -> torch.Tensor:
    """A new fake like a real tensor, on whose values something may depend if they are no floating-point numbers."""
    fake = torch.empty(real.shape, dtype=real.dtype)
    if not real.is_floating_point():
        _know(fake, real)
    return fake


def _fakes(values: Any) -> Iterator[Any]:
    """The fakes in an operator's arguments or results, which are nested in lists at most."""
    if isinstance(values, FakeTensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _fakes(value)


def _compute_values(func: Any, args: Any, kwargs: Any, result: Any, outputs: list[Any]) -> None:
    """Give the results of an operator their values, where those of all its arguments are known; those of tensors that
    it writes to change with them."""
    arguments = list(chain(_fakes(args), _fakes(tuple(kwargs.values()))))
    in_place = not outputs and func._schema.is_mutable
    if any(known(fake) is None for fake in arguments):
        for one in arguments if in_place else outputs:
            if known(one) is not None:  # written to, with what is not known
                _know(one, None)
        return
    size = max((output.numel() for output in outputs), default=0)
    if not (outputs or in_place) or size > MAX_KNOWN:
        return
    if not arguments and size > MAX_CONSTANT and outputs[0].is_floating_point():
        return
    with _disable_current_modes():
        real_args, real_kwargs = tree_map_only(FakeTensor, known, (args, kwargs))
        real = func(*real_args, **real_kwargs)
    if outputs:
        for output, value in zip(outputs, tree_iter(real), strict=True):
            _know(output, value)
