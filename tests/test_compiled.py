"""Compiled layers compute what they do otherwise, with one graph break each and no new graphs for other packs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from transformers import AutoProcessor

from gemma_dist.config import ModelConfig
from gemma_dist.model.compiled import compile_layers
from gemma_dist.model.load import load_model
from gemma_dist.stream.collate import collate_packs, control_ids
from tests.support.documents import document

PACKS = ([(23,), (5,), (70,)], [(100,), (6, "<", (2, 2), ">", 9), (7,), (41,)])
TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def test_compiled_layers_give_the_same_gradients_without_new_graphs_for_other_packs(
    tiny_model: Callable[..., Path],
) -> None:
    """Of an adapter, with K/V shared between layers. Dynamo's graphs run as they are (`eager`)."""
    folder = tiny_model("e4b")
    ids = control_ids(AutoProcessor.from_pretrained(folder))
    models: list[Any] = []
    for _ in range(2):
        torch.manual_seed(0)
        model = load_model(ModelConfig(model_name_or_path=str(folder), dtype="float32"), None, packing=True)
        adapted: Any = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)).train()
        models.append(adapted)
    compile_layers(models[1], backend="eager")
    counters.clear()
    graphs = []
    for pack in PACKS:
        batch = collate_packs([[document(ids, *parts) for parts in pack]], ids)
        labels = batch.pop("labels")[:, 1:].flatten()
        del batch["kinds"]
        losses = []
        for model in models:
            model.zero_grad()
            logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            losses.append(cross_entropy(logits, labels))
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
        plain, compiled = (dict(model.named_parameters()) for model in models)
        for name, parameter in plain.items():
            if parameter.grad is not None:
                assert (compiled[name].grad - parameter.grad).norm() <= 1e-5 * parameter.grad.norm() + 1e-9, name
        graphs.append(counters["stats"]["unique_graphs"])
    print(f"{graphs[-1]} graphs, {sum(counters['graph_break'].values())} breaks")
    assert graphs[0] == graphs[-1] > 0
    assert counters["graph_break"]
    assert all("disable" in reason for reason in counters["graph_break"])


@torch.no_grad()  # FlexAttention has no backward pass on a CPU
def test_beside_flex_attention_compiled_layers_have_no_break(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("e4b")
    ids = control_ids(AutoProcessor.from_pretrained(folder))
    settings = ModelConfig(model_name_or_path=str(folder), dtype="float32", attn_implementation="flex_attention")
    model = load_model(settings, None, packing=True)
    batches = [collate_packs([[document(ids, *parts) for parts in pack]], ids) for pack in PACKS]
    for batch in batches:
        del batch["labels"], batch["kinds"]
    expected = [model(**batch, use_cache=False).logits for batch in batches]
    compile_layers(model, backend="eager")
    counters.clear()
    for batch, logits in zip(batches, expected, strict=True):
        torch.testing.assert_close(model(**batch, use_cache=False).logits, logits)
    assert not counters["graph_break"]
