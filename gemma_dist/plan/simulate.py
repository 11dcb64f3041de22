"""One training step of a recipe's model at its true size, without a weight or a GPU: the peak of its memory.

    simulate(load_config("launch/e4b_qlora_16gb.yaml"), num_tokens=4096).peak_bytes

The modules are the real ones (transformers, PEFT, bitsandbytes, TRL's fused LM head, our packed attention), their
tensors fakes that have a size and no bytes. The step is that of `train`: forward with autocast, recomputation of
checkpointed layers, backward, clipping, optimizer. `allocator.py` counts, `kernels.py` has what CUDA does otherwise than
the fake CPU. Not seen: CUDA's context, cuBLAS' workspaces, fragmentation, buckets of DDP and ZeRO.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gemma_dist.config import RunConfig
from gemma_dist.model.per_layer import ROWS
from gemma_dist.model.towers import unneeded_towers
from gemma_dist.plan import kernels
from gemma_dist.plan.allocator import ACTIVATIONS, Allocator, make_known
from gemma_dist.plan.fake import fake_model
from gemma_dist.plan.optimizer import FakeOptimizer

Device = Literal["cpu", "cuda"]
Batch = dict[str, torch.Tensor]
GRANULARITY: dict[Device, int] = {"cpu": 1, "cuda": 512}  # of the allocator, in bytes
LOSS_HEAD = "loss head"


@dataclass(frozen=True)
class Simulated:
    """The peak of a step, and what held the bytes at that moment."""

    peak_bytes: int
    parts: dict[str, int]  # their sum is the peak


def simulate(
    config: RunConfig, *, num_tokens: int, num_images: int = 0, tokens_per_image: int = 280
) -> Simulated:
    """A step on a GPU, on micro-batches of full sequences whose text is trained from end to end.

    Args:
        num_tokens: of each sequence, those of its images included.
        num_images: of each sequence.

    Raises:
        CheckpointError, ConfigError: as `model.shapes.size_by_part`.
    """
    from gemma_dist.plan.batch import full_batch

    batch = full_batch(config, num_tokens=num_tokens, num_images=num_images, tokens_per_image=tokens_per_image)
    # What global_batch_size comes to is not known here.
    accumulates = config.train.gradient_accumulation_steps != 1
    return simulate_step(config, [batch], device="cuda", accumulates=accumulates)


def simulate_step(
    config: RunConfig, batches: list[Batch], *, device: Device, accumulates: bool = False
) -> Simulated:
    """A later step of a run: the optimizer has its states, and the gradients of the step before are gone.

    Args:
        batches: the micro-batches of one optimizer step on this rank. Without `pixel_values` the run has no images, and
            with rows of per-layer embeddings their table is on the host.
        device: whose kernels and allocator.
        accumulates: whether the step has earlier micro-batches, whose gradients are there.
    """
    mode = FakeTensorMode()
    allocator = Allocator(GRANULARITY[device], partial(kernels.scratch, device))
    has_images = any("pixel_values" in batch for batch in batches)
    unneeded = unneeded_towers(frozen=config.tuning != "full", has_images=has_images)
    model = fake_model(config, mode, allocator, unneeded=unneeded, table=not any(ROWS in batch for batch in batches))
    prepare(model, config)
    with ExitStack() as contexts:
        contexts.enter_context(_loss_head_apart(allocator, device))
        contexts.enter_context(mode)
        contexts.enter_context(allocator)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: allocator.label(p.grad, "gradients"))
        with allocator.counting_as("optimizer"):
            optimizer = FakeOptimizer(config.train, model, device=device)
        inputs = [_fake_batch(mode, allocator, batch) for batch in batches] if device == "cpu" else []
        if accumulates:
            with allocator.counting_as("gradients"):
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
        allocator.reset_peak()
        for i, batch in enumerate(batches):
            fakes = inputs[i] if inputs else _fake_batch(mode, allocator, batch)
            loss = _loss(model, fakes, config)
            del fakes
            loss.backward()
            del loss
        with allocator.counting_as("optimizer"):
            if config.train.max_grad_norm > 0:
                torch.nn.utils.clip_grad_norm_(trained, config.train.max_grad_norm, foreach=device == "cuda")
            optimizer.step()
        peak, parts = allocator.peak, allocator.parts_at_peak
    return Simulated(peak, {part: size for part, size in sorted(parts.items(), key=lambda item: -item[1]) if size})


def prepare(model: Any, config: RunConfig) -> None:
    """What TRL's and transformers' trainers do to a model before its first step."""
    from peft import PeftModel
    from trl.trainer.utils import add_fused_lm_head

    is_adapter = isinstance(model, PeftModel)
    add_fused_lm_head(model.get_base_model() if is_adapter else model, outputs=("log_probs", "entropy", "is_top1"))
    if config.train.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()


def _fake_batch(mode: FakeTensorMode, allocator: Allocator, batch: Batch) -> Batch:
    fakes = {}
    for name, tensor in batch.items():
        fakes[name] = mode.from_tensor(tensor) if tensor.is_floating_point() else make_known(mode, tensor)
        allocator.label(fakes[name], "batch")
    return fakes


def _loss(model: Any, batch: Batch, config: RunConfig) -> torch.Tensor:
    """As `SFTTrainer.compute_loss`, around a model that accelerate wrapped."""
    from accelerate.utils import convert_outputs_to_fp32

    autocast = torch.autocast("cpu", torch.bfloat16) if config.train.bf16 else nullcontext()
    forward = autocast(model.forward) if config.train.bf16 else model.forward  # type: ignore[operator]
    if config.train.bf16:
        forward = convert_outputs_to_fp32(forward)
    outputs = forward(**batch, use_cache=False, fused_lm_head=True)
    return -outputs.log_probs.sum() / outputs.label_mask.sum().clamp(min=1)


@contextmanager
def _loss_head_apart(allocator: Allocator, device: Device) -> Iterator[None]:
    """Within, what TRL's fused head allocates is counted as its own, by the kernels of `device`."""
    from trl.kernels import chunked_logprob

    function = chunked_logprob.ChunkedLogProbFunction

    def apart(original: Any) -> Any:
        def run(*args: Any) -> Any:
            with allocator.counting_as(LOSS_HEAD):
                return original(*args)

        return staticmethod(run)

    with ExitStack() as patches:
        for name in ("forward", "backward"):
            patches.enter_context(patch.object(function, name, apart(getattr(function, name))))
        if device == "cuda":
            patches.enter_context(kernels.cuda_kernels(chunked_logprob))
        yield
