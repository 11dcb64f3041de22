"""Checkpoints on disks that fail: damage is named and gone around, and no fault of a save costs an earlier one."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gemma_dist import logs
from gemma_dist.config import RunConfig
from gemma_dist.errors import CheckpointError
from gemma_dist.logs import RunLog, read_jsonl
from gemma_dist.model.record import ADAPTER_RECORD
from gemma_dist.recipe import load_config
from gemma_dist.resolve import RunIdentity, resolve
from gemma_dist.topology import Topology
from gemma_dist.train.checkpoint import MARKER, find_checkpoint, read_marker, saving, whole_checkpoint
from gemma_dist.train.optimizer import load_optimizer, optimizer_bytes, save_optimizer
from gemma_dist.train.run import train
from gemma_dist.train.weights import bytes_to_save, weights_to_save
from tests.support.corpus import row, shard_rows
from tests.support.damages import DAMAGES, truncate, zero
from tests.support.faults import inject
from tests.support.ranks import ENVIRONMENT, needs_compiler

NUM_STEPS = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    shard_rows(folder, model, [row(number) for number in range(8)])
    return folder / "shards"


def _config(model: str, shards: Path, out: Path, num_steps: int = NUM_STEPS, **more: object) -> RunConfig:
    settings = [
        f"max_steps={num_steps}",
        "save_steps=1",
        "save_total_limit=null",
        "global_batch_size=2",
        "per_device_train_batch_size=2",
    ]
    settings += ["lr_scheduler_type=constant_with_warmup", "warmup_steps=1"]  # the same whatever the number of steps
    words = [f"model_name_or_path={model}", f"data.train={shards}", f"output_dir={out}"]
    settings += [f"{name}={value}" for name, value in more.items()]
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


def test_no_rank_alone_puts_a_checkpoint_aside(
    finished: tuple[Path, RunIdentity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before they are connected they look one by one: each is to find the same, whoever comes first."""
    out, identity = finished
    for step in (2, 3):
        shutil.copytree(out / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    truncate(tmp_path / "checkpoint-3" / MARKER)
    for rank in ("1", "0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert find_checkpoint(tmp_path, "auto", identity) == (tmp_path / "checkpoint-2", 2)


MARKERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another step": lambda marker: marker | {"step": 2},
    "another seed": lambda marker: marker | {"identity": marker["identity"] | {"seed": 7}},
    "no step": lambda marker: {"files": {}},
    "a step that is none": lambda marker: {"step": True},
    "no identity": lambda marker: {"step": 3, "identity": None},
    "no settings": lambda marker: {"step": 3, "settings": [1]},
    "no files": lambda marker: {"step": 3, "files": None},
    "files that are none": lambda marker: {"step": 3, "files": {"a": {"bytes": None, "crc32": "x"}}},
    "a list": lambda marker: [marker],
    "a corpus that is none": lambda marker: {"step": 3, "corpus": ["x"]},
}


@pytest.mark.parametrize("kind", MARKERS)
def test_a_marker_that_says_something_else_is_damage(
    finished: tuple[Path, RunIdentity], tmp_path: Path, kind: str
) -> None:
    out, identity = finished
    for step in (2, 3):
        shutil.copytree(out / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    path = tmp_path / "checkpoint-3" / MARKER
    path.write_text(json.dumps(MARKERS[kind](json.loads(path.read_text()))))
    assert find_checkpoint(tmp_path, "auto", identity) == (tmp_path / "checkpoint-2", 2)
    with pytest.raises(CheckpointError, match=f"is damaged: {MARKER} is damaged"):
        find_checkpoint(tmp_path, str(path.parent), identity)


def test_a_checkpoint_of_an_earlier_version_has_no_checksums(
    finished: tuple[Path, RunIdentity], tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    (folder / MARKER).write_text(json.dumps({"step": 3, "state": finished[1].to_json()}))
    zero(folder / "adapter_model.safetensors")
    found, _ = find_checkpoint(tmp_path, "auto", finished[1])
    assert whole_checkpoint(found, tmp_path, "auto", finished[1]) == (folder, 3)


@pytest.mark.parametrize("broken", ["cut", "names"])
def test_an_optimizer_of_a_checkpoint_without_checksums_is_refused_by_its_file(broken: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    save_optimizer(tmp_path, model, optimizer)
    (path,) = tmp_path.glob("optimizer-*.safetensors")
    if broken == "cut":
        truncate(path)
    else:
        path.write_bytes(path.read_bytes().replace(b"weight@0", b"weight@x"))
    with pytest.raises(CheckpointError, match=rf"{path} is not what training wrote .*another train\.output_dir"):
        load_optimizer(tmp_path, model, optimizer)


def test_what_cannot_be_read_for_another_reason_is_not_taken_for_damage(
    finished: tuple[Path, RunIdentity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    for number, error in ((errno.EACCES, PermissionError), (errno.EIO, None)):

        def refuse(path: Path, number: int = number, **_: object) -> str:
            raise OSError(number, "refused", str(path))

        monkeypatch.setattr(Path, "read_text", refuse)
        if error is None:
            assert find_checkpoint(tmp_path, "auto", finished[1]) == (None, 0)
        else:
            with pytest.raises(error):
                find_checkpoint(tmp_path, "auto", finished[1])


def test_ranks_that_share_no_folder_stop_before_anything_is_loaded(tmp_path: Path) -> None:
    """And go on where they share one, as they do at first."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from gemma_dist import world\n"
        "from gemma_dist.train.checkpoint import require_shared\n"
        "world.connect()\n"
        "for name in ('out', f'out{world.rank()}'):\n"
        "    out = Path(sys.argv[1]) / name\n"
        "    out.mkdir(exist_ok=True)\n"
        "    require_shared(out)\n"
        "    world.barrier()\n"  # rank 0 takes its mark away once it knows that all have looked
        "    assert not list(out.iterdir())\n"
        "    print('agreed')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, script, tmp_path],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.count("agreed") == 2, done.stderr
    assert done.stderr.count("what rank 0 writes there is not seen by rank 1") >= 2, done.stderr
    assert not list(tmp_path.glob("out*/*"))


def test_a_checkpoint_may_hold_folders(model: str, shards: Path, tmp_path: Path) -> None:
    """Such as the further chat templates of a base."""
    run = resolve(_config(model, shards, tmp_path / "out"), Topology(""))
    with saving(run, 1) as folder:
        (folder / "additional_chat_templates").mkdir(parents=True)
        (folder / "weights").write_text("some")
    assert set(read_marker(tmp_path / "out" / "checkpoint-1")["files"]) == {"weights"}


def test_a_damaged_checkpoint_that_the_user_named_is_refused(
    finished: tuple[Path, RunIdentity], model: str, shards: Path, tmp_path: Path
) -> None:
    """And left where it is, as the end of a run, too."""
    out, identity = finished
    named = shutil.copytree(out / "checkpoint-3", tmp_path / "checkpoint-3")
    zero(named / "optimizer-00000-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"is damaged: optimizer-00000-of-00001.safetensors holds other bytes"):
        whole_checkpoint(find_checkpoint(tmp_path, str(named), identity)[0], tmp_path, str(named), identity)
    config = _config(model, shards, tmp_path / "out", resume_from_checkpoint=named)
    with pytest.raises(CheckpointError, match=r"is damaged: optimizer-00000-of-00001.safetensors holds other bytes"):
        train(config)
    truncate(named / "optimizer-00000-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer-00000-of-00001.safetensors has [\d,]+ of its [\d,]+ bytes"):
        find_checkpoint(tmp_path, str(named), identity)
    assert named.is_dir()


def test_a_run_with_a_damaged_end_does_the_last_steps_again(
    finished: tuple[Path, RunIdentity], model: str, shards: Path, tmp_path: Path
) -> None:
    """And with a torn line in its metrics, and the marker of its result gone meanwhile."""
    out = shutil.copytree(finished[0], tmp_path / "out")
    result = (out / "adapter_model.safetensors").read_bytes()
    zero(out / "checkpoint-3" / "adapter_model.safetensors")
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
    (out / "merged.safetensors").write_bytes(b"")  # a user's
    marked = []

    class Looking(logs.RunLog):
        def write(self, *args: Any, **values: Any) -> dict[str, float]:
            marked.append((out / ADAPTER_RECORD).exists())
            return super().write(*args, **values)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("gemma_dist.train.run.RunLog", Looking)
        train(_config(model, shards, out, NUM_STEPS + 1))
    assert marked == [False], "the old result is taken for the new one"
    assert (out / ADAPTER_RECORD).exists()
    assert (out / "adapter_model.safetensors").read_bytes() != result
    assert not list(out.glob("model-*"))
    assert (out / "merged.safetensors").exists()


def test_a_checkpoint_without_room_is_not_begun(model: str, shards: Path, small_disk: Path) -> None:
    run = resolve(_config(model, shards, small_disk), Topology(""))
    with saving(run, 1, num_bytes=1000) as folder:
        folder.mkdir()
    problem = r"could not write the checkpoint of step 2: .*it takes 1\.0 GiB, so it was not begun"
    with pytest.raises(CheckpointError, match=problem), saving(run, 2, num_bytes=2**30):
        raise AssertionError("it was begun")
    assert [path.name for path in small_disk.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(("optim", "sharded"), [("adamw_torch", False), ("adamw_torch", True), ("adamw_8bit", False)])
def test_the_room_of_a_checkpoint_is_known_before_it_is_written(tmp_path: Path, optim: str, sharded: bool) -> None:
    """Not more either: a run without that room would end."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(256), torch.nn.Linear(256, 512))
    if sharded:
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        kind = torch.optim.AdamW if optim == "adamw_torch" else AdamW8bit
        optimizer = kind(model.parameters())
        model(torch.randn(4, 256)).sum().backward()
        optimizer.step()
        save_optimizer(tmp_path, model, optimizer)
        written = sum(path.stat().st_size for path in tmp_path.glob("optimizer-*"))
        assert optimizer_bytes(model, optimizer) == pytest.approx(written, rel=0.02)
        saved = weights_to_save(model, None, torch.bfloat16)
        assert bytes_to_save(model, torch.bfloat16) == sum(tensor.nbytes for tensor in saved.values())
        assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16 if sharded else torch.float32}
    finally:
        if sharded:
            torch.distributed.destroy_process_group()


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
