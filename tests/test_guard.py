"""Guards of a run: nothing that is not finite reaches the weights, and a hang ends the run and names its culprit."""

import json
import sys
import threading
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_dist import logs
from gemma_dist.__main__ import main
from gemma_dist.shards.reader import open_shards
from gemma_dist.train.watchdog import Watchdog
from tests.support.corpus import row, shard_rows
from tests.support.ranks import gemma_dist, kill, needs_compiler, start, wait_for

POISONED = 5
SETTINGS = ["per_device_train_batch_size=2", "global_batch_size=4", "max_steps=4", "save_steps=1"]
POISON = "¤"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """Rows of which one holds a letter that no other holds."""
    folder = tmp_path_factory.mktemp("guard")
    rows = [row(number) for number in range(16)]
    rows[POISONED]["messages"][0]["content"] += POISON
    shard_rows(folder, model, rows)
    return folder / "shards"


@pytest.fixture(scope="module")
def broken_model(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """The tiny E4B with a NaN in the per-layer embedding of that letter."""
    import shutil

    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if "embed_tokens_per_layer" in name]
    letter = AutoTokenizer.from_pretrained(model)(POISON, add_special_tokens=False)["input_ids"][-1]
    weights[name][letter] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("recipe", "launch"),
    [
        ("cpu_full", "cpu_ddp"),
        pytest.param("cpu_lora", "cpu_zero3", marks=needs_compiler),
    ],
)
def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_optimizer(
    broken_model: Path, shards: Path, tmp_path: Path, recipe: str, launch: str
) -> None:
    paths = [f"model_name_or_path={broken_model}", f"data.train={shards}", f"output_dir={tmp_path / 'out'}"]
    words = [f"launch/{recipe}.yaml", *paths, *SETTINGS]
    steps = gemma_dist("batches", "-", *words, "--step", 1, "--num-steps", 4, "--json").splitlines()
    bad = next(number for number, line in enumerate(steps, start=1) if f'"row-{POISONED}"' in line)
    output = gemma_dist("train", *words, launch=launch, fails=True)
    assert f"step {bad}: the loss of rank" in output
    assert f"row-{POISONED}" in output
    assert "This is a bug" not in output
    saved = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert (f"checkpoint-{bad - 1}" in saved) == (bad > 1)
    assert f"checkpoint-{bad}" not in saved
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    shown, written = ([(row["step"], row["epoch"]) for row in map(json.loads, lines)] for lines in (steps, rows))
    assert written == shown[: bad - 1]
    assert [step for step, _ in shown] == [1, 2, 3, 4]


def test_a_gradient_that_is_not_finite_stops_too(shards: Path) -> None:
    from gemma_dist.batch_plan import BatchPlan
    from gemma_dist.errors import TrainingError
    from gemma_dist.stream.schedule import Schedule
    from gemma_dist.train.guard import stop_unless_finite

    schedule = Schedule(open_shards(shards), BatchPlan(1, 2, 2, 4), 1, packing=False, packing_length=None)
    stop_unless_finite(schedule, 2, everywhere=True, loss=True)
    with pytest.raises(TrainingError, match=r"step 3: the loss is finite, but a gradient is not finite") as caught:
        stop_unless_finite(schedule, 2, everywhere=False, loss=True)
    for sample in schedule.global_batch(2):
        assert schedule.shards.id(sample) in str(caught.value)


def test_samples_in_quarantine_are_never_blamed(shards: Path, tmp_path: Path) -> None:
    from gemma_dist.batch_plan import batch_plan
    from gemma_dist.errors import TrainingError
    from gemma_dist.recipe import load_config
    from gemma_dist.stream.schedule import open_schedule
    from gemma_dist.train.guard import sample_ids, stop_unless_finite

    quarantine = tmp_path / "bad.txt"
    words = [f"data.train={shards}", f"data.quarantine={quarantine}", *SETTINGS]
    quarantine.write_text("")
    config = load_config("launch/cpu_full.yaml", words)
    plan = batch_plan(config, 1)
    named = sample_ids(open_schedule(config, plan), 1, 0).split(", ")
    quarantine.write_text("\n".join(named[:3]))
    schedule = open_schedule(config, plan)
    with pytest.raises(TrainingError, match=r"step 2: .*\n    rank 0: " + named[3] + r"\n"):
        stop_unless_finite(schedule, 1, everywhere=False, loss=False)
    quarantine.write_text("\n".join(named))
    assert sample_ids(open_schedule(config, plan), 1, 0) == "none, only fillers"


