"""The part of the command line that looks: at rows (inspect, stats, check-prompts), and at runs (plot).

As in `cli.py`, a command reads its options and calls one function, and nothing heavy is imported before it runs.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_dist.errors import spell
from gemma_dist.options import EXISTING, NEW, SettingsCommand, refuse_idle, refuse_idle_length, say, spellings

if TYPE_CHECKING:
    from gemma_dist.config import RowConfig, ShardConfig


def _spelled(text: str) -> str:
    """A message with its remedies as the running command takes them."""
    return spell(text, spellings(click.get_current_context().command))


def from_one(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    """Refuse a row or step below the first."""
    if value is not None and value < 1:
        raise click.BadParameter(f"{param.name}s are counted from 1, as in messages, not {value}", ctx, param)
    return value


def of_a_page(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse the name of what is no page: a file of rows, named by mistake, would be written over."""
    if value is not None and value.suffix != ".html":
        raise click.BadParameter(f"{value} is no name of a page; write one that ends in .html", ctx, param)
    return value


@click.command(cls=SettingsCommand, section=lambda config: config.ShardConfig)
@click.argument("data")
@click.option("--model", required=True, help="Folder or Hub name of the model that would see the row.")
@click.option(
    "--row", type=int, callback=from_one, help="Number of the row, from 1, as messages print it: DATA:ROW. Default: 1."
)
@click.option("--id", "row_id", help="Id of the row, in the place of --row.")
@click.option(
    "--html",
    "page",
    type=NEW,
    callback=of_a_page,
    help="Write a page to this file instead, pictures in their places: NAME.html.",
)
@click.option("--json", "as_json", is_flag=True, help="Print ids, labels (-100: not trained) and tokens as JSON.")
def inspect(
    data: str,
    model: str,
    row: int | None,
    row_id: str | None,
    page: Path | None,
    as_json: bool,
    settings: "ShardConfig",
) -> None:
    """Show one row as the model sees it, target tokens colored.

    DATA is a file of rows (their lines are their numbers) or a folder of shards, which may be a URL.
    """
    if row is not None and row_id is not None:
        raise click.UsageError("name one row: by --row (its number, from 1) or by --id")
    if page is not None:
        refuse_idle("where --html is given", "as_json")
    refuse_idle_length(settings.max_length)
    from gemma_dist.show.row import inspect_row

    chosen = row_id if row_id is not None else row or 1
    inspection = inspect_row(data, model, chosen, settings)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    notes = {_spelled(note): count for note, count in inspection.notes.items()}
    inspection = dataclasses.replace(inspection, notes=notes)
    if page is not None:
        from gemma_dist.show.row_page import write_row_page

        write_row_page(page, inspection, data)
        say(f"{page}: open it in a browser")
        return
    say(json.dumps(inspection.to_json()) if as_json else inspection.render(color), exact=True)


@click.command(cls=SettingsCommand, section=lambda config: config.RowConfig)
@click.argument("data", metavar="DATA...", nargs=-1, required=True)
@click.option("--against", metavar="DATA", multiple=True, help="Held-out rows: show which rows of DATA they hold, too.")
@click.option("--model", help="Folder or Hub name of the model whose tokens are counted; shards know theirs.")
@click.option("--html", "page", type=NEW, callback=of_a_page, help="Also write a page to this file: NAME.html.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def stats(
    data: tuple[str, ...],
    against: tuple[str, ...],
    model: str | None,
    page: Path | None,
    as_json: bool,
    settings: "RowConfig",
) -> None:
    """Show lengths, tools, duplicates and leaks of a corpus.

    DATA is a file of rows or a folder of shards, which may be a URL. Refused rows are counted by their reason.
    """
    from gemma_dist.logs import to_json
    from gemma_dist.show.stats import collect_stats

    found = collect_stats(list(data), list(against), model, settings)
    if page is not None:
        from gemma_dist.show.stats_page import write_stats_page

        write_stats_page(page, found)
    say(to_json(found.to_json()) if as_json else found.render(), exact=as_json)


@click.command(cls=SettingsCommand, section=lambda config: config.RowConfig)
@click.argument("data")
@click.option("--model", required=True, help="Folder or Hub name of the model that is trained.")
@click.option("--server-template", help="A Jinja or GGUF file, or the name of a revision; default: the model's own.")
@click.option("--limit", type=click.IntRange(min=1), help="Look at only this many rows, the first ones.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON.")
def check_prompts(
    data: str, model: str, server_template: str | None, limit: int | None, as_json: bool, settings: "RowConfig"
) -> None:
    """Compare what is trained with the prompts that a server makes.

    DATA is a file of rows or a folder of shards. The token ids in front of each trained answer are to equal the
    generation prompt that the server's template makes of the same history. Exit code 1: some differ.
    """
    from gemma_dist.show.prompts import check_prompts as check

    report = check(data, model, server_template, settings, limit)
    report.refused = [_spelled(error) for error in report.refused]
    say(json.dumps(report.to_json()) if as_json else report.render(), exact=as_json)
    if report.differences:
        click.get_current_context().exit(1)


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=EXISTING)
@click.option(
    "--out", type=NEW, help="A file .html, or .png (matplotlib); default: RUN/plot.html, of several ./plot.html."
)
def plot(runs: tuple[Path, ...], out: Path | None) -> None:
    """Draw the loss and all else that training runs logged.

    RUN is an output_dir, or a metrics.jsonl. Loss of all tokens and by kind, of training and evaluation, learning rate,
    gradients, speed; several runs in one picture. A run may be at work meanwhile.
    """
    from gemma_dist.show.plot import plot_runs

    say(f"{plot_runs(list(runs), out)}: open it to see")
