"""What a signal, a limit, a preemption, or the loss of a rank, a daemon, a node or a network costs a job: every row of
the table in docs/slurm.md, on a real Slurm. Minutes, so `make test-slurm` runs it and `make test` does not.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.slurm import cluster, events
from tests.slurm.cluster import Cluster
from tests.slurm.events import EVENTS, SAVE_STEPS, Row
from tests.support.corpus import row, shard_rows, write_rows

pytestmark = [
    pytest.mark.skipif(os.environ.get("SLURM_TESTS") != "all", reason="takes minutes: make test-slurm"),
    pytest.mark.timeout(1800),
]
STANDIN = [name for name in EVENTS if name != "signal of the time limit"]  # which test_scripts.py has
UNTOLD = ("one rank killed", "slurmd killed", "node off", "network partition")  # nobody asks the ranks to save
# With torch's own launcher, exchanges and connections; one after the other, since each takes both cores.
REAL = [
    "preemption",
    "time limit without --signal",
    "one rank killed",
    "slurmd killed",
    "node off",
    "network partition",
]
STAY_AWAY = {"nothing": "COMPLETED", "scancel": "CANCELLED", "switch file": "FAILED"}  # and how they end


@pytest.fixture(scope="module")
def expendable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that loses nodes."""
    if reason := cluster.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    with cluster.running(folder / "w", folder / "clone", num_nodes=24, settings=["KILLWAIT=15"]) as started:
        yield started


@pytest.fixture(scope="module")
def standin_rows(expendable: Cluster, standin_folder: Path) -> dict[str, Row]:
    """All events at once: the stand-in takes next to nothing of the machine."""
    program, slurm = events.standin(standin_folder), expendable
    chosen = {name: slurm.nodes[2 * number :][:2] for number, name in enumerate(STANDIN)}
    spare = slurm.nodes[2 * len(STANDIN) :]
    for name in UNTOLD[1:]:  # one may wait for another's
        chosen[name] = [*chosen[name], *spare]

    def run(name: str) -> Row:
        return events.run_event(name, slurm, chosen[name], slurm.submit_folder / f"event-{chosen[name][0]}", program)

    with ThreadPoolExecutor(len(STANDIN)) as pool:
        return {row.event: row for row in pool.map(run, STANDIN)}


@pytest.mark.parametrize("name", STANDIN)
def test_an_event_costs_a_job_what_the_table_says(standin_rows: dict[str, Row], name: str) -> None:
    require(standin_rows[name])


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that gives up on a node after 10 s, and lets ranks that train have 10 s before it kills them."""
    if reason := cluster.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    settings = ["NODE_TIMEOUT=10", "KILLWAIT=10"]
    with cluster.running(folder / "work", folder / "clone", num_nodes=3 * len(REAL) + 3, settings=settings) as started:
        yield started


def test_a_node_without_the_common_disk_is_found_and_left_out(impatient: Cluster, standin_folder: Path) -> None:
    """By the package's own health check."""
    first, without, spare = nodes = impatient.nodes[-3:]
    folder = impatient.submit_folder / "out-health"
    folder.mkdir()
    impatient.on_node(without, "mount", "-t", "tmpfs", "tmpfs", str(folder))
    options = f"--num-gpus 0 --min-free-gb 0 --output-dir {folder}"
    event = replace(EVENTS["nothing"], env={"REAL_HEALTH": "1", "HEALTH_OPTIONS": options})
    found = events.run_one("unfit", event, impatient, nodes, folder, events.standin(standin_folder))
    assert (found.state, found.restarts) == ("COMPLETED", 1), found.log
    assert f"without {without} from now on" in found.log
    assert found.nodes == [first, spare]


def test_the_pipeline_makes_a_model_of_rows(impatient: Cluster, program: events.Program, model: str) -> None:
    """The real commands, each with what the one before has left."""
    folder = impatient.submit_folder
    for name, numbers in {"0": range(8), "1": range(8, 16), "2": range(16, 24), "held_out": range(30, 31)}.items():
        write_rows(folder / f"{name}.jsonl", [row(number) for number in numbers])
    settings = ["global_batch_size=2", "per_device_train_batch_size=1", "max_steps=2"]
    said = impatient.run(
        *("slurm/pipeline.sh", "runs/tiny", model, program.accelerate_config, program.recipe, "held_out.jsonl"),
        *("0.jsonl", "1.jsonl", "2.jsonl", "--", *settings),
        env=program.env | {"PARTS": "2"},
    )
    for number in said.rpartition(" ")[2].split(","):
        assert impatient.wait_for_end(number, 600)["JobState"] == "COMPLETED"
    made = folder / "runs" / "tiny"
    assert (made / "merged" / "model.safetensors").is_file()
    assert json.loads((made / "eval" / "report.json").read_text())


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, model: str) -> events.Program:
    """The package, on a few rows."""
    folder = tmp_path_factory.mktemp("data")
    shard_rows(folder, model, [row(number) for number in range(64)])
    return events.package(folder, Path(model), folder / "shards")


@pytest.mark.parametrize("name", REAL)
def test_an_event_costs_a_run_of_real_ranks_what_the_table_says(
    impatient: Cluster, program: events.Program, name: str
) -> None:
    nodes = impatient.nodes[3 * REAL.index(name) :][:3]
    found = events.run_event(name, impatient, nodes, impatient.submit_folder / f"out-{nodes[0]}", program)
    print(found)
    require(found)


def require(row: Row) -> None:
    """What has to hold, whatever trains."""
    assert row.state == STAY_AWAY.get(row.event, "COMPLETED"), row.log
    if row.event in STAY_AWAY:
        assert row.restarts == 0, row.log
    else:
        assert row.restarts == 1, row.log
    if row.event in UNTOLD:
        assert row.steps_lost <= SAVE_STEPS, row.log
    else:
        assert row.steps_lost == 0, row.log
