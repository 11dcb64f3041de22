"""A Slurm for tests, once for a process of pytest that wants one, and ended with it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Cluster]:
    """24 nodes, on which tests may work side by side as long as each names its own."""
    if reason := cluster.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    settings = ["KILLWAIT=15"]  # on a machine that is busy with other tests, what is told to end may be slow to do so
    if os.environ.get("SLURM_TESTS") != "all":
        settings += ["NODE_TIMEOUT=120"]  # and a daemon slow to answer; no node is lost in the quick tests
    with cluster.running(folder / "work", folder / "clone", num_nodes=24, settings=settings) as started:
        yield started


@pytest.fixture(scope="session")
def standin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stand-ins of programs lie."""
    return tmp_path_factory.mktemp("bin")
