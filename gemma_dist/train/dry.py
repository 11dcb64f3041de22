"""`gemma-dist train --dry-run`: all of a run but a changed weight, so that a place in a queue is not lost to a typo.

The first steps of the run, and the one with its longest micro-batch, by the trainer itself with learning rate 0: the
optimizer's states come about, and memory and checkpoint have their true size. The checkpoint goes to a folder of its
own in `train.output_dir`, is read back and compared, and is gone afterwards (`scratch.py`).
"""

import contextlib
import dataclasses
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from gemma_dist import exits, world
from gemma_dist.config import RunConfig
from gemma_dist.data.encode import Encoder
from gemma_dist.errors import CheckpointError, ConfigError, DataError
from gemma_dist.files import size
from gemma_dist.logs import RunLog, log, to_json
from gemma_dist.model.load import device, use_cpu
from gemma_dist.resolve import Run
from gemma_dist.stream.schedule import Schedule
from gemma_dist.topology import Topology
from gemma_dist.train.agree import require_same_run
from gemma_dist.train.best import require_metric
from gemma_dist.train.checkpoint import (
    MARKER,
    damaged_and_named,
    read_marker,
    require_same_start,
    require_shared,
)
from gemma_dist.train.digests import damage
from gemma_dist.train.dry_report import DiskTaken, DryRun, EvaluationTaken, MemoryTaken, StepSeen
from gemma_dist.train.dry_steps import FIRST_STEPS, ChosenSteps, choose_steps, tokens_of
from gemma_dist.train.memory import MemoryWatch, gpu_at_hand
from gemma_dist.train.optimizer import forget_state, load_optimizer, state_crc32
from gemma_dist.train.owner import HEARTBEATS, lock_output_dir
from gemma_dist.train.run import STATE_FILES, connect, load_run_model, prepare, run_loader
from gemma_dist.train.scratch import scratch_folder
from gemma_dist.train.stop import StopRequests
from gemma_dist.train.trainer import ToolCallTrainer
from gemma_dist.visible import shown

SCRATCH = ".dry-run-"  # and the name of the run
NUM_SHOWN = 5  # problems in a message


class Clock:
    """Seconds of one thing after another, each until the device is through with it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begun = time.perf_counter()

    def ended(self, name: str) -> float:
        """Note how long the thing took that ends now."""
        if not use_cpu():
            torch.cuda.synchronize(device())
        now = time.perf_counter()
        self.seconds[name], self._begun = now - self._begun, now
        return self.seconds[name]


class StepsHeld(RunLog):
    """The log of a dry run, which is kept in memory."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.num_tokens: list[int] = []
        self.evaluation_s = 0.0

    def write(self, step: int, values: Any, *, num_tokens: int) -> dict[str, float]:
        """Keep what the table shows of a step."""
        self.losses.append(values["loss"])
        self.num_tokens.append(num_tokens)
        return {}

    def write_evaluation(self, step: int, values: Any, seconds: float) -> None:
        """Keep how long it took."""
        self.evaluation_s = seconds

    def close(self) -> None:
        """Nothing is open."""


class DryTrainer(ToolCallTrainer):
    """The trainer, whose only checkpoint is read back and compared."""

    clock: Clock  # to be set before it trains

    def _save_checkpoint(self, model: object, trial: object) -> None:
        """Save as ever, forget the optimizer's state, and load it as a resumed run would.

        Raises:
            CheckpointError: on every rank, where something else comes back on any.
        """
        written = state_crc32(self.model, self.optimizer.optimizer)
        self.clock.ended("before it is saved")
        super()._save_checkpoint(model, trial)
        self.clock.ended("save")
        exits.note("step", self.loader.start_step)  # as it was: this one is not the run's
        folder = self.run.config.train.output_dir / f"checkpoint-{self.state.global_step}"
        files = sorted(read_marker(folder)["files"].items())
        problems = damage(folder, dict(files[world.rank() :: world.world_size()]))
        forget_state(self.model, self.optimizer.optimizer)
        load_optimizer(folder, self.model, self.optimizer.optimizer)
        read = state_crc32(self.model, self.optimizer.optimizer)
        problems += [f"{name} has other bytes" for name in written if read.get(name) != written[name]]
        self.clock.ended("read")
        if found := [problem for of_rank in world.gather_objects(problems) for problem in of_rank]:
            raise CheckpointError(
                f"train.output_dir = {str(self.run.config.train.output_dir.parent)!r}: a checkpoint that was written "
                f"there reads back otherwise: {_some(found)}. Look at that disk, or name a folder on another one"
            )