@pytest.mark.parametrize(("recipe", "launch"), [("cpu_lora", "cpu_ddp")])
def test_a_rank_that_hangs_is_named_and_the_run_ends(
    model: str, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], recipe: str, launch: str
) -> None:
    """Rank 1 is stopped, as a machine that hangs: rank 0 ends the run, the launcher both, and a new one goes on, here
    in one process."""
    out = tmp_path / "out"
    words = [f"launch/{recipe}.yaml", f"model_name_or_path={model}", f"data.train={shards}", f"output_dir={out}"]
    words += [*SETTINGS[:2], "save_steps=1", "max_steps=500", "save_total_limit=null"]
    process = start("train", *words, "step_timeout_s=8", launch=launch)
    wait_for(out / "checkpoint-2" / "complete.json", process)
    heartbeats = [json.loads((out / "heartbeats" / f"{rank}.json").read_text()) for rank in range(2)]
    stopped = psutil.Process(heartbeats[1]["process"])
    stopped.suspend()
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        kill(process)
    assert process.returncode == 1, "the launcher's, of any error"
    assert not stopped.is_running(), "the launcher kills what does not end"
    assert not psutil.pid_exists(heartbeats[0]["process"])
    assert "[rank 0] error: no step has ended for" in output
    assert "rank 1: DOES NOT ANSWER since" in output
    assert f"process {stopped.pid} on {heartbeats[1]['host']} is stopped, or its machine or disk hangs; at" in output
    assert output.count("samples row-") >= 2, "of both ranks"
    assert "exitcode  : 4 " in output
    assert "out of memory" not in output
    assert "Current thread" in (out / "stacks-rank-0.txt").read_text()
    assert not (out / "stacks-rank-1.txt").exists()

    saved = max(int(path.name.removeprefix("checkpoint-")) for path in out.glob("checkpoint-*"))
    assert main(["train", *words, f"max_steps={saved + 1}"]) == 0
    resumed = "".join(capfd.readouterr())
    assert f"step {saved + 1}/{saved + 1} " in resumed
    assert f"step {saved}/{saved + 1} " not in resumed
    assert not (out / "heartbeats").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the thread's SystemExit
def test_a_large_checkpoint_has_time_to_reach_the_disk(tmp_path: Path) -> None:
    """It no longer grows then. Nor does what a rank of a killed run says of its own hang end this one."""
    ended = threading.Event()

    def end(code: int) -> None:
        ended.set()
        sys.exit(code)

    weights = tmp_path / ".unfinished" / "checkpoint-1" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    with weights.open("wb") as file:
        file.truncate(10**11)  # without a block of it
    (tmp_path / "heartbeats").mkdir()
    for name in ("hangs", "hangs-elsewhere-1"):
        (tmp_path / "heartbeats" / name).touch()
    with patch("gemma_dist.failures.say_no_more"), patch("os._exit", end):
        watchdog = Watchdog(tmp_path, 0.4, lambda: "step 1", lambda rank: f"samples of {rank}")
        assert not ended.wait(3), "more than twice what a first step may take"
        weights.unlink()
        assert ended.wait(60)
        watchdog.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the thread's SystemExit
@pytest.mark.parametrize("disk", ["a checkpoint grows there", "nothing can be written there"])
def test_a_step_may_take_as_long_as_a_checkpoint_grows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, disk: str
) -> None:
    """A watchdog that would end this process ends it here in the test's eyes alone."""
    ended = threading.Event()

    def end(code: int) -> None:
        ended.set()
        sys.exit(code)

    folder = tmp_path if "grows" in disk else tmp_path / "file" / "folder"
    (tmp_path / "file").touch()
    (tmp_path / ".unfinished").mkdir()
    with (
        caplog.at_level("WARNING", "gemma_dist"),
        patch.object(logs.log, "propagate", True),
        patch("gemma_dist.failures.say_no_more"),
        patch("os._exit", end),
    ):
        watchdog = Watchdog(folder, 1.0, lambda: "step 1", lambda rank: f"samples of {rank}")
        if "grows" in disk:
            with (tmp_path / ".unfinished" / "model.safetensors").open("wb") as file:
                for _ in range(6 * 20):  # twice what a first step may take
                    file.write(b"0")
                    file.flush()
                    assert not ended.wait(0.05)
        assert ended.wait(60)
        watchdog.close()
    verdict = caplog.messages[-1]
    assert "the run ends here (train.step_timeout_s: 1" in verdict
    if "grows" in disk:
        assert "rank 0: in " in verdict
        assert "test_guard.py" in (tmp_path / "stacks-rank-0.txt").read_text(), "this thread waits here"
        assert verdict.count("at step 1, samples of 0") == 1
    else:
        assert f"{folder}: heartbeats can neither be written nor read there" in verdict
