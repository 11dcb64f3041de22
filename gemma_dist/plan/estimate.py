"""What a step takes of each GPU, of a node's memory and of the disk: weights, states and activations put together.

    estimate = estimate_memory(geometry, config, topology, batch)
    estimate.peak_bytes, estimate.parts

Everything is arithmetic on shapes; `simulate.py` runs the real modules instead. What neither can see, CUDA's context,
workspaces and the allocator's gaps, is in `margin.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gemma_dist.config import RunConfig
from gemma_dist.plan.activations import Activations, MicroBatch, Moment
from gemma_dist.plan.geometry import Geometry, embeddings, stacks
from gemma_dist.plan.sharded import Shards
from gemma_dist.plan.weights import (
    BYTES,
    EXPERTS,
    Placement,
    loaded_scales,
    loaded_weights,
    num_parameters,
    num_trained,
)
from gemma_dist.topology import Topology

ADAPTER, GRADIENTS, OPTIMIZER = "adapter", "gradients", "optimizer"
ACTIVATIONS, LOSS_HEAD, BUCKETS, GATHERED = "activations", "loss head", "buckets", "gathered weights"
PER_LAYER = "per-layer embeddings"
SIMULATED = "simulated step"
SCALES = "scales of 4-bit weights"
LOADING = "loading, the whole 4-bit model on each GPU"
# Bytes of optimizer states for each trained weight; 8 bits have a scale of 4 bytes for 256 of them, for both moments.
STATES = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "paged_adamw_32bit": 8.0,
    "adamw_8bit": 2 + 2 * 4 / 256,
    "paged_adamw_8bit": 2 + 2 * 4 / 256,
    "adafactor": 0.02,
    "sgd": 0.0,
}
GPUS_A_NODE = 8
# Assumed, never measured: what a process with torch, CUDA and the libraries holds of the host's memory.
PROCESS = int(2.5 * 2**30)
# DeepSpeed's own defaults, where a config leaves them out.
ZERO_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "allgather_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
}


@dataclass(frozen=True)
class Estimate:
    """What one step takes, in bytes."""

    parts: dict[str, int]  # of a GPU at the moment of its peak, by what they are for
    moment: str  # which one that is
    host: dict[str, int]  # of a node's memory; page cache is named so
    disk: dict[str, int]
    num_parameters: int
    num_trained: int
    place: Placement
    moments: dict[str, int] = field(repr=False)  # each that may be the peak -> what a GPU holds then

    @property
    def peak_bytes(self) -> int:
        """What torch's allocator has given out at the peak of a step, on each GPU."""
        return sum(self.parts.values())

    def with_activations(self, parts: Mapping[str, int], peak_bytes: int) -> "Estimate":
        """This estimate with the activations of a simulated step (`parts` and `peak_bytes` as `simulate` returns
        them) in the place of its own."""
        simulated = {name: parts.get(name, 0) for name in (ACTIVATIONS, LOSS_HEAD)}
        known = self.parts.keys() | {BUCKETS, GATHERED}
        simulated[ACTIVATIONS] += sum(size for name, size in parts.items() if name not in known)
        return replace(self, parts=self.parts | simulated, moment=SIMULATED, moments={SIMULATED: peak_bytes})


