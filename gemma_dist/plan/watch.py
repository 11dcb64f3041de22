"""A training run against its plan: a warning before it begins, what it takes while it runs, and of the GPU's speed."""

import logging
from typing import NamedTuple

from gemma_dist import world
from gemma_dist.errors import ConfigError
from gemma_dist.logs import log
from gemma_dist.plan.estimate import Estimate, estimate_memory
from gemma_dist.plan.flops import StepFlops, peak_flops
from gemma_dist.plan.geometry import read_geometry
from gemma_dist.plan.margin import GIB, read_margin, write_calibration
from gemma_dist.plan.weights import placement
from gemma_dist.plan.workload import workload_of
from gemma_dist.resolve import Run
from gemma_dist.train.memory import Gpu, MemorySeen


class PlanWatch:
    """Plans the run that it is told of, and compares. `train` calls it (`MemoryWatch`)."""

    def __init__(self, *, calibrate: bool = False) -> None:
        """Args:
        calibrate: keep what is measured of this machine for later plans.
        """
        self._calibrate = calibrate
        self._estimate: Estimate | None = None
        self.planned_bytes: int | None = None
        self._speed: _Speed | None = None

    def begin(self, run: Run, gpu: Gpu | None) -> None:
        """Warn where the run does not fit the GPU. A plan is advice: it never stops a run.

        Raises:
            ConfigError: there is no GPU to calibrate.
        """
        if gpu is None and self._calibrate:
            raise ConfigError("--calibrate measures a GPU, and this run is on a CPU; run it where there is one")
        try:
            self._estimate = _estimate(run)
            self.planned_bytes = needed = self._estimate.peak_bytes
            needed += read_margin().total(needed, run.topology.num_processes)
            self._speed = _speed(run, gpu)
        except Exception as error:  # whatever it is, the run itself may be right
            log.warning("the run could not be planned (%s: %s)", type(error).__name__, error)
            return
        if world.rank() != 0:
            return
        if gpu is None:
            log.info("planned for a GPU: %.1f GiB; what a CPU takes is not planned", needed / GIB)
            return
        fits = needed <= gpu.num_bytes
        log.log(
            logging.INFO if fits else logging.WARNING,
            "planned: %.1f GiB of the %.1f GiB of this %s%s",
            needed / GIB,
            gpu.num_bytes / GIB,
            gpu.name,
            ""
            if fits
            else "; this may run out of memory: `gemma-dist plan` with the same words shows what would save some",
        )

    def figures(self, steps: range, seconds: float, peak_bytes: int) -> dict[str, float]:
        """What a line of the log has of these steps: the memory that was planned and taken at most, in GiB, and MFU
        (`flops.py`) where the GPU's peak is known."""
        found = {"memory_gib": round(peak_bytes / GIB, 2)}
        if self.planned_bytes is not None:
            found["memory_planned_gib"] = round(self.planned_bytes / GIB, 2)
        if self._speed is not None:
            found["mfu"] = round(sum(map(self._speed.of_step, steps)) / (seconds * self._speed.peak), 4)
        return found

    def measured(self, seen: MemorySeen) -> None:
        """Say what was planned and what was taken; with `calibrate`, keep the difference."""
        if self._estimate is not None and world.rank() == 0:
            planned = self._estimate.peak_bytes
            log.info(
                "memory after two steps: planned %.2f GiB, allocated %.2f GiB (%+.1f %%), reserved %.2f GiB, "
                "all of the GPU that is used %.2f GiB",
                planned / GIB,
                seen.allocated / GIB,
                100 * (seen.allocated - planned) / planned,
                seen.reserved / GIB,
                seen.used / GIB,
            )
        if self._calibrate and world.rank() == 0:
            try:
                path = write_calibration(
                    seen.gpu.name,
                    context_bytes=max(0, seen.used - seen.reserved),
                    fragmentation=max(0.0, (seen.reserved - seen.allocated) / seen.allocated),
                )
            except OSError as error:  # no reason to end a run
                log.warning("the calibration could not be kept (%s)", error)
                return
            log.info("kept in %s: plans on this machine use it", path)


class _Speed(NamedTuple):
    """What a run computes, and what its GPUs could."""

    run: Run
    flops: StepFlops
    peak: float  # operations a second, of all GPUs together

    def of_step(self, step: int) -> float:
        """Operations of a step, from 0."""
        shards, batch = self.run.schedule.shards, self.run.schedule.global_batch(step)
        soft_tokens, images = shards.num_image_tokens[batch], shards.num_images[batch]
        targets = int(shards.num_target_tokens[batch].sum())
        return self.flops.needed(shards.num_text_tokens[batch] + soft_tokens, targets, soft_tokens, images)


def _speed(run: Run, gpu: Gpu | None) -> _Speed | None:
    """None: the run does not compute in bfloat16, or the GPU's peak is not known."""
    config, peak = run.config, peak_flops(gpu.name) if gpu is not None else None
    if peak is None or not (config.train.bf16 or config.model.dtype == "bfloat16"):
        return None
    geometry = read_geometry(config.model.model_name_or_path)
    return _Speed(run, StepFlops.of(geometry, config), peak * run.topology.num_processes)


def _estimate(run: Run) -> Estimate:
    """The closed form of a resolved run."""
    work = workload_of(run.config, run)
    place = placement(run.config, has_images=work.has_images)
    geometry = read_geometry(run.config.model.model_name_or_path)
    return estimate_memory(geometry, run.config, run.topology, work.batch, place)
