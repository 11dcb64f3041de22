"""What a GPU cannot do for a recipe, by its compute capability, or a CPU. Nothing here was run on such GPUs: it is what
torch 2.14 and NVIDIA say of them.

Before 8.0 (Ampere: A100, A10, RTX 30) a GPU has no bfloat16: torch emulates some of it, many times slower, and
Triton's kernels do not. There, too, attention of the full layers (head dimension 512) has no kernel but the plain one,
which holds a number for each pair of tokens of a trajectory.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from gemma_dist.config import RunConfig
from gemma_dist.errors import ConfigError

AMPERE = (8, 0)


@dataclass(frozen=True)
class Card:
    """A GPU's name and compute capability."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


def card_at_hand() -> Card | None:
    """The GPU that this rank computes on; None: the CPU."""
    import torch

    from gemma_dist.model.load import device

    if (place := device()).type == "cpu":
        return None
    return Card(torch.cuda.get_device_name(place), torch.cuda.get_device_capability(place))


def impossible(config: RunConfig, card: Card) -> Iterator[str]:
    """Settings that the card cannot carry out, each with a remedy."""
    if card.capability >= AMPERE:
        return
    settings = {
        "model.dtype: bfloat16": ("model.dtype: float32", config.model.dtype == "bfloat16"),
        "train.bf16: true": ("train.bf16: false", config.train.bf16),
        "quantization.bnb_4bit_compute_dtype: bfloat16": (
            "quantization.bnb_4bit_compute_dtype: float32",
            config.quantization is not None and config.quantization.bnb_4bit_compute_dtype == "bfloat16",
        ),
    }
    for name, (remedy, is_set) in settings.items():
        if is_set:
            yield f"{name}: {card} has no bfloat16; set {remedy}, or take a card of 8.0 or newer"


def slow(card: Card) -> Iterator[str]:
    """What the card does at a much higher cost than others."""
    if card.capability < AMPERE:
        yield (
            f"{card} has no fast attention for the full layers (head dimension 512): their memory grows with the "
            "square of the longest trajectory; shard with a smaller max_length, or take a card of 8.0 or newer"
        )


def require_card(config: RunConfig, card: Card) -> None:
    """Raises ConfigError, with every reason, where `config` cannot run on `card`."""
    if problems := list(impossible(config, card)):
        raise ConfigError("\n".join(problems))


def require_cpu(config: RunConfig) -> None:
    """Raises ConfigError where `config` cannot train on a CPU."""
    if config.model.attn_implementation == "flex_attention":
        raise ConfigError(
            "model.attn_implementation: flex_attention has no backward pass on a CPU; set sdpa, or train on a GPU"
        )
