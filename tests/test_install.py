"""An install works from any folder: an editable one, and of what is built, which carries the recipes."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.support.lock import lock
from tests.support.ranks import long

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("launch", "accelerate_configs", "slurm")  # that a wheel carries
NOT_ON_LINUX = ("tzdata",)  # pandas wants it elsewhere
NOT_PINNED = ("bench",)  # the extra of others, which are compared with in whatever version


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that `pip install --editable` put a clone named gemma_dist into.

    The clone lies in the folder `work` beside the environment, which borrows everything else from ours.
    """
    folder = tmp_path_factory.mktemp("install")
    clone = folder / "work" / "gemma_dist"
    shutil.copytree(REPOSITORY / "gemma_dist", clone / "gemma_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE", "constraints.txt"):
        shutil.copy(REPOSITORY / name, clone)
    for name in FOLDERS:
        shutil.copytree(REPOSITORY / name, clone / name)
    python = _environment(folder)
    _run(python, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--editable", clone)
    return python


def _environment(folder: Path) -> Path:
    """The interpreter of a new environment in `folder`/venv, which borrows all but this package from ours."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    paths = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    site_packages = Path(sysconfig.get_path("purelib", "venv", paths))
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin" / "python"


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
    assert "gemma_dist/py.typed" in names
    beside = {path.relative_to(clone).as_posix() for name in FOLDERS for path in (clone / name).iterdir()}
    shipped = {name.removeprefix("gemma_dist/share/") for name in names if name.startswith("gemma_dist/share/")}
    assert shipped == {"constraints.txt", *beside} - {"slurm/site.env"}
    assert not [name for name in names if name.partition("/")[0] in FOLDERS], "nothing beside the package"
    (folder,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    assert {f"{folder}/licenses/LICENSE", f"{folder}/licenses/NOTICE"} <= names


@long
def test_what_is_built_is_installed_and_used_without_a_checkout(tmp_path: Path) -> None:
    """Source distribution -> wheel -> an environment of its own -> the first commands of a user, in an empty folder."""
    clone = tmp_path / "clone"
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, clone / name)
    ours = Path(sys.executable)
    _run(ours, "-c", "from setuptools import build_meta; build_meta.build_sdist('..')", cwd=clone)
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    assert {name for name in listed.splitlines() if not name.startswith(".")} - {"Dockerfile"} <= held
    shutil.rmtree(clone)
    build = ("-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", tmp_path)
    _run(ours, *build, source)
    (wheel,) = tmp_path.glob("*.whl")
    python = _environment(tmp_path)
    _run(python, "-m", "pip", "install", "--no-index", "--no-deps", wheel)
    empty = tmp_path / "empty"
    empty.mkdir()
    home = Path(_run(python, "-c", "import gemma_dist; print(gemma_dist.__file__)", cwd=empty).strip())
    assert home.is_relative_to(tmp_path / "venv")
    command = python.with_name("gemma-dist")
    assert "e4b_qlora_16gb" in _run(command, "recipes", cwd=empty)
    assert "needed" in _run(command, "plan", "launch/e4b_qlora_16gb.yaml", "--gpu-memory", "16GB", cwd=empty)
    (empty / "my.jsonl").touch()
    words = ("--model", "google/gemma-4-E4B-it", "--data", "my.jsonl", "--num-gpus", 2, "--gpu-memory", "24GB")
    _run(command, "init", "run", *words, cwd=empty)
    assert {path.name for path in empty.iterdir()} == {"my.jsonl", "run", "slurm"}
    _run(command, "recipes", "--out", "mine", cwd=empty)
    _run(command, "plan", "mine/launch/31b_qlora_48gb.yaml", cwd=empty)
    _run(python, "-c", "import gemma_dist; gemma_dist.load_config('cpu_lora')", cwd=empty)


def test_the_lock_has_what_was_tested_with_hashes_and_names_no_index() -> None:
    text = (REPOSITORY / "requirements.lock").read_text()
    assert "://" not in text
    locked = dict(
        re.findall(r"^([\w.-]+)==(\S+) .*\\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\\n|\n))+", text, re.MULTILINE)
    )
    assert len(locked) == len(re.findall(r"^\w", text, re.MULTILINE)), "each package has hashes, and nothing else"
    tested, beside = (
        dict(re.findall(r"^([\w.-]+)==(\S+)$", part, re.MULTILINE))
        for part in (REPOSITORY / "constraints.txt").read_text().split("# Of the extras")
    )
    assert {name: locked.get(name) for name in tested} == tested | dict.fromkeys(NOT_ON_LINUX)
    assert not beside.keys() & (locked.keys() | tested.keys()), "the lock is of [dev]"
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert settings["build-system"]["requires"] == [f"setuptools=={locked['setuptools']}"]
    wanted = [*settings["project"]["dependencies"], *settings["project"]["optional-dependencies"]["dev"]]
    names = {Requirement(line).name for line in wanted}
    assert names <= locked.keys()
    extras = settings["project"]["optional-dependencies"]
    direct = {Requirement(line).name for name, lines in extras.items() if name not in NOT_PINNED for line in lines}
    assert direct <= tested.keys() | beside.keys()


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
