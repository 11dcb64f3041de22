"""One GPU of this machine beside its CPU, and beside itself: see the package's docstring."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from gemma_dist.config import ModelConfig
from gemma_dist.model.load import load_model
from gemma_dist.model.tiny import STYLES
from gemma_dist.stream.collate import collate, collate_packs, control_ids
from gemma_dist.train.feed import Feed, transfer_to
from tests.gpu.models import write_random_e4b
from tests.support.corpus import row, write_rows
from tests.support.documents import document
from tests.support.ranks import gemma_dist

ON_CPU = os.environ.get("GPU_TESTS_ON_CPU") == "1"
DEVICE = torch.device("cpu") if ON_CPU else torch.device("cuda", 0)
pytestmark = [
    pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="there is no GPU here"),
    pytest.mark.timeout(1800),  # the first step on a new card compiles kernels
]
PACKING_LENGTH = 1024 if ON_CPU else 4096
NUM_STEPS = 6
MEMORY = re.compile(r"planned ([0-9.]+) GiB, allocated ([0-9.]+) GiB .*?, reserved ([0-9.]+) GiB")
# Documents as `document` takes them, with an image inside, at the end and across the small windows of the tiny styles.
DOCUMENTS = [(23,), (6, "<", (2, 2), ">", 9), (70,), (11, "<", (5, 4), ">")]
# The largest difference of logits that a dtype may make: they lie within 30 (soft-capped).
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}


@pytest.fixture(scope="module", autouse=True)
def say_which() -> None:
    """The figures below belong to a card."""
    name = "the CPU" if ON_CPU else torch.cuda.get_device_name(DEVICE)
    print(f"\non {name}, torch {torch.__version__}")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Callable[[str], Path]:
    """Rows of very different length, with and without images, sharded for a tiny style."""

    def make(style: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"gpu-shards-{style}"
        if not folder.exists():
            folder.mkdir()
            rows = [row(number, num_calls=1 + 3 * (number % 3)) for number in range(24)]
            path = write_rows(folder / "rows.jsonl", rows)
            gemma_dist("shard", path, "--model", tiny_model(style), "--out", folder / "shards")
        return folder / "shards"

    return make


def run(recipe: str, model: Path, shards: Path, out: Path, *more: str, gpu: bool = not ON_CPU) -> list[dict[str, Any]]:
    """Train, and the lines of metrics.jsonl; what the command said is in `out`/said.txt."""
    settings = [f"model_name_or_path={model}", f"data.train={shards}", f"output_dir={out}"]
    said = gemma_dist("train", f"launch/{recipe}.yaml", *settings, *more, gpu=gpu, timeout=1500)
    (out / "said.txt").write_text(said)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_micro_batches_come_to_the_device_as_they_were_and_one_ahead() -> None:
    """Read while the next ones are copied over the memory of those that went before."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": torch.full((1, 4096), number),
            "attention_mask": torch.ones(1, 4096, dtype=torch.int64),
            "pixel_values": torch.rand(1 if ON_CPU else 8, 2520, 768, generator=generator),
        }
        for number in range(12)
    ]
    weight = torch.rand(768, 768, device=DEVICE)
    for number, batch in enumerate(Feed(batches, transfer_to(DEVICE))):
        for _ in range(1 if ON_CPU else 20):  # the device is still busy when the host asks for the next one
            batch["pixel_values"] @ weight
        for name in ("input_ids", "pixel_values"):
            assert batch[name].device.type == DEVICE.type
            assert torch.equal(batch[name].cpu(), batches[number][name]), name
    assert number == len(batches) - 1


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_step_in_4_bits_has_the_loss_of_the_cpu(
    style: str, packing: bool, tiny_model: Callable[..., Path], shards: Callable[[str], Path], tmp_path: Path
) -> None:
    """In float32, so that what differs is other code: bitsandbytes' kernels, the fused head in Triton, SDPA."""
    settings = ["max_steps=2", "global_batch_size=4", "per_device_train_batch_size=2"]
    if packing:
        settings += ["train.packing=true", f"packing_length={PACKING_LENGTH}", "per_device_train_batch_size=1"]
    there = run("cpu_qlora", tiny_model(style), shards(style), tmp_path / "gpu", *settings)
    here = run("cpu_qlora", tiny_model(style), shards(style), tmp_path / "cpu", *settings, gpu=False)
    for on_gpu, on_cpu in zip(there, here, strict=True):
        print(
            f"{style} step {on_gpu['step']}: loss {on_gpu['loss']:.6f}, {on_cpu['loss']:.6f} on the CPU; "
            f"grad {on_gpu['grad_norm']:.5f}, {on_cpu['grad_norm']:.5f}"
        )
        assert on_gpu["loss"] == pytest.approx(on_cpu["loss"], rel=1e-4)
        assert on_gpu["grad_norm"] == pytest.approx(on_cpu["grad_norm"], rel=1e-2)


