"""Activations in host memory: the same losses and gradients, in the last bit, and what a layer computes stays away."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from gemma_dist.config import LoraConfig, ModelConfig, QuantizationConfig
from gemma_dist.errors import ConfigError
from gemma_dist.logs import read_jsonl
from gemma_dist.model.load import add_adapter, load_model
from gemma_dist.recipe import load_config
from gemma_dist.train import trainer
from gemma_dist.train.offload import activations_on_host
from gemma_dist.train.run import train
from tests.support.corpus import row, shard_rows

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


def test_a_run_moves_them_and_learns_the_same(model: str, tmp_path: Path) -> None:
    shard_rows(tmp_path, model, [row(number, num_calls=5) for number in range(4)])
    metrics, moved = {}, []

    def noted() -> activations_on_host:
        moved.append(activations_on_host())
        return moved[-1]

    for offloading in ("true", "false"):
        out = tmp_path / offloading
        words = [f"model_name_or_path={model}", f"data.train={tmp_path / 'shards'}", f"output_dir={out}", "max_steps=2"]
        words += ["gradient_checkpointing=true", f"activation_offloading={offloading}"]
        with patch.object(trainer, "activations_on_host", noted):
            train(load_config(Path("launch/cpu_qlora.yaml"), words))
        steps = read_jsonl(out / "metrics.jsonl")
        metrics[offloading] = [(step["loss"], step["grad_norm"]) for step in steps]
    assert len(metrics["true"]) == 2
    assert metrics["true"] == metrics["false"]
    assert sum(hooks.num_bytes > 0 for hooks in moved) >= 2, "of each step; a micro-batch may be empty"


def test_without_checkpointing_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.activation_offloading: true, but gradient_checkpointing is false"):
        load_config(Path("launch/cpu_lora.yaml"), ["activation_offloading=true", "gradient_checkpointing=false"])
