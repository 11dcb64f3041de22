"""Training: the launch configs learn the same, resume changes nothing, and what comes out loads elsewhere.

Slow by nature: every launch starts processes that load torch, and the first at ZeRO compiles an operator. What one
process trains is trained here.
"""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForImageTextToText

from gemma_dist.__main__ import main
from gemma_dist.config import ShardConfig
from gemma_dist.errors import CheckpointError, ConfigError
from gemma_dist.files import UMASK
from gemma_dist.model.fingerprint import fingerprint_base
from gemma_dist.recipe import load_config
from gemma_dist.resolve import RunIdentity, require_output_dir, resolve, state_layout
from gemma_dist.serving.check import check_model
from gemma_dist.shards.reader import open_shards
from gemma_dist.shards.sharding import run_shard
from gemma_dist.topology import Topology
from gemma_dist.train.checkpoint import MARKER, find_checkpoint, saving
from gemma_dist.train.owner import lock_output_dir
from gemma_dist.train.run import train
from gemma_dist.train.trainer import warm_up_ddp_buckets
from tests.support.corpus import row, write_rows
from tests.support.ranks import ENVIRONMENT, REPOSITORY, gemma_dist, kill, long, needs_compiler, start, wait_for
from tests.support.store import serve

NUM_STEPS = 4
# Rows of very different length, with and without images, in an epoch whose last batch is not full: 4 x 4 - 3 rows.
SETTINGS = ["per_device_train_batch_size=2", "global_batch_size=4", f"max_steps={NUM_STEPS}", "save_steps=2"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    folder = tmp_path_factory.mktemp("train")
    rows = write_rows(
        folder / "rows.jsonl", [row(number, num_calls=9 if number == 5 else 1 + number % 3) for number in range(13)]
    )
    gemma_dist("shard", rows, "--model", model, "--out", folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: str, shards: Path) -> Any:
    """Train by a recipe under a launch config, or in this process, once for each pair; the output folder."""
    done: dict[tuple[str | None, ...], Path] = {}

    def trained(recipe: str, launch: str | None = None, *more: str) -> Path:
        key = (recipe, launch, *more)
        if key not in done:
            done[key] = out = tmp_path_factory.mktemp("run") / "out"
            words = [f"launch/{recipe}.yaml", *_paths(model, shards, out), *SETTINGS, *more]
            if launch is None:
                train(load_config(words[0], words[1:]))
            else:
                gemma_dist("train", *words, launch=launch)
        return done[key]

    return trained


def _paths(model: str, shards: Path, out: Path) -> list[str]:
    return [f"model_name_or_path={model}", f"data.train={shards}", f"output_dir={out}"]


def _says(capfd: pytest.CaptureFixture[str], recipe: str, *words: str, code: int = 2) -> str:
    """What `gemma-dist train launch/RECIPE.yaml WORDS…` says in this process, which ends with that code."""
    capfd.readouterr()
    assert main(["train", f"launch/{recipe}.yaml", *words]) == code
    said = capfd.readouterr().err
    assert "Traceback" not in said
    return said


def _rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _curve(out: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    rows = _rows(out)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    return [(row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.parametrize(
    ("recipe", "launch"),
    [
        ("cpu_full", "cpu_ddp"),
        pytest.param("cpu_full", "cpu_zero2", marks=[needs_compiler, long]),
        pytest.param("cpu_lora", "cpu_zero3", marks=[needs_compiler, long]),
    ],
)
def test_the_command_learns_the_same_under_every_kind_of_launch(run: Any, recipe: str, launch: str) -> None:
    """From the command line; `test_parity.py` has the matrix."""
    for alone, together in zip(_curve(run(recipe)), _curve(run(recipe, launch)), strict=True):
        assert together == pytest.approx(alone, rel=1e-5)
    for row_alone, row_together in zip(_rows(run(recipe)), _rows(run(recipe, launch)), strict=True):
        of_kinds = {name: value for name, value in row_alone.items() if name.startswith("loss_")}
        assert of_kinds.keys() == {"loss_text", "loss_call", "loss_argument"}
        assert {name: row_together[name] for name in of_kinds} == pytest.approx(of_kinds, rel=1e-5)
    parts = list((run(recipe, launch) / f"checkpoint-{NUM_STEPS}").glob("optimizer-*-of-00002.safetensors"))
    assert len(parts) == (2 if "zero" in launch else 1)


@long
@needs_compiler
def test_a_deepspeed_config_that_leaves_something_out_gets_it_from_the_recipe(
    run: Any, model: str, shards: Path, tmp_path: Path
) -> None:
    """Without `gradient_clipping` DeepSpeed would not clip: with these settings the loss would fall by 2."""
    deepspeed = json.loads((REPOSITORY / "accelerate_configs/deepspeed_cpu_zero2.json").read_text())
    for name in ("gradient_clipping", "gradient_accumulation_steps", "train_batch_size", "bf16"):
        del deepspeed[name]
    (tmp_path / "deepspeed.json").write_text(json.dumps(deepspeed))
    launch = yaml.safe_load((REPOSITORY / "accelerate_configs/cpu_zero2.yaml").read_text())
    launch["deepspeed_config"]["deepspeed_config_file"] = str(tmp_path / "deepspeed.json")
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(launch))
    clipped = ("optim=sgd", "learning_rate=1", "max_grad_norm=0.001", "lr_scheduler_type=constant", "warmup_steps=0")
    alone, out = _curve(run("cpu_full", None, *clipped)), tmp_path / "out"
    words = ["launch/cpu_full.yaml", *_paths(model, shards, out), *SETTINGS, *clipped]
    gemma_dist("train", *words, launch=tmp_path / "launch.yaml")
    for one, two in zip(alone, _curve(out), strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    assert alone[-1][0] > 6


PACKED = ("packing=true",)


@pytest.mark.parametrize("more", [(), PACKED])
def test_loss_is_a_sum_over_the_target_tokens_of_the_global_batch(
    run: Any, model: str, shards: Path, more: tuple[str, ...]
) -> None:
    """Step 1 against transformers' own loss of each row alone, weighted by its target tokens."""
    from gemma_dist.batch_plan import batch_plan
    from gemma_dist.config import EncodingConfig
    from gemma_dist.data.encode import load_encoder
    from gemma_dist.recipe import load_config
    from gemma_dist.stream.collate import Sample, collate, control_ids
    from gemma_dist.stream.schedule import open_schedule

    encoder = load_encoder(model, EncodingConfig())
    config = load_config("launch/cpu_full.yaml", [*_paths(model, shards, Path("out")), *SETTINGS, *more])
    schedule = open_schedule(config, batch_plan(config, 1))
    base = AutoModelForImageTextToText.from_pretrained(model).eval()
    total, num_targets = 0.0, 0
    batch_of_step = schedule.global_batch(0)
    assert len(batch_of_step) > 4 if more else len(batch_of_step) == 4
    for index in batch_of_step:
        trajectory = schedule.shards.read(index)
        encoded = encoder.encode(trajectory)
        pixels = encoder.pixels(trajectory.images) if trajectory.images else {}
        batch = collate([Sample(trajectory.id, encoded, pixels)], control_ids(encoder.processor))
        with torch.no_grad():
            total += base(**batch).loss.item() * encoded.num_target_tokens
        num_targets += encoded.num_target_tokens
    assert _curve(run("cpu_full", None, *more))[0][0] == pytest.approx(total / num_targets, rel=1e-5)


@needs_compiler
def test_a_killed_run_resumes_on_another_world_size(run: Any, model: str, shards: Path, tmp_path: Path) -> None:
    """kill -9 on two ranks that share an optimizer, once the first checkpoint stands; one rank without DeepSpeed then
    resumes with the same batches."""
    out = tmp_path / "out"
    words = ["launch/cpu_full.yaml", *_paths(model, shards, out), *SETTINGS, *PACKED]
    killed = start("train", *words, launch="cpu_zero2")
    wait_for(out / "checkpoint-2" / MARKER, killed)
    kill(killed)
    output = gemma_dist("train", *words)
    assert "2 of 4 steps done" in output
    for uninterrupted, resumed in zip(_curve(run("cpu_full", None, *PACKED)), _curve(out), strict=True):
        assert resumed == pytest.approx(uninterrupted, rel=1e-5)


@pytest.mark.parametrize(
    ("recipe", "more"), [pytest.param("cpu_full", (), marks=long), ("cpu_lora", ("lora.lora_dropout=0.5",))]
)
def test_resumed_equals_uninterrupted(
    run: Any,
    model: str,
    shards: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    recipe: str,
    more: tuple[str, ...],
) -> None:
    whole = run(recipe, None, *more)
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / f"checkpoint-{NUM_STEPS}")
    (out / "checkpoint-3").mkdir()  # a save that was cut off: no marker, so it does not count
    assert "2 of 4 steps done" in _says(capfd, recipe, *_paths(model, shards, out), *SETTINGS, *more, code=0)
    assert _curve(out) == _curve(whole)
    (result,) = whole.glob("*model.safetensors")
    resumed, uninterrupted = load_file(out / result.name), load_file(result)
    assert all(torch.equal(resumed[name], weight) for name, weight in uninterrupted.items())


def test_settings_that_may_change_take_effect_on_resume(
    run: Any, model: str, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whoever lowers save_steps after losing a night gets just that; the log says what changed and adds up."""
    whole, out = run("cpu_lora"), tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / f"checkpoint-{NUM_STEPS}")
    changed = ["save_steps=1", "logging_steps=2", "learning_rate=1e-9", "save_total_limit=null"]
    output = _says(capfd, "cpu_lora", *_paths(model, shards, out), *SETTINGS, *changed, code=0)
    assert "train.save_steps 2 -> 1" in output
    assert "train.logging_steps 1 -> 2" in output
    assert "train.learning_rate 0.005 -> 1e-09" in output
    assert "lr_scheduler.step" not in output
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3", "checkpoint-4"}
    rows, before = _rows(out), _rows(whole)
    assert [row["step"] for row in rows] == [1, 2, 4]
    assert rows[-1]["learning_rate"] < 1e-9
    for key in ("tokens", "target_tokens"):
        assert rows[-1][key] == before[2][key] + before[3][key]
    assert rows[-1]["tokens_per_s"] == pytest.approx(rows[-1]["tokens"] / rows[-1]["seconds"], rel=1e-2)


def test_a_checkpoint_of_another_base_is_refused(
    run: Any, model: str, tiny_model: Any, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A sister model has the same shapes; a dtype or a 4-bit base is another function."""
    from safetensors.torch import save_file

    sister = tmp_path / "sister"
    shutil.copytree(model, sister)
    weights = {name: 1.001 * weight for name, weight in load_file(sister / "model.safetensors").items()}
    save_file(weights, sister / "model.safetensors", {"format": "pt"})
    for base, more, reason in [
        (sister, [], "the base model (hash of its weights) was"),
        (tiny_model("31b"), [], "the base model (hash of its config.json) was"),
        (model, ["model.dtype=bfloat16"], "model.dtype was 'float32' and is now 'bfloat16'"),
        (model, ["tuning=qlora"], "quantization was None and is now {'load_in_4bit': True"),
    ]:
        words = [*_paths(str(base), shards, run("cpu_lora")), *SETTINGS, *more]
        assert reason in _says(capfd, "cpu_lora", *words)


def test_a_base_is_known_by_its_weights_however_they_are_cut(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model()
    known = fingerprint_base(str(model))
    loaded = AutoModelForImageTextToText.from_pretrained(model)
    loaded.save_pretrained(tmp_path / "cut", max_shard_size="1MB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    assert fingerprint_base(str(tmp_path / "cut"))["base_weights_hash"] == known["base_weights_hash"]
    for number, weight in enumerate(loaded.parameters()):  # each of them decides
        if number % 7 and weight is not loaded.lm_head.weight:
            continue
        before = weight.detach().clone()
        weight.data.mul_(1.01).add_(0.01)
        loaded.save_pretrained(tmp_path / "tuned")
        assert fingerprint_base(str(tmp_path / "tuned"))["base_weights_hash"] != known["base_weights_hash"]
        weight.data.copy_(before)


def test_a_base_without_safetensors_is_refused(model: str, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no weights in safetensors"):
        fingerprint_base(str(tmp_path / "model"))


def test_a_checkpoint_of_another_run_is_refused(
    run: Any, model: str, shards: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = _paths(model, shards, run("cpu_full"))
    assert "seed was 42 and is now 7" in _says(capfd, "cpu_full", *paths, *SETTINGS, "seed=7")


def test_a_checkpoint_of_another_corpus_is_refused(
    run: Any, model: str, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shards, tmp_path / "shards")
    more = write_rows(tmp_path / "more.jsonl", [row(99)])
    run_shard([more], tmp_path / "shards", model, ShardConfig(), False, append=True)
    output = _says(capfd, "cpu_full", *_paths(model, tmp_path / "shards", run("cpu_full")), *SETTINGS)
    assert "data.train was added to since: it had 13 samples" in output
    assert "data.appended" in output


def test_ranks_read_a_store_through_one_cache(run: Any, model: str, shards: Path, tmp_path: Path) -> None:
    """Two ranks train from an HTTP server: the same run as from the disk, each row group fetched once."""
    with serve({path.name: path.read_bytes() for path in shards.iterdir()}) as server:
        out, cache = tmp_path / "out", tmp_path / "cache"
        paths = [f"model_name_or_path={model}", f"data.train={server.url}", f"output_dir={out}", f"cache_dir={cache}"]
        gemma_dist("train", "launch/cpu_full.yaml", *paths, *SETTINGS, launch="cpu_ddp")
        row_groups = [wanted for name, wanted in server.requests if name.endswith(".parquet")]
    assert len(row_groups) == len(set(row_groups)) == len(open_shards(shards).row_group_samples)
    assert _curve(out) == _curve(run("cpu_full", "cpu_ddp"))


def test_an_adapter_of_another_shape_is_not_resumed(
    run: Any, model: str, shards: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = _paths(model, shards, run("cpu_lora"))
    assert "lora was {'r': 8" in _says(capfd, "cpu_lora", *paths, *SETTINGS, "lora.r=4")


def test_a_finished_run_is_not_trained_again(
    run: Any, model: str, shards: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = run("cpu_full")
    before = (out / "metrics.jsonl").read_bytes(), (out / "model.safetensors").read_bytes()
    assert "nothing is left to train" in _says(capfd, "cpu_full", *_paths(model, shards, out), *SETTINGS, code=0)
    assert ((out / "metrics.jsonl").read_bytes(), (out / "model.safetensors").read_bytes()) == before


def test_one_process_takes_one_of_several_gpus(model: str, shards: Path, tmp_path: Path) -> None:
    """Trainer would take both, with `nn.DataParallel`. No GPU is at hand here: their number is made up."""
    script = tmp_path / "two_gpus.py"
    script.write_text(
        "import sys, torch, transformers\n"
        "from gemma_dist.__main__ import main\n"
        "transformers.TrainingArguments.n_gpu = property(lambda self: 2)\n"
        "torch.cuda.device_count, torch.cuda.is_available = lambda: 2, lambda: False\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["train", "launch/cpu_lora.yaml", *_paths(model, shards, tmp_path / "out"), *SETTINGS[:2], "max_steps=1"]
    done = subprocess.run(
        [sys.executable, script, *words],
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 GPUs are visible, and one process takes the first alone" in done.stderr
    assert f"--num_processes 2 -m gemma_dist {shlex.join(words)}" in done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_file_in_the_place_of_output_dir_is_refused(
    model: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my.jsonl"
    file.write_text("precious")
    for verb, out in product(("train", "check"), (file, file / "out")):
        assert main([verb, "launch/cpu_lora.yaml", *_paths(model, shards, out), *SETTINGS]) == 2
        assert f"train.output_dir = '{out}': {file} is a file; name a folder" in capsys.readouterr().err
    assert file.read_text() == "precious"


def test_a_folder_of_the_users_own_files_is_not_taken(tmp_path: Path) -> None:
    out = tmp_path / "mine"
    (out / "letters").mkdir(parents=True)
    config = load_config("launch/cpu_lora.yaml", _paths("nowhere", tmp_path / "shards", out))
    for name in (".hidden", "recipe.yaml", "job.log", "stop"):
        (out / name).touch()
    require_output_dir(config)  # a run may begin beside these
    (out / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"holds 'thesis.tex' and nothing that a run left there; name a new folder"):
        require_output_dir(config)
    (out / "metrics.jsonl").touch()
    require_output_dir(config)  # a run has it, with something of the user's in it


@pytest.mark.parametrize("place", ["model", "shards"])
def test_the_run_does_not_write_where_it_reads(model: str, shards: Path, place: str) -> None:
    """An adapter beside its base would be loaded with it; a full result would take its place."""
    out = {"model": Path(model), "shards": shards}[place]
    with pytest.raises(ConfigError, match="the run reads from that folder"):
        require_output_dir(load_config("launch/cpu_lora.yaml", _paths(model, shards, out / ".")))


@pytest.mark.parametrize("launch", [None, pytest.param("cpu_ddp", marks=long)])
def test_a_disk_that_fills_up_costs_no_checkpoint(
    model: str, shards: Path, small_disk: Path, launch: str | None
) -> None:
    """There is room for one checkpoint; the second is not begun."""
    more = ["save_total_limit=null", "optim=sgd"]
    words = ["launch/cpu_full.yaml", *_paths(model, shards, small_disk), *SETTINGS, *more]
    output = gemma_dist("train", *words, launch=launch, fails=True)
    assert output.count(f"train.output_dir = '{small_disk}': rank 0 could not write the checkpoint of step 4") == 1
    assert "no room: it takes" in output
    assert "a bug in gemma_dist" not in output
    assert (small_disk / "checkpoint-2" / MARKER).exists()


def test_a_rank_that_the_system_kills_is_named(model: str, shards: Path, tmp_path: Path) -> None:
    """As it does where memory runs out."""
    out = tmp_path / "out"
    more = ["max_steps=100000", "save_steps=100000"]
    words = ["launch/cpu_full.yaml", *_paths(model, shards, out), *SETTINGS[:2], *more]
    process = start("train", *words, launch="cpu_ddp")
    try:
        wait_for(out / "metrics.jsonl", process)
        children = psutil.Process(process.pid).children(recursive=True)
        (victim,) = [child for child in children if _environment(child).get("RANK") == "1"]
        victim.kill()
        output = process.communicate(timeout=120)[0]
    finally:
        kill(process)
    assert output.count("rank 1 was killed (") == 1
    assert output.index("rank 1 was killed (") < output.index("exitcode")
    assert "the kernel's out-of-memory killer" in output
    assert "a bug in gemma_dist" not in output


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def test_a_launch_that_would_lose_deepspeed_is_refused(
    model: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    words = ["launch/cpu_full.yaml", *_paths(model, shards, tmp_path / "out"), *SETTINGS]
    assert "ignores its DeepSpeed config" in gemma_dist("train", *words, launch="cpu_zero2", fails=True)


def _identity(**changed: Any) -> RunIdentity:
    """Of some run."""
    words = dict.fromkeys(("base_config_hash", "base_weights_hash", "dtype", "manifest", "encoding", "tuning"), "same")
    numbers = dict.fromkeys(("num_samples", "packing_length", "seed", "global_batch_size"), 1)
    others: dict[str, Any] = {"four_bit": None, "weights": None, "lora": {}, "optim": "adamw_torch", "optimizer": None}
    return RunIdentity(**(words | numbers | others | changed))


def _mark(folder: Path, step: int, identity: RunIdentity) -> None:
    """An empty checkpoint, complete."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / MARKER).write_text(json.dumps({"step": step, "identity": identity.to_json()}))


def test_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    identity = _identity()
    assert find_checkpoint(tmp_path, "auto", identity) == (None, 0)
    for step in (20, 100, 3):
        _mark(tmp_path, step, identity)
    (tmp_path / "checkpoint-200").mkdir()
    assert find_checkpoint(tmp_path, "auto", identity) == (tmp_path / "checkpoint-100", 100)
    (tmp_path / "checkpoint-300-mine").mkdir()
    (tmp_path / "checkpoint-300-mine" / MARKER).write_text("{}")
    assert find_checkpoint(tmp_path, "auto", identity) == (tmp_path / "checkpoint-100", 100)
    assert find_checkpoint(tmp_path / "new", "never", identity) == (None, 0)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-200"), identity)
    with pytest.raises(
        CheckpointError, match=r"belongs to another run: seed was 1 and is now 7; train\.optim was 'adam"
    ):
        find_checkpoint(tmp_path, "auto", _identity(seed=7, optim="sgd"))
    marker = tmp_path / "checkpoint-100" / MARKER  # as an earlier version wrote it
    recorded = {name: value for name, value in identity.to_json().items() if name != "base_weights_hash"}
    marker.write_text(json.dumps({"step": 100, "state": recorded}))
    with pytest.raises(CheckpointError, match=r"run: the base model \(hash of its weights\) was not recorded, by an"):
        find_checkpoint(tmp_path, "auto", identity)


def test_weights_may_change_from_the_step_of_a_checkpoint_on(tmp_path: Path) -> None:
    """Not before it, where they have decided what was trained on."""
    _mark(tmp_path, 20, _identity(weights=[3.0, 1.0]))
    for later in ([[0, [3.0, 1.0]], [20, [1.0, 1.0]]], [[0, [3.0, 1.0]], [500, [1.0, 1.0]]]):
        assert find_checkpoint(tmp_path, "auto", _identity(weights=later))[1] == 20
    _mark(tmp_path, 30, _identity(weights=[[0, [3.0, 1.0]], [20, [1.0, 1.0]], [90, [1.0, 5.0]]]))
    assert find_checkpoint(tmp_path, "auto", _identity(weights=[[0, [3.0, 1.0]], [20, [1.0, 1.0]]]))[1] == 30
    for other in ([3.0, 1.0], [[0, [3.0, 1.0]], [21, [1.0, 1.0]]], None):
        with pytest.raises(CheckpointError, match=r"the weights of data\.train was \[\[0, \[3\.0, 1\.0\]\], \[20, "):
            find_checkpoint(tmp_path, "auto", _identity(weights=other))


def test_later_checkpoints_of_another_attempt_are_not_mixed_in(tmp_path: Path) -> None:
    """They would be what a restart resumes from, and what save_total_limit keeps instead of new ones."""
    identity = _identity()
    for step in (3, 20, 100):
        _mark(tmp_path, step, identity)
    with pytest.raises(CheckpointError, match="holds checkpoint-3, checkpoint-20, checkpoint-100, later than step 0"):
        find_checkpoint(tmp_path, "never", identity)
    with pytest.raises(CheckpointError, match="holds checkpoint-100, later than step 20"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-20"), identity)
    shutil.move(tmp_path / "checkpoint-100", tmp_path / "aside")
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-20"), identity) == (tmp_path / "checkpoint-20", 20)


def test_checkpoints_of_another_tool_are_not_touched(model: str, shards: Path, tmp_path: Path) -> None:
    """They have no marker of ours: they do not count for save_total_limit, and none is written over."""
    words = [*_paths(model, shards, tmp_path), "save_total_limit=1"]
    run = resolve(load_config("launch/cpu_lora.yaml", words), Topology(""))
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "adapter_model.safetensors").write_text("of another tool")
    with pytest.raises(CheckpointError, match="holds checkpoint-10, later than step 0"):
        find_checkpoint(tmp_path, "auto", run.identity)
    for step in (20, 30):
        with saving(run, step) as folder:
            folder.mkdir()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-30"}
    assert find_checkpoint(tmp_path, "auto", run.identity) == (tmp_path / "checkpoint-30", 30)


def test_ranks_that_found_different_checkpoints_stop(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "from gemma_dist import world\n"
        "from gemma_dist.train.checkpoint import require_same_start\n"
        "world.connect()\n"
        "require_same_start(4)\n"
        "print('agreed')\n"
        "require_same_start(world.rank() * 100)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert done.stdout.count("agreed") == 2, done.stderr
    assert done.stderr.count("checkpoints of different steps, [0, 100]") >= 2


def test_ddp_buckets_are_warm_before_the_first_step(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        model.device_ids = [0]  # as on a GPU, where DDP moves the inputs
        warm_up_ddp_buckets(model)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert model(torch.ones(1, 2)).shape == (1, 2)
        assert model._has_rebuilt_buckets
    finally:
        torch.distributed.destroy_process_group()


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with lock_output_dir(tmp_path / "out"):
        with pytest.raises(ConfigError, match="another run is at work there"), lock_output_dir(tmp_path / "out"):
            pass
        with lock_output_dir(tmp_path / "other"):
            pass
    with lock_output_dir(tmp_path / "out"):
        assert not list((tmp_path / "out").iterdir())


def test_8_bit_states_that_are_partitioned_stay_where_they_were(tmp_path: Path) -> None:
    """Their scales belong to elements that lay together on a rank."""
    zero2 = Topology("", 4, "DEEPSPEED", deepspeed={"zero_optimization": {"stage": 2}})
    assert state_layout("adamw_torch", zero2) is None
    identity = _identity(optim="adamw_8bit", optimizer=state_layout("adamw_8bit", zero2))
    _mark(tmp_path, 2, identity)
    assert find_checkpoint(tmp_path, "auto", identity)[1] == 2
    moved = dataclasses.replace(identity, optimizer=state_layout("adamw_8bit", Topology("", 4)))
    reason = r"same ranks .*was 'partitioned for 4 ranks \(ZeRO-2\)' and is now 'unpartitioned'"
    with pytest.raises(CheckpointError, match=reason):
        find_checkpoint(tmp_path, "auto", moved)


@pytest.mark.parametrize(
    ("recipe", "launch"),
    [
        ("cpu_lora", None),
        pytest.param("cpu_lora", "cpu_zero3", marks=[needs_compiler, long]),
        pytest.param("cpu_qlora", None, marks=long),
    ],
)
def test_adapter_loads_with_plain_peft_and_is_trained(run: Any, model: str, recipe: str, launch: str | None) -> None:
    out = run(recipe, launch)
    saved = load_file(out / "adapter_model.safetensors")
    factors = [name for name in saved if ".lora_B." in name]
    assert factors
    assert all(".language_model." in name for name in factors)
    assert all(saved[name].abs().sum() > 0 for name in factors)
    adapted = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model), str(out))
    loaded = {name.replace(".default", ""): value for name, value in adapted.state_dict().items() if ".lora_" in name}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name].to(loaded[name].dtype)) for name in saved)
    record = json.loads((out / "gemma_dist.json").read_text())
    assert bool(record["quantization"]) == (recipe == "cpu_qlora")
    card = (out / "README.md").read_text()
    assert record["manifest"] in card
    assert f"| learning_rate | {record['recipe']['learning_rate']} |" in card
    assert "[More Information Needed]" not in card


def test_nothing_is_left_behind_and_no_pickle_anywhere(run: Any) -> None:
    out = run("cpu_full", "cpu_ddp")
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "gemma_dist.json"} <= names
    assert "README.md" in names
    assert not check_model(out).faults
    assert not [name for name in names if name.startswith((".", "optimizer"))]
    modes = {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~UMASK}, "a group could not share them"
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".py")]


def test_tensorboard_on_request(model: str, shards: Path, tmp_path: Path) -> None:
    more = ["max_steps=1", "report_to=tensorboard"]
    train(load_config("launch/cpu_full.yaml", [*_paths(model, shards, tmp_path / "out"), *SETTINGS[:2], *more]))
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    logged = EventAccumulator(str(events)).Reload()
    (row,) = _rows(tmp_path / "out")
    for name in ("loss", "tokens_per_s"):  # what is reckoned of a step's time as well
        assert [one.value for one in logged.Scalars(f"train/{name}")] == [pytest.approx(row[name])]
