"""What a GPU holds beside the tensors of a step: CUDA's context, workspaces, and the gaps that the allocator leaves.

Nothing here was measured by us: a GPU was never at hand. The figures are of public reports, with their ranges, and are
shown wherever they count. `gemma-dist train --calibrate` measures those of a machine and keeps them in a file.
"""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from gemma_dist.errors import ConfigError
from gemma_dist.logs import write_json

GIB = 2**30
CONTEXT = (int(0.4 * GIB), int(0.5 * GIB), int(0.6 * GIB))  # least, usual, most
WORKSPACES = int(0.1 * GIB)  # of cuBLAS, and what kernels take while they run
NCCL = int(0.3 * GIB)  # where several GPUs talk to one another
FRAGMENTATION = (0.03, 0.05, 0.08)  # of what the allocator has given out: least, usual, most
# A card sold with 16 GB shows 15.7 GiB to torch, one of 80 GB 79.1; with ECC memory less, which `train` sees.
USABLE = 0.97


@dataclass(frozen=True)
class Margin:
    """What comes on top of a peak."""

    context: tuple[int, int, int] = CONTEXT  # bytes: least, usual, most
    fragmentation: tuple[float, float, float] = FRAGMENTATION
    origin: str = "assumed"  # or the GPU that it was measured on

    def parts(self, peak_bytes: int, num_gpus: int, which: int = 1) -> dict[str, int]:
        """Bytes by name.

        Args:
            which: 0 the least, 1 the usual, 2 the most.
        """
        parts = {
            "CUDA context": self.context[which],
            "workspaces": WORKSPACES,
            "fragmentation": int(peak_bytes * self.fragmentation[which]),
        }
        if num_gpus > 1:
            parts["NCCL"] = NCCL
        return parts

    def total(self, peak_bytes: int, num_gpus: int, which: int = 1) -> int:
        """All of them."""
        return sum(self.parts(peak_bytes, num_gpus, which).values())


def calibration_file() -> Path:
    """Where the figures of this machine are: `gemma_dist/memory.json` in the user's folder of caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "gemma_dist" / "memory.json"


def read_margin(path: Path | None = None) -> Margin:
    """The margin of this machine, or what is assumed where none was measured.

    Args:
        path: of a calibration; default: `calibration_file()`, which need not be there.

    Raises:
        ConfigError: `path` is no calibration.
    """
    file = path or calibration_file()
    if path is None and not file.is_file():
        return Margin()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        context, fragmentation = int(found["context_bytes"]), float(found["fragmentation"])
        name = str(found["gpu"])
        if context < 0 or not 0 <= fragmentation < math.inf:
            raise ValueError("less than nothing, or no number")
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ConfigError(
            f"{file}: no calibration ({error!r}); write one with `gemma-dist train RECIPE --calibrate` on a GPU, or "
            "remove the file"
        ) from None
    return Margin((context,) * 3, (fragmentation,) * 3, f"measured on {name}")


def write_calibration(gpu: str, *, context_bytes: int, fragmentation: float) -> Path:
    """Keep what was measured on a GPU; returns the file.

    Args:
        context_bytes: taken of the GPU by a process, and not by torch's allocator.
        fragmentation: (reserved - allocated) / allocated, both at their largest.
    """
    file = calibration_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"gpu": gpu, "context_bytes": context_bytes, "fragmentation": round(fragmentation, 4)})
    return file


def parse_memory(text: str) -> float:
    """GiB of a card by the size that it is sold with, `16GB`, or of a bare number.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:GB|GiB|G)?\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ConfigError(f"--gpu-memory {text}: no size of a GPU; write it as it is sold, such as 16GB")
    return float(found[1])
