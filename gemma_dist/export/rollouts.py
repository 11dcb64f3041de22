"""Own runs as rollouts, for a trainer of reinforcement learning elsewhere: the ids that were sampled, and no others.

    RUNS/runs.jsonl (of `gemma-dist act`)  ->  rollouts.parquet, or .jsonl

A rollout is a prompt and what followed it: what the model sampled (mask 1) and what stood between, tools' answers and
turns of users (mask 0). Where the prompt of a step begins with all ids of the step before it, the two are one rollout;
where it does not (Gemma's template no longer shows earlier thoughts, or writes a call otherwise than it was sampled),
the run is cut there and goes on as another rollout, whose prompt is the one that the model had. So every sampled id
stands behind exactly what it was sampled behind, once.

The names of the columns are those of TRL's `rollout_func` (GRPOTrainer) or of verl's `AgentLoopOutput`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from gemma_dist.data.strict import short
from gemma_dist.errors import ConfigError, DataError
from gemma_dist.evaluate.runs import RUNS, with_repeats
from gemma_dist.files import made, writing
from gemma_dist.logs import JsonlWriter, read_jsonl

Layout = Literal["trl", "verl"]
# What each trainer calls ours.
NAMES: Mapping[Layout, Mapping[str, str]] = {
    "trl": {"completion_ids": "completion_ids", "mask": "env_mask", "logprobs": "logprobs", "reward": "reward"},
    "verl": {
        "completion_ids": "response_ids",
        "mask": "response_mask",
        "logprobs": "response_logprobs",
        "reward": "reward_score",
    },
}
GROUP: Mapping[Layout, str] = {"trl": "task", "verl": "uid"}
MAX_ID = 2**31  # that a column holds
ROWS_AT_ONCE = 256  # of a parquet row group
NO_REWARD = "have no reward: nothing judged them"
WITH_IMAGES = "show images, which neither trainer takes in ready prompts"
NO_IDS = "sampled nothing"


@dataclass
class Rollout:
    """A prompt of P ids, and the T ids behind it."""

    task: str  # of the runs that are compared with one another
    run: str
    part: int  # of the run, from 1
    num_parts: int
    first_step: int  # of the run, from 1
    num_steps: int
    outcome: str
    reward: float
    prompt_ids: list[int]  # (P,)
    completion_ids: list[int] = field(default_factory=list)  # (T,)
    mask: list[int] = field(default_factory=list)  # (T,): 1 where the model sampled the id
    logprobs: list[float] | None = None  # (T,): 0.0 where the mask is 0; None: not known

    def to_row(self, layout: Layout) -> dict[str, Any]:
        """As a row of the file."""
        named = {theirs: getattr(self, ours) for ours, theirs in NAMES[layout].items()}
        told = {"run": self.run, "part": self.part, "num_parts": self.num_parts, "outcome": self.outcome}
        steps = {"first_step": self.first_step, "num_steps": self.num_steps}
        return {GROUP[layout]: self.task, **told, **steps, "prompt_ids": self.prompt_ids, **named}


@dataclass
class RolloutReport:
    """What was written."""

    path: Path
    num_runs: int = 0
    num_rollouts: int = 0
    num_sampled: int = 0  # ids
    num_between: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # why: how many runs
    num_cut: int = 0  # runs of several rollouts
    first_cut: str = ""
    rewards: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # of each task's runs

    def note(self, rollouts: Sequence[Rollout], why_cut: str) -> None:
        """Count the rollouts of a run."""
        self.num_runs += 1
        self.num_rollouts += len(rollouts)
        self.num_sampled += sum(sum(rollout.mask) for rollout in rollouts)
        self.num_between += sum(rollout.mask.count(0) for rollout in rollouts)
        self.num_cut += len(rollouts) > 1
        self.first_cut = self.first_cut or why_cut
        self.rewards[rollouts[0].task].append(rollouts[0].reward)

    def summary(self) -> str:
        """What a person is told."""
        differing = sum(len(set(rewards)) > 1 for rewards in self.rewards.values())
        sizes = sorted(map(len, self.rewards.values()))
        of_each = f"{sizes[0]} to {sizes[-1]}" if sizes[0] < sizes[-1] else f"{sizes[0]}"
        lines = [
            f"{self.path}: {self.num_rollouts} rollouts of {self.num_runs} runs; {self.num_sampled:,} ids sampled, "
            f"{self.num_between:,} between; read back, all as they were sampled",
            f"{len(sizes)} tasks with {of_each} runs each; in {differing} the rewards differ, and the others "
            "teach GRPO nothing",
        ]
        if self.num_cut:
            lines.append(f"{self.num_cut} runs are cut into several rollouts, such as {self.first_cut}")
        return "\n".join([*lines, *(f"{number} runs left out: they {why}" for why, number in self.left_out.items())])


def export_rollouts(runs: Path, out: Path, layout: Layout, *, whole: bool) -> RolloutReport:
    """Write the rollouts of a folder of runs, read them back, and require that they are what was sampled.

    Args:
        out: a .parquet or .jsonl file.
        whole: refuse a run that has to be cut.

    Raises:
        ConfigError: there are no runs, or `out` exists or is named otherwise.
        DataError: a line is no run, or has no ids; no run has a reward; a run had to be cut and must not be.
    """
    source = runs / RUNS if runs.is_dir() else runs
    if not source.is_file():
        raise ConfigError(f"{runs} holds no {RUNS}: name a folder that `gemma-dist act` finished")
    if out.suffix not in (".parquet", ".jsonl"):
        raise ConfigError(f"{out}: write rollouts to a file whose name ends in .parquet or .jsonl")
    if out.exists():
        raise ConfigError(f"{out} exists already; name another file or remove it")
    report = RolloutReport(out)
    with made(out.parent), writing(out) as temporary:
        _write(temporary, (rollout.to_row(layout) for rollout in _all(source, whole, report)), layout, out.suffix)
        if not report.num_runs:
            why = "; ".join(f"{number} {reason}" for reason, number in report.left_out.items()) or "it is empty"
            raise DataError(f"{source} has no run to export: {why}; let a checker judge the runs of text alone")
        require_sampled(temporary, source, layout, out.suffix)
    return report


def _all(source: Path, whole: bool, report: RolloutReport) -> Iterator[Rollout]:
    """The rollouts of all runs, which `report` counts."""
    for place, run in _runs(source):
        if why := why_left_out(run):
            report.left_out[why] += 1
            continue
        rollouts, why_cut = rollouts_of(run)
        if why_cut and whole:
            raise DataError(f"{place}: {why_cut}; export without --whole, which cuts such runs")
        report.note(rollouts, why_cut)
        yield from rollouts


def _runs(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The runs of a file, each with its place. DataError where a line is none, or lacks the ids."""
    for number, run in enumerate(_lines(source), start=1):
        place = f"{source}:{number}"
        missing = {"id", "task", "outcome", "reward", "steps"} - set(run if isinstance(run, dict) else ())
        if missing:
            raise DataError(f"{place}: no run of `gemma-dist act`: it lacks {sorted(missing)}; act again")
        if problem := _damage(run):
            raise DataError(f"{place}: {problem}, which `gemma-dist act` does not write; copy it again, or act again")
        if any(step["prompt_ids"] is None or step["completion_ids"] is None for step in run["steps"]):
            raise DataError(
                f"{place}: {run['id']} was written by a server, which told no ids, and ids made of its text would be "
                "others than it sampled; let the model act here"
            )
        yield place, {**run, "steps": with_repeats(run["steps"])}


