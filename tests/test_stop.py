"""Runs that are asked to stop: whoever asks, all ranks end after the same step, and not one of their steps is lost."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest

from gemma_dist import exits, failures, logs, ranklog, signals, world
from gemma_dist.errors import ConfigError
from gemma_dist.files import exclusive
from gemma_dist.train import owner
from gemma_dist.train.stop import Request, StopRequests
from gemma_dist.train.watchdog import Watchdog
from tests.support.corpus import row, shard_rows
from tests.support.ranks import ENVIRONMENT, REPOSITORY, kill, long, needs_compiler
from tests.support.stops import ASKS, NUM_STEPS, NUM_STEPS_OF_RANKS, SETTINGS, checkpoints, codes, steps

ACCELERATE = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    shard_rows(folder, model, [row(number, num_calls=1 + number % 3) for number in range(24)])
    return folder / "shards"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model: str, shards: Path) -> dict[str, Any]:
    """What came of each run of `tests.support.stops`, by its name, and what was said on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.stops", model, str(shards), str(tmp_path_factory.mktemp("runs"))],
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {one["name"]: one for one in rows} | {"stderr": done.stderr}


# ---- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "ask"), enumerate(ASKS, start=1))
def test_a_run_that_is_asked_to_stop_saves_the_step_at_work(runs: dict[str, Any], step: int, ask: str) -> None:
    stopped = runs[ask]
    assert stopped["saves"] == [step]
    assert step in stopped["checkpoints"]
    assert [at for at, *_ in stopped["losses"]] == list(range(1, step + 1))
    by = "/stop" if ask == "file" else ask
    assert f"stopped after step {step} of {NUM_STEPS}, as " in stopped["said"]
    assert f"{by} asked: checkpoint-{step} is complete (" in stopped["said"]
    assert not stopped["published"]
    assert not stopped["left"], "neither the file nor heartbeats"


def test_a_run_that_was_stopped_five_times_is_the_uninterrupted_one(runs: dict[str, Any]) -> None:
    interrupted, whole = runs["interrupted"], runs["whole"]
    assert interrupted["losses"] == whole["losses"], "to the last bit"
    assert len(whole["losses"]) == NUM_STEPS
    assert interrupted["published"]


def test_what_comes_in_the_last_step_or_later_changes_nothing(runs: dict[str, Any]) -> None:
    whole = runs["whole"]
    assert whole["said"] == ""
    assert whole["saves"] == [NUM_STEPS]
    assert whole["published"]
    assert "SIGTERM: the run is done, and publishes its result first" in runs["stderr"]


@pytest.mark.parametrize("name", ["grace too short", "grace still too short"])
def test_a_checkpoint_that_would_take_too_long_is_not_begun(runs: dict[str, Any], name: str) -> None:
    """The second run knows it from the checkpoint that it resumed from."""
    short = runs[name]
    assert 3 not in short["saves"]
    assert short["checkpoints"] == [2]
    assert "and 0.0 s are left, so that was not begun. The newest checkpoint is checkpoint-2" in short["said"]
    assert "1 step is lost" in short["said"]


def test_a_checkpoint_of_unknown_duration_is_begun(runs: dict[str, Any]) -> None:
    assert runs["grace, but nothing is known"]["checkpoints"] == [1]


@pytest.mark.parametrize("name", ["while it saves", "in a step that is saved anyway"])
def test_no_step_is_saved_twice(runs: dict[str, Any], name: str) -> None:
    stopped = runs[name]
    assert stopped["saves"] == [2]
    assert len(stopped["losses"]) == 2, "no step after the one that is saved"
    assert "stopped after step 2 of" in stopped["said"]


