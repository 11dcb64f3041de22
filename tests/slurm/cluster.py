"""A Slurm of its own for tests: munge, controller and nodes in namespaces (`cluster.sh`), ended with this process."""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
FREEZER = Path("/sys/fs/cgroup/freezer")
T = TypeVar("T")
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if os.geteuid() != 0:
        return "a Slurm in namespaces needs root"
    for command in ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter"):
        if shutil.which(command, path=path) is None:
            return f"{command} is missing: `make test-slurm` installs it"
    if not os.access(FREEZER, os.W_OK):
        return f"no cgroup v1 freezer in {FREEZER}: Slurm would signal other processes than on a cluster"
    if re.search(r"\s", temporary := tempfile.gettempdir()) or len(temporary) > 40:
        return f"the path {temporary} is too long for sockets, or has blanks: set TMPDIR to another"
    tried = subprocess.run([SCRIPT, "try"], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"namespaces with a network and devices of their own are not allowed here: {tried.stderr.strip()}"
    return ""


class Cluster:
    """A running cluster: `n1`, `n2`, … of 8 fake GPUs and 128 CPUs each."""

    def __init__(self, work: Path, submit: Path, num_nodes: int) -> None:
        """`submit` becomes the folder that jobs are submitted from, as a clone of the repository would be."""
        self.work, self.submit_folder = work, submit
        self.nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
        submit.mkdir(parents=True)
        for name in ("slurm", "launch", "accelerate_configs", "gemma_dist"):
            (submit / name).symlink_to(ROOT / name)

    def run(self, *words: str, env: dict[str, str] | None = None) -> str:
        """The output of a command on the login node.

        Raises:
            CalledProcessError: it failed.
        """
        done = subprocess.run(
            [SCRIPT, "exec", self.work, *words],
            cwd=self.submit_folder,
            env=os.environ | (env or {}),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr + done.stdout)
        return done.stdout.strip()

    def on_node(self, node: str, *words: str) -> str:
        """The output of a command on a node, whether it works or not."""
        command = [str(SCRIPT), "node", str(self.work), node, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    def power(self, node: str, on: bool) -> None:
        """Switch a node on, or off at once."""
        subprocess.run([SCRIPT, "node-up" if on else "node-kill", self.work, node], check=True)

    def sbatch(self, *words: str, env: dict[str, str] | None = None) -> str:
        """Submit a job; its number."""
        return self.run("sbatch", "--parsable", *words, env=env)

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, Reason, Restarts, NodeList, ExitCode …"""
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def hosts(self, number: str) -> list[str]:
        """The nodes of a job that runs or has run."""
        return self.run("scontrol", "show", "hostnames", self.job(number)["NodeList"]).split()

    def starts(self, number: str) -> int:
        """How often a job has started, or is to."""
        return 1 + int(self.job(number)["Restarts"])

    def has_ended(self, number: str) -> bool:
        """Whether a job has, for good."""
        return self.job(number)["JobState"] in ENDED

    def wait_for_end(self, number: str, timeout_s: float = 300) -> dict[str, str]:
        """Until a job has ended for good."""
        wait_until(lambda: self.has_ended(number), timeout_s, every_s=1)
        return self.job(number)


def wait_until(condition: Callable[[], T], timeout_s: float = 180, every_s: float = 0.1) -> T:
    """The first result that is true, asked for every `every_s` seconds.

    Raises:
        TimeoutError: there was none.
    """
    end = time.monotonic() + timeout_s
    while not (result := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout_s:g} s")
        time.sleep(every_s)
    return result


@contextmanager
def running(work: Path, submit: Path, *, num_nodes: int = 2, settings: Sequence[str] = ()) -> Iterator[Cluster]:
    """A cluster as long as the block runs, and no longer than this process: the pipe that it waits on ends with either.

    Args:
        work: an empty folder without blanks in its name, at most 90 characters long.
        settings: KEY=VALUE for cluster.sh.
    """
    env = os.environ | {"NODES": str(num_nodes), "GPUS": "8", "CPUS": "128", "MEM": "1000000", "START_TIMEOUT": "240"}
    env |= dict(setting.split("=", 1) for setting in settings)
    process = subprocess.Popen([SCRIPT, "run", work], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"Slurm did not start: see {work}/log")
        yield Cluster(work, submit, num_nodes)
    finally:
        process.stdin.close()
        process.wait(120)
        process.stdout.close()
