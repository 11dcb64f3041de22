"""What a dry run has measured, and what the run itself would take by it: arithmetic and words."""

from dataclasses import asdict, dataclass
from typing import Any

from gemma_dist.files import size


@dataclass(frozen=True)
class StepSeen:
    """One optimizer step of a dry run."""

    step: int  # whose samples it took, from 1
    seconds: float  # until the slowest rank was through
    num_tokens: int  # of the global batch
    micro_batch_tokens: int  # of its largest micro-batch, padding included; of any rank
    loss: float


@dataclass(frozen=True)
class MemoryTaken:
    """What the ranks took at their peak, in bytes."""

    host: int  # of the host whose ranks took most, all its ranks together
    host_name: str
    host_total: int
    gpu: int | None  # by tensors, on the rank that took most; None: on CPUs
    gpu_total: int | None
    gpu_planned: int | None  # by tensors


@dataclass(frozen=True)
class DiskTaken:
    """The checkpoint that was written, and the room for more of them, in bytes."""

    checkpoint: int
    result: int  # of what is published at the end
    num_present: int  # checkpoints that are there already
    free: int


@dataclass(frozen=True)
class EvaluationTaken:
    """What a batch of the longest held-out sequences took, and how many a run has."""

    seconds_a_batch: float
    num_batches: int  # of a rank, in an evaluation
    num_evaluations: int  # that are to come

    @property
    def seconds(self) -> float:
        """Of all of them, at most."""
        return self.seconds_a_batch * self.num_batches * self.num_evaluations


