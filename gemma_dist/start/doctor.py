"""`gemma-dist doctor`: what this machine has of what a run needs, and what to do about what it lacks.

    versions     against those that were tested (constraints.txt), and those that the package asks for
    GPUs         CUDA, driver, a product on each  (health/gpus.py), 4-bit weights of bitsandbytes, NCCL
    attention    the kernels that `model.attn_implementation` names, at Gemma's largest head
    DeepSpeed    whether the operators that it compiles are there, or can be made
    machine      disks, memory, shared memory, Slurm, the network's interface

Each check stands alone: what breaks in one is its finding, and the others go on. Never run on a GPU.
"""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Final, Literal

from gemma_dist.files import size
from gemma_dist.health.facts import LEAST_SHM, PACKAGES, SHM, existing
from gemma_dist.health.gpus import driver_version, gpus_at_hand, look_at_gpus
from gemma_dist.shipped import TESTED, shipped

GOOD: Final = "good"
NOTE: Final = "note"  # slower, or not tested
FAULT: Final = "fault"  # a run may fail
LEAST_FREE = 30 << 30  # bytes of the hub's cache: a model of 12B in bfloat16 and what is made of it
LARGEST_HEAD = 512  # of Gemma 4's full layers
TOOL_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Finding:
    """What was found of one thing."""

    what: str
    state: Literal["good", "note", "fault"]
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """All findings of this machine. May take a minute, where libraries are loaded for the first time."""
    return [finding for check in CHECKS for finding in _try(check)]


def render(findings: list[Finding]) -> str:
    """For people: a line each, and what to do below those that are not good."""
    width = max(len(one.what) for one in findings)
    lines = []
    for one in findings:
        lines.append(f"{one.state:<5}  {one.what:<{width}}  {one.found}")
        if one.remedy:
            lines.append(f"{'':<5}  {'':<{width}}  -> {one.remedy}")
    counts = {state: sum(one.state == state for one in findings) for state in (GOOD, NOTE, FAULT)}
    return "\n".join([*lines, ", ".join(f"{count} {state}" for state, count in counts.items())])


def to_json(findings: list[Finding]) -> dict[str, Any]:
    """As one object."""
    return {"fit": is_fit(findings), "findings": [asdict(one) for one in findings]}


def is_fit(findings: list[Finding]) -> bool:
    """Whether nothing was found that a run may fail of."""
    return not any(one.state == FAULT for one in findings)


