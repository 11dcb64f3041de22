"""The command line, in the order of use: begin (`cli_start.py`), shard, look (`cli_look.py`), check, plan, train,
evaluate (`cli_evaluate.py`), act (`cli_act.py`), talk (`cli_chat.py`), merge, export … (`cli_merge.py`), serve
(`cli_serving.py`).

A command reads its options and calls one function of another module. Nothing heavy is imported before a command runs,
not even the settings, which need pydantic: so `--help` answers at once.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_dist import __version__, exits
from gemma_dist.cli_act import act
from gemma_dist.cli_chat import chat
from gemma_dist.cli_evaluate import compare, evaluate, read_calls, score
from gemma_dist.cli_look import check_prompts, from_one, inspect, plot, stats
from gemma_dist.cli_merge import export, export_rollouts, extract, merge
from gemma_dist.cli_serving import card, check_model, push, serve
from gemma_dist.cli_start import doctor, health, init, recipes, tiny
from gemma_dist.options import EXISTING, NEW, OrderedGroup, SettingsCommand, refuse_idle_length, say

if TYPE_CHECKING:
    from gemma_dist.config import ShardConfig
    from gemma_dist.shards.folder import Part


def _part(ctx: click.Context, param: click.Parameter, value: str | None) -> "Part | None":
    """The part that I/N says."""
    if value is None:
        return None
    from gemma_dist.shards.folder import Part

    number, _, of = value.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise click.BadParameter(f"{value!r} is no part such as 3/8, the third of eight", ctx, param)
    return Part(int(number), int(of))


def _say_given_twice(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Scripts put a setting of theirs before those of their user, so the last one is taken, but not in silence."""
    if len(value) > 1:
        from gemma_dist import world
        from gemma_dist.logs import log
        from gemma_dist.recipe import given_twice

        for twice in given_twice(value) if world.rank() == 0 else ():
            log.warning("%s", twice)
    return value


def recipe_arguments(command: Callable[..., None]) -> Callable[..., None]:
    """CONFIG and [KEY=VALUE]…, of each command that takes a recipe."""
    overrides = click.argument(
        "overrides", metavar="[KEY=VALUE]...", nargs=-1, type=click.UNPROCESSED, callback=_say_given_twice
    )
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


for command in (doctor, init, recipes, tiny):
    cli.add_command(command)


@cli.command(cls=SettingsCommand, section=lambda config: config.ShardConfig)
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option("--out", required=True, help="Folder or URL for the shards; must hold none, except with --append.")
@click.option("--model", required=True, help="Folder or Hub name of the model whose tokens are counted.")
@click.option("--skip-invalid", is_flag=True, help="Write invalid rows to OUT/rejected.jsonl instead of stopping.")
@click.option(
    "--max-rejected", type=click.IntRange(min=0), help="Stop once more rows are invalid; default: look at all."
)
@click.option("--part", metavar="I/N", callback=_part, help="Do a share of the work, I from 1 to N: see docs/data.md.")
@click.option("--work-dir", type=NEW, help="Where shards for a URL are made; default: ~/.cache/gemma_dist/shards.")
@click.option("--append", is_flag=True, help="Add to finished shards, which stay as they are.")
@click.option(
    "--split",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the rows to put aside: shards go to OUT/train and OUT/held_out, near duplicates together.",
)
@click.option("--num-workers", type=click.IntRange(min=1), help="Number of processes; default: one per core.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON.")
def shard(
    inputs: tuple[str, ...],
    out: str,
    model: str,
    skip_invalid: bool,
    max_rejected: int | None,
    part: "Part | None",
    work_dir: Path | None,
    append: bool,
    split: float | None,
    num_workers: int | None,
    as_json: bool,
    settings: "ShardConfig",
) -> None:
    """Check trajectories and write them as shards.

    INPUT is JSONL (also .gz, .zst), parquet, a WebDataset tar, a folder of datasets or MDS, a pattern of such, or
    hf://datasets/ORG/NAME; OUT, which may be a URL such as s3://bucket/train, gets parquet files and a manifest. After
    a kill, the same command resumes where it was.
    """
    refuse_idle_length(settings.max_length)
    from gemma_dist.data.inputs import find_inputs
    from gemma_dist.shards.sharding import run_shard

    if split is not None:
        if append or part:
            raise click.UsageError("--split puts aside of all rows at once: without --append and --part")
        from gemma_dist.show.split import shard_split

        reports = shard_split(
            find_inputs(inputs),
            out,
            model,
            settings,
            split,
            skip_invalid=skip_invalid,
            num_workers=num_workers,
            max_rejected=max_rejected,
            work_dir=work_dir,
        )
        for report in reports.values() if not as_json else ():
            say(report.summary())
        if as_json:
            say(json.dumps({name: report.to_json() for name, report in reports.items()}), exact=True)
        return
    report = run_shard(
        find_inputs(inputs),
        out,
        model,
        settings,
        skip_invalid,
        append=append,
        num_workers=num_workers,
        max_rejected=max_rejected,
        part=part,
        work_dir=work_dir,
    )
    say(json.dumps(report.to_json()) if as_json else report.summary(), exact=as_json)
    if part and not as_json:
        say(f"part {part.number} of {part.of} is done; the same command without --part joins all parts")


for looks in (inspect, stats, check_prompts):
    cli.add_command(looks)


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
        say(description)


