"""A Slurm for tests, once for a process of pytest that wants one, and ended with it."""

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
    # On a machine that is busy with other tests, what is told to end may be slow to do so, and a daemon slow to answer.
    settings = ["KILLWAIT=15", "NODE_TIMEOUT=120"]  # no node is lost here: test_events.py has clusters of its own
    with cluster.running(folder / "work", folder / "clone", num_nodes=24, settings=settings) as started:
        yield started


@pytest.fixture(scope="session")
def standin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stand-ins of programs lie."""
    return tmp_path_factory.mktemp("bin")
