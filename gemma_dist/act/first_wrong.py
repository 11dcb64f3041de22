"""Where a run went wrong: the first step whose calls are not those of a run that is right. No model, no torch."""

import json
from collections.abc import Sequence
from typing import Any

GOLD = "gold"
Calls = Sequence[str]  # of each step, `calls_text`


def calls_text(calls: Sequence[dict[str, Any]]) -> str:
    """Calls as one text, the same for any order of the calls and of their arguments."""
    return json.dumps(sorted(json.dumps(call, sort_keys=True) for call in calls))


def num_same(calls: Calls, right: Calls) -> int:
    """How many steps two runs begin with whose calls are the same."""
    same = 0
    while same < min(len(calls), len(right)) and calls[same] == right[same]:
        same += 1
    return same


def first_wrong_step(calls: Calls, right: Calls) -> int:
    """The first step, from 1, of a run that failed at which its calls are not those of one that is right; where all
    are, its last one."""
    return min(num_same(calls, right) + 1, len(calls))


def nearest(calls: Calls, right: Sequence[tuple[str, Calls]]) -> tuple[str, Calls] | None:
    """Of the runs that are right, by their names, the first of those that this one follows for longest."""
    return max(right, key=lambda run: num_same(calls, run[1]), default=None)
