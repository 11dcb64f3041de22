"""examples/cluster/: what schedulers start on each node is sound, names what exists, and ends as the ranks do."""

import json
import os
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from gemma_dist.recipe import load_config
from gemma_dist.topology import read_topology, require_fit
from tests.support.ranks import REPOSITORY, wait_for

FOLDER = REPOSITORY / "examples" / "cluster"
NODE = FOLDER / "node.sh"
# Of JobSet's custom resource at commit 08dfbdfd of kubernetes-sigs/jobset: all that may stand in the objects that our
# example uses, which take no other key.
SCHEMA = json.loads((REPOSITORY / "tests" / "support" / "jobset_schema.json").read_text())


@pytest.fixture(scope="module")
def jobset() -> dict[str, Any]:
    claim, found = yaml.safe_load_all((FOLDER / "jobset.yaml").read_text())
    assert (claim["kind"], found["kind"]) == ("PersistentVolumeClaim", "JobSet")
    return found


@pytest.fixture(scope="module")
def skypilot() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    return found


def test_the_job_set_has_the_fields_that_kubernetes_knows(jobset: dict[str, Any]) -> None:
    jsonschema.Draft7Validator(SCHEMA).validate(jobset)
    job = jobset["spec"]["replicatedJobs"][0]
    job["template"]["spec"]["backoffLimits"] = 1  # a key of its own making
    with pytest.raises(jsonschema.ValidationError, match="backoffLimits"):
        jsonschema.Draft7Validator(SCHEMA).validate(jobset)
    del job["template"]["spec"]["backoffLimits"]


def test_the_job_set_agrees_with_itself(jobset: dict[str, Any]) -> None:
    (job,) = jobset["spec"]["replicatedJobs"]
    name, spec = jobset["metadata"]["name"], job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    env = {one["name"]: one.get("value") for one in container["env"]}
    assert int(env["NUM_NODES"]) == spec["completions"] == spec["parallelism"]
    assert int(env["PROCESSES_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert env["MAIN_ADDRESS"] == f"{name}-{job['name']}-0-0.{name}", "of the first pod"
    assert int(env["GRACE_S"]) < pod["terminationGracePeriodSeconds"]
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}


def commands(jobset: dict[str, Any], skypilot: dict[str, Any]) -> list[list[str]]:
    """The words behind node.sh in both files."""
    (container,) = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["examples/cluster/node.sh"]
    (run,) = skypilot["run"].replace("\\\n", " ").split("exec examples/cluster/node.sh ")[1:]
    return [container["args"], run.split()]


def test_what_they_train_exists_and_fits(jobset: dict[str, Any], skypilot: dict[str, Any]) -> None:
    for config, recipe, *overrides in commands(jobset, skypilot):
        topology = read_topology(REPOSITORY / config)
        require_fit(load_config(REPOSITORY / recipe, [*overrides, "stop_grace_s=30"]), topology)


def test_the_scripts_are_sound_bash(skypilot: dict[str, Any]) -> None:
    subprocess.run(["bash", "-n", NODE], check=True)
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=skypilot[part], text=True, check=True)
    assert NODE.stat().st_mode & stat.S_IXUSR


def test_the_task_takes_its_node_from_skypilot(skypilot: dict[str, Any], tmp_path: Path) -> None:
    env = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        **skypilot["envs"],
    }
    # Beside the examples alone: the repository's own .venv, which the task puts first, holds the true accelerate.
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    run = ["bash", "-c", skypilot["run"]]
    node = _node(tmp_path, "printf '%s\\n' \"$@\"", run=run, cwd=tmp_path, **env)
    options = node.communicate(timeout=60)[0].split()
    where = {name: options[options.index(name) + 1] for name in options if name.startswith("--")}
    assert where["--machine_rank"] == "1"
    assert where["--num_machines"] == "2"
    assert where["--num_processes"] == "16"
    assert where["--main_process_ip"] == "10.0.0.1"
    assert "stop_grace_s=30" in options


def _node(
    folder: Path, launcher: str, run: list[str] | None = None, cwd: Path = REPOSITORY, **more: str
) -> "subprocess.Popen[str]":
    """Start node.sh, or what `run` says, with a stand-in for accelerate."""
    path = folder / "accelerate"
    path.write_text(f"#!/usr/bin/env bash\n{launcher}\n")
    path.chmod(0o755)
    where = {"NUM_NODES": "2", "NODE_RANK": "0", "MAIN_ADDRESS": "here", "PROCESSES_PER_NODE": "2"}
    return subprocess.Popen(
        run or [str(NODE), "accelerate_configs/ddp.yaml", "launch/cpu_lora.yaml"],
        cwd=cwd,
        env=where | {"PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": str(folder), "OUT": str(folder)} | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("ranks", "launcher", "expected"),
    [
        (["0", "0"], 0, 0),
        (["2", "143"], 1, 2),
        (["75", "75"], 1, 75),
        (["4", "143"], 1, 4),
        (["1"], 1, 1),
        ([], 1, 1),
        (["75", "2"], 1, 2),
    ],
)
def test_a_node_ends_as_its_ranks_did(tmp_path: Path, ranks: list[str], launcher: int, expected: int) -> None:
    writes = [f'echo {code} > "$GEMMA_DIST_EXIT_CODES/rank-{rank}"' for rank, code in enumerate(ranks)]
    node = _node(tmp_path, "\n".join([*writes, f"exit {launcher}"]))
    said, _ = node.communicate(timeout=60)
    assert node.returncode == expected, said


def test_a_node_that_is_told_to_end_tells_its_launcher_and_waits_for_it(tmp_path: Path) -> None:
    launcher = """
        trap 'sleep 1; echo 75 > "$GEMMA_DIST_EXIT_CODES/rank-0"; exit 1' TERM
        touch "$OUT/ready"; echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > "$OUT/timeout"
        while :; do sleep 0.1; done"""
    node = _node(tmp_path, launcher, GRACE_S="300")
    wait_for(tmp_path / "ready", node)
    node.send_signal(signal.SIGTERM)
    assert node.wait(60) == 75
    assert (tmp_path / "timeout").read_text().strip() == "300"


def test_a_node_says_how_it_is_used() -> None:
    done = subprocess.run([NODE], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "usage: examples/cluster/node.sh ACCELERATE_CONFIG RECIPE" in done.stderr
