"""The folder that `gemma-dist shard` writes to: claimed, cleared, and left with nothing in it but a corpus.

While a run works, the marker `.unfinished` says what it set out to do. A run that was killed leaves it behind: the same
call then takes over the pieces that are whole, and any other clears them away. Nothing that no run of ours left is ever
removed: a folder with something else in it is refused.
"""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from gemma_dist.aliases import current_values
from gemma_dist.errors import DataError
from gemma_dist.files import unfollowed
from gemma_dist.logs import log, write_json
from gemma_dist.shards.manifest import FINISHED, MANIFEST, UNFINISHED, CorpusHeader, Manifest, read_manifest
from gemma_dist.shards.pieces import piece_files
from gemma_dist.shards.report import REJECTED, TOO_LONG, ShardReport
from gemma_dist.shards.tools import TOOLS, refuse_foreign_tools

APPEND_REJECTED = "append_rejected.jsonl"  # of an --append that was refused
CLAIM = ".claim"  # locked while a run looks at what an earlier one left
_MARKER_BEGUN = re.compile(rf"\.{re.escape(UNFINISHED)}\.\d+\.tmp")  # as `write_json` begins it
_PART = re.compile(r"\.part-\d+-of-\d+")  # as `at_work` locks it
_BEFORE = re.compile(r"\.before-\d{5,}\.arrow")  # as `hashes_before` names it
SHARD = re.compile(r"train-\d{5,}\.parquet")  # as `shard_name` names it


class Plan(CorpusHeader):
    """All that decides what a call of `gemma-dist shard` writes: a call of the same plan resumes what it left."""

    inputs: list[list[str | int]]  # of each range of the input: its file, first byte, size and time of the file
    media_root: str
    skip_invalid: bool
    pieces: int  # PIECE_FORMAT
    sizes: list[int]  # of a piece, a row group and a shard, at most, in bytes
    append_to: str | None  # sha256 of the manifest that is appended to
    choice: NotRequired[str]  # digest of which rows are taken; absent: all


class Part(NamedTuple):
    """One of several calls that share the pieces of a run: number `number` of `of`, from 1."""

    number: int
    of: int


class Marker(TypedDict, total=False):
    """What is read again of UNFINISHED: nothing where there is no such file. While a run is at work, it holds the plan,
    too."""

    append_to: str | None
    logs: dict[str, int]  # bytes of the logs before the append
    shards: list[str]  # those that were about to get their names
    report: dict[str, Any]  # a ShardReport's, without `out`; there once nothing but the manifest is wanting


def open_to_append(out: Path, corpus: CorpusHeader) -> Manifest:
    """The manifest of a folder that rows can be added to.

    Args:
        corpus: what this call would write into the manifest's header.

    Raises:
        DataError: there is no finished corpus, or it was made with other settings.
    """
    if not (out / MANIFEST).is_file():
        raise DataError(f"{out} holds no finished shards to append to; leave --append out to make the folder")
    manifest = read_manifest(out / MANIFEST, str(out / MANIFEST))
    if manifest.header["fingerprint"] != corpus["fingerprint"]:
        raise DataError(
            f"{out} was made with another tokenizer, chat template or image processor (fingerprint "
            f"{manifest.header['fingerprint']}, here {corpus['fingerprint']}); append with the same model, template "
            "and enable_thinking (to the shards of an earlier version nothing can be added: make them again)"
        )
    old = current_values(manifest.header["settings"])
    changed = []
    for name, value in corpus["settings"].items():
        if old.get(name, value) != value:  # an earlier version did not know all of them
            changed.append(f"{name} was {old[name]!r} and is {value!r}")
    if changed:
        raise DataError(f"{out} was made with other settings: {'; '.join(changed)}; append with the same ones")
    refuse_foreign_tools(out, manifest)
    return manifest


@contextlib.contextmanager
def at_work(out: Path, part: Part | None) -> Iterator[None]:
    """Within, no other call works on the folder; beside a part others may, each on a part of its own.

    Raises:
        DataError: another one is at work, or `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; name a folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = os.open(out, os.O_RDONLY)
        stack.callback(os.close, folder)
        _lock(folder, fcntl.LOCK_EX if part is None else fcntl.LOCK_SH, f"{out}: another `gemma-dist shard` is at work")
        if part is not None:
            path = out / f".part-{part.number}-of-{part.of}"
            own = stack.enter_context(open(path, "w", opener=unfollowed))
            stack.callback(path.unlink, missing_ok=True)
            _lock(own.fileno(), fcntl.LOCK_EX, f"{out}: part {part.number} of {part.of} is at work already")
        try:
            yield
        finally:
            if not (out / UNFINISHED).exists():
                (out / CLAIM).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # it has something in it
                    out.rmdir()


@contextlib.contextmanager
def one_at_a_time(out: Path) -> Iterator[None]:
    """Within, no other part of the run claims the folder: it waits."""
    with open(out / CLAIM, "w", opener=unfollowed) as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock(handle: int, kind: int, problem: str) -> None:
    """Lock an open file or folder until it is closed, where its file system has locks. DataError where it is taken."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{problem}; wait for its end, or end it") from None
    except OSError:
        return


