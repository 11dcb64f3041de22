"""Packs: every document gets the logits and gives the gradients that it has alone, at a cost without a T x T in it."""

import functools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoProcessor

from gemma_dist.config import ModelConfig
from gemma_dist.model.attention import Layout, Shape, add_calls, find_documents, lay_out, packed_attention
from gemma_dist.model.load import load_model
from gemma_dist.model.pieces import Heads, calls_of
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

    def load(style: str, window: int, *, packing: bool, dtype: Any = "float32", **settings: Any) -> Any:
        folder = tmp_path_factory.getbasetemp() / f"packed-{style}-{window}"
        if not folder.exists():
            shutil.copytree(tiny_model(style), folder)
            config = json.loads((folder / "config.json").read_text())
            config["text_config"]["sliding_window"] = window
            (folder / "config.json").write_text(json.dumps(config))
        config = ModelConfig(model_name_or_path=str(folder), dtype=dtype, **settings)
        return load_model(config, None, packing=packing)

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
    """Each parameter's difference is within 3e-5 of the norm of its gradient: what float32 rounds on processors without
    AVX-512, too."""
    for name in actual.keys() | expected.keys():
        zero = torch.zeros(())
        a, e = actual.get(name, zero), expected.get(name, zero)
        assert (a - e).norm() <= 3e-5 * e.norm() + 1e-9, name


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


HEADS = {"full_attention": Heads(4, 1), "sliding_attention": Heads(4, 2)}


def random_pack(seed: int, length: int = 4096) -> Layout:
    """Documents of any length, with images of any length."""
    random = np.random.default_rng(seed)
    positions: list[int] = []
    while len(positions) < length:
        longest = np.log(random.choice([30, 300, length]))
        positions += range(1 + int(np.exp(random.uniform(0, longest))))
    types = np.repeat(random.random(1000) < 0.5, random.integers(1, 100, 1000))[:length]
    return lay_out(torch.tensor([positions[:length]]), torch.from_numpy(types.astype(int))[None])


