"""Checkpoints: complete or absent.

A checkpoint is written under `.unfinished/` and moved to `checkpoint-<step>` when every rank is done, its marker
`complete.json` in place. So a folder of that name is whole, and a killed run finds the newest one by itself.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma_dist import world
from gemma_dist.errors import CheckpointError, ConfigError
from gemma_dist.report import log, write_json

MARKER = "complete.json"
UNFINISHED = ".unfinished"
_NAME = re.compile(r"checkpoint-\d+")
MEANING = {  # of what a run is bound to, where the name alone does not say it
    "manifest": "the corpus (manifest)",
    "num_samples": "its number of samples",
    "encoding": "its tokenizer, chat template or image processor (fingerprint)",
    "weights": "the weights of data.train",
    "optim": "train.optim",
    "optimizer": "the state of this train.optim, which only the same ranks can read back,",
}


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str, state: dict[str, Any]) -> tuple[Path | None, int]:
    """The checkpoint to go on from and its step, or (None, 0) for a fresh run.

    Args:
        resume_from_checkpoint: `auto` (the newest in `output_dir`), `never`, or a folder.
        state: what a checkpoint must have been made with to be continued: manifest, seed, global batch …

    Raises:
        CheckpointError: the named folder is no complete checkpoint, or was made with another `state`; or `output_dir`
            has later ones, which would be taken for those of this run.
    """
    complete = [folder for folder in _checkpoints(output_dir) if (folder / MARKER).is_file()]
    if resume_from_checkpoint == "never" or (resume_from_checkpoint == "auto" and not complete):
        folder, step = None, 0
    elif resume_from_checkpoint == "auto":
        folder = complete[-1]
        step = _bound_step(folder, state)
    else:
        folder = Path(resume_from_checkpoint)
        if not (folder / MARKER).is_file():
            raise CheckpointError(
                f"train.resume_from_checkpoint = {str(folder)!r}: no complete checkpoint is there ({MARKER} is "
                "missing); name a folder checkpoint-<step>, or leave it at auto"
            )
        step = _bound_step(folder, state)
    if later := [path.name for path in complete if _step(path) > step]:
        raise CheckpointError(
            f"train.output_dir = {str(output_dir)!r} holds {', '.join(later)}, later than step {step}, which this run "
            "starts from; a run started again would go on from there. Move them away, or name another folder"
        )
    return folder, step


def require_one_start(start_step: int) -> None:
    """Raises CheckpointError on every rank, of which all call it, unless all of them start from the same step."""
    if len(set(found := world.gather_objects(start_step))) > 1:
        raise CheckpointError(
            f"the ranks found checkpoints of different steps, {found}; train.output_dir must be one folder that all "
            "nodes share"
        )


def _bound_step(folder: Path, state: dict[str, Any]) -> int:
    """The step of a complete checkpoint. CheckpointError where it was made with another `state`."""
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    changed = [
        f"{MEANING.get(key, key)} was {marker['state'].get(key)!r} and is now {value!r}"
        for key, value in state.items()
        if marker["state"].get(key) != value
    ]
    if changed:
        raise CheckpointError(
            f"{folder} belongs to another run: {'; '.join(changed)}. Restore that, or start afresh with another "
            "train.output_dir"
        )
    return marker["step"]


@contextlib.contextmanager
def alone_in(output_dir: Path) -> Iterator[None]:
    """Within, no other run writes to `output_dir`: the ranks of a killed launcher may still be at work there.

    Rank 0 locks the folder itself, which leaves no file behind and ends with the process. File systems without such
    locks go without.

    Raises:
        ConfigError: another run has it.
    """
    if world.rank() != 0:
        yield
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    folder = os.open(output_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"train.output_dir = {str(output_dir)!r}: another run is at work there; wait for it, or end all its "
                "ranks (`kill -9` of a launcher leaves them), or name another folder"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(folder)


def begin(output_dir: Path) -> Path:
    """An empty folder to write a checkpoint into, the same for all ranks."""
    unfinished = output_dir / UNFINISHED
    if world.rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    world.barrier()
    return unfinished


def finish(output_dir: Path, step: int, epoch: int, state: dict[str, Any], *, save_total_limit: int | None) -> None:
    """Mark what was written since `begin`, move it to its name, and remove the oldest beyond `save_total_limit`."""
    world.barrier()  # every rank has written its part
    if world.rank() == 0:
        name = f"checkpoint-{step}"
        write_json(output_dir / UNFINISHED / name / MARKER, {"step": step, "epoch": epoch, "state": state})
        shutil.rmtree(output_dir / name, ignore_errors=True)
        (output_dir / UNFINISHED / name).rename(output_dir / name)
        shutil.rmtree(output_dir / UNFINISHED)
        log.info("saved %s", output_dir / name)
        if save_total_limit is not None:
            for old in _checkpoints(output_dir)[:-save_total_limit]:
                (old / MARKER).unlink(missing_ok=True)  # no longer complete, should the removal be interrupted
                shutil.rmtree(old)
    world.barrier()


def _checkpoints(output_dir: Path) -> list[Path]:
    """The folders checkpoint-<step>, complete or not, by step; `checkpoint-30-mine` is none."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))
