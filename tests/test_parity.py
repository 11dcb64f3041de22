"""Every launch config trains the same model: the core of the parity matrix, cell by cell, or its pruned form.

Slow, a few minutes: `python -m tests.parity --core` starts seven sets of processes and trains twenty tiny runs,
`--pruned` ten and fifty.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity.cells import (
    DATA,
    LAUNCHES,
    STYLES,
    TUNINGS,
    UP_TO_TWO,
    WEIGHTED,
    Cell,
    all_cells,
    core_cells,
    pruned_cells,
)
from tests.parity.judge import Figures
from tests.support.ranks import ENVIRONMENT, REPOSITORY, needs_compiler

pytestmark = needs_compiler
SIZE, CELLS = ("--pruned", pruned_cells()) if "LONG_TESTS" in os.environ else ("--core", core_cells())


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Figures]:
    """What the command found for each cell."""
    found: Path = tmp_path_factory.mktemp("parity") / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.parity", SIZE, "--json", found],
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert found.exists(), (done.stdout + done.stderr)[-8000:]
    print(done.stdout)
    return json.loads(found.read_text())


@pytest.mark.timeout(1600)  # the first one waits for the command
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_cell_equals_its_reference(figures: dict[str, Figures], cell: Cell) -> None:
    found = figures[cell.name]
    assert "error" not in found, found["error"]
    assert found["ok"], found


@pytest.mark.parametrize("cells", [pruned_cells(), all_cells()], ids=["pruned", "all"])
def test_each_row_and_column_is_touched(cells: list[Cell]) -> None:
    columns = {"launch": list(LAUNCHES), "tuning": list(TUNINGS), "style": list(STYLES), "data": [*DATA, WEIGHTED]}
    for name, values in columns.items():
        assert {getattr(cell, name) for cell in cells} == set(values)
    for name in ("packing", "checkpointing", "accumulation", "dtype"):
        assert len({getattr(cell, name) for cell in cells}) >= 2, name
    assert any(cell.resumed_from not in ("", cell.launch) for cell in cells)
    assert len({cell.name for cell in cells}) == len(cells)


def test_the_core_has_each_launch_style_and_kind_of_data() -> None:
    cells = core_cells()
    assert {cell.launch for cell in cells} == set(UP_TO_TWO)
    assert {cell.style for cell in cells} == set(STYLES)
    assert {cell.data for cell in cells} == set(DATA)
    assert {cell.tuning for cell in cells} == {"full", "lora", "dora", "qlora", "experts"}
    assert {cell.resumed_from for cell in cells} >= {"", "single"}
    assert set(cells) <= set(pruned_cells())
