"""The part of the command line that makes of what was trained what other tools load: merge, export, extract;
and of runs: export-rollouts.

As in `cli.py`, a command reads its options and calls one function, and nothing heavy is imported before it runs.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from gemma_dist.options import EXISTING, NEW, SettingsCommand, WeightedFolder, refuse_idle, say

if TYPE_CHECKING:
    from gemma_dist.config_merge import ExportConfig, ExtractConfig, MergeConfig


def _merge_section(_: object) -> "type[MergeConfig]":
    from gemma_dist.config_merge import MergeConfig

    return MergeConfig


def _export_section(_: object) -> "type[ExportConfig]":
    from gemma_dist.config_merge import ExportConfig

    return ExportConfig


def _extract_section(_: object) -> "type[ExtractConfig]":
    from gemma_dist.config_merge import ExtractConfig

    return ExtractConfig


@click.command(cls=SettingsCommand, section=_merge_section)
@click.option("--base", required=True, help="Folder or Hub name of the model that the adapter was trained on.")
@click.option(
    "--adapter",
    "adapters",
    required=True,
    multiple=True,
    type=WeightedFolder(),
    help="Folder of the LoRA adapter; again for each further one, with weights as in --adapter A=0.7 --adapter B=0.3.",
)
@click.option("--out", required=True, type=NEW, help="Folder of the merged model.")
@click.option("--verify", is_flag=True, help="Also compare the logits of the result with those of base and adapter.")
def merge(base: str, adapters: list[tuple[Path, float]], out: Path, verify: bool, settings: "MergeConfig") -> None:
    """Add adapters to their base and write a whole model."""
    from gemma_dist.merge import run

    given = [adapter.resolve() for adapter, _ in adapters]
    if twice := next((adapter for adapter in given if given.count(adapter) > 1), None):
        raise click.UsageError(f"--adapter {twice} is given twice; give it once, with the sum of the weights")
    if settings.verify_data is None:
        refuse_idle("without --verify-data", "verify_samples", remedy="give that, or leave it out")
    options = settings.model_dump(exclude={"verify_data", "verify_samples"})
    on = (settings.verify_data, settings.verify_samples) if settings.verify_data else verify
    say(run.merge(base, dict(adapters), out, verify=on, **options).summary())


@click.command(cls=SettingsCommand, section=_export_section)
@click.argument("checkpoint", type=EXISTING, required=False)
@click.option("--out", required=True, type=NEW, help="Folder of the result.")
@click.option("--base", help="Folder or Hub name of the model that was trained: what the checkpoint lacks is added.")
@click.option("--with-lm-head", is_flag=True, help="Also write lm_head.weight, which Gemma ties to its embedding.")
@click.option("--adapter", type=EXISTING, help="Folder of a LoRA adapter, in the place of CHECKPOINT: see --for.")
@click.option("--for", "engine", type=click.Choice(["vllm", "sglang"]), help="The server whose LoRA gets the adapter.")
def export(
    checkpoint: Path | None,
    out: Path,
    base: str | None,
    with_lm_head: bool,
    adapter: Path | None,
    engine: Literal["vllm", "sglang"] | None,
    settings: "ExportConfig",
) -> None:
    """Write the model of a checkpoint, without its optimizer.

    CHECKPOINT is a checkpoint-N of `train`, a model folder, or a folder of DeepSpeed's engine (global_stepN, of TRL,
    axolotl, LLaMA-Factory …), of ZeRO-1, 2 or 3 and any number of ranks. Needs no GPU, and little memory. With --base,
    keys and values of layers that share them, which transformers leaves out, are added byte for byte.

    --adapter ADAPTER --base BASE --for vllm writes an adapter as that server's own LoRA loads it.
    """
    if (checkpoint is None) == (adapter is None):
        raise click.UsageError("give a CHECKPOINT, or --adapter with --base and --for")
    if adapter is None and engine is not None:
        raise click.UsageError("--for is for an --adapter; a model is exported for all servers alike")
    if checkpoint is not None:
        from gemma_dist.export import run

        say(run.export(checkpoint, out, settings, base=base, lm_head=with_lm_head).summary())
        return
    refuse_idle("where --adapter is given: its tensors stay as they are", *type(settings).model_fields)
    if with_lm_head:
        raise click.UsageError("--with-lm-head is for a model; an adapter has no head")
    if adapter is None or base is None or engine is None:
        raise click.UsageError("--adapter needs the --base that it was trained on, and a server: --for vllm")
    from gemma_dist.export import lora

    say(lora.export_adapter(adapter, base, out, engine).summary())


@click.command()
@click.argument("runs", type=EXISTING)
@click.option("--out", required=True, type=NEW, help="The file: .parquet or .jsonl.")
@click.option(
    "--for", "layout", type=click.Choice(["trl", "verl"]), default="trl", show_default=True, help="Whose names."
)
@click.option("--whole", is_flag=True, help="Refuse runs that have to be cut into several rollouts.")
def export_rollouts(runs: Path, out: Path, layout: Literal["trl", "verl"], whole: bool) -> None:
    """Write own runs as rollouts for TRL or verl to learn from.

    RUNS is a folder that `act` wrote. Each rollout has the ids of its prompt, those that followed, a mask of what the
    model sampled, and the reward; the file is read back and compared with RUNS, id by id.
    """
    from gemma_dist.export import rollouts

    say(rollouts.export_rollouts(runs, out, layout, whole=whole).summary())


@click.command(cls=SettingsCommand, section=_extract_section)
@click.argument("base")
@click.argument("tuned")
@click.option("--out", required=True, type=NEW, help="Folder of the adapter.")
def extract(base: str, tuned: str, out: Path, settings: "ExtractConfig") -> None:
    """Write the difference of two models as a LoRA adapter.

    BASE and TUNED are folders or Hub names of models of the same class. What the factors lack of the difference is
    printed, as a part of it; more of --r lack less. Needs no GPU, and memory for one matrix.
    """
    from gemma_dist.export import extract as extraction

    say(extraction.extract(base, tuned, out, settings).summary())
