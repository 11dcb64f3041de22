"""The loader and its collator: the right samples in the right order, and a filler that changes nothing."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from gemma_dist.batch_plan import BatchPlan
from gemma_dist.config import EncodingConfig
from gemma_dist.data.encode import Encoder, load_encoder
from gemma_dist.data.encoded import IGNORE_INDEX
from gemma_dist.errors import DataError
from gemma_dist.shards import sharding
from gemma_dist.shards.fetch import Fetcher
from gemma_dist.shards.reader import Shards, open_shards
from gemma_dist.stream import loader as module
from gemma_dist.stream import schedule as schedule_module
from gemma_dist.stream.collate import Sample, collate, control_ids
from gemma_dist.stream.loader import TrajectoryLoader
from gemma_dist.stream.schedule import BlockId, Schedule, read_quarantine
from tests.support.corpus import ids_at, row, shard_rows

NUM_SAMPLES = 11
Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["e4b", "31b", "12b"])
def style(
    request: pytest.FixtureRequest, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Encoder, Shards]:
    """A tiny model with weights, its encoder, and a corpus of 11 rows, the rows 0, 3, 6, 9 with an image."""
    from transformers import AutoModelForImageTextToText

    folder = tmp_path_factory.mktemp(request.param)
    model_folder = str(tiny_model(request.param))
    shard_rows(folder, model_folder, [row(number) for number in range(NUM_SAMPLES)])
    model = AutoModelForImageTextToText.from_pretrained(model_folder).eval()
    encoder = load_encoder(model_folder, EncodingConfig())
    return model, encoder, open_shards(folder / "shards")


@pytest.fixture(scope="module")
def encoder(style: tuple[Any, Encoder, Shards]) -> Encoder:
    return style[1]


@pytest.fixture(scope="module")
def shards(style: tuple[Any, Encoder, Shards]) -> Shards:
    return style[2]


def sample(encoder: Encoder, shards: Shards, index: int) -> Sample:
    trajectory = shards.read(index)
    pixels = encoder.pixels(trajectory.images) if trajectory.images else {}
    return Sample(trajectory.id, encoder.encode(trajectory), pixels)


# ---- the collator ----------------------------------------------------------------------------------------------------


def test_rows_are_padded_on_the_right_and_images_keep_their_order(encoder: Encoder, shards: Shards) -> None:
    samples = [sample(encoder, shards, index) for index in (3, 1, 0)]
    batch = collate(samples, control_ids(encoder.processor))
    longest = max(len(s.encoded.input_ids) for s in samples)
    for name in ("input_ids", "labels", "attention_mask", "mm_token_type_ids"):
        assert batch[name].shape == (3, longest)
        assert batch[name].dtype == torch.int64
    for i, s in enumerate(samples):
        length = len(s.encoded.input_ids)
        assert batch["input_ids"][i, :length].tolist() == s.encoded.input_ids
        assert batch["labels"][i, :length].tolist() == s.encoded.labels
        assert batch["mm_token_type_ids"][i, :length].tolist() == s.encoded.mm_token_type_ids
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (longest - length)
        assert (batch["labels"][i, length:] == IGNORE_INDEX).all()
    images = torch.cat([samples[0].pixels["pixel_values"], samples[2].pixels["pixel_values"]])
    assert torch.equal(batch["pixel_values"], images)
    assert batch["pixel_values"].dtype == torch.float32


def test_images_of_different_patch_counts_are_padded_as_the_processor_pads(encoder: Encoder, shards: Shards) -> None:
    """The model reads the same features from an image whether its padding is short or long."""
    first, second = sample(encoder, shards, 0), sample(encoder, shards, 3)
    num_patches = int((second.pixels["image_position_ids"] >= 0).all(-1).sum())
    trimmed = {name: tensor[:, :num_patches] for name, tensor in second.pixels.items()}
    ids = control_ids(encoder.processor)
    padded = collate([first, Sample(second.id, second.encoded, trimmed)], ids)
    expected = collate([first, second], ids)
    assert all(torch.equal(padded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("indices", [(1,), (1, 2, 4), ()])
def test_a_micro_batch_without_an_image_gets_one_filler(
    encoder: Encoder, shards: Shards, indices: tuple[int, ...]
) -> None:
    samples = [sample(encoder, shards, index) for index in indices]
    batch = collate(samples, control_ids(encoder.processor))
    assert batch["input_ids"].shape[0] == max(1, len(indices))
    side, num_values = (1, 6912) if type(encoder.processor).__name__ == "Gemma4UnifiedProcessor" else (3, 768)
    assert batch["pixel_values"].shape == (1, side**2, num_values)
    assert not batch["pixel_values"].any()
    positions = [(x, y) for x in range(side) for y in range(side)]
    assert sorted(map(tuple, batch["image_position_ids"][0].tolist())) == positions
    (image,) = (batch["input_ids"] == encoder.image_token_id).nonzero().tolist()
    tokenizer: Any = encoder.tokenizer
    filler = batch["input_ids"][image[0], image[1] - 1 : image[1] + 2]
    assert tokenizer.convert_ids_to_tokens(filler.tolist()) == ["<|image>", "<|image|>", "<image|>"]
    assert batch["mm_token_type_ids"].sum() == 1
    trained = sum(s.encoded.num_target_tokens for s in samples)
    assert (batch["labels"] != IGNORE_INDEX).sum() == trained


def forward(model: Any, batch: Batch, **changed: Any) -> torch.Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return model(**{**inputs, **changed}, use_cache=False).logits


def test_the_filler_changes_no_logit_and_no_gradient(style: tuple[Any, Encoder, Shards]) -> None:
    model, encoder, shards = style
    samples = [sample(encoder, shards, index) for index in (1, 2, 4)]
    batch = collate(samples, control_ids(encoder.processor))
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(s.encoded.input_ids) for s in samples], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(s.encoded.labels) for s in samples], batch_first=True, padding_value=IGNORE_INDEX
    )
    real = torch.arange(rows.shape[1]) < torch.tensor([[len(s.encoded.input_ids)] for s in samples])
    plain = {"input_ids": rows, "attention_mask": real.long(), "mm_token_type_ids": torch.zeros_like(rows)}

    results = []
    for inputs, targets in ((plain, labels), (batch, batch["labels"])):
        model.zero_grad()
        logits = forward(model, inputs)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        loss.backward()
        results.append((logits[:, : rows.shape[1]][real].detach(), gradients(model)))
    (logits, without), (logits_with, with_filler) = results
    torch.testing.assert_close(logits_with, logits, atol=1e-5, rtol=0)
    for name, gradient in with_filler.items():
        expected = without.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4, msg=name)
    assert all(not with_filler[name].any() for name in with_filler if "vision" in name)
    assert any("vision" in name for name in with_filler), "the tower ran: a rank in a distributed run needs that"


def gradients(model: Any) -> Batch:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_an_empty_micro_batch_runs_and_gives_no_gradient(style: tuple[Any, Encoder, Shards]) -> None:
    model, encoder, _ = style
    batch = collate([], control_ids(encoder.processor))
    model.zero_grad()
    logits = forward(model, batch)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    loss.backward()
    assert logits.isfinite().all()
    assert loss == 0
    assert all(gradient.isfinite().all() and not gradient.any() for gradient in gradients(model).values())


def test_a_padded_batch_gives_each_row_the_logits_that_it_has_alone(style: tuple[Any, Encoder, Shards]) -> None:
    model, encoder, shards = style
    samples = [sample(encoder, shards, index) for index in (0, 1, 3)]
    ids = control_ids(encoder.processor)
    with torch.no_grad():
        together = forward(model, collate(samples, ids))
        for i, s in enumerate(samples):
            length = len(s.encoded.input_ids)
            alone = forward(model, collate([s], ids))
            torch.testing.assert_close(together[i, :length], alone[0, :length], atol=1e-5, rtol=0)


# ---- the loader ------------------------------------------------------------------------------------------------------


def loaders(
    style: Any, world_size: int, micro: int, accumulation: int, start_step: int = 0, num_steps: int = 6, **changed: Any
) -> list[TrajectoryLoader]:
    _, encoder, shards = style
    plan = BatchPlan(world_size, micro, accumulation, world_size * micro * accumulation)
    num_workers = changed.pop("num_workers", 2)
    schedule = Schedule(shards, plan, 3, **{"packing": False, "packing_length": None, **changed})
    return [
        TrajectoryLoader(schedule, encoder, rank, start_step, num_steps, num_workers=num_workers)
        for rank in range(world_size)
    ]


def documents(batch: Batch) -> Iterator[tuple[int, ...]]:
    """The trajectories of a micro-batch, up to the last trained token of each: without fillers and padding."""
    positions = batch.get("position_ids", torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]))
    for ids, labels, places in zip(batch["input_ids"], batch["labels"], positions, strict=True):
        starts = [*(places == 0).nonzero().flatten().tolist(), len(places)]
        for start, end in pairwise(starts):
            trained = (labels[start:end] != IGNORE_INDEX).nonzero()
            if len(trained):
                yield tuple(ids[start : start + int(trained.max()) + 1].tolist())


PACKING = pytest.mark.parametrize("packing", [False, True])


@PACKING
def test_one_rank_with_accumulation_and_two_ranks_train_on_the_same_samples(style: Any, packing: bool) -> None:
    (alone,) = loaders(style, 1, 2, 2, packing=packing)
    together = loaders(style, 2, 2, 1, packing=packing)
    num_steps = 2 * alone.schedule.steps_per_epoch
    for loader in (alone, *together):
        loader.num_steps = num_steps
    for step in range(num_steps):
        ids = {sample for packs in ids_at(alone.schedule, step, 0) for pack in packs for sample in pack}
        both = [packs for rank in together for packs in ids_at(rank.schedule, step, rank.rank)]
        assert ids == {sample for packs in both for pack in packs for sample in pack}
        assert [rank.counts_at(step) for rank in together] == [alone.counts_at(step)] * 2
    seen_alone = Counter(document for batch in alone for document in documents(batch))
    seen_together = Counter(document for rank in together for batch in rank for document in documents(batch))
    assert seen_alone == seen_together
    assert sorted(seen_alone.values()) == [2] * NUM_SAMPLES, "two epochs of eleven"


@PACKING
@pytest.mark.parametrize("num_workers", [0, 3])
def test_what_comes_is_what_the_ids_say_and_ranks_stay_in_step(style: Any, packing: bool, num_workers: int) -> None:
    _, encoder, shards = style
    by_id = {shards.id(index): encoder.encode(shards.read(index)) for index in range(len(shards))}
    ranks = loaders(style, 2, 1, 3, packing=packing, packing_length=500 if packing else None, num_workers=num_workers)
    trained, num_fillers = Counter[int](), 0
    for rank in ranks:
        batches = list(rank)
        assert len(batches) == len(rank) == 18
        micros = [(step, ids) for step in range(6) for ids in ids_at(rank.schedule, step, rank.rank)]
        for batch, (step, packs) in zip(batches, micros, strict=True):
            assert batch["input_ids"].shape[0] == max(1, len(packs))
            for i, pack in enumerate(packs):
                expected = [token for sample_id in pack for token in by_id[sample_id].input_ids]
                assert batch["input_ids"][i, : len(expected)].tolist() == expected
                assert len(pack) == 1 or len(expected) <= 500
            trained[step] += int((batch["labels"] != IGNORE_INDEX).sum())
            num_fillers += not packs
    assert trained == {step: ranks[0].counts_at(step)[0] for step in range(6)}
    assert num_fillers > 0, "eleven samples, six places a step"
    if packing:
        assert any(len(pack) > 1 for _, packs in micros for pack in packs)


@PACKING
def test_a_later_start_is_the_tail_of_the_run(style: Any, packing: bool) -> None:
    (whole,) = loaders(style, 1, 2, 2, packing=packing)
    (rest,) = loaders(style, 1, 2, 2, packing=packing, start_step=4, num_steps=2, num_workers=0)
    for expected, batch in zip(list(whole)[8:], DataLoader(rest, batch_size=None), strict=True):
        assert expected.keys() == batch.keys()
        assert all(torch.equal(expected[name], batch[name]) for name in expected)
    assert len(DataLoader(rest, batch_size=None)) == 4


def test_quarantined_samples_are_left_out_and_nothing_else_moves(style: Any) -> None:
    (whole,), (rest,) = loaders(style, 1, 2, 2), loaders(style, 1, 2, 2, quarantine=frozenset({0, 5}))
    gone = {"row-0", "row-5"}
    for step in range(6):
        kept = [[[i for i in pack if i not in gone] for pack in packs] for packs in ids_at(whole.schedule, step, 0)]
        assert ids_at(rest.schedule, step, 0) == kept
    documents_of = [Counter(d for batch in loader for d in documents(batch)) for loader in (whole, rest)]
    assert len(documents_of[0] - documents_of[1]) == 2
    assert not documents_of[1] - documents_of[0]


def test_a_quarantined_row_group_is_never_read(style: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder, _ = style
    monkeypatch.setattr(sharding, "ROW_GROUP_BYTES", 2000)
    shard_rows(tmp_path, str(model.name_or_path), [row(number) for number in range(NUM_SAMPLES)])
    shards = open_shards(tmp_path / "shards")
    bad = shards.row_group_of(4)
    file = tmp_path / "shards" / "train-00000.parquet"
    damaged = bytearray(file.read_bytes())
    damaged[int(shards._manifests[0].row_groups("offset")[bad]) + 30] ^= 1
    file.write_bytes(damaged)
    reopened = (model, encoder, open_shards(tmp_path / "shards"))
    (loader,) = loaders(reopened, 1, 1, 1, num_steps=NUM_SAMPLES)
    with pytest.raises(DataError, match=f"row group {bad}: .*checksum.*row-4(.|\n)*`quarantine: FILE`") as error:
        list(loader)
    ids = [shards.id(index) for index in range(shards.first_sample[bad], shards.first_sample[bad + 1])]
    (tmp_path / "bad.txt").write_text("\n".join(ids) + "\n")
    by_ids = read_quarantine(tmp_path / "bad.txt", shards)
    (line,) = [line for line in str(error.value).splitlines() if line.startswith("    ")]
    (tmp_path / "bad.txt").write_text(line)
    assert read_quarantine(tmp_path / "bad.txt", shards) == by_ids
    quarantine = read_quarantine(tmp_path / "bad.txt", shards)
    (loader,) = loaders(reopened, 1, 1, 1, num_steps=NUM_SAMPLES, quarantine=quarantine)
    assert sum(len(list(documents(batch))) for batch in loader) == NUM_SAMPLES - len(ids)
    (tmp_path / "bad.txt").write_text("nobody")
    with pytest.raises(DataError, match="'nobody'"):
        read_quarantine(tmp_path / "bad.txt", shards)


def test_stopping_early_leaves_no_thread_behind(style: Any) -> None:
    import threading

    (loader,) = loaders(style, 1, 1, 2)
    batches = iter(loader)
    next(batches)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    batches.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


def test_a_damaged_sample_stops_the_run_and_is_named(style: Any, tmp_path: Path) -> None:
    model, encoder, shards = style
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in Path(shards.folders[0]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    file = folder / "train-00000.parquet"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    (loader,) = loaders((model, encoder, open_shards(folder)), 1, 1, 1)
    ((first,),) = ids_at(loader.schedule, 0, 0)[0]
    with pytest.raises(DataError, match=f"sample '{first}' .*row group 0"):
        list(loader)


def test_shards_of_another_template_are_refused(style: Any) -> None:
    model, _, shards = style
    other = load_encoder(str(model.name_or_path), EncodingConfig(chat_template="gemma4_v2"))
    with pytest.raises(DataError, match="another tokenizer, chat template"):
        loaders((model, other, shards), 1, 1, 1)


class CountingShards(Shards):
    """Counts the row groups that are read."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.row_groups_read: list[int] = []

    def read_row_group(self, row_group: int) -> Any:
        self.row_groups_read.append(row_group)
        return super().read_row_group(row_group)


