"""Micro-batches on their way to a step, one ahead of it, taken from the loader by a thread."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from torch.utils.data import IterableDataset

from gemma_dist.model.attention import LAYOUT, lay_out

Batch = dict[str, Any]  # tensors, and the layout of packs
Sent = TypeVar("Sent")


class Transfer(Protocol[Sent]):
    """How micro-batches come to a device."""

    def send(self, batch: Batch) -> Sent:
        """Start to copy a micro-batch from the host. Called by the thread, and waits for nothing."""

    def receive(self, sent: Sent) -> Batch:
        """The micro-batch on the device, for the kernels that are launched from now on. Called by the step."""


class NoTransfer:
    """Leaves them where they are."""

    def send(self, batch: Batch) -> Batch:
        return batch

    def receive(self, sent: Batch) -> Batch:
        return sent


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
    """`batch` and, if it is of packs, their layout: on the host, where nobody has to wait for it."""
    if "attention_mask" in batch:
        return batch
    return batch | {LAYOUT: lay_out(batch["position_ids"], batch["mm_token_type_ids"])}
