"""Per-layer embeddings that stay in the base's file, and towers that are not loaded: nothing but memory changes.

The launches train pairs of runs that differ in `model.ple` alone, with the workers of the parity matrix.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.bench import Bench
from tests.parity.cells import Cell
from tests.parity.judge import curve
from tests.support.ranks import needs_compiler

# Images in some rows; packed and not, checkpointed and not, in 4 bits and not, in both dtypes.
PAIRS = {
    "single": [Cell("single", "qlora", "e4b", "some", packing=True, checkpointing=True, dtype="bfloat16")],
    "cpu_ddp": [Cell("cpu_ddp", "qlora", "e4b", "some", packing=True, checkpointing=True)],
    "cpu_zero2": [Cell("cpu_zero2", "lora", "e4b", "images", checkpointing=True, dtype="bfloat16")],
    "cpu_zero3": [Cell("cpu_zero3", "lora", "e4b", "some", packing=True, accumulation=4)],
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("ple"))
