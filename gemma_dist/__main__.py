"""`gemma-dist` and `python -m gemma_dist`: run a command, and turn what goes wrong into an exit code.

`exits.py` says which code means what, and how whoever launched several ranks learns of theirs. A user error is said in
plain words, a bug with its traceback.
"""

import io
import os
import sys
import traceback
from collections.abc import Sequence

import click

from gemma_dist import exits, meeting, ranklog, world
from gemma_dist.cli import cli
from gemma_dist.errors import GemmaDistError, PeerError, Stopped
from gemma_dist.failures import code_of, explain
from gemma_dist.logs import start_logging
from gemma_dist.signals import explain_sigterm
from gemma_dist.visible import shown

# What is left of a command that was interrupted, where it is not nothing. `train` saves what it has and says so itself.
_GOES_ON = "the same command goes on from there"
KEPT = {
    "shard": f"the pieces that were done are kept in the folder of --out (or of --work-dir), and {_GOES_ON}",
    "train": f"complete checkpoints are kept in output_dir, the steps since the newest are lost, and {_GOES_ON}",
    "evaluate": f"every answer that was whole is kept in the folder of --out, and {_GOES_ON}",
    "act": f"every run that ended is kept in the folder of --out, and {_GOES_ON}",
    "merge": "nothing stands in the folder of --out under its final name; the same command begins anew",
    "push": "the hub shows what it has; the same command sends the rest",
    "serve": "the server has stopped",
    "chat": "what you saved with /save is kept",
    "health": "nothing was judged; the same command begins anew",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Each of several ranks says its own error, with its number."""
    # Processes that are started take no `pickle.py` of the current folder, which may be one of strangers' rows.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    start_logging()
    exits.begin()
    if world.world_size() > 1:
        explain_sigterm(_say_error)
    code = _run(arguments)
    exits.record(code)
    ranklog.drain()
    return code


def _run(arguments: Sequence[str] | None) -> int:
    """The command, and what it comes to."""
    try:
        result = cli.main(arguments, prog_name="gemma-dist", standalone_mode=False)
        return result if isinstance(result, int) else exits.DONE  # click returns the code of --help and --version
    except click.ClickException as error:
        _show(error)
        meeting.tell(error.format_message(), exits.USER_ERROR)
    except click.Abort:
        if world.rank() == 0:
            _say(f"interrupted: {_kept(sys.argv[1:] if arguments is None else arguments)}")
        return exits.INTERRUPTED
    except Stopped:
        return exits.STOPPED  # and said so
    except PeerError:
        return exits.ENDED  # the rank that it happened to says it
    except GemmaDistError as error:
        _say_error(str(error))
        code = code_of(error)
        meeting.tell(str(error), code)
        return code
    except Exception as error:
        explanation = explain(error)
        if explanation is None:
            _say(traceback.format_exc() + "This is a bug in gemma_dist: please report it with the lines above.")
            meeting.tell("a bug in gemma_dist, see there", exits.BUG)
            return exits.BUG
        ranklog.say(traceback.format_exc())
        if explanation.message:  # else another rank says it
            _say_error(explanation.message)
            meeting.tell(explanation.message, explanation.code)
        return explanation.code
    return exits.USER_ERROR


def _kept(words: Sequence[str]) -> str:
    """What an interrupted command leaves, and how to go on."""
    verb = next((word for word in words if not word.startswith("-")), "")
    return KEPT.get(verb, "nothing was written; the same command begins anew")


def _show(error: click.ClickException) -> None:
    """Print what is wrong with the command line, as click words it."""
    text = io.StringIO()
    error.show(text)
    print(shown(text.getvalue()), end="", file=sys.stderr, flush=True)


def _say_error(message: str) -> None:
    """For the user: without a traceback."""
    _say(f"error: {message}")


def _say(message: str) -> None:
    """Print to stderr; one of several ranks puts its number before each line."""
    prefix = f"[rank {world.rank()}] " if world.world_size() > 1 else ""
    print("\n".join(prefix + line for line in shown(message).splitlines()), file=sys.stderr, flush=True)
    ranklog.say(message)


if __name__ == "__main__":
    sys.exit(main())