def _try(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; what breaks in it is one."""
    what = check.__name__.removeprefix("_").replace("_", " ")
    try:
        yield from check()
    except Exception as error:  # libraries, drivers and compilers have many
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        yield Finding(what, FAULT, told, "mend or install again what the message names")


# ---- versions --------------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    """Each package that computes."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    is_tested = here in ("3.11", "3.12")
    remedy = "" if is_tested else "3.11 and 3.12 are tested: if something fails, make the environment with one of them"
    yield Finding("python", GOOD if is_tested else NOTE, sys.version.split()[0], remedy)
    tested = _tested()
    for package in PACKAGES:
        yield _version(package, tested.get(package), _bounds(package))


def _tested() -> dict[str, str]:
    """The versions of constraints.txt by package; none where it was not installed with the package."""
    path = shipped(TESTED)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", text))


def _bounds(package: str) -> str:
    """What this package asks of another one, such as `<5.24,>=5.23`; empty: any version."""
    from packaging.requirements import Requirement

    try:
        asked = map(Requirement, requires("gemma-dist") or [])
    except PackageNotFoundError:  # run from a folder, uninstalled
        return ""
    return next((str(one.specifier) for one in asked if one.name == package and one.marker is None), "")


def _version(package: str, tested: str | None, bounds: str) -> Finding:
    """Of one package."""
    from packaging.specifiers import SpecifierSet

    try:
        found = version(package)
    except PackageNotFoundError:
        return Finding(package, FAULT, "absent", f"pip install '{package}{bounds}'")
    if found not in SpecifierSet(bounds, prereleases=True):
        return Finding(package, FAULT, f"{found}, and {bounds} is needed", f"pip install '{package}{bounds}'")
    if tested and found.partition("+")[0] != tested:
        return Finding(package, NOTE, f"{found}, tested with {tested}", f"pip install '{package}=={tested}'")
    return Finding(package, GOOD, found)


# ---- GPUs ------------------------------------------------------------------------------------------------------------


def _gpus() -> Iterator[Finding]:
    """CUDA, the driver, and each GPU."""
    import torch

    seen, driver = len(gpus_at_hand()), driver_version()
    if not torch.cuda.is_available():
        if seen:
            built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, the driver is {driver}"
            remedy = "unset CUDA_VISIBLE_DEVICES, update the driver, or install a torch of a CUDA that it knows"
            yield Finding("GPUs", FAULT, f"{seen} of nvidia-smi, and torch sees none: {built}", remedy)
        else:
            yield Finding("GPUs", NOTE, "none: runs are on the CPU", "for tiny models alone: see launch/cpu_lora.yaml")
        return
    names, problems = look_at_gpus()
    capability = min(torch.cuda.get_device_capability(number) for number in range(len(names)))
    yield Finding("GPUs", GOOD, f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}, driver {driver}")
    for problem in problems:
        yield Finding("GPUs", FAULT, problem, "end what runs there, or take the GPU out by CUDA_VISIBLE_DEVICES")
    if capability < (8, 0):
        found = f"compute capability {'.'.join(map(str, capability))}: no bfloat16 in hardware"
        yield Finding("bfloat16", NOTE, found, "expect it to be slow: see docs/launch.md on older GPUs")


def _four_bits() -> Iterator[Finding]:
    """Weights to NF4 and back, where a run would have them."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
    codes, state = quantize_4bit(weight, quant_type="nf4")
    off = float((dequantize_4bit(codes, state) - weight).abs().max())
    if off > 0.2:  # half of the widest step of NF4's table, for numbers up to 1
        yield Finding("bitsandbytes", FAULT, f"4 bits and back are {off:.2f} off on {device}", "install it again")
    else:
        yield Finding("bitsandbytes", GOOD, f"NF4 and back on {device}")


def _nccl() -> Iterator[Finding]:
    """What GPUs exchange by."""
    import torch

    num_gpus = torch.cuda.device_count()
    if not torch.distributed.is_nccl_available():
        state: Literal["note", "fault"] = FAULT if num_gpus > 1 else NOTE
        remedy = "install a torch that is built for CUDA" if num_gpus > 1 else ""
        yield Finding("NCCL", state, "absent: torch is built without it", remedy)
        return
    found = ".".join(map(str, torch.cuda.nccl.version()))
    apart = [
        f"{one}-{other}"
        for one in range(num_gpus)
        for other in range(one)
        if not torch.cuda.can_device_access_peer(one, other)
    ]
    if apart:
        remedy = "expect slower exchanges; if they hang, set NCCL_P2P_DISABLE=1"
        yield Finding("NCCL", NOTE, f"{found}; GPUs {', '.join(apart)} reach one another by the host alone", remedy)
    else:
        yield Finding("NCCL", GOOD, found if num_gpus else f"{found}, for no GPU")


def _attention() -> Iterator[Finding]:
    """A forward and a backward pass of each kernel, at the largest head."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query, key, value = (torch.randn(1, 2, 128, LARGEST_HEAD, device=device, dtype=dtype) for _ in range(3))
    query.requires_grad_()
    torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()
    yield Finding("sdpa", GOOD, f"head of {LARGEST_HEAD} on {device}, forward and backward")
    if device == "cpu":
        yield Finding("flex_attention", NOTE, "for GPUs alone", "leave model.attn_implementation at sdpa here")
    elif importlib.util.find_spec("triton") is None:
        yield Finding("flex_attention", NOTE, "triton is absent", "pip install triton, or leave it at sdpa")
    else:
        yield Finding("flex_attention", GOOD, "triton is there")


def _deepspeed() -> Iterator[Finding]:
    """What DeepSpeed compiles at its first use."""
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import CUDA_HOME, _get_build_directory

    from gemma_dist.model.operators import CPU_ADAM, EXCHANGES

    tools = {"g++": os.environ.get("CXX", "g++"), "ninja": "ninja"}
    lacking = [tool for tool, command in tools.items() if shutil.which(command) is None]
    for name, what, instead in (EXCHANGES, CPU_ADAM):
        builder = get_accelerator().create_op_builder(name)
        if builder is None:  # GPUs exchange by NCCL
            continue
        made = Path(_get_build_directory(builder.name, verbose=False)) / f"{builder.name}.so"
        if made.exists():
            yield Finding(f"DeepSpeed: {builder.name}", GOOD, f"compiled: {made}")
        elif lacking:
            remedy = f"install {' and '.join(lacking)} for ZeRO, or {instead}"
            yield Finding(f"DeepSpeed: {builder.name}", NOTE, f"{what} cannot be compiled without", remedy)
        else:
            yield Finding(f"DeepSpeed: {builder.name}", GOOD, f"{what}: to be compiled at the first use, in minutes")
    if get_accelerator().device_name() == "cuda" and CUDA_HOME is None:
        remedy = "install the CUDA toolkit and set CUDA_HOME, or set zero_force_ds_cpu_optimizer: false"
        yield Finding("DeepSpeed: nvcc", NOTE, "no CUDA toolkit, which the offloaded optimizer's build wants", remedy)


# ---- the machine -----------------------------------------------------------------------------------------------------


def _disks() -> Iterator[Finding]:
    """The hub's cache, and where runs would be written."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for what, folder in (("hub's cache", Path(HF_HUB_CACHE)), ("this folder", Path.cwd())):
        there = existing(folder)
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Finding(f"disk: {what}", FAULT, f"{there} cannot be written to", "set HF_HOME, or work elsewhere")
        elif free < LEAST_FREE:
            remedy = "set HF_HOME to a folder on a larger disk" if "cache" in what else "work on a larger disk"
            yield Finding(f"disk: {what}", NOTE, f"{size(free)} free in {folder}", remedy)
        else:
            yield Finding(f"disk: {what}", GOOD, f"{size(free)} free in {folder}")


def _memory() -> Iterator[Finding]:
    """Of the host, and what processes share of it."""
    import psutil

    memory = psutil.virtual_memory()
    yield Finding("memory", GOOD, f"{size(memory.available)} of {size(memory.total)} free")
    shared = shutil.disk_usage(SHM).total if SHM.is_dir() else 0
    is_small = shared < LEAST_SHM
    remedy = (
        f"start the container with a larger one (shm-size of docker, {size(LEAST_SHM)} or more)" if is_small else ""
    )
    yield Finding(str(SHM), NOTE if is_small else GOOD, size(shared), remedy)


def _slurm() -> Iterator[Finding]:
    """Whether jobs can be sent, and whether this is one."""
    if shutil.which("sbatch") is None:
        yield Finding("Slurm", GOOD, "none here: runs are started by hand")
        return
    told = subprocess.run(["sbatch", "-V"], capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=True)
    job = os.environ.get("SLURM_JOB_ID")
    yield Finding("Slurm", GOOD, told.stdout.strip() + (f", within job {job}" if job else ""))


def _network() -> Iterator[Finding]:
    """What other machines would reach this one by."""
    import psutil

    addresses = {
        name: [one.address for one in found if one.family == socket.AF_INET]
        for name, found in psutil.net_if_addrs().items()
    }
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "")
        names = wanted.lstrip("^=").split(",") if wanted and not wanted.startswith("^") else []
        if names and not any(name.startswith(tuple(names)) for name in addresses):
            there = ", ".join(sorted(addresses))
            yield Finding("network", FAULT, f"{variable}={wanted}, and there is no such interface", f"one of {there}")
    outside = {name: found[0] for name, found in addresses.items() if found and not found[0].startswith("127.")}
    if not outside:
        yield Finding("network", NOTE, "no interface but the machine's own", "runs on this machine alone are possible")
        return
    shown = ", ".join(f"{name} {address}" for name, address in sorted(outside.items()))
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = "nothing"
    if own not in outside.values():
        remedy = f"for several machines export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (one of {', '.join(outside)})"
        yield Finding("network", NOTE, f"{shown}; this host's name is {own} to itself", remedy)
    else:
        yield Finding("network", GOOD, shown)


CHECKS = (_versions, _gpus, _four_bits, _nccl, _attention, _deepspeed, _disks, _memory, _slurm, _network)
