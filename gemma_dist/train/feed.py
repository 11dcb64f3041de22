"""Micro-batches on their way to the device, one ahead of the step that works on them.

A thread takes them from the loader, pins them and sends them by a stream of its own, so that the copy of images runs
beside the computation and nothing waits for it but the kernels that read them. On the CPU the same thread takes them,
and there is nothing to send.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import IterableDataset

from gemma_dist.model.attention import LAYOUT, lay_out
from gemma_dist.model.sequence import SHARE

Batch = dict[str, Any]  # tensors, and the layout of packs
Sent = TypeVar("Sent")


class Transfer(Protocol[Sent]):
    """How micro-batches come to a device."""

    def send(self, batch: Batch) -> Sent:
        """Start to copy a micro-batch from the host. Called by the thread, and waits for nothing."""

    def receive(self, sent: Sent) -> Batch:
        """The micro-batch on the device, for the kernels that are launched from now on. Called by the step."""


class NoTransfer:
    """For a run on the CPU."""

    def send(self, batch: Batch) -> Batch:
        return batch

    def receive(self, sent: Batch) -> Batch:
        return sent


class CudaTransfer:
    """From pinned memory, by a stream of its own. Never run: there was no GPU at hand."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = torch.cuda.Stream(device)

    def send(self, batch: Batch) -> tuple[Batch, Any]:
        device = self._stream.device
        with torch.cuda.stream(self._stream):  # and its device: a new thread begins with the first one
            sent = {
                name: value.pin_memory().to(device, non_blocking=True) if torch.is_tensor(value) else value
                for name, value in batch.items()
            }
            return sent, self._stream.record_event()

    def receive(self, sent: tuple[Batch, Any]) -> Batch:
        batch, copied = sent
        stream = torch.cuda.current_stream(self._stream.device)
        stream.wait_event(copied)
        for value in batch.values():
            if torch.is_tensor(value):
                value.record_stream(stream)  # its memory is taken again once that stream has read it
        return batch


class Feed(IterableDataset):
    """The micro-batches of a loader, on the device, with the layout of packs. One is on its way while another is worked
    on."""

    def __init__(self, batches: Any, transfer: Transfer[Any]) -> None:
        """`batches` can be gone through any number of times, and have a length."""
        self._batches, self._transfer = batches, transfer

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """Raises what the loader raises, when the micro-batch is asked for."""
        batches = iter(self._batches)
        with contextlib.ExitStack() as cleanup:
            if close := getattr(batches, "close", None):
                cleanup.callback(close)
            thread = cleanup.enter_context(ThreadPoolExecutor(1, thread_name_prefix="feed"))
            coming = thread.submit(self._next, batches)
            while (sent := coming.result()) is not None:
                coming = thread.submit(self._next, batches)
                yield self._transfer.receive(sent)

    def _next(self, batches: Iterator[Batch]) -> Any:
        """Send the next micro-batch; None: there is none."""
        batch = next(batches, None)
        return None if batch is None else self._transfer.send(with_layout(batch))


def with_layout(batch: Batch) -> Batch:
    """`batch` and, if it is of whole packs, their layout: on the host, where nobody has to wait for it."""
    if "attention_mask" in batch or SHARE in batch:
        return batch
    return batch | {LAYOUT: lay_out(batch["position_ids"], batch["mm_token_type_ids"])}


def transfer_to(device: torch.device) -> Transfer[Any]:
    """How micro-batches come to `device`."""
    return CudaTransfer(device) if device.type == "cuda" else NoTransfer()
