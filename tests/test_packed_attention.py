"""Packs: every document gets the logits and gives the gradients that it has alone, at a cost without a T x T in it."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoProcessor

from gemma_dist.config import ModelConfig
from gemma_dist.model.attention import find_documents
from gemma_dist.model.load import load_model
from gemma_dist.stream.collate import ControlIds, Sample, collate, collate_packs, control_ids
from tests.support.documents import document

Batch = dict[str, torch.Tensor]
Tensors = dict[str, torch.Tensor]

# Documents as `document` takes them. Most are longer than the small window, one image too (20 soft tokens).
TEXT, SHORT, LONG = (23,), (5,), (70,)
IMAGE = (6, "<", (2, 2), ">", 9)
ENDS_IN_IMAGE = (11, "<", (5, 4), ">")
BARE_END, BARE_START = (4, "<", (3, 2)), ((2, 3), ">", 5)  # soft tokens that would touch in a pack
BACK_TO_BACK = (3, "<", (3, 3), ">", "<", (2, 4), ">", 4)
LATE_IMAGE = (40, "<", (5, 4), ">", 30)

PACKS: dict[str, list[list[tuple[Any, ...]]]] = {
    "text": [[TEXT, SHORT, LONG]],
    "one": [[IMAGE]],
    "images": [[TEXT, IMAGE, BACK_TO_BACK, LATE_IMAGE]],
    "ends in an image": [[SHORT, IMAGE, ENDS_IN_IMAGE]],
    "images at the boundaries": [[ENDS_IN_IMAGE, BARE_END, BARE_START, BARE_START, TEXT]],
    "two rows": [[LONG, IMAGE, SHORT], [BARE_END, TEXT]],
    "an empty pack": [[], [SHORT, IMAGE]],
    "filler": [[TEXT, LONG], [SHORT]],
}
SMALL_WINDOW = 16


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Loads a model of a style and a sliding window, with packing or as transformers has it; each call a fresh one."""

    def load(style: str, window: int, *, packing: bool, dtype: Any = "float32") -> Any:
        folder = tmp_path_factory.getbasetemp() / f"packed-{style}-{window}"
        if not folder.exists():
            shutil.copytree(tiny_model(style), folder)
            config = json.loads((folder / "config.json").read_text())
            config["text_config"]["sliding_window"] = window
            (folder / "config.json").write_text(json.dumps(config))
        return load_model(ModelConfig(model_name_or_path=str(folder), dtype=dtype), None, packing=packing)

    return load


@pytest.fixture(
    scope="module",
    params=[(style, window) for style in ("e4b", "31b") for window in (16, 512)]
    + [("26b", 16), ("12b", 16), ("e2b", 16)],
    ids=lambda param: "-".join(map(str, param)),
)
def pair(request: pytest.FixtureRequest, models: Callable[..., Any]) -> tuple[Any, Any]:
    """The same weights twice: with packing, and as transformers has it."""
    return models(*request.param, packing=True), models(*request.param, packing=False)


@pytest.fixture(scope="module")
def ids_of(tiny_model: Callable[..., Path]) -> Callable[[str], ControlIds]:
    return functools.cache(lambda style: control_ids(AutoProcessor.from_pretrained(tiny_model(style))))


@pytest.fixture
def ids(ids_of: Callable[[str], ControlIds], request: pytest.FixtureRequest) -> ControlIds:
    """Of the style of the test, which is a parameter of it or of the pair of models."""
    parameters = request.node.callspec.params
    return ids_of(parameters["style"] if "style" in parameters else parameters["pair"][0])


def forward(model: Any, batch: Batch, **changed: Any) -> torch.Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"} | changed
    return model(**inputs, use_cache=False).logits


def step(model: Any, batch: Batch) -> torch.Tensor:
    """Logits of `batch`, whose summed loss is added to the gradients of `model`."""
    logits = forward(model, batch)
    cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum").backward()
    return logits.detach()


def gradients(model: Any) -> Tensors:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def alone(model: Any, packs: list[list[Sample]], ids: ControlIds) -> list[list[torch.Tensor]]:
    """The logits of each document by itself; their gradients add up in `model`."""
    model.zero_grad()
    return [[step(model, collate([sample], ids))[0] for sample in pack] for pack in packs]


def documents_of(logits: torch.Tensor, packs: list[list[Sample]]) -> Iterator[tuple[int, int, torch.Tensor]]:
    for row, pack in enumerate(packs):
        start = 0
        for i, sample in enumerate(pack):
            end = start + len(sample.encoded.input_ids)
            yield row, i, logits[row, start:end]
            start = end


def assert_same_logits(logits: torch.Tensor, expected: list[list[torch.Tensor]], packs: list[list[Sample]]) -> None:
    for row, i, actual in documents_of(logits, packs):
        torch.testing.assert_close(actual, expected[row][i][: len(actual)], atol=1e-5, rtol=0, msg=packs[row][i].id)


def assert_same_gradients(actual: Tensors, expected: Tensors) -> None:
    """Each parameter's difference is within 1e-5 of the norm of its gradient."""
    for name in actual.keys() | expected.keys():
        zero = torch.zeros(())
        a, e = actual.get(name, zero), expected.get(name, zero)
        assert (a - e).norm() <= 1e-5 * e.norm() + 1e-9, name


@pytest.mark.parametrize("case", PACKS)
def test_a_pack_is_its_documents_each_alone(pair: tuple[Any, Any], ids: ControlIds, case: str) -> None:
    packed, plain = pair
    packs = [[document(ids, *parts) for parts in pack] for pack in PACKS[case]]
    expected = alone(plain, packs, ids)
    packed.zero_grad()
    logits = step(packed, collate_packs(packs, ids))
    assert logits.isfinite().all(), "padding too"
    assert_same_logits(logits, expected, packs)
    assert_same_gradients(gradients(packed), gradients(plain))


