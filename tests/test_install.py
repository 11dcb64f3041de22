"""An editable install works from any folder, the one that holds the clone included."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that `pip install --editable` put a clone named gemma_dist into.

    The clone lies in the folder `work` beside the environment, which borrows everything else from ours.
    """
    folder = tmp_path_factory.mktemp("install")
    clone = folder / "work" / "gemma_dist"
    shutil.copytree(REPOSITORY / "gemma_dist", clone / "gemma_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, clone)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    paths = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    site_packages = Path(sysconfig.get_path("purelib", "venv", paths))
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _run(python, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--editable", clone)
    return python


def _run(python: Path, *words: object, cwd: Path | None = None) -> str:
    """What the environment's Python prints, without the path to this repository that our own tests may run with."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), *map(str, words)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("folder", ["work", "work/gemma_dist", "."])
def test_the_module_is_found_from_every_folder(python: Path, folder: str) -> None:
    home = python.parents[2]
    found = _run(python, "-c", "import gemma_dist; print(gemma_dist.__file__)", cwd=home / folder)
    assert Path(found.strip()) == home / "work" / "gemma_dist" / "gemma_dist" / "__init__.py"
    assert "version" in _run(python, "-m", "gemma_dist", "--version", cwd=home / folder)


def test_a_wheel_has_every_file_of_the_package(python: Path, tmp_path: Path) -> None:
    clone = python.parents[2] / "work" / "gemma_dist"
    _run(python, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", tmp_path, clone)
    (wheel,) = tmp_path.glob("*.whl")
    files = {str(path.relative_to(clone)) for path in (clone / "gemma_dist").rglob("*.*") if path.suffix != ".pyc"}
    assert {"gemma_dist/evaluate/report_page/page.js", "gemma_dist/cli.py"} <= files
    assert files <= set(zipfile.ZipFile(wheel).namelist())
