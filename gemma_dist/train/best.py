"""Which checkpoint is the best: the one whose evaluation says so, of those that are there.

    OUT/checkpoint-<step>/evaluation.json    what was found when it was written, if it was evaluated
    OUT/best.json                            the best of them, for people and scripts: written anew with each of them

Nothing else remembers it. So it is the same after a restart, for another metric, and in a folder that was moved.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from gemma_dist import world
from gemma_dist.data.encode import Encoder
from gemma_dist.data.kinds import KINDS
from gemma_dist.data.strict import error_context
from gemma_dist.errors import ConfigError
from gemma_dist.logs import log, write_json
from gemma_dist.resolve import Run
from gemma_dist.stream.order import lanes_of

EVALUATION = "evaluation.json"  # in a checkpoint
BEST = "best.json"
NAME = re.compile(r"checkpoint-\d+")  # of a checkpoint; `checkpoint-30-mine` is none


class Evaluated(NamedTuple):
    """A checkpoint with its value of the metric."""

    folder: Path
    step: int
    value: float


def best_checkpoint(run: Run) -> Evaluated | None:
    """The best of the complete checkpoints of `run` that were evaluated on its data.eval, the earliest of equals; None:
    there is none, or it asks for none."""
    settings = run.config.train
    name = settings.best_metric
    if name is None or run.held_out is None:
        return None
    found = []
    for path in settings.output_dir.glob(f"checkpoint-*/{EVALUATION}"):
        evaluation = _read(path)
        value = evaluation.get(name)
        is_whole = NAME.fullmatch(path.parent.name) is not None and (path.parent / "complete.json").is_file()
        if is_whole and evaluation.get("data") == run.held_out.identity and isinstance(value, float | int):
            found.append(Evaluated(path.parent, int(evaluation["step"]), value))
    sign = -1 if settings.best_is_greatest else 1
    return min(found, key=lambda one: (sign * one.value, one.step), default=None)


def note_best(run: Run) -> Path | None:
    """Write best.json, or remove it where nothing is the best. Returns the best checkpoint. For rank 0 alone."""
    settings = run.config.train
    best = best_checkpoint(run)
    path = settings.output_dir / BEST
    if best is None:
        path.unlink(missing_ok=True)
        return None
    told: dict[str, Any] = {"checkpoint": best.folder.name, "step": best.step, "metric": settings.best_metric}
    told |= {"value": best.value, "greater_is_better": settings.best_is_greatest}
    if not path.is_file() or _read(path) != told:
        write_json(path, told)
        log.info("the best so far by %s: %s (%.4f)", settings.best_metric, best.folder.name, best.value)
    return best.folder


def require_metric(run: Run, encoder: Encoder) -> None:
    """Look, before anything is trained, whether data.eval has what the best checkpoint is asked for by. Every rank
    calls it, and reads of its share of the samples as many as it takes to find one with tokens of that kind.

    Raises:
        ConfigError: on every rank; there are none.
        DataError: a sample cannot be read.
    """
    name, held_out = run.config.train.best_metric, run.held_out
    wanted = next((kind for kind, word in KINDS.items() if name == f"eval_loss_{word}"), None)
    if held_out is None or wanted is None:
        return
    found: set[int] = set()
    for number in lanes_of(world.rank(), world.world_size(), len(held_out.samples)):
        sample = held_out.samples[number]
        with error_context(held_out.shards.place(sample)):
            found |= set(encoder.encode(held_out.shards.read(sample)).kinds)
        if wanted in found:
            break
    found = set().union(*world.gather_objects(sorted(found)))
    if wanted not in found:
        others = ["eval_loss", *(f"eval_loss_{word}" for kind, word in KINDS.items() if kind in found)]
        raise ConfigError(
            f"train.metric_for_best_model: {name}, but the {len(held_out.samples):,} samples of data.eval that are "
            f"evaluated have no tokens of that kind; name one of {', '.join(others)}"
        )


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