@pytest.fixture
def counting(style: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CountingShards:
    """120 rows, a few to a row group."""
    model, _, _ = style
    monkeypatch.setattr(sharding, "ROW_GROUP_BYTES", 2500)
    shard_rows(tmp_path, str(model.name_or_path), [row(number) for number in range(120)])
    return CountingShards([str(tmp_path / "shards")], None, Fetcher(None, 0))


@PACKING
@pytest.mark.parametrize("num_workers", [0, 1, 8])
def test_each_row_group_is_read_once_by_one_rank(
    style: Any, counting: CountingShards, packing: bool, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the blocks between two ranks."""
    for name in ("BLOCK_SAMPLES", "PACKED_BLOCK_SAMPLES"):
        monkeypatch.setattr(schedule_module, name, 12)
    num_row_groups = len(counting.row_group_samples)
    ranks = loaders(
        (None, style[1], counting), 2, 1, 2, packing=packing, packing_length=400 if packing else None,
        num_workers=num_workers,
    )  # fmt: skip
    shares = []
    for rank in ranks:
        rank.num_steps = rank.schedule.steps_per_epoch
        counting.row_groups_read.clear()
        list(rank)
        assert len(set(counting.row_groups_read)) == len(counting.row_groups_read)
        shares.append(len(counting.row_groups_read))
    largest_block = max(
        len(rank.schedule.row_groups(BlockId(0, b))) for b in range(len(rank.schedule._sources[0].blocks))
    )
    assert num_row_groups <= sum(shares) <= num_row_groups + largest_block
    assert max(shares) < 0.65 * num_row_groups


def test_only_a_few_steps_are_fetched_ahead(
    style: Any, counting: CountingShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEPS_AHEAD", 2)
    (loader,) = loaders((None, style[1], counting), 1, 1, 1, num_steps=100, num_workers=1)
    batches = iter(loader)
    next(batches)
    assert len(counting.row_groups_read) <= 6
    batches.close()  # type: ignore[attr-defined]
