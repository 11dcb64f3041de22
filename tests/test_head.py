"""The loss of target tokens by TRL's kernels: those that run on CUDA against those of a CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.interpreted import CASES
from tests.support.ranks import ENVIRONMENT, REPOSITORY

# Relative to the largest value: the Triton kernels sum in another order and have tanh by way of a sigmoid. In bfloat16
# the gradient of a tile is rounded, and may fall to the next number.
TOLERANCE = {"float32": 5e-6, "bfloat16": 1e-2}


@pytest.fixture(scope="module")
def found(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `tests/support/interpreted.py` found."""
    if find_spec("triton") is None:
        pytest.skip("no Triton, which comes with torch's CUDA wheel")
    out = tmp_path_factory.mktemp("interpreted") / "found.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.interpreted", str(tiny_model("e4b")), str(out)],
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY), "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert out.exists(), done.stdout[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_of_cuda_score_as_those_of_the_cpu(found: Any, case: Any) -> None:
    apart = found[str(case)]
    print(*(f"{name} {value:.0e}" for name, value in apart.items()), sep=", ")
    assert apart["is_top1"] == 0
    for name in ("log_probs", "entropy"):
        assert apart[name] <= TOLERANCE["float32"], (name, apart)
    for name in ("gradient of hidden states", "gradient of the head"):
        assert apart[name] <= TOLERANCE[case[0]], (name, apart)


@pytest.mark.parametrize("targets", [0, 1, 5])
def test_a_micro_batch_has_the_loss_and_gradients_of_the_cpu_and_waits_for_nothing(found: Any, targets: int) -> None:
    """TRL's own head as well, but it finds its targets on the device: by masks, forward and backward."""
    result = found[f"model, {targets} targets a row"]
    assert result["targets"] == 2 * targets
    for whose in ("", " of TRL's"):
        assert result[f"loss{whose}"] <= 1e-5 * targets
        assert result[f"gradients{whose}"] <= 1e-5
    assert result["waits"] == 0
    assert result["waits of TRL's"] == 3
