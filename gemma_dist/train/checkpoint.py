"""Checkpoints: complete or absent.

A checkpoint is written under `.unfinished/` and moved to `checkpoint-<step>` when every rank is done, its marker
`complete.json` in place. So a folder of that name is whole, and a killed run finds the newest one by itself.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_dist import world
from gemma_dist.config import RunConfig
from gemma_dist.errors import CheckpointError, PeerError
from gemma_dist.files import exclusive, seal, sync
from gemma_dist.logs import log, write_json
from gemma_dist.resolve import Run, RunIdentity

MARKER = "complete.json"
UNFINISHED = ".unfinished"
_NAME = re.compile(r"checkpoint-\d+")


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str, identity: RunIdentity) -> tuple[Path | None, int]:
    """The checkpoint to resume from and its step, or (None, 0) for a fresh run.

    Args:
        resume_from_checkpoint: `auto` (the newest in `output_dir`), `never`, or a folder.
        identity: what a checkpoint must have been made with.

    Raises:
        CheckpointError: the named folder is no complete checkpoint, or belongs to another identity; or `output_dir`
            has later ones, complete or not, which would be taken for those of this run, or be in its way.
    """
    folder = None
    if resume_from_checkpoint == "auto":
        complete = _complete(output_dir)
        folder = complete[-1] if complete else None
    elif resume_from_checkpoint != "never":
        folder = Path(resume_from_checkpoint)
        if not (folder / MARKER).is_file():
            raise CheckpointError(
                f"train.resume_from_checkpoint = {str(folder)!r}: no complete checkpoint is there ({MARKER} is "
                "missing); name a folder checkpoint-<step>, or leave it at auto"
            )
    step = _step_of(folder, identity) if folder else 0
    if later := [path.name for path in _checkpoints(output_dir) if _step(path) > step and any(path.iterdir())]:
        raise CheckpointError(
            f"train.output_dir = {str(output_dir)!r} holds {', '.join(later)}, later than step {step}, which this run "
            "starts from; a restart would resume from there. Move them away, or name another folder"
        )
    return folder, step


def changed_settings(folder: Path, config: RunConfig) -> list[str]:
    """What of `config` differs from the settings of the run that saved the checkpoint `folder`, in words."""
    then = _flat(read_marker(folder)["settings"])
    now = _flat(config.to_json())
    changed = []
    for key in sorted(then.keys() | now.keys()):
        before, after = then.get(key), now.get(key)
        if before != after:
            changed.append(f"{key} {json.dumps(before)} -> {json.dumps(after)}")
    return changed


def _flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Settings by their dotted keys."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def require_same_start(start_step: int) -> None:
    """Raises CheckpointError on every rank, of which all call it, unless all of them start from the same step."""
    if len(set(found := world.gather_objects(start_step))) > 1:
        raise CheckpointError(
            f"the ranks found checkpoints of different steps, {found}; train.output_dir must be one folder that all "
            "nodes share"
        )


def _step_of(folder: Path, identity: RunIdentity) -> int:
    """The step of a complete checkpoint. CheckpointError where it belongs to a run of another identity."""
    marker = read_marker(folder)
    if different := identity.differences(marker["identity"]):
        raise CheckpointError(
            f"{folder} belongs to another run: {'; '.join(different)}. Restore that, or start afresh with another "
            "train.output_dir"
        )
    return marker["step"]


def read_marker(folder: Path) -> dict[str, Any]:
    """What `complete.json` of a checkpoint says: step, epoch, identity and settings of the run that saved it."""
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    # Earlier versions called the identity state, and had less in it.
    return {"identity": marker.get("state", {}), "settings": {}} | marker


@contextlib.contextmanager
def lock_output_dir(output_dir: Path) -> Iterator[None]:
    """Within, no other run writes to `output_dir`: the ranks of a killed launcher may still be at work there.

    Rank 0 locks the folder (`files.exclusive`).

    Raises:
        ConfigError: another run has it.
    """
    if world.rank() != 0:
        yield
        return
    problem = (
        f"train.output_dir = {str(output_dir)!r}: another run is at work there; wait for it, or end all its ranks "
        "(`kill -9` of a launcher leaves them), or name another folder"
    )
    with exclusive(output_dir, problem):
        yield


@contextlib.contextmanager
def saving(run: Run, step: int) -> Iterator[Path]:
    """Gives the folder that all ranks write checkpoint `step` into. At the end it is marked and moved to its name, and
    the oldest checkpoints beyond `train.save_total_limit` are removed.

    Raises:
        CheckpointError: on the rank that could not write.
        PeerError: on the others.
    """
    output_dir = run.config.train.output_dir
    unfinished = output_dir / UNFINISHED
    folder = unfinished / f"checkpoint-{step}"
    with _together(output_dir, step):
        if world.rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
    with _together(output_dir, step):
        yield folder
    with _together(output_dir, step):
        if world.rank() == 0:
            _finish(folder, run, step)


def _finish(written: Path, run: Run, step: int) -> None:
    """Mark the checkpoint that all ranks have `written`, and give it its name."""
    marker = {
        "step": step,
        "epoch": step // run.schedule.steps_per_epoch,
        "identity": run.identity.to_json(),
        "settings": run.config.to_json(),
    }
    write_json(written / MARKER, marker)
    seal(written)
    folder = run.config.train.output_dir / written.name
    written.rename(folder)  # at most an empty folder lies there: see `find_checkpoint`
    sync(folder.parent)
    log.info("saved %s", folder)
    if (limit := run.config.train.save_total_limit) is not None:
        for old in _complete(folder.parent)[:-limit]:
            old.rename(written.parent / old.name)  # removed with it, now or by the next save
    shutil.rmtree(written.parent)


@contextlib.contextmanager
def _together(output_dir: Path, step: int) -> Iterator[None]:
    """Ends on all ranks at once, and where one of them could not write, with an error on all of them."""
    problem = None
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers write with Rust, whose errors are not OSErrors.
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        problem = error
    free = shutil.disk_usage(output_dir).free / 1e9 if output_dir.exists() else 0
    (failed,) = world.any_rank([problem is not None])
    if failed and world.rank() == 0:
        shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)  # it takes the room that is wanting
    if problem is not None:
        raise CheckpointError(
            f"train.output_dir = {str(output_dir)!r}: rank {world.rank()} could not write the checkpoint of step "
            f"{step}: {problem} ({free:.1f} GB are free there). Earlier checkpoints are whole: make room (a lower "
            "train.save_total_limit keeps fewer of them), and the same command resumes from the newest"
        ) from problem
    if failed:
        raise PeerError(f"another rank could not write the checkpoint of step {step}")


def _complete(output_dir: Path) -> list[Path]:
    """The checkpoints that this package finished, by step. Those of other tools have no marker."""
    return [folder for folder in _checkpoints(output_dir) if (folder / MARKER).is_file()]


def _checkpoints(output_dir: Path) -> list[Path]:
    """The folders checkpoint-<step>, complete or not, by step; `checkpoint-30-mine` is none."""
    named = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=_step)


def _step(folder: Path) -> int:
    """The step in a checkpoint's name: 30 for `checkpoint-30`."""
    return int(folder.name.removeprefix("checkpoint-"))
