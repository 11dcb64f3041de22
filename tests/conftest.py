"""What several test files need: tiny models made once, and the data beside the repository."""

import os

# Before anything imports torch or huggingface_hub, which read them once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import functools
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Who runs the tests in the background has interrupts ignored, and so would all processes that they start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the repository, with real rows and conformance cases."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"the shared data is not beside the repository: {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny model folders by style (`e4b`, `12b` …) and dtype, each made once, when first asked for.

    All tests read the same folder: copy it to change it.
    """
    from gemma_dist.model.tiny import write_tiny_model

    @functools.cache
    def make(style: str = "e4b", dtype: str = "float32") -> Path:
        folder = tmp_path_factory.mktemp("tiny") / f"{style}-{dtype}"
        write_tiny_model(folder, style=style, dtype=dtype)
        return folder

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of its own with room for 20 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def model(tiny_model: Callable[..., Path]) -> str:
    """The folder of a tiny E4B, as a setting names it."""
    return str(tiny_model())