def estimate_memory(
    geometry: Geometry, config: RunConfig, topology: Topology, batch: MicroBatch, place: Placement
) -> Estimate:
    """The closed form.

    Args:
        batch: the largest micro-batch of the run.
    """
    weights = loaded_weights(geometry, config, place)
    trained = num_trained(geometry, config)
    on_gpu = {part: size for part, size in weights.items() if not _is_elsewhere(part, place)}
    in_turn: dict[str, int] = {}  # not shared by any launch
    if place.experts == "host" and EXPERTS in on_gpu:
        in_turn[EXPERTS] = 2 * on_gpu.pop(EXPERTS) // len(geometry.layers)  # the layer at work, and the next one
    ranks = _Ranks(geometry, config, topology, trained, on_gpu, loaded_scales(geometry, config, place))
    fixed = {**in_turn, **ranks.parts()}
    moments = Activations(geometry, config, place, batch).moments()
    if config.train.optim == "adamw_torch" and topology.deepspeed is None:
        mine = trained if topology.fsdp is None else trained // topology.num_processes
        moments.append(Moment("optimizer step", 4 * mine))  # its moments' roots, all weights at once
    if ranks.shards is not None and ranks.shards.last_gradients:
        moments.append(Moment("end of the backward pass", ranks.shards.last_gradients))
    peak = max(moments, key=lambda moment: moment.activations + moment.loss_head)
    parts, name = {**fixed, ACTIVATIONS: peak.activations, LOSS_HEAD: peak.loss_head}, peak.name
    whole = sum(fixed.values())
    sizes = {moment.name: whole + moment.activations + moment.loss_head for moment in moments}
    if topology.fsdp is not None and config.quantization is not None:
        # transformers' quantizer places 4-bit weights by itself, before accelerate partitions them
        loaded = {**in_turn, **on_gpu}
        sizes[LOADING] = sum(loaded.values())
        if sizes[LOADING] > sum(parts.values()):
            parts, name = loaded, LOADING
    return Estimate(
        parts={part: size for part, size in parts.items() if size},
        moment=name,
        host=_host(weights, place, topology, ranks),
        disk=_disk(geometry, config, topology, trained),
        num_parameters=num_parameters(geometry),
        num_trained=trained,
        place=place,
        moments=sizes,
    )


def optimizer_states(geometry: Geometry, config: RunConfig, trained: int) -> int:
    """Bytes of the states of train.optim, of all ranks together: transformers keeps those of embeddings in 32 bits."""
    in_32_bits = 0
    if config.tuning == "full" and "8bit" in config.train.optim:
        in_32_bits = sum(embeddings(geometry).values())
    return int((trained - in_32_bits) * STATES[config.train.optim]) + in_32_bits * 8


def _is_elsewhere(part: str, place: Placement) -> bool:
    """Whether a part of the base is not on the GPU at all."""
    return part == PER_LAYER and place.ple == "host"


