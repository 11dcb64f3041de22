"""The part of the command line that brings a result to a server, or to the hub: check-model, card, serve,
push.

As in `cli.py`, a command reads its options and calls one function, and nothing heavy is imported before it runs.
"""

from pathlib import Path

import click

from gemma_dist.options import EXISTING, say


@click.command()
@click.argument("model", type=EXISTING)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON.")
def check_model(model: Path, as_json: bool) -> None:
    """Check that a model folder, or a GGUF file, is fit for servers.

    Names, shapes and dtypes of all tensors, index and files, tokenizer, chat template, stop ids, processor: what
    transformers, vLLM, SGLang and llama.cpp need. Prints the command of each. Exit code 1: something is to be mended.
    """
    from gemma_dist.data.gguf import is_gguf
    from gemma_dist.logs import to_json
    from gemma_dist.serving.check import check_model as check
    from gemma_dist.serving.gguf import check_gguf

    report = check_gguf(model) if is_gguf(model) else check(model)
    say(to_json(report.to_json()) if as_json else report.render(), exact=as_json)
    if report.faults:
        click.get_current_context().exit(1)


@click.command()
@click.argument("folder", type=EXISTING)
@click.option("--evaluation", type=EXISTING, help="Folder that `evaluate` wrote of this very adapter or model.")
def card(folder: Path, evaluation: Path | None) -> None:
    """Write the model card of a result, with its evaluation.

    `train` and `merge` write README.md beside what they make: base, data, recipe, versions. This writes it again, with
    the metrics of an evaluation. One that was written by hand stays.
    """
    from gemma_dist.serving.card import write_card_of

    say(f"written: {write_card_of(folder, evaluation)}")


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.argument("arguments", metavar="[ARGUMENT]...", nargs=-1, type=click.UNPROCESSED)
def serve(model: str, arguments: tuple[str, ...]) -> None:
    """Serve MODEL over OpenAI's API by `transformers serve`.

    MODEL is a folder or Hub name. Further arguments go to `transformers serve`: --port 8000, --host 0.0.0.0, --dtype
    bfloat16; its own --help lists them. docs/serving.md has a request, and the other servers.
    """
    from gemma_dist.serving.serve import serve as run

    run(model, arguments)


@click.command()
@click.argument("folder", type=EXISTING)
@click.argument("name", metavar="OWNER/MODEL")
@click.option("--private", is_flag=True, help="Make a private model, where there is none of that name yet.")
@click.option("--yes", is_flag=True, help="Send it. Without, nothing is sent, and no network is asked.")
def push(folder: Path, name: str, private: bool, yes: bool) -> None:
    """Show what of FOLDER would go to the hub, or send it.

    Weights, settings, tokenizer, template and card, without places on this machine; optimizer states, checkpoints and
    logs stay. A model is checked as by `check-model`. Exit code 1: it has faults.
    """
    from gemma_dist.serving.push import plan_upload
    from gemma_dist.serving.push import push as send

    upload = plan_upload(folder, name, private=private)
    say(upload.render())
    if yes:
        say(f"sent: {send(upload)}")
        return
    say("nothing was sent: --yes sends it")
    if upload.report is not None and upload.report.faults:
        click.get_current_context().exit(1)
