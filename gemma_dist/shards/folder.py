"""The folder that `gemma-dist shard` writes to: claimed, cleared, and left with nothing in it but a corpus."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gemma_dist.aliases import current_values
from gemma_dist.errors import DataError
from gemma_dist.logs import log, write_json
from gemma_dist.shards.manifest import MANIFEST, UNFINISHED, Manifest, read_manifest
from gemma_dist.shards.pieces import REJECTED, TOO_LONG, piece_files

APPEND_REJECTED = "append_rejected.jsonl"  # of an --append that was refused
_SHARD = re.compile(r"train-\d{5,}\.parquet")  # as `shard_name` names it


def open_to_append(out: Path, header: dict[str, Any]) -> Manifest:
    """The manifest of a folder that rows can be added to."""
    if not (out / MANIFEST).is_file():
        raise DataError(f"{out} holds no finished shards to append to; leave --append out to make the folder")
    manifest = read_manifest(out / MANIFEST, str(out / MANIFEST))
    if manifest.header["fingerprint"] != header["fingerprint"]:
        raise DataError(
            f"{out} was made with another tokenizer, chat template or image processor (fingerprint "
            f"{manifest.header['fingerprint']}, here {header['fingerprint']}); append with the same model, template "
            "and enable_thinking (to the shards of an earlier version nothing can be added: make them again)"
        )
    old, new = current_values(manifest.header["settings"]), header["settings"]
    if changed := [f"{name} was {old.get(name)!r} and is {new[name]!r}" for name in new if old.get(name) != new[name]]:
        raise DataError(f"{out} was made with other settings: {'; '.join(changed)}; append with the same ones")
    return manifest


def claim_folder(out: Path, plan: dict[str, Any], before: Manifest | None) -> dict[str, Any]:
    """Make `out` ours to write to: with what the same call left there when it was killed, and nothing else of the kind.

    Returns the plan, with the sizes that the logs had before an append.

    Raises:
        DataError: `out` is a file, finished, or holds what no run of ours left there.
    """
    append = before is not None
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; name a folder with --out")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if not append:
        _require_unfinished(out, names)
    out.mkdir(parents=True, exist_ok=True)
    left = _read_marker(out)
    finished = {shard["name"] for shard in before.header["shards"]} if before else set()
    shown = [name for name in left.get("shards", []) if name not in finished]
    strange = {name for name in names if _SHARD.fullmatch(name)} - finished - set(shown)
    if strange:
        raise DataError(
            f"{out} holds {min(strange)!r}, which no manifest there names, and new shards would take its place; move "
            f"it away, or put the {MANIFEST} back that names it"
        )
    if plan.items() <= left.items():
        log.info("going on with what an earlier run left in %s", out)
        return left
    logs = {name: (out / name).stat().st_size for name in (REJECTED, TOO_LONG) if append and (out / name).is_file()}
    if append and left.get("append_to") == plan["append_to"]:  # the logs may have grown already, the corpus has not
        logs = left["logs"]
    # While files of the other plan are there, the marker names none: they must not be taken for those of this one.
    write_json(out / UNFINISHED, {"append_to": plan["append_to"], "logs": logs, "shards": shown})
    clear_folder(out, append, keep=UNFINISHED, shown=shown)
    write_json(out / UNFINISHED, plan | {"logs": logs})
    return plan | {"logs": logs}


def _require_unfinished(out: Path, names: set[str]) -> None:
    """A new corpus takes a folder that is empty but for a list of refused rows, or one that a run of ours began."""
    if MANIFEST in names:
        raise DataError(
            f"{out} holds finished shards already; remove it, name another folder with --out, or add to it by --append"
        )
    others = names - {REJECTED}
    if others and not (out / UNFINISHED).is_file():
        raise DataError(
            f"{out} holds {min(others)!r}, which `gemma-dist shard` did not leave there; name a new folder with --out"
        )


def _read_marker(out: Path) -> dict[str, Any]:
    """What a run that is not finished noted of itself; nothing where there is none."""
    try:
        return json.loads((out / UNFINISHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def clear_folder(out: Path, append: bool, keep: str, shown: Iterable[str] = ()) -> None:
    """Remove what an unfinished run left in `out`, but for `keep`; and an empty folder itself.

    Args:
        append: the logs are of the finished corpus, which stays.
        shown: the shards that the run had given their names already.
    """
    logs = [APPEND_REJECTED] if append else [REJECTED, TOO_LONG, APPEND_REJECTED]
    for path in [*(out / name for name in (*shown, *logs)), *work_files(out)]:
        if path.name != keep:
            path.unlink(missing_ok=True)
    if not any(out.iterdir()):
        out.rmdir()


def work_files(out: Path) -> list[Path]:
    """What a run has in `out` only while it works; the marker, which says whose the others are, comes last."""
    names = {f".{name}.tmp" for name in (MANIFEST, REJECTED, TOO_LONG, APPEND_REJECTED)}
    marker = re.compile(rf"\.{re.escape(UNFINISHED)}\.\d+\.tmp")  # as `write_json` begins it
    begun = [path for path in out.iterdir() if path.name in names or marker.fullmatch(path.name)]
    return [*piece_files(out), *begun, out / UNFINISHED]


def shard_name(number: int) -> str:
    """`datasets` finds files called "train" in a folder, and so does not stumble over the manifest beside them."""
    return f"train-{number:05d}.parquet"
