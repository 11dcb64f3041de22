"""What a run says while it works: one logger, one progress bar, one line a step, and the same numbers in a file.

Rank 0 speaks, every rank warns.
"""

import json
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gemma_dist import world
from gemma_dist.files import begin, naming, unfollowed, writing
from gemma_dist.visible import ShownFormatter, shown, visible_json

T = TypeVar("T")

log = logging.getLogger("gemma_dist")


def start_logging() -> None:
    """Send the package's messages to stderr: informative ones from rank 0, warnings from every rank with its number."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"[rank {world.rank()}] " if world.world_size() > 1 else ""
    handler.setFormatter(ShownFormatter(f"{prefix}%(message)s"))
    handler.setLevel(logging.INFO if world.rank() == 0 else logging.WARNING)
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False

    def take(record: logging.LogRecord) -> bool:
        if record.levelno >= handler.level:
            handler.handle(record)
        return False

    # DeepSpeed's own handler writes to stdout, which is for what a command prints: a line of JSON, say.
    logging.getLogger("DeepSpeed").filters[:] = [take]
    # On a CPU it proposes a package that would fetch code from the hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries about their own next release


def say_idle_gpus(words: Sequence[object]) -> None:
    """Where one process sees several GPUs, it takes the first: say so, and how all of them run `gemma-dist WORDS…`."""
    import torch

    num_gpus = torch.cuda.device_count()
    if world.world_size() == 1 and num_gpus > 1:
        log.info(
            "%d GPUs are visible, and one process takes the first alone. On all of them:\n"
            "    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes %d -m gemma_dist %s",
            num_gpus,
            num_gpus,
            shlex.join(map(str, words)),
        )


def progress(items: Iterable[T], *, total: int | None, desc: str, unit: str) -> Generator[T, None, None]:
    """Go through `items` with a bar on rank 0; without a terminal, a line every 30 seconds instead of a live bar.

    The bar ends its line when it is closed: close it where an error may follow.
    """
    from tqdm import tqdm

    live = sys.stderr.isatty()
    yield from tqdm(
        items,
        total=total,
        desc=shown(desc),
        unit=unit,
        disable=world.rank() != 0,
        mininterval=0.1 if live else 30,
        file=sys.stderr,
        dynamic_ncols=live,
    )


class JsonlWriter:
    """A file of one JSON object a line, flushed at each, so that a killed run keeps every line it wrote."""

    def __init__(self, path: Path, *, append: bool, flushes: bool = True) -> None:
        """Make the file and its folder; what an existing file holds is lost unless `append`. One of which a killed run
        keeps nothing need not be flushed at each line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._flushes = path, flushes
        if not append:
            begin(path)
        self._file = open(path, "a", encoding="utf-8", opener=unfollowed)  # noqa: SIM115 (closed by `close`)

    def write(self, row: Mapping[str, object]) -> None:
        """Add a line. OSError, with the file's name, where the disk refuses it."""
        self.write_line(to_json(row))

    def write_line(self, line: str) -> None:
        """As `write`, of JSON that is written already."""
        with naming(self._path):
            self._file.write(line + "\n")
            if self._flushes:
                self._file.flush()

    def close(self) -> None:
        with naming(self._path):  # a full disk may only be told now
            self._file.close()


def read_jsonl(path: Path) -> Iterator[Any]:
    """The values of a file of one JSON text a line, as `JsonlWriter` writes them.

    Raises:
        ValueError: a line is not JSON in UTF-8.
    """
    with path.open("rb") as file:  # as bytes: lines end at \n alone, not at the other line ends of Unicode
        for line in file:
            yield json.loads(line)


def read_steps(path: Path) -> list[Any]:
    """The rows of a `metrics.jsonl`. A line that is none, as a power failure leaves it, is told and left out; of a file
    without any row nothing is told."""
    rows, damaged = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            row = json.loads(line) if line else None
        except ValueError:
            row = {}
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif row is not None:
            damaged.append(number)
    for number in damaged if rows else ():
        log.warning("%s line %d is damaged and was left out", path, number)
    return rows


