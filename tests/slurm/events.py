"""Events that befall a job of `slurm/train.sbatch`, one by one, and what is left of the run: a row each.

`run_event` submits a job on a real Slurm, waits until it trains, lets the event happen, waits for the end, and counts.
The program is either the stand-in (`standin.py`) or the package itself on a tiny model.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.slurm.cluster import ROOT, Cluster, wait_until

AT_STEP = 5  # at which events happen
STEP = re.compile(r"\bstep +(\d+)/\d+")


@dataclass(frozen=True)
class Row:
    """What an event did to a job."""

    event: str
    program: str
    state: str  # the job's last
    exit_code: int  # of its batch script, the last time
    restarts: int
    steps_lost: int  # done more than once, or, where the job stayed away, done and in no checkpoint
    signal_to_marker_s: float | None  # from the event to the marker of the next checkpoint; None: no next one
    log: str = field(repr=False, default="")  # what the batch script said


@dataclass
class Job:
    """A job that trains, and where it does so."""

    cluster: Cluster
    number: str
    folder: Path
    nodes: list[str]
    program: "Program"

    def steps(self) -> list[int]:
        """All steps that rank 0 said were done, in the order of time, those of earlier starts included."""
        logs = sorted(self.log_folder.glob("*.log"))
        return [int(step) for log in logs for step in STEP.findall(log.read_text(errors="replace"))]

    @property
    def log_folder(self) -> Path:
        return self.cluster.submit_folder / "slurm-logs" / f"gemma_dist-{self.number}"

    def start(self) -> int:
        """How often the job began anew."""
        return int(self.cluster.job(self.number)["Restarts"])

    def wait_for_step(self, step: int, timeout_s: float = 180) -> None:
        wait_until(lambda: max(self.steps(), default=0) >= step, timeout_s)

    def markers(self) -> dict[Path, float]:
        """Complete checkpoints, and when they became so."""
        found = {}
        for path in self.folder.glob("checkpoint-*/complete.json"):
            found[path] = path.stat().st_mtime
        return found

    def ranks_on(self, node: str) -> list[int]:
        """Process numbers of ranks there, as that node counts them."""
        shown = self.cluster.on_node(node, "pgrep", "-f", f"python.* -m gemma_dist train .*output_dir={self.folder}")
        commands = {int(one): self.cluster.on_node(node, "cat", f"/proc/{one}/cmdline") for one in shown.split()}
        return [one for one, command in commands.items() if "accelerate" not in command]


@dataclass(frozen=True)
class Program:
    """What is trained by what."""

    name: str
    config: str  # of accelerate
    recipe: str
    overrides: tuple[str, ...]
    env: dict[str, str]
    num_steps: int


def standin(folder: Path, *, num_steps: int = 40, step_s: float = 0.2) -> Program:
    """The stand-in, with its two names first in PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("accelerate", "python"):
        path = folder / name
        path.write_text(f'#!/bin/bash\nexec {sys.executable} {ROOT}/tests/slurm/standin.py {name} "$@"\n')
        path.chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "PROCESSES_PER_NODE": "1"}
    overrides = (f"max_steps={num_steps}", f"step_s={step_s}")
    return Program("stand-in", "accelerate_configs/ddp.yaml", "launch/cpu_lora.yaml", overrides, env, num_steps)


