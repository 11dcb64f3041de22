"""One training step on fakes, from the forward pass to the optimizer, and the peaks of its moments."""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gemma_dist.config import RunConfig
from gemma_dist.model.head import inputs_of_model, use_target_head
from gemma_dist.model.towers import Tower
from gemma_dist.plan import kernels
from gemma_dist.plan.allocator import ACTIVATIONS, Allocator, Peak, fake_of
from gemma_dist.plan.fake import fake_model
from gemma_dist.plan.optimizer import FakeOptimizer

Device = Literal["cpu", "cuda"]
Batch = dict[str, Any]  # tensors, and the layout of packs
GRANULARITY: dict[Device, int] = {"cpu": 1, "cuda": 512}  # of the allocator, in bytes
# Moments of a step, between two of which nothing is allocated.
RESTING, IMAGES, FORWARD, LOSS_HEAD, BACKWARD, OPTIMIZER = (
    "resting", "images", "forward", "loss head", "backward", "optimizer",
)  # fmt: skip
GRADIENTS, BATCH = "gradients", "batch"


class FakeStep:
    """A model with its optimizer, and the allocator that counts both."""

    def __init__(
        self, config: RunConfig, device: Device, *, unneeded: Collection[Tower], table: bool, accumulates: bool
    ) -> None:
        """
        Args:
            device: whose kernels and allocator.
            unneeded: towers that are not loaded.
            table: whether the model has its per-layer embeddings.
            accumulates: whether the step has earlier micro-batches, whose gradients are there.
        """
        self.config, self.device = config, device
        self.mode, self.allocator = FakeTensorMode(), Allocator(GRANULARITY[device], partial(kernels.scratch, device))
        self.model = fake_model(config, self.mode, self.allocator, unneeded=unneeded, table=table)
        _prepare(self.model, config)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with self._running():
            with self.allocator.counting_as(OPTIMIZER):
                self.optimizer = FakeOptimizer(config.train, self.model, device=device)
            if accumulates:
                with self.allocator.counting_as(GRADIENTS):
                    for parameter in self.trained:
                        parameter.grad = torch.empty_like(parameter)
        self.allocator.peaks.clear()

    def run(self, batches: list[Batch]) -> None:
        """Forward and backward passes of micro-batches."""
        with self._running():
            self._note_rest()
            # On a GPU the next micro-batch arrives while one is worked on (`train/feed.py`).
            coming = [self._fakes_of(batch) for batch in (batches if self.device == "cpu" else batches[:1])]
            for number in range(len(batches)):
                if self.device == "cuda":
                    coming.append(self._fakes_of(batches[min(number + 1, len(batches) - 1)]))
                with self.allocator.counting_as(ACTIVATIONS, moment=FORWARD):
                    loss = _loss(self.model, coming[0], self.config)
                with self.allocator.counting_as(ACTIVATIONS, moment=BACKWARD):
                    loss.backward()
                del loss
                coming = coming[1:] if self.device == "cuda" else coming[1:] + coming[:1]

    def update(self) -> None:
        """Clip the gradients, and the optimizer's step."""
        with self._running(), self.allocator.counting_as(OPTIMIZER, moment=OPTIMIZER):
            self._note_rest()
            if self.config.train.max_grad_norm > 0:
                foreach = self.device == "cuda"
                torch.nn.utils.clip_grad_norm_(self.trained, self.config.train.max_grad_norm, foreach=foreach)
            self.optimizer.step()

    def _note_rest(self) -> None:
        if RESTING not in self.allocator.peaks:
            live = self.allocator.live
            self.allocator.peaks[RESTING] = Peak(self.allocator.total, dict(live))

    def _fakes_of(self, batch: Batch) -> Batch:
        """A micro-batch of fakes; those of integers know their values."""
        fakes = {}
        with self.allocator.counting_as(BATCH):
            for name, value in batch.items():
                fakes[name] = fake_of(value) if torch.is_tensor(value) else value  # the layout of packs is none
        return fakes

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Within, tensors are fakes, and counted."""
        with ExitStack() as contexts:
            contexts.enter_context(_loss_head_apart(self.allocator, self.device))
            hooks = [p.register_post_accumulate_grad_hook(self._label_gradient) for p in self.trained]
            hooks += _images_apart(self.model, self.allocator) + _layers_apart(self.model, self.allocator)
            for hook in hooks:
                contexts.callback(hook.remove)
            contexts.enter_context(self.mode)
            contexts.enter_context(self.allocator)
            yield

    def _label_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.allocator.label(parameter.grad, GRADIENTS)


def _prepare(model: Any, config: RunConfig) -> None:
    """What TRL's and transformers' trainers do to a model before its first step."""
    from peft import PeftModel

    is_adapter = isinstance(model, PeftModel)
    use_target_head(model.get_base_model() if is_adapter else model)
    if config.train.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()


def _loss(model: Any, batch: Batch, config: RunConfig) -> torch.Tensor:
    """As `ToolCallTrainer.compute_loss`, around a model that accelerate wrapped."""
    from accelerate.utils import convert_outputs_to_fp32

    forward, inputs = model.forward, inputs_of_model(batch)
    with torch.autocast("cpu", torch.bfloat16) if config.train.bf16 else nullcontext():
        outputs = forward(**inputs)
    if config.train.bf16:
        outputs = convert_outputs_to_fp32(lambda: outputs)()
    return -outputs.log_probs.sum() / len(outputs.log_probs)


@contextmanager
def _loss_head_apart(allocator: Allocator, device: Device) -> Iterator[None]:
    """Within, what TRL's fused head allocates is counted as its own, by the kernels of `device`."""
    from trl.kernels import chunked_logprob

    function = chunked_logprob.ChunkedLogProbFunction

    def apart(original: Any) -> Any:
        def run(*args: Any) -> Any:
            with allocator.counting_as(LOSS_HEAD, moment=LOSS_HEAD):
                return original(*args)

        return staticmethod(run)

    with ExitStack() as patches:
        for name in ("forward", "backward"):
            patches.enter_context(patch.object(function, name, apart(getattr(function, name))))
        if device == "cuda":
            patches.enter_context(kernels.cuda_kernels(chunked_logprob))
        yield


