"""Evaluation while a run trains: the loss is the model's own, in every launch, and nothing of training changes."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from gemma_dist import world
from gemma_dist.__main__ import main
from gemma_dist.batch_plan import BatchPlan
from gemma_dist.config import EncodingConfig, RunConfig
from gemma_dist.data.encode import load_encoder
from gemma_dist.data.kinds import KINDS
from gemma_dist.errors import CheckpointError, ConfigError, DataError, Stopped
from gemma_dist.recipe import load_config
from gemma_dist.resolve import Run as ResolvedRun
from gemma_dist.resolve import resolve
from gemma_dist.shards.reader import open_shards
from gemma_dist.show.check import describe_run
from gemma_dist.stream.collate import Sample, collate, control_ids
from gemma_dist.stream.held_out import HeldOut
from gemma_dist.stream.schedule import BlockId
from gemma_dist.topology import Topology
from gemma_dist.train.best import BEST, EVALUATION, best_checkpoint
from gemma_dist.train.checkpoint import MARKER
from gemma_dist.train.digests import json_crc32
from gemma_dist.train.dry import dry_run
from gemma_dist.train.evaluation import Evaluation
from gemma_dist.train.run import _best, train
from gemma_dist.train.stop import StopRequests
from gemma_dist.train.trainer import ToolCallTrainer
from tests.support.corpus import row, shard_rows
from tests.support.ranks import gemma_dist, long, needs_compiler

NUM_STEPS = 3
BATCH = ["per_device_train_batch_size=2", "global_batch_size=4", f"max_steps={NUM_STEPS}", "save_steps=1"]
BATCH += ["warmup_steps=0", "lr_scheduler_type=constant", "save_total_limit=null"]
EVAL = ["eval_strategy=steps", "eval_on_start=true", "metric_for_best_model=loss"]
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, model: str) -> list[str]:
    """Shards to train on and others, with a thought, images and lengths that leave a rank with fewer."""
    folder = tmp_path_factory.mktemp("data")
    rows = {"train": range(13), "eval": range(12, 19)}
    for name, numbers in rows.items():
        (folder / name).mkdir()
        made = [row(number, num_calls=1 + number % 3) for number in numbers]
        if name == "eval":
            made[1]["messages"][-1]["reasoning_content"] = "It is drawn, so say it."
        shard_rows(folder / name, model, made)
    return [f"data.train={folder / 'train/shards'}", f"data.eval={folder / 'eval/shards'}"]


def _config(model: str, data: list[str], out: Path, *more: str, recipe: str = "cpu_lora") -> RunConfig:
    words = [f"model_name_or_path={model}", *data, f"output_dir={out}", *BATCH, *more]
    return load_config(f"launch/{recipe}.yaml", words)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: str, data: list[str]) -> Run:
    """Train with these settings, once for each; the output folder."""
    done: dict[tuple[str, ...], Path] = {}

    def trained(*more: str, recipe: str = "cpu_lora") -> Path:
        if (recipe, *more) not in done:
            done[recipe, *more] = out = tmp_path_factory.mktemp("run") / "out"
            train(_config(model, data, out, *more, recipe=recipe))
        return done[recipe, *more]

    return trained


def _rows(out: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, but for what differs from run to run."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: row[name] for name in row if name not in ("seconds", "tokens_per_s", "eval_runtime")} for row in rows
    ]


def _evaluations(out: Path) -> list[dict[str, Any]]:
    return [row for row in _rows(out) if "eval_loss" in row]


def _by_hand(model: str, folder: str, adapter: Path | None = None) -> dict[str, float]:
    """Loss by kind from the logits of each row alone."""
    from peft import PeftModel

    encoder, shards = load_encoder(model, EncodingConfig()), open_shards(folder)
    base: Any = AutoModelForImageTextToText.from_pretrained(model)
    base = (PeftModel.from_pretrained(base, str(adapter)) if adapter else base).eval()
    sums: dict[str, list[float]] = {}
    for index in range(len(shards)):
        trajectory = shards.read(index)
        encoded = encoder.encode(trajectory)
        pixels = encoder.pixels(trajectory.images) if trajectory.images else {}
        batch = collate([Sample("", encoded, pixels)], control_ids(encoder.processor))
        kinds = batch.pop("kinds")[0]
        with torch.no_grad():
            log_probs = base(**batch).logits[0].log_softmax(-1)
        for place in range(1, len(encoded.input_ids)):
            if kind := int(kinds[place]):
                nll = -float(log_probs[place - 1, encoded.input_ids[place]])
                for name in ("eval_loss", f"eval_loss_{KINDS[kind]}"):
                    sums.setdefault(name, []).append(nll)
    return {name: sum(values) / len(values) for name, values in sums.items()}


@pytest.mark.parametrize("more", [(), ("packing=true", "per_device_eval_batch_size=3")], ids=["rows", "packs"])
def test_the_loss_is_that_of_the_models_own_logits(
    run: Run, model: str, data: list[str], more: tuple[str, ...]
) -> None:
    out = run(*EVAL, *more)
    folder = data[1].removeprefix("data.eval=")
    first, *_, last = _evaluations(out)
    assert first["step"] == 0
    for found, expected in ((first, _by_hand(model, folder)), (last, _by_hand(model, folder, out))):
        assert expected.keys() == {"eval_loss", *(f"eval_loss_{kind}" for kind in KINDS.values())}
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_training_is_the_same_with_and_without_evaluation(run: Run) -> None:
    """With dropout, so that a random number too many would show."""
    dropout = "lora.lora_dropout=0.5"
    plain, evaluated = run(dropout), run(dropout, *EVAL)
    assert [row["step"] for row in _evaluations(evaluated)] == list(range(NUM_STEPS + 1))
    assert [row for row in _rows(evaluated) if "loss" in row] == _rows(plain)
    one, two = (load_file(out / "adapter_model.safetensors") for out in (plain, evaluated))
    assert one.keys() == two.keys()
    assert all(torch.equal(two[name], weight) for name, weight in one.items())


@pytest.mark.parametrize(
    "launch",
    [
        "cpu_ddp",
        pytest.param("cpu_fsdp2", marks=long),
        pytest.param("cpu_zero2", marks=[long, needs_compiler]),
        pytest.param("cpu_zero3", marks=[long, needs_compiler]),
    ],
)
def test_every_launch_finds_the_same(run: Run, model: str, data: list[str], tmp_path: Path, launch: str) -> None:
    """Two ranks, seven rows, two at a time: one of them ends with a filler. By SGD: AdamW makes much of gradients that
    are nearly 0, and so of the order of sums."""
    alone = run(*EVAL, "optim=sgd", recipe="cpu_full")
    words = [f"model_name_or_path={model}", *data, f"output_dir={tmp_path / 'out'}", *BATCH, *EVAL, "optim=sgd"]
    output = gemma_dist("train", "launch/cpu_full.yaml", *words, launch=launch)
    assert "7 trajectories, " in output
    assert "in 2 batches a rank" in output
    for one, two in zip(_rows(alone), _rows(tmp_path / "out"), strict=True):
        assert two == pytest.approx(one, rel=1e-5)


def test_the_best_checkpoint_is_kept_and_published(run: Run, model: str, data: list[str], tmp_path: Path) -> None:
    """By the greatest loss, which is the first one's."""
    worst = ["greater_is_better=true", "load_best_model_at_end=true", "save_total_limit=1"]
    out = run(*EVAL, *worst)
    losses = [row["eval_loss"] for row in _evaluations(out)][1:]
    assert losses == sorted(losses, reverse=True)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", f"checkpoint-{NUM_STEPS}"]
    told = {"checkpoint": "checkpoint-1", "step": 1, "metric": "eval_loss", "value": losses[0]}
    assert json.loads((out / BEST).read_text()) == told | {"greater_is_better": True}
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (out / "checkpoint-1" / name).read_bytes()
    assert not (out / EVALUATION).exists()
    again = tmp_path / "again"  # elsewhere, and once more: what is best stands in the checkpoints
    shutil.copytree(out, again)
    (again / BEST).unlink()
    (again / name).unlink()
    train(_config(model, data, again, *EVAL, *worst))
    assert (again / name).read_bytes() == (out / name).read_bytes()
    assert (again / BEST).read_bytes() == (out / BEST).read_bytes()
    _damage(again / "checkpoint-1" / name)
    train(_config(model, data, again, *EVAL, *worst))
    assert (again / name).read_bytes() == (out / f"checkpoint-{NUM_STEPS}" / name).read_bytes()
    assert json.loads((again / BEST).read_text())["step"] == NUM_STEPS


