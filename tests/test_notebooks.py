"""The notebooks of examples/ run from their first cell to their last, one after the other, as a user would run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.ranks import ENVIRONMENT, REPOSITORY, long

NOTEBOOKS = ("one_card.ipynb", "evaluate_and_merge.ipynb")


def test_all_notebooks_are_run_and_are_kept_without_output() -> None:
    assert {path.name for path in (REPOSITORY / "examples").glob("*.ipynb")} == set(NOTEBOOKS)
    for name in NOTEBOOKS:
        cells = json.loads((REPOSITORY / "examples" / name).read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert code
        assert not any(cell["outputs"] or cell["execution_count"] for cell in code), name


@long
def test_the_notebooks_run(tmp_path: Path) -> None:
    """Their cells, one after another in one Python: nothing in them needs Jupyter."""
    for name in NOTEBOOKS:
        cells = json.loads((REPOSITORY / "examples" / name).read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        (tmp_path / f"{name}.py").write_text("\n\n".join(code))
        run = subprocess.run(
            [sys.executable, f"{name}.py"],
            cwd=tmp_path,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert run.returncode == 0, (name, run.stderr[-8000:])
    assert (tmp_path / "runs/notebook/merged/model.safetensors").exists()
