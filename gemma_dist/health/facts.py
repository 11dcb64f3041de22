"""What a node says of itself."""

import json
import os
import platform
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gemma_dist import __version__
from gemma_dist.config import HealthConfig
from gemma_dist.files import size
from gemma_dist.health.gpus import driver_version, look_at_gpus

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "deepspeed", "accelerate")
SHM = Path("/dev/shm")
LEAST_SHM = 1 << 30  # bytes, where several GPUs exchange through it: containers often come with 64 MiB


@dataclass(frozen=True)
class Facts:
    """What one node found out, by itself."""

    host: str
    num_gpus: int
    equal: dict[str, str]  # what has to be the same on all nodes: versions and GPUs; empty: that did not get so far
    summary: str  # for people
    problems: list[str]

    def to_json(self) -> str:
        """As a text to send."""
        return json.dumps(asdict(self))


def read_facts(text: str) -> Facts:
    """What `to_json` made."""
    values: dict[str, Any] = json.loads(text)
    return Facts(**values)


def look(settings: HealthConfig, look_at: Callable[[], tuple[list[str], list[str]]] = look_at_gpus) -> Facts:
    """What this node is, and what is wrong with it. May hang, as disks and GPUs do.

    Args:
        look_at: gives the names of its GPUs, and what is wrong with them.

    Raises:
        OSError, RuntimeError: of disks and of CUDA.
    """
    names, problems = look_at()
    expected = num_gpus_expected(settings)
    if expected is not None and len(names) != expected:
        problems.append(f"{len(names)} GPUs are seen, and {expected} are needed")
    shm = shutil.disk_usage(SHM).total if SHM.is_dir() else 0
    if shm < LEAST_SHM and len(names) > 1:
        problems.append(
            f"{SHM} has {size(shm)}, and GPUs of a node exchange through it: start the container with a larger one "
            f"(shm-size of docker, {size(LEAST_SHM)} or more)"
        )
    said = [_kinds(names)]
    if settings.output_dir is not None:
        if settings.output_dir.exists() and not settings.output_dir.is_dir():
            problems.append(f"{settings.output_dir} is a file; name a folder")
        free = shutil.disk_usage(existing(settings.output_dir)).free
        said.append(f"{size(free)} free for {settings.output_dir}")
        if free < settings.min_free_gb * 1e9:
            problems.append(f"{settings.output_dir}: {size(free)} are free, and {settings.min_free_gb:g} GB are needed")
    said.append(f"{SHM} {size(shm)}")
    equal = {"GPUs": _kinds(names), "driver": driver_version(), **versions()}
    return Facts(socket.gethostname(), len(names), equal, ", ".join(said), problems)


def num_gpus_expected(settings: HealthConfig) -> int | None:
    """How many GPUs a node should have: as the settings say, else as Slurm gave; None: nobody says."""
    if settings.num_gpus is not None:
        return settings.num_gpus
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return int(given) if given.isdigit() else None


def versions() -> dict[str, str]:
    """Of all that computes, by package. Nothing is imported for it."""
    found = {"python": platform.python_version(), "gemma_dist": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def existing(path: Path) -> Path:
    """The nearest folder of a path that is there."""
    return next(one for one in (path, *path.absolute().parents) if one.is_dir())


def _kinds(names: list[str]) -> str:
    """GPUs for people: `8 x NVIDIA H100 80GB HBM3`."""
    counted = {name: names.count(name) for name in names}
    return " and ".join(f"{count} x {name}" for name, count in counted.items()) or "no GPU"