def test_the_end_of_each_epoch_is_saved_where_the_best_of_them_is_kept(run: Run) -> None:
    out = run("eval_strategy=epoch", "metric_for_best_model=loss_call", "save_steps=100", "max_steps=5")
    assert [row["step"] for row in _evaluations(out)] == [4, 5]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    assert json.loads((out / BEST).read_text())["metric"] == "eval_loss_call"


def _damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_a_run_that_goes_on_finds_what_the_uninterrupted_one_did(
    run: Run, model: str, data: list[str], tmp_path: Path
) -> None:
    """After a kill, and with the newest checkpoint not evaluated yet, though the evaluation's line is written."""
    whole, out = run(*EVAL), tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / f"checkpoint-{NUM_STEPS}")
    (out / BEST).unlink()
    step = NUM_STEPS - 1
    found = (out / f"checkpoint-{step}" / EVALUATION).read_bytes()
    (out / f"checkpoint-{step}" / EVALUATION).unlink()
    marker = json.loads((out / f"checkpoint-{step}/complete.json").read_text())
    assert EVALUATION in marker["files"], "a damaged one is found"
    _without_evaluation(out / f"checkpoint-{step}")
    train(_config(model, data, out, *EVAL))
    assert _rows(out) == _rows(whole)
    assert (out / f"checkpoint-{step}" / EVALUATION).read_bytes() == found
    assert (out / BEST).read_bytes() == (whole / BEST).read_bytes()


