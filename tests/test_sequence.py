"""A pack over several ranks: losses and gradients are those of one process that has all of it.

This file is also what each rank runs: torch.distributed.run … -m tests.test_sequence FOLDER STYLE:WINDOW=MODEL …
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoProcessor

from gemma_dist import world
from gemma_dist.config import ModelConfig
from gemma_dist.model.load import load_model
from gemma_dist.stream.collate import Sample, collate_packs, control_ids
from gemma_dist.stream.cut import cut
from tests.support.documents import document
from tests.support.ranks import ENVIRONMENT, REPOSITORY

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
CASES = {("e4b", 16): tuple(PACKS), ("31b", 16): tuple(PACKS), ("26b", 16): SOME, ("12b", 16): SOME, ("e2b", 512): SOME}
FOUR = ("31b", 16)
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
    """The figures of two ranks, with all models."""
    folder = tmp_path_factory.mktemp("two")
    return start_ranks(2, folder, [model_with_window(tiny_model, *style, folder) for style in CASES])


@pytest.fixture(scope="module")
def of_four(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("four")
    return start_ranks(4, folder, [model_with_window(tiny_model, *FOUR, folder)])


@pytest.mark.timeout(600)  # the first one waits for the ranks
@pytest.mark.parametrize(
    ("style", "window", "case"), [(*style, case) for style, cases in CASES.items() for case in cases]
)
def test_two_ranks_find_the_loss_and_the_gradients_of_one(
    of_two: dict[str, dict[str, float]], style: str, window: int, case: str
) -> None:
    for how in ("kept", "recomputed") if case in SOME else ("kept",):
        figures = of_two[f"{style}-{window}: {case}, {how}"]
        assert max(figures.values()) <= LIMITS[dtype_of(style)], (how, figures)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", PACKS)
def test_four_ranks_find_them_as_well(of_four: dict[str, dict[str, float]], case: str) -> None:
    """Also with an image on three of them, and windows that reach over a whole rank."""
    figures = of_four[f"31b-16: {case}, kept"]
    assert max(figures.values()) <= LIMITS[torch.float64], figures


# ---- what each rank runs ----


def compared(whole: Any, shared: Any, packs: list[list[Sample]], ids: Any) -> dict[str, float]:
    """How far the summed loss and gradients of all ranks are from those of the whole pack."""
    size, rank = world.world_size(), world.rank()
    batch = with_images_as(whole.dtype, collate_packs(packs, ids))
    labels = batch.pop("labels")
    logits = whole(**batch, use_cache=False).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    share = with_images_as(whole.dtype, cut(collate_packs(packs, ids, filler=False), ids, rank, size))
    targets = share.pop("shift_labels")
    loss = cross_entropy(shared(**share, use_cache=False).logits.flatten(0, 1), targets.flatten(), reduction="sum")
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
        for how, packs in (("kept", cases), ("recomputed", SOME if size == 2 else ())):
            if how == "recomputed":
                shared.gradient_checkpointing_enable({"use_reentrant": False})
            for case in packs:
                samples = [[document(ids, *parts) for parts in pack] for pack in PACKS[case]]
                figures[f"{path.name}: {case}, {how}"] = compared(whole, shared, samples, ids)
    if world.rank() == 0:
        (folder / "found.json").write_text(json.dumps(figures, indent=1))
    world.disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), list(map(Path, sys.argv[2:])))