@cli.command(context_settings=UNKNOWN_TO_OVERRIDES)
@recipe_arguments
@click.option("--gpu-memory", metavar="SIZE", help="The GPU that it has to fit, by its size as sold: 16GB.")
@click.option("--num-gpus", type=click.IntRange(min=1), help="Number of GPUs; default: as the accelerate config says.")
@click.option("--accelerate-config", type=EXISTING, help="How the GPUs share memory; default: DDP.")
@click.option("--num-tokens", type=click.IntRange(min=1), help="Of a micro-batch; default: as recipe and shards say.")
@click.option("--num-images", type=click.IntRange(min=0), help="Of a micro-batch; default: as the shards say, or 0.")
@click.option("--tokens-per-image", type=click.IntRange(min=1), help="Default: as the shards say, or 280.")
@click.option("--calibration", type=EXISTING, help="Figures of a machine; default: those that train --calibrate kept.")
@click.option(
    "--simulate",
    is_flag=True,
    help="Run one step of the model's true size without a GPU: slower, operator by operator.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON; sizes in bytes.")
def plan(
    config: Path,
    overrides: tuple[str, ...],
    gpu_memory: str | None,
    num_gpus: int | None,
    accelerate_config: Path | None,
    num_tokens: int | None,
    num_images: int | None,
    tokens_per_image: int | None,
    calibration: Path | None,
    simulate: bool,
    as_json: bool,
) -> None:
    """Show what CONFIG takes of a GPU, before there is one.

    Where the bytes go, whether they fit, and what would save some. Needs neither the model nor the shards, but knows
    more with them. KEY=VALUE changes a setting, as in `train`. Exit code 3: it does not fit.
    """
    from gemma_dist.plan.margin import parse_memory, read_margin
    from gemma_dist.plan.run import Request, plan_recipe
    from gemma_dist.plan.show import render, to_json
    from gemma_dist.topology import planned_topology

    memory = None if gpu_memory is None else parse_memory(gpu_memory)
    request = Request(memory, num_tokens, num_images, tokens_per_image, simulate)
    topology = planned_topology(accelerate_config, num_gpus)
    planned = plan_recipe(config, overrides, topology, read_margin(calibration), request)
    say(json.dumps(to_json(planned)) if as_json else render(planned), exact=as_json)
    if planned.fits is False:
        click.get_current_context().exit(exits.NOT_PASSED)


@cli.command(context_settings=UNKNOWN_TO_OVERRIDES)
@click.argument("data")
@recipe_arguments
@click.option(
    "--step", required=True, type=int, callback=from_one, help="First optimizer step, from 1 as in metrics.jsonl."
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
    from gemma_dist.logs import log, to_json
    from gemma_dist.recipe import load_config
    from gemma_dist.resolve import resolve
    from gemma_dist.show.batches import batches
    from gemma_dist.stream.growth import editions_of_newest
    from gemma_dist.topology import Topology

    if data != "-":
        overrides = (*overrides, f"data.train={data}")
    if quarantine:
        overrides = (*overrides, f"data.quarantine={quarantine}")
    settings = load_config(config, overrides)
    topology = Topology("", world_size or world.world_size())
    run = resolve(settings, topology)
    if editions := editions_of_newest(settings.train.output_dir, run.schedule.shards):
        run = resolve(settings, topology, editions)
    if step + num_steps - 1 > run.num_steps:
        log.warning("the run has %d steps: those behind are of a longer one", run.num_steps)
    for described in batches(run.schedule, step, num_steps):
        say(to_json(described.to_json()) if as_json else described.render(), exact=as_json)


cli.add_command(health)


@cli.command(context_settings=UNKNOWN_TO_OVERRIDES)
@recipe_arguments
@quarantine_option
@click.option("--calibrate", is_flag=True, help="Keep what this GPU takes beside the tensors, for later plans.")
@click.option("--dry-run", is_flag=True, help="Try all of it, change no weight and keep nothing: see docs/launch.md.")
@click.option("--json", "as_json", is_flag=True, help="Print what a dry run measured as one line of JSON.")
def train(
    config: Path, overrides: tuple[str, ...], quarantine: Path | None, calibrate: bool, dry_run: bool, as_json: bool
) -> None:
    """Train as the recipe CONFIG says.

    Alone, or on many processes under `accelerate launch --config_file ... -m gemma_dist train CONFIG`. KEY=VALUE
    changes a setting of the recipe: learning_rate=1e-4, or lora.r=8 with its section.
    """
    from gemma_dist.train.stop import StopRequests

    requests = StopRequests()
    requests.listen()
    from gemma_dist.recipe import load_config
    from gemma_dist.topology import current_topology, require_fit

    if as_json and not dry_run:
        raise click.UsageError("--json is for --dry-run; a run writes its figures to OUT/metrics.jsonl")
    if quarantine:
        overrides = (*overrides, f"data.quarantine={quarantine}")
    settings = load_config(config, overrides)  # before torch is loaded: a typo should cost a second,
    require_fit(settings, current_topology())  # and so should a batch that the ranks cannot share
    from gemma_dist.logs import say_idle_gpus
    from gemma_dist.plan.watch import PlanWatch
    from gemma_dist.train import dry, run

    say_idle_gpus(["train", config, *overrides])
    watch = PlanWatch(calibrate=calibrate)
    if dry_run:
        dry.say(settings, watch, requests, as_json=as_json)
    else:
        run.train(settings, watch=watch, requests=requests)


COMMANDS: tuple[click.Command, ...] = (
    *(plot, evaluate, score, compare, read_calls, act, chat, merge, export, export_rollouts, extract),
    *(check_model, card, serve, push),
)
for verb in COMMANDS:
    cli.add_command(verb)
