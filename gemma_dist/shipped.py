"""The files that come with the package: recipes, accelerate configs, batch scripts, the versions that were tested.

In a checkout they lie beside the package, where people edit them; a wheel carries them in `gemma_dist/share/`, where
`setup.py` puts them.
"""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from gemma_dist.errors import ConfigError

RECIPES, PROCESSES, SCRIPTS, TESTED = "launch", "accelerate_configs", "slurm", "constraints.txt"
_PLAN = re.compile(r"# plan: ([\d.]+) GiB of (\d+)(?: on (\d+) GPUs, accelerate_configs/(\w+)\.yaml)?")


class Recipe(NamedTuple):
    """What the comments of a recipe say of it."""

    name: str
    title: str
    gpu_memory: int | None  # GB of each GPU, as sold; None: it is for a CPU
    num_gpus: int
    processes: str | None  # name of the accelerate config that it is for; None: any


def shipped(name: str) -> Path:
    """A folder or file that comes with the package: one of the names above, or a path in one."""
    package = Path(__file__).parent
    installed = package / "share"
    return (installed if installed.is_dir() else package.parent) / name


def shipped_recipe(path: Path) -> Path | None:
    """The recipe that `launch/NAME.yaml`, or NAME alone, means where no such file is there; None: there is none."""
    if path.parent.name not in ("", RECIPES) or path.parent.parent != Path() or path.is_absolute():
        return None
    found = shipped(RECIPES) / f"{path.name.removesuffix('.yaml')}.yaml"
    return found if found.is_file() else None


def recipes() -> list[Recipe]:
    """All of them, by name."""
    return [_recipe(path) for path in sorted(shipped(RECIPES).glob("*.yaml"))]


def _recipe(path: Path) -> Recipe:
    text = path.read_text(encoding="utf-8")
    plan = _PLAN.search(text)
    title = text.partition("\n")[0].removeprefix("# ")
    if plan is None:
        return Recipe(path.stem, title, None, 0, None)
    return Recipe(path.stem, title, int(plan[2]), int(plan[3] or 1), plan[4])


def copy_shipped(out: Path) -> list[Path]:
    """Copy recipes, accelerate configs and batch scripts into `out`, each folder under its name, which commands expect
    to be called in `out`. Returns the folders.

    Raises:
        ConfigError: one of them is there already: what lies in it may have been changed.
    """
    folders = [out / name for name in (RECIPES, PROCESSES, SCRIPTS)]
    if taken := [folder for folder in folders if folder.exists()]:
        raise ConfigError(f"{taken[0]} is there already; name another folder, or move it away")
    out.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        copy_folder(folder.name, folder)
    return folders


def copy_folder(name: str, out: Path) -> None:
    """Copy a folder, which appears under its name when it is whole."""
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(shipped(name), temporary, ignore=shutil.ignore_patterns("site.env", "__pycache__"))
    temporary.rename(out)
