"""What `slurm/train.sbatch` makes of the end of its ranks, with words in the place of Slurm: what no cluster does on
order, and what has to hold where none can be started.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT

CONFIG, RECIPE = "accelerate_configs/zero3.yaml", "launch/31b_lora_zero3.yaml"
# One node. The ranks do as TRAIN says, `python -m gemma_dist health` as HEALTH_DOES; srun ends as SRUN says.
STAND_INS = {
    "srun": 'while [ "$1" != bash ]; do shift; done; "$@"; exit "${SRUN:-$?}"',
    "accelerate": 'cd "$GEMMA_DIST_EXIT_CODES"; eval "$TRAIN"',
    "python": 'cd "$GEMMA_DIST_EXIT_CODES"; eval "$HEALTH_DOES"',
    "squeue": '[ "$(cat away)" -le 0 ] || { echo $(($(cat away) - 1)) >away; exit 1; }; echo "$STATE"',
    "scontrol": 'case "$1 $2" in "show hostnames") echo n1 ;; *) echo "$@" >>asked ;; esac',
    "sleep": ":",
}


@dataclass(frozen=True)
class Found:
    """What came of a job."""

    code: int
    said: str
    asked: list[str]  # of Slurm: the words behind `scontrol`
    restarts: str


def run(
    folder: Path, *, away: int = 0, restarts: str = "", words: tuple[str, ...] = (CONFIG, RECIPE), **env: str
) -> Found:
    """A job of one node and two ranks, its controller `away` for so many questions, after `restarts`."""
    for name in ("slurm", "accelerate_configs"):
        (folder / name).symlink_to(ROOT / name)
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "away").write_text(f"{away}\n")
    job_folder = folder / "slurm-logs" / "job-7"
    job_folder.mkdir(parents=True)
    if restarts:
        (job_folder / "restarts").write_text(f"{restarts}\n")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1", "PROCESSES_PER_NODE": "2"}
    job |= {"SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}  # of the node's task
    done = subprocess.run(
        ["bash", "slurm/train.sbatch", *words],
        cwd=folder,
        env={"PATH": f"{folder}:{os.environ['PATH']}", "STATE": "RUNNING None", "HEALTH": "0"} | job | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    asked, counted = folder / "asked", job_folder / "restarts"
    return Found(
        done.returncode,
        done.stdout + done.stderr,
        [line for line in asked.read_text().splitlines() if not line.startswith("show")] if asked.exists() else [],
        counted.read_text().strip() if counted.exists() else "",
    )


def ranks(*codes: int, step: int = 0) -> str:
    """Bash of two ranks that end with `codes`, behind a checkpoint of `step`."""
    return "; ".join(
        [f"echo {step} >step", *(f"echo {code} >rank-{rank}" for rank, code in enumerate(codes)), "exit 1"]
    )


@pytest.mark.parametrize(
    ("codes", "told", "state", "code", "comes_back", "said"),
    [
        ((0, 0), False, "RUNNING None", 0, False, "done"),
        ((75, 75), True, "RUNNING None", 0, True, "stopped as Slurm asked"),
        ((75, 75), True, "COMPLETING None", 1, False, "Slurm ended this job (COMPLETING None)"),
        ((75, 75), False, "RUNNING None", 75, False, "stopped, but not by Slurm"),
        ((2, 143), True, "RUNNING None", 2, False, "a user error"),
        ((4, 143), False, "RUNNING None", 0, True, "a step hung"),
        ((1, 143), False, "RUNNING None", 0, True, "a rank failed"),
        ((74, 143), False, "RUNNING None", 0, True, "a rank failed"),
        ((75,), True, "RUNNING None", 0, True, "1 of 2 ranks were killed"),
        ((), False, "RUNNING None", 0, True, "no rank left a word: all were killed, or none began"),
    ],
)
def test_a_job_comes_back_when_it_should(
    tmp_path: Path, codes: tuple[int, ...], told: bool, state: str, code: int, comes_back: bool, said: str
) -> None:
    found = run(tmp_path, TRAIN=f"{': >told; ' if told else ''}{ranks(*codes)}", STATE=state)
    assert found.code == code, found.said
    assert found.asked == (["requeue 7"] if comes_back else [])
    assert said in found.said


def test_a_job_waits_for_a_controller_that_is_away(tmp_path: Path) -> None:
    found = run(tmp_path, away=3, TRAIN=ranks(1, 1))
    assert (found.code, found.asked) == (0, ["requeue 7"]), found.said


def test_a_start_that_does_not_come_to_train_is_no_progress_for_the_next(tmp_path: Path) -> None:
    """It knows of no step: the count would begin anew at the step of the start before."""
    found = run(tmp_path, restarts="2 500", TRAIN="exit 1")
    assert (found.asked, found.restarts) == (["requeue 7"], "3 500"), found.said


@pytest.mark.parametrize(("step", "comes_back"), [(500, False), (501, True)])
def test_a_job_gives_up_where_the_newest_checkpoint_stays_the_same(tmp_path: Path, step: int, comes_back: bool) -> None:
    found = run(tmp_path, restarts="3 500", TRAIN=ranks(1, 1, step=step))
    assert found.asked == (["requeue 7"] if comes_back else []), found.said
    assert found.code == (0 if comes_back else 1)


def test_a_job_trains_once_all_nodes_have_said_that_they_are_fit(tmp_path: Path) -> None:
    """Whatever srun says of it: a job that ended there would be taken for done."""
    trains = f"touch {tmp_path}/trained; {ranks(0, 0)}"
    found = run(tmp_path, HEALTH="1", SRUN="1", HEALTH_DOES="echo 0 >rank-0", TRAIN=trains)
    assert found.code == 0, found.said
    assert (tmp_path / "trained").exists()


def test_an_unfit_node_is_left_out(tmp_path: Path) -> None:
    found = run(tmp_path, HEALTH="1", HEALTH_DOES="echo 5 >rank-0; echo n1.example.com >bad-nodes; exit 5")
    assert (found.code, found.asked) == (0, ["requeue 7", "update JobId=7 ExcNodeList=n1"]), found.said


def test_a_pipeline_that_cannot_be_submitted_whole_leaves_no_job_behind(tmp_path: Path) -> None:
    calls = {
        "sbatch": '[[ "$*" != *slurm/merge.sbatch* ]] || exit 1; echo 1 >>jobs; wc -l <jobs',
        "scancel": 'echo "$@" >cancelled',
    }
    for name, body in calls.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    words = ["runs/p", "M", CONFIG, RECIPE, "held_out.jsonl", "in.jsonl"]
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([ROOT / "slurm" / "pipeline.sh", *words], cwd=tmp_path, env=env, check=False)
    assert done.returncode != 0
    assert (tmp_path / "cancelled").read_text().split() == ["1", "2"]


def test_what_a_site_loads_may_read_variables_that_are_not_set(tmp_path: Path) -> None:
    """As the `module` of many clusters does."""
    (tmp_path / "site").write_text('[ -z "$NEVER_SET" ] && export MAX_RESTARTS=7')
    found = run(tmp_path, SITE_ENV=str(tmp_path / "site"), TRAIN=ranks(1, 1))
    assert "restart 1 of 7 without a new checkpoint" in found.said


def test_an_accelerate_config_that_is_not_there_is_a_user_error(tmp_path: Path) -> None:
    found = run(tmp_path, words=("accelerate_configs/zer3.yaml", RECIPE), TRAIN="exit 1")
    assert (found.code, found.asked) == (2, []), found.said
    assert "accelerate_configs/zer3.yaml: no such file" in found.said
