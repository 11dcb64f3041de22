"""What of a model trains and what its weights take, part by part, from shapes alone: no weight is read."""

from collections import Counter
from typing import Any

import torch

from gemma_dist.config import RunConfig
from gemma_dist.model.load import add_adapter, attention_of_parts, freeze_audio, read_config
from gemma_dist.model.record import four_bit_config

# What of the model a parameter belongs to, by the first piece of its name that fits.
MODEL_PARTS = {
    ".experts.": "experts",
    "model.vision_tower.": "vision tower",
    "model.audio_tower.": "audio tower",
    "model.embed_vision.": "projectors",
    "model.embed_audio.": "projectors",
    "model.language_model.embed_tokens": "embeddings",
    "lm_head.": "embeddings",
    "model.language_model.": "language model",
}


def describe_training(config: RunConfig) -> list[str]:
    """What trains and what the weights take, part by part, from shapes alone: no weight is read, a 31B takes seconds.

    GiB are those of the base as it is loaded, on each rank, or at ZeRO-3 on all ranks together. The adapter,
    gradients, optimiser and activations come on top.

    Raises:
        CheckpointError: there is no Gemma 4 at model.model_name_or_path.
        ConfigError: lora.target_modules fits nothing that can be adapted.
    """
    model = _without_weights(config)
    num_bytes = _loaded_bytes(model, config)
    if config.lora is not None:
        with torch.device("meta"):
            model = add_adapter(model, config.lora, zero3=False)
    total, trained = Counter[str](), Counter[str]()
    weights: dict[str, float] = dict.fromkeys([*MODEL_PARTS.values(), "other"], 0.0)
    for name, parameter in model.named_parameters():
        part = _part(name.removeprefix("base_model.model."))
        total[part] += parameter.numel()
        trained[part] += parameter.numel() if parameter.requires_grad else 0
        weights[part] += num_bytes.get(parameter, 0)
    lines = [
        f"trains {sum(trained.values()):,} of {sum(total.values()):,} parameters "
        f"({sum(trained.values()) / sum(total.values()):.2%}): tuning {config.tuning}; "
        f"the loaded weights take {sum(weights.values()) / 2**30:.2f} GiB"
    ]
    return lines + [
        f"    {part:<15} {trained[part]:>15,} of {total[part]:>15,} {weights[part] / 2**30:>8.2f} GiB" for part in total
    ]


def _without_weights(config: RunConfig) -> Any:
    """The base of a recipe on the meta device, with the layers that loading would hold in 4 bits as such."""
    from transformers import AutoModelForImageTextToText
    from transformers.quantizers import AutoHfQuantizer

    settings = read_config(config.model.model_name_or_path)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            settings, attn_implementation=attention_of_parts(config.model), trust_remote_code=False
        )
        if config.quantization is not None:
            wanted = four_bit_config(config.quantization.model_dump())
            AutoHfQuantizer.from_config(wanted, pre_quantized=False).preprocess_model(model, device_map=None)
    freeze_audio(model)
    return model


def _loaded_bytes(model: Any, config: RunConfig) -> dict[torch.nn.Parameter, float]:
    """Bytes of each parameter of a base once it is loaded: in model.dtype, or in 4 bits with their scales."""
    in_4_bits: set[torch.nn.Parameter] = set()
    scale = 0.0
    if config.quantization is not None:
        from bitsandbytes.nn import Linear4bit

        in_4_bits = {module.weight for module in model.modules() if isinstance(module, Linear4bit)}
        # 64 weights share a scale of 4 bytes; quantised too, it takes 1 byte and a share of 4 bytes for 256 of them.
        scale = (1 + 4 / 256) / 64 if config.quantization.bnb_4bit_use_double_quant else 4 / 64
    item = getattr(torch, config.model.dtype).itemsize
    return {p: p.numel() * (0.5 + scale if p in in_4_bits else item) for p in model.parameters()}


def _part(name: str) -> str:
    return next((part for mark, part in MODEL_PARTS.items() if mark in name), "other")
