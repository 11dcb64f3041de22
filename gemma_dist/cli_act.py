"""The part of the command line that lets a model act: act.

As in `cli.py`, a command reads its options and calls one function, and nothing heavy is imported before it runs.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_dist.options import EXISTING, NEW, SettingsCommand, refuse_idle, refuse_idle_sampling

if TYPE_CHECKING:
    from gemma_dist.config_act import ActConfig
    from gemma_dist.config_server import ServerConfig


def _act_section(_: object) -> "type[ActConfig]":
    from gemma_dist.config_act import ActConfig

    return ActConfig


def _server_section() -> "type[ServerConfig]":
    from gemma_dist.config_server import ServerConfig

    return ServerConfig


@click.command(cls=SettingsCommand, section=_act_section, beside={"server_settings": _server_section})
@click.option("--model", help="Folder or Hub name of the model; with --server, the server's name of it.")
@click.option("--adapter", type=EXISTING, help="Folder of a LoRA adapter for the model.")
@click.option("--data", required=True, type=EXISTING, help="Tasks: rows up to their first answer; JSONL or shards.")
@click.option("--tools", metavar="MODULE:NAME", help="What it may call: a function, or a list or dict of functions.")
@click.option("--check", metavar="MODULE:NAME", help="check(row, messages): whether a run succeeded, or its reward.")
@click.option("--setup", metavar="MODULE:NAME", help="setup(row): called in a run's process before its first call.")
@click.option("--replay", is_flag=True, help="Take the tools' answers from the rows, while the calls are the same.")
@click.option("--out", required=True, type=NEW, help="Folder for runs.jsonl and report.json.")
@click.option("--keep", type=NEW, help="File for the rows of runs that succeeded, as `shard` takes them.")
@click.option("--limit", type=click.IntRange(min=1), help="Only this many tasks, the first ones.")
def act(
    model: str | None,
    adapter: Path | None,
    data: Path,
    tools: str | None,
    check: str | None,
    setup: str | None,
    replay: bool,
    out: Path,
    keep: Path | None,
    limit: int | None,
    settings: "ActConfig",
    server_settings: "ServerConfig",
) -> None:
    """Let a model act on tasks: run its calls, and keep what succeeds.

    Alone, or on many processes under `accelerate launch ... -m gemma_dist act`; or asking a server that holds the
    model (--server URL).
    """
    if replay and (tools or check or setup):
        raise click.UsageError("--replay runs no functions: the rows answer. Leave --tools, --check and --setup out.")
    if replay:
        refuse_idle("where --replay is given", "unfit_calls", "tool_timeout_s", "declare", "max_steps")
    if not replay and tools is None:
        raise click.UsageError("Name what it may call by --tools MODULE:NAME, or let the rows answer by --replay.")
    refuse_idle("of own runs: the rest of a row is not read", "unroll", remedy="leave it out")
    refuse_idle_sampling(settings.temperature)
    from gemma_dist.act.finish import Work
    from gemma_dist.evaluate.server import require_no_server_settings

    work = Work(data, out, limit, settings, tools, check, setup, keep)
    if server_settings.server is not None:
        if adapter is not None:
            raise click.UsageError("--adapter: load it into the server, and name it as the server does by --model")
        from gemma_dist.act.served import act_served

        act_served(model, work, server_settings)
        return
    require_no_server_settings(server_settings)
    if model is None:
        raise click.UsageError("Missing option '--model'.")
    from gemma_dist.act import run
    from gemma_dist.logs import say_idle_gpus

    say_idle_gpus(["act", *sys.argv[2:]])
    run.act(model, adapter, work)
