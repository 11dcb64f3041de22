"""Activations in host memory: the same losses and gradients, in the last bit, and what a layer computes stays away."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gemma_dist.config import LoraConfig, ModelConfig, QuantizationConfig
from gemma_dist.errors import ConfigError
from gemma_dist.model.load import add_adapter, load_model
from gemma_dist.recipe import load_config
from gemma_dist.train.offload import activations_on_host

BATCH, LENGTH, HIDDEN = 2, 300, 128


@pytest.mark.parametrize("style", ["e4b", "31b", "26b"])
@pytest.mark.parametrize("four_bits", [False, True])
def test_losses_and_gradients_are_those_of_the_device(
    tiny_model: Callable[..., Path], style: str, four_bits: bool
) -> None:
    """KV sharing, experts, 4 bits; checkpointed as the trainer does it."""
    settings = ModelConfig(model_name_or_path=str(tiny_model(style)), dtype="float32")
    quantization = QuantizationConfig(bnb_4bit_compute_dtype="float32") if four_bits else None
    torch.manual_seed(0)
    model = add_adapter(load_model(settings, quantization, packing=False), LoraConfig(), zero3=False).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    ids = torch.randint(100, 460, (BATCH, LENGTH))

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, mm_token_type_ids=torch.zeros_like(ids)).loss
        loss.backward()
        return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected_loss, expected = step()
    with (hooks := activations_on_host()):
        loss, found = step()
    assert torch.equal(loss, expected_loss)
    assert len(expected) > 40
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    inputs = model.config.text_config.num_hidden_layers * BATCH * LENGTH * HIDDEN * 4
    assert hooks.num_bytes >= inputs, "each layer's input was to move"
    assert hooks.num_bytes < 10 * inputs, "more than the inputs of layers, the logits and the loss moved"


def test_without_checkpointing_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.activation_offloading: true, but gradient_checkpointing is false"):
        load_config(Path("launch/cpu_lora.yaml"), ["activation_offloading=true", "gradient_checkpointing=false"])