@pytest.mark.parametrize(
    ("by", "stop_grace_s", "environment", "expected"),
    [
        ("SIGUSR1", None, {}, None),
        ("SIGUSR1", 60.0, {"TORCHELASTIC_RUN_ID": "x"}, 60.0),
        ("SIGTERM", None, {}, None),
        ("SIGTERM", None, {"TORCHELASTIC_RUN_ID": "x"}, 30.0),
        ("SIGINT", 20.0, {"TORCHELASTIC_RUN_ID": "x"}, 20.0),
        ("SIGTERM", 90.0, {"TORCHELASTIC_RUN_ID": "x", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "45"}, 45.0),
        ("runs/x/stop", 60.0, {"TORCHELASTIC_RUN_ID": "x"}, None),
    ],
)
def test_the_grace_is_what_the_user_and_the_launcher_give(
    monkeypatch: pytest.MonkeyPatch,
    by: str,
    stop_grace_s: float | None,
    environment: dict[str, str],
    expected: float | None,
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    deadline = Request(by, 1000.0, is_signal=by.startswith("SIG")).deadline(stop_grace_s)
    assert deadline == (None if expected is None else 1000.0 + expected)


LOADING = """
import os, signal, time
from gemma_dist import __main__, recipe

def load_config(*args):
    os.kill(os.getpid(), signal.{ask})
    time.sleep(600)

recipe.load_config = load_config
raise SystemExit(__main__.main(["train", "launch/cpu_lora.yaml"]))
"""
TWICE = """
import os, signal, time
from gemma_dist.logs import start_logging
from gemma_dist.train.stop import StopRequests
start_logging()
requests = StopRequests()
requests.listen()
requests.at_work()
os.kill(os.getpid(), signal.SIGINT)
while not requests.by():
    time.sleep(0.01)
print("goes on", flush=True)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("code", "expected", "words"),
    [
        (LOADING.format(ask="SIGTERM"), 75, "stopped before the first step, as SIGTERM asked: nothing had to be saved"),
        (LOADING.format(ask="SIGUSR1"), 75, "stopped before the first step, as SIGUSR1 asked: nothing had to be saved"),
        (TWICE, 130, "interrupted twice: leaving at once"),
    ],
)
def test_a_run_that_has_nothing_to_save_or_is_interrupted_twice_ends_at_once(
    tmp_path: Path, code: str, expected: int, words: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY), exits.FOLDER: str(tmp_path / "codes")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == expected, done.stderr
    assert words in done.stderr
    assert (tmp_path / "codes" / "rank-0").read_text() == f"{expected}\n"
    assert ("goes on" in done.stdout) == (code == TWICE), "after the first one"


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes with which this process would have ended."""
    codes: list[int] = []
    monkeypatch.setattr(exits, "leave", lambda code, **_: codes.append(code))
    return codes


def test_a_message_that_nobody_reads_keeps_no_rank_alive(monkeypatch: pytest.MonkeyPatch, left: list[int]) -> None:
    def say(message: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(world, "ended_ranks", lambda **_: {1: -9})
    monkeypatch.setattr(failures, "of_ranks", lambda ended: "rank 1 was killed")
    monkeypatch.setattr(signals, "_say", [say])
    monkeypatch.setattr(signals, "_takers", {})
    signals._answer(signal.SIGTERM, 0.0)
    assert left[0] == exits.ENDED


def test_signals_are_seen_after_one_that_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def taker(name: str, came: float) -> None:
        seen.append(name)
        raise RuntimeError("lost")

    monkeypatch.setattr(signals, "_takers", dict.fromkeys((signal.SIGUSR1, signal.SIGUSR2), taker))
    arrived, write = os.pipe()
    os.write(write, bytes([signal.SIGUSR1, signal.SIGUSR2]))
    os.close(write)
    signals._wait(arrived)
    os.close(arrived)
    assert seen == ["SIGUSR1", "SIGUSR2"]


def test_what_an_earlier_process_of_a_rank_left_is_no_word_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(exits.FOLDER, str(tmp_path))
    exits.record(exits.STOPPED)
    assert exits.codes() == {0: exits.STOPPED}
    exits.begin()
    assert exits.codes() == {}


def test_processes_of_a_machine_of_the_same_name_are_not_looked_for_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of another container: a number that no process has here would be taken for a rank that ended."""
    host, process = socket.gethostname(), os.getpid()
    monkeypatch.setattr(world, "_processes", [(host, world._machine(), process), (host, "another", 2**22 - 1)])
    assert world.ended_ranks(patience_s=0) == {}
    monkeypatch.setattr(world, "_processes", [(host, world._machine(), process), (host, world._machine(), 2**22 - 1)])
    assert world.ended_ranks(patience_s=0) == {1: None}


@pytest.mark.parametrize(
    ("environment", "listens", "ends"),
    [({}, True, True), ({}, False, False), ({"WORLD_SIZE": "2"}, True, False)],
    ids=["a command", "Python", "several machines"],
)
def test_a_file_before_the_first_step_ends_a_process_that_may_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    left: list[int],
    environment: dict[str, str],
    listens: bool,
    ends: bool,
) -> None:
    """Others go on to that step: who called `train` keeps his process, and other machines do not wait in vain."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(signals, "take", lambda *_: None)
    requests = StopRequests()
    if listens:
        requests.listen()
    (tmp_path / "stop").touch()
    with requests.looking_in(tmp_path):
        end = time.monotonic() + 60
        while not requests.by() and time.monotonic() < end:
            time.sleep(0.01)
    assert requests.by() == str(tmp_path / "stop")
    assert left == ([exits.STOPPED] if ends else [])


# ---- several ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "code"), [("whole", 0), ("stopped", 75), ("resumed", 0)])
def test_ranks_without_a_launcher_leave_a_word_of_how_they_end(runs: dict[str, Any], name: str, code: int) -> None:
    found = runs[f"two ranks: {name}"]
    step = found["losses"][-1][0]
    assert step == (3 if code else NUM_STEPS_OF_RANKS)
    asked = {"asked": "SIGUSR2"} if code else {}
    assert found["ends"] == [code, code], found["said"]
    assert found["codes"] == {"rank-0": str(code), "rank-1": str(code), "step": str(step), **asked}
    assert found["saved"][-1] == step, "no step is lost"


def test_ranks_that_were_stopped_learn_what_others_learn(runs: dict[str, Any]) -> None:
    whole, resumed = runs["two ranks: whole"], runs["two ranks: resumed"]
    assert resumed["losses"] == whole["losses"], "to the last bit"
    assert len(whole["losses"]) == NUM_STEPS_OF_RANKS
    assert len(resumed["saved"]) == 2


def test_each_rank_has_a_log_with_a_head_for_each_attempt(runs: dict[str, Any]) -> None:
    step = runs["two ranks: stopped"]["saved"][-1]
    found = runs["two ranks: resumed"]["logs"]
    assert {name.partition("-rank-")[2] for name in found} == {"0.log", "1.log"}
    for text in found.values():
        first, second = text.split("\n==== ")
        assert f"steps: from 1 to {NUM_STEPS_OF_RANKS}\n" in first
        assert f"stopped after step {step} of {NUM_STEPS_OF_RANKS}, as SIGUSR2 asked" in first
        assert f"steps: from {step + 1} to {NUM_STEPS_OF_RANKS}\n" in second
        for attempt in (first, second):
            assert "world size: 2; global batch 2 = 2 ranks x 1 micro-batch x 1 accumulation\n" in attempt
            assert "\nnodes: " in attempt


@pytest.mark.parametrize(
    ("launcher", "ask", "rank"),
    [
        pytest.param([*ACCELERATE, "accelerate_configs/cpu_zero3.yaml"], "SIGTERM", None, marks=[needs_compiler, long]),
        (TORCHRUN, "SIGUSR1", 1),
    ],
    ids=["accelerate, ZeRO-3", "torchrun, DDP"],
)
def test_whoever_is_asked_under_a_launcher_all_ranks_stop(
    runs: dict[str, Any], model: str, shards: Path, tmp_path: Path, launcher: list[str], ask: str, rank: int | None
) -> None:
    """The launcher itself, or one rank. DeepSpeed steps within the backward pass."""
    out = tmp_path / "out"
    words = [f"model_name_or_path={model}", f"data.train={shards}", f"output_dir={out}", *SETTINGS, "max_steps=1000"]
    process = subprocess.Popen(
        [sys.executable, *launcher, "-m", "gemma_dist", "train", "launch/cpu_lora.yaml", *words],
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT | {exits.FOLDER: str(tmp_path / "codes"), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 300
        while len(steps(out)) < 2 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        _process_of(rank, process.pid).send_signal(signal.Signals[ask])
        said = process.communicate(timeout=300)[0]
    finally:
        kill(process)
    step = len(steps(out))
    assert checkpoints(out) == [step], "no step is lost"
    assert codes(tmp_path / "codes") == {"rank-0": "75", "rank-1": "75", "step": str(step), "asked": ask}
    assert process.returncode == 1, "launchers have a code of their own"
    stopped = f"[rank 0] stopped after step {step} of 1000, as {ask} asked: checkpoint-{step} is complete ("
    assert said.count(stopped) == 1
    assert "] error:" not in said
    for one, whole in zip(steps(out), runs["two ranks: whole"]["losses"], strict=False):
        assert one == pytest.approx(whole, rel=1e-5)


def _process_of(rank: int | None, launcher: int) -> psutil.Process:
    """A rank's, or the launcher's."""
    if rank is None:
        return psutil.Process(launcher)
    children = psutil.Process(launcher).children(recursive=True)
    (found,) = [child for child in children if "gemma_dist" in child.cmdline() and child.environ()["RANK"] == str(rank)]
    return found


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("kill -9", 143, "rank 1 was killed (exit -9; most often the kernel's out-of-memory killer). So the other "),
        ("kill -11", 143, "rank 1 was killed (exit -11: SIGSEGV). So the other ranks stop."),
        ("a user error", 143, "rank 1 ended by itself (exit 2): see what it says itself. So the other ranks stop."),
        ("asked to stop", 75, "rank 1 ended by itself (exit 75): see what it says itself. So the other ranks stop."),
    ],
)
def test_a_rank_says_how_the_other_one_ended(runs: dict[str, Any], end: str, code: int, words: str) -> None:
    """As long as its launcher has not taken note of it: else its lines have the exit code."""
    found = runs[end]
    assert found["end"] == code, found["said"]
    assert found["said"].count(words) == 1
    assert "a bug in gemma_dist" not in found["said"]


# ---- whose folder it is ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the thread's SystemExit
@pytest.mark.parametrize(
    ("name", "text", "ends"),
    [
        ("owner", "of-this-run", False),
        ("owner", "elsewhere-1-2", True),
        ("waiting", "7 1", False),
        ("waiting", "7 2", True),
        ("waiting", "8 2", False),
    ],
)
def test_what_is_left_of_a_run_ends_once_the_folder_is_another_ones(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    text: str,
    ends: bool,
) -> None:
    """Restart 1 of job 7 goes on while nobody else has the folder; it leaves no word to whoever launched the other."""
    ended = threading.Event()

    def end(code: int) -> None:
        assert code == exits.HUNG
        ended.set()
        sys.exit(code)

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv(exits.FOLDER, str(tmp_path / "codes"))
    monkeypatch.setattr(logs.log, "propagate", True)
    monkeypatch.setattr(world, "name_of_run", lambda: "of-this-run")
    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "heartbeats" / name).write_text(text + "\n")
    with patch("os._exit", end):
        watchdog = Watchdog(tmp_path, 60, lambda: "step 1", lambda rank: f"samples of {rank}")
        assert ended.wait(60 if ends else 0.5) == ends
        watchdog.close()
    assert ("so this process ends: its launcher is gone" in caplog.text) == ends
    assert not (tmp_path / "codes").exists()


def test_a_restart_waits_for_what_is_left_of_the_attempt_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    monkeypatch.setattr(owner, "LOOK_S", 0.05)
    with exclusive(tmp_path, "taken"):
        with pytest.raises(ConfigError, match="another run is at work there"), owner.lock_output_dir(tmp_path, 60):
            pass
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        with pytest.raises(ConfigError, match="another run is at work there"), owner.lock_output_dir(tmp_path, 1):
            pass
        assert (tmp_path / "heartbeats" / "waiting").read_text() == "7 2\n"
        entered = threading.Event()

        def wait() -> None:
            with owner.lock_output_dir(tmp_path, 60):
                entered.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.2)
    thread.join(60)
    assert entered.is_set()


# ---- logs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rank_log() -> Iterator[None]:
    ranklog.keep()
    yield
    ranklog.drain(60)
    ranklog._kept.pop().end()


@pytest.mark.usefixtures("rank_log")
def test_a_log_that_cannot_be_written_ends_nothing(small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its disk is full for a while."""
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 12)):
            pass
    ranklog.write_to(small_disk, {"steps": "from 1 to 2"})
    logs.log.warning("lost")
    ranklog.drain(60)
    assert capfd.readouterr().err.count("cannot be written: No space left on device") == 1
    filler.unlink()
    logs.log.warning("kept")
    ranklog.drain(60)
    (path,) = (small_disk / "logs").iterdir()
    assert "kept" in path.read_text()
