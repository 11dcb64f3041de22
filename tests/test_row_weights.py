"""The weight of a row multiplies its loss, and counts as much in what the loss of a step is divided by."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForImageTextToText

from gemma_dist.__main__ import main
from gemma_dist.batch_plan import batch_plan
from gemma_dist.config import EncodingConfig, ShardConfig
from gemma_dist.data.encode import load_encoder
from gemma_dist.recipe import load_config
from gemma_dist.shards.manifest import read_manifest
from gemma_dist.shards.reader import open_shards
from gemma_dist.shards.sharding import run_shard
from gemma_dist.stream.collate import Sample, collate, collate_packs, control_ids
from gemma_dist.stream.cut import cut
from gemma_dist.stream.schedule import open_schedule
from gemma_dist.train.feed import known_to_host
from gemma_dist.train.run import train
from tests.support.corpus import row, shard_rows, write_rows
from tests.support.ranks import gemma_dist, long

WEIGHTS = [2.0, 1.0, 0.5, 3.0, 1.0, 0.25]
ROWS = [row(number, num_calls=1 + number % 3, weight=weight) for number, weight in enumerate(WEIGHTS)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    folder = tmp_path_factory.mktemp("weighted")
    shard_rows(folder, model, ROWS)
    return folder / "shards"


SHARED = ("packing=true", "packing_length=1400", "global_batch_size=2", "sequence_parallel_size=2")


@pytest.mark.parametrize(("launch", "more"), [(None, ()), pytest.param("cpu_ddp", (), marks=long), ("cpu_ddp", SHARED)])
def test_a_step_is_the_weighed_sum_over_the_weighed_number_of_targets(
    model: str, shards: Path, tmp_path: Path, launch: str | None, more: tuple[str, ...]
) -> None:
    """Loss and gradient against transformers' own loss of each row alone, written out."""
    batch = ["per_device_train_batch_size=1", "global_batch_size=4", "max_steps=1", *more]
    words = [f"model_name_or_path={model}", f"data.train={shards}", f"output_dir={tmp_path}/out", *batch]
    config = load_config("launch/cpu_full.yaml", words)
    if launch:
        gemma_dist("train", "launch/cpu_full.yaml", *words, launch=launch)
    else:
        train(config)
    found = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    schedule = open_schedule(config, batch_plan(config, 2 if launch else 1))
    encoder, base = load_encoder(model, EncodingConfig()), AutoModelForImageTextToText.from_pretrained(model)
    total, plain, weighed, num_targets = torch.zeros(()), 0.0, 0.0, 0
    for index in schedule.global_batch(0):
        trajectory = schedule.shards.read(index)
        weight = WEIGHTS[int(trajectory.id.removeprefix("row-"))]
        encoded = encoder.encode(trajectory)
        pixels = encoder.pixels(trajectory.images) if trajectory.images else {}
        inputs = collate([Sample(trajectory.id, encoded, pixels)], control_ids(encoder.processor))
        del inputs["kinds"]
        nll = base(**inputs).loss * encoded.num_target_tokens
        total = total + weight * nll
        weighed += weight * encoded.num_target_tokens
        plain, num_targets = plain + nll.item(), num_targets + encoded.num_target_tokens
    (total / weighed).backward()
    norm = torch.stack([one.grad.norm() for one in base.parameters() if one.grad is not None]).norm()
    assert found["loss"] == pytest.approx(total.item() / weighed, rel=1e-5)
    assert found["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert abs(found["loss"] - plain / num_targets) > 1e-4, "weights would not matter"
    of_kinds = [value for name, value in found.items() if name.startswith("loss_")]
    assert min(of_kinds) <= plain / num_targets <= max(of_kinds)
    assert found["target_tokens"] == num_targets


def test_a_micro_batch_without_weights_has_no_tensor_of_them(model: str, shards: Path) -> None:
    encoder, opened = load_encoder(model, EncodingConfig()), open_shards(shards)
    ids = control_ids(encoder.processor)
    one, two = (encoder.encode(opened.read(index)) for index in (1, 4))
    plain = known_to_host(collate([Sample("a", one, {}), Sample("b", two, {})], ids, filler=False))
    weighed = known_to_host(collate([Sample("a", one, {}, 3.0), Sample("b", two, {})], ids, filler=False))
    assert weighed.pop("target_weights").tolist() == [3.0] * one.num_target_tokens + [1.0] * two.num_target_tokens
    assert weighed.keys() == plain.keys()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_that_share_a_sequence_have_the_weights_of_their_slices(model: str, shards: Path, num_ranks: int) -> None:
    encoder, opened = load_encoder(model, EncodingConfig()), open_shards(shards)
    ids = control_ids(encoder.processor)
    packs = [
        [Sample("", encoder.encode(opened.read(index)), {}, WEIGHTS[index]) for index in pack]
        for pack in ([1, 2, 4], [5])
    ]
    whole = known_to_host(collate_packs(packs, ids, filler=False))
    shares = [
        cut(collate_packs(packs, ids, filler=False), ids, rank, num_ranks, filler=False) for rank in range(num_ranks)
    ]
    parts = list(map(known_to_host, shares))
    for name in ("target_weights", "target_ids"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    assert len(whole["target_weights"]) == sum(sample.encoded.num_target_tokens for pack in packs for sample in pack)


def test_rows_without_weights_leave_the_bytes_as_they_were_and_can_be_added_to(model: str, tmp_path: Path) -> None:
    plain = [{name: value for name, value in one.items() if name != "weight"} for one in ROWS]
    shards = {}
    for name, rows in (("plain", plain), ("ones", [one | {"weight": 1} for one in plain]), ("weighted", ROWS)):
        (tmp_path / name).mkdir()
        shard_rows(tmp_path / name, model, rows)
        shards[name] = tmp_path / name / "shards"
    parts = {name: {path.name: path.read_bytes() for path in folder.iterdir()} for name, folder in shards.items()}
    assert parts["ones"]["manifest.arrow"] == parts["plain"]["manifest.arrow"]
    assert parts["weighted"]["train-00000.parquet"] == parts["plain"]["train-00000.parquet"]
    assert "weight" not in pq.read_schema(shards["weighted"] / "train-00000.parquet").names
    headers = [read_manifest(folder / "manifest.arrow", "it").header for folder in shards.values()]
    assert [header["format_version"] for header in headers] == [3, 3, 4], "an earlier gemma_dist refuses weights"
    assert open_shards(shards["plain"]).row_weights is None
    more = write_rows(tmp_path / "more.jsonl", [row(20, weight=5), row(21)])
    for name, expected in (("plain", [1.0] * 6), ("weighted", WEIGHTS)):
        run_shard([more], shards[name], model, ShardConfig(), False, append=True)
        opened = open_shards(shards[name])
        assert opened.row_weights is not None
        assert opened.row_weights.tolist() == [*expected, 5.0, 1.0]
        assert [opened.read(index).weight for index in range(8)] == opened.row_weights.tolist()
    both = open_shards(shards["ones"], shards["weighted"])
    assert both.row_weights is not None
    assert both.row_weights.tolist() == [1.0] * 6 + [*WEIGHTS, 5.0, 1.0]


def test_every_sample_of_a_row_has_its_weight(model: str, tmp_path: Path) -> None:
    thought = {"role": "assistant", "content": "It is drawn.", "reasoning_content": "A chart is wanted."}
    messages = [{"role": "user", "content": "Draw."}, thought, {"role": "user", "content": "And now?"}, thought]
    shard_rows(tmp_path, model, [{"messages": messages, "weight": 2}, row(1)], unroll="reasoning")
    weights = open_shards(tmp_path / "shards").row_weights
    assert weights is not None
    assert weights.tolist() == [2.0, 2.0, 1.0]


def test_commands_show_weights(model: str, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(*words: str) -> str:
        assert main(list(words)) == 0
        return capsys.readouterr().out

    for data in (str(shards.parent / "rows.jsonl"), str(shards)):
        assert "weights: 4 rows with one, from 0.25 to 3; mean of all rows 1.29" in says("stats", data)
        assert "; weight 0.5\n" in says("inspect", data, "--model", model, "--row", "3")
        assert json.loads(says("stats", data, "--json"))["weights"]["max"] == 3.0
