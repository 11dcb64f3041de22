"""The notebooks of examples/ run from their first cell to their last, one after the other, as a user would run them."""

import json
import shutil
from pathlib import Path

import pytest

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
def test_the_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    for name, value in {**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY), "JUPYTER_PLATFORM_DIRS": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in NOTEBOOKS:
        shutil.copy(REPOSITORY / "examples" / name, tmp_path)
        notebook = nbformat.read(tmp_path / name, as_version=4)
        nbformat.validate(notebook)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs/notebook/merged/model.safetensors").exists()