class _Ranks:
    """Weights, gradients and states of one rank, as DDP or a stage of ZeRO divides them."""

    def __init__(
        self,
        geometry: Geometry,
        config: RunConfig,
        topology: Topology,
        trained: int,
        weights: dict[str, int],
        scales: int,
    ) -> None:
        """`weights` are those of the base that are on the GPU, whole, `scales` what of them are scales."""
        self.geometry, self.config, self.topology, self.trained = geometry, config, topology, trained
        self.scales = scales
        self.weights, self.num, self.stage = weights, topology.num_processes, topology.zero_stage
        self.each = BYTES[config.model.dtype]
        self.zero: Mapping[str, Any] = ZERO_DEFAULTS | dict((topology.deepspeed or {}).get("zero_optimization", {}))
        self.shards: Shards | None = None
        if topology.fsdp is not None:
            reshard = topology.fsdp["reshard_after_forward"] == "true"
            self.shards = Shards(geometry, config, weights, trained, self.num, reshard=reshard)

    def parts(self) -> dict[str, int]:
        """Bytes of a GPU that last through the step."""
        if self.shards is not None:
            return self._sharded(self.shards)
        if self.stage is None:
            return self._whole()
        trained, num = self.trained, self.num
        shared = self.stage == 3
        weights = {part: self._share(size) if shared else size for part, size in self.weights.items()}
        parts = {} if self.offloads_weights else dict(weights)
        if shared:  # they are no parameters, so that every rank keeps all of them
            parts[SCALES] = self.scales if self.offloads_weights else self.scales - self._share(self.scales)
        if self.config.lora is not None:
            parts[ADAPTER] = self._share(trained * self.each) if shared else trained * self.each
        gradients = trained * self.each // (num if self.stage >= 2 else 1)
        parts[GRADIENTS] = gradients + (0 if self.topology.offloads_optimizer else 4 * trained // num)
        if not self.topology.offloads_optimizer:
            parts[OPTIMIZER] = self.states // num
        parts[BUCKETS] = self._buckets()
        if shared:
            parts[GATHERED] = self._gathered()
        return parts

    def _sharded(self, shards: Shards) -> dict[str, int]:
        """FSDP2."""
        parts = {part: shards.of(part) for part in self.weights}
        if self.config.lora is not None:
            parts[ADAPTER] = self._share(4 * self.trained)
        parts[GRADIENTS] = shards.gradients
        parts[OPTIMIZER] = self._share(optimizer_states(self.geometry, self.config, self.trained))
        parts[GATHERED] = shards.gathered
        return parts

    def _whole(self) -> dict[str, int]:
        """One process, or DDP: every rank holds everything."""
        each = 4 if self.config.lora is not None else self.each  # PEFT trains adapters in float32
        parts = dict(self.weights)
        if self.config.lora is not None:
            parts[ADAPTER] = self.trained * each
        parts[GRADIENTS] = self.trained * each
        parts[OPTIMIZER] = optimizer_states(self.geometry, self.config, self.trained)
        if self.num > 1:
            parts[BUCKETS] = self.trained * each  # DDP's own copy of the gradients
        return parts

    @property
    def states(self) -> int:
        """Of DeepSpeed's optimizer, all ranks together: float32 weights and the states."""
        return 4 * self.trained + optimizer_states(self.geometry, self.config, self.trained)

    @property
    def offloads_weights(self) -> bool:
        """Whether a rank's share of the weights lies in host memory (ZeRO-3)."""
        return self.stage == 3 and self.zero.get("offload_param", {}).get("device", "none") != "none"

    def on_host(self) -> int:
        """What all ranks together have put into host memory."""
        size = 0
        if self.topology.offloads_optimizer:
            size += self.states + 4 * self.trained  # and the gradients, in float32
        if self.offloads_weights:
            size += sum(self.weights.values()) + (self.trained * self.each if self.config.lora is not None else 0)
        return size

    def _share(self, size: int) -> int:
        return -(-size // self.num)

    def _buckets(self) -> int:
        """DeepSpeed's buffers, none larger than what is sent in it."""
        reduce = min(int(self.zero["reduce_bucket_size"]), self.trained) * self.each
        if self.zero.get("overlap_comm"):
            reduce *= 2
        gather = 0 if self.stage == 3 else min(int(self.zero["allgather_bucket_size"]), self.trained) * self.each
        return reduce + gather

    def _gathered(self) -> int:
        """Whole weights that ZeRO-3 holds at once: as many as it may, or the largest one."""
        largest = max([*embeddings(self.geometry).values(), *(stack.numel for stack in stacks(self.geometry))])
        if PER_LAYER not in self.weights:
            largest = embeddings(self.geometry)["token embedding"]
        gradient = 2 if self.config.tuning == "full" else 1
        live = min(int(self.zero["stage3_max_live_parameters"]), sum(self.weights.values()) // self.each)
        return max(live, gradient * largest) * self.each


def _host(weights: dict[str, int], place: Placement, topology: Topology, ranks: _Ranks) -> dict[str, int]:
    """Memory of one node."""
    config = ranks.config
    on_node = min(topology.num_processes, GPUS_A_NODE)
    host = {f"{on_node} process{'es' if on_node > 1 else ''}": on_node * PROCESS}
    if offloaded := ranks.on_host() * on_node // topology.num_processes:
        host["offloaded by ZeRO"] = offloaded
    if topology.fsdp is not None and config.tuning == "full" and config.model.dtype != "float32":
        host["loading, all in float32 for each process"] = on_node * 4 * ranks.trained
    if place.experts == "host" and EXPERTS in weights:
        host["experts, pinned"] = on_node * weights[EXPERTS]
    if place.ple == "host" and PER_LAYER in weights:
        host["per-layer embeddings (page cache, shared)"] = weights[PER_LAYER]
    return host


def _disk(geometry: Geometry, config: RunConfig, topology: Topology, trained: int) -> dict[str, int]:
    """Files of a run and of what comes after it."""
    each = BYTES[config.model.dtype]
    is_zero = topology.deepspeed is not None or (topology.fsdp is not None and config.tuning == "full")
    saved = each if config.tuning == "full" or is_zero else 4
    checkpoint = trained * (saved + (4 if is_zero else saved)) + optimizer_states(geometry, config, trained)
    whole = num_parameters(geometry) * each
    if config.tuning == "full":
        checkpoint += (num_parameters(geometry) - trained) * each
    limit = config.train.save_total_limit
    disk = {"a checkpoint": checkpoint}
    if limit is not None:
        disk[f"{limit + 1} checkpoints, while the last is written"] = (limit + 1) * checkpoint
    disk["the base"] = num_parameters(geometry) * 2  # as Google publishes it
    if config.lora is not None:
        disk["the merged model"] = whole
    return disk
