"""Checkpoints: complete or absent.

A checkpoint is written under `.unfinished/` and moved to `checkpoint-<step>` when every rank is done, its marker
`complete.json` in place. So a folder of that name is whole, and a killed run finds the newest one by itself. What a
disk damages afterwards is found by the checksums in the marker: such a checkpoint is put aside, and the one before it
taken.
"""

import contextlib
import errno
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_dist import world
from gemma_dist.config import RunConfig
from gemma_dist.errors import CheckpointError, PeerError, shortened
from gemma_dist.files import seal, size, sync
from gemma_dist.logs import log, write_json
from gemma_dist.resolve import Run, RunIdentity
from gemma_dist.stream.growth import CORPUS, has_grown, is_corpus, remember
from gemma_dist.train.best import NAME, note_best
from gemma_dist.train.digests import (
    UNREADABLE,
    FileDigest,
    damage,
    digest_files,
    json_crc32,
    require_digests,
    visible_damage,
)
from gemma_dist.visible import masked_in

MARKER = "complete.json"
UNFINISHED = ".unfinished"


def find_checkpoint(
    output_dir: Path, resume_from_checkpoint: str, identity: RunIdentity, run: Run | None = None
) -> tuple[Path | None, int]:
    """The checkpoint to resume from and its step, or (None, 0) for a fresh run. Nothing is changed on the disk: the
    ranks look one by one, before they are connected.

    Args:
        resume_from_checkpoint: `auto` (the newest in `output_dir` without damage in sight), `never`, or a folder.
        identity: what a checkpoint must have been made with.
        run: whose corpus may have been added to since, if it is given.

    Raises:
        CheckpointError: the named folder is no complete checkpoint, or damaged, or belongs to another identity; or
            `output_dir` has later ones, complete or not, which would be taken for those of this run, or be in its way.
    """
    folder, auto = None, resume_from_checkpoint == "auto"
    if auto:
        folder = next((one for one in reversed(_complete(output_dir)) if not _damage_at_sight(one)), None)
    elif resume_from_checkpoint != "never":
        folder = Path(resume_from_checkpoint)
        if not (folder / MARKER).is_file():
            raise CheckpointError(
                f"train.resume_from_checkpoint = {str(folder)!r}: no complete checkpoint is there ({MARKER} is "
                "missing); name a folder checkpoint-<step>, or leave it at auto"
            )
        if problems := _damage_at_sight(folder):
            raise CheckpointError(damaged_and_named(folder, problems))
    step = _step_of(folder, identity, run) if folder else 0
    later = [path for path in _checkpoints(output_dir) if _step(path) > step and any(path.iterdir())]
    if auto:
        later = [path for path in later if not (path / MARKER).is_file()]  # damaged: they are going to be put aside
    if names := [path.name for path in later]:
        raise CheckpointError(
            f"train.output_dir = {str(output_dir)!r} holds {', '.join(names)}, later than step {step}, which this run "
            "starts from; a restart would resume from there. Move them away, or name another folder"
        )
    return folder, step


def whole_checkpoint(
    folder: Path | None,
    output_dir: Path,
    resume_from_checkpoint: str,
    identity: RunIdentity,
    run: Run | None = None,
) -> tuple[Path | None, int]:
    """The checkpoint `folder`, which `find_checkpoint` found, and its step, once its files are read and found whole;
    else those of the newest that is whole. Damaged ones are put aside. Every rank reads a share, and calls it.

    Raises:
        CheckpointError: the damaged one was named by the user; the ranks found checkpoints of different steps; or what
            `find_checkpoint` raises.
    """
    while True:
        marker: dict[str, Any] = read_marker(folder) if folder else {"step": 0, "files": {}}
        step, files = marker["step"], sorted(marker["files"].items())
        require_same_start(step)
        if world.rank() == 0 and resume_from_checkpoint == "auto":
            for later in [path for path in _complete(output_dir) if _step(path) > step]:
                if problems := _damage_at_sight(later):
                    put_aside(later, problems)
        problems = damage(folder, dict(files[world.rank() :: world.world_size()])) if folder else []
        problems = [problem for of_rank in world.gather_objects(problems) for problem in of_rank]
        if not problems:
            return folder, step
        assert folder is not None, "nothing is damaged"
        if resume_from_checkpoint != "auto":
            raise CheckpointError(damaged_and_named(folder, problems))
        if world.rank() == 0:
            put_aside(folder, problems)
        world.barrier()
        folder, _ = find_checkpoint(output_dir, resume_from_checkpoint, identity, run)


