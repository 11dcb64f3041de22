"""Several machines without Slurm: started by hand they learn what one learns, and no fault of one lets the others wait.

Two machines are two sets of namespaces on this one (`tests/support/machines.py`): they share a disk and the loopback
interface, and no processes.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemma_dist import meeting
from gemma_dist.logs import read_jsonl
from gemma_dist.recipe import load_config
from gemma_dist.resolve import resolve
from gemma_dist.topology import Topology
from gemma_dist.train.agree import differences, facts_of, versions_here
from tests.support.corpus import row, shard_rows
from tests.support.machines import accelerate, free_port, machines, needs_namespaces, torchrun
from tests.support.ranks import ENVIRONMENT, REPOSITORY, gemma_dist, long, needs_compiler, wait_for

NUM_STEPS = 12
SETTINGS = ["per_device_train_batch_size=1", "global_batch_size=4", f"max_steps={NUM_STEPS}", "save_steps=2"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    shard_rows(folder, model, [row(number, 1 + number % 3) for number in range(24)])
    return folder / "shards"


def train(model: str, shards: Path, out: Path, *more: str) -> list[str]:
    """The words of a run behind those of its launcher."""
    words = [f"model_name_or_path={model}", f"data.train={shards}", f"output_dir={out}"]
    return ["gemma_dist", "train", "launch/cpu_lora.yaml", *words, *SETTINGS, *more]


def curve(out: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_jsonl(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: str, shards: Path) -> Any:
    """The losses of all steps under one launcher of this machine, by its config and ranks."""
    done: dict[tuple[str, int], list[tuple[int, float, float]]] = {}

    def run(launch: str, num_ranks: int = 2) -> list[tuple[int, float, float]]:
        if (launch, num_ranks) not in done:
            out = tmp_path_factory.mktemp("alone") / "out"
            if num_ranks == 2:
                gemma_dist(*train(model, shards, out)[1:], launch=launch)
            else:
                command = accelerate(0, 1, free_port(), ranks_each=num_ranks, launch=launch)
                subprocess.run(
                    [*command, *train(model, shards, out)], cwd=REPOSITORY, env=os.environ | ENVIRONMENT, check=True
                )
            done[launch, num_ranks] = curve(out)
        return done[launch, num_ranks]

    return run


@long
@needs_namespaces
def test_two_machines_learn_what_one_learns_although_one_of_them_fails(
    model: str, shards: Path, tmp_path: Path, alone: Any
) -> None:
    """The power of the second is cut after some steps: the first ends by itself, and the same commands go on."""
    out = tmp_path / "out"
    for first in (True, False):
        port = free_port()
        commands = [[*accelerate(rank, 2, port), *train(model, shards, out)] for rank in (0, 1)]
        with machines(tmp_path, *commands) as (one, two):
            if first:
                wait_for(out / "checkpoint-2" / "complete.json", one.process)
                two.off()
                said = one.ends()
                assert one.process.returncode != 0, said
                assert "machine0 lost its connection to a rank on another machine" in said
                assert "a bug in gemma_dist" not in said
            else:
                for machine in (one, two):
                    said = machine.ends()
                    assert machine.process.returncode == 0, said
    assert curve(out) == alone("cpu_ddp"), "not to the last bit"


@long
@needs_namespaces
@pytest.mark.parametrize(
    ("launcher", "launch", "ranks_each"),
    [
        ("accelerate", "cpu_ddp", 2),
        pytest.param("accelerate", "cpu_zero3", 1, marks=needs_compiler),
        ("torchrun", "cpu_ddp", 1),
        ("torchrun", "cpu_ddp", 2),
    ],
)
def test_every_launcher_trains_over_machines(
    model: str, shards: Path, tmp_path: Path, alone: Any, launcher: str, launch: str, ranks_each: int
) -> None:
    out, port = tmp_path / "out", free_port()
    if launcher == "torchrun":
        commands = [torchrun(rank, 2, port, ranks_each=ranks_each) for rank in (0, 1)]
    else:
        commands = [accelerate(rank, 2, port, ranks_each=ranks_each, launch=launch) for rank in (0, 1)]
    with machines(tmp_path, *[[*command, *train(model, shards, out)] for command in commands]) as started:
        for machine in started:
            said = machine.ends()
            assert machine.process.returncode == 0, said
    assert curve(out) == alone(launch, 2 * ranks_each), "not to the last bit"


@needs_namespaces
@pytest.mark.parametrize("wrong", [0, pytest.param(1, marks=long)])
def test_a_machine_that_cannot_start_ends_the_others_with_its_words(
    model: str, shards: Path, tmp_path: Path, wrong: int
) -> None:
    port = free_port()
    more = {wrong: ["learning_rat=1"]}
    commands = [
        [*torchrun(rank, 2, port), *train(model, shards, tmp_path / "out", *more.get(rank, []))] for rank in (0, 1)
    ]
    with machines(tmp_path, *commands) as started:
        for machine in started:
            said = machine.ends()
            assert machine.process.returncode == 1, "of a launcher"
            assert "learning_rat = 1: unknown key; did you mean train.learning_rate?" in said
            other = f"rank {wrong} on machine{wrong} could not start, so this one stops"
            assert (other in said) == (machine.name != f"machine{wrong}")
            assert "exitcode  : 2 " in said


@long
@needs_namespaces
def test_machines_with_different_recipes_are_refused(model: str, shards: Path, tmp_path: Path) -> None:
    port = free_port()
    commands = [
        [*torchrun(rank, 2, port), *train(model, shards, tmp_path / "out", f"learning_rate={rank + 1}e-3")]
        for rank in (0, 1)
    ]
    with machines(tmp_path, *commands) as started:
        for machine in started:
            said = machine.ends()
            assert "train.learning_rate is 0.001 on rank 0 (machine0), 0.002 on rank 1 (machine1)" in said
            assert "exitcode  : 2 " in said
    assert not list((tmp_path / "out").glob("checkpoint-*"))


CONNECT = """
import torch  # before the time counts
from gemma_dist import meeting, world
from gemma_dist.logs import start_logging
start_logging()
meeting.SAY_S = 2.0
with meeting.waiting(timeout_s=6):
    world.connect()