def _lines(source: Path) -> Iterator[Any]:
    """What each line holds. DataError where one is not JSON."""
    try:
        yield from read_jsonl(source)
    except ValueError as error:
        raise DataError(f"{source} cannot be read: {error}; copy it again") from None


def _damage(run: Mapping[str, Any]) -> str:
    """What a run has that none can have, in words; "" where all is as it should be."""
    for name in ("id", "task", "outcome"):
        if not isinstance(run[name], str):
            return f"{name} is {short(run[name])}"
    reward, steps = run["reward"], run["steps"]
    if not (reward is None or (type(reward) in (int, float) and isfinite(reward))):
        return f"reward is {short(reward)}"
    if not isinstance(steps, list):
        return f"steps is {short(steps)}"
    num_seen = 0
    for number, step in enumerate(steps, start=1):
        if not (isinstance(step, dict) and {"prompt_ids", "completion_ids"} <= step.keys()):
            return f"step {number} has no prompt_ids and completion_ids"
        for name in ("prompt_ids", "completion_ids"):
            if not (step[name] is None or _are_ids(step[name])):
                return f"{name} of step {number} is {short(step[name])}"
        start = step.get("prompt_start", 0)
        if not (type(start) is int and 0 <= start <= num_seen):
            return f"prompt_start of step {number} is {short(start)}, of {num_seen} ids before it"
        if step["prompt_ids"] is not None:
            num_seen = start + len(step["prompt_ids"]) + len(step["completion_ids"] or ())
        known = step.get("logprobs")
        if not (known is None or (isinstance(known, list) and len(known) == len(step["completion_ids"] or ()))):
            return f"logprobs of step {number} are not one for each sampled id"
    return ""


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < MAX_ID for one in value)


def why_left_out(run: Mapping[str, Any]) -> str:
    """Why a run makes no rollout, in words; "" where it makes some."""
    if run["reward"] is None:
        return NO_REWARD
    if any(step.get("num_images") for step in run["steps"]):
        return WITH_IMAGES
    return "" if any(step["completion_ids"] for step in run["steps"]) else NO_IDS


