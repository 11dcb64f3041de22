"""The floating point operations that a training step needs, and how many a GPU could do: what MFU is made of.

    flops = StepFlops.of(geometry, config)
    flops.needed(num_tokens=…, num_targets=…, …) / (seconds * num_gpus * peak_flops("NVIDIA H100 80GB HBM3"))

Model FLOPs utilization as PaLM defines it (Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311, appendix B): what
the model needs by its definition, whatever is done beside it. Padding, recomputed activations, logits that the loss
computes again, weights made full again from 4 bits and exchanges are no part of it, and lower the share. A product of
(n, a) by (a, b) is 2 n a b operations. For each

    token       the linear layers of the language model, and of its experts those that the router chooses
    pair        of a token and one that it sees: 4 x heads x head_dim a layer, for scores and sums. A full layer has
                n (n + 1) / 2 pairs for a trajectory of n tokens, a sliding one no more than its window for each token;
                documents of a pack do not see one another, and what images see backwards is left out
    target      the head: hidden x vocabulary, where something is trained and nowhere else
    patch       the vision tower, whose patches see all of their image; its projector for each soft token

PaLM counts the backward pass as twice the forward pass: once for the gradients of what went in, once for those of the
weights. Here the first is counted where something that trains lies before, and the second of weights that train. So an
adapter of rank r on a frozen layer adds r (a + b) weights to the products, and its base has gradients of inputs alone.
Norms, activations, rotations, pooling and DoRA's norms are not counted: they are no products.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gemma_dist.config import RunConfig
from gemma_dist.plan.geometry import PATCHES_A_TOKEN, Geometry, Linear, Stack, linears, stacks
from gemma_dist.plan.weights import adapter_rank, stack_rank

# Operations a second of dense products in bfloat16, summed in float32, by the name that torch.cuda gives. NVIDIA's
# sheets give twice as many for most of them: those are with sparsity. Never measured here.
PEAKS = {
    # https://resources.nvidia.com/en-us-blackwell-architecture/datasheet: 4.5e15 with sparsity
    "NVIDIA B200": 2250e12,
    # https://www.nvidia.com/en-us/data-center/h200/: 1,979e12 (SXM) and 1,671e12 (NVL) with sparsity
    "NVIDIA H200": 989.5e12,
    "NVIDIA H200 NVL": 835.5e12,
    # https://www.nvidia.com/en-us/data-center/h100/: 1,979e12 (SXM) and 1,671e12 (NVL) with sparsity; of the PCIe card
    # https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet: 1,513e12
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    # https://www.nvidia.com/en-us/data-center/a100/
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    # https://www.nvidia.com/en-us/data-center/products/a10-gpu/
    "NVIDIA A10": 125e12,
    # https://www.nvidia.com/en-us/data-center/l4/: 242e12 with sparsity
    "NVIDIA L4": 121e12,
    # https://www.nvidia.com/en-us/data-center/l40s/: 733e12 with sparsity
    "NVIDIA L40S": 362e12,
    # The architecture papers of NVIDIA, appendix A: Ampere GA102, Ada
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}

Place = tuple[int, int, int]  # in the order of a forward pass: part, layer, stage of the layer
_VISION, _PROJECTOR, _TEXT = range(3)
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_STAGES = {  # those of one stage take the same input, or stand beside one another
    0: ("q_proj", "k_proj", "v_proj"),
    1: ("o_proj",),
    2: ("gate_proj", "up_proj", "gate_up_proj", "router.proj"),
    3: ("down_proj",),
    4: ("per_layer_input_gate",),
    5: ("per_layer_projection",),
}


def peak_flops(gpu: str) -> float | None:
    """Operations a second that a GPU of this name could do in bfloat16; None: not known, as of a part of one (MIG)."""
    return PEAKS.get(gpu)


@dataclass(frozen=True)
class StepFlops:
    """Operations of forward and backward pass, for each of what a step has."""

    window: int  # of sliding layers
    of_each: Mapping[str, int]  # token, pair, pair in window, patch, pair of patches, soft token (beside its token)
    a_target: int

    @classmethod
    def of(cls, geometry: Geometry, config: RunConfig) -> "StepFlops":
        """Those of a recipe's model, as it trains."""
        first, trains = _first_trained(geometry, config), config.tuning == "full"
        found: Counter[str] = Counter()

        def add(unit: str, layer: Linear | Stack, rank: int, times: int = 1) -> None:
            """A layer, and its adapter, which trains always."""
            has_gradient = _place(layer.path) > first
            of_base = layer.inputs * layer.outputs * (1 + has_gradient + trains)
            of_adapter = rank * (layer.inputs * (2 + has_gradient) + layer.outputs * 3)
            found[unit] += times * 2 * (of_base + of_adapter)

        for linear in _linears(geometry):
            unit = {_VISION: "patch", _PROJECTOR: "soft token", _TEXT: "token"}[_place(linear.path)[0]]
            if geometry.is_unified and unit == "patch":  # merged before they are projected
                unit = "soft token"
            add(unit, linear, adapter_rank(linear, config))
        for stack in stacks(geometry):
            add("token", stack, stack_rank(stack, config), geometry.experts_a_token)
        for number, layer in enumerate(geometry.layers):
            passes = 3 if first < (_TEXT, number, 1) else 1
            found["pair" if layer.is_full else "pair in window"] += passes * 4 * geometry.heads * layer.head_dim
        if (vision := geometry.vision) is not None:
            for number in range(vision.layers):
                passes = 3 if first < (_VISION, number, 1) else 1
                found["pair of patches"] += passes * 4 * vision.hidden
        head = 2 * geometry.hidden * geometry.vocabulary
        return cls(geometry.window, dict(found), a_target=head * (2 + trains))

    def needed(self, lengths: np.ndarray, num_targets: int, soft_tokens: np.ndarray, num_images: np.ndarray) -> float:
        """Operations of a global batch of N trajectories.

        Args:
            lengths: (N,) tokens of text and images of each.
            num_targets: of all.
            soft_tokens: (N,) of the images of each, which are taken to be of one size.
            num_images: (N,)
        """
        lengths, soft_tokens = lengths.astype(np.int64), soft_tokens.astype(np.int64)
        within, patches = np.minimum(lengths, self.window), PATCHES_A_TOKEN * soft_tokens
        counts = {
            "token": lengths.sum(),
            "pair": (lengths * (lengths + 1) // 2).sum(),
            "pair in window": (within * (within + 1) // 2 + (lengths - within) * self.window).sum(),
            "patch": patches.sum(),
            "pair of patches": (patches**2 / np.maximum(1, num_images)).sum(),
            "soft token": soft_tokens.sum(),
        }
        of_tokens = sum(self.of_each.get(unit, 0) * float(count) for unit, count in counts.items())
        return of_tokens + self.a_target * num_targets


def _linears(geometry: Geometry) -> Iterator[Linear]:
    """Those that a step asks: no trajectory has sound."""
    return (linear for linear in linears(geometry) if linear.part != "audio tower")


def _first_trained(geometry: Geometry, config: RunConfig) -> Place:
    """Where the first weight that trains takes its input: what comes behind has gradients of its inputs."""
    if config.tuning == "full":
        return (_VISION if geometry.vision else _TEXT), -1, 0  # the projection of patches, or the token embedding
    adapted = [linear.path for linear in _linears(geometry) if adapter_rank(linear, config)]
    adapted += [stack.path for stack in stacks(geometry) if stack_rank(stack, config)]
    return min(map(_place, adapted), default=(_TEXT, len(geometry.layers), 0))


def _place(path: str) -> Place:
    """Of a linear layer, or of the stacked experts, by its path in the model."""
    if path.endswith("embedding_projection"):
        return _PROJECTOR, -1, 0
    part = _VISION if "vision" in path else _TEXT
    found = _LAYER.search(path)
    if found is None:  # the projection of patches; that of token embeddings, for the layers' own
        return part, -1, int(part == _TEXT)
    name = path.removesuffix(".linear")
    return part, int(found[1]), next(stage for stage, names in _STAGES.items() if name.endswith(names))
