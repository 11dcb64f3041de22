"""`gemma-dist train --dry-run`: all of a run, at its true size, and no trace of it afterwards."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_dist.config import RunConfig
from gemma_dist.errors import CheckpointError, ConfigError, DataError
from gemma_dist.exits import STOPPED
from gemma_dist.recipe import load_config
from gemma_dist.resolve import resolve
from gemma_dist.shards.reader import open_shards
from gemma_dist.topology import Topology
from gemma_dist.train import agree
from gemma_dist.train import trainer as trainer_module
from gemma_dist.train.dry import SCRATCH, DryTrainer, dry_run, require_room
from gemma_dist.train.dry_report import DiskTaken, DryRun, MemoryTaken, StepSeen
from gemma_dist.train.optimizer import state_crc32
from gemma_dist.train.owner import lock_output_dir
from gemma_dist.train.run import train
from tests.support.corpus import row, shard_rows
from tests.support.ranks import ENVIRONMENT, REPOSITORY, gemma_dist, kill, long, needs_compiler, start

BATCH = ["per_device_train_batch_size=2", "global_batch_size=4"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """An epoch of seven steps, of which a later one has the longest micro-batch."""
    folder = tmp_path_factory.mktemp("corpus")
    shard_rows(folder, model, [row(number, num_calls=9 if number == 5 else 1 + number % 3) for number in range(26)])
    return folder / "shards"


def _words(model: str, shards: Path, out: Path) -> list[str]:
    return [f"model_name_or_path={model}", f"data.train={shards}", f"output_dir={out}", *BATCH]


def _config(model: str, shards: Path, out: Path, *more: str, recipe: str = "cpu_lora") -> RunConfig:
    return load_config(f"launch/{recipe}.yaml", [*_words(model, shards, out), *more])


def _files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder: when it was written, and what it holds."""
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def _longest(config: RunConfig, num_ranks: int) -> int:
    """Tokens, padding included, of the largest micro-batch of an epoch: by looking at every one."""
    schedule = resolve(config, Topology("", num_ranks)).schedule
    shards, most = schedule.shards, 0
    for step in range(schedule.steps_per_epoch):
        for rank in range(num_ranks):
            for packs in schedule.micro_batches(step, rank):
                lengths = [
                    sum(int((shards.num_text_tokens + shards.num_image_tokens)[one]) for one in p) for p in packs
                ]
                most = max(most, len(lengths) * max(lengths, default=0))
    return most


@pytest.mark.parametrize(
    ("recipe", "launch"),
    [pytest.param("cpu_lora", "cpu_ddp", marks=long), pytest.param("cpu_full", "cpu_zero3", marks=needs_compiler)],
)
def test_a_dry_run_of_every_kind_of_launch_measures_it_and_leaves_nothing(
    model: str, shards: Path, tmp_path: Path, recipe: str, launch: str
) -> None:
    out = tmp_path / "runs" / "out"
    more = [*_words(model, shards, out), "max_steps=100", "save_steps=40"]
    output = gemma_dist("train", "--dry-run", "--json", f"launch/{recipe}.yaml", *more, launch=launch)
    (line,) = [line for line in output.splitlines() if line.startswith("{")]
    found = json.loads(line)
    assert list(tmp_path.iterdir()) == []
    assert (found["start_step"], found["num_steps"], found["num_timed"], found["num_saves"]) == (0, 100, 2, 3)
    assert [step["step"] for step in found["steps"]] == [1, 2, 3]
    assert found["num_ranks"] == 2
    assert found["longest"]["micro_batch_tokens"] == _longest(_config(model, shards, out), 2)
    assert found["seconds_left"] == pytest.approx(100 * found["seconds_a_step"] + 3 * found["seconds_to_save"])
    assert found["disk"]["checkpoint"] > found["disk"]["result"] > 0
    assert found["memory"]["host"] > 2**28


class _Watched(DryTrainer):
    """Notes what the optimizer holds before the first step and when all is done, and the sizes of micro-batches."""

    seen: list[dict[str, int]]
    num_tokens: list[int]

    def _prepare_for_training(self, *args: object, **kwargs: object) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        _Watched.seen, _Watched.num_tokens = [state_crc32(self.model, self.optimizer.optimizer)], []
        return prepared

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        _Watched.num_tokens.append(inputs["input_ids"].numel())
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _save_checkpoint(self, model: object, trial: object) -> None:
        super()._save_checkpoint(model, trial)
        _Watched.seen.append(state_crc32(self.model, self.optimizer.optimizer))


