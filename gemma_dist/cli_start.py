"""The part of the command line for the first hour: tiny, init, recipes, doctor; and health, for nodes of a cluster.

As in `cli.py`, a command reads its options and calls one function, and nothing heavy is imported before it runs.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_dist.options import EXISTING, NEW, SettingsCommand, refuse_idle, say

if TYPE_CHECKING:
    from gemma_dist.config import HealthConfig


@click.command()
@click.argument("out", type=NEW)
@click.option(
    "--style",
    type=click.Choice(["e2b", "e4b", "12b", "26b", "31b"]),
    default="e4b",
    show_default=True,
    help="Which Gemma 4.",
)
def tiny(out: Path, style: str) -> None:
    """Write a tiny random Gemma 4 with its processor to OUT."""
    from gemma_dist.model.tiny import write_tiny_model

    write_tiny_model(out, style=style)


@click.command()
@click.option("--out", type=NEW, help="Also copy launch/, accelerate_configs/ and slurm/ into this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def recipes(out: Path | None, as_json: bool) -> None:
    """List the recipes that come with the package.

    A recipe may be named without its folder: `gemma-dist plan e4b_qlora_16gb`. --out copies them all, with the
    accelerate configs and batch scripts, to be changed.
    """
    from gemma_dist.logs import to_json
    from gemma_dist.shipped import copy_shipped
    from gemma_dist.shipped import recipes as all_recipes

    found = all_recipes()
    copied = [str(folder) for folder in copy_shipped(out)] if out is not None else []
    if as_json:
        say(to_json({"recipes": [one._asdict() for one in found], "copied": copied}), exact=True)
        return
    width = max(len(one.name) for one in found)
    lines = [f"{one.name:<{width}}  {one.title}" for one in found]
    say("\n".join([*lines, *(f"copied: {folder}" for folder in copied)]))


def _asked(value: Any, question: str, option: str, *, default: Any = None, kind: Any = str) -> Any:
    """What an option says, or whoever sits at the terminal. UsageError where nobody does and there is no default."""
    if value is not None:
        return value
    if sys.stdin.isatty():
        return click.prompt(question, default=default, type=kind)
    if default is None:
        raise click.UsageError(f"Missing option '{option}'. Without a terminal nothing can be asked.")
    return default


@click.command()
@click.argument("out", type=NEW)
@click.option("--model", help="Folder or Hub name of the model.")
@click.option("--data", help="Rows (file, pattern, hf://…), or a folder of shards.")
@click.option("--num-gpus", type=click.IntRange(min=0), help="GPUs of a node; 0: the CPU. Default: those found here.")
@click.option("--gpu-memory", metavar="SIZE", help="Memory of each, by its size as sold: 24GB. Default: as found here.")
@click.option("--num-nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Number of nodes.")
@click.option("--tuning", type=click.Choice(["qlora", "lora", "full"]), help="What to train; default: what fits best.")
@click.option(
    "--from", "theirs", type=EXISTING, help="Config of TRL, axolotl … (YAML): say it as a recipe, ask nothing."
)
def init(
    out: Path,
    theirs: Path | None,
    model: str | None,
    data: str | None,
    num_gpus: int | None,
    gpu_memory: str | None,
    num_nodes: int,
    tuning: str | None,
) -> None:
    """Write a recipe, and what launches it, to OUT.

    Asks for what no option says. The recipe is the one of `gemma-dist recipes` for this model that is planned to fit.
    """
    if theirs is not None:
        refuse_idle("where --from is given", "model", "data", "num_gpus", "gpu_memory", "num_nodes", "tuning")
        from gemma_dist.start.theirs import init_from

        say(init_from(out, theirs))
        return
    if num_gpus == 0:
        refuse_idle("of a CPU (--num-gpus 0)", "gpu_memory")
    from gemma_dist.family import hub_name
    from gemma_dist.health.gpus import gpus_at_hand
    from gemma_dist.plan.margin import parse_memory
    from gemma_dist.start.init import Wish, require_data
    from gemma_dist.start.init import init as write

    here = [] if num_gpus is not None and gpu_memory is not None else gpus_at_hand()
    model = _asked(model, "Model: a folder, or a name on the hub", "--model", default=_only_asked(hub_name("E4B")))
    data = _asked(data, "Data: a file of rows, or a folder of shards", "--data")
    require_data(data)
    known = len(here) if here else _only_asked(0)
    num_gpus = _asked(num_gpus, "GPUs of a node (0: the CPU)", "--num-gpus", default=known, kind=click.IntRange(min=0))
    if num_gpus:
        found = f"{min(here) / 2**30:.0f}GB" if here else None
        gpu_memory = _asked(gpu_memory, "Memory of each, as sold", "--gpu-memory", default=found)
    memory = parse_memory(gpu_memory) if num_gpus and gpu_memory else None
    say(write(out, Wish(model, data, num_gpus, memory, num_nodes, tuning)).render())


def _only_asked(default: Any) -> Any:
    """A default that is proposed at a terminal, and not taken without one."""
    return default if sys.stdin.isatty() else None


@click.command()
@click.option("--train", "trains", is_flag=True, help="Also take two tiny steps of each launch: minutes.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def doctor(trains: bool, as_json: bool) -> None:
    """Look at this machine for what a run needs, with remedies.

    Versions, GPUs, 4-bit weights, exchanges, attention, DeepSpeed's compiler, disks, memory, Slurm, network. --train
    compares a tiny run of each launch on the devices that are here with the CPU's. Exit code 5: a run may fail here.
    """
    from gemma_dist import exits
    from gemma_dist.logs import to_json
    from gemma_dist.start import doctor

    findings = doctor.examine()
    if trains:
        from gemma_dist.start.launches import try_launches

        findings += try_launches()
    say(to_json(doctor.to_json(findings)) if as_json else doctor.render(findings), exact=as_json)
    if not doctor.is_fit(findings):
        click.get_current_context().exit(exits.NODE_UNFIT)


@click.command(cls=SettingsCommand, section=lambda config: config.HealthConfig)
def health(settings: "HealthConfig") -> None:
    """Check the nodes of a job before it begins.

    One process on each node: GPUs, disk, versions, clocks, an exchange of all. RANK, WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT say where the others are; without them, this machine alone. Exit code 5: a node, which is named, is
    unfit.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else torch tells of each wait that comes to its end
    from gemma_dist import exits
    from gemma_dist.health.run import check_health

    if code := check_health(settings):
        exits.leave(code)  # a thread may hang in a GPU or a disk