"""


@pytest.mark.parametrize(
    ("rank", "missing"),
    [
        (0, "rank 1 of 2 did not come to 127.0.0.1:{port}"),
        (1, "nobody answers at 127.0.0.1:{port}, where the ranks meet"),
    ],
)
def test_a_machine_that_is_not_there_is_named_and_not_waited_for_for_ever(rank: int, missing: str) -> None:
    port = free_port()
    where = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, "-c", CONNECT],
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT | {name: str(value) for name, value in where.items()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert f"[rank {rank}] waiting since " in done.stderr
    *_, ends = [line for line in done.stderr.splitlines() if line.startswith(f"[rank {rank}] error: ")]
    assert missing.format(port=port) in ends
    assert "a rank of its own" in done.stderr


def test_ranks_of_one_machine_leave_it_to_their_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for world_size, local, expected in ((1, 1, False), (2, 2, False), (4, 2, True)):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        assert meeting.over_machines() == expected


CHANGES = {
    "learning_rate=1e-3": "train.learning_rate",
    "lora.r=4": "lora.r",
    "seed=7": "train.seed",
    "max_steps=3": "train.max_steps",
    "resume_from_checkpoint=never": "train.resume_from_checkpoint",
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_differs_between_machines_is_named_with_its_values(model: str, shards: Path, change: str) -> None:
    words = train(model, shards, shards / "out")[3:]
    facts = [
        facts_of(resolve(load_config(REPOSITORY / "launch/cpu_lora.yaml", [*words, *more]), Topology("", 2)))
        for more in ([], [change], [])
    ]
    problems = differences(facts, ["a", "b", "a"])
    assert any(one.startswith(f"{CHANGES[change]} is ") for one in problems), problems
    assert all("on rank 0, 2 (a)" in one and "on rank 1 (b)" in one for one in problems)


def test_places_may_differ_between_machines_and_what_is_there_may_not(model: str, shards: Path, tmp_path: Path) -> None:
    """A copy of the base and of the corpus on a local disk is the same; a shortened corpus is not."""
    (tmp_path / "other").mkdir()
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "shards").symlink_to(shards)
    shard_rows(tmp_path / "other", model, [row(number) for number in range(8)])
    runs = [
        resolve(load_config(REPOSITORY / "launch/cpu_lora.yaml", train(*place, tmp_path / "out")[3:]), Topology("", 2))
        for place in (
            (model, shards),
            (str(tmp_path / "model"), tmp_path / "shards"),
            (model, tmp_path / "other" / "shards"),
        )
    ]
    facts = [facts_of(run) for run in runs]
    assert differences(facts[:2], ["a", "b"]) == []
    (of_corpus,) = [one for one in differences(facts, ["a", "b", "c"]) if "(manifest)" in one]
    assert "on rank 0, 1 (a, b)" in of_corpus


def test_launches_of_another_kind_and_other_samples_in_quarantine_differ(
    model: str, shards: Path, tmp_path: Path
) -> None:
    words = train(model, shards, tmp_path / "out")[3:]
    config = load_config(REPOSITORY / "launch/cpu_lora.yaml", words)
    zero = {"zero_optimization": {"stage": 2}}
    launches = [Topology("", 2, "DEEPSPEED", deepspeed=zero), Topology("", 2, "MULTI_GPU")]
    problems = differences([facts_of(resolve(config, launch)) for launch in launches], ["a", "b"])
    assert any("DEEPSPEED" in one and "MULTI_GPU" in one for one in problems)
    (tmp_path / "ids").write_text(resolve(config, launches[1]).schedule.shards.id(3) + "\n")
    kept = load_config(REPOSITORY / "launch/cpu_lora.yaml", [*words, f"data.quarantine={tmp_path / 'ids'}"])
    (problem,) = differences([facts_of(resolve(one, launches[1])) for one in (config, kept)], ["a", "b"])
    assert problem.startswith("data.quarantine (hash of its samples) is ")


def test_versions_of_this_machine_are_those_that_it_imports() -> None:
    import torch

    versions = versions_here()
    assert versions["torch"] == torch.__version__
    (problem,) = differences([versions, {**versions, "torch": "2.0"}], ["a", "b"])
    assert problem == f'torch is "{torch.__version__}" on rank 0 (a), "2.0" on rank 1 (b)'