@pytest.mark.parametrize(
    ("recipe", "more"),
    [("cpu_qlora", ["packing=true"]), ("cpu_full", ["weight_decay=0.1"]), ("cpu_lora", ["optim=adamw_8bit"])],
)
def test_steps_are_true_ones_but_change_no_weight(
    model: str, shards: Path, tmp_path: Path, recipe: str, more: list[str]
) -> None:
    config = _config(model, shards, tmp_path / "out", *more, recipe=recipe)
    found = dry_run(config, trainer_class=_Watched)
    assert found is not None
    before, after = _Watched.seen
    weights = {name for name in before if "/weight@" in name}
    assert weights
    assert {name: after[name] for name in weights} == {name: before[name] for name in weights}
    states = after.keys() - weights
    assert len({after[name] for name in states}) > len(weights)  # no zeros
    assert max(_Watched.num_tokens) >= _longest(config, 1)  # a filler image comes on top
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, model: str, shards: Path) -> Path:
    """The folder of a run that has ended after two steps, and is going to be continued."""
    out = tmp_path_factory.mktemp("begun") / "out"
    train(_config(model, shards, out, "max_steps=2"))
    return out


def test_beside_a_run_it_goes_on_from_its_checkpoint_and_touches_nothing(model: str, shards: Path, begun: Path) -> None:
    before = _files(begun)
    assert str(begun / "gemma_dist.json") in before
    found = dry_run(_config(model, shards, begun, "max_steps=12"), trainer_class=_Watched)
    assert found is not None
    assert _files(begun) == before
    assert [step.step for step in found.steps] == [3, 4, 5]
    # What it would save has the size of what the run has saved, but for the words of its marker.
    of_run = sum(path.stat().st_size for path in (begun / "checkpoint-2").iterdir())
    assert abs(found.disk.checkpoint - of_run) < 200
    assert found.disk.num_present == 1
    saved = load_file(begun / "checkpoint-2" / "optimizer-00000-of-00001.safetensors")
    first = next(name for name in saved if "/exp_avg@" in name)
    crc32 = zlib.crc32(saved[first].numpy().tobytes())
    assert _Watched.seen[0][first] == crc32  # the states are those of the checkpoint


def test_of_a_run_that_has_ended_nothing_is_tried(model: str, shards: Path, begun: Path) -> None:
    before = _files(begun)
    assert dry_run(_config(model, shards, begun, "max_steps=2")) is None
    assert _files(begun) == before