class StepClock(TrainerCallback):
    """Notes how long each step of a dry run takes."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: object, **kwargs: object) -> None:
        """The optimizer is made, and has its states where a checkpoint had some."""
        self._clock.ended("optimizer")
        if not use_cpu():
            torch.cuda.reset_peak_memory_stats(device())  # loading the model has a peak of its own

    def on_step_begin(self, args: Any, state: Any, control: object, **kwargs: object) -> None:
        """What happened between two steps belongs to none."""
        if self.seconds:
            self._clock.ended("between steps")

    def on_step_end(self, args: Any, state: Any, control: object, **kwargs: object) -> None:
        """A step has ended, the optimizer's part too."""
        self.seconds.append(self._clock.ended("step"))


def dry_run(
    config: RunConfig,
    *,
    watch: MemoryWatch | None = None,
    requests: StopRequests | None = None,
    trainer_class: Callable[..., DryTrainer] = DryTrainer,
) -> DryRun | None:
    """Try the run that `config` says, alone or as one rank of many, from the checkpoint that it would go on from.

    Nothing is left behind, in `train.output_dir` or elsewhere, and what lies there is not touched. Every rank calls it.

    Args:
        requests: to stop. They end a dry run at once, since there is nothing to save: its steps are none to them.

    Returns:
        What was measured, all ranks together; None where the run has ended already.

    Raises:
        What `train.run.train` raises; besides:
        DataError: a shard is missing, cannot be read or is of another size than its manifest says.
        CheckpointError: the checkpoint to resume from is damaged, or the one that was written reads back otherwise.
    """
    clock = Clock()
    run, encoder, checkpoint, start_step = prepare(config, watch)
    if start_step >= run.num_steps:
        log.info("%s is the end of this run: nothing is left to train", checkpoint)
        return None
    clock.ended("recipe and manifests")
    arguments = connect(run)
    require_same_run(run)
    chosen, num_searched = choose_steps(run, start_step)
    clock.ended("search for the longest")
    with _scratch(config.train.output_dir) as folder:
        if world.world_size() > 1:
            exits.use_folder(folder / HEARTBEATS)
        require_shared(folder)
        _require_whole(checkpoint, start_step)
        _require_data(run, encoder)
        clock.ended(f"{run.schedule.shards.num_files:,} shards looked at")
        dry = _into(run, folder, start_step, chosen)
        arguments.output_dir, arguments.report_to, arguments.learning_rate = str(folder), [], 0.0
        arguments.max_steps = arguments.save_steps = dry.num_steps
        arguments.logging_steps = 1
        loader = run_loader(dry, encoder, start_step)
        model = load_run_model(dry, loader.table)
        clock.ended("model")
        held, steps = StepsHeld(), StepClock(clock)
        trainer = trainer_class(dry, arguments, model, loader, held)
        trainer.clock = clock
        trainer.add_callback(steps)
        trainer.train(resume_from_checkpoint=checkpoint)
        seen = _steps_seen(run.schedule, chosen, steps.seconds, held)
        disk, evaluation = _disk(folder, config.train.output_dir), _evaluation(run, start_step, held.evaluation_s)
        found = _report(run, start_step, seen, num_searched, clock, disk, evaluation, watch)
        if requests is not None:
            requests.ends()
        exits.use_folder(None)
        world.barrier()  # nobody writes there any more
    world.disconnect()
    return found


def say(config: RunConfig, watch: MemoryWatch, requests: StopRequests, *, as_json: bool) -> None:
    """`dry_run`, and on rank 0 the table, or one line of JSON, of what it measured.

    Raises:
        What `dry_run` and `require_room` raise.
    """
    found = dry_run(config, watch=watch, requests=requests)
    if found is None or world.rank() != 0:
        return
    print(to_json(found.to_json()) if as_json else shown(found.render()), flush=True)
    require_room(found, config.train.output_dir)


