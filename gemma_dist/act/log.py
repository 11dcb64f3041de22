"""What a run of `act` leaves in its folder while it works, so that a killed one goes on where it was.

    OUT/run.json           what it is: model, tasks, settings; another one is refused where runs are
    OUT/.runs-RANK.jsonl   each rank's runs that have ended, a line each; gone when OUT/runs.jsonl is written

A run that was under way when it was killed begins anew, since what its tools kept is gone.
"""

import contextlib
import filecmp
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_dist.act.first_wrong import calls_text
from gemma_dist.errors import ConfigError, EvaluationError
from gemma_dist.evaluate.log import NUM_NAMED, RUNS_PART, opened, parts_of
from gemma_dist.files import writing
from gemma_dist.logs import JsonlWriter

RunKey = tuple[str, int]  # of the task, number of its run from 1


@dataclass(frozen=True)
class Ended:
    """What is held of a run that has ended; its line stays in its file."""

    file: Path
    start: int
    stop: int
    id: str
    task_number: int
    run: int
    outcome: str
    reward: float | None
    left: dict[str, Any] | None
    calls: tuple[str, ...]  # of each step, as one text: the same calls, in any order, are the same text
    num_tokens: int  # written

    def line(self) -> dict[str, Any]:
        """The whole line."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            line: dict[str, Any] = json.loads(file.read(self.stop - self.start))
        return line


@contextlib.contextmanager
def opened_runs(out: Path, describe: Callable[[], dict[str, Any]]) -> Iterator[tuple[dict[str, Any], set[RunKey]]]:
    """Within, `out` is this command's; yields what `describe` says, and the runs that have ended. As `log.opened`."""
    with opened(out, describe) as (run, _):
        yield run, set(find_ended(out))


def find_ended(out: Path) -> dict[RunKey, Ended]:
    """The runs in all ranks' parts. What is damaged is left out."""
    ended: dict[RunKey, Ended] = {}
    for part in parts_of(out, RUNS_PART):
        stop = 0
        with part.open("rb") as file:
            for raw in file:
                start, stop = stop, stop + len(raw)
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    if raw.endswith(b"\n"):
                        line = json.loads(raw)
                        ended.setdefault((line["key"], line["run"]), _ended(line, part, start, stop))
    return ended


def complete(out: Path, wanted: Sequence[RunKey]) -> list[Ended]:
    """The runs of `wanted`, in that order. Raises EvaluationError where one is missing."""
    ended = find_ended(out)
    missing = [one for one in wanted if one not in ended]
    if missing:
        raise EvaluationError(
            f"{out} holds {len(ended)} runs, and {len(missing)} of {len(wanted)} are missing, such as "
            f"{missing[:NUM_NAMED]}; run the same command again"
        )
    return [ended[one] for one in wanted]


def remove_parts(out: Path) -> None:
    """Remove what ranks wrote."""
    for part in parts_of(out, RUNS_PART):
        part.unlink()


def write_lines(path: Path, lines: Iterator[dict[str, Any]], *, replace: bool = True) -> int:
    """Write lines as they come, all or none; their number. Raises ConfigError where something else lies at `path`, and
    it is not to `replace` it."""
    num_lines = 0
    with writing(path) as temporary:
        writer = JsonlWriter(temporary, append=False)
        for line in lines:
            writer.write(line)
            num_lines += 1
        writer.close()
        if not replace and path.exists() and not filecmp.cmp(temporary, path, shallow=False):
            raise exists_already(path)
    return num_lines


def exists_already(keep: Path) -> ConfigError:
    """What is said of a file for kept rows that somebody else wrote."""
    return ConfigError(f"{keep} exists already; name another file or remove it")


def _ended(line: dict[str, Any], part: Path, start: int, stop: int) -> Ended:
    steps = line["steps"]
    return Ended(
        *(part, start, stop, line["id"], line["task_number"], line["run"], line["outcome"], line["reward"]),
        left=line["left"],
        calls=tuple(calls_text(step["calls"]) for step in steps),
        num_tokens=sum(len(step["completion_ids"] or ()) for step in steps),
    )
