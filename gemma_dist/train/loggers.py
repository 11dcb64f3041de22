"""Where a run's figures go besides metrics.jsonl (`train.report_to`), each by its own package and Trainer's callback.

The packages are the extra `logging`. What they need of accounts, addresses and offline modes they read from variables
of the environment that are their own; docs/one_gpu.md has them.
"""

from importlib.util import find_spec

from gemma_dist.errors import ConfigError


def require_logger(report_to: str) -> None:
    """Raises ConfigError where the package that a run reports to is not installed."""
    if report_to == "none":
        return
    found = find_spec(report_to)
    if found is None or found.origin is None:  # a folder of this name, as wandb leaves it, is no package
        raise ConfigError(
            f"train.report_to: {report_to}, but its package is not installed: `pip install {report_to}`, or all of "
            "these by `pip install 'gemma-dist[logging]'`; none: metrics.jsonl alone, which `gemma-dist plot` draws"
        )
