"""`gemma-dist serve`: start `transformers serve` on a model, with what it lacks for Gemma 4's calls."""

import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from gemma_dist.errors import ConfigError
from gemma_dist.model.folder import local_folder, refuse_custom_code
from gemma_dist.serving.report import require_model
from gemma_dist.visible import shown

NEEDED = ("fastapi", "openai", "uvicorn")  # what `pip install 'transformers[serving]'` brings


def serve(model: str, arguments: Sequence[str]) -> NoReturn:
    """Print the command that serves `model`, and become it.

    Args:
        model: a folder or Hub name; clients have to name it in the same words.
        arguments: further ones of `transformers serve`.

    Raises:
        CheckpointError: there is no Gemma 4 there, an adapter alone, or code of its own.
        ConfigError: a package that serving needs is not installed, or an option stands in the model's place.
    """
    if model.startswith("-"):
        raise ConfigError(f"{model!r} stands where the model belongs; name it first: gemma-dist serve MODEL {model} …")
    folder = local_folder(model, f"the model {model!r}")
    require_model(folder)
    refuse_custom_code(folder)
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"serving needs {', '.join(lacking)}: pip install 'transformers[serving]'")
    # -P: else Python looks for modules in the current folder first, and one is often in the model's own.
    command = [sys.executable, "-P", "-m", "gemma_dist.serving.transformers_serve", model, *arguments]
    print(shown(shlex.join(command)), flush=True)
    os.execv(command[0], command)
