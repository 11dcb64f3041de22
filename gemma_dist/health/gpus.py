"""The GPUs of this node: how many, whether they are free, and whether they compute.

Never run on a GPU: there was none at hand.
"""

import subprocess
from dataclasses import dataclass, field

from gemma_dist.files import size

FREE = 0.95  # of a GPU's memory, at least
MATMUL = 512  # width of the matrices
ALLOCATED = 64 << 20  # bytes
TOOL_TIMEOUT_S = 30  # of nvidia-smi


@dataclass
class GpuMemory:
    """What nvidia-smi says of one GPU."""

    total: int  # bytes
    used: int
    processes: list[str] = field(default_factory=list)


def look_at_gpus() -> tuple[list[str], list[str]]:
    """The name of each GPU that torch sees, and what is wrong with them, in words. May hang, as GPUs do."""
    import torch

    memory = _memory()  # before this process takes some
    names, problems = [], []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        names.append(properties.name)
        used = memory.get(str(properties.uuid).removeprefix("GPU-"))
        if used is None:
            free, total = torch.cuda.mem_get_info(number)
            used = GpuMemory(total, total - free)
        problems += busy(number, used)
        try:
            matrix = torch.full((MATMUL, MATMUL), 2.0, device=f"cuda:{number}")
            torch.ones(ALLOCATED, dtype=torch.uint8, device=matrix.device)
            if not bool((matrix @ matrix == 4.0 * MATMUL).all()):
                problems.append(f"GPU {number} computes a wrong product")
        except RuntimeError as error:  # torch's of CUDA
            problems.append(f"GPU {number} does not compute: {str(error).splitlines()[0]}")
    return names, problems


def busy(number: int, memory: GpuMemory) -> list[str]:
    """What to say of a GPU that is not free, with the processes on it."""
    free = memory.total - memory.used
    if free >= FREE * memory.total:
        return []
    processes = ", ".join(memory.processes) or "no process that can be seen from here"
    return [f"GPU {number} has {size(free)} of {size(memory.total)} free: {processes}"]


def _memory() -> dict[str, GpuMemory]:
    """Of each GPU, by its id without `GPU-`; nothing where nvidia-smi does not say."""
    found = {}
    for uuid, total, used in _ask("--query-gpu=uuid,memory.total,memory.used"):
        if total.isdigit() and used.isdigit():
            found[uuid.removeprefix("GPU-")] = GpuMemory(int(total) << 20, int(used) << 20)
    for uuid, process, name, used in _ask("--query-compute-apps=gpu_uuid,pid,process_name,used_memory"):
        if (gpu := found.get(uuid.removeprefix("GPU-"))) is not None:
            gpu.processes.append(f"{name} (process {process}, {used} MiB)")
    return found


def gpus_at_hand() -> list[int]:
    """Bytes of memory of each GPU, as nvidia-smi says, which needs no torch."""
    return [gpu.total for gpu in _memory().values()]


def driver_version() -> str:
    """Of NVIDIA's driver; none where there is none."""
    lines = _ask("--query-gpu=driver_version")
    return lines[0][0] if lines else "none"


def _ask(query: str) -> list[list[str]]:
    """The lines of nvidia-smi's answer, by columns; none where it does not answer."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    columns = query.count(",") + 1
    lines = [[word.strip() for word in line.split(",", columns - 1)] for line in done.stdout.splitlines()]
    return [line for line in lines if done.returncode == 0 and len(line) == columns]