@dataclass(frozen=True)
class DryRun:
    """A dry run, and what follows for the run."""

    launch: str  # how processes share memory, for people
    num_ranks: int
    num_samples: int
    num_files: int
    start_step: int  # that the run would go on from
    num_steps: int  # of the whole run
    save_steps: int
    save_total_limit: int | None
    stop_grace_s: float | None  # seconds from a signal to stop until the run is killed
    phases: dict[str, float]  # seconds of each, on rank 0
    steps: list[StepSeen]  # the first ones of the run; those after the first are timed
    longest: StepSeen  # the step with the longest micro-batch of the next epoch
    num_searched: int  # steps that were searched for it
    seconds_to_save: float
    seconds_to_read: float
    memory: MemoryTaken
    disk: DiskTaken
    evaluation: EvaluationTaken | None = None
    keeps_best: bool = False  # a checkpoint beside those that save_total_limit keeps
    steps_per_epoch: int | None = None  # where the end of each epoch is saved, too

    @property
    def timed(self) -> list[StepSeen]:
        """The steps that the time of the run is reckoned from: without the first, in which things are compiled."""
        return self.steps[1:] or self.steps

    @property
    def seconds_a_step(self) -> float:
        return sum(step.seconds for step in self.timed) / len(self.timed)

    @property
    def num_saves(self) -> int:
        """Checkpoints that the run has yet to write; the last step is always saved."""
        every = [self.save_steps, *([self.steps_per_epoch] if self.steps_per_epoch else [])]
        saved = {step for one in every for step in range(one, self.num_steps, one) if step > self.start_step}
        return len(saved) + 1

    @property
    def seconds_left(self) -> float:
        """Of steps, checkpoints and evaluations, without the start and the reading of data that steps waited for."""
        evaluating = self.evaluation.seconds if self.evaluation else 0.0
        steps = self.seconds_a_step * (self.num_steps - self.start_step)
        return steps + self.seconds_to_save * self.num_saves + evaluating

    @property
    def bytes_needed(self) -> int:
        """Room that the run will take beside what lies there: an old checkpoint goes once a new one is complete."""
        total = self.num_saves + self.disk.num_present
        most = total if self.save_total_limit is None else min(total, self.save_total_limit + 1 + self.keeps_best)
        return self.disk.checkpoint * max(0, most - self.disk.num_present) + self.disk.result

    @property
    def lacks_room(self) -> bool:
        return self.bytes_needed > self.disk.free

    @property
    def outlasts_grace(self) -> bool:
        """Whether a run that is asked to stop has no time to save."""
        return self.stop_grace_s is not None and self.seconds_to_save > self.stop_grace_s

    def to_json(self) -> dict[str, Any]:
        """All figures: bytes and seconds."""
        reckoned = ("seconds_a_step", "num_saves", "seconds_left", "bytes_needed", "lacks_room", "outlasts_grace")
        return asdict(self) | {"num_timed": len(self.timed)} | {name: getattr(self, name) for name in reckoned}

    def render(self) -> str:
        """A short table."""
        begun = f"from checkpoint-{self.start_step}" if self.start_step else "from the beginning"
        ranks = f"{self.num_ranks} ranks, {self.launch}" if self.num_ranks > 1 else self.launch
        head = f"dry run ({ranks}) {begun}: no weight was changed, and nothing is kept"
        lines = [(name, f"{seconds:8.1f} s") for name, seconds in self.phases.items()]
        lines += self._step_lines()
        num_bytes = size(self.disk.checkpoint)
        lines.append(("checkpoint", f"{self.seconds_to_save:8.1f} s  {num_bytes}, all ranks together"))
        if self.outlasts_grace:
            lines.append(("", f"MORE than train.stop_grace_s = {self.stop_grace_s:g}: asked to stop, the run has to"))
            lines.append(("", "leave without saving, and loses its steps since the last checkpoint"))
        lines.append(("  read back", f"{self.seconds_to_read:8.1f} s  the same bytes"))
        if self.evaluation:
            seconds = f"{self.evaluation.seconds_a_batch:8.1f} s  a batch of the longest sequences of data.eval"
            lines.append(("evaluation", seconds))
        lines += self._memory_lines()
        left = self.num_steps - self.start_step
        how = "the first left out, as it compiles" if len(self.steps) > 1 else "the first, which compiles"
        lines.append(
            (
                "the run",
                f"{_duration(self.seconds_left)}: {left:,} steps of {self.seconds_a_step:.2f} s "
                f"(from {len(self.timed)}; {how}) and {self.num_saves:,} x {self.seconds_to_save:.1f} s to save"
                + self._evaluations(),
            )
        )
        kept = "all" if self.save_total_limit is None else f"{self.save_total_limit}{' and the best' * self.keeps_best}"
        lines.append(
            (
                "disk",
                f"{size(self.bytes_needed)} more (save_total_limit keeps {kept}, one more while it is written, and the "
                f"result) of {size(self.disk.free)} free",
            )
        )
        width = max(len(name) for name, _ in lines)
        return "\n".join([head, *(f"  {name:<{width}}  {text}" for name, text in lines)])

    def _evaluations(self) -> str:
        """What evaluations add to the run, in words."""
        one = self.evaluation
        if one is None:
            return ""
        batches = f"{one.num_batches:,} batch{'es' * (one.num_batches > 1)}"
        return f", and at most {_duration(one.seconds)} for {one.num_evaluations:,} evaluations of {batches}"

    def _step_lines(self) -> list[tuple[str, str]]:
        """The steps that were run."""
        first, others = self.steps[0], self.steps[1:]
        lines = [(f"step {first.step}", f"{first.seconds:8.1f} s  loss {first.loss:.4f}, {first.num_tokens:,} tokens")]
        if others:
            numbers = f"step {others[0].step}" if len(others) == 1 else f"steps {others[0].step} to {others[-1].step}"
            tokens = sum(step.num_tokens for step in others) // len(others)
            lines.append((numbers, f"{self.seconds_a_step:8.1f} s  each, of {tokens:,} tokens"))
        one = self.longest
        lines.append(
            (
                f"step {one.step}",
                f"{one.seconds:8.1f} s  the longest micro-batch of {self.num_searched:,} steps: "
                f"{one.micro_batch_tokens:,} tokens",
            )
        )
        return lines

    def _memory_lines(self) -> list[tuple[str, str]]:
        """What GPU and host took."""
        memory = self.memory
        host = f"{size(memory.host)} of {size(memory.host_total)} on {memory.host_name}, all its ranks together"
        if memory.gpu is None or memory.gpu_total is None:
            return [("host memory", host)]
        planned = "" if memory.gpu_planned is None else f", planned {size(memory.gpu_planned)}"
        return [
            ("GPU memory", f"{size(memory.gpu)} of {size(memory.gpu_total)} in tensors{planned}"),
            ("host memory", host),
        ]


def _duration(seconds: float) -> str:
    """Of a run, for people."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
