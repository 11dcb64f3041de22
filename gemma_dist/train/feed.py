"""Micro-batches on their way to the device, one ahead of the step that works on them.

A thread takes them from the loader, pins them and sends them by a stream of its own, so that the copy of images runs
beside the computation and nothing waits for it but the kernels that read them. On the CPU the same thread takes them,
and there is nothing to send.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from torch.nn.functional import pad
from torch.utils.data import IterableDataset

from gemma_dist.data.encoded import IGNORE_INDEX
from gemma_dist.model.attention import LAYOUT, PLACES, Shape, add_calls, lay_out
from gemma_dist.model.head import IDS, KINDS, POSITIONS, WEIGHTS
from gemma_dist.model.images import IMAGE_PLACES, places_of
from gemma_dist.model.rows import PADDED_RIGHT
from gemma_dist.model.sequence import SHARE

Batch = dict[str, Any]  # tensors, and what of them the host knows
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
    """The micro-batches of a loader, on the device. One is on its way while another is worked on."""

    def __init__(self, batches: Any, transfer: Transfer[Any], shape: Shape | None = None) -> None:
        """
        Args:
            batches: can be gone through any number of times, and have a length.
            shape: of the model that takes packs; None: it finds its calls of attention itself.
        """
        self._batches, self._transfer, self._shape = batches, transfer, shape

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
        return None if batch is None else self._transfer.send(known_to_host(batch, self._shape))


def with_layout(batch: Batch, shape: Shape | None = None) -> Batch:
    """`batch` and, if it is of whole packs, their layout, with the calls of attention of a model of that shape: on the
    host, where nobody has to wait for it."""
    if "attention_mask" in batch or SHARE in batch:
        return batch
    layout = lay_out(batch["position_ids"], batch["mm_token_type_ids"])
    if shape is None:
        return batch | {LAYOUT: layout}
    layout, places = add_calls(layout, shape)
    return batch | {LAYOUT: layout, PLACES: places}


def known_to_host(batch: Batch, shape: Shape | None = None) -> Batch:
    """A micro-batch of `collate`, `collate_packs` or `cut` with all that would have to be looked for on the device:
    where its targets and its images are, and the layout of packs or that rows are padded on the right. Labels become
    targets.

    Args:
        shape: as for `with_layout`.

    Raises:
        DataError: there are other images than the text has places for.
    """
    batch = with_layout(dict(batch), shape)
    for shifted, prefix in ((False, ""), (True, "shift_")):
        if prefix + "labels" in batch:
            labels, kinds, weights = (batch.pop(prefix + name, None) for name in ("labels", "kinds", "weights"))
            batch |= targets_of(labels, kinds, weights, shifted=shifted)
    if "pixel_values" in batch and "image_position_ids" in batch and IMAGE_PLACES not in batch:
        batch |= places_of(batch["mm_token_type_ids"], batch["image_position_ids"])
    if batch.pop("attention_mask", None) is not None:
        batch[PADDED_RIGHT] = True
    return batch


def targets_of(
    labels: torch.Tensor, kinds: torch.Tensor, weights: torch.Tensor | None = None, *, shifted: bool = False
) -> dict[str, torch.Tensor]:
    """The targets of a micro-batch. To be made on the host: with tensors on a GPU it waits for it.

    Args:
        labels: (B, T) int64, `IGNORE_INDEX` where nothing is trained.
        kinds: (B, T) uint8, of the labels; `weights` (B, T) float32, if there are any.
        shifted: whether they stand already where they are predicted, and not a token behind.

    Returns:
        POSITIONS (K,) int64, of B * T; IDS (K,) int64; KINDS (K,) uint8; with weights, WEIGHTS (K,) float32.
    """
    if not shifted:
        labels, kinds = pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX), pad(kinds[:, 1:], (0, 1))
        weights = None if weights is None else pad(weights[:, 1:], (0, 1), value=1)
    positions = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    targets = {POSITIONS: positions, IDS: labels.flatten()[positions], KINDS: kinds.flatten()[positions]}
    return targets if weights is None else targets | {WEIGHTS: weights.flatten()[positions]}


def transfer_to(device: torch.device) -> Transfer[Any]:
    """How micro-batches come to `device`."""
    return CudaTransfer(device) if device.type == "cuda" else NoTransfer()


class MicroBatches:
    """The next `count` of `batches`, to be gone through once. Each is taken when its turn comes, so that a device
    holds no more of a step than is worked on."""

    def __init__(self, batches: Iterator[Any], count: int) -> None:
        self._batches, self._count = batches, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        return islice(self._batches, self._count)