def put_aside(folder: Path, problems: list[str]) -> None:
    """Give a damaged checkpoint a name under which no run takes it, and say what is damaged. For rank 0 alone."""
    aside = _free_name(folder.with_name(f"damaged-{folder.name}"))
    folder.rename(aside)
    log.warning("%s is damaged: %s. It is put aside as %s", folder, "; ".join(problems), aside.name)


def _free_name(path: Path) -> Path:
    """`path`, or the first of `path`-2, `path`-3, … that nothing has."""
    names = [path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 1000))]
    return next(name for name in names if not name.exists())


def _damage_at_sight(folder: Path) -> list[str]:
    """What is damaged of a checkpoint, as far as its marker and the sizes of its files show it."""
    return damage_of(folder, visible_damage)


def damage_of(folder: Path, look: Callable[[Path, Mapping[str, FileDigest]], list[str]] = damage) -> list[str]:
    """What is damaged of a checkpoint, its marker included, in words; its files as `look` sees them."""
    try:
        return look(folder, read_marker(folder)["files"])
    except CheckpointError as error:
        return [str(error)]
    except OSError as error:
        if error.errno not in UNREADABLE:  # such as a folder of another user
            raise
        return [f"{MARKER} cannot be read ({error.strerror})"]


def damaged_and_named(folder: Path, problems: list[str]) -> str:
    """What to say of a damaged checkpoint that the user named."""
    return (
        f"train.resume_from_checkpoint = {str(folder)!r} is damaged: {'; '.join(problems)}. Restore it from a copy, or "
        "name another one; auto takes the newest that is whole"
    )


def changed_settings(folder: Path, config: RunConfig) -> list[str]:
    """What of `config` differs from the settings of the run that saved the checkpoint `folder`, in words."""
    then = flat(masked_in(read_marker(folder)["settings"]))  # an earlier version wrote credentials down
    now = flat(config.to_json())
    changed = []
    for key in sorted(then.keys() | now.keys()):
        before, after = then.get(key), now.get(key)
        if before != after:
            changed.append(f"{key} {shortened(json.dumps(before))} -> {shortened(json.dumps(after))}")
    return changed


def flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Settings by their dotted keys."""
    found: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def require_same_start(start_step: int) -> None:
    """Raises CheckpointError on every rank, of which all call it, unless all of them start from the same step."""
    if len(set(found := world.gather_objects(start_step))) > 1:
        raise CheckpointError(
            f"the ranks found checkpoints of different steps, {found}; train.output_dir must be one folder that all "
            "nodes share"
        )


def require_shared(output_dir: Path) -> None:
    """Raises CheckpointError on every rank, of which all call it, unless all of them see the same files in
    `output_dir`: else no checkpoint of theirs would ever be whole."""
    mark = output_dir / f".{world.gather_objects(uuid.uuid4().hex)[0]}"  # of rank 0
    try:
        if world.rank() == 0:
            mark.touch()
        world.barrier()
        seen = world.gather_objects(mark.exists())
    finally:
        if world.rank() == 0:
            mark.unlink(missing_ok=True)
    if blind := [rank for rank, sees in enumerate(seen) if not sees]:
        raise CheckpointError(
            f"train.output_dir = {str(output_dir)!r}: what rank 0 writes there is not seen by rank "
            f"{', '.join(map(str, blind))}; it must be one folder that all nodes share"
        )


def _step_of(folder: Path, identity: RunIdentity, run: Run | None) -> int:
    """The step of a complete checkpoint. CheckpointError where it belongs to a run of another identity, or its corpus
    was added to and `run` does not take that up."""
    marker = read_marker(folder)
    saved = marker["identity"]
    if run is not None and has_grown(marker, run.schedule.shards):
        if run.config.data.appended == "refuse":
            raise CheckpointError(
                f"{folder}: data.train was added to since: it had {saved.get('num_samples'):,} samples and has "
                f"{identity.num_samples:,}. Set data.appended: next_epoch to take the new ones up at the next epoch of "
                "their source, or put the manifest of then in its place"
            )
        saved = saved | {"manifest": identity.manifest, "num_samples": identity.num_samples}
    if different := identity.differences(saved, marker["step"]):
        raise CheckpointError(
            f"{folder} belongs to another run: {'; '.join(different)}. Restore that, or start afresh with another "
            "train.output_dir"
        )
    return marker["step"]


def read_marker(folder: Path) -> dict[str, Any]:
    """What `complete.json` of a checkpoint says: step, epoch, identity and settings of the run that saved it, and the
    sizes and checksums of its files.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / MARKER
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path.name} is damaged: it is no JSON") from None
    if not isinstance(marker, dict) or type(marker.get("step")) is not int:
        raise CheckpointError(f"{path.name} is damaged: it names no step")
    if "crc32" in marker and marker["crc32"] != json_crc32(marker | {"crc32": 0}):
        raise CheckpointError(f"{path.name} is damaged: it says something else than was written (its CRC-32 differs)")
    # Earlier versions called the identity state, had less in it, and no checksums.
    marker = {"identity": marker.get("state", {}), "settings": {}, "files": {}} | marker
    for name in ("identity", "settings"):
        if not isinstance(marker[name], dict):
            raise CheckpointError(f"{path.name} is damaged: its {name} is no object")
    if not is_corpus(marker.get(CORPUS, [])):
        raise CheckpointError(f"{path.name} is damaged: its {CORPUS} is no list of what each folder had")
    return marker | {"files": require_digests(marker["files"], path)}


