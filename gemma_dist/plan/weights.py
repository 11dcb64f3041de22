"""Bytes of a model's weights as a recipe loads them, part by part, and the weights of what trains: arithmetic."""

import re
from collections import Counter
from dataclasses import dataclass

from gemma_dist.config import RunConfig
from gemma_dist.plan.geometry import TEXT, Geometry, Linear, Stack, embeddings, linears, stacks, vectors

BYTES = {"float32": 4, "bfloat16": 2}
QUANTIZED, OTHER, EXPERTS = "quantized weights", "other weights", "experts"
LAYER = re.compile(r"model\.language_model\.layers\.(\d+)\.")
FOUR_BIT_BLOCK, SCALES_BLOCK = 64, 256  # weights that share a scale, and scales that share one


@dataclass(frozen=True)
class Placement:
    """Where the large parts of a model are during a run."""

    ple: str  # host or gpu: the per-layer embeddings
    experts: str  # host or gpu
    experts_in_4_bits: bool
    audio: bool  # whether the audio tower is loaded
    vision: bool  # whether the vision tower is loaded


def placement(config: RunConfig, *, has_images: bool) -> Placement:
    """What `train` does with a recipe whose rows have images, or none."""
    frozen = config.tuning != "full"
    return Placement(
        ple="host" if config.ple_on_host else "gpu",
        experts=config.model.experts,
        experts_in_4_bits=config.quantization is not None and config.quantization.quantize_moe_experts,
        audio=not frozen,
        vision=has_images or not frozen,
    )


def bytes_in_4_bits(numel: int, *, double_quant: bool) -> int:
    """What bitsandbytes holds of a weight: half a byte each, and a scale of 4 bytes for 64 of them; quantized too, a
    scale takes 1 byte and a share of another."""
    return -(-numel // 2) + scales_in_4_bits(numel, double_quant=double_quant)


def scales_in_4_bits(numel: int, *, double_quant: bool) -> int:
    """The scales of `bytes_in_4_bits`."""
    blocks = -(-numel // FOUR_BIT_BLOCK)
    return blocks + 4 * -(-blocks // SCALES_BLOCK) if double_quant else 4 * blocks


def loaded_weights(geometry: Geometry, config: RunConfig, place: Placement) -> dict[str, int]:
    """Bytes of the base by part, wherever `place` puts them; towers that are left out are not among them.

    Parts: `quantized weights` and `other weights` of the language model, `token embedding`, `per-layer embeddings`,
    `experts`, `vision tower`, `audio tower`.
    """
    each, quantization = BYTES[config.model.dtype], config.quantization
    double_quant = quantization is not None and quantization.bnb_4bit_use_double_quant
    parts: Counter[str] = Counter()
    for linear in linears(geometry):
        numel = linear.inputs * linear.outputs
        in_4_bits = quantization is not None and not linear.spared
        part = linear.part if linear.part != TEXT else QUANTIZED if in_4_bits else OTHER
        parts[part] += bytes_in_4_bits(numel, double_quant=double_quant) if in_4_bits else numel * each
    for stack in stacks(geometry):
        in_4_bits = quantization is not None and place.experts_in_4_bits
        parts[EXPERTS] += bytes_in_4_bits(stack.numel, double_quant=double_quant) if in_4_bits else stack.numel * each
    for part, numel in (vectors(geometry) | embeddings(geometry)).items():
        parts[OTHER if part == TEXT else part] += numel * each
    if not place.audio:
        del parts["audio tower"]
    if not place.vision:
        del parts["vision tower"]
    return dict(parts)


def loaded_scales(geometry: Geometry, config: RunConfig, place: Placement) -> int:
    """Bytes of what `loaded_weights` has that are scales of 4-bit weights on the GPU."""
    if config.quantization is None:
        return 0
    left_out = {"audio tower": not place.audio, "vision tower": not place.vision}
    quantized = [linear for linear in linears(geometry) if not linear.spared and not left_out.get(linear.part)]
    in_4_bits = [linear.inputs * linear.outputs for linear in quantized]
    if place.experts_in_4_bits and place.experts == "gpu":
        in_4_bits += [stack.numel for stack in stacks(geometry)]
    double_quant = config.quantization.bnb_4bit_use_double_quant
    return sum(scales_in_4_bits(numel, double_quant=double_quant) for numel in in_4_bits)


def num_parameters(geometry: Geometry) -> int:
    """All weights of a model."""
    of_linears = sum(linear.inputs * linear.outputs for linear in linears(geometry))
    of_stacks = sum(stack.numel for stack in stacks(geometry))
    return of_linears + of_stacks + sum(vectors(geometry).values()) + sum(embeddings(geometry).values())


def num_trained(geometry: Geometry, config: RunConfig) -> int:
    """Weights that train: of the adapter, or all but the audio tower's."""
    if config.lora is not None:
        return sum(_adapter(linear, config) for linear in linears(geometry)) + _adapter_of_experts(geometry, config)
    audio = sum(one.inputs * one.outputs for one in linears(geometry) if one.part == "audio tower")
    return num_parameters(geometry) - audio - vectors(geometry).get("audio tower", 0)


def adapted_by_layer(geometry: Geometry, config: RunConfig) -> list[int]:
    """Weights of the adapter on the linear layers of each layer of the language model."""
    adapted = [0] * len(geometry.layers)
    for linear in linears(geometry):
        if found := LAYER.match(linear.path):
            adapted[int(found[1])] += _adapter(linear, config)
    return adapted


def adapter_rank(linear: Linear, config: RunConfig) -> int:
    """Rank of the adapter on a linear layer; 0 where lora.target_modules does not name it."""
    lora = config.lora
    return lora.r if lora is not None and re.fullmatch(lora.target_modules, linear.path) else 0


def stack_rank(stack: Stack, config: RunConfig) -> int:
    """Rank of the adapter on each expert of a stack; 0 where lora.target_parameters does not name it."""
    lora = config.lora
    return lora.r if lora is not None and any(stack.path.endswith(f".{name}") for name in lora.target_parameters) else 0


def _adapter(linear: Linear, config: RunConfig) -> int:
    """Weights of the adapter on one linear layer."""
    rank = adapter_rank(linear, config)
    has_magnitudes = rank > 0 and config.lora is not None and config.lora.use_dora
    return rank * (linear.inputs + linear.outputs) + (linear.outputs if has_magnitudes else 0)


def _adapter_of_experts(geometry: Geometry, config: RunConfig) -> int:
    """Weights of the adapter on stacks: PEFT gives each expert r rows and columns of its own."""
    return sum(stack_rank(one, config) * one.experts * (one.outputs + one.inputs) for one in stacks(geometry))
