"""A corpus that was added to while a run was down, and is taken up at the next epoch of its source.

A checkpoint remembers what its corpus was, from which step on, so that whoever resumes later gets the same order:

    "corpus": [{"from_step": 0,   "num_row_groups": [40, 12], "rows": ["9f…", "03…"]},
               {"from_step": 600, "num_row_groups": [52, 12], "rows": ["b1…", "03…"]}]

with a number and a hash for each folder of `data.train`. What it is now must begin with what it was.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_dist.shards.reader import Shards
from gemma_dist.stream.schedule import Edition, Schedule

CORPUS = "corpus"  # in what marks a checkpoint as complete


def remember(schedule: Schedule) -> list[dict[str, object]]:
    """What a checkpoint notes of the corpus of a run."""
    beginnings = [schedule.shards.beginnings(edition.num_row_groups) for edition in schedule.editions]
    return [edition._asdict() | {"rows": rows} for edition, rows in zip(schedule.editions, beginnings, strict=True)]


def editions_from(marker: Mapping[str, Any], shards: Shards) -> list[Edition]:
    """The corpus of a run that goes on from a checkpoint, from each step on: as `marker` says, and behind its step as
    it is now. Empty where the marker does not say, as of earlier versions, or where what was there is not there now."""
    found = marker.get(CORPUS, [])
    now = shards.num_row_groups
    if not found or len(found[-1]["num_row_groups"]) != len(now):
        return []
    before: list[int] = found[-1]["num_row_groups"]
    has_less = any(count < was for count, was in zip(now, before, strict=True))
    if has_less or shards.beginnings(before) != found[-1]["rows"]:
        return []
    editions = [Edition(one["from_step"], one["num_row_groups"]) for one in found]
    return editions if now == before else [*editions, Edition(marker["step"], now)]


def is_corpus(found: Any) -> bool:
    """Whether a value is what `remember` notes, as read from JSON."""
    return isinstance(found, list) and all(
        isinstance(one, dict)
        and type(one.get("from_step")) is int
        and _is_list_of(one.get("num_row_groups"), int)
        and _is_list_of(one.get("rows"), str)
        for one in found
    )


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)


def has_grown(marker: Mapping[str, Any], shards: Shards) -> bool:
    """Whether the corpus is that of a checkpoint with more behind it."""
    return len(editions_from(marker, shards)) > len(marker.get(CORPUS, []))


def editions_of_newest(output_dir: Path, shards: Shards) -> list[Edition]:
    """The corpus of a run that goes on from the newest checkpoint of a folder; empty where there is none."""
    markers = []
    for path in output_dir.glob("checkpoint-*/complete.json"):
        try:
            marker = json.loads(path.read_text(encoding="utf-8"))
            markers.append((marker["step"], editions_from(marker, shards)))
        except (OSError, ValueError, RecursionError, LookupError, TypeError):  # damaged: a run would put it aside
            continue
    return max(markers, default=(0, []))[1]
