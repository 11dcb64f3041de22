"""An editable install works from any folder, the one that holds the clone included."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.support.lock import lock

REPOSITORY = Path(__file__).parents[1]
NOT_ON_LINUX = ("tzdata",)  # pandas wants it elsewhere


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that `pip install --editable` put a clone named gemma_dist into.

    The clone lies in the folder `work` beside the environment, which borrows everything else from ours.
    """
    folder = tmp_path_factory.mktemp("install")
    clone = folder / "work" / "gemma_dist"
    shutil.copytree(REPOSITORY / "gemma_dist", clone / "gemma_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
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
    assert {"gemma_dist/evaluate/report_page/page.js", "gemma_dist/page.css", "gemma_dist/cli.py"} <= files
    names = set(zipfile.ZipFile(wheel).namelist())
    assert files <= names
    (folder,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    assert {f"{folder}/licenses/LICENSE", f"{folder}/licenses/NOTICE"} <= names


def test_the_lock_has_what_was_tested_with_hashes_and_names_no_index() -> None:
    text = (REPOSITORY / "requirements.lock").read_text()
    assert "://" not in text
    locked = dict(
        re.findall(r"^([\w.-]+)==(\S+) .*\\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\\n|\n))+", text, re.MULTILINE)
    )
    assert len(locked) == len(re.findall(r"^\w", text, re.MULTILINE)), "each package has hashes, and nothing else"
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    assert {name: locked.get(name) for name in tested} == tested | dict.fromkeys(NOT_ON_LINUX)
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert settings["build-system"]["requires"] == [f"setuptools=={locked['setuptools']}"]
    wanted = [*settings["project"]["dependencies"], *settings["project"]["optional-dependencies"]["dev"]]
    names = {Requirement(line).name for line in wanted}
    assert names <= locked.keys()


def test_a_lock_lists_the_files_of_every_python() -> None:
    def report(python: str, *packages: tuple[str, str]) -> dict[str, Any]:
        own = {"metadata": {"name": "gemma-dist", "version": "0"}, "download_info": {"dir_info": {}}}
        found = [
            {
                "metadata": {"name": name, "version": "1"},
                "download_info": {"archive_info": {"hashes": {"sha256": sha}}},
            }
            for name, sha in packages
        ]
        return {"environment": {"python_version": python}, "install": [own, *found]}

    told = lock([report("3.12", ("A_b", "2")), report("3.11", ("A_b", "1"), ("c", "3"))]).splitlines()
    assert told[-5:] == [
        "a-b==1 \\",
        "    --hash=sha256:1 \\",
        "    --hash=sha256:2",
        "c==1 ; python_version == '3.11' \\",
        "    --hash=sha256:3",
    ]
