"""The operations that a step needs: the arithmetic against torch's own count of real steps, and what is said of it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gemma_dist.config import RunConfig
from gemma_dist.family import hub_name
from gemma_dist.model.head import IDS, inputs_of_model, use_target_head
from gemma_dist.model.load import add_adapter, load_model
from gemma_dist.model.towers import unneeded_towers
from gemma_dist.plan.batch import full_batch
from gemma_dist.plan.flops import StepFlops
from gemma_dist.plan.geometry import PATCHES_A_TOKEN, read_geometry
from gemma_dist.plan.margin import GIB
from gemma_dist.plan.watch import PlanWatch
from gemma_dist.recipe import load_config
from gemma_dist.resolve import Run, resolve
from gemma_dist.topology import Topology
from gemma_dist.train.feed import Batch
from gemma_dist.train.memory import Gpu
from tests.support.corpus import row, shard_rows

ROOT = Path(__file__).parents[1]
NUM_TOKENS, SOFT_TOKENS = 96, 6
PLAIN = ("attn_implementation=eager", "gradient_checkpointing=false", "packing=false", "model.ple=gpu")
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB)


def counted(config: RunConfig, batch: Batch, num_images: int) -> int:
    """What torch counts of a step on a micro-batch."""
    without = unneeded_towers(frozen=config.tuning != "full", has_images=num_images > 0)
    model = load_model(config.model, config.quantization, packing=False, without=without)
    model.set_experts_implementation("eager")  # torch has no formula for its grouped products
    use_target_head(model)
    if config.lora is not None:
        model = add_adapter(model, config.lora, zero3=False)
    formulas = {torch.ops.aten.addmm_: lambda _, a, b, *rest, **more: 2 * a[0] * a[1] * b[1]}  # as TRL's head adds up
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        (-model.train()(**inputs_of_model(batch)).log_probs.sum()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("style", "recipe", "num_images", "more"),
    [
        ("e4b", "cpu_full", 0, ()),
        ("e2b", "cpu_lora", 0, ()),
        ("e4b", "cpu_lora", 2, (r"lora.target_modules=.*language_model.layers.[1-5].mlp.down_proj",)),
        ("26b", "cpu_full", 0, ()),
        ("26b", "cpu_lora", 0, ()),
        ("31b", "cpu_full", 2, ()),
        ("12b", "cpu_lora", 2, ()),
    ],
)
def test_a_step_needs_what_torch_counts(
    tiny_model: Callable[..., Path], style: str, recipe: str, num_images: int, more: tuple[str, ...]
) -> None:
    words = [f"model_name_or_path={tiny_model(style)}", "data.train=none", *PLAIN, *more]
    config = load_config(ROOT / "launch" / f"{recipe}.yaml", [*words, "per_device_train_batch_size=1"])
    geometry = read_geometry(config.model.model_name_or_path)
    flops = StepFlops.of(geometry, config)
    batch = full_batch(config, num_tokens=NUM_TOKENS, num_images=num_images, tokens_per_image=SOFT_TOKENS)
    num_tokens, num_targets = batch["input_ids"].numel(), len(batch[IDS])
    soft_tokens = SOFT_TOKENS if num_images else 1  # of a filler, which full tuning has
    seen = len(batch.get("pixel_values", ()))
    patches = PATCHES_A_TOKEN * soft_tokens
    counts = {  # eager attention looks at all pairs
        "token": num_tokens,
        "pair": num_tokens**2,
        "pair in window": num_tokens**2,
        "patch": seen * patches,
        "pair of patches": seen * patches**2,
        "soft token": seen * soft_tokens,
    }
    needed = sum(each * counts[unit] for unit, each in flops.of_each.items()) + flops.a_target * num_targets
    logits_again = 2 * num_targets * geometry.hidden * geometry.vocabulary  # TRL's head keeps none
    pooling = 0  # which transformers does by a product
    if geometry.vision is not None and not geometry.is_unified:
        passes = 2 if config.tuning == "full" else 1
        pooling = passes * seen * 2 * patches * soft_tokens * geometry.vision.hidden
    assert counted(config, batch, num_images) == needed + logits_again + pooling


def test_the_pairs_of_a_trajectory_are_those_that_see_one_another() -> None:
    window = 5
    lengths, soft_tokens, images = np.array([1, 3, 5, 6, 17]), np.array([0, 0, 2, 0, 6]), np.array([0, 0, 1, 0, 2])
    behind = [np.arange(length)[:, None] - np.arange(length) for length in lengths]
    expected = {
        "token": lengths.sum(),
        "pair": sum((one >= 0).sum() for one in behind),
        "pair in window": sum(((one >= 0) & (one < window)).sum() for one in behind),
        "patch": 9 * 8,
        "pair of patches": 18**2 + 2 * 27**2,
        "soft token": 8,
    }
    for unit, count in expected.items():
        assert StepFlops(window, {unit: 10}, a_target=0).needed(lengths, 7, soft_tokens, images) == 10 * count
    assert StepFlops(window, {}, a_target=3).needed(lengths, 7, soft_tokens, images) == 21


def test_of_experts_those_count_that_are_chosen_and_a_frozen_base_has_no_gradients_of_weights() -> None:
    """By what the names of the models say of their parameters."""

    def a_token(recipe: str, size: str) -> float:
        config = load_config(ROOT / "launch" / recipe, [f"model_name_or_path={hub_name(size)}"])
        return StepFlops.of(read_geometry(hub_name(size)), config).of_each["token"]

    assert 4 * 2.5e9 < a_token("26b_qlora.yaml", "26B-A4B") < 4 * 4.5e9
    assert 4 * 28e9 < a_token("31b_qlora_80gb.yaml", "31B") < 4.2 * 31e9
    full, adapter = (a_token(f"e4b_{name}.yaml", "E4B") for name in ("full_zero3_offload", "lora_zero2"))
    assert 1.4 < full / adapter < 1.5, "three passes beside two, and the adapter's own"


# ---- what is said of it ----------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, model: str) -> Run:
    shard_rows(tmp_path, model, [row(number) for number in range(4)])
    words = [f"model_name_or_path={model}", f"data.train={tmp_path}/shards", "bf16=true"]
    words += ["per_device_train_batch_size=1", "global_batch_size=2"]
    return resolve(load_config(ROOT / "launch" / "cpu_lora.yaml", words), Topology(""))


def test_a_line_has_the_memory_and_the_share_of_a_known_gpu(run: Run) -> None:
    watch = PlanWatch()
    watch.begin(run, H100)
    figures = watch.figures(range(2), 1e-3, 2 * GIB)
    assert figures["memory_gib"] == 2
    assert watch.planned_bytes is not None
    assert figures["memory_planned_gib"] == round(watch.planned_bytes / GIB, 2)
    flops, shards = StepFlops.of(read_geometry(run.config.model.model_name_or_path), run.config), run.schedule.shards
    needed = 0.0
    for batch in map(run.schedule.global_batch, range(2)):
        for sample in batch:  # one by one
            text, soft, images, targets = (
                np.array([getattr(shards, f"num_{name}")[sample]])
                for name in ("text_tokens", "image_tokens", "images", "target_tokens")
            )
            needed += flops.needed(text + soft, int(targets[0]), soft, images)
    assert figures["mfu"] == pytest.approx(needed / 1e-3 / 989.5e12, abs=1e-4)
    assert figures["mfu"] > 0
    assert watch.figures(range(2), 2e-3, 0)["mfu"] == pytest.approx(figures["mfu"] / 2, abs=1e-4)
    shared = PlanWatch()
    shared.begin(dataclasses.replace(run, topology=Topology("", 2)), H100)
    assert shared.figures(range(2), 1e-3, 0)["mfu"] == pytest.approx(figures["mfu"] / 2, abs=1e-4)


@pytest.mark.parametrize("name", ["Some GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"])
def test_of_an_unknown_gpu_and_of_other_dtypes_no_share_is_said(run: Run, name: str) -> None:
    watch = PlanWatch()
    watch.begin(run, Gpu(name, GIB))
    assert set(watch.figures(range(1), 1.0, GIB)) == {"memory_gib", "memory_planned_gib"}
    plain = run.config.model_copy(update={"train": run.config.train.model_copy(update={"bf16": False})})
    watch = PlanWatch()
    watch.begin(dataclasses.replace(run, config=plain), H100)
    assert "mfu" not in watch.figures(range(1), 1.0, GIB)
