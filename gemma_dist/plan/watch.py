"""A training run against its plan: a warning before it begins, and afterwards what it really took."""

import logging

from gemma_dist import world
from gemma_dist.errors import ConfigError
from gemma_dist.logs import log
from gemma_dist.plan.estimate import Estimate, estimate_memory
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
        except Exception as error:  # whatever it is, the run itself may be right
            log.warning("the run's memory could not be planned (%s: %s)", type(error).__name__, error)
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


def _estimate(run: Run) -> Estimate:
    """The closed form of a resolved run."""
    work = workload_of(run.config, run)
    place = placement(run.config, has_images=work.has_images)
    geometry = read_geometry(run.config.model.model_name_or_path)
    return estimate_memory(geometry, run.config, run.topology, work.batch, place)
