"""Whose output folder it is. Ranks may outlive their launcher, as where Slurm's daemon dies or the network of their
machine is cut: their job is then started again elsewhere, and what is left of the old attempt has to end by itself.

OUT/heartbeats/owner      the run at work there, written by its rank 0
OUT/heartbeats/waiting    an attempt that waits for the folder: job and number of the restart
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from gemma_dist import world
from gemma_dist.errors import ConfigError
from gemma_dist.files import exclusive, put
from gemma_dist.logs import log

HEARTBEATS, OWNER, WAITING = "heartbeats", "owner", "waiting"
LOOK_S, SAY_S = 1.0, 60.0


@contextlib.contextmanager
def lock_output_dir(output_dir: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Within, no other run writes to `output_dir`: the ranks of a killed launcher may still be at work there.

    Rank 0 locks the folder (`files.exclusive`). A restart waits for it: who has it is most likely what is left of the
    attempt before, which ends by itself.

    Args:
        wait_s: seconds that a restart waits at most.

    Raises:
        ConfigError: another run has it.
    """
    if world.rank() != 0:
        yield
        return
    with contextlib.ExitStack() as stack:
        _lock(stack, output_dir, wait_s if world.is_restart() else 0.0)
        yield


def _lock(stack: contextlib.ExitStack, output_dir: Path, wait_s: float) -> None:
    """Lock the folder until `stack` is closed, as soon as that can be done."""
    problem = (
        f"train.output_dir = {str(output_dir)!r}: another run is at work there; wait for it, or end all its ranks "
        "(`kill -9` of a launcher leaves them), or name another folder"
    )
    begun, said = time.monotonic(), -SAY_S
    while True:
        try:
            stack.enter_context(exclusive(output_dir, problem))
            return
        except ConfigError:
            waited = time.monotonic() - begun
            if waited >= wait_s:
                raise
        if waited - said >= SAY_S:
            log.warning(
                "%s: what is left of an earlier attempt is at work there; waiting for its end (%.0f of at most %.0f s)",
                output_dir,
                waited,
                wait_s,
            )
            said = waited
        _write(output_dir, WAITING, _attempt())
        time.sleep(LOOK_S)


def own(output_dir: Path) -> None:
    """Say that this run has the folder. Rank 0 does, once all ranks know its name."""
    if world.rank() == 0:
        _write(output_dir, OWNER, world.name_of_run())


def disown(output_dir: Path) -> None:
    """The run ends. Raises OSError where the disk does not take it."""
    if world.rank() == 0 and _read(output_dir, OWNER) == world.name_of_run():
        (output_dir / HEARTBEATS / OWNER).unlink(missing_ok=True)


def successor(output_dir: Path) -> str:
    """The run that has the folder, or a later attempt of the same job that waits for it; empty while it is this one's.
    Raises OSError where that cannot be read."""
    owner = _read(output_dir, OWNER)
    if owner and owner != world.name_of_run():
        return f"another run ({owner})"
    attempt, waiting = _attempt(), _read(output_dir, WAITING)
    if attempt and waiting:
        (own_job, own_restart), (job, restart) = attempt.split(), waiting.split()
        if job == own_job and int(restart) > int(own_restart):
            return f"a later attempt of job {job}"
    return ""


def _attempt() -> str:
    """This Slurm job and how often it was started again; empty outside of Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"{job} {os.environ.get('SLURM_RESTART_COUNT') or 0}" if job else ""


def _write(output_dir: Path, name: str, text: str) -> None:
    """Write a small file whole, if the disk takes it."""
    path = output_dir / HEARTBEATS / name
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path, f"{text}\n".encode())


def _read(output_dir: Path, name: str) -> str:
    try:
        return (output_dir / HEARTBEATS / name).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