def _without_evaluation(checkpoint: Path) -> None:
    """As it is saved when a request to stop has ended the evaluation."""
    marker = json.loads((checkpoint / MARKER).read_text())
    del marker["files"][EVALUATION]
    marker["crc32"] = 0
    (checkpoint / MARKER).write_text(json.dumps(marker | {"crc32": json_crc32(marker)}))


class _Asked(StopRequests):
    """Is asked to stop when a test says so."""

    is_asked = False

    def by(self) -> str:
        return "SIGTERM" if self.is_asked else ""


class _AskedMeanwhile(ToolCallTrainer):
    """Is asked to stop in the second batch of an evaluation after step 2."""

    def moved(self) -> None:
        super().moved()
        if self.evaluation.place and self.state.global_step == 2:
            assert isinstance(self.boundary.requests, _Asked)
            self.boundary.requests.is_asked = True


def test_a_request_to_stop_ends_an_evaluation_which_the_next_start_makes_up_for(
    run: Run, model: str, data: list[str], tmp_path: Path
) -> None:
    whole, out = run(*EVAL), tmp_path / "out"
    one_by_one = "per_device_eval_batch_size=1"
    with pytest.raises(Stopped):
        train(_config(model, data, out, *EVAL, one_by_one), trainer_class=_AskedMeanwhile, requests=_Asked())
    assert [row["step"] for row in _evaluations(out)] == [0, 1]
    assert not (out / "checkpoint-2" / EVALUATION).exists()
    train(_config(model, data, out, *EVAL, one_by_one))
    for one, two in zip(_rows(whole), _rows(out), strict=True):
        assert two == pytest.approx(one, rel=1e-6)


def test_a_dry_run_tries_the_longest_batch_and_leaves_nothing(model: str, data: list[str], tmp_path: Path) -> None:
    more = ["eval_strategy=epoch", "eval_on_start=true", "load_best_model_at_end=true", "save_steps=100", "max_steps=9"]
    found = dry_run(_config(model, data, tmp_path / "out", *more))
    assert found is not None
    assert found.evaluation is not None
    assert (found.evaluation.num_batches, found.evaluation.num_evaluations) == (4, len([0, 4, 8, 9]))
    assert found.num_saves == len([4, 8, 9])
    assert found.evaluation.seconds_a_batch > 0
    assert "a batch of the longest sequences of data.eval" in found.render()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "evaluated"),
    [
        (["eval_strategy=steps"], [1, 2, 3, 4, 5, 6, 7]),
        (["eval_strategy=steps", "eval_steps=3", "eval_on_start=true"], [0, 3, 6, 7]),
        (["eval_strategy=epoch"], [4, 7]),
        (["eval_on_start=true"], [0]),
        (["eval_strategy=no"], []),
    ],
)
def test_when_a_run_evaluates(
    model: str, data: list[str], tmp_path: Path, more: list[str], evaluated: list[int]
) -> None:
    resolved = resolve(_config(model, data, tmp_path / "out", "max_steps=7", *more), Topology("", 2))
    assert [step for step in range(8) if resolved.evaluates_at(step)] == evaluated
    assert resolved.num_evaluations() == len(evaluated)
    assert resolved.num_evaluations(3) == sum(step > 3 for step in evaluated)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("more", [(), ("packing=true",), ("max_eval_samples=3",)])
