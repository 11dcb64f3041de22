"""The folder of a finished run: what `evaluate` and `score` write, and what `score` and `compare` read.

samples.jsonl    one line an answer to a decision point, in the order of the data
tools.json       the declarations that the lines name
report.md        the report on one page
report.html      the same to look at, with every sample (`page.py`)
report.json      the report; written last, so that a run without it did not end
"""

import hashlib
import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_dist.errors import ConfigError
from gemma_dist.evaluate.decision import ScoredDecision
from gemma_dist.evaluate.markdown import report_page
from gemma_dist.evaluate.page import PageRun, write_page
from gemma_dist.evaluate.report import Report, make_report
from gemma_dist.files import writing
from gemma_dist.health.facts import versions
from gemma_dist.logs import JsonlWriter, read_jsonl, write_json
from gemma_dist.visible import masked

if TYPE_CHECKING:
    from gemma_dist.data.encode import Encoder

SAMPLES, TOOLS, REPORT = "samples.jsonl", "tools.json", "report.json"
RUNS = "runs.jsonl"  # of `act`, whose folder is made like one of an evaluation
MARKDOWN, HTML = "report.md", "report.html"
ToolSets = dict[str, list[Any]]  # tools.json: declarations by their key


@dataclass(frozen=True)
class Run:
    """What `evaluate` wrote to a folder."""

    folder: Path
    report: dict[str, Any]
    lines: list[ScoredDecision]


def read_run(folder: Path) -> Run:
    """A finished run.

    Raises:
        ConfigError: the folder holds no report, or none that goes with its samples.
    """
    if (folder / RUNS).is_file():
        raise ConfigError(
            f"{folder} holds runs of `act`, which were judged as they ended; `compare` takes two such folders"
        )
    if not (folder / REPORT).is_file():
        raise ConfigError(
            f"{folder} holds no {REPORT}: the run did not end, and the same command goes on with it; or another folder "
            "is meant, that `evaluate` or `score` wrote"
        )
    try:
        report = json.loads((folder / REPORT).read_bytes())
        lines = list(read_jsonl(folder / SAMPLES))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: {REPORT} or {SAMPLES} cannot be read: {error}; evaluate again") from None
    missing = {"sample", "key", "tools", "opening", "score"} - set(lines[0] if lines else ())
    if missing:
        raise ConfigError(f"{folder}/{SAMPLES}: an earlier version wrote it, without {sorted(missing)}; evaluate again")
    num_points = report.get("num_decision_points", 0) + report.get("beside", {}).get("num_points", 0)
    num_answers = num_points * report.get("num_samples", 0)
    if len(lines) != num_answers:
        raise ConfigError(
            f"{folder}: {SAMPLES} holds {len(lines)} answers, {REPORT} says {num_answers}; the two are of different "
            "runs: evaluate again"
        )
    return Run(folder, report, lines)


def read_tools(folder: Path) -> ToolSets:
    """The declarations that the lines of a run name."""
    tool_sets: ToolSets = json.loads((folder / TOOLS).read_bytes())
    return tool_sets


def write_results(out: Path, header: dict[str, Any], lines: list[ScoredDecision], tool_sets: ToolSets) -> Report:
    """Write the scored lines of a whole run and their report, which comes last.

    Args:
        header: as in `make_report`.
    """
    out.mkdir(parents=True, exist_ok=True)
    with writing(out / SAMPLES) as temporary:
        writer = JsonlWriter(temporary, append=False)
        for line in lines:
            writer.write(line)
        writer.close()
    write_json(out / TOOLS, tool_sets)
    report = make_report(header, lines)
    with writing(out / MARKDOWN) as temporary:
        temporary.write_text(report_page(report), encoding="utf-8")
    write_page(out / HTML, [PageRun(name_of(report), report, lines, tool_sets)], out)
    write_json(out / REPORT, report)
    return report


def made_by(encoder: "Encoder | None") -> dict[str, Any]:
    """What computed a report: packages, and the chat template of an `encoder` that rendered the prompts here."""
    if encoder is None:
        return {"versions": versions()}
    template = encoder.processor.chat_template.encode()
    return {"template_hash": hashlib.sha256(template).hexdigest()[:16], "versions": versions()}


def command() -> str:
    """The command line of this process, without the credentials in it."""
    return masked(shlex.join(["gemma-dist", *sys.argv[1:]]))


def name_of(report: Mapping[str, Any]) -> str:
    """What a page calls a run: its model, and its adapter if there is one."""
    return f"{report['model']} + {report['adapter']}" if report["adapter"] else str(report["model"])


def tools_key(tools: Sequence[Any]) -> str:
    """What a line calls these declarations: the beginning of a hash."""
    return hashlib.sha256(json.dumps(tools, sort_keys=True).encode()).hexdigest()[:16]


def without_repeats(steps: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Steps of a run of `act` as its line holds them: of each prompt, how many ids it begins with that are those of the
    step before it, read and sampled (`prompt_start`), and what stands behind them (`prompt_ids`)."""
    short, seen = [], list[int]()
    for step in steps:
        prompt = step["prompt_ids"]
        if prompt is None:
            short.append({"prompt_start": 0, **step})
            continue
        differ = (place for place, (one, two) in enumerate(zip(seen, prompt, strict=False)) if one != two)
        start = next(differ, min(len(seen), len(prompt)))
        short.append({**step, "prompt_start": start, "prompt_ids": prompt[start:]})
        seen = [*prompt, *(step["completion_ids"] or ())]
    return short


def with_repeats(steps: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The steps of a line of `act`, each with its whole prompt."""
    whole, seen = [], list[int]()
    for step in steps:
        prompt = step["prompt_ids"]
        if prompt is not None:
            prompt = seen[: step.get("prompt_start", 0)] + prompt
            seen = prompt + (step["completion_ids"] or [])
        whole.append({name: value for name, value in step.items() if name != "prompt_start"} | {"prompt_ids": prompt})
    return whole


def where_to_look(report: Report, out: Path) -> Iterator[str]:
    """The last lines for the terminal: the figure to read first, and where all others are."""
    found = report["metrics"]["overall"]
    if found["value"] is not None:
        right = f"{found['numerator']:,} of {found['denominator']:,} decisions are right"
        yield f"read first: overall {found['value']:.1%}, {right} (the right calls, or words where words were due)"
    yield f"each answer beside what was expected: {out / HTML}, in a browser; all numbers: {out / MARKDOWN}"
