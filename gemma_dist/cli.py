"""The command line, in the order of use: make a model, shard, inspect, check, train, evaluate, merge.

A command reads its options and calls one function of another module. Nothing heavy is imported before a command runs,
not even the settings, which need pydantic: so `--help` answers at once.
"""

import dataclasses
import functools
import json
import os
import sys
import types
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from gemma_dist import __version__
from gemma_dist.aliases import current_value
from gemma_dist.errors import GemmaDistError, spell

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from gemma_dist.config import EvaluateConfig, MergeConfig, RowConfig, Section, ShardConfig

EXISTING = click.Path(exists=True, path_type=Path)
NEW = click.Path(path_type=Path)


class OrderedGroup(click.Group):
    """Commands in the order in which they are written below. Each spells the remedies of errors its own way."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GemmaDistError as error:
            command = self.commands[str(ctx.invoked_subcommand)]
            error.args = (spell(str(error), spellings(command)),)
            raise


class SettingsCommand(click.Command):
    """A command with an option for each setting of a section of config.py; its function gets them as `settings`.

    `section` picks the class from the module config, which is first imported when a command is called or asked for its
    own help.
    """

    def __init__(self, *args: Any, section: Callable[[Any], "type[Section]"], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pick_section = section

    @functools.cached_property
    def section(self) -> "type[Section]":
        """The class of the settings."""
        from gemma_dist import config

        return self._pick_section(config)

    @functools.cached_property
    def setting_options(self) -> list[click.Option]:
        """One option for each setting."""
        return [_option_of(name, field) for name, field in self.section.model_fields.items()]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *params, help_option = super().get_params(ctx)
        return [*params, *self.setting_options, help_option]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The bare flag of before, --enable-thinking, stands for --enable-thinking true."""
        words = []
        for word, following in zip_longest(args, args[1:], fillvalue=""):
            is_bare = word == "--enable-thinking" and following not in ("auto", "true", "false")
            words.append(f"{word}=true" if is_bare else word)
        return super().parse_args(ctx, words)

    def invoke(self, ctx: click.Context) -> Any:
        from gemma_dist.recipe import load_section

        values = {name: ctx.params.pop(name) for name in self.section.model_fields}
        ctx.params["settings"] = load_section(self.section, values)
        return super().invoke(ctx)


def _option_of(name: str, field: "FieldInfo") -> click.Option:
    """The option for a setting, with the name, values, default and sentence that config.py gives it."""
    from gemma_dist.config import option

    kind = field.annotation
    if get_origin(kind) is types.UnionType:  # with None, which is to leave the option out
        kind = get_args(kind)[0]
    choices = [_word(value) for value in get_args(kind)] if get_origin(kind) is Literal else []
    return click.Option(
        [option(name)],
        type=SettingChoice(choices) if choices else kind,
        is_flag=kind is bool,
        default=_word(field.default) if choices else field.default,
        show_default=field.default is not None,
        help=field.description,
    )


def _word(value: object) -> str:
    """A value of a choice as it is typed: true for True."""
    return str(value).lower() if isinstance(value, bool) else str(value)


class SettingChoice(click.Choice):
    """The values that a setting may have, also by their names in earlier versions."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(current_value(value), param, ctx)


def spellings(command: click.Command) -> dict[str, str]:
    """How a user of `command` changes each setting that a remedy may name, with {} for the value: by an option of the
    command, by a key of its recipe, or else by the command that decides the setting."""
    from gemma_dist.config import MergeConfig, ShardConfig, TrainDataConfig, option

    params = command.get_params(click.Context(command))
    own = {param.name for param in params if isinstance(param, click.Option)}
    takes_recipe = any(param.name == "overrides" for param in params)
    spelled = {}
    for name in ShardConfig.model_fields | TrainDataConfig.model_fields | MergeConfig.model_fields:
        if name in own:
            spelled[name] = f"{option(name)} {{}}"
        elif name in TrainDataConfig.model_fields:
            spelled[name] = f"data.{name}={{}}" if takes_recipe else f"`gemma-dist train … data.{name}={{}}`"
        elif name in ShardConfig.model_fields:
            spelled[name] = f"`gemma-dist shard … {option(name)} {{}}`"
        else:
            spelled[name] = f"`gemma-dist merge … {option(name)} {{}}`"
    return spelled


def _spelled(text: str) -> str:
    """A message with its remedies as the running command takes them."""
    return spell(text, spellings(click.get_current_context().command))


def _from_one(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    """Refuse a row or step below the first."""
    if value is not None and value < 1:
        raise click.BadParameter(f"{param.name}s are counted from 1, as in messages, not {value}", ctx, param)
    return value


def recipe_arguments(command: Callable[..., None]) -> Callable[..., None]:
    """CONFIG and [KEY=VALUE]…, of each command that takes a recipe."""
    overrides = click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1, type=click.UNPROCESSED)
    return click.argument("config", type=NEW)(overrides(command))


world_size_option = click.option(
    "--world-size", type=click.IntRange(min=1), help="World size to assume; default: the current one."
)
quarantine_option = click.option(
    "--quarantine", type=EXISTING, help="File of ids or row groups that are left out: data.quarantine."
)
# Words like --learning-rate go to the overrides, which say how such a thing is written here.
UNKNOWN_TO_OVERRIDES = {"ignore_unknown_options": True}


@click.group(cls=OrderedGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Fine-tune Gemma 4 on tool calling: from trajectories in JSONL to a merged checkpoint."""


