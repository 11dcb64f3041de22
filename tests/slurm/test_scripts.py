"""The batch scripts on a real Slurm, with a stand-in for what they start (seconds; `test_events.py` takes minutes)."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.slurm import cluster, events
from tests.slurm.cluster import FREEZER, ROOT, Cluster, wait_until
from tests.slurm.events import EVENTS, Event, Row

SCRIPTS = {
    "train": ["accelerate_configs/zero3.yaml", "launch/31b_lora_zero3.yaml"],
    "evaluate": ["accelerate_configs/ddp.yaml", "--model", "M", "--data", "D", "--out", "O"],
    "merge": ["--base", "M", "--adapter", "A", "--out", "O"],
    "shard": ["O", "M", "rows.jsonl"],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_slurm_accepts_what_a_script_asks_for(slurm: Cluster, name: str) -> None:
    array = ["--array=0-7"] if name == "shard" else []
    slurm.run("sbatch", "--test-only", *array, f"slurm/{name}.sbatch", *SCRIPTS[name])


def by_rank_1(code: int, *, starts: int = 1, **fields: object) -> Event:
    """It ends with `code` at step 12, behind a checkpoint at step 10, in the first `starts` starts."""
    overrides = ("fail_at=12", f"fail_code={code}", f"fail_starts={starts}")
    return Event(EVENTS["nothing"].cause, overrides=overrides, save_steps=events.SAVE_STEPS, **fields)  # type: ignore[arg-type]


QUICK = {
    "signal of the time limit": EVENTS["signal of the time limit"],
    "signal, without a launcher": Event(
        EVENTS["signal of the time limit"].cause, env={"LAUNCHER": "none", "PROCESSES_PER_NODE": "2"}
    ),
    "scancel": EVENTS["scancel"],
    "switch file": EVENTS["switch file"],
    "one rank killed": EVENTS["one rank killed"],
    "a hang": by_rank_1(4),
    "a crash at every start": by_rank_1(1, starts=9, env={"MAX_RESTARTS": "1"}),
    "a user error": Event(EVENTS["nothing"].cause, begins=False, recipe="no.yaml"),
    "an unfit node": Event(EVENTS["nothing"].cause, env={"UNFIT": "1"}),
}


@pytest.fixture(scope="module")
def rows(slurm: Cluster, standin_folder: Path, pipeline: list[str]) -> dict[str, Row]:
    """What came of the quick events, all at once, each on nodes of its own; the pipeline has the first four."""
    program = events.standin(standin_folder)
    nodes = {name: slurm.nodes[6 + 2 * number :][:2] for number, name in enumerate(QUICK)}
    nodes["an unfit node"] = slurm.nodes[5:6] + slurm.nodes[-2:]

    def run(name: str) -> Row:
        folder = slurm.submit_folder / f"out-{nodes[name][0]}"
        return events.run_one(name, QUICK[name], slurm, nodes[name], folder, program)

    with ThreadPoolExecutor(len(QUICK)) as pool:
        return {row.event: row for row in pool.map(run, QUICK)}


@pytest.mark.parametrize("name", ["signal of the time limit", "signal, without a launcher"])
def test_a_job_that_slurm_tells_to_stop_saves_and_comes_back(rows: dict[str, Row], name: str) -> None:
    row = rows[name]
    assert (row.state, row.restarts, row.steps_lost) == ("COMPLETED", 1, 0), row.log
    assert row.signal_to_marker_s is not None
    assert "stopped as Slurm asked; requeued at step" in row.log


def test_a_cancelled_job_saves_and_stays_away(rows: dict[str, Row]) -> None:
    row = rows["scancel"]
    assert (row.state, row.restarts, row.steps_lost) == ("CANCELLED", 0, 0), row.log


def test_a_run_that_the_switch_file_stops_stays_away_and_holds_up_what_waits_for_it(rows: dict[str, Row]) -> None:
    row = rows["switch file"]
    assert (row.state, row.restarts, row.steps_lost) == ("FAILED", 0, 0), row.log
    assert row.exit_code == 75


@pytest.mark.parametrize(
    ("name", "said"), [("one rank killed", "were killed"), ("a hang", "a step hung; requeued at step 10")]
)
def test_a_job_that_loses_a_rank_comes_back(rows: dict[str, Row], name: str, said: str) -> None:
    row = rows[name]
    assert (row.state, row.restarts) == ("COMPLETED", 1), row.log
    assert row.steps_lost < events.SAVE_STEPS
    assert said in row.log


def test_a_job_that_makes_no_progress_gives_up(rows: dict[str, Row]) -> None:
    row = rows["a crash at every start"]
    assert (row.state, row.exit_code, row.restarts) == ("FAILED", 1, 1), row.log
    assert "no new checkpoint since step 10 in 1 restarts" in row.log


def test_a_user_error_never_comes_back(rows: dict[str, Row]) -> None:
    row = rows["a user error"]
    assert (row.state, row.exit_code, row.restarts) == ("FAILED", 2, 0), row.log


def test_an_unfit_node_is_left_out_of_the_next_start(rows: dict[str, Row]) -> None:
    row = rows["an unfit node"]
    assert (row.state, row.restarts) == ("COMPLETED", 1), row.log
    assert "a node is not fit; requeued" in row.log
    named = re.search(r"without (n\d+) from now on", row.log)
    assert named
    assert named[1] not in row.nodes


@pytest.mark.parametrize(("parts", "said"), [("", "this is no --array=0-N"), ("4", "done")])
def test_a_task_of_an_array_alone_takes_its_own_inputs_or_none(
    slurm: Cluster, standin_folder: Path, parts: str, said: str
) -> None:
    env = events.standin(standin_folder).env | {"PARTS": parts}
    number = slurm.sbatch("--array=3", "slurm/shard.sbatch", "O", "M", *(f"in-{i}" for i in range(8)), env=env)
    slurm.wait_for_end(number)
    assert said in (slurm.submit_folder / f"shard-{number}_3.out").read_text()
    logs = [path.read_text() for path in slurm.submit_folder.glob(f"slurm-logs/shard-{number}/*.log")]
    assert [log.split()[:3] for log in logs] == ([["shard", "in-3", "in-7"]] if parts else [])


@pytest.fixture(scope="module")
def pipeline(slurm: Cluster, standin_folder: Path) -> list[str]:
    """The jobs of a pipeline, whose sharding and training come back once: shard, train, merge, evaluate."""
    program = events.standin(standin_folder)
    inputs = [f"{number}.jsonl" for number in range(3)]
    for name in inputs:
        (slurm.submit_folder / name).touch()
    said = slurm.run(
        *("slurm/pipeline.sh", "runs/p", "M", program.accelerate_config, program.recipe, "held_out.jsonl", *inputs),
        *("--", "fail_at=12", "max_steps=20", "save_steps=10", *program.overrides),
        env=program.env | {"PARTS": "2", "FAILS_FIRST": "shard", "TRAIN_OPTIONS": "--nodes=2 --time=30"},
    )
    return said.rpartition(" ")[2].split(",")


def test_the_pipeline_starts_each_part_once_the_one_before_is_done(slurm: Cluster, pipeline: list[str]) -> None:
    """Also where jobs come back in between: those that wait for them do so on. Of an array, each task by itself."""
    ended = {number: slurm.wait_for_end(number) for number in pipeline}
    shard, train, merge, evaluate = pipeline
    assert {job["JobState"] for job in ended.values()} == {"COMPLETED"}
    assert (ended[train]["Restarts"], ended[train]["TimeLimit"]) == ("1", "00:30:00")
    tasks = slurm.run("scontrol", "--oneliner", "show", "job", shard)
    assert re.findall(r"Restarts=(\d+)", tasks) == ["1", "1"]
    for later, earlier in ((train, shard), (merge, train), (evaluate, train)):
        assert ended[later]["StartTime"] >= ended[earlier]["EndTime"]
    logs = [path.read_text() for path in slurm.submit_folder.glob("slurm-logs/*/*.log")]
    lines = [line for log in logs for line in log.splitlines() if " runs/p/" in line]
    assert sorted(" ".join(line.split()[:5]) for line in lines) == [
        "evaluate --model M --adapter runs/p/adapter",
        "merge --base M --adapter runs/p/adapter",
        "shard 0.jsonl 2.jsonl --model M",
        "shard 1.jsonl --model M --out",
    ]


HOLDER = """
import os, time
from pathlib import Path
from tests.slurm.cluster import running

