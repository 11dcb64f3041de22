"""The part of the command line that makes folders for other tools of what was trained: export.

As in `cli.py`, a command reads its options and calls one function, and nothing heavy is imported before it runs.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from gemma_dist.options import EXISTING, NEW, SettingsCommand

if TYPE_CHECKING:
    from gemma_dist.config import ExportConfig


@click.command(cls=SettingsCommand, section=lambda config: config.ExportConfig)
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

        click.echo(run.export(checkpoint, out, settings, base=base, lm_head=with_lm_head).summary())
        return
    if with_lm_head:
        raise click.UsageError("--with-lm-head is for a model; an adapter has no head")
    if adapter is None or base is None or engine is None:
        raise click.UsageError("--adapter needs the --base that it was trained on, and a server: --for vllm")
    from gemma_dist.export import lora

    click.echo(lora.export_adapter(adapter, base, out, engine).summary())