def finished_already(out: Path, plan: Plan, sizes: Mapping[str, int]) -> ShardReport | None:
    """What the last call did, if it had this plan: then nothing is left to do. It may have been killed with its
    manifest in place; what it left is then removed.

    Args:
        plan: what this call is to do; `append_to` and `pieces` are not looked at.
        sizes: of files that lie elsewhere, by name: in a store.

    Raises:
        DataError: it had, and a shard has been removed or cut since.
    """
    if not (out / MANIFEST).is_file():
        return None
    shards = read_manifest(out / MANIFEST, str(out / MANIFEST)).header["shards"]
    named = {shard["name"] for shard in shards}
    left = _read_marker(out)
    if "report" in left and named.issuperset(left["shards"]):  # else the manifest is the one from before the append
        tidy(out)
    done = _read_marker(out, FINISHED)
    same = all(done.get(name) == value for name, value in plan.items() if name not in ("append_to", "pieces"))
    if not same or not named.issuperset(done["shards"]):
        return None
    for shard in shards:
        file = out / shard["name"]
        if (file.stat().st_size if file.is_file() else sizes.get(shard["name"])) != shard["bytes"]:
            raise DataError(f"{file} was written whole, and is no longer; restore it, or remove {out} to make it again")
    return ShardReport(str(out), **done["report"])


def tidy(out: Path) -> None:
    """Leave nothing in a folder but a corpus, whose manifest is in place, and what the last call did."""
    for path in work_files(out):
        if path.name != UNFINISHED:
            path.unlink(missing_ok=True)
    (out / UNFINISHED).replace(out / FINISHED)


def claim_folder(out: Path, plan: Plan, before: Manifest | None) -> dict[str, int]:
    """Make `out` ours to write to: with what the same call left there when it was killed, and nothing else of the kind.

    Returns the bytes that the logs had before an append, by name.

    Args:
        plan: what this call is to do; a marker that says the same is of a run that this one may continue.
        before: the finished corpus that is added to; None for a new one.

    Raises:
        DataError: `out` is a file, finished, or holds what no run of ours left there.
    """
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    finished = set()
    if before is None:
        _require_unfinished(out, names)
    else:
        finished = {shard["name"] for shard in before.header["shards"]}
    out.mkdir(parents=True, exist_ok=True)
    left = _read_marker(out)
    shown = [name for name in left.get("shards", []) if name not in finished]  # of the run that is not finished
    shards = {name for name in names if SHARD.fullmatch(name)}
    if strange := shards - finished - set(shown):
        raise DataError(
            f"{out} holds {min(strange)!r}, which no manifest there names, and new shards would take its place; move "
            f"it away, or put the {MANIFEST} back that names it"
        )
    if plan.items() <= left.items():
        log.info("resuming what an earlier run left in %s", out)
        return left["logs"]
    logs: dict[str, int] = {}
    if before is not None:
        same_append = left.get("append_to") == plan["append_to"]
        logs = left["logs"] if same_append else _log_sizes(out)  # they may have grown already, the corpus has not
    # While files of the other plan are there, the marker names none: they must not be taken for those of this one.
    marker: Marker = {"append_to": plan["append_to"], "logs": logs, "shards": shown}
    write_json(out / UNFINISHED, marker)
    clear_folder(out, append=before is not None, keep=UNFINISHED, shown=shown)
    write_json(out / UNFINISHED, {**plan, "logs": logs})
    return logs


def _log_sizes(out: Path) -> dict[str, int]:
    """Bytes of each log of a corpus that is there: what an append that fails cuts it back to."""
    return {name: (out / name).stat().st_size for name in (REJECTED, TOO_LONG) if (out / name).is_file()}


def _require_unfinished(out: Path, names: set[str]) -> None:
    """A new corpus takes a folder that is empty but for a list of refused rows and what `rm FOLDER/*` leaves, or one
    that a run of ours began."""
    if MANIFEST in names:
        raise DataError(
            f"{out} holds finished shards already; remove it, name another folder with --out, or add to it by --append"
        )
    ours = (name for name in names if _MARKER_BEGUN.fullmatch(name) or _PART.fullmatch(name))
    others = names - {REJECTED, CLAIM, FINISHED, *ours}
    if others and not (out / UNFINISHED).is_file():
        raise DataError(
            f"{out} holds {min(others)!r}, which `gemma-dist shard` did not leave there; name a new folder with --out"
        )


def _read_marker(out: Path, name: str = UNFINISHED) -> Marker:
    """What a run noted of itself; nothing where there is no such file."""
    try:
        return json.loads((out / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def clear_folder(out: Path, append: bool, keep: str, shown: Iterable[str] = ()) -> None:
    """Remove what an unfinished run left in `out`, but for `keep`; and an empty folder itself.

    Args:
        append: the logs are of the finished corpus, which stays.
        shown: the shards that the run had given their names already.
    """
    logs = [APPEND_REJECTED] if append else [REJECTED, TOO_LONG, APPEND_REJECTED, TOOLS, FINISHED]
    left = [out / name for name in (*shown, *logs)] + work_files(out)
    for path in left:
        if path.name != keep:
            path.unlink(missing_ok=True)
    if not any(out.iterdir()):
        out.rmdir()


def work_files(out: Path) -> list[Path]:
    """What a run has in `out` only while it works; the marker, which says whose the others are, comes last."""
    names = {f".{name}.tmp" for name in (MANIFEST, REJECTED, TOO_LONG, APPEND_REJECTED, TOOLS)} | {CLAIM}
    begun = [
        path
        for path in out.iterdir()
        if path.name in names or any(kind.fullmatch(path.name) for kind in (_MARKER_BEGUN, _PART, _BEFORE))
    ]
    return [*piece_files(out), *begun, out / UNFINISHED]


def hashes_before(out: Path, number: int) -> Path:
    """Where an append keeps the hashes of a part of the ids that were there before."""
    return out / f".before-{number:05d}.arrow"


def shard_name(number: int) -> str:
    """`datasets` finds files called "train" in a folder, and so does not stumble over the manifest beside them."""
    return f"train-{number:05d}.parquet"
