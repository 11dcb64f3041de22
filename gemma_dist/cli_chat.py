"""The part of the command line that talks to a model: chat.

As in `cli.py`, a command reads its options and calls one function, and nothing heavy is imported before it runs.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_dist.options import EXISTING, SettingsCommand, refuse_idle, refuse_idle_sampling

if TYPE_CHECKING:
    from gemma_dist.config_chat import ChatConfig


def _chat_section(_: object) -> "type[ChatConfig]":
    from gemma_dist.config_chat import ChatConfig

    return ChatConfig


@click.command(cls=SettingsCommand, section=_chat_section)
@click.argument("model")
@click.option("--adapter", type=EXISTING, help="Folder of a LoRA adapter for the model.")
@click.option("--tools", help="What it may call: a JSON file of declarations, or MODULE:FUNCTION (or a list or dict).")
@click.option("--yes", is_flag=True, help="Run functions without asking.")
def chat(model: str, adapter: Path | None, tools: str | None, yes: bool, settings: "ChatConfig") -> None:
    """Talk to a model in the terminal.

    Its calls are shown, checked, and run if you agree; without functions you type what the tools answer. MODEL is a
    folder or a name on the Hub. /help lists the commands; Ctrl-C stops an answer, twice leaves.
    """
    refuse_idle("of a conversation, which is one sample", "unroll", remedy="leave it out")
    refuse_idle_sampling(settings.temperature)
    from gemma_dist.chat.run import chat as talk

    talk(model, adapter, tools, settings, yes=yes)
