"""Several machines on this one: each has a host name and processes of its own, and all meet on the loopback interface.

A machine is a set of namespaces (`unshare`), so that what a rank knows of another one's process is what it would know
of one on another machine; when its first process ends, the kernel ends all others of it.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
import pytest

from tests.support.ranks import ENVIRONMENT, REPOSITORY

NAMESPACES = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
# A host name that no address belongs to: gloo would look for one.
ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
needs_namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode != 0,
    reason="`unshare` of host name and processes, which takes root, is not possible here",
)


@dataclass
class Machine:
    """A launcher at work on a machine of its own."""

    name: str
    process: subprocess.Popen[bytes]
    _log: Path

    def ends(self, timeout: float = 300) -> str:
        """What it said, once it has ended by itself."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {timeout} s:\n{self.said()[-8000:]}") from None
        return self.said()

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def ranks(self) -> list[psutil.Process]:
        """Its processes that the launcher started."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in below if "gemma_dist" in one.cmdline() and one.parent() in below]

    def off(self) -> None:
        """As if its power were cut."""
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    """One that nobody listens at just now: all machines of a run have to name the same."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def accelerate(rank: int, machines: int, port: int, *, ranks_each: int = 1, launch: str = "cpu_ddp") -> list[str]:
    """`accelerate launch` as machine `rank`, as docs/launch.md says it; what to start follows."""
    config = f"accelerate_configs/{launch}.yaml"
    where = ["--num_machines", machines, "--num_processes", machines * ranks_each, "--machine_rank", rank]
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    words = ["-m", "accelerate.commands.launch", "--config_file", config, *where, *address, "-m"]
    return [sys.executable, *map(str, words)]


def torchrun(rank: int, machines: int, port: int, *, ranks_each: int = 1) -> list[str]:
    """`torchrun` as machine `rank`, as docs/launch.md says it; what to start follows."""
    where = ["--nnodes", machines, "--nproc-per-node", ranks_each, "--node-rank", rank]
    address = ["--master-addr", "127.0.0.1", "--master-port", port]
    return [sys.executable, "-m", "torch.distributed.run", *map(str, [*where, *address]), "-m"]


@contextmanager
def machines(folder: Path, *commands: Sequence[object], **more: str) -> Iterator[list[Machine]]:
    """Within, one machine for each of `commands`, which are at work there; at the end none is left.

    Args:
        folder: where what they say goes.
        more: of the environment.
    """
    started: list[Machine] = []
    logs: list[IO[bytes]] = []
    try:
        for number, command in enumerate(commands):
            name, log = f"machine{number}", folder / f"machine{number}.log"
            logs.append(log.open("wb"))
            process = subprocess.Popen(
                [*NAMESPACES, "bash", "-c", 'hostname "$0" && exec "$@"', name, *map(str, command)],
                cwd=REPOSITORY,
                env=os.environ | ENVIRONMENT | ON_LOOPBACK | more,
                stdout=logs[-1],
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            started.append(Machine(name, process, log))
        yield started
    finally:
        for machine in started:
            machine.process.send_signal(signal.SIGKILL)
            machine.process.wait()
        for file in logs:
            file.close()