def test_holds():
    folder = Path(os.environ["HOLDER"])
    with running(folder / "work", folder / "clone", num_nodes=1) as slurm:
        slurm.sbatch("--output=/dev/null", "--wrap=setsid sleep 600 & sleep 600")
        while "R" not in slurm.run("squeue", "-h", "-o", "%t"):
            time.sleep(0.1)
        (folder / "holds").touch()
        time.sleep(600)
"""


def test_nothing_is_left_when_pytest_is_killed(tmp_path: Path) -> None:
    if reason := cluster.missing():
        pytest.skip(reason)
    (tmp_path / "test_holder.py").write_text(HOLDER)
    pytester = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path / "test_holder.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HOLDER": str(tmp_path)},
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until((tmp_path / "holds").exists, 240)
        wait_until(lambda: "sleep" in {command for _, command in left_of(tmp_path / "work")}, 120)
        tag = (tmp_path / "work" / "run" / "cgroup").read_text().strip()
        assert tag in os.listdir(FREEZER)
    finally:
        pytester.send_signal(signal.SIGKILL)
        pytester.wait()
    wait_until(lambda: not left_of(tmp_path / "work"), 120)
    wait_until(lambda: tag not in os.listdir(FREEZER), 120)
    mounts = Path("/proc/mounts").read_text()  # another worker of pytest may mount something of its own
    assert str(tmp_path) not in mounts
    assert tag not in mounts


def left_of(work: Path) -> list[tuple[int, str]]:
    """Processes of a cluster, by the configuration in their environment: number and command."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{work}/etc/slurm.conf".encode() in (process / "environ").read_bytes():
                found.append((int(process.name), (process / "comm").read_text().strip()))
        except OSError:  # it has ended, or is none of ours
            continue
    return found
