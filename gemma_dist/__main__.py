"""`gemma-dist` and `python -m gemma_dist`: run a command, and turn what goes wrong into an exit code.

0: done. 2: a user error, in plain words. 1: an internal error, with its traceback. 3, of `plan`: it does not fit; of
`compare`: a rule was broken. 4, of `train`: a step hung, and the watchdog ended the run.
"""

import sys
import traceback
from collections.abc import Sequence

import click

from gemma_dist import world
from gemma_dist.cli import cli
from gemma_dist.errors import GemmaDistError, PeerError
from gemma_dist.failures import explain, explain_sigterm
from gemma_dist.logs import start_logging


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Each of several ranks says its own error, with its number."""
    start_logging()
    if world.world_size() > 1:
        explain_sigterm(_say_error)
    try:
        result = cli.main(arguments, prog_name="gemma-dist", standalone_mode=False)
        return result if isinstance(result, int) else 0  # click returns the code of --help and --version
    except click.ClickException as error:
        error.show()
    except click.Abort:
        return 130
    except PeerError:
        pass  # said by the rank that it happened to
    except GemmaDistError as error:
        _say_error(str(error))
    except Exception as error:
        message = explain(error)
        if message is None:
            _say(traceback.format_exc() + "This is a bug in gemma_dist: please report it with the lines above.")
            return 1
        if message:  # else another rank says it
            _say_error(message)
    return 2


def _say_error(message: str) -> None:
    """For the user: without a traceback."""
    _say(f"error: {message}")


def _say(message: str) -> None:
    """Print to stderr; one of several ranks puts its number before each line."""
    prefix = f"[rank {world.rank()}] " if world.world_size() > 1 else ""
    print("\n".join(prefix + line for line in message.splitlines()), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