def test_a_damaged_checkpoint_is_named_and_left_where_it_is(
    model: str, shards: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = begun.glob("checkpoint-2/optimizer-*")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    before = _files(begun)
    try:
        with pytest.raises(CheckpointError, match=rf"{path.name} holds other bytes"):
            dry_run(_config(model, shards, begun, "max_steps=12"))
        assert _files(begun) == before
    finally:
        path.write_bytes(data)


def test_a_checkpoint_that_reads_back_otherwise_is_found(
    model: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a disk would do it that says that all is well: the checksums are those of the wrong bytes."""
    real = trainer_module.save_optimizer

    def lose_one(folder: Path, *args: Any) -> None:
        real(folder, *args)
        (path,) = folder.glob("optimizer-*")
        tensors = load_file(path)
        tensors[next(name for name in tensors if "/exp_avg_sq@" in name)].add_(1)
        save_file(tensors, path)

    monkeypatch.setattr(trainer_module, "save_optimizer", lose_one)
    with pytest.raises(CheckpointError, match=r"reads back otherwise: .*/exp_avg_sq@0 has other bytes"):
        dry_run(_config(model, shards, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def _missing(path: Path) -> None:
    path.unlink()


def _shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _other_footer(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-12] + bytes(4) + path.read_bytes()[-8:])


@pytest.mark.parametrize(
    ("damage", "words"), [(_missing, "No such file"), (_shortened, "bytes instead of"), (_other_footer, "footer")]
)
def test_a_shard_that_is_not_as_it_was_written_is_named_before_the_model_is_read(
    model: str, tmp_path: Path, damage: Any, words: str
) -> None:
    shard_rows(tmp_path, model, [row(number) for number in range(4)])
    (shard,) = (tmp_path / "shards").glob("*.parquet")
    damage(shard)
    with pytest.raises(DataError, match=rf"1 of 1 shards .*{shard.name}: .*{words}"):
        dry_run(_config(model, tmp_path / "shards", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_ranks_of_a_node_share_the_look_at_shards(model: str, shards: Path) -> None:
    opened = open_shards(shards)
    (path,) = shards.glob("*.parquet")
    hidden = path.rename(path.with_suffix(".hidden"))
    try:
        found = [opened.check_files(share, 3) for share in range(3)]
    finally:
        hidden.rename(path)
    assert [len(problems) for problems in found] == [1, 0, 0]
    assert opened.check_files() == []


def test_ranks_that_were_not_started_alike_are_refused(
    model: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a run. Here the other rank is told of: it has another learning rate."""

    def with_another(item: Any) -> list[Any]:
        return [item, item | {"train.learning_rate": 1.0} if isinstance(item, dict) else item]

    monkeypatch.setattr(agree.world, "gather_objects", with_another)
    with pytest.raises(ConfigError, match=r"not started alike.*\n.*train.learning_rate is .* on rank 0"):
        dry_run(_config(model, shards, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_which_a_run_is_at_work_is_refused(model: str, shards: Path, begun: Path) -> None:
    before = _files(begun)
    with lock_output_dir(begun), pytest.raises(ConfigError, match="another run is at work"):
        dry_run(_config(model, shards, begun, "max_steps=12"))
    assert _files(begun) == before


HOLDS = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background has it ignored
from gemma_dist.train.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1]), int(sys.argv[2])):
    Path(sys.argv[1], "file").write_text("large")
    print("there", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_however_its_process_ends_a_scratch_folder_goes_with_it(
    tmp_path: Path, number: signal.Signals, num_ranks: int
) -> None:
    folder = tmp_path / "new" / "out" / "scratch"
    command = [sys.executable, "-c", HOLDS, str(folder), str(num_ranks)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    assert (folder / "file").exists()
    process.send_signal(number)
    process.communicate()
    _until_empty(tmp_path)
    if num_ranks > 1:  # another one goes on for a while, as if on another machine
        while not folder.exists():
            with contextlib.suppress(FileNotFoundError):  # those around it go as soon as they are empty
                folder.mkdir(parents=True)
                break
        _until_empty(tmp_path)


def _until_empty(folder: Path) -> None:
    end = time.monotonic() + 120
    while any(folder.iterdir()):
        assert time.monotonic() < end, sorted(folder.rglob("*"))
        time.sleep(0.02)


def test_one_that_is_interrupted_ends_at_once_and_leaves_nothing(model: str, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("train", "--dry-run", "launch/cpu_lora.yaml", *_words(model, shards, out))
    end = time.monotonic() + 200
    while not list(out.glob(f"{SCRATCH}*")):
        assert process.poll() is None, kill(process)
        assert time.monotonic() < end, kill(process)
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == STOPPED, output
    assert "as SIGINT asked" in output
    _until_empty(tmp_path)


def _dry_run(**changes: Any) -> DryRun:
    step = StepSeen(1, 9.0, 100, 50, 2.0)
    steps = [step, dataclasses.replace(step, step=2, seconds=2.0), dataclasses.replace(step, step=3, seconds=4.0)]
    return dataclasses.replace(
        DryRun(
            launch="DDP",
            num_ranks=2,
            num_samples=100,
            num_files=1,
            start_step=0,
            num_steps=1000,
            save_steps=300,
            save_total_limit=2,
            stop_grace_s=None,
            phases={"model": 3.0},
            steps=steps,
            longest=steps[2],
            num_searched=100,
            seconds_to_save=10.0,
            seconds_to_read=5.0,
            memory=MemoryTaken(2**30, "host", 2**34, None, None, None),
            disk=DiskTaken(checkpoint=1000, result=10, num_present=0, free=3010),
        ),
        **changes,
    )


@pytest.mark.parametrize(
    ("changes", "num_saves", "seconds", "num_bytes"),
    [
        ({}, 4, 3000 + 40, 3010),  # at 300, 600, 900 and the end
        ({"start_step": 600}, 2, 1200 + 20, 2010),
        ({"steps_per_epoch": 400, "save_total_limit": None}, 6, 3000 + 60, 6010),  # at 400 and 800, too
        ({"steps_per_epoch": 450, "start_step": 600}, 2, 1220, 2010),  # at 900, as ever, and the end
        ({"save_total_limit": None}, 4, 3040, 4010),
        ({"start_step": 600, "disk": DiskTaken(1000, 10, 2, 1010)}, 2, 1220, 1010),  # one beside two
        ({"start_step": 650, "save_total_limit": 1, "disk": DiskTaken(1000, 10, 1, 1010)}, 2, 1050 + 20, 1010),
        ({"save_steps": 500}, 2, 3020, 2010),
    ],
)
def test_the_run_is_reckoned_from_what_was_measured(
    changes: dict[str, Any], num_saves: int, seconds: float, num_bytes: int
) -> None:
    found = _dry_run(**changes)
    assert (found.num_saves, found.seconds_left, found.bytes_needed) == (num_saves, seconds, num_bytes)
    assert "(from 2; the first left out, as it compiles)" in found.render()


@pytest.mark.parametrize(("grace", "outlasts"), [(None, False), (30.0, False), (9.0, True)])
def test_a_save_that_outlasts_the_grace_is_told(grace: float | None, outlasts: bool) -> None:
    found = _dry_run(stop_grace_s=grace)
    assert found.outlasts_grace == outlasts
    assert ("MORE than train.stop_grace_s = 9" in found.render()) == outlasts


def test_a_disk_that_is_too_small_for_the_checkpoints_is_an_error() -> None:
    require_room(_dry_run(), Path("out"))
    with pytest.raises(ConfigError, match=r"train.output_dir = 'out': the run will take"):
        require_room(_dry_run(disk=DiskTaken(1000, 10, 0, 3009)), Path("out"))


def test_json_is_for_dry_runs(model: str, shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gemma_dist", "train", "--json", "launch/cpu_lora.yaml"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--json is for --dry-run" in done.stderr