def test_a_document_longer_than_the_window_needs_one_mask_of_two_windows() -> None:
    length, window = 4096, 64
    shape = Shape(window, HEADS, sees_images=True)
    documents = find_documents(*add_calls(Layout([(0, length)], [0] * length), shape), shape, torch.float32)
    first, later = documents["sliding_attention"].groups
    assert (first.kind, first.rows, first.queries, first.keys) == ("causal", 1, window, window)
    assert (later.kind, later.rows, later.queries, later.keys) == ("band", length // window - 1, window, 2 * window)
    mask = documents["sliding_attention"].masks[1]
    assert mask is not None
    assert mask.shape == (1, 1, 2 * window, 2 * window), "for each of two query heads that share a key head"
    key = torch.arange(2 * window)
    for query in range(window):
        seen = (key >= query) & (key < query + window)  # the first key is `window - 1` tokens before the first query
        for row in mask[0, 0, 2 * query : 2 * query + 2]:
            assert torch.equal(row == 0, seen)
            assert (row[~seen] == -torch.inf).all()


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_packed_takes_a_few_calls_and_little_padding(seed: int) -> None:
    layout = random_pack(seed)
    for layer_type, calls in calls_of(layout.spans, layout.images, HEADS, 512).items():
        kinds = Counter(group.kind for group in calls.groups)
        assert max(kinds["causal"], kinds["band"]) <= 2
        assert max(kinds["short"], kinds["images"]) <= 1
        assert layer_type == "sliding_attention" or kinds["band"] + kinds["images"] == 0
        assert sum(group.rows * group.queries for group in calls.groups) <= 1.5 * 4096


def rule_of(layout: Layout, window: int) -> Tensors:
    """What each token of a pack sees, (T, T), by layer type."""
    length, image = len(layout.images), torch.tensor(layout.images)
    document = torch.cat([torch.full((end - start,), at) for at, (start, end) in enumerate(layout.spans)])
    behind = torch.arange(length)[:, None] - torch.arange(length)
    same_image = (image[:, None] == image) & (image > 0)
    inside = document[:, None] == document
    return {
        "full_attention": inside & (behind >= 0),
        "sliding_attention": inside & (behind < window) & ((behind >= 0) | same_image),
    }


@pytest.mark.parametrize("seed", [0, 8, 11])
def test_the_calls_of_any_pack_see_what_the_rule_says(seed: int) -> None:
    """The rule as one mask of the whole pack, beside what the calls let each head of it see."""
    window, layout = 512, random_pack(seed)
    shape = Shape(window, HEADS, sees_images=True)
    documents = find_documents(*add_calls(layout, shape), shape, torch.float32)
    length = 4096
    for layer_type, rule in rule_of(layout, window).items():
        calls, heads = documents[layer_type], HEADS[layer_type]
        queries = real_slots(calls.queries, length * heads.queries).split(
            [group.rows * group.queries * heads.queries for group in calls.groups]
        )
        keys = real_slots(calls.keys, length).split([group.rows * group.keys for group in calls.groups])
        seen = torch.zeros(length, length, dtype=torch.uint8)  # by the last query head
        for group, mask, query, key in zip(calls.groups, calls.masks, queries, keys, strict=True):
            share = heads.queries // heads.keys
            query = query.view(group.rows, group.queries, heads.queries)
            if mask is None:
                allowed = torch.ones(1, group.queries, group.keys, dtype=torch.bool).tril()
            else:  # query heads that share a key head stand one behind the other, key heads within
                allowed = mask[:, 0, share - 1 :: share] == 0
                assert torch.equal(allowed, mask[:, 0, ::share] == 0)
                grouped = query.unflatten(2, (share, heads.keys)) % heads.queries // share
                assert (grouped == torch.arange(heads.keys))[query.unflatten(2, (share, heads.keys)) >= 0].all()
            last = query[:, :, -1]
            assert (last[last >= 0] % heads.queries == heads.queries - 1).all()
            real = allowed & (last >= 0)[:, :, None] & (key.view(group.rows, 1, -1) >= 0)
            row, q, k = real.nonzero().T
            places = last[row, q] // heads.queries * length + key.view(group.rows, -1)[row, k]
            assert len(places) == len(places.unique()), "nothing is seen twice"
            seen.view(-1)[places] += 1
        assert torch.equal(seen, rule.to(torch.uint8)), layer_type


@pytest.mark.parametrize("seed", [0, 8, 11])
def test_attention_and_its_gradients_are_those_of_one_mask_over_the_pack(seed: int) -> None:
    layout, window = random_pack(seed, length=700), 64
    shape = Shape(window, HEADS, sees_images=True)
    documents = find_documents(*add_calls(layout, shape), shape, torch.float64)
    for layer_type, heads in HEADS.items():
        torch.manual_seed(seed)
        states = [
            torch.randn(1, count, 700, 8, dtype=torch.float64) for count in (heads.queries, heads.keys, heads.keys)
        ]
        ours, theirs = ([one.clone().requires_grad_() for one in states] for _ in range(2))
        module: Any = torch.nn.Module()
        module.layer_type, module.num_key_value_groups = layer_type, heads.queries // heads.keys
        output, _ = packed_attention(
            module, ours[0], ours[1], ours[2], None, documents=documents, dropout=0.0, scaling=1.0
        )
        query, key, value = theirs
        rule = rule_of(layout, window)[layer_type]
        expected = scaled_dot_product_attention(query, key, value, rule, scale=1.0, enable_gqa=True)
        torch.testing.assert_close(output, expected.transpose(1, 2))
        weights = torch.randn_like(output)
        (output * weights).sum().backward()
        (expected.transpose(1, 2) * weights).sum().backward()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad)


def real_slots(slots: Any, number: int) -> torch.Tensor:
    """Which of `number` stands in each slot, -1 where it is padding: nothing looks for it there."""
    if slots is None:
        return torch.arange(number)
    fills = slots.numbers.clone()
    looked_for = torch.arange(number)[:, None] == fills[slots.places[0]]
    real = torch.zeros(len(fills), dtype=torch.bool)
    real[slots.places[0][looked_for]] = True
    return torch.where(real, fills, -1)


def test_a_mask_is_refused(pair: tuple[Any, Any], ids: ControlIds) -> None:
    batch = collate([document(ids, *TEXT)], ids)
    with pytest.raises(AssertionError, match="a pack has no attention_mask"):
        forward(pair[0], batch)


@pytest.mark.parametrize(("style", "case"), [("e4b", "two rows"), ("31b", "images at the boundaries")])
def test_flex_attention_gives_the_same_logits(
    models: Callable[..., Any], ids: ControlIds, monkeypatch: pytest.MonkeyPatch, style: str, case: str
) -> None:
    """Forward: torch has no backward pass of it on a CPU. Not compiled, which takes half a minute."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    packs = [[document(ids, *parts) for parts in pack] for pack in PACKS[case]]
    batch = collate_packs(packs, ids)
    ours = models(style, SMALL_WINDOW, packing=True)
    flex = models(style, SMALL_WINDOW, packing=True, attn_implementation="flex_attention")
    with torch.no_grad(), counting_attention() as calls:
        expected = forward(ours, batch)
        counted = len(calls)
        torch.testing.assert_close(forward(flex, batch), expected, atol=2e-5, rtol=0)
    assert len(calls) - counted < counted, "the text layers take none of the other"
