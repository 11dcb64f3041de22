"""What could make a run smaller: changes of a recipe or its launch, as they are typed. `run.py` plans each anew."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_dist.config import RunConfig
from gemma_dist.errors import ConfigError
from gemma_dist.plan.estimate import GPUS_A_NODE
from gemma_dist.plan.weights import Placement
from gemma_dist.topology import Topology, read_topology

SHORTEST = 512  # tokens; no shorter sequences are proposed
ZERO_CONFIGS = (
    "accelerate_configs/zero2.yaml",
    "accelerate_configs/zero3.yaml",
    "accelerate_configs/zero3_offload.yaml",
)


@dataclass(frozen=True)
class Change:
    """A change to try."""

    words: str  # as it is typed
    overrides: tuple[str, ...] = ()
    topology: Topology | None = None  # None: the same
    note: str = ""


@dataclass(frozen=True)
class Lever:
    """A change that saves memory."""

    words: str
    num_bytes: int  # that it saves on each GPU
    note: str
    fits: bool | None  # whether the run fits then


def changes(config: RunConfig, topology: Topology, place: Placement, *, given_tokens: bool) -> Iterator[Change]:
    """Every change that might save memory; those that do not, or do not go together with the rest, come to nothing.

    Args:
        given_tokens: whether the length of a micro-batch was given, so that no setting changes it.
    """
    yield from _of_model(config, place)
    yield from _of_training(config, given_tokens)
    if topology.num_processes > 1:
        yield from _of_sharing(config, topology)
        yield from _of_launch(topology)


def _of_model(config: RunConfig, place: Placement) -> Iterator[Change]:
    """How the base is held."""
    if place.ple == "gpu":
        yield _setting("model.ple=host")
    if config.tuning == "lora":
        yield _setting("tuning=qlora", note="the base in 4 bits")
    if config.tuning == "full":
        yield Change("tuning=lora learning_rate=2e-4", ("tuning=lora", "learning_rate=2e-4"), note="an adapter instead")
        yield Change(
            "tuning=qlora learning_rate=2e-4", ("tuning=qlora", "learning_rate=2e-4"), note="on a base in 4 bits"
        )
    if config.quantization is not None:
        if not place.experts_in_4_bits:
            yield _setting("quantization.quantize_moe_experts=true")
        if not config.quantization.bnb_4bit_use_double_quant:
            yield _setting("quantization.bnb_4bit_use_double_quant=true")
    if place.experts == "gpu" and place.experts_in_4_bits:
        yield _setting("model.experts=host", note="slower: each layer's experts are copied ahead of it")
    if config.model.dtype == "float32":
        yield _setting("model.dtype=bfloat16")
    if config.model.attn_implementation == "eager":
        yield _setting("model.attn_implementation=sdpa")


def _of_training(config: RunConfig, given_tokens: bool) -> Iterator[Change]:
    """What is computed at once, and what is kept of it."""
    train = config.train
    if not train.gradient_checkpointing:
        yield _setting("train.gradient_checkpointing=true", note="about a third more time")
    elif not train.activation_offloading:
        yield _setting("train.activation_offloading=true", note="copies them to the host and back")
    if train.per_device_train_batch_size > 1 and not given_tokens:
        overrides = ["train.per_device_train_batch_size=1"]
        if train.gradient_accumulation_steps:
            overrides.append(f"train.gradient_accumulation_steps={accumulation(config)}")
        yield Change(" ".join(overrides), tuple(overrides))
    length = train.packing_length
    if length and length // 2 >= SHORTEST and not given_tokens:
        note = f"after `gemma-dist shard … --max-length {length // 2}`"
        yield _setting(f"train.packing_length={length // 2}", note=note)
    if config.lora is not None and config.lora.r > 8:
        yield _setting(f"lora.r={config.lora.r // 2}")
    if not train.optim.startswith("paged_adamw_8bit"):
        yield _setting("train.optim=paged_adamw_8bit")


def accumulation(config: RunConfig) -> int:
    """Accumulation steps that keep the global batch where the micro-batch becomes 1."""
    train = config.train
    return (train.gradient_accumulation_steps or 1) * train.per_device_train_batch_size


def _of_sharing(config: RunConfig, topology: Topology) -> Iterator[Change]:
    """All ranks of a node on each sequence."""
    size = min(topology.num_processes, GPUS_A_NODE)
    if config.train.packing and config.train.sequence_parallel_size < size:
        yield _setting(f"train.sequence_parallel_size={size}", note="each sequence over so many GPUs")


def _of_launch(topology: Topology) -> Iterator[Change]:
    """Ways to share what each of several GPUs now holds."""
    for name in ZERO_CONFIGS:
        if name == topology.name or not Path(name).is_file():
            continue
        try:
            other = read_topology(Path(name))
        except ConfigError:
            continue
        shared = replace(other, num_processes=topology.num_processes)
        yield Change(f"--accelerate-config {name}", topology=shared)


def _setting(override: str, note: str = "") -> Change:
    return Change(override, (override,), note=note)