def require_room(found: DryRun, output_dir: Path) -> None:
    """Raises ConfigError where the checkpoints of the run would not fit the disk."""
    if found.lacks_room:
        raise ConfigError(
            f"train.output_dir = {str(output_dir)!r}: the run will take {size(found.bytes_needed)} there, and "
            f"{size(found.disk.free)} are free; make room, lower train.save_total_limit, or name a folder on "
            "another disk"
        )


@contextlib.contextmanager
def _scratch(output_dir: Path) -> Iterator[Path]:
    """A folder in `output_dir` for what all ranks write, gone afterwards. No run may be at work in `output_dir`."""
    folder = output_dir / f"{SCRATCH}{world.name_of_run()}"
    if world.rank() != 0:
        world.barrier()
        yield folder
        return
    with scratch_folder(folder, world.world_size()), lock_output_dir(output_dir):
        for old in output_dir.glob(f"{SCRATCH}*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)  # of one that was killed with all that it had started
        world.barrier()
        yield folder


def _require_whole(checkpoint: Path | None, start_step: int) -> None:
    """Raises CheckpointError, on every rank, where the checkpoint to resume from is damaged: a run would put it aside,
    and a dry run changes nothing."""
    require_same_start(start_step)
    problems: list[str] = []
    if checkpoint is not None:
        files = sorted(read_marker(checkpoint)["files"].items())
        problems = damage(checkpoint, dict(files[world.rank() :: world.world_size()]))
    if found := [problem for of_rank in world.gather_objects(problems) for problem in of_rank]:
        assert checkpoint is not None, "nothing is damaged"
        raise CheckpointError(
            f"{damaged_and_named(checkpoint, found)}. A run that resumes by itself puts it aside; a dry run does not"
        )


def _require_data(run: Run, encoder: Encoder) -> None:
    """Raises DataError, on every rank, where a shard is not as its manifest says; and what `require_metric` raises. The
    ranks of each node look at all shards, as each node may have disks of its own; no row group is read for it."""
    for key, schedule in (("data.train", run.schedule), ("data.eval", run.held_out)):
        if schedule is None:
            continue
        problems = schedule.shards.check_files(world.local_rank(), world.local_world_size())
        found = sorted({problem for of_rank in world.gather_objects(problems) for problem in of_rank})
        if found:
            raise DataError(
                f"{key}: {len(found):,} of {schedule.shards.num_files:,} shards are not what their manifest says: "
                f"{_some(found)}. Restore them from their source, or make the shards again"
            )
    require_metric(run, encoder)


def _some(problems: list[str]) -> str:
    """The first few of some problems."""
    more = f" and {len(problems) - NUM_SHOWN:,} more" if len(problems) > NUM_SHOWN else ""
    return "; ".join(problems[:NUM_SHOWN]) + more


def _into(run: Run, folder: Path, start_step: int, chosen: list[int]) -> Run:
    """`run` with the `chosen` steps alone, and one evaluation behind them, of a batch of the longest sequences. It
    writes to `folder`."""
    num_steps = start_step + len(chosen)
    of_evaluation = {"eval_on_start": False, "metric_for_best_model": None, "load_best_model_at_end": False}
    once = {"eval_strategy": "steps", "eval_steps": num_steps} if run.held_out else {}
    settings = run.config.train.model_copy(update={"output_dir": folder, **of_evaluation, **once})
    schedule = ChosenSteps(run.schedule, start_step, chosen)
    return dataclasses.replace(
        run,
        config=run.config.model_copy(update={"train": settings}),
        schedule=schedule,
        num_steps=num_steps,
        held_out=run.held_out and run.held_out.longest_round(),
    )


def _steps_seen(schedule: Schedule, chosen: list[int], seconds: list[float], held: StepsHeld) -> list[StepSeen]:
    """The chosen steps, as slow as the slowest rank."""
    own = [(time, tokens_of(schedule, step, world.rank())) for time, step in zip(seconds, chosen, strict=True)]
    of_ranks = world.gather_objects(own)
    seen = []
    for number, step in enumerate(chosen):
        slowest, largest = (max(of_rank[number][which] for of_rank in of_ranks) for which in (0, 1))
        # Rank 0 alone logs.
        loss, tokens = (held.losses[number], held.num_tokens[number]) if held.losses else (0.0, 0)
        seen.append(StepSeen(step + 1, slowest, tokens, int(largest), loss))
    return seen


def _disk(folder: Path, output_dir: Path) -> DiskTaken:
    """The checkpoint in `folder`, and the room beside it once that is gone."""
    (written,) = folder.glob(f"checkpoint-*/{MARKER}")
    files = [path for path in written.parent.rglob("*") if path.is_file()]
    num_bytes = sum(path.stat().st_size for path in files)
    result = [path for path in files if not any(path.match(pattern) for pattern in STATE_FILES)]
    return DiskTaken(
        num_bytes,
        sum(path.stat().st_size for path in result),
        len(list(output_dir.glob(f"checkpoint-*/{MARKER}"))),
        shutil.disk_usage(output_dir).free + num_bytes,
    )


def _evaluation(run: Run, start_step: int, seconds: float) -> EvaluationTaken | None:
    """What the evaluations of a run take, by one batch of it that took so many seconds; None: there are none."""
    if run.held_out is None:
        return None
    return EvaluationTaken(seconds, run.held_out.num_rounds, run.num_evaluations(start_step))


def _launch(topology: Topology) -> str:
    """How processes share memory, in a word."""
    if topology.fsdp is not None:
        return "FSDP2"
    if topology.zero_stage is not None:
        return f"ZeRO-{topology.zero_stage}"
    return "DDP" if topology.num_processes > 1 else "one process"


def _memory(watch: MemoryWatch | None) -> MemoryTaken:
    """What the ranks took at most, so far."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gpu = gpu_at_hand()
    taken = None if gpu is None else torch.cuda.max_memory_allocated(device())
    found = world.gather_objects((socket.gethostname(), own, psutil.virtual_memory().total, taken))
    hosts: dict[str, int] = {}
    for name, num_bytes, _, _ in found:
        hosts[name] = hosts.get(name, 0) + num_bytes
    fullest = max(hosts, key=lambda name: hosts[name])
    total = next(total for name, _, total, _ in found if name == fullest)
    most = max((taken for *_, taken in found if taken is not None), default=None)
    planned = watch.planned_bytes if watch is not None else None
    return MemoryTaken(hosts[fullest], fullest, total, most, gpu.num_bytes if gpu else None, planned if gpu else None)


def _report(
    run: Run,
    start_step: int,
    seen: list[StepSeen],
    num_searched: int,
    clock: Clock,
    disk: DiskTaken,
    evaluation: EvaluationTaken | None,
    watch: MemoryWatch | None,
) -> DryRun:
    """All that was measured. Every rank calls it."""
    settings, took = run.config.train, clock.seconds
    saving, reading = took.pop("save"), took.pop("read")
    phases = {name: seconds for name, seconds in took.items() if name not in ("step", "between steps")}
    del phases["before it is saved"]
    first = [step for step in seen if step.step <= start_step + FIRST_STEPS]
    return DryRun(
        launch=_launch(run.topology),
        num_ranks=world.world_size(),
        num_samples=len(run.schedule.shards),
        num_files=run.schedule.shards.num_files,
        start_step=start_step,
        num_steps=run.num_steps,
        save_steps=settings.save_steps,
        save_total_limit=settings.save_total_limit,
        stop_grace_s=settings.stop_grace_s,
        phases=phases,
        steps=first,
        longest=max(seen, key=lambda step: (step.micro_batch_tokens, -step.step)),
        num_searched=num_searched,
        seconds_to_save=saving,
        seconds_to_read=reading,
        memory=_memory(watch),
        disk=disk,
        evaluation=evaluation,
        keeps_best=settings.best_metric is not None,
        steps_per_epoch=run.schedule.steps_per_epoch if settings.saves_each_epoch else None,
    )
