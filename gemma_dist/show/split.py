"""`gemma-dist shard --split`: put a share of the rows aside, to evaluate on, and shard both parts.

    OUT/train        what is trained on
    OUT/held_out     about that share of the rows, whole groups of rows that are alike

Whole trajectories are put aside, and with a row all that are nearly the same, ask the same, or are of one `pair`:
else the evaluation would tell what was learned by heart. Which groups is decided by their own words alone: the same
rows in another order, or in other files, are split alike.
"""

from pathlib import Path

import numpy as np

from gemma_dist.config import ShardConfig
from gemma_dist.data.fit import parse
from gemma_dist.data.rows import read_rows
from gemma_dist.errors import DataError
from gemma_dist.logs import log, progress
from gemma_dist.shards.choice import Choice
from gemma_dist.shards.report import ShardReport
from gemma_dist.shards.sharding import run_shard
from gemma_dist.show.duplicates import group_alike
from gemma_dist.show.fingerprints import Fingerprints

TRAIN, HELD_OUT = "train", "held_out"  # folders of OUT


def shard_split(
    inputs: list[Path],
    out: str,
    model: str,
    settings: ShardConfig,
    share: float,
    *,
    skip_invalid: bool,
    num_workers: int | None = None,
    max_rejected: int | None = None,
    work_dir: Path | None = None,
) -> dict[str, ShardReport]:
    """Shard the rows in two parts; what became of each, by its folder. The arguments are those of `run_shard`.

    Raises:
        DataError: as `run_shard`; or all rows are alike.
    """
    held_out = choose_held_out(inputs, share, settings)
    return {
        name: run_shard(
            inputs,
            f"{out.rstrip('/')}/{name}",
            model,
            settings,
            skip_invalid,
            num_workers=num_workers,
            max_rejected=max_rejected,
            work_dir=work_dir,
            choice=Choice(held_out, takes_held_out=name == HELD_OUT),
        )
        for name in (TRAIN, HELD_OUT)
    }


def choose_held_out(inputs: list[Path], share: float, settings: ShardConfig) -> dict[str, frozenset[int]]:
    """The lines of each input that are put aside. Rows that break the contract stay among the others.

    Raises:
        DataError: all rows are alike, so that there is nothing to put aside.
    """
    rows, labels = Fingerprints(), []
    places: list[tuple[str, int]] = []
    read = read_rows(inputs, settings.max_row_bytes)
    for where, raw in progress(read, total=None, desc="looking for rows that are alike", unit=" rows"):
        try:
            trajectory = parse(raw, where, settings)
        except DataError:
            continue
        rows.add(trajectory, str(where.file), where.line)
        labels.append(trajectory.pair)
        places.append((str(where.file), where.line))
    if not places:
        return {}  # sharding says why each is refused
    chosen = choose_groups(group_alike(rows, labels), rows.exact, share)
    if not len(chosen):
        raise DataError(
            f"all {len(places):,} rows are alike (nearly the same, or the same question), so none can be put aside; "
            "name held-out rows of your own, and shard them into a folder of theirs"
        )
    log.info("put aside: %s of %s rows, with all that are alike", f"{len(chosen):,}", f"{len(places):,}")
    found: dict[str, set[int]] = {}
    for row in chosen.tolist():
        file, line = places[row]
        found.setdefault(file, set()).add(line)
    return {file: frozenset(lines) for file, lines in found.items()}


def choose_groups(group_of: np.ndarray, hashes: np.ndarray, share: float) -> np.ndarray:
    """The rows of some groups, as near to the share of all as whole groups come without exceeding it, but at least one
    group, and never all.

    Args:
        group_of: (N,) the group of each row.
        hashes: (N,) of the words of each row: groups are taken in the order of their least one.
    """
    order = np.argsort(hashes, kind="stable")
    _, first, sizes = np.unique(group_of[order], return_index=True, return_counts=True)
    groups = group_of[order][np.sort(first)]
    size_of = dict(zip(np.unique(group_of).tolist(), sizes.tolist(), strict=True))
    room = max(1, round(share * len(group_of)))
    chosen = []
    for group in groups.tolist():
        if size_of[group] <= room:
            chosen.append(group)
            room -= size_of[group]
    if len(chosen) == len(groups):
        chosen.pop()
    if not chosen:
        chosen = [min(groups.tolist(), key=lambda group: size_of[group])]
    return np.flatnonzero(np.isin(group_of, chosen)) if len(groups) > 1 else np.array([], int)