@contextlib.contextmanager
def saving(run: Run, step: int, num_bytes: int = 0) -> Iterator[Path]:
    """Gives the folder that all ranks write checkpoint `step` into. At the end it is marked and moved to its name, and
    the oldest checkpoints beyond `train.save_total_limit` are removed, but for the best.

    Args:
        num_bytes: what it is going to take; where there is no room for it, it is not begun.

    Raises:
        CheckpointError: on the rank that could not write.
        PeerError: on the others.
    """
    output_dir = run.config.train.output_dir
    unfinished = output_dir / UNFINISHED
    folder = unfinished / f"checkpoint-{step}"
    own: dict[str, FileDigest] = {}
    begun = time.monotonic()
    with _together(output_dir, step):
        if world.rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            _require_room(output_dir, num_bytes)
    with _together(output_dir, step):
        yield folder
        own = digest_files(_own_files(folder))
    digests = world.gather_objects(own)
    with _together(output_dir, step):
        if world.rank() == 0:
            files = {name: digest for of_rank in digests for name, digest in of_rank.items()}
            _finish(folder, run, step, files, begun)


def _require_room(output_dir: Path, num_bytes: int) -> None:
    """Raises OSError (no space left) where a checkpoint of `num_bytes` has no room."""
    if shutil.disk_usage(output_dir).free < num_bytes:
        raise OSError(errno.ENOSPC, f"no room: it takes {size(num_bytes)}, so it was not begun", str(output_dir))


def _own_files(folder: Path) -> list[Path]:
    """What this rank has written of a checkpoint: its part of the optimizer; rank 0 all else, too. Not what lies in
    folders within, such as further chat templates of the base."""
    own = f"optimizer-{world.rank():05d}-"
    return [
        path
        for path in sorted(folder.glob("*"))
        if (path.name.startswith(own) or (world.rank() == 0 and not path.name.startswith("optimizer-")))
        and path.is_file()
    ]


def _finish(written: Path, run: Run, step: int, files: Mapping[str, FileDigest], begun: float) -> None:
    """Mark the checkpoint that all ranks have `written`, which they have `begun` then, and give it its name."""
    seal(written)
    marker = {
        "step": step,
        "epoch": int(run.schedule.epoch(step)),
        "identity": run.identity.to_json(),
        CORPUS: remember(run.schedule),
        "settings": run.config.to_json(),
        "files": files,
        "seconds_to_save": round(time.monotonic() - begun, 3),  # until all but this file was on the disk
        "crc32": 0,  # of the marker itself, with 0 in this place
    }
    write_json(written / MARKER, marker | {"crc32": json_crc32(marker)})
    folder = run.config.train.output_dir / written.name
    written.rename(folder)  # at most an empty folder lies there: see `find_checkpoint`
    sync(folder.parent)
    log.info("saved %s", folder)
    best = note_best(run)
    if (limit := run.config.train.save_total_limit) is not None:
        for old in _complete(folder.parent)[:-limit]:
            if old != best:
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
    """The folders checkpoint-<step>, complete or not, by step."""
    named = [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=_step)


def _step(folder: Path) -> int:
    """The step in a checkpoint's name: 30 for `checkpoint-30`."""
    return int(folder.name.removeprefix("checkpoint-"))
