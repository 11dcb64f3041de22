"""Where a run's figures go besides metrics.jsonl (`train.report_to`), each by its own package and Trainer's callback.

Those that go with the versions that were tested are the extra `logging`. What they need of accounts, addresses and
offline modes they read from variables of the environment that are their own; docs/one_gpu.md has them.
"""

from importlib.util import find_spec
from typing import Any

from gemma_dist.errors import ConfigError, GemmaDistError

OF_THE_EXTRA = ("tensorboard", "wandb", "mlflow")


def require_logger(report_to: str) -> None:
    """Raises ConfigError where the package that a run reports to is not installed."""
    if report_to == "none":
        return
    found = find_spec(report_to)
    if found is None or found.origin is None:  # a folder of this name, as wandb leaves it, is no package
        package = "'gemma-dist[logging]'" if report_to in OF_THE_EXTRA else report_to
        raise ConfigError(
            f"train.report_to: {report_to}, but its package is not installed: `pip install {package}`; "
            "none: metrics.jsonl alone, which `gemma-dist plot` draws"
        )


def explain_setup(callbacks: list[Any], report_to: str) -> None:
    """Let a package that cannot begin (no account, no network, a part of it not installed) end the run in plain words:
    as a ConfigError, at the start, with what the package says."""
    for callback in callbacks:
        setup = getattr(callback, "setup", None)  # of the callbacks of transformers for such packages alone
        if setup is None or report_to not in type(callback).__name__.lower():
            continue

        def explained(*args: Any, setup: Any = setup, **kwargs: Any) -> Any:
            try:
                return setup(*args, **kwargs)
            except GemmaDistError:
                raise
            except Exception as error:
                raise ConfigError(
                    f"train.report_to: {report_to} cannot begin: {error}\nlog in, or keep its figures on this machine "
                    "as docs/one_gpu.md says, or set train.report_to: none"
                ) from error

        callback.setup = explained
