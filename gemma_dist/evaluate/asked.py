"""The rows that a run asks, part by part: those held out, a general set beside them, and the probes made of them."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from gemma_dist import world
from gemma_dist.config import EvaluateConfig
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.evaluate.beside import GENERAL
from gemma_dist.evaluate.images import swap_images
from gemma_dist.evaluate.probes import WHY_NONE, Probes
from gemma_dist.logs import log
from gemma_dist.shards.reader import is_shard_folder, load_trajectories, refuse_row_settings


def require_used(data: Path, settings: EvaluateConfig) -> None:
    """Raises ConfigError where settings say how raw rows are read, and none are. Samples of shards can be unrolled."""
    if is_shard_folder(data) and (settings.general is None or is_shard_folder(settings.general)):
        refuse_row_settings(data, settings, but=("unroll",))


def asked_rows(
    data: Path, limit: int | None, settings: EvaluateConfig, *, limit_general: int | None
) -> Iterator[Trajectory]:
    """The first `limit` rows of `data`, then the first `limit_general` of the general set, then the probes.

    Raises:
        DataError: a row breaks the data contract.
    """
    probes = Probes(settings.probes)
    rows: Iterable[Trajectory] = islice(load_trajectories(data, settings), limit)
    if settings.images == "swapped":
        rows = swap_images(rows)
    for row in rows:
        if settings.probes:
            probes.see(row)
        yield row
    if settings.general is not None:
        for row in islice(load_trajectories(settings.general, settings), limit_general):
            if settings.probes:
                probes.see_tools(row)
            yield replace(row, part=GENERAL)
    if settings.probes:
        missing = dict(WHY_NONE)
        for probe in probes.make():
            missing.pop(probe.part, None)
            yield probe
        for kind, why in missing.items():
            if world.rank() == 0:
                log.warning("no probes of kind %r: %s", kind, why)
