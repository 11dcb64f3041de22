"""Weights from disk to disk: in pieces that a few threads read, compute and write at the same time.

What a tensor takes from another file as it is, is copied inside the kernel. Any other tensor is made in blocks of rows
that fit the processor's cache, each written where it belongs. So neither the model nor its largest tensor has to fit in
memory: each thread holds one block, beside what a tensor needs as a whole (the factors of its adapter).
"""

import contextlib
import ctypes
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemma_dist.errors import CheckpointError, setting
from gemma_dist.files import naming, sync
from gemma_dist.merge.direct import PAGE_BYTES, SharedFile
from gemma_dist.tensorfile import DTYPE_OF, Entry, TensorFile, header_bytes

# Of a tensor taken as a matrix, rows start … stop-1, in any order and by several threads at once; until the same thread
# asks again. Whoever gets them may change them.
Rows = Callable[[int, int], torch.Tensor]

BLOCK_VALUES = 1 << 19  # of one block: 2 MiB in float32, in which it is summed
MIN_ROWS = 64  # matrix products of fewer may have other bits than those of all; and 4-bit blocks begin at each 64th
COPY_BYTES = 64 << 20
SYNC_BYTES = 64 << 20
MAX_THREADS = 8
NUM_WAITING = 1  # thread that waits for the disk while the others compute


@dataclass(frozen=True)
class Copied:
    """A tensor that has the bytes of one of `file`."""

    file: TensorFile
    name: str

    @property
    def entry(self) -> Entry:
        """Its dtype and shape."""
        return self.file.entries[self.name]


@dataclass(frozen=True)
class Computed:
    """A tensor whose rows are computed; `rows` is called once, when its turn comes."""

    entry: Entry
    rows: Callable[["Workers"], Rows]
    converted: bool = False  # to the dtype of `entry` and no more: what is not finite in it may have been so before