def _images_apart(model: Any, allocator: Allocator) -> list[Any]:
    """Hooks that let the forward pass of what reads images be a moment of its own."""
    hooks = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("vision_tower", "embed_vision"):

            def begin(module: Any, args: Any) -> None:
                allocator.moment = IMAGES

            def end(module: Any, args: Any, output: Any) -> None:
                allocator.moment = FORWARD

            hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    return hooks


def _layers_apart(model: Any, allocator: Allocator) -> list[Any]:
    """Hooks that let the backward pass of each checkpointed layer, which begins when it is computed again, be a moment
    of its own."""
    moments = backward_moments(model.config.get_text_config())
    hooks = []
    for name, module in model.named_modules():
        if found := re.search(r"language_model\.layers\.(\d+)\.input_layernorm$", name):  # where a layer begins

            def begin(module: Any, args: Any, moment: str = moments[int(found[1])]) -> None:
                if allocator.moment.startswith(BACKWARD):
                    allocator.moment = moment

            hooks.append(module.register_forward_pre_hook(begin))
    return hooks


def backward_moments(text: Any) -> list[str]:
    """The name of the backward pass of each layer of a text config: by its kind, and counted from the end of those with
    keys and values of their own, or of those that share them."""
    owns = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", 0) or 0)
    moments, behind = [], Counter[str]()
    for number, layer_type in reversed(list(enumerate(text.layer_types))):
        kind = layer_type.removesuffix("_attention") + (" layer that shares" if number >= owns else " layer")
        behind[kind] += 1
        moments.append(f"{BACKWARD} of {kind}, {behind[kind]} from the end")
    return moments[::-1]
