"""The simulated memory of a step is that of a real one, on tiny runs of every kind."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.memory import CELLS, compare, write_shards

TOLERANCE = 0.02
# The cheap ones that together have all that the others have; `benchmarks/memory.py` has the whole table.
CHEAP = (
    "full, packed, images",
    "LoRA, packed, images, table on the GPU",
    "QLoRA, packed, bfloat16, images",
    "26b: QLoRA, experts in 4 bits",
    "12b: LoRA, packed, images",
)


@pytest.mark.parametrize("name", CHEAP)
def test_the_peak_of_a_step_is_what_was_simulated(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    cell = CELLS[name]
    model = tiny_model(cell.style, cell.dtype)
    shards = write_shards(tmp_path / "corpus", model, images=cell.images)
    result = compare(cell, model, shards, tmp_path / "out")
    assert abs(result.error) < TOLERANCE, (result.measured, result.simulated)
    assert sum(result.simulated.parts.values()) == result.simulated.peak_bytes