class RunLog:
    """The progress of a training run: one line a step on rank 0's terminal, the same numbers in `metrics.jsonl`."""

    def __init__(
        self,
        path: Path,
        *,
        start_step: int,
        num_steps: int,
        evaluates_anew: bool = False,
        figures: Callable[[range, float], Mapping[str, float]] = lambda steps, seconds: {},
    ) -> None:
        """A run that resumes at `start_step` drops the lines behind it: those steps are done again; and where it
        `evaluates_anew` there, the line of an evaluation, which ended before its checkpoint was complete.

        Args:
            figures: what is to be said besides of steps (from 0) that took so many seconds: any of `memory_gib`,
                `memory_planned_gib` and `mfu`, a share.
        """
        self._num_steps, self._figures = num_steps, figures
        self._file = None
        if world.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = read_steps(path) if start_step and path.is_file() else ()
            kept = [
                to_json(row) + "\n"
                for row in rows
                if row["step"] < start_step
                or (row["step"] == start_step and not (evaluates_anew and "eval_runtime" in row))
            ]
            with writing(path) as temporary:
                temporary.write_text("".join(kept), "utf-8")
            self._file = JsonlWriter(path, append=True)
        self._before = time.perf_counter()
        self._last_step, self._num_written, self._seconds_a_step = start_step, 0, 0.0

    def _left(self, step: int, seconds: float) -> str:
        """About how long the steps after this one will take, from those so far: the later, the more they count. The
        first one, which compiles and fills caches, counts until there is another."""
        of_these = seconds / max(1, step - self._last_step)
        keep = 0.0 if self._num_written < 2 else 0.9
        self._seconds_a_step = keep * self._seconds_a_step + (1 - keep) * of_these
        self._last_step, self._num_written = step, self._num_written + 1
        return duration((self._num_steps - step) * self._seconds_a_step)

    def write(self, step: int, values: Mapping[str, Any], *, num_tokens: int) -> dict[str, float]:
        """One step, or several where logging_steps says so: `num_tokens` is how many went through the model since.
        Returns what was reckoned of their time: `tokens_per_s`, and the `figures`."""
        now = time.perf_counter()
        seconds, self._before = now - self._before, now
        more = {
            "tokens_per_s": round(num_tokens / seconds, 1),
            **self._figures(range(self._last_step, step), seconds),
        }
        left = self._left(step, seconds)
        if self._file is not None:
            self._file.write({"step": step, **values, "tokens": num_tokens, **more, "seconds": round(seconds, 3)})
            kinds = [(name.removeprefix("loss_"), value) for name, value in values.items() if name.startswith("loss_")]
            log.info(
                "step %*d/%d  loss %7.4f  entropy %6.4f  accuracy %.3f  grad %7.3f  lr %.2e  %7d tokens  %8.0f tokens/s"
                " (%.0f trained)%s  %6.2f s  %s left  (%s)",
                len(str(self._num_steps)),
                step,
                self._num_steps,
                values["loss"],
                values["entropy"],
                values["token_accuracy"],
                values["grad_norm"],
                values["learning_rate"],
                num_tokens,
                num_tokens / seconds,
                values.get("target_tokens", 0) / seconds,
                _of_the_gpu(more),
                seconds,
                left,
                ", ".join(f"{name} {value:.3f}" for name, value in kinds),
            )
        return more

    def write_evaluation(self, step: int, values: Mapping[str, Any], seconds: float) -> None:
        """An evaluation after `step`, which took so many seconds: they are none of the next step's."""
        self._before += seconds
        if self._file is not None:
            self._file.write({"step": step, **values, "eval_runtime": round(seconds, 3)})
            shown = {name.removeprefix("eval_"): value for name, value in values.items() if isinstance(value, float)}
            kinds = [(name.removeprefix("loss_"), value) for name, value in shown.items() if name.startswith("loss_")]
            log.info(
                "evaluation after step %*d/%d  loss %7.4f  accuracy %.3f  %7d tokens  %6.2f s  (%s)",
                len(str(self._num_steps)),
                step,
                self._num_steps,
                shown.get("loss", float("nan")),
                shown["token_accuracy"],
                values["eval_target_tokens"],
                seconds,
                ", ".join(f"{name} {value:.3f}" for name, value in kinds),
            )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _of_the_gpu(figures: Mapping[str, float]) -> str:
    """`figures` of a step as its line has them: speed, and memory beside what was planned."""
    told = f"  MFU {figures['mfu']:.1%}" if "mfu" in figures else ""
    if "memory_gib" in figures:
        planned = f" of {figures['memory_planned_gib']:.1f} planned" if "memory_planned_gib" in figures else ""
        told += f"  {figures['memory_gib']:.1f} GiB{planned}"
    return told


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 3 h 05 min, 2 d 4 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def to_json(value: object, *, indent: int | None = None) -> str:
    """`value` as JSON that UTF-8 can encode, that no reader of lines tears, and in which no sign is hidden from who
    looks at it, whatever its strings hold."""
    return visible_json(json.dumps(value, ensure_ascii=False, indent=indent))


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON to `path`, complete or not at all."""
    with writing(path) as temporary:
        temporary.write_text(to_json(value, indent=2) + "\n", encoding="utf-8")
