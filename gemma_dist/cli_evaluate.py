"""The part of the command line that asks a model and judges its answers: evaluate, score, compare, read-calls.

As in `cli.py`, a command reads its options and calls one function, and nothing heavy is imported before it runs.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_dist.options import EXISTING, NEW, SettingsCommand, refuse_idle, refuse_idle_sampling, say

if TYPE_CHECKING:
    from gemma_dist.config import EvaluateConfig
    from gemma_dist.config_server import ServerConfig


def _server_section() -> "type[ServerConfig]":
    from gemma_dist.config_server import ServerConfig

    return ServerConfig


@click.command(
    cls=SettingsCommand, section=lambda config: config.EvaluateConfig, beside={"server_settings": _server_section}
)
@click.option("--model", help="Folder or Hub name of the model; with --server, the server's name of it.")
@click.option("--adapter", type=EXISTING, help="Folder of a LoRA adapter for the model.")
@click.option("--data", required=True, type=EXISTING, help="Held-out trajectories: a JSONL file or a shard folder.")
@click.option("--out", required=True, type=NEW, help="Folder for report.json, report.html and samples.jsonl.")
@click.option("--limit", type=click.IntRange(min=1), help="Evaluate only this many trajectories, the first ones.")
def evaluate(
    model: str | None,
    adapter: Path | None,
    data: Path,
    out: Path,
    limit: int | None,
    settings: "EvaluateConfig",
    server_settings: "ServerConfig",
) -> None:
    """Let a model answer held-out trajectories and score its calls.

    Alone, or on many processes under `accelerate launch ... -m gemma_dist evaluate`; or asking a server that holds the
    model (--server URL).
    """
    refuse_idle_sampling(settings.temperature)
    from gemma_dist.evaluate.server import evaluate_server, require_no_server_settings

    if server_settings.server is not None:
        if adapter is not None:
            raise click.UsageError("--adapter: load it into the server, and name it as the server does by --model")
        if settings.loss:
            refuse_idle("where --server is given, which tells none", "loss")
        evaluate_server(model, data, out, limit, settings, server_settings)
        return
    require_no_server_settings(server_settings)
    if model is None:
        raise click.UsageError("Missing option '--model'.")
    from gemma_dist.evaluate import run
    from gemma_dist.logs import say_idle_gpus

    say_idle_gpus(["evaluate", *sys.argv[2:]])
    run.evaluate(model, adapter, data, out, limit, settings)


@click.command()
@click.option("--from", "run", required=True, type=EXISTING, help="Folder that `evaluate` wrote.")
@click.option("--data", type=EXISTING, help="Rows whose gold and tools are taken; default: as they were then.")
@click.option("--out", required=True, type=NEW, help="Folder for report.json, report.html and samples.jsonl.")
@click.option("--answer-tolerance", type=click.FloatRange(min=0), help="As in `evaluate`; default: as it was then.")
def score(run: Path, data: Path | None, out: Path, answer_tolerance: float | None) -> None:
    """Score what a model wrote again, without the model.

    With the rules of this version, or against corrected data; where nothing changed, the report is the same.
    """
    from gemma_dist.evaluate.report import summary
    from gemma_dist.evaluate.rescore import score_again
    from gemma_dist.evaluate.runs import where_to_look

    report = score_again(run, data, out, answer_tolerance)
    for line in (*summary(report), *where_to_look(report, out)):
        say(line)


@click.command()
@click.argument("before", type=EXISTING)
@click.argument("after", type=EXISTING)
@click.option("--out", type=NEW, help="Also write comparison.json, .md and, of `evaluate`, .html there.")
@click.option("--fail-below", metavar="METRIC=X", multiple=True, help="Exit code 3 where AFTER has less: overall=0.9.")
@click.option(
    "--fail-if-worse", is_flag=True, help="Exit code 3 where `overall` (`success`) fell, or over-calling rose."
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def compare(
    before: Path, after: Path, out: Path | None, fail_below: tuple[str, ...], fail_if_worse: bool, as_json: bool
) -> None:
    """Compare two runs of `evaluate` or `act`: is AFTER better?

    Both are folders that `evaluate` or `score` wrote, of the same data, or `act`, of the same tasks. Prints a page of
    Markdown: metrics before and after with the interval of each difference, slices, and what was fixed and broken.
    """
    from gemma_dist import exits
    from gemma_dist.evaluate.compare_page import compare_runs
    from gemma_dist.evaluate.runs import RUNS

    compared = compare_runs
    if any((folder / RUNS).is_file() for folder in (before, after)):
        from gemma_dist.act.changes import compare_acted as compared
    page, passes = compared(before, after, out, fail_below, fail_if_worse, as_json=as_json)
    say(page, exact=as_json, nl=False)
    if not passes:
        click.get_current_context().exit(exits.NOT_PASSED)


@click.command()
def read_calls() -> None:
    """Read the calls in model output: JSONL in, JSONL out.

    In: {"output": ..., "prefix"?: ...}; the prefix is the end of the prompt, if that ends inside an open block. Out:
    calls, content, reasoning and status.
    """
    from gemma_dist.data.read import read_calls_lines

    for line in read_calls_lines(sys.stdin.buffer):  # as bytes: UTF-8 in any locale, and lines end at \n alone
        say(line, exact=True)
