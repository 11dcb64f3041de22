"""What is to be done, and how it ends: lines in order, the report, and the rows that are kept."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_dist.act.episode import SUCCESS
from gemma_dist.act.log import Ended, RunKey, complete, exists_already, remove_parts, write_lines
from gemma_dist.act.report import by_task, make_report, summary, with_first_wrong
from gemma_dist.act.tools import Functions, ToolServer
from gemma_dist.config_act import ActConfig
from gemma_dist.errors import ConfigError
from gemma_dist.evaluate.log import RUN
from gemma_dist.evaluate.runs import REPORT, RUNS
from gemma_dist.files import made
from gemma_dist.logs import log, write_json


@dataclass(frozen=True)
class Work:
    """What is asked for, whoever holds the model."""

    data: Path
    out: Path
    limit: int | None
    settings: ActConfig
    tools: str | None  # MODULE:FUNCTIONS; None: the log answers
    check: str | None = None
    setup: str | None = None
    keep: Path | None = None

    @property
    def is_replay(self) -> bool:
        return self.tools is None

    def require_new(self) -> None:
        """Raises ConfigError where the result is there already, or would overwrite something else's, or nothing could
        be kept."""
        if (self.out / REPORT).exists():
            raise ConfigError(f"{self.out / REPORT} exists already; name another folder or remove it")
        if self.keep is None:
            return
        if not self.is_replay and self.check is None:
            raise ConfigError("--keep keeps runs that succeed, and nothing says which do: name a checker by --check")
        if self.keep.resolve() in {(self.out / name).resolve() for name in ("", RUNS, REPORT, RUN)}:
            raise ConfigError(f"--keep {self.keep} is --out, or a file that it gets; name another one")
        # Beside runs.jsonl it may be what a killed command wrote: then `finish` compares.
        if self.keep.is_dir() or (self.keep.exists() and not (self.out / RUNS).exists()):
            raise exists_already(self.keep)

    def begin_keeping(self, stack: ExitStack) -> None:
        """Make the folder of `keep`, before any answer is written. An error in `stack` takes it away while empty."""
        if self.keep is not None:
            stack.enter_context(made(self.keep.parent))

    def start_tools(self, stack: ExitStack) -> ToolServer | None:
        """The process of the user's functions, until `stack` ends. Raises ConfigError where they cannot be used."""
        if self.tools is None:
            return None
        functions = Functions(self.tools, self.check, self.setup)
        settings = self.settings
        server = ToolServer(functions, timeout_s=settings.tool_timeout_s, declare=settings.declare == "auto")
        return stack.enter_context(closing(server))

    def described(self, description: dict[str, Any]) -> dict[str, Any]:
        """The description of an evaluation with what is this command's alone."""
        functions = {"tools": self.tools, "check": self.check, "setup": self.setup, "replay": self.is_replay}
        return {**description, "settings": {**description["settings"], **functions}}


def finish(work: Work, header: dict[str, Any], wanted: Sequence[RunKey]) -> dict[str, Any]:
    """Write lines, kept rows and the report of all runs, which comes last. Raises EvaluationError where one is
    missing."""
    ended = complete(work.out, wanted)
    tasks = by_task(ended)
    write_lines(work.out / RUNS, (with_first_wrong(run.line(), run, tasks[run.task_number]) for run in ended))
    report = make_report(header, ended)
    if work.keep is not None:
        report["kept"] = write_lines(work.keep, _kept(ended), replace=False)
    write_json(work.out / REPORT, report)
    remove_parts(work.out)
    for sentence in summary(report):
        log.info(sentence)
    if work.keep is not None:
        log.info("%d rows of runs that succeeded, each once, are in %s", report["kept"], work.keep)
    return report


def _kept(ended: Sequence[Ended]) -> Iterator[dict[str, Any]]:
    """The rows of runs that succeeded; of those of a task that say the same, the first."""
    seen: set[tuple[int, bytes]] = set()
    for run in ended:
        if run.outcome == SUCCESS:
            row = run.line()["row"]
            said = hashlib.sha256(json.dumps(row["messages"], sort_keys=True).encode()).digest()
            if (run.task_number, said) not in seen:
                seen.add((run.task_number, said))
                yield row
