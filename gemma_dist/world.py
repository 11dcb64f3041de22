"""The processes of a run: rank, world size and the few exchanges that the rest of the package needs.

One process is rank 0 of 1, so every command also runs without a launcher. `accelerate launch`, `torchrun` and
Slurm all leave RANK and WORLD_SIZE in the environment; these are the only places that are read.
"""

import contextlib
import datetime
import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

# Longer than any one rank may lead another: building a 31B model from a slow disk, or saving it.
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)

# What torch does with NCCL in a hang, unless the user says otherwise. Its thread that watches over NCCL would end a
# process that it takes to be stuck after 480 s, for which a disk that stalls is enough, and say nothing to the user:
# the watchdog of a step (`train/watchdog.py`) is to speak first. An exchange that outlasts COLLECTIVE_TIMEOUT ends its
# process, and the last exchanges of each rank are in a file then.
NCCL_DEFAULTS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(int(COLLECTIVE_TIMEOUT.total_seconds())),
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_BUFFER_SIZE": "2000",
}

T = TypeVar("T")
_processes: list[tuple[str, str, int]] = []  # host, machine and process of each rank, once they have met
_run: list[str] = []  # what this run is called, once they have
_sequence_groups: dict[int, Any] = {}  # by their size


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its node, from 0: which GPU it owns."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many processes of this run are on this node, as far as the launcher says: 1 where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def world_size() -> int:
    """How many processes work on this run, all nodes together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def set_nccl_defaults() -> None:
    """Set NCCL_DEFAULTS in the environment, where they are not set. To be called before the process group is made."""
    for name, value in NCCL_DEFAULTS.items():
        os.environ.setdefault(name, value)


def connect() -> None:
    """Join the process group (NCCL beside gloo with GPUs, gloo without). Nothing to do for one process, or twice.

    Training leaves this to accelerate, with the same timeout; evaluation calls it.
    """
    import torch

    if world_size() == 1 or torch.distributed.is_initialized():
        return
    set_nccl_defaults()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)


def sequence_group(size: int) -> Any:
    """The process group of the `size` neighboring ranks that share this one's sequences (`BatchPlan.data_rank`). Every
    rank calls it, once all are connected."""
    import torch

    if size not in _sequence_groups:
        _sequence_groups[size], _ = torch.distributed.new_subgroups(size, timeout=COLLECTIVE_TIMEOUT)
    return _sequence_groups[size]


def disconnect() -> None:
    """Leave the process group, if there is one."""
    import torch

    _sequence_groups.clear()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def barrier() -> None:
    """Wait until every rank has come here."""
    if world_size() > 1:
        import torch

        torch.distributed.barrier()


def gather_objects(item: T) -> list[T]:
    """Every rank's `item`, in rank order, on every rank. For small things: reports and errors, not tensors.

    They travel as JSON (tuples arrive as lists), since unpickling what another machine sent would run what it says.
    """
    if world_size() == 1:
        return [item]
    import torch

    device = _device_of_exchanges()
    own = torch.frombuffer(bytearray(json.dumps(item).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    torch.distributed.all_gather(lengths, torch.tensor([len(own)], device=device))
    num_bytes = [int(length) for length in lengths]
    padded = torch.zeros(max(num_bytes), dtype=torch.uint8, device=device)
    padded[: len(own)] = own
    texts = [torch.empty_like(padded) for _ in num_bytes]
    torch.distributed.all_gather(texts, padded)
    pairs = zip(texts, num_bytes, strict=True)
    return [json.loads(text[:length].cpu().numpy().tobytes()) for text, length in pairs]


def _device_of_exchanges() -> str:
    """Where tensors lie that ranks exchange: NCCL alone takes those of GPUs alone."""
    import torch

    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"


def note_processes() -> None:
    """Let every rank know the others' processes, for `ended_ranks`. All ranks call it, once they are connected."""
    met = gather_objects((socket.gethostname(), _machine(), os.getpid(), uuid.uuid4().hex[:8]))
    _processes[:] = [(host, machine, process) for host, machine, process, _ in met]
    host, _, process, mark = met[0]
    _run[:] = [f"{host}-{process}-{mark}"]


def name_of_run() -> str:
    """What no other run is called: after host and process of rank 0, as all ranks know once they have met."""
    return _run[0] if _run else f"{socket.gethostname()}-{os.getpid()}"


def hosts() -> list[str]:
    """The machines of this run, each once, in the order of their ranks, as all ranks know once they have met."""
    return list(dict.fromkeys(host for host, *_ in _processes)) or [socket.gethostname()]


def neighbors() -> dict[int, int]:
    """The other ranks on this machine, and their processes. Empty before `note_processes`."""
    others, here = {}, _machine()
    for other, (_, machine, process) in enumerate(_processes):
        if machine == here and other != rank():
            others[other] = process
    return others


def _machine() -> str:
    """Where the numbers of processes mean what they mean here. Names will not do: containers of a machine may share
    its name, and each counts its own processes."""
    names = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            names.append(os.readlink(path) if os.path.islink(path) else Path(path).read_text(encoding="utf-8").strip())
    return " ".join(names)


def is_restart() -> bool:
    """Whether Slurm or torch's launcher has started this command before, in the same job."""
    return any(int(os.environ.get(f"{name}_RESTART_COUNT") or 0) for name in ("SLURM", "TORCHELASTIC"))


def ended_ranks(patience_s: float = 1.0) -> dict[int, int | None]:
    """The other ranks on this machine whose process has ended, each with how: an exit code, minus a signal, or None
    where the launcher has taken note of it already. Empty before `note_processes`.

    One that is just being killed is waited for, `patience_s` at most.
    """
    others = neighbors()
    end = time.monotonic() + patience_s
    while others:
        ended = {other: _end_of(process) for other, process in others.items() if not _runs(process)}
        if ended or time.monotonic() > end:
            return ended
        time.sleep(0.01)
    return {}


def _end_of(process: int) -> int | None:
    """How a process ended that its parent has not asked yet: its exit code, or minus the signal that killed it."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            state, *_, status = file.read().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return os.waitstatus_to_exitcode(int(status)) if state == "Z" else None


def _runs(process: int) -> bool:
    """Whether a process is there and not merely waiting for its parent to take note of its end."""
    import psutil

    try:
        return psutil.Process(process).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def any_rank(flags: Sequence[bool]) -> list[bool]:
    """Which of `flags` (as many on every rank) is set on any rank. Cheap enough for every step."""
    if world_size() == 1:
        return list(flags)
    import torch

    device = _device_of_exchanges()
    highest = torch.tensor(flags, dtype=torch.int32, device=device)  # 0 or 1, on this rank and then on any
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in highest.tolist()]


def add_up(numbers: "torch.Tensor") -> list[float]:
    """The sums of `numbers` (as many on every rank, on the device that it computes on) over all ranks: one all-reduce,
    and one wait for the device."""
    if world_size() > 1:
        import torch

        torch.distributed.all_reduce(numbers)
    return numbers.tolist()
