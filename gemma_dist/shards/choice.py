"""Which rows of its inputs a call of `shard` takes: some were put aside, to evaluate on (`show/split.py`)."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from gemma_dist.data.places import Where


@dataclass(frozen=True)
class Choice:
    """The rows that were put aside, or all others."""

    held_out: Mapping[str, frozenset[int]]  # lines, by input as it was named
    takes_held_out: bool

    def takes(self, where: Where) -> bool:
        """Whether the call takes the row of this place."""
        return (where.line in self.held_out.get(str(where.file), ())) == self.takes_held_out

    def digest(self) -> str:
        """What tells it from another choice, as a plan records it."""
        lines = {file: sorted(lines) for file, lines in sorted(self.held_out.items())}
        return hashlib.sha256(json.dumps([lines, self.takes_held_out]).encode()).hexdigest()