@pytest.mark.parametrize("style", ["e4b", "31b", "12b"])
def test_recomputing_layers_under_an_adapter_changes_no_gradient(
    models: Callable[..., Any], ids: ControlIds, style: str
) -> None:
    from peft import LoraConfig, get_peft_model

    packs = [[document(ids, *parts) for parts in pack] for pack in PACKS["images"]]
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj", init_lora_weights=False)
    adapted = []
    for packing in (True, False):
        torch.manual_seed(0)
        adapted.append(get_peft_model(models(style, SMALL_WINDOW, packing=packing), config).train())
    packed, plain = adapted
    expected = alone(plain, packs, ids)
    packed.gradient_checkpointing_enable({"use_reentrant": False})
    packed.enable_input_require_grads()
    with counting_attention() as calls:
        logits = forward(packed, batch := collate_packs(packs, ids))
        once = len(calls)
        cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum").backward()
    assert len(calls) > 1.5 * once, "the layers were recomputed"
    assert_same_logits(logits.detach(), expected, packs)
    assert_same_gradients(gradients(packed), gradients(plain))
    assert any("lora" in name for name in gradients(packed))


@contextmanager
def counting_attention() -> Iterator[list[int]]:
    """The scores (queries x keys) of each call of a scaled dot product while it is open."""
    calls: list[int] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(query.shape[-2] * key.shape[-2])
        return real(query, key, *args, **kwargs)

    with patch("torch.nn.functional.scaled_dot_product_attention", counted):
        yield calls


@pytest.mark.parametrize("style", ["e4b", "31b"])
def test_bfloat16_is_as_near_as_its_digits(models: Callable[..., Any], ids: ControlIds, style: str) -> None:
    packs = [[document(ids, *parts) for parts in pack] for pack in PACKS["two rows"]]
    packed = models(style, SMALL_WINDOW, packing=True, dtype="bfloat16")
    plain = models(style, SMALL_WINDOW, packing=False, dtype="bfloat16")
    exact = models(style, SMALL_WINDOW, packing=False, dtype="float32")
    with torch.no_grad():
        logits = forward(packed, collate_packs(packs, ids))
        assert logits.dtype == torch.bfloat16
        for row, i, actual in documents_of(logits, packs):
            alone = collate([packs[row][i]], ids)
            expected = forward(plain, alone)[0, : len(actual)].float()
            rounding = (expected - forward(exact, alone)[0, : len(actual)]).abs()
            difference = (actual.float() - expected).abs()
            assert difference.mean() <= rounding.mean()
            assert difference.max() <= 2 * rounding.max()


def test_the_comparison_sees_a_leak(pair: tuple[Any, Any], ids: ControlIds) -> None:
    """What packs cost without this: a document that sees the one before it."""
    _, plain = pair
    packs = [[document(ids, *TEXT), document(ids, *IMAGE)]]
    batch = collate_packs(packs, ids)
    expected = alone(plain, packs, ids)
    with torch.no_grad():
        logits = forward(plain, batch, attention_mask=torch.ones_like(batch["input_ids"]))
    first, second = (actual for _, _, actual in documents_of(logits, packs))
    torch.testing.assert_close(first, expected[0][0][: len(first)], atol=1e-5, rtol=0)
    assert (second - expected[0][1]).abs().max() > 0.1


class LargestTensor(TorchDispatchMode):
    """The most elements of a tensor that any operation gives back while it is open."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_nothing_of_the_size_of_a_squared_pack_is_made(pair: tuple[Any, Any], ids: ControlIds) -> None:
    packed, plain = pair
    samples = [document(ids, *parts) for parts in [TEXT, IMAGE, LONG, LATE_IMAGE] * 12]
    lengths = [len(sample.encoded.input_ids) for sample in samples]
    batch = collate_packs([samples], ids)
    length = batch["input_ids"].shape[1]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad(), LargestTensor() as largest, counting_attention() as calls:
        packed.model(**inputs, use_cache=False)
    assert largest.numel < length**2
    config = packed.config.text_config
    layers, vision = config.num_hidden_layers, getattr(packed.config.vision_config, "num_hidden_layers", 0)
    in_vision = vision * batch["pixel_values"].shape[0] * batch["pixel_values"].shape[1] ** 2
    assert sum(calls) <= layers * sum(n**2 for n in lengths) + in_vision
    with torch.no_grad(), LargestTensor() as largest:
        plain.model(**inputs, use_cache=False)
    assert largest.numel >= length**2, "transformers' own way makes one, so the measurement can fail"


def test_a_document_longer_than_the_window_needs_no_mask_of_its_square() -> None:
    length, window = 4096, 64
    positions = torch.arange(length)[None]
    (document,) = find_documents(positions, torch.zeros_like(positions), window)["sliding_attention"]
    assert [piece.queries for piece in document] == [slice(i, i + window) for i in range(0, length, window)]
    assert document[0].mask is None
    assert all(piece.mask.shape == (1, 1, window, 2 * window - 1) for piece in document[1:] if piece.mask is not None)
    seen = torch.zeros(length, length, dtype=torch.bool)
    for piece in document:
        mask = torch.ones(window, window).tril().bool() if piece.mask is None else piece.mask
        seen[piece.queries, piece.keys] = mask
    distance = positions.T - positions
    assert torch.equal(seen, (distance >= 0) & (distance < window))


def test_a_mask_is_refused(pair: tuple[Any, Any], ids: ControlIds) -> None:
    batch = collate([document(ids, *TEXT)], ids)
    with pytest.raises(AssertionError, match="a pack has no attention_mask"):
        forward(pair[0], batch)