@cli.command()
@click.argument("out", type=NEW)
@click.option(
    "--style", type=click.Choice(["e4b", "31b", "26b"]), default="e4b", show_default=True, help="Which Gemma 4."
)
def tiny(out: Path, style: str) -> None:
    """Write a tiny random Gemma 4 with its processor to OUT."""
    from gemma_dist.model.tiny import write_tiny_model

    write_tiny_model(out, style=style)


@cli.command(cls=SettingsCommand, section=lambda config: config.ShardConfig)
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True, type=EXISTING)
@click.option("--out", required=True, type=NEW, help="Folder for the shards; must hold none, except with --append.")
@click.option("--model", required=True, help="Folder or Hub name of the model whose tokens are counted.")
@click.option("--skip-invalid", is_flag=True, help="Write invalid rows to OUT/rejected.jsonl instead of stopping.")
@click.option("--append", is_flag=True, help="Add to finished shards, which stay as they are.")
@click.option("--num-workers", type=click.IntRange(min=1), help="Number of processes; default: one per core.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON.")
def shard(
    inputs: tuple[Path, ...],
    out: Path,
    model: str,
    skip_invalid: bool,
    append: bool,
    num_workers: int | None,
    as_json: bool,
    settings: "ShardConfig",
) -> None:
    """Check trajectories and write them as shards.

    INPUT is JSONL (also .gz, .zst), parquet or a datasets folder; OUT gets parquet files and a manifest. After a kill,
    the same command resumes where it was.
    """
    from gemma_dist.shards.sharding import run_shard

    report = run_shard(list(inputs), out, model, settings, skip_invalid, append=append, num_workers=num_workers)
    click.echo(json.dumps(report.to_json()) if as_json else report.summary())


@cli.command(cls=SettingsCommand, section=lambda config: config.ShardConfig)
@click.argument("data")
@click.option("--model", required=True, help="Folder or Hub name of the model that would see the row.")
@click.option(
    "--row", type=int, callback=_from_one, help="Number of the row, from 1, as messages print it: DATA:ROW. Default: 1."
)
@click.option("--id", "row_id", help="Id of the row, in the place of --row.")
@click.option("--json", "as_json", is_flag=True, help="Print ids, labels (-100: not trained) and tokens as JSON.")
def inspect(data: str, model: str, row: int | None, row_id: str | None, as_json: bool, settings: "ShardConfig") -> None:
    """Show one row as the model sees it, target tokens colored.

    DATA is a file of rows (their lines are their numbers) or a folder of shards, which may be a URL.
    """
    if row is not None and row_id is not None:
        raise click.UsageError("name one row: by --row (its number, from 1) or by --id")
    from gemma_dist.show.row import inspect_row

    chosen = row_id if row_id is not None else row or 1
    inspection = inspect_row(data, model, chosen, settings)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    notes = {_spelled(note): count for note, count in inspection.notes.items()}
    inspection = dataclasses.replace(inspection, notes=notes)
    click.echo(json.dumps(inspection.to_json()) if as_json else inspection.render(color))


@cli.command(cls=SettingsCommand, section=lambda config: config.RowConfig)
@click.argument("data")
@click.option("--model", required=True, help="Folder or Hub name of the model that is trained.")
@click.option("--server-template", help="A Jinja file, or the name of a revision; default: the model's own.")
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
    click.echo(json.dumps(report.to_json()) if as_json else report.render())
    if report.differences:
        click.get_current_context().exit(1)


@cli.command(context_settings=UNKNOWN_TO_OVERRIDES)
@recipe_arguments
@world_size_option
@click.option("--accelerate-config", type=EXISTING, help="Also check compatibility with this accelerate config.")
def check(config: Path, overrides: tuple[str, ...], world_size: int | None, accelerate_config: Path | None) -> None:
    """Show the run that CONFIG describes, without running it.

    Settings, batch arithmetic, data, and what trains; with --accelerate-config, or under `accelerate launch`, also
    whether they are compatible. KEY=VALUE changes a setting, as in `train`.
    """
    from gemma_dist import world
    from gemma_dist.recipe import load_config
    from gemma_dist.topology import current_topology, read_topology, require_fit

    settings = load_config(config, overrides)
    topology = read_topology(accelerate_config) if accelerate_config else current_topology()
    if world_size:
        topology = dataclasses.replace(topology, num_processes=world_size)
    if accelerate_config or "WORLD_SIZE" in os.environ:
        require_fit(settings, topology)
    from gemma_dist.resolve import resolve
    from gemma_dist.show.check import describe_run

    description = describe_run(resolve(settings, topology))
    if world.rank() == 0:
        click.echo(description)


