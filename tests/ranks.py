"""Start commands on one or several ranks, as a user would, and show the failing rank's traceback when one fails."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",  # the CPU, even where there is a GPU
    "DS_ACCELERATOR": "cpu",
}


def gemma_dist(*words: object, launch: str | None = None, fails: bool = False, timeout: float = 300) -> str:
    """Run `gemma-dist WORDS…`; its output, errors included.

    Args:
        launch: the name of a file in accelerate_configs/ to start it under; without, one plain process.
        fails: expect a user error (exit code 2 of the process, 1 of the launcher) instead of success.
        timeout: seconds after which all ranks are killed and the test fails.
    """
    command = [sys.executable, "-m"]
    if launch is not None:
        config = str(REPOSITORY / "accelerate_configs" / f"{launch}.yaml")
        command += ["accelerate.commands.launch", "--config_file", config, "--main_process_port", "0", "-m"]
    command += ["gemma_dist", *map(str, words)]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        raise AssertionError(f"{command} did not end within {timeout} s:\n{output[-8000:]}") from None
    expected = (1 if launch else 2) if fails else 0
    assert process.returncode == expected, f"{command} ended with {process.returncode}:\n{output[-8000:]}"
    return output
