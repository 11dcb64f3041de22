"""Which checkpoint is the best: the one whose evaluation says so, of those that are there.

    OUT/checkpoint-<step>/evaluation.json    what was found when it was written, if it was evaluated
    OUT/best.json                            the best of them, for people and scripts: written anew with each of them

Nothing else remembers it. So it is the same after a restart, for another metric, and in a folder that was moved.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from gemma_dist.logs import log, write_json
from gemma_dist.resolve import Run

EVALUATION = "evaluation.json"  # in a checkpoint
BEST = "best.json"


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
        is_ours = evaluation.get("data") == run.held_out.identity and (path.parent / "complete.json").is_file()
        if is_ours and isinstance(value, float | int):
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


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
