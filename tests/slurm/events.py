"""Events that befall a job of `slurm/train.sbatch`, one by one, and what is left of the run: a row each.

`run_event` submits a job to a real Slurm, waits until it trains, lets the event happen, waits for the end, and counts.
What trains is the stand-in (`standin.py`), or the package itself on a tiny model.
"""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.slurm.cluster import ROOT, Cluster, wait_until

AT_STEP = 5  # at which events happen
SAVE_STEPS = 10
STEP = re.compile(r"\bstep +(\d+)/\d+")


@dataclass(frozen=True)
class Row:
    """What an event did to a job."""

    event: str
    program: str
    state: str  # the job's last
    exit_code: int  # of its batch script, the last time
    restarts: int
    num_steps: int  # of the newest checkpoint in the end
    steps_lost: int  # done more than once; or, where the job stayed away, done and in no checkpoint
    signal_to_marker_s: float | None  # from Slurm's signal to the marker of the checkpoint that it made; None: neither
    nodes: list[str]  # of its last start
    log: str = field(repr=False)  # what the batch script said


@dataclass(frozen=True)
class Program:
    """What trains."""

    name: str
    accelerate_config: str
    recipe: str
    overrides: tuple[str, ...]
    env: dict[str, str]
    step_s: float  # about as long as a step takes, in seconds
    waits: bool  # whether it can wait with its last step for what is to happen


@dataclass(frozen=True)
class Job:
    """A job that trains, and where it does so."""

    cluster: Cluster
    number: str
    folder: Path  # of its checkpoints
    nodes: list[str]  # of its first start

    @property
    def log_folder(self) -> Path:
        """Of the batch script."""
        return self.cluster.submit_folder / "slurm-logs" / f"gemma_dist-{self.number}"

    def log(self) -> str:
        """What the batch script said, and Slurm in its place."""
        path = self.cluster.submit_folder / f"gemma_dist-{self.number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def steps(self) -> list[int]:
        """All steps that rank 0 said were done, those of earlier starts included."""
        logs = sorted(self.log_folder.glob("*.log"))
        return [int(step) for log in logs for step in STEP.findall(log.read_text(errors="replace"))]

    def markers(self) -> list[Path]:
        """Of complete checkpoints."""
        return list(self.folder.glob("checkpoint-*/complete.json"))

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        return max((int(path.parent.name.partition("-")[2]) for path in self.markers()), default=0)

    def signal_to_marker_s(self) -> float | None:
        """From the first start's signal to the first marker behind it, before rank 0 of that start ended."""
        told, ended = (self.log_folder / "attempt-0" / name for name in ("told", "rank-0"))
        if not told.exists() or not ended.exists():
            return None
        begin, end = told.stat().st_mtime, ended.stat().st_mtime
        after = [when for path in self.markers() if begin <= (when := path.stat().st_mtime) <= end]
        return round(min(after) - begin, 2) if after else None

    def ranks_on(self, node: str) -> list[str]:
        """Processes of ranks there, by their numbers on that node. The launcher's has other words before `-m`."""
        pattern = rf"python[0-9.]* (-u )?-m gemma_dist train .*output_dir={self.folder}( |$)"
        return self.cluster.on_node(node, "pgrep", "-f", pattern).split()


def standin(folder: Path, *, step_s: float = 0.2) -> Program:
    """The stand-in, under the two names that it has first in PATH. With REAL_HEALTH in its environment, the health
    check is the package's own."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("accelerate", "python"):
        path = folder / name
        path.write_text(
            "#!/bin/bash\n"
            f'if [ -n "$REAL_HEALTH" ] && [ "$3" = health ]; then PYTHONPATH={ROOT} exec {sys.executable} "$@"; fi\n'
            f'exec {sys.executable} {ROOT}/tests/slurm/standin.py {name} "$@"\n'
        )
        path.chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "PROCESSES_PER_NODE": "1"}
    return Program(
        "stand-in",
        "accelerate_configs/ddp.yaml",
        "launch/cpu_lora.yaml",
        (f"step_s={step_s}",),
        env,
        step_s,
        waits=True,
    )


def package(folder: Path, model: Path, shards: Path) -> Program:
    """The package on a tiny model: two nodes, one CPU rank on each. `model` and `shards` exist."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / "cpu_ddp.yaml").read_text())
    del config["use_cpu"]  # with it accelerate leaves several machines to MPI
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    (folder / "ddp.yaml").write_text(yaml.safe_dump(config))
    env = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(folder / "tmp"),  # launchers that are killed leave folders
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
        "global_batch_size=2",
        "per_device_train_batch_size=1",
        "gradient_checkpointing=false",
        "logging_steps=1",
        "save_total_limit=100",
        "step_timeout_s=15",
    )
    return Program("gemma_dist", str(folder / "ddp.yaml"), "launch/cpu_lora.yaml", overrides, env, 0.3, waits=False)


@dataclass(frozen=True)
class Event:
    """Something that happens to a job that trains."""

    cause: Callable[[Job], None]
    options: tuple[str, ...] = ()  # of sbatch
    overrides: tuple[str, ...] = ()  # of the recipe
    env: dict[str, str] = field(default_factory=dict)
    trains_s: float = 15  # how long a program that does not wait has to train, at least
    save_steps: int = 1000  # none but those that an event asks for
    recipe: str = ""  # in the place of the program's
    begins: bool = True  # whether the job comes to its fifth step


