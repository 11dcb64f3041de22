"""What is found out once of an object that many rows share, such as the declaration of a tool (`schema.py`)."""

import functools
import json
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_NUM_KNOWN = 4096


def of_shared(function: Callable[[Any], T]) -> Callable[[Any], T]:
    """A function of an object that nobody changes: one that came before is known by its identity, without a look into
    it. Threads may share it."""
    known: dict[int, tuple[Any, T]] = {}

    @functools.wraps(function)
    def remembered(value: Any) -> T:
        found = known.get(id(value))
        if found is None:
            if len(known) >= _NUM_KNOWN:
                known.clear()
            found = known[id(value)] = (value, function(value))  # held, so that its id stays its own
        return found[1]

    return remembered


shared_json = of_shared(json.dumps)
