"""Checkpoints on disks that fail: damage is named and gone around, and no fault of a save costs an earlier one."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_dist import logs
from gemma_dist.config import RunConfig
from gemma_dist.errors import CheckpointError
from gemma_dist.logs import RunLog, read_jsonl
from gemma_dist.model.record import ADAPTER_RECORD
from gemma_dist.recipe import load_config
from gemma_dist.resolve import RunIdentity, resolve
from gemma_dist.topology import Topology
from gemma_dist.train.checkpoint import MARKER, find_checkpoint, saving, whole_checkpoint
from gemma_dist.train.run import train
from tests.support.corpus import row, shard_rows
from tests.support.faults import inject
from tests.support.ranks import needs_compiler

NUM_STEPS = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    shard_rows(folder, model, [row(number) for number in range(8)])
    return folder / "shards"


def _config(model: str, shards: Path, out: Path, num_steps: int = NUM_STEPS) -> RunConfig:
    settings = [
        f"max_steps={num_steps}",
        "save_steps=1",
        "save_total_limit=null",
        "global_batch_size=2",
        "per_device_train_batch_size=2",
    ]
    settings += ["lr_scheduler_type=constant_with_warmup", "warmup_steps=1"]  # the same whatever the number of steps
    words = [f"model_name_or_path={model}", f"data.train={shards}", f"output_dir={out}"]
    return load_config("launch/cpu_lora.yaml", [*words, *settings])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: str, shards: Path) -> tuple[Path, RunIdentity]:
    """A finished run with a checkpoint of each step, and its identity."""
    out = tmp_path_factory.mktemp("finished") / "out"
    config = _config(model, shards, out)
    train(config)
    return out, resolve(config, Topology("")).identity


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged, as warnings of the package."""
    monkeypatch.setattr(logs.log, "propagate", True)
    caplog.set_level(logging.WARNING, "gemma_dist")
    return caplog


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _zero(path: Path) -> None:
    """As a file system leaves a block that was never written: the size is right."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 512] = bytes(len(data[middle : middle + 512]))
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {"truncated": _truncate, "zeroed": _zero, "missing": Path.unlink}


@pytest.mark.parametrize("kind", DAMAGES)
def test_whatever_file_is_damaged_the_run_goes_on_from_the_checkpoint_before(
    finished: tuple[Path, RunIdentity], tmp_path: Path, warnings: Any, kind: str
) -> None:
    out, identity = finished
    names = sorted(path.name for path in (out / "checkpoint-3").iterdir())
    assert {"optimizer-00000-of-00001.safetensors", "adapter_model.safetensors", MARKER} <= set(names)
    for name in names:
        if kind == "missing" and name == MARKER:
            continue  # an unfinished folder, which is refused: it is in the way
        here = tmp_path / name
        for step in (2, 3):
            shutil.copytree(out / f"checkpoint-{step}", here / f"checkpoint-{step}")
        DAMAGES[kind](here / "checkpoint-3" / name)
        warnings.clear()
        found = whole_checkpoint(find_checkpoint(here, "auto", identity)[0], here, "auto", identity)
        assert found == (here / "checkpoint-2", 2), name
        assert f"{name} " in warnings.text
        assert {path.name for path in here.iterdir()} == {"checkpoint-2", "damaged-checkpoint-3"}


def test_a_damaged_checkpoint_that_the_user_named_is_refused(
    finished: tuple[Path, RunIdentity], tmp_path: Path
) -> None:
    out, identity = finished
    named = shutil.copytree(out / "checkpoint-3", tmp_path / "checkpoint-3")
    _zero(named / "optimizer-00000-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"is damaged: optimizer-00000-of-00001.safetensors holds other bytes"):
        whole_checkpoint(find_checkpoint(tmp_path, str(named), identity)[0], tmp_path, str(named), identity)
    _truncate(named / "optimizer-00000-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer-00000-of-00001.safetensors has [\d,]+ of its [\d,]+ bytes"):
        find_checkpoint(tmp_path, str(named), identity)
    assert named.is_dir()


def test_a_run_with_a_damaged_end_does_the_last_steps_again(
    finished: tuple[Path, RunIdentity], model: str, shards: Path, tmp_path: Path
) -> None:
    """And with a torn line in its metrics, and the marker of its result gone meanwhile."""
    out = shutil.copytree(finished[0], tmp_path / "out")
    result = (out / "adapter_model.safetensors").read_bytes()
    _zero(out / "checkpoint-3" / "adapter_model.safetensors")
    config = _config(model, shards, out)
    with pytest.raises(CheckpointError, match=r"the end of this run, is damaged and was put aside"):
        train(config)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    train(config)
    assert (out / "adapter_model.safetensors").read_bytes() == result
    losses = [[line["loss"] for line in read_jsonl(folder / "metrics.jsonl")] for folder in (out, finished[0])]
    assert losses[0] == losses[1]


def test_a_finished_run_that_goes_on_is_not_finished_until_its_new_end(
    finished: tuple[Path, RunIdentity], model: str, shards: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(finished[0], tmp_path / "out")
    result = (out / "adapter_model.safetensors").read_bytes()
    (out / "model-00001-of-00002.safetensors").write_bytes(b"")  # of an earlier end, in other pieces
    marked = []

    class Looking(logs.RunLog):
        def write(self, *args: Any, **values: Any) -> None:
            marked.append((out / ADAPTER_RECORD).exists())
            super().write(*args, **values)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("gemma_dist.train.run.RunLog", Looking)
        train(_config(model, shards, out, NUM_STEPS + 1))
    assert marked == [False], "the old result is taken for the new one"
    assert (out / ADAPTER_RECORD).exists()
    assert (out / "adapter_model.safetensors").read_bytes() != result
    assert not list(out.glob("model-*"))


def test_a_checkpoint_without_room_is_not_begun(model: str, shards: Path, small_disk: Path) -> None:
    run = resolve(_config(model, shards, small_disk), Topology(""))
    with saving(run, 1, num_bytes=1000) as folder:
        folder.mkdir()
    problem = r"could not write the checkpoint of step 2: .*it takes 1\.0 GiB, so it was not begun"
    with pytest.raises(CheckpointError, match=problem), saving(run, 2, num_bytes=2**30):
        raise AssertionError("it was begun")
    assert [path.name for path in small_disk.iterdir()] == ["checkpoint-1"]


def test_a_torn_line_of_the_metrics_is_told_and_left_out(tmp_path: Path, warnings: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n\0\0\0\n[]\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    RunLog(path, start_step=2, num_steps=4).close()
    assert [line["step"] for line in read_jsonl(path)] == [1, 2]
    for number in (2, 3, 5):
        assert f"metrics.jsonl line {number} is damaged" in warnings.text


@needs_compiler
def test_no_fault_of_a_save_costs_a_checkpoint(model: str, shards: Path, tmp_path: Path) -> None:
    faults = inject(model, shards, tmp_path)
    assert {fault["call"] for fault in faults} >= {"write", "fsync", "rename", "mkdir", "open64"}
    assert {fault["errno"] for fault in faults} == {"ENOSPC", "EIO"}
    for fault in faults:
        assert fault["whole"], fault
        assert {"checkpoint-1", "checkpoint-2"} & set(fault["checkpoints"]), fault
        if fault["error"] is None:
            assert "checkpoint-2" in fault["checkpoints"], fault
        else:
            assert fault["error"] == "CheckpointError", fault
            assert str(tmp_path / "out") in fault["message"]