class Workers:
    """Threads that work on the pieces of a file, and the files that they read from. One of torch's own threads each.

    A context manager: at its end all work is done, or the first error is raised and the rest is dropped.
    """

    def __init__(self, *, num_waiting: int = NUM_WAITING) -> None:
        """`num_waiting` threads more than cores: 0 where the sums take so long that nobody waits, and much memory."""
        self.num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0))) + num_waiting

    def __enter__(self) -> "Workers":
        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # before the threads start, which take it over
        self._pool = ThreadPoolExecutor(self.num_threads)
        self._disk = ThreadPoolExecutor(1)  # waits for the disk, so that none of the others does
        self._syncing: Future[None] | None = None
        self._num_unsynced = 0
        self._room = threading.BoundedSemaphore(2 * self.num_threads)  # so that no more than these wait in memory
        self._futures: list[Future[Any]] = []
        self._files = contextlib.ExitStack()
        self._handles: dict[Path, int] = {}
        self._rooms = threading.local()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
                if self._syncing is not None:
                    self._syncing.result()
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._disk.shutdown(cancel_futures=True)
            self._files.close()
            torch.set_num_threads(self._torch_threads)

    def submit(self, work: Callable[..., object], *arguments: object) -> None:
        """Have a thread do some work, as soon as one is near to be free. Raises what earlier work raised."""
        self._room.acquire()
        pending = []
        for future in self._futures:
            if future.done():
                future.result()
            else:
                pending.append(future)
        self._futures = [*pending, self._pool.submit(work, *arguments)]
        self._futures[-1].add_done_callback(lambda _: self._room.release())

    def wait(self) -> None:
        """Until all work that was submitted is done."""
        for future in self._futures:
            future.result()
        self._futures = []

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """At the end nothing is at work, also where an error ends it: what had not begun is dropped then."""
        try:
            yield
        finally:
            for future in self._futures:
                future.cancel()
            wait(self._futures)

    def sync(self, path: Path, num_bytes: int) -> None:
        """Have a file on the disk now and then while it is written, of which so many more bytes are.

        A kernel that is left alone lets them pile up, and the last call of all then waits for them.
        """
        self._num_unsynced += num_bytes
        if self._num_unsynced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            if self._syncing is not None:
                self._syncing.result()
            self._syncing, self._num_unsynced = self._disk.submit(sync, path), 0

    def map(self, work: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> list[Any]:
        """What `work` returns for each of `arguments`, in their order."""
        return [future.result() for future in [self._pool.submit(work, *each) for each in arguments]]

    def room(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the calling thread, which its next call for the same purpose gives again: fresh memory for each
        block would have to be cleared by the kernel first. It begins with a page (see `direct.py`)."""
        kept, asked = self._rooms.__dict__, (shape, dtype)
        memory, last_asked, last = kept.get(purpose, (None, None, None))
        if last_asked != asked:
            num_bytes = math.prod(shape) * dtype.itemsize
            if memory is None or len(memory) < num_bytes:
                memory = torch.empty(num_bytes + PAGE_BYTES, dtype=torch.uint8)
                memory = memory[-memory.data_ptr() % PAGE_BYTES :][:num_bytes]
            last = memory[:num_bytes].view(dtype).view(shape)
            kept[purpose] = memory, asked, last
        assert last is not None
        return last

    def lies_in(self, purpose: str, values: torch.Tensor) -> bool:
        """Whether `values` are in the memory that the calling thread has for a purpose."""
        memory, *_ = self._rooms.__dict__.get(purpose, (None,))
        return memory is not None and memory.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()

    def handle(self, path: Path) -> int:
        """Of a file that is read, open until the end."""
        if path not in self._handles:
            self._handles[path] = self._files.enter_context(path.open("rb")).fileno()
        return self._handles[path]


def as_matrix(shape: Sequence[int]) -> tuple[int, int, int]:
    """A tensor as rows: how many there are, how many of them make a matrix, and how many values one has.

    A stack (experts, out, in) has the rows of all its matrices; any other tensor those of its first dimension.
    """
    if len(shape) == 3:
        return shape[0] * shape[1], shape[1], shape[2]
    num_rows = shape[0] if shape else 1
    return num_rows, num_rows, math.prod(shape[1:])


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks of a tensor. None has rows of two matrices of a stack, and none has fewer rows than
    MIN_ROWS unless its matrix has."""
    num_rows, in_matrix, num_columns = as_matrix(shape)
    step = max(1, BLOCK_VALUES // max(1, num_columns) // MIN_ROWS) * MIN_ROWS
    starts = range(0, max(0, (in_matrix - MIN_ROWS) // step) * step + 1, step)  # the last takes a small remainder, too
    for first in range(0, num_rows, max(1, in_matrix)):
        for start in starts:
            yield first + start, first + (in_matrix if start == starts[-1] else start + step)


def stored_rows(workers: Workers, file: TensorFile, name: str) -> Rows:
    """Of a tensor as it is stored."""
    entry, dtype = file.entries[name], file.dtype(name)
    num_columns = as_matrix(entry.shape)[2]
    width = num_columns * dtype.itemsize
    handle = workers.handle(file.path)

    def rows(start: int, stop: int) -> torch.Tensor:
        found = workers.room("stored", (stop - start, num_columns), dtype)
        read_into(handle, as_bytes(found), entry.begin + start * width, file.path)
        return found

    return rows


def write_weights(
    path: Path, tensors: Mapping[str, Copied | Computed], metadata: Mapping[str, str], workers: Workers
) -> Iterator[str]:
    """Write a safetensors file; yields the name of each tensor when work on it begins.

    Raises:
        CheckpointError: a file that is read changed meanwhile, or a tensor would not be finite.
    """
    direct = [name for name in tensors if _has_whole_pages(tensors[name])]
    in_order = direct + [name for name in tensors if not _has_whole_pages(tensors[name])]
    header = header_bytes({name: tensors[name].entry for name in in_order}, metadata, multiple_of=PAGE_BYTES)
    at = len(header)
    num_bytes = at + sum(tensor.entry.num_bytes for tensor in tensors.values())
    with naming(path), SharedFile(path, num_bytes) as target, workers.settled():
        copy = _Copy(target, workers)
        for number, name in enumerate(in_order):
            yield name
            tensor = tensors[name]
            if number == len(direct):
                workers.wait()
                target.end_direct()
            if isinstance(tensor, Copied):
                copy.add(tensor.file.path, tensor.entry.begin, at, tensor.entry.num_bytes)
            else:
                _compute(name, tensor, target, at, workers)
            at += tensor.entry.num_bytes
            if not target.is_direct:
                workers.sync(path, tensor.entry.num_bytes)
        copy.flush()
        workers.wait()
        target.end_direct()
        target.write(memoryview(header), 0)


def _has_whole_pages(tensor: Copied | Computed) -> bool:
    """Whether a tensor is computed, and in blocks of whole pages (`row_blocks`): none goes beyond one matrix."""
    if isinstance(tensor, Copied):
        return False
    _, in_matrix, num_columns = as_matrix(tensor.entry.shape)
    width = num_columns * DTYPE_OF[tensor.entry.dtype].itemsize
    return (MIN_ROWS * width) % PAGE_BYTES == 0 and (in_matrix * width) % PAGE_BYTES == 0


def _compute(name: str, tensor: Computed, target: SharedFile, at: int, workers: Workers) -> None:
    """Have a tensor's blocks computed and written from byte `at` on."""
    rows, dtype = tensor.rows(workers), DTYPE_OF[tensor.entry.dtype]
    width = as_matrix(tensor.entry.shape)[2] * dtype.itemsize

    def write(start: int, stop: int) -> None:
        values = block = rows(start, stop)
        if values.dtype != dtype:
            # In the memory that the rows were read into, which the processor's cache has, unless they are there still.
            free = "result" if workers.lies_in("stored", values) else "stored"
            block = workers.room(free, tuple(values.shape), dtype).copy_(values)
        if not math.isfinite(block.sum().item()):  # the sum of finite ones may overflow, too
            _check_finite(name, values, block, tensor.converted)
        if not block.is_contiguous() or (target.is_direct and block.data_ptr() % PAGE_BYTES):
            block = workers.room("whole pages", tuple(block.shape), dtype).copy_(block)
        target.write(as_bytes(block), at + start * width)

    for start, stop in row_blocks(tensor.entry.shape):
        workers.submit(write, start, stop)


def as_bytes(block: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, which must outlive it."""
    assert block.is_contiguous()
    return memoryview((ctypes.c_char * block.nbytes).from_address(block.data_ptr())).cast("B")


def _check_finite(name: str, values: torch.Tensor, block: torch.Tensor, converted: bool) -> None:
    """Refuse `values` that are not finite as `block`, in the dtype of the result; unless they came so from the base."""
    finite, dtype = values.isfinite(), block.dtype
    if finite.logical_and(block.isfinite().logical_not()).any():
        raise CheckpointError(
            f"{name} would hold {values[finite].abs().max().item():.6g}, and {dtype} ends at "
            f"{torch.finfo(dtype).max:.6g}; use {setting('dtype', 'bfloat16')}"
        )
    if not converted and not finite.all():
        raise CheckpointError(
            f"{name} would hold NaN or infinity after the merge: the training diverged. Merge an earlier checkpoint of "
            "the adapter"
        )


class _Copy:
    """Ranges of bytes to be copied to a file: neighbors go together."""

    def __init__(self, target: SharedFile, workers: Workers) -> None:
        self.target, self.workers = target, workers
        self._path, self._from, self._at, self._num_bytes = Path(), 0, 0, 0

    def add(self, path: Path, begin: int, at: int, num_bytes: int) -> None:
        """Have bytes of `path` from `begin` on copied to byte `at`."""
        follows = (path, begin, at) == (self._path, self._from + self._num_bytes, self._at + self._num_bytes)
        if not follows:
            self.flush()
            self._path, self._from, self._at = path, begin, at
        self._num_bytes += num_bytes

    def flush(self) -> None:
        """Have what was added copied."""
        handle = self.workers.handle(self._path) if self._num_bytes else -1
        for done in range(0, self._num_bytes, COPY_BYTES):
            num_bytes = min(COPY_BYTES, self._num_bytes - done)
            self.workers.submit(
                copy_range, handle, self._path, self._from + done, self.target.handle, self._at + done, num_bytes
            )
        self._num_bytes = 0


def copy_range(source: int, path: Path, begin: int, target: int, at: int, num_bytes: int) -> None:
    """Copy bytes from file to file inside the kernel, or through memory where the two file systems cannot.

    Raises:
        CheckpointError: `source`, the file at `path`, is shorter than that.
    """
    while num_bytes:
        try:
            done = os.copy_file_range(source, target, num_bytes, begin, at)
        except OSError:
            break
        if not done:  # some file systems say so before the end: what is read below is true
            break
        begin, at, num_bytes = begin + done, at + done, num_bytes - done
    room = memoryview(bytearray(min(num_bytes, 1 << 20)))
    while num_bytes:
        piece = room[: min(num_bytes, len(room))]
        read_into(source, piece, begin, path)
        write_at(target, piece, at)
        begin, at, num_bytes = begin + len(piece), at + len(piece), num_bytes - len(piece)


def read_into(handle: int, room: memoryview, begin: int, path: Path) -> None:
    """Fill `room` with the bytes of an open file, that at `path`. Raises CheckpointError where they end before."""
    while room:
        with naming(path):
            done = os.preadv(handle, [room], begin)
        if not done:
            raise _ended(path)
        room, begin = room[done:], begin + done


def write_at(handle: int, data: memoryview, at: int) -> None:
    """Write all bytes of `data` to an open file from byte `at` on."""
    while data:
        done = os.pwrite(handle, data, at)
        data, at = data[done:], at + done


def _ended(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} ended inside a tensor; it changed while it was read")
