"""What a run says while it works: one logger, one progress bar, one line a step, and the same numbers in a file.

Rank 0 speaks, every rank warns.
"""

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gemma_dist import world

T = TypeVar("T")

log = logging.getLogger("gemma_dist")


def start_logging() -> None:
    """Send the package's messages to stderr: informative ones from rank 0, warnings from every rank with its number."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"[rank {world.rank()}] " if world.world_size() > 1 else ""
    handler.setFormatter(logging.Formatter(f"{prefix}%(levelname)s: %(message)s"))
    handler.addFilter(lambda record: setattr(record, "levelname", record.levelname.lower()) or True)
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if world.rank() == 0 else logging.WARNING)
    log.propagate = False


def progress(items: Iterable[T], *, total: int | None, desc: str, unit: str) -> Iterator[T]:
    """Go through `items` with a bar on rank 0; without a terminal, a line every 30 seconds instead of a live bar."""
    from tqdm import tqdm

    live = sys.stderr.isatty()
    return iter(
        tqdm(
            items,
            total=total,
            desc=desc,
            unit=unit,
            disable=world.rank() != 0,
            mininterval=0.1 if live else 30,
            file=sys.stderr,
            dynamic_ncols=live,
        )
    )


class JsonlWriter:
    """A file of one JSON object a line, flushed at each, so that a killed run keeps every line it wrote."""

    def __init__(self, path: Path, *, append: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a" if append else "w", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path`, complete or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
