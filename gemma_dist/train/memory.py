"""What a run takes of its GPU: for each line of the log, and once it has come to rest, at the end of its second step.

Never run: there was no GPU at hand. On a CPU nothing is measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from gemma_dist.model.load import device, use_cpu
from gemma_dist.resolve import Run

MEASURED_AFTER = 2  # steps: the optimizer's states come about in the first


@dataclass(frozen=True)
class Gpu:
    """The GPU that this rank computes on."""

    name: str
    num_bytes: int  # that torch shows


@dataclass(frozen=True)
class MemorySeen:
    """What this rank took of its GPU, in bytes."""

    gpu: Gpu
    allocated: int  # by torch's tensors, at most
    reserved: int  # by torch's allocator, at most
    used: int  # of the GPU now, by all processes on it


class MemoryWatch(Protocol):
    """Who is told of a run's memory."""

    planned_bytes: int | None  # of tensors on a GPU, at the peak; None: not planned

    def begin(self, run: Run, gpu: Gpu | None) -> None:
        """Before a weight is read; None: the run is on a CPU."""

    def measured(self, seen: MemorySeen) -> None:
        """After the second step, on every rank."""

    def figures(self, steps: range, seconds: float, peak_bytes: int) -> dict[str, float]:
        """What the log is to say of these steps (from 0), which took so many seconds; on rank 0, on a GPU.

        Args:
            peak_bytes: the most that torch's tensors took of this rank's GPU so far, without the load.
        """


def gpu_at_hand() -> Gpu | None:
    """The GPU of this rank; None on a CPU."""
    if use_cpu():
        return None
    properties = torch.cuda.get_device_properties(device())
    return Gpu(properties.name, properties.total_memory)


def figures_of(watch: MemoryWatch | None) -> Callable[[range, float], dict[str, float]]:
    """What the log asks of each line's steps and seconds. Of a run on a CPU there is nothing to say."""
    if watch is None or use_cpu():
        return lambda steps, seconds: {}
    return lambda steps, seconds: watch.figures(steps, seconds, torch.cuda.max_memory_allocated(device()))


class MemoryReport(TrainerCallback):
    """Measures a run on a GPU and tells its watch."""

    def __init__(self, watch: MemoryWatch) -> None:
        self._watch, self._steps = watch, 0

    def on_train_begin(self, args: Any, state: Any, control: object, **kwargs: object) -> None:
        """Loading the model has a peak of its own, which is not the steps'."""
        torch.cuda.reset_peak_memory_stats(device())

    def on_step_end(self, args: Any, state: Any, control: object, **kwargs: object) -> None:
        """Measure at the end of the second step."""
        self._steps += 1
        if self._steps != MEASURED_AFTER:
            return
        gpu, here = gpu_at_hand(), device()
        assert gpu is not None, "measured on a CPU"
        free, total = torch.cuda.mem_get_info(here)
        allocated, reserved = torch.cuda.max_memory_allocated(here), torch.cuda.max_memory_reserved(here)
        self._watch.measured(MemorySeen(gpu, allocated, reserved, total - free))
