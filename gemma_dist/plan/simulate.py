"""One training step of a recipe's model at its true size, without a weight or a GPU: the peak of its memory.

    simulate(load_config("launch/e4b_qlora_16gb.yaml"), num_tokens=4096).peak_bytes

The modules are the real ones (transformers, PEFT, bitsandbytes, TRL's fused LM head, our packed attention), their
tensors fakes that have a size and no bytes. The step (`step.py`) is that of `train`: forward with autocast,
recomputation of checkpointed layers, backward, clipping, optimizer. `allocator.py` counts, `kernels.py` has what CUDA
does otherwise than the fake CPU. Not seen: CUDA's context, cuBLAS' workspaces, fragmentation, buckets of DDP and ZeRO,
`train.activation_offloading`.

Deep models are simulated at small depths, whose line is followed to their own (`depth.py`).
"""

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma_dist.config import RunConfig
from gemma_dist.model.load import read_config
from gemma_dist.model.per_layer import ROWS
from gemma_dist.model.towers import unneeded_towers
from gemma_dist.plan.allocator import Peak
from gemma_dist.plan.batch import full_batch
from gemma_dist.plan.depth import continued, depths_of
from gemma_dist.plan.step import OPTIMIZER, RESTING, Batch, Device, FakeStep


@dataclass(frozen=True)
class Simulated:
    """The peak of a step, and what held the bytes at that moment."""

    peak_bytes: int
    parts: dict[str, int]  # their sum is the peak
    moment: str  # of the peak


def simulate(
    config: RunConfig,
    *,
    num_tokens: int,
    num_images: int = 0,
    tokens_per_image: int = 280,
    every_layer: bool = False,
) -> Simulated:
    """A step on a GPU, on micro-batches of full sequences whose text is trained from end to end.

    Args:
        num_tokens: of a micro-batch, those of its images included; its sequences are of one length.
        num_images: of a micro-batch.
        every_layer: run all layers of deep models as well, which takes several times as long.

    Raises:
        CheckpointError, ConfigError: as `model.shapes.size_by_part`.
        ConfigError: the images do not fit into the sequences.
    """
    # What global_batch_size comes to is not known here.
    accumulates = config.train.gradient_accumulation_steps != 1

    def batch(of: RunConfig) -> Batch:
        return full_batch(of, num_tokens=num_tokens, num_images=num_images, tokens_per_image=tokens_per_image)

    text = read_config(config.model.model_name_or_path).get_text_config()
    depths = None if every_layer or not accumulates else depths_of(config, text)
    if depths is None:
        return simulate_step(config, [batch(config)], device="cuda", accumulates=accumulates)
    whole = _step(config, [batch(config)], "cuda", accumulates)
    whole.update()
    resting, peaks = whole.allocator.peaks[RESTING], {OPTIMIZER: whole.allocator.peaks[OPTIMIZER]}
    del whole
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for depth in depths:
            shallow = depth.config_of(config, Path(folder))
            step = _step(shallow, [batch(shallow)], "cuda", accumulates)
            step.run([batch(shallow)])
            found.append(step.allocator.peaks)
    input_bytes = num_tokens * text.hidden_size * getattr(torch, config.model.dtype).itemsize
    for moment, on_top in continued(text, depths, found, RESTING, input_bytes):
        peaks[moment] = Peak(resting.total + on_top.total(), dict(Counter(resting.parts) + on_top))
    return _highest(peaks)


def simulate_step(config: RunConfig, batches: list[Batch], *, device: Device, accumulates: bool = False) -> Simulated:
    """A later step of a run: the optimizer has its states, and the gradients of the step before are gone.

    Args:
        batches: the micro-batches of one optimizer step on this rank. Without `pixel_values` the run has no images, and
            with rows of per-layer embeddings their table is on the host.
        device: whose kernels and allocator.
        accumulates: whether the step has earlier micro-batches, whose gradients are there.
    """
    step = _step(config, batches, device, accumulates)
    step.run(batches)
    step.update()
    return _highest(step.allocator.peaks)


def _step(config: RunConfig, batches: list[Batch], device: Device, accumulates: bool) -> FakeStep:
    has_images = any("pixel_values" in batch for batch in batches)
    unneeded = unneeded_towers(frozen=config.tuning != "full", has_images=has_images)
    table = not any(ROWS in batch for batch in batches)
    return FakeStep(config, device, unneeded=unneeded, table=table, accumulates=accumulates)


def _highest(peaks: Mapping[str, Peak]) -> Simulated:
    moment, peak = max(peaks.items(), key=lambda item: item[1].total)
    largest_first = sorted(peak.parts.items(), key=lambda item: -item[1])
    return Simulated(peak.total, {part: size for part, size in largest_first if size}, moment)