@cli.command(context_settings=UNKNOWN_TO_OVERRIDES)
@click.argument("data")
@recipe_arguments
@click.option(
    "--step", required=True, type=int, callback=_from_one, help="First optimizer step, from 1 as in metrics.jsonl."
)
@click.option("--num-steps", type=click.IntRange(min=1), default=1, show_default=True, help="How many steps.")
@world_size_option
@quarantine_option
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON a step.")
def batches(
    data: str,
    config: Path,
    overrides: tuple[str, ...],
    step: int,
    num_steps: int,
    world_size: int | None,
    quarantine: Path | None,
    as_json: bool,
) -> None:
    """Show which samples a step trains on.

    Lists the samples of a step by rank and micro-batch, to find the row behind a bad step. They are computed from the
    manifest; no row is read. DATA is a folder of shards, or - for those that CONFIG names.
    """
    from gemma_dist import world
    from gemma_dist.logs import to_json
    from gemma_dist.recipe import load_config
    from gemma_dist.resolve import resolve
    from gemma_dist.show.batches import batches
    from gemma_dist.topology import Topology

    if data != "-":
        overrides = (*overrides, f"data.train={data}")
    if quarantine:
        overrides = (*overrides, f"data.quarantine={quarantine}")
    settings = load_config(config, overrides)
    run = resolve(settings, Topology("", world_size or world.world_size()))
    for described in batches(run.schedule, step, num_steps):
        click.echo(to_json(described.to_json()) if as_json else described.render())


@cli.command(context_settings=UNKNOWN_TO_OVERRIDES)
@recipe_arguments
@quarantine_option
def train(config: Path, overrides: tuple[str, ...], quarantine: Path | None) -> None:
    """Train as the recipe CONFIG says.

    Alone, or on many processes under `accelerate launch --config_file ... -m gemma_dist train CONFIG`. KEY=VALUE
    changes a setting of the recipe: learning_rate=1e-4, or lora.r=8 with its section.
    """
    from gemma_dist.recipe import load_config

    if quarantine:
        overrides = (*overrides, f"data.quarantine={quarantine}")
    settings = load_config(config, overrides)  # before torch is loaded: a typo should cost a second
    from gemma_dist.logs import say_idle_gpus
    from gemma_dist.train import run

    say_idle_gpus(["train", config, *overrides])
    run.train(settings)


@cli.command(cls=SettingsCommand, section=lambda config: config.EvaluateConfig)
@click.option("--model", required=True, help="Folder or Hub name of the model.")
@click.option("--adapter", type=EXISTING, help="Folder of a LoRA adapter for the model.")
@click.option("--data", required=True, type=EXISTING, help="Held-out trajectories: a JSONL file or a shard folder.")
@click.option("--out", required=True, type=NEW, help="Folder for report.json and samples.jsonl.")
@click.option("--limit", type=click.IntRange(min=1), help="Evaluate only this many trajectories, the first ones.")
def evaluate(
    model: str, adapter: Path | None, data: Path, out: Path, limit: int | None, settings: "EvaluateConfig"
) -> None:
    """Let a model answer held-out trajectories and score its calls.

    Alone, or on many processes under `accelerate launch ... -m gemma_dist evaluate`.
    """
    from gemma_dist.evaluate import run
    from gemma_dist.logs import say_idle_gpus

    say_idle_gpus(["evaluate", *sys.argv[2:]])
    run.evaluate(model, adapter, data, out, limit, settings)


@cli.command()
def read_calls() -> None:
    """Read the calls in model output: JSONL in, JSONL out.

    In: {"output": ..., "prefix"?: ...}; the prefix is the end of the prompt, if that ends inside an open block. Out:
    calls, content, reasoning and status.
    """
    from gemma_dist.evaluate.read import read_calls_lines

    for line in read_calls_lines(sys.stdin.buffer):  # as bytes: UTF-8 in any locale, and lines end at \n alone
        click.echo(line)


@cli.command(cls=SettingsCommand, section=lambda config: config.MergeConfig)
@click.option("--base", required=True, help="Folder or Hub name of the model that the adapter was trained on.")
@click.option("--adapter", required=True, type=EXISTING, help="Folder of the LoRA adapter.")
@click.option("--out", required=True, type=NEW, help="Folder of the merged model.")
@click.option("--verify", is_flag=True, help="Also compare the logits of the result with those of base and adapter.")
def merge(base: str, adapter: Path, out: Path, verify: bool, settings: "MergeConfig") -> None:
    """Add an adapter to its base and write a whole model."""
    from gemma_dist.merge import run

    click.echo(run.merge(base, adapter, out, verify=verify, base_weights=settings.base_weights).summary())
