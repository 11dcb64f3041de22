"""gemma_dist: fine-tune Gemma 4 on tool calling, from raw trajectories to a merged checkpoint.

A trajectory moves in one direction, and each arrow is one package:

    JSONL -> data (parse, encode) -> shards -> stream -> train -> evaluate -> merge -> safetensors

What Python code may use is in api.py, and is loaded at the first use: `gemma-dist --help` must answer before torch is
there. `train`, `evaluate`, `merge` and `resolve` are modules as well; called, they are the functions of that name.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from gemma_dist.api import (
        Encoded,
        Encoder,
        GemmaDistError,
        MergeReport,
        Reading,
        Report,
        Run,
        RunConfig,
        Topology,
        Trajectory,
        evaluate,
        load_config,
        load_encoder,
        merge,
        parse_row,
        read_output,
        read_topology,
        resolve,
        train,
    )

__all__ = [
    "Encoded",
    "Encoder",
    "GemmaDistError",
    "MergeReport",
    "Reading",
    "Report",
    "Run",
    "RunConfig",
    "Topology",
    "Trajectory",
    "__version__",
    "evaluate",
    "load_config",
    "load_encoder",
    "merge",
    "parse_row",
    "read_output",
    "read_topology",
    "resolve",
    "train",
]
_ALSO_MODULES = ("evaluate", "merge", "resolve", "train")


class _Called(ModuleType):
    """A module that can be called as the function of api.py that has its name."""

    @property
    def _function(self) -> Any:
        return getattr(import_module("gemma_dist.api"), self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> Any:  # what notebooks show
        import inspect

        return inspect.signature(self._function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


class _Package(ModuleType):
    """This package. An import binds a module to the name of a function of the API: it can be called, too."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _ALSO_MODULES and isinstance(value, ModuleType):
            value.__class__ = _Called
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _ALSO_MODULES:
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(f"{__name__}.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
