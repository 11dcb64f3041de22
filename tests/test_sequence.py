"""A pack over several ranks: losses and gradients are those of one process that has all of it.

This file is also what each rank runs: torch.distributed.run … -m tests.test_sequence FOLDER STYLE:WINDOW=MODEL …
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoProcessor

from gemma_dist import world
from gemma_dist.batch_plan import BatchPlan, batch_plan
from gemma_dist.config import ModelConfig
from gemma_dist.data.encoded import IGNORE_INDEX
from gemma_dist.errors import ConfigError
from gemma_dist.model import sequence
from gemma_dist.model.images import IMAGE_PLACES, SOFT_TOKENS
from gemma_dist.model.load import load_model
from gemma_dist.model.sequence import Exchange, Share
from gemma_dist.plan.activations import Activations
from gemma_dist.plan.estimate import ACTIVATIONS
from gemma_dist.plan.geometry import read_geometry
from gemma_dist.plan.margin import GIB
from gemma_dist.plan.run import Request, make_plan
from gemma_dist.plan.weights import placement
from gemma_dist.plan.workload import workload
from gemma_dist.recipe import load_config
from gemma_dist.stream.collate import ControlIds, Sample, collate_packs, control_ids
from gemma_dist.stream.cut import cut
from gemma_dist.topology import Topology, write_recipe_into
from gemma_dist.train.offload import activations_on_host
from tests.support.documents import document
from tests.support.ranks import ENVIRONMENT, REPOSITORY, long
from tests.support.steps import Counting, measure, prepare

# Documents as `document` takes them, for windows of 16 tokens. Two ranks cut in the middle of all rows.
TEXT, LONG = (23,), (70,)
IMAGE = (6, "<", (2, 2), ">", 9)
PACKS: dict[str, list[list[tuple[Any, ...]]]] = {
    "text": [[TEXT, (5,), LONG]],
    "a document of many windows": [[(151,)]],
    "an image over the cut": [[TEXT, (20, "<", (5, 4), ">", 30), (5,)]],
    "an image over the cut that ends its document": [[(30, "<", (5, 4)), ((2, 3), ">", 35)]],
    "images that touch at the cut": [[(20, "<", (5, 4)), ((5, 4), ">", 20)]],
    "images back to back": [[(30, "<", (3, 3), ">", "<", (2, 4), ">", 4), LONG, IMAGE]],
    "images on one rank": [[(60,), IMAGE, IMAGE]],
    "no image, and no start in the second slice": [[(90,)]],
    "two rows": [[LONG, IMAGE, (5,)], [(4, "<", (3, 2)), TEXT]],
    "one token a rank": [[]],
}
SOME = ("an image over the cut", "two rows")
QUICK = {("e4b", 16): SOME, ("31b", 16): tuple(PACKS), ("26b", 16): SOME}
EVERY = {("e4b", 16): tuple(PACKS), ("31b", 16): tuple(PACKS), ("26b", 16): SOME, ("12b", 16): SOME}
CASES = EVERY if "LONG_TESTS" in os.environ else QUICK
FOUR = ("31b", 16)
HOW = ("kept", "recomputed", "offloaded")  # activations
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-5}  # norms and rotations have the digits of float32 in both


def dtype_of(style: str) -> torch.dtype:
    """float64; of 26b not, for whose experts there is no such kernel."""
    return torch.float32 if style == "26b" else torch.float64


def model_with_window(tiny_model: Callable[..., Path], style: str, window: int, folder: Path) -> Path:
    copy = folder / f"{style}-{window}"
    shutil.copytree(tiny_model(style), copy)
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["sliding_window"] = window
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def start_ranks(num_ranks: int, folder: Path, models: list[Path]) -> dict[str, dict[str, float]]:
    """What the ranks found."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", num_ranks]
    words += ["-m", "tests.test_sequence", folder, *models]
    run = subprocess.run(
        list(map(str, words)),
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-8000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def of_two(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """The figures of two ranks, with all models of the cases that are run."""
    folder = tmp_path_factory.mktemp("two")
    return start_ranks(2, folder, [model_with_window(tiny_model, *style, folder) for style in CASES])


@pytest.fixture(scope="module")
def of_four(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("four")
    return start_ranks(4, folder, [model_with_window(tiny_model, *FOUR, folder)])


@pytest.mark.timeout(600)  # the first one waits for the ranks
@pytest.mark.parametrize(
    ("style", "window", "case"),
    [
        pytest.param(*style, case, marks=[long] * (case not in QUICK.get(style, ())))
        for style, cases in EVERY.items()
        for case in cases
    ],
)
def test_two_ranks_find_the_loss_and_the_gradients_of_one(
    of_two: dict[str, dict[str, float]], style: str, window: int, case: str
) -> None:
    for how in HOW if case in SOME else ("kept",):
        figures = of_two[f"{style}-{window}: {case}, {how}"]
        assert max(figures.values()) <= LIMITS[dtype_of(style)], (how, figures)


@long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", PACKS)
def test_four_ranks_find_them_as_well(of_four: dict[str, dict[str, float]], case: str) -> None:
    """Also with an image on three of them, and windows that reach over a whole rank."""
    figures = of_four[f"31b-16: {case}, kept"]
    assert max(figures.values()) <= LIMITS[torch.float64], figures


@pytest.fixture(scope="module")
def ids(tiny_model: Callable[..., Path]) -> ControlIds:
    return control_ids(AutoProcessor.from_pretrained(tiny_model("31b")))


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize("case", PACKS)
def test_the_shares_are_the_pack(ids: ControlIds, case: str, num_ranks: int) -> None:
    packs = [[document(ids, *parts) for parts in pack] for pack in PACKS[case]]
    whole = collate_packs(packs, ids, filler=False)
    shares = [cut(whole, ids, rank, num_ranks) for rank in range(num_ranks)]
    assert len({share["input_ids"].shape for share in shares}) == 1, "equal work"
    length = whole["input_ids"].numel()
    for name in ("input_ids", "position_ids", "mm_token_type_ids"):
        assert torch.equal(torch.cat([share[name][0] for share in shares])[:length], whole[name].flatten())
    targets = torch.cat([share["shift_labels"][0] for share in shares])
    assert torch.equal(targets[: length - 1], whole["labels"].flatten()[1:])
    assert (targets[length - 1 :] == IGNORE_INDEX).all()
    for share in shares:
        is_image = share["mm_token_type_ids"][0] != 0
        assert torch.equal(share[IMAGE_PLACES], is_image.nonzero()[:, 0])
        assert len(share[SOFT_TOKENS]) == is_image.sum()
        most = share["image_position_ids"].shape[1] // ids.patches.pooling**2
        assert all(0 <= token < most * len(share["pixel_values"]) for token in share[SOFT_TOKENS].tolist())


def test_a_slice_gets_the_keys_that_it_sees_and_no_others() -> None:
    """A pack of 32 tokens over four ranks: documents of 12 and 20, an image over the third cut."""
    images = [0] * 20 + [7] * 6 + [0] * 6
    share = Share(0, 8, [(0, 12), (12, 32)], images)
    of_global = [range(0, 8), range(0, 16), range(12, 24), range(12, 32)]
    assert share.seen(None, whole_images=True) == of_global
    of_sliding = [range(0, 8), range(5, 16), range(13, 26), range(21, 32)]
    assert share.seen(4, whole_images=True) == of_sliding
    assert share.seen(4, whole_images=False)[2] == range(13, 24)
    sent = [Exchange(rank, 8, of_sliding, None).num_sent for rank in range(4)]
    received = [Exchange(rank, 8, of_sliding, None).num_received for rank in range(4)]
    assert torch.tensor(sent).T.tolist() == received
    assert [sum(row) for row in received] == [len(needed) for needed in of_sliding]


def test_under_autocast_no_kernel_and_no_exchange_takes_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside float32 weights rotated queries and keys are float32, and torch's `causal_lower_right`, on GPUs, goes to
    its kernel without autocast."""
    seen: list[torch.dtype] = []

    def take(*states: torch.Tensor, **_: object) -> torch.Tensor:
        seen.extend(each.dtype for each in states)
        return states[0]

    monkeypatch.setattr(sequence._Exchanged, "apply", lambda states, _: take(states))
    monkeypatch.setattr(sequence, "scaled_dot_product_attention", take)
    layer: Any = SimpleNamespace(layer_type="full_attention", num_key_value_groups=2)
    exchange = Exchange(0, 4, [range(4)], None)
    parts: sequence.Parts = {"full_attention": sequence.Documents(exchange, [4], [4], [None])}
    query, key, value = torch.ones(1, 2, 4, 8), torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        sequence.sequence_attention(layer, query, key, value, None, parts=parts, dropout=0.0, scaling=1.0)
    assert seen == [torch.bfloat16] * 4  # what is exchanged; queries, keys, values


def test_a_rank_trains_on_the_batches_of_its_group() -> None:
    """As many groups as data-parallel ranks of another run see the same batches."""
    shared, plain = BatchPlan(8, 1, 2, 4, sequence_parallel_size=4), BatchPlan(2, 1, 2, 4)
    assert shared.data_world_size == plain.world_size
    assert [shared.data_rank(rank) for rank in range(8)] == [0] * 4 + [1] * 4
    assert str(shared).startswith("global batch 4 = 2 groups of 4 ranks (train.sequence_parallel_size) x 1 micro-batch")


@pytest.mark.parametrize(
    ("settings", "num_ranks", "message"),
    [
        (["train.packing=false"], 2, r"sequence_parallel_size: 2, but packing is off.* set\s+train.packing: true"),
        (["model.attn_implementation=eager"], 2, r"attn_implementation: eager, but .* set it to sdpa, or remove it"),
        ([], 3, r"2 does not divide the 3 ranks of this launch; use 1 or 3, or start a multiple of 2 processes"),
        ([], 1, r"2 does not divide the 1 rank of this launch; use 1, or start a multiple of 2 processes"),
        (["global_batch_size=3"], 4, r"global batch 3 is not a multiple of 2 groups of 2 ranks .*= 2; use 2 or 4"),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings: list[str], num_ranks: int, message: str) -> None:
    recipe = REPOSITORY / "launch" / "cpu_full.yaml"
    words = ["train.packing=true", "per_device_train_batch_size=1", "train.sequence_parallel_size=2"]
    words += ["global_batch_size=null", "gradient_accumulation_steps=null", *settings]
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        batch_plan(load_config(recipe, words), num_ranks)


def test_deepspeed_is_told_the_batch_as_it_counts_ranks() -> None:
    words = ["train.packing=true", "per_device_train_batch_size=2", "train.sequence_parallel_size=2"]
    words += ["global_batch_size=8", "gradient_accumulation_steps=null"]
    config = load_config(REPOSITORY / "launch" / "cpu_full.yaml", words)
    plan, deepspeed = batch_plan(config, 4), dict[str, Any]()
    write_recipe_into(deepspeed, config, plan)
    per_rank = deepspeed["train_micro_batch_size_per_gpu"] * deepspeed["gradient_accumulation_steps"]
    assert deepspeed["train_batch_size"] == per_rank * 4


@long
def test_a_layer_has_one_exchange_each_way(tmp_path: Path) -> None:
    """And a micro-batch no other, nor a wait for the device in our code."""
    prepare(tmp_path, "31b")
    found = measure(tmp_path, Counting("cpu_ddp", packing=True, sequence=2))
    layers = json.loads((tmp_path / "model" / "config.json").read_text())["text_config"]["num_hidden_layers"]
    assert found["micro_batch"]["collectives"] == {"gemma_dist": 2 * layers}
    assert found["micro_batch"]["waits"] == {}
    assert found["end"]["collectives"] == {"gemma_dist": 1}


@pytest.mark.parametrize(("model", "hidden_states", "others"), [("31B", 9.84, 1.0), ("E4B", 3.28, 0.5)])
def test_the_plan_of_128k_tokens_over_eight_ranks(model: str, hidden_states: float, others: float) -> None:
    """GiB of each rank: checkpointed hidden states an eighth, keys and values of a global layer whole."""
    words = [f"model_name_or_path=google/gemma-4-{model}-it", "packing=true", "data.train=none"]
    words += ["packing_length=131072", "per_device_train_batch_size=1", "global_batch_size=null"]
    words += ["gradient_accumulation_steps=null", "sequence_parallel_size=8"]
    config, topology = load_config(REPOSITORY / "launch" / "31b_lora_zero3.yaml", words), Topology("", 8, "MULTI_GPU")
    batch = workload(config, topology).batch
    assert (batch.num_tokens, batch.whole_tokens) == (16_384, 131_072)
    geometry = read_geometry(config.model.model_name_or_path)
    activations = Activations(geometry, config, placement(config, has_images=False), batch)
    held = len(geometry.layers) * activations.hidden_values * activations.stream / GIB
    assert held == pytest.approx(hidden_states, rel=0.01)
    layer = next(layer for layer in geometry.layers if layer.is_full)
    assert activations._kept_of_others(layer) / GIB == pytest.approx(others)
    alone = config.model_copy(update={"train": config.train.model_copy(update={"sequence_parallel_size": 1})})
    peaks = [make_plan(of, topology).estimate.parts[ACTIVATIONS] for of in (config, alone)]
    assert peaks[0] < peaks[1] / 5
    with pytest.raises(ConfigError, match=r"--simulate runs a step of one process, .* is 8; leave one of the two out"):
        make_plan(config, topology, request=Request(simulate=True))


# ---- what each rank runs ----


def compared(whole: Any, shared: Any, packs: list[list[Sample]], ids: Any, *, offloaded: bool) -> dict[str, float]:
    """How far the summed loss and gradients of all ranks are from those of the whole pack."""
    size, rank = world.world_size(), world.rank()
    batch = with_images_as(whole.dtype, collate_packs(packs, ids))
    labels, _ = batch.pop("labels"), batch.pop("kinds")
    logits = whole(**batch, use_cache=False).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    share = with_images_as(whole.dtype, cut(collate_packs(packs, ids, filler=False), ids, rank, size))
    targets, _ = share.pop("shift_labels"), share.pop("shift_kinds")
    with activations_on_host() if offloaded else contextlib.nullcontext():
        logits = shared(**share, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    for model, its_loss in ((whole, expected), (shared, loss)):
        model.zero_grad()
        its_loss.backward()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in shared.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys(), got.keys() ^ wanted.keys()  # every rank runs every part
    least = max(float(gradient.norm()) for gradient in wanted.values()) / 1000
    worst = 0.0
    for name, gradient in got.items():
        torch.distributed.all_reduce(gradient)
        distance = float((gradient - wanted[name]).norm())
        worst = max(worst, distance / max(float(wanted[name].norm()), least, 1e-9))
    error = (total - expected).abs() / expected.abs().clamp(min=1e-9)
    return {"loss": float(error.detach()), "gradients": worst}


def with_images_as(dtype: torch.dtype, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with its images in another dtype."""
    is_float = {name: torch.is_tensor(value) and value.is_floating_point() for name, value in batch.items()}
    return {name: value.to(dtype) if is_float[name] else value for name, value in batch.items()}


def main(folder: Path, models: list[Path]) -> None:
    world.connect()
    size, figures = world.world_size(), {}
    for path in models:
        style, _, window = path.name.rpartition("-")
        cases = CASES[style, int(window)]
        settings = ModelConfig(model_name_or_path=str(path), dtype="float32")
        ids = control_ids(AutoProcessor.from_pretrained(path))
        whole = load_model(settings, None, packing=True).train().to(dtype_of(style))
        shared = load_model(settings, None, packing=True, sequence_parallel_size=size).train().to(dtype_of(style))
        for how in HOW[: 3 if size == 2 else 1]:
            if how == "recomputed":
                shared.gradient_checkpointing_enable({"use_reentrant": False})
            for case in cases if how == "kept" else SOME:
                samples = [[document(ids, *parts) for parts in pack] for pack in PACKS[case]]
                figures[f"{path.name}: {case}, {how}"] = compared(
                    whole, shared, samples, ids, offloaded=how == "offloaded"
                )
    if world.rank() == 0:
        (folder / "found.json").write_text(json.dumps(figures, indent=1))
    world.disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), list(map(Path, sys.argv[2:])))
