"""The tables of docs/reliability.md: what a run survives, what it loses, and whether it learns the same.

    python benchmarks/reliability.py [--only interruptions|disks|slurm] [--seed 0] [--rounds 1]

A tiny Gemma 4 on two CPU ranks. One run is interrupted by each of EVENTS, at random moments, and goes on by the same
command each time; another is not. Then every file of a checkpoint is damaged, and every system call of a save fails.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/support

import psutil

from gemma_dist.logs import read_jsonl
from tests.slurm import cluster, events
from tests.support.corpus import row, shard_rows
from tests.support.damages import DAMAGES
from tests.support.machines import accelerate, free_port, machines
from tests.support.ranks import gemma_dist, kill, start

STEPS_EACH, SAVE_STEPS = 12, 5  # of the run between two interruptions, at most; between checkpoints
SETTINGS = ["per_device_train_batch_size=1", "global_batch_size=4", f"save_steps={SAVE_STEPS}", "save_total_limit=3"]


@dataclass(frozen=True)
class Place:
    """A model, a corpus, and the settings of a run with them."""

    model: Path
    shards: Path
    num_steps: int

    def words(self, out: Path) -> list[str]:
        """Of the command that trains into `out`, and goes on there."""
        names = [f"model_name_or_path={self.model}", f"data.train={self.shards}", f"output_dir={out}"]
        schedule = ["lr_scheduler_type=constant_with_warmup", "warmup_steps=1", f"max_steps={self.num_steps}"]
        return ["train", "launch/cpu_lora.yaml", *names, *SETTINGS, *schedule]


class Attempt:
    """One start of the run, which is at work."""

    def __init__(self, place: Place, out: Path) -> None:
        self.out, self.place = out, place
        self.launcher = start(*place.words(out), launch="cpu_ddp")

    def ranks(self) -> list[psutil.Process]:
        """The processes of its ranks."""
        below = psutil.Process(self.launcher.pid).children(recursive=True)
        return [one for one in below if "gemma_dist" in one.cmdline()]


def _signal_launcher(number: int) -> Callable[[Attempt], None]:
    return lambda attempt: attempt.launcher.send_signal(number)


def _signal_rank(number: int, rank: int) -> Callable[[Attempt], None]:
    def send(attempt: Attempt) -> None:
        next(one for one in attempt.ranks() if one.environ()["RANK"] == str(rank)).send_signal(number)

    return send


def _stop_file(attempt: Attempt) -> None:
    (attempt.out / "stop").touch()


def _kill_launcher(attempt: Attempt) -> None:
    """Its ranks go on: another start is refused, and the file ends them."""
    attempt.launcher.kill()
    said = gemma_dist(*attempt.place.words(attempt.out), launch="cpu_ddp", fails=True)
    assert "another run is at work there" in said, said
    _stop_file(attempt)


EVENTS: dict[str, Callable[[Attempt], None]] = {
    "SIGTERM to the launcher": _signal_launcher(signal.SIGTERM),
    "SIGINT to the launcher (Ctrl-C)": _signal_launcher(signal.SIGINT),
    "SIGUSR1 to one rank": _signal_rank(signal.SIGUSR1, 1),
    "SIGUSR2 to one rank": _signal_rank(signal.SIGUSR2, 0),
    "the file OUT/stop": _stop_file,
    "kill -9 of a rank": _signal_rank(signal.SIGKILL, 1),
    "kill -9 of the launcher, then OUT/stop": _kill_launcher,
}
MACHINE_OFF = "one of two machines off"
BY_THE_PACKAGE = ("preemption", "one rank killed", "node off")  # events in Slurm at which real ranks train


@dataclass(frozen=True)
class Row:
    """What an event did."""

    event: str
    steps_done: int
    steps_saved: int
    marker_s: float | None  # from the event to the marker of a checkpoint that came after it
    end_s: float  # to the end of the last rank

    @property
    def lost(self) -> int:
        """Steps that the next start does again."""
        return self.steps_done - self.steps_saved


def newest(out: Path) -> tuple[int, float]:
    """Step and time of the newest complete checkpoint."""
    markers = [
        (int(path.parent.name.partition("-")[2]), path.stat().st_mtime) for path in out.glob("*-*/complete.json")
    ]
    return max(markers, default=(0, 0.0))


def done(out: Path) -> int:
    """Steps that the log of a run tells of."""
    path = out / "metrics.jsonl"
    return max((line["step"] for line in read_jsonl(path)), default=0) if path.exists() else 0


def interrupt(event: str, place: Place, out: Path, after: int) -> Row:
    """Start the run, let `event` happen once it has done `after` more steps, and wait until nothing of it is left."""
    attempt, before = Attempt(place, out), newest(out)[0]
    while done(out) < before + after:
        assert attempt.launcher.poll() is None, kill(attempt.launcher)
        time.sleep(0.02)
    ranks, begin = attempt.ranks(), time.time()
    EVENTS[event](attempt)
    _, left = psutil.wait_procs(ranks, timeout=120)
    end = time.time()
    assert not left, f"{event}: ranks are left"
    kill(attempt.launcher)
    return _row(event, out, begin, end)


def cut_power(place: Place, out: Path, after: int, folder: Path) -> Row:
    """As `interrupt`, with one rank on each of two machines, of which the second goes off."""
    before, port = newest(out)[0], free_port()
    commands = [[*accelerate(rank, 2, port), "gemma_dist", *place.words(out)] for rank in (0, 1)]
    with machines(folder, *commands) as (one, two):
        while done(out) < before + after:
            assert one.process.poll() is None, one.said()
            time.sleep(0.02)
        begin = time.time()
        two.off()
        one.ends(timeout=120)
        return _row(MACHINE_OFF, out, begin, time.time())


def _row(event: str, out: Path, begin: float, end: float) -> Row:
    step, marked = newest(out)
    return Row(event, done(out), step, marked - begin if marked > begin else None, end - begin)


def head(*columns: str) -> None:
    """Print the head of a table."""
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def interruptions(folder: Path, model: Path, shards: Path, chance: random.Random, rounds: int) -> None:
    """Print what each event cost, and how far the interrupted run is from the uninterrupted one."""
    events = [*EVENTS, MACHINE_OFF] * rounds
    place = Place(model, shards, STEPS_EACH * (len(events) + 1))
    whole, out = folder / "whole", folder / "interrupted"
    gemma_dist(*place.words(whole), launch="cpu_ddp", timeout=3600)
    rows: dict[str, list[Row]] = {}
    chance.shuffle(events)
    for event in events:
        after = chance.randrange(1, STEPS_EACH)
        found = cut_power(place, out, after, folder) if event == MACHINE_OFF else interrupt(event, place, out, after)
        rows.setdefault(event, []).append(found)
        print(f"    {found}", file=sys.stderr, flush=True)
    gemma_dist(*place.words(out), launch="cpu_ddp", timeout=3600)
    head("event", "survived", "steps lost", "seconds to the marker", "to the end of the last rank")
    for event in [*EVENTS, MACHINE_OFF]:
        of_event = rows[event]
        seconds = [one.marker_s for one in of_event if one.marker_s is not None]
        marker = f"{max(seconds):.1f}" if seconds else "none made"
        lost = " ".join(str(one.lost) for one in of_event)
        ended = max(one.end_s for one in of_event)
        print(f"| {event} | {len(of_event)} of {len(of_event)} | {lost} | {marker} | {ended:.1f} |")
    curves = [
        [(line["step"], line["loss"], line["grad_norm"]) for line in read_jsonl(one / "metrics.jsonl")]
        for one in (whole, out)
    ]
    largest = max(abs(one[1] - two[1]) for one, two in zip(*curves, strict=True))
    same = (whole / "adapter_model.safetensors").read_bytes() == (out / "adapter_model.safetensors").read_bytes()
    adapters = "are the same bytes" if same else "differ"
    print(
        f"\n{len(events)} interruptions of {place.num_steps} steps: losses differ by {largest:g} at most; the last is"
    )
    print(f"{curves[1][-1][1]!r} instead of {curves[0][-1][1]!r}, and the adapters {adapters}.")


def disks(folder: Path, model: Path, shards: Path) -> None:
    """Print how many damages of a checkpoint were found, and what faults of a save cost."""
    from gemma_dist.errors import CheckpointError
    from gemma_dist.recipe import load_config
    from gemma_dist.resolve import resolve
    from gemma_dist.topology import Topology
    from gemma_dist.train.checkpoint import MARKER, find_checkpoint, whole_checkpoint
    from tests.support.faults import inject

    place = Place(model, shards, 2 * SAVE_STEPS)
    gemma_dist(*place.words(folder / "whole"))
    config = load_config("launch/cpu_lora.yaml", place.words(folder / "whole")[2:])
    identity = resolve(config, Topology("")).identity
    first, second = (folder / "whole" / f"checkpoint-{step}" for step in (SAVE_STEPS, 2 * SAVE_STEPS))
    head("every file of a checkpoint", "made", "found, and the one before taken", "refused", "not found")
    for kind, damage in DAMAGES.items():
        outcomes: list[str] = []
        for name in sorted(path.name for path in second.iterdir()):
            here = folder / kind / name
            for checkpoint in (first, second):
                shutil.copytree(checkpoint, here / checkpoint.name)
            damage(here / second.name / name)
            try:
                found = whole_checkpoint(find_checkpoint(here, "auto", identity)[0], here, "auto", identity)
                outcomes.append("found" if found[1] == SAVE_STEPS else "missed")
            except CheckpointError:
                assert (kind, name) == ("missing", MARKER), "a folder without its marker is in the way, and left alone"
                outcomes.append("refused")
        counts = [outcomes.count(outcome) for outcome in ("found", "refused", "missed")]
        print(f"| {kind} | {len(outcomes)} | {counts[0]} | {counts[1]} | {counts[2]} |")
    head("every system call of a save", "faults", "saved all the same", "told, with its folder", "checkpoints lost")
    (folder / "faults").mkdir()
    faults = inject(str(model), shards, folder / "faults")
    for number in ("ENOSPC", "EIO"):
        of_kind = [fault for fault in faults if fault["errno"] == number]
        saved = sum(fault["error"] is None for fault in of_kind)
        told = sum(fault["error"] == "CheckpointError" and str(folder) in fault["message"] for fault in of_kind)
        lost = sum(not (fault["whole"] and fault["checkpoints"]) for fault in of_kind)
        print(f"| {number} | {len(of_kind)} | {saved} | {told} | {lost} |")


def _slurm_event(
    started: cluster.Cluster, program: events.Program, nodes: dict[str, list[str]], name: str
) -> events.Row:
    """What one event on its `nodes` cost a job of `program`."""
    return events.run_event(name, started, nodes[name], started.submit_folder / f"out-{nodes[name][0]}", program)


def slurm(folder: Path, model: Path, shards: Path) -> None:
    """Print what events cost a job of slurm/train.sbatch on a real Slurm: a stand-in that trains, at four events at
    once, and the package itself at some, one by one."""
    if reason := cluster.missing():
        print(f"\nSlurm: skipped: {reason}")
        return
    settings = ["NODE_TIMEOUT=10", "KILLWAIT=10"]
    head("event in Slurm", "trains", "ends", "restarts", "steps lost", "seconds from the signal to the marker")
    standin, package = events.standin(folder / "bin"), events.package(folder / "package", model, shards)
    for program, names, at_once in ((standin, list(events.EVENTS), 4), (package, BY_THE_PACKAGE, 1)):
        work = folder / program.name
        with (
            cluster.running(work / "w", work / "clone", num_nodes=3 * len(names), settings=settings) as started,
            ThreadPoolExecutor(at_once) as pool,
        ):
            nodes = {name: started.nodes[3 * number :][:3] for number, name in enumerate(names)}  # one may be lost
            run = partial(_slurm_event, started, program, nodes)
            for one in pool.map(run, names):
                seconds = "none made" if one.signal_to_marker_s is None else f"{one.signal_to_marker_s:.1f}"
                cells = one.event, one.program, one.state, one.restarts, one.steps_lost, seconds
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["interruptions", "disks", "slurm"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--rounds", type=int, default=1, help="how often each event happens")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gemma_dist("tiny", folder / "model")
        shard_rows(folder, str(folder / "model"), [row(number, 1 + number % 3) for number in range(24)])
        place = folder / "model", folder / "shards"
        if arguments.only in (None, "interruptions"):
            (folder / "runs").mkdir()
            interruptions(folder / "runs", *place, random.Random(arguments.seed), arguments.rounds)
        if arguments.only in (None, "disks"):
            (folder / "disks").mkdir()
            disks(folder / "disks", *place)
        if arguments.only in (None, "slurm"):
            slurm(folder, *place)


if __name__ == "__main__":
    main()
