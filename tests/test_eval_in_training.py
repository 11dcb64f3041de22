"""Evaluation while a run trains: the loss is the model's own, in every launch, and nothing of training changes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from gemma_dist.config import EncodingConfig, RunConfig
from gemma_dist.data.encode import load_encoder
from gemma_dist.data.kinds import KINDS
from gemma_dist.errors import ConfigError, DataError, Stopped
from gemma_dist.recipe import load_config
from gemma_dist.resolve import resolve
from gemma_dist.shards.reader import open_shards
from gemma_dist.show.check import describe_run
from gemma_dist.stream.collate import Sample, collate, control_ids
from gemma_dist.topology import Topology
from gemma_dist.train.best import BEST, EVALUATION
from gemma_dist.train.dry import dry_run
from gemma_dist.train.run import train
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
    """After a kill, and with the newest checkpoint not evaluated yet."""
    whole, out = run(*EVAL), tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / f"checkpoint-{NUM_STEPS}")
    (out / BEST).unlink()
    step = NUM_STEPS - 1
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    unevaluated = [line for line in lines if not ('"eval_loss"' in line and f'"step": {step},' in line)]
    (out / "metrics.jsonl").write_text("".join(unevaluated))
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
    from gemma_dist.train.checkpoint import MARKER
    from gemma_dist.train.digests import json_crc32

    marker = json.loads((checkpoint / MARKER).read_text())
    del marker["files"][EVALUATION]
    marker["crc32"] = 0
    (checkpoint / MARKER).write_text(json.dumps(marker | {"crc32": json_crc32(marker)}))


class _AskedMeanwhile(ToolCallTrainer):
    """Is asked to stop in the second batch of an evaluation after step 2."""

    def moved(self) -> None:
        super().moved()
        if self.evaluation.place and self.state.global_step == 2:
            (self.run.config.train.output_dir / "stop").touch()


def test_a_request_to_stop_ends_an_evaluation_which_the_next_start_makes_up_for(
    run: Run, model: str, data: list[str], tmp_path: Path
) -> None:
    whole, out = run(*EVAL), tmp_path / "out"
    one_by_one = "per_device_eval_batch_size=1"
    with pytest.raises(Stopped):
        train(_config(model, data, out, *EVAL, one_by_one), trainer_class=_AskedMeanwhile)
    assert [row["step"] for row in _evaluations(out)] == [0, 1]
    assert not (out / "checkpoint-2" / EVALUATION).exists()
    train(_config(model, data, out, *EVAL, one_by_one))
    for one, two in zip(_rows(whole), _rows(out), strict=True):
        assert two == pytest.approx(one, rel=1e-6)


def test_a_dry_run_tries_the_longest_batch_and_leaves_nothing(model: str, data: list[str], tmp_path: Path) -> None:
    found = dry_run(_config(model, data, tmp_path / "out", *EVAL, "load_best_model_at_end=true"))
    assert found is not None
    assert found.evaluation is not None
    assert (found.evaluation.num_batches, found.evaluation.num_evaluations) == (4, NUM_STEPS + 1)
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
        (["val_set_size=0.1"], "shard held-out rows into a folder of their own"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(
    model: str, data: list[str], tmp_path: Path, more: list[str], told: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        _config(model, data, tmp_path / "out", *more)


def test_held_out_shards_of_another_encoding_are_refused_and_shared_ids_are_told(
    model: str, data: list[str], tmp_path: Path
) -> None:
    resolved = resolve(_config(model, data, tmp_path / "out", *EVAL), Topology("", 1))
    description = describe_run(resolved)
    assert "7 trajectories, " in description
    assert f"evaluated {NUM_STEPS + 1} times" in description
    assert "data.eval: 1 of 7 samples have ids of data.train: row-12." in description
    shard_rows(tmp_path, model, [row(1)], enable_thinking=True)
    with pytest.raises(DataError, match=r"data.eval: .*were made with another tokenizer, chat template"):
        resolve(_config(model, data, tmp_path / "out", f"data.eval={tmp_path / 'shards'}", *EVAL), Topology("", 1))


def test_a_metric_of_tokens_that_are_not_there_is_refused(model: str, data: list[str], tmp_path: Path) -> None:
    """data.train has no reasoning."""
    same = data[0].replace("data.train", "data.eval")
    more = [same, "eval_strategy=steps", "metric_for_best_model=loss_reasoning"]
    with pytest.raises(ConfigError, match=r"metric_for_best_model: eval_loss_reasoning, but data.eval has no tokens"):
        train(_config(model, data, tmp_path / "out", *more))
