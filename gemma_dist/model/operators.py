"""What DeepSpeed compiles with g++ at its first use: exchanges between CPU processes, and the CPU Adam that steps
where the optimizer is offloaded. It would do so without a word for minutes, and fail after the model was read.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from gemma_dist.errors import ConfigError
from gemma_dist.logs import log
from gemma_dist.topology import Topology

# DeepSpeed's name of what builds it -> what it is, and what to do without it.
EXCHANGES = ("ShareMemCommBuilder", "exchanges between CPU processes", "use accelerate_configs/cpu_ddp.yaml")
CPU_ADAM = (
    "CPUAdamBuilder",
    "its CPU Adam",
    "set zero_force_ds_cpu_optimizer: false in the DeepSpeed config, which steps with torch's slower AdamW",
)


def compile_operators(topology: Topology, *, train: bool) -> None:
    """Compile what DeepSpeed will need of a launch, or load what an earlier run compiled. Every rank calls it, and one
    of those that share a home folder does the work.

    Args:
        train: whether an optimizer will step.

    Raises:
        ConfigError: there is no compiler, or it failed.
    """
    if topology.deepspeed is None:
        return
    from deepspeed.accelerator import get_accelerator

    for name, what, remedy in (EXCHANGES, *([CPU_ADAM] if train and topology.steps_with_cpu_adam else [])):
        builder = get_accelerator().create_op_builder(name)
        if builder is not None:  # GPUs exchange by NCCL
            _compile(builder, what, remedy)


def _compile(builder: Any, what: str, remedy: str) -> None:
    """Compile or load one operator. Raises ConfigError as `compile_operators`."""
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(builder.name, verbose=False))
    compiler = os.environ.get("CXX", "g++")
    if not (folder / f"{builder.name}.so").exists():
        if shutil.which(compiler) is None:
            raise ConfigError(f"DeepSpeed compiles {what} with {compiler}, which is not there: install it, or {remedy}")
        log.info("DeepSpeed compiles %s, once, for some minutes (it will be in %s)", what, folder)
    try:
        builder.load()
    except (RuntimeError, ImportError, OSError) as error:
        raise ConfigError(f"DeepSpeed could not compile {what} in {folder}: {error}\nMend that, or {remedy}") from error
