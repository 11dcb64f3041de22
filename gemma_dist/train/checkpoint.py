"""Checkpoints: complete or absent.

A checkpoint is written under `.unfinished/` and moved to `checkpoint-<step>` when every rank is done, its marker
`complete.json` in place. So a folder of that name is whole, and a killed run finds the newest one by itself.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma_dist import world
from gemma_dist.config import RunConfig
from gemma_dist.errors import CheckpointError, ConfigError, PeerError
from gemma_dist.files import exclusive
from gemma_dist.logs import log, write_json

MARKER = "complete.json"
UNFINISHED = ".unfinished"
_NAME = re.compile(r"checkpoint-\d+")
MEANING = {  # of what a run is bound to, where the name alone does not say it
    "manifest": "the corpus (manifest)",
    "num_samples": "its number of samples",
    "base_config_hash": "the base model (hash of its config.json)",
    "base_weights_hash": "the base model (hash of its weights)",
    "dtype": "model.dtype",
    "four_bit": "quantization",
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
            has later ones, complete or not, which would be taken for those of this run, or be in its way.
    """
    complete = _complete(output_dir)
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
    if later := [path.name for path in _checkpoints(output_dir) if _step(path) > step and any(path.iterdir())]:
        raise CheckpointError(
            f"train.output_dir = {str(output_dir)!r} holds {', '.join(later)}, later than step {step}, which this run "
            "starts from; a run started again would go on from there. Move them away, or name another folder"
        )
    return folder, step


def require_folder(config: RunConfig) -> None:
    """Raises ConfigError where train.output_dir is a file, cannot become a folder, or holds the base or the shards."""
    output_dir = config.train.output_dir
    problem = f"train.output_dir = {str(output_dir)!r}"
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"{problem}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{problem}: nothing may be written to {existing}; name another folder")
    sources = [source if isinstance(source, str) else source.path for source in config.data.train]
    for place in (config.model.model_name_or_path, *sources):
        if Path(place).is_dir() and Path(place).resolve() == output_dir.resolve():
            raise ConfigError(f"{problem}: the run reads from that folder ({place}); name one of its own")


def changed_settings(folder: Path, config: RunConfig) -> list[str]:
    """What of `config` differs from the settings of the run that saved the checkpoint `folder`, in words."""
    then = _flat(json.loads((folder / MARKER).read_text(encoding="utf-8")).get("settings", {}))
    now = _flat(config.to_json())
    return [
        f"{key} {json.dumps(then.get(key))} -> {json.dumps(now.get(key))}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


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
def saving(output_dir: Path, step: int, config: RunConfig, epoch: int, state: dict[str, Any]) -> Iterator[Path]:
    """Gives the folder that all ranks write checkpoint `step` into. At the end it is marked and moved to its name, and
    the oldest checkpoints beyond `train.save_total_limit` are removed.

    Raises:
        CheckpointError: on the rank that could not write.
        PeerError: on the others.
    """
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
            _finish(folder, output_dir / folder.name, config, {"step": step, "epoch": epoch, "state": state})


def _finish(written: Path, folder: Path, config: RunConfig, marker: dict[str, Any]) -> None:
    """Mark the checkpoint that all ranks have `written`, and let it be `folder`."""
    write_json(written / MARKER, marker | {"settings": config.to_json()})
    written.rename(folder)  # at most an empty folder lies there: see `find_checkpoint`
    log.info("saved %s", folder)
    if config.train.save_total_limit is not None:
        for old in _complete(folder.parent)[: -config.train.save_total_limit]:
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
    return int(folder.name.removeprefix("checkpoint-"))