def test_ranks_share_the_same_samples_in_as_many_batches(
    model: str, data: list[str], tmp_path: Path, num_ranks: int, more: tuple[str, ...]
) -> None:
    words = [*EVAL, *more, "per_device_train_batch_size=1", f"global_batch_size={num_ranks}"]
    held_out = resolve(_config(model, data, tmp_path / "out", *words), Topology("", num_ranks)).held_out
    assert held_out is not None
    seen = []
    for number in range(held_out.num_rounds):
        of_ranks = [held_out.micro_batches(number, rank) for rank in range(num_ranks)]
        assert all(len(batches) == 1 for batches in of_ranks)
        seen += [sample for batches in of_ranks for packs in batches for pack in packs for sample in pack]
    expected = [0, 2, 4] if "max_eval_samples=3" in more else list(range(7))
    assert sorted(seen) == held_out.samples == expected
    assert not any(held_out.micro_batches(held_out.num_rounds, rank) != [[]] for rank in range(num_ranks))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["eval_strategy=steps", "data.eval=[]"], "train.eval_strategy: steps, but data.eval names nothing"),
        (["eval_on_start=true", "data.eval=[]"], "train.eval_on_start: true, but data.eval names nothing"),
        (["eval_steps=2"], "train.eval_steps: 2, but eval_strategy is no"),
        (["eval_strategy=epoch", "eval_steps=2"], "eval_strategy is epoch; set it to steps"),
        (["load_best_model_at_end=true"], "train.load_best_model_at_end: true: nothing is evaluated"),
        (["metric_for_best_model=loss_call"], "train.metric_for_best_model: nothing is evaluated"),
        ([*EVAL, "eval_steps=3", "save_steps=4"], "save_steps 4 is not a multiple of eval_steps 3"),
        (["greater_is_better=true"], "train.greater_is_better: true of nothing"),
        ([*EVAL, "metric_for_best_model=overall"], "no evaluation measures it; name one of eval_loss, "),
        (["val_set_size=0.1"], "rows are split where they are sharded: `gemma-dist shard --split 0.05`"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(
    model: str, data: list[str], tmp_path: Path, more: list[str], told: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        _config(model, data, tmp_path / "out", *more)


def test_held_out_shards_of_another_encoding_are_refused_and_shared_ids_are_told(
    model: str, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = resolve(_config(model, data, tmp_path / "out", *EVAL), Topology("", 1))
    description = describe_run(resolved)
    assert "7 trajectories, " in description
    assert f"evaluated {NUM_STEPS + 1} times" in description
    assert "data.eval: 1 of 7 samples have ids of data.train: row-12." in description
    (command,) = re.findall(r"`gemma-dist (stats [^`]+)` finds rows alike under other ids", description)
    assert main([*shlex.split(command), "--json"]) == 0
    overlap = json.loads(capsys.readouterr().out)["against"]
    assert (overlap["num_rows"], overlap["exact"]["num_rows"]) == (7, 1)
    shard_rows(tmp_path, model, [row(1)], enable_thinking=True)
    with pytest.raises(DataError, match=r"data.eval: .*were made with another tokenizer, chat template"):
        resolve(_config(model, data, tmp_path / "out", f"data.eval={tmp_path / 'shards'}", *EVAL), Topology("", 1))


@pytest.mark.parametrize("command", [train, dry_run])
def test_a_metric_of_tokens_that_are_not_there_is_refused_before_the_first_step(
    command: Callable[[RunConfig], object], model: str, data: list[str], tmp_path: Path
) -> None:
    """data.train has no reasoning."""
    same = data[0].replace("data.train", "data.eval")
    more = [same, "eval_strategy=steps", "metric_for_best_model=loss_reasoning"]
    told = "the 13 samples of data.eval that are evaluated have no tokens of that kind; name one of eval_loss, "
    with pytest.raises(ConfigError, match=f"train.metric_for_best_model: eval_loss_reasoning, but {told}"):
        command(_config(model, data, tmp_path / "out", *more))
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_a_request_in_the_last_step_leaves_its_evaluation_as_it_is(model: str, data: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["eval_strategy=steps", "load_best_model_at_end=true", "max_steps=1"]
    requests = _Asked()
    requests.is_asked = True
    train(_config(model, data, out, *more), requests=requests)
    assert [row["step"] for row in _evaluations(out)] == [1]
    assert json.loads((out / BEST).read_text())["checkpoint"] == "checkpoint-1"


BEST_OF_ALL = [*EVAL, "load_best_model_at_end=true"]


def _copied(run: Run, model: str, data: list[str], tmp_path: Path, *more: str) -> tuple[ResolvedRun, Path]:
    """A finished run in a folder of its own, and its last checkpoint, which has the least loss."""
    out = tmp_path / "out"
    shutil.copytree(run(*EVAL), out)
    return resolve(_config(model, data, out, *BEST_OF_ALL, *more), Topology("", 1)), out / f"checkpoint-{NUM_STEPS}"


def test_a_best_checkpoint_whose_marker_is_damaged_is_put_aside(
    run: Run, model: str, data: list[str], tmp_path: Path
) -> None:
    resolved, last = _copied(run, model, data, tmp_path, "greater_is_better=true")
    assert _best(resolved, last) == last.with_name("checkpoint-1")
    (last.with_name("checkpoint-1") / MARKER).write_text("{")
    assert _best(resolved, last) == last.with_name("checkpoint-2")
    assert last.with_name("damaged-checkpoint-1").is_dir()


def test_the_last_checkpoint_that_is_the_best_and_damaged_is_not_published(
    run: Run, model: str, data: list[str], tmp_path: Path
) -> None:
    resolved, last = _copied(run, model, data, tmp_path)
    assert _best(resolved, last) == last
    _damage(last / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="the end of this run, is damaged and was put aside"):
        _best(resolved, last)
    assert last.with_name(f"damaged-{last.name}").is_dir()


def test_the_best_is_none_that_a_user_has_named(run: Run, model: str, data: list[str], tmp_path: Path) -> None:
    resolved, last = _copied(run, model, data, tmp_path)
    mine = last.with_name(f"{last.name}-mine")
    shutil.copytree(last, mine)
    evaluation = json.loads((mine / EVALUATION).read_text())
    (mine / EVALUATION).write_text(json.dumps(evaluation | {"eval_loss": 0.0}))
    best = best_checkpoint(resolved)
    assert best is not None
    assert best.folder == last


@pytest.mark.parametrize("of_rank_0", [True, False])
def test_rank_0_says_whether_a_run_evaluates_before_it_goes_on(
    run: Run, model: str, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_rank_0: bool
) -> None:
    """Whatever another rank sees there, and however the folder is spelled."""
    resolved, last = _copied(run, model, data, tmp_path, "max_steps=4")
    if not of_rank_0:  # what this rank sees is the contrary
        (last / EVALUATION).unlink()
    monkeypatch.setattr(world, "gather_objects", lambda seen: [of_rank_0, seen])
    spelled = last.parent / ".." / last.parent.name / last.name
    evaluation, tried = Evaluation(SimpleNamespace(run=resolved, checkpoint=spelled), resolved.held_out), []

    def evaluate(step: int) -> bool:
        tried.append(step)
        return True

    monkeypatch.setattr(evaluation, "_evaluate", evaluate)
    evaluation.on_train_begin(None, SimpleNamespace(global_step=NUM_STEPS), None)
    assert tried == [NUM_STEPS] * of_rank_0
    if of_rank_0:
        assert json.loads((last / EVALUATION).read_text()) == {"step": None}


def test_an_evaluation_that_ends_meanwhile_is_no_error_to_the_watchdog() -> None:
    rounds = iter([0, None])  # it ends between two looks

    class Ending(Evaluation):
        @property
        def _round(self) -> int | None:  # type: ignore[override]
            return next(rounds)

    evaluation = object.__new__(Ending)
    held_out: Any = SimpleNamespace(num_rounds=2)
    evaluation._held_out = held_out
    assert evaluation.place == "an evaluation, batch 1 of 2"
    assert evaluation.samples(0) == ""


def test_the_row_groups_of_a_round_are_looked_for_once() -> None:
    """A loader asks for those of all rounds ahead, in each round."""
    seen = []

    def row_group_of(sample: int) -> int:
        seen.append(sample)
        return sample // 3

    counts = np.arange(12)
    shards: Any = SimpleNamespace(row_group_of=row_group_of, num_text_tokens=counts, num_image_tokens=counts)
    samples = [0, 2, 3, 8, 9, 11]
    held_out = HeldOut(shards, samples, BatchPlan(1, 4, 1, 4), 0)
    for _ in range(3):
        assert [held_out.row_groups(BlockId(0, number)) for number in (0, 1)] == [[0, 1, 2], [3]]
    assert seen == samples
    assert held_out.longest_round().row_groups(BlockId(0, 0)) == [1, 2, 3]
