"""What of a model trains and what its weights take, part by part, from shapes alone: no weight is read, a 31B takes
seconds."""

import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from gemma_dist.config import RunConfig
from gemma_dist.model.load import add_adapter, attention_of_parts, freeze_audio, place_of_experts, read_config
from gemma_dist.model.per_layer import TABLE
from gemma_dist.model.record import four_bit_config, quantization_of
from gemma_dist.model.towers import Tower, modules_of, whole_modules

# What of the model a parameter belongs to, by the first fragment of its name that fits.
MODEL_PARTS = {
    ".experts.": "experts",
    "model.vision_tower.": "vision tower",
    "model.audio_tower.": "audio tower",
    "model.embed_vision.patch_": "vision embedder",
    "model.embed_vision.pos_": "vision embedder",
    "model.embed_vision.": "vision projector",
    "model.embed_audio.": "audio projector",
    f"model.language_model.{TABLE}": "per-layer embeddings",
    "model.language_model.embed_tokens": "token embedding",
    "lm_head.": "token embedding",
    "model.language_model.": "language model",
}


@dataclass
class PartSize:
    """One part of a model."""

    num_parameters: int = 0
    num_trained: int = 0  # of these
    num_bytes: float = 0.0  # that the base's weights take once loaded, on a GPU where there is one
    host_bytes: float = 0.0  # that stay on the host
    host: str = ""  # where there
    is_loaded: bool = True

    def place(self) -> str:
        """What the part takes, and where."""
        if not self.is_loaded:
            return "not loaded"
        taken = f"{(self.num_bytes + self.host_bytes) / 2**30:>8.2f} GiB"
        return f"{taken} {self.host}" if self.host_bytes else taken


def describe_training(config: RunConfig, unneeded: Collection[Tower]) -> list[str]:
    """What trains and what the weights take, in lines for the terminal.

    GiB are those of the base as it is loaded, on each rank, or at ZeRO-3 on all ranks together. The adapter,
    gradients, optimizer and activations come on top; of experts on the host, two layers on the device.

    Args:
        unneeded: towers that the run does not load.

    Raises:
        CheckpointError: there is no Gemma 4 at model.model_name_or_path.
        ConfigError: lora.target_modules fits nothing that can be adapted.
    """
    sizes = size_by_part(config, unneeded)
    num_trained = sum(size.num_trained for size in sizes.values())
    num_parameters = sum(size.num_parameters for size in sizes.values())
    num_bytes = sum(size.num_bytes for size in sizes.values())
    lines = [
        f"trains {num_trained:,} of {num_parameters:,} parameters ({num_trained / num_parameters:.2%}): tuning "
        f"{config.tuning}; the loaded weights take {num_bytes / 2**30:.2f} GiB"
    ]
    for part, size in sizes.items():
        lines.append(f"    {part:<20} {size.num_trained:>15,} of {size.num_parameters:>15,} {size.place():>12}")
    return lines


def size_by_part(config: RunConfig, unneeded: Collection[Tower]) -> dict[str, PartSize]:
    """The size of each part of a recipe's model, its adapter included, in the order of the model.

    Args:
        unneeded: towers that the run does not load.

    Raises:
        CheckpointError, ConfigError: as `describe_training`.
    """
    model = _without_weights(config)
    num_bytes = _loaded_bytes(model, config)
    if config.lora is not None:
        with torch.device("meta"):
            model = add_adapter(model, config.lora, zero3=False)
    left_out = [re.compile(pattern) for pattern in modules_of(unneeded)]
    sizes: dict[str, PartSize] = defaultdict(PartSize)
    for name, parameter in model.named_parameters():
        part = _part(name.removeprefix("base_model.model."))
        size = sizes[part]
        size.num_parameters += parameter.numel()
        if parameter.requires_grad:
            size.num_trained += parameter.numel()
        if any(pattern.search(name) for pattern in left_out):
            size.is_loaded = False
        elif TABLE in name and config.ple_on_host:
            size.host = "in the base's file, on the host"
            size.host_bytes += num_bytes.get(parameter, 0)
        elif part == "experts" and config.model.experts == "host":
            size.host = "in host memory"
            size.host_bytes += num_bytes.get(parameter, 0)
        else:
            size.num_bytes += num_bytes.get(parameter, 0)
    return dict(sizes)


def _part(name: str) -> str:
    """The part of the model (MODEL_PARTS) that a parameter belongs to; `name` as in the base, without PEFT's prefix."""
    for fragment, part in MODEL_PARTS.items():
        if fragment in name:
            return part
    return "other"


def _without_weights(config: RunConfig) -> Any:
    """The base of a recipe on the meta device, with the layers that loading would hold in 4 bits as such."""
    from transformers import AutoModelForImageTextToText
    from transformers.quantizers import AutoHfQuantizer

    from gemma_dist.model.experts import loading_experts

    settings = read_config(config.model.model_name_or_path)
    experts = place_of_experts(settings, config.model, config.quantization)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            settings, attn_implementation=attention_of_parts(config.model), trust_remote_code=False
        )
        if config.quantization is not None:
            whole = whole_modules(settings)
            wanted = four_bit_config(quantization_of(config.quantization), skip_modules=whole)
            with loading_experts(experts):
                AutoHfQuantizer.from_config(wanted, pre_quantized=False).preprocess_model(model, device_map=None)
    freeze_audio(model)
    return model


def _loaded_bytes(model: Any, config: RunConfig) -> dict[torch.nn.Parameter, float]:
    """Bytes of each parameter of a base once it is loaded: in model.dtype, or in 4 bits with their scales."""
    in_4_bits: set[torch.nn.Parameter] = set()
    scale = 0.0
    if config.quantization is not None:
        from bitsandbytes.nn import Params4bit

        in_4_bits = {parameter for parameter in model.parameters() if isinstance(parameter, Params4bit)}
        # 64 weights share a scale of 4 bytes; quantized too, it takes 1 byte and a share of 4 bytes for 256 of them.
        scale = (1 + 4 / 256) / 64 if config.quantization.bnb_4bit_use_double_quant else 4 / 64
    num_bytes: dict[torch.nn.Parameter, float] = {}
    for parameter in model.parameters():
        each = 0.5 + scale if parameter in in_4_bits else getattr(torch, config.model.dtype).itemsize
        num_bytes[parameter] = parameter.numel() * each
    return num_bytes
