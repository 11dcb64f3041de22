"""What the host says of a micro-batch is what the model would have found on the device: same loss, same gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor
from trl.trainer.utils import add_fused_lm_head

from gemma_dist.config import LoraConfig, ModelConfig
from gemma_dist.errors import DataError
from gemma_dist.model.head import KINDS, use_target_head
from gemma_dist.model.images import places_of
from gemma_dist.model.load import add_adapter, load_model
from gemma_dist.stream.collate import collate, collate_packs, control_ids
from gemma_dist.train.feed import known_to_host
from tests.support.counting import Counted
from tests.support.documents import document

WINDOW = 16  # which the rows exceed
# Images of several sizes, some without padding; a text alone.
DOCUMENTS = [(6, "<", (2, 2), ">", 9), (3, "<", (3, 3), ">", "<", (5, 4), ">", 4), (31,)]


def model_of(folder: Path, *, packing: bool) -> Any:
    model = load_model(ModelConfig(model_name_or_path=str(folder), dtype="float32"), None, packing=packing)
    text = model.config.text_config
    text.sliding_window = model.model.language_model.config.sliding_window = WINDOW
    for layer in model.model.language_model.layers:
        layer.self_attn.sliding_window = WINDOW
    add_fused_lm_head(model)
    use_target_head(model)
    return model


def step(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients."""
    model.zero_grad()
    loss = -model(**inputs).log_probs.sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packs"])
@pytest.mark.parametrize("style", ["e4b", "31b", "12b"])
def test_a_micro_batch_whose_places_are_known_trains_the_same_and_waits_for_nothing(
    tiny_model: Callable[..., Path], style: str, packing: bool
) -> None:
    ids = control_ids(AutoProcessor.from_pretrained(tiny_model(style)))
    samples = [document(ids, *parts) for parts in DOCUMENTS]
    model = model_of(tiny_model(style), packing=packing)
    batch = collate_packs([samples[:2], samples[2:]], ids) if packing else collate(samples, ids)
    expected_loss, expected = step(model, batch | {"fused_lm_head": True})
    known = known_to_host(batch)
    with Counted() as counts:
        loss, gradients = step(model, {name: value for name, value in known.items() if name != KINDS})
    assert not counts.waits
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert gradients.keys() == expected.keys()
    assert any("embed_vision" in name for name in gradients)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("style", ["e4b", "12b"])
def test_an_adapter_of_the_token_embedding_leaves_images_alone(tiny_model: Callable[..., Path], style: str) -> None:
    ids = control_ids(AutoProcessor.from_pretrained(tiny_model(style)))
    settings = ModelConfig(model_name_or_path=str(tiny_model(style)), dtype="float32")
    of_embedding = LoraConfig(target_modules=r"model\.language_model\.embed_tokens")
    model: Any = add_adapter(load_model(settings, None, packing=True), of_embedding, zero3=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = collate_packs([[document(ids, *parts) for parts in DOCUMENTS]], ids)
    del batch["labels"], batch["kinds"]
    logits = [model(**inputs, use_cache=False).logits for inputs in (batch, known_to_host(batch))]
    torch.testing.assert_close(logits[1], logits[0])


def test_images_that_do_not_fit_the_text_are_refused_by_the_host() -> None:
    grid = torch.cartesian_prod(torch.arange(6), torch.arange(6))[None]  # 36 patches: 4 soft tokens of 9
    types = torch.tensor([[0, 1, 1, 1, 1, 0]])
    assert places_of(types, grid)["soft_tokens"].tolist() == [0, 1, 2, 3]
    half = places_of(torch.tensor([[1, 0]]), grid, pooling=3, used=slice(2, 3))  # of a pack that is cut
    assert half["soft_tokens"].tolist() == [2]
    assert len(places_of(torch.tensor([[0, 0]]), grid, pooling=3, used=slice(0, 0))["soft_tokens"]) == 0
    with pytest.raises(DataError, match=r"5 soft tokens in the text, for images of \[36\] patches"):
        places_of(torch.tensor([[0, 1, 1, 1, 1, 1]]), grid)
