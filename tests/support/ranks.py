"""Start commands on one or several ranks, as a user would, and show the failing rank's traceback when one fails."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",  # the CPU, even where there is a GPU
    "DS_ACCELERATOR": "cpu",
}
HIDES_GPUS = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="DeepSpeed compiles an operator for CPU processes with g++, which is absent"
)
long = pytest.mark.skipif("LONG_TESTS" not in os.environ, reason="takes long, and is run by `make test-all`")


def start(*words: object, launch: str | Path | None = None, gpu: bool = False) -> subprocess.Popen[str]:
    """Start `gemma-dist WORDS…`, plain or under a file of accelerate_configs/, or another one.

    Args:
        gpu: let it see the GPUs of this machine.
    """
    command = [sys.executable, "-m"]
    if launch is not None:
        config = str(launch if isinstance(launch, Path) else REPOSITORY / "accelerate_configs" / f"{launch}.yaml")
        command += ["accelerate.commands.launch", "--config_file", config, "--main_process_port", "0", "-m"]
    return subprocess.Popen(
        [*command, "gemma_dist", *map(str, words)],
        cwd=REPOSITORY,
        env=_with_gpu() if gpu else os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _with_gpu() -> dict[str, str]:
    """The environment of a process that sees the GPUs, or those of them that this one sees."""
    return {**os.environ, **{name: value for name, value in ENVIRONMENT.items() if name not in HIDES_GPUS}}


def kill(process: subprocess.Popen[str]) -> str:
    """kill -9 the launcher and all ranks, which it starts in sessions of their own; what they had said."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        for one in (launcher, *launcher.children(recursive=True)):
            one.kill()
    return process.communicate()[0]


def wait_for(path: Path, process: subprocess.Popen[Any], timeout: float = 300) -> None:
    """Until `path` is there, which `process` is to write."""
    end = time.monotonic() + timeout
    while not path.exists():
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"{path} was not written:\n{(kill(process) or '')[-8000:]}")
        time.sleep(0.05)


def gemma_dist(
    *words: object,
    launch: str | Path | None = None,
    fails: bool = False,
    timeout: float = 300,
    gpu: bool = False,
) -> str:
    """Run `gemma-dist WORDS…`; its output, errors included.

    Args:
        launch: the name of a file in accelerate_configs/, or the path of another, to start it under; without, one
            plain process.
        fails: expect a user error (exit code 2 of the process, 1 of the launcher) instead of success.
        timeout: seconds after which all ranks are killed and the test fails.
        gpu: let it see the GPUs of this machine.
    """
    process = start(*words, launch=launch, gpu=gpu)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        output = kill(process)
        raise AssertionError(f"{words} did not end within {timeout} s:\n{output[-8000:]}") from None
    expected = (1 if launch else 2) if fails else 0
    assert process.returncode == expected, f"{words} ended with {process.returncode}:\n{output[-8000:]}"
    return output