@pytest.mark.parametrize(
    ("style", "on_gpu", "on_host"),
    [
        ("26b", "model.experts=gpu", "model.experts=host"),
        ("e4b", "model.ple=gpu", "model.ple=host"),
        ("e4b", "train.activation_offloading=false", "train.activation_offloading=true"),
    ],
)
def test_what_waits_on_the_host_arrives_whole_and_in_time(
    style: str,
    on_gpu: str,
    on_host: str,
    tiny_model: Callable[..., Path],
    shards: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Pinned memory, streams and events: a copy that is late gives another loss."""
    settings = ["max_steps=4", "global_batch_size=4", "gradient_checkpointing=true"]
    there, here = (
        run("cpu_qlora", tiny_model(style), shards(style), tmp_path / str(number), *settings, setting)
        for number, setting in enumerate((on_gpu, on_host))
    )
    for gpu, host in zip(there, here, strict=True):
        print(f"{on_host} step {gpu['step']}: loss {host['loss']:.6f}, {gpu['loss']:.6f} with {on_gpu}")
        assert host["loss"] == pytest.approx(gpu["loss"], rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("style", STYLES)
def test_packed_documents_have_the_logits_of_a_padded_batch(
    style: str, dtype: Any, tiny_model: Callable[..., Path]
) -> None:
    ids = control_ids(AutoProcessor.from_pretrained(tiny_model(style)))
    samples = [document(ids, *parts) for parts in DOCUMENTS]
    logits = {}
    for packing, batch in ((True, collate_packs([samples], ids)), (False, collate(samples, ids))):
        settings = ModelConfig(model_name_or_path=str(tiny_model(style)), dtype=dtype)
        model = load_model(settings, None, packing=packing).to(DEVICE)
        inputs = {name: tensor.to(DEVICE) for name, tensor in batch.items() if name not in ("labels", "kinds")}
        with torch.no_grad():
            logits[packing] = model(**inputs, use_cache=False).logits.float().cpu()
    start = 0
    for index, sample in enumerate(samples):
        length = len(sample.encoded.input_ids)
        difference = (logits[True][0, start : start + length] - logits[False][index, :length]).abs().max().item()
        print(f"{style} {dtype} document {index} ({length} tokens): logits differ by at most {difference:.1e}")
        assert difference <= TOLERANCE[dtype]
        start += length


def test_a_run_that_resumes_learns_what_an_uninterrupted_one_does(
    tiny_model: Callable[..., Path], shards: Callable[[str], Path], tmp_path: Path
) -> None:
    """Kernels that add atomically differ in the last bits from run to run: two uninterrupted runs set the measure."""
    model, corpus = tiny_model("e4b"), shards("e4b")
    settings = [f"max_steps={NUM_STEPS}", "save_steps=3", "save_total_limit=null", "global_batch_size=4"]
    weights = {}
    for name in ("once", "again"):
        run("cpu_qlora", model, corpus, tmp_path / name, *settings)
        weights[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "once" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    run("cpu_qlora", model, corpus, tmp_path / "resumed", *settings)
    weights["resumed"] = load_file(tmp_path / "resumed" / "adapter_model.safetensors")
    differences = {name: _difference(weights["once"], weights[name]) for name in ("again", "resumed")}
    print(
        f"from an uninterrupted run: another {differences['again']:.1e}, one that resumed {differences['resumed']:.1e}"
    )
    assert differences["resumed"] <= 10 * differences["again"] + 1e-6


def _difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The norm of the difference, relative to that of the first."""
    apart = torch.stack([(first[name].double() - second[name].double()).norm() for name in first]).norm()
    return (apart / torch.stack([tensor.double().norm() for tensor in first.values()]).norm()).item()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random model with the shapes of E4B, and a corpus of it."""
    folder = tmp_path_factory.mktemp("e4b")
    write_random_e4b(folder / "model", true_size=not ON_CPU, device=DEVICE)
    rows = [row(number, num_calls=1 + (2 if ON_CPU else 4) * (number % 5)) for number in range(40 if ON_CPU else 160)]
    path = write_rows(folder / "rows.jsonl", rows)
    gemma_dist("shard", path, "--model", folder / "model", "--out", folder / "shards")
    return folder / "model", folder / "shards"


def test_packing_gives_more_tokens_a_second_and_takes_the_memory_that_was_planned(
    large: tuple[Path, Path], tmp_path: Path
) -> None:
    """The median step of each, after the first two, which warm up."""
    model, corpus = large
    speeds = {}
    for name, settings in (
        ("packed", [f"packing_length={PACKING_LENGTH}", "global_batch_size=2"]),
        (
            "padded",
            [
                "train.packing=false",
                "train.packing_length=null",
                "per_device_train_batch_size=4",
                "global_batch_size=8",
            ],
        ),
    ):
        lines = run(
            "e4b_qlora_16gb", model, corpus, tmp_path / name, f"max_steps={4 if ON_CPU else NUM_STEPS}", *settings
        )
        speeds[name] = sorted(line["tokens_per_s"] for line in lines[2:])[len(lines[2:]) // 2]
    print(f"E4B shapes, QLoRA: {speeds['packed']:.0f} tokens/s packed, {speeds['padded']:.0f} padded")
    if ON_CPU:  # where the log plans for a GPU, and nothing is measured
        assert "planned for a GPU" in (tmp_path / "packed" / "said.txt").read_text()
        return
    assert speeds["packed"] > speeds["padded"]
    for name in speeds:
        (found,) = MEMORY.findall((tmp_path / name / "said.txt").read_text())
        planned, allocated, reserved = map(float, found)
        print(f"{name}: planned {planned} GiB, allocated {allocated} GiB, reserved {reserved} GiB")
        assert allocated == pytest.approx(planned, rel=0.1)
