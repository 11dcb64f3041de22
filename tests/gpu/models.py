"""A random Gemma 4 with the shapes of E4B, written tensor by tensor: none of it is ever whole in memory."""

import json
from pathlib import Path
from typing import Any

import torch

from gemma_dist.model.tiny import DEFAULT_CORPUS, tiny_config, tiny_processor
from gemma_dist.tensorfile import write_tensors

SHAPES = Path(__file__).parents[1] / "shapes"
SMALL = {  # what replaces the true sizes of the text model on a CPU
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2 + ["full_attention"],
    "num_kv_shared_layers": 2,
    "head_dim": 64,
    "global_head_dim": 128,
    "vocab_size": 4096,
    "vocab_size_per_layer_input": 4096,
    "hidden_size_per_layer_input": 64,
}
SMALL_VISION = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_VISION |= {"num_key_value_heads": 2, "head_dim": 48}
FILE_BYTES = 2 << 30


def write_random_e4b(folder: Path, *, true_size: bool, device: torch.device) -> None:
    """Write config, processor and random bfloat16 weights (16 GB at the true size) to `folder`.

    The tokenizer is a tiny one: its ids are the first rows of the embeddings.
    """
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    processor = tiny_processor(DEFAULT_CORPUS, style="e4b", vocab_size=1024, chat_template=None)
    ids = tiny_config(processor.tokenizer, style="e4b", hidden_size=128, num_hidden_layers=2).to_dict()
    settings: dict[str, Any] = json.loads((SHAPES / "e4b.json").read_text())
    settings |= {name: value for name, value in ids.items() if name.endswith(("token_id", "token_index"))}
    special = {name: value for name, value in ids["text_config"].items() if name.endswith("token_id")}
    settings["text_config"] |= special
    if not true_size:
        settings["text_config"] |= SMALL
        settings["vision_config"] |= SMALL_VISION
    config = Gemma4Config(**settings)
    with torch.device("meta"):
        model = Gemma4ForConditionalGeneration(config)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(0)
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    weight_map: dict[str, str] = {}
    lot: dict[str, torch.Tensor] = {}
    num_bytes = total = 0
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        lot[name] = _random(name, tensor, generator, device)
        num_bytes += lot[name].nbytes
        if num_bytes > FILE_BYTES:
            total, num_bytes = total + num_bytes, 0
            _write(folder, lot, weight_map)
    _write(folder, lot, weight_map)
    index = {"metadata": {"total_size": total + num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(name: str, tensor: torch.Tensor, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Linear layers that keep the size of what goes through them; norms, bounds and scalars of 1."""
    if tensor.ndim < 2:
        limits = {"input_min": -1e4, "output_min": -1e4, "input_max": 1e4, "output_max": 1e4}
        return torch.full(tensor.shape, limits.get(name.rpartition(".")[2], 1.0), dtype=torch.bfloat16)
    values = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    return (values * tensor.shape[-1] ** -0.5).cpu()


def _write(folder: Path, lot: dict[str, torch.Tensor], weight_map: dict[str, str]) -> None:
    """Write the tensors of `lot` to the next file, and forget them."""
    name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
    write_tensors(folder / name, lot)
    weight_map |= dict.fromkeys(lot, name)
    lot.clear()