def _tell_all_tasks(job: Job) -> None:
    """What Slurm does ahead of the time limit, now."""
    job.cluster.run("scancel", "--signal=USR1", job.number)


def _requeue(job: Job) -> None:
    job.cluster.run("scontrol", "requeue", job.number)


def _cancel(job: Job) -> None:
    job.cluster.run("scancel", job.number)


def _preempt(job: Job) -> None:
    """A job of a partition that goes first wants the nodes."""
    words = ["--partition=main", f"--nodelist={','.join(job.nodes)}", f"--nodes={len(job.nodes)}", "--exclusive"]
    other = job.cluster.sbatch(*words, "--output=/dev/null", "--wrap=sleep 1")
    job.cluster.wait_for_end(other, 120)


def _reach_limit(job: Job) -> None:
    """The time limit: moved here, and away again once the job begins anew, so that it hits a job that trains."""
    minutes = int(job.cluster.job(job.number)["RunTime"].split(":")[1]) + 1
    job.cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}")
    wait_until(lambda: job.cluster.starts(job.number) > 1, 300, every_s=0.5)
    job.cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")


def _kill_rank(job: Job) -> None:
    """As the kernel does that is out of memory."""
    [rank] = job.ranks_on(job.nodes[1])
    job.cluster.on_node(job.nodes[1], "kill", "-KILL", rank)


def _kill_slurmd(job: Job) -> None:
    """The daemon of the second node. Its rank lives on, with nobody left to end it, until it does so itself."""
    node = job.nodes[1]
    job.cluster.on_node(node, "pkill", "-KILL", "-x", "slurmd")
    wait_until(lambda: not job.ranks_on(node), 120, every_s=1)


def _power_off(job: Job) -> None:
    job.cluster.power(job.nodes[1], on=False)


def _cut_off(job: Job) -> None:
    """The network of the second node, without a word to either side. Its rank is to end by itself."""
    node = job.nodes[1]
    job.cluster.run("ip", "link", "set", f"v{node[1:]}", "down")
    wait_until(lambda: not job.ranks_on(node), 120, every_s=1)


def _touch_stop(job: Job) -> None:
    (job.folder / "stop").touch()


def _nothing(job: Job) -> None:
    """The run itself does it."""


EVENTS = {
    "nothing": Event(_nothing),
    "signal of the time limit": Event(_tell_all_tasks),
    "time limit with --signal": Event(_reach_limit, ("--time=60", "--signal=USR1@30"), trains_s=100),
    "time limit without --signal": Event(_reach_limit, ("--time=60", "--signal=USR1@0"), trains_s=100),
    "preemption": Event(_preempt, ("--partition=low",)),
    "scontrol requeue": Event(_requeue),
    "scancel": Event(_cancel),
    "switch file": Event(_touch_stop),
    "one rank killed": Event(_kill_rank, save_steps=SAVE_STEPS),
    "slurmd killed": Event(_kill_slurmd, trains_s=50, save_steps=SAVE_STEPS),
    "node off": Event(_power_off, save_steps=SAVE_STEPS),
    "network partition": Event(_cut_off, trains_s=50, save_steps=SAVE_STEPS),
}


def run_event(name: str, cluster: Cluster, nodes: list[str], folder: Path, program: Program) -> Row:
    """Train on two of `nodes` with `program`, checkpoints in the new folder `folder`, and let `EVENTS[name]` happen.

    Events that take a node away, for good, need a third one.
    """
    return run_one(name, EVENTS[name], cluster, nodes, folder, program)


def run_one(name: str, event: Event, cluster: Cluster, nodes: list[str], folder: Path, program: Program) -> Row:
    """As `run_event`, with an event of one's own."""
    others = ",".join(node for node in cluster.nodes if node not in nodes)
    happened = folder.with_name(f"{folder.name}-happened")
    num_steps = 4 * AT_STEP if program.waits else AT_STEP + round(event.trains_s / program.step_s)
    steps = [f"max_steps={num_steps}", f"save_steps={event.save_steps}"]
    if program.waits:
        steps.append(f"waits_for={happened}")
    number = cluster.sbatch(
        *("--nodes=2", f"--exclude={others}", *event.options, "slurm/train.sbatch"),
        *(program.accelerate_config, event.recipe or program.recipe, f"output_dir={folder}"),
        *(*program.overrides, *steps, *event.overrides),
        env=program.env | event.env,
    )
    wait_until(lambda: cluster.job(number)["JobState"] != "PENDING", every_s=0.5)
    job = Job(cluster, number, folder, cluster.hosts(number))
    if event.begins:
        wait_until(lambda: max(job.steps(), default=0) >= AT_STEP, 180)
    event.cause(job)
    if event.cause is not _nothing:
        wait_until(lambda: cluster.starts(number) > 1 or cluster.has_ended(number), 300, every_s=0.5)
    happened.touch()
    ended = cluster.wait_for_end(number, 400)
    done = job.steps()
    return Row(
        event=name,
        program=program.name,
        state=ended["JobState"],
        exit_code=int(ended["ExitCode"].split(":")[0]),
        restarts=int(ended["Restarts"]),
        num_steps=job.saved(),
        steps_lost=len(done) - len(set(done)) + max(max(done, default=0) - job.saved(), 0),
        signal_to_marker_s=job.signal_to_marker_s(),
        nodes=cluster.hosts(number),
        log=job.log(),
    )