def package(folder: Path, model: Path, shards: Path, *, num_steps: int = 60) -> Program:
    """The package on a tiny model, one CPU rank a node. `model` and `shards` exist."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / "cpu_ddp.yaml").read_text())
    del config["use_cpu"]  # with it accelerate leaves several machines to MPI
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ddp.yaml").write_text(yaml.safe_dump(config))
    env = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PROCESSES_PER_NODE": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HEALTH": "0",  # it would miss the GPUs that Slurm takes for real
    }
    overrides = (
        f"model_name_or_path={model}",
        f"data.train={shards}",
        f"max_steps={num_steps}",
        "logging_steps=1",
        "save_steps=1000",
        "step_timeout_s=15",
    )
    return Program("gemma_dist", str(folder / "ddp.yaml"), "launch/cpu_lora.yaml", overrides, env, num_steps)


@dataclass(frozen=True)
class Event:
    """Something that happens to a job: how it is submitted, and what is done once it trains."""

    cause: Callable[[Job], float]  # until the event is over; the time at which it was
    options: tuple[str, ...] = ()  # of sbatch
    overrides: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    waits_for_step: bool = True


def signal_ahead_of_limit(job: Job) -> float:
    """What Slurm does `--signal` seconds before the time limit, now."""
    return _told(job, "scancel", "--signal=USR1", job.number)


def requeue(job: Job) -> float:
    """By hand, as an administrator does."""
    return _told(job, "scontrol", "requeue", job.number)


def cancel(job: Job) -> float:
    return _told(job, "scancel", job.number)


def _told(job: Job, *words: str) -> float:
    now = time.time()
    job.cluster.run(*words)
    return now


def preempt(job: Job) -> float:
    """A job of a partition that goes first wants the nodes."""
    now = time.time()
    other = job.cluster.sbatch(
        "--partition=main", f"--nodelist={','.join(job.nodes)}", f"--nodes={len(job.nodes)}", "--exclusive",
        "--output=/dev/null", "--wrap=sleep 1",
    )
    job.cluster.wait_for_end(other, 120)
    return now


def reach_limit(job: Job) -> float:
    """The time limit; when Slurm said so."""
    said = re.compile(r"DUE TO TIME LIMIT")
    wait_until(lambda: job.start() > 0 or said.search(job_log(job)), 240)
    return time.time()


def kill_rank(job: Job) -> float:
    """As the kernel does that is out of memory: rank 1, which is on the second node."""
    [rank] = job.ranks_on(job.nodes[1])
    job.cluster.on_node(job.nodes[1], "kill", "-KILL", str(rank))
    return time.time()


def kill_slurmd(job: Job) -> float:
    """The daemon of the second node; the ranks live on, and the job begins anew elsewhere."""
    node = job.nodes[1]
    job.cluster.on_node(node, "pkill", "-KILL", "-x", "slurmd")
    now = time.time()
    wait_until(lambda: not job.ranks_on(node), 120)  # they end by themselves: nobody is left to do it
    return now


def power_off(job: Job) -> float:
    job.cluster.power(job.nodes[1], on=False)
    return time.time()


def cut_off(job: Job) -> float:
    """The network of the second node, without a word to either side."""
    job.cluster.run("ip", "link", "set", f"v{job.nodes[1][1:]}", "down")
    return time.time()


def stop_by_file(job: Job) -> float:
    (job.folder / "stop").touch()
    return time.time()


def nothing(job: Job) -> float:
    return time.time()


EVENTS = {
    "nothing": Event(nothing),
    "signal ahead of the time limit": Event(signal_ahead_of_limit),
    "time limit with --signal": Event(reach_limit, ("--time=2", "--signal=USR1@60")),
    "time limit without --signal": Event(reach_limit, ("--time=1", "--signal=USR1@0")),
    "preemption": Event(preempt, ("--partition=low",)),
    "scontrol requeue": Event(requeue),
    "scancel": Event(cancel),
    "one rank killed": Event(kill_rank),
    "slurmd killed": Event(kill_slurmd),
    "node off": Event(power_off),
    "network partition": Event(cut_off),
    "switch file": Event(stop_by_file),
}


def run_event(name: str, cluster: Cluster, nodes: list[str], folder: Path, program: Program) -> Row:
    """Train on two of `nodes` with `program`, checkpoints in the new folder `folder`, and let `EVENTS[name]` happen.

    Events that take a node away need a third one.
    """
    return run_one(name, EVENTS[name], cluster, nodes, folder, program)


def run_one(name: str, event: Event, cluster: Cluster, nodes: list[str], folder: Path, program: Program) -> Row:
    """As `run_event`, with an event of one's own."""
    others = set(cluster.run("scontrol", "show", "hostnames", cluster.run("sinfo", "-h", "-p", "main", "-o", "%N")).split())
    number = cluster.sbatch(
        "--nodes=2", f"--exclude={','.join(sorted(others - set(nodes)))}", *event.options, "slurm/train.sbatch",
        program.config, program.recipe, *program.overrides, f"output_dir={folder}", *event.overrides,
        env=program.env | event.env,
    )
    wait_until(lambda: cluster.job(number)["JobState"] != "PENDING")
    hosts = cluster.run("scontrol", "show", "hostnames", cluster.job(number)["NodeList"]).split()
    job = Job(cluster, number, folder, hosts, program)
    if event.waits_for_step:
        job.wait_for_step(AT_STEP)
    before = job.markers()
    then = event.cause(job)
    ended = cluster.wait_for_end(number)
    first = min((moment for path, moment in job.markers().items() if path not in before), default=None)
    steps = job.steps()
    saved = max((int(path.parent.name[11:]) for path in job.markers()), default=0)
    repeated, unsaved = len(steps) - len(set(steps)), max(max(steps, default=0) - saved, 0)
    return Row(
        event=name,
        program=program.name,
        state=ended["JobState"],
        exit_code=int(ended["ExitCode"].split(":")[0]),
        restarts=int(ended["Restarts"]),
        steps_lost=repeated + unsaved,
        signal_to_marker_s=None if first is None else round(first - then, 2),
        log=job_log(job),
    )


def job_log(job: Job) -> str:
    """What the batch script said, and Slurm in its place."""
    path = job.cluster.submit_folder / f"gemma_dist-{job.number}.out"
    return path.read_text(errors="replace") if path.exists() else ""