def rollouts_of(run: Mapping[str, Any]) -> tuple[list[Rollout], str]:
    """The rollouts of a run, and where it was first cut, in words ("": nowhere)."""
    rollouts: list[Rollout] = []
    why_cut = ""
    for number, step in enumerate(run["steps"], start=1):
        prompt, sampled = step["prompt_ids"], step["completion_ids"]
        known = step.get("logprobs")
        seen = rollouts[-1].prompt_ids + rollouts[-1].completion_ids if rollouts else []
        is_next = bool(rollouts) and prompt[: len(seen)] == seen
        if not is_next:
            if rollouts:
                same = next(place for place, (one, two) in enumerate(zip_longest(seen, prompt)) if one != two)
                why_cut = why_cut or (
                    f"{run['id']}: the prompt of step {number} is another than what was read and sampled before it, "
                    f"from token {same + 1} of {len(seen)} on"
                )
            told = {"task": run["task"], "run": run["id"], "outcome": run["outcome"], "reward": float(run["reward"])}
            first = Rollout(
                **told, part=len(rollouts) + 1, num_parts=0, first_step=number, num_steps=0, prompt_ids=list(prompt)
            )
            first.logprobs = None if known is None else []
            rollouts.append(first)
        rollout = rollouts[-1]
        between = prompt[len(seen) :] if is_next else []
        rollout.completion_ids += [*between, *sampled]
        rollout.mask += [0] * len(between) + [1] * len(sampled)
        rollout.num_steps += 1
        is_known = known is not None and rollout.logprobs is not None
        rollout.logprobs = [*(rollout.logprobs or []), *[0.0] * len(between), *known] if is_known else None
    for rollout in rollouts:
        rollout.num_parts = len(rollouts)
    return rollouts, why_cut


def require_sampled(path: Path, source: Path, layout: Layout, suffix: str) -> None:
    """Raises DataError unless the rollouts of a file say, step by step, what the runs of `source` were asked and what
    they sampled: ids in, ids out."""
    rows = read_rollouts(path, suffix)
    for place, run in _runs(source):
        steps = iter([] if why_left_out(run) else run["steps"])
        for step in steps:
            row = next(rows, None)
            of_row = [] if row is None else [step, *islice(steps, row["num_steps"] - 1)]
            if row is None or row["run"] != run["id"] or not _says(row, of_row, NAMES[layout]):
                raise DataError(f"{place}: the rollouts of {run['id']} are not what it sampled; please report this")
    if next(rows, None) is not None:
        raise DataError(f"{path} holds more rollouts than {source} has; please report this")


def _says(row: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> bool:
    """Whether a rollout holds these steps: each prompt, what was sampled behind it, and the mask there alone."""
    prompt, ids, mask = row["prompt_ids"], row[names["completion_ids"]], row[names["mask"]]
    end = 0
    for step in steps:
        start, sampled = len(step["prompt_ids"]) - len(prompt), step["completion_ids"]
        asked_same = start >= end and prompt + ids[:start] == step["prompt_ids"]
        begin, end = end, start + len(sampled)
        masked_same = mask[begin:end] == [0] * (start - begin) + [1] * len(sampled)
        if not asked_same or ids[start:end] != sampled or not masked_same:
            return False
    return end == len(ids) == len(mask)


def read_rollouts(path: Path, suffix: str = "") -> Iterator[dict[str, Any]]:
    """The rows of a file of rollouts."""
    if (suffix or path.suffix) == ".jsonl":
        yield from read_jsonl(path)
        return
    for batch in pq.ParquetFile(path).iter_batches(ROWS_AT_ONCE):
        yield from batch.to_pylist()


def _write(path: Path, rows: Iterable[dict[str, Any]], layout: Layout, suffix: str) -> None:
    if suffix == ".jsonl":
        writer = JsonlWriter(path, append=False)
        for row in rows:
            writer.write(row)
        writer.close()
        return
    schema = _schema(layout)
    with ExitStack() as stack:
        parquet = stack.enter_context(pq.ParquetWriter(path, schema))
        rows = iter(rows)
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            parquet.write_table(pa.Table.from_pylist(batch, schema))


def _schema(layout: Layout) -> pa.Schema:
    """The columns of a parquet file, in the order of `Rollout.to_row`."""
    ids, names = pa.list_(pa.int32()), NAMES[layout]
    kinds = {GROUP[layout]: pa.string(), "run": pa.string(), "part": pa.int32(), "num_parts": pa.int32()}
    kinds |= {"outcome": pa.string(), "first_step": pa.int32(), "num_steps": pa.int32(), "prompt_ids": ids}
    kinds |= {names["completion_ids"]: ids, names["mask"]: pa.list_(pa.int8())}
    kinds |= {names["logprobs"]: pa.list_(pa.float64()), names["reward"]: pa.float64()}
    return pa.schema(kinds)
