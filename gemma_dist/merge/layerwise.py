"""A Gemma 4 in float32, computed layer by layer from the mapped files of its folder: one layer is held at a time.

transformers maps the files of a model that is loaded in their own dtype, so that nothing is read yet. Here each weight
is put aside, and its parameter gets one element that stands for all. While a layer runs, and any module outside of the
layers, its parameters hold their weights in float32. To read each layer once, all samples go through it before the
next: a first pass, in which the layers hand on what they get, says what the model gives to each.

Of the embeddings only the rows of the samples' tokens are read, and the head is multiplied in blocks of the vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from gemma_dist.errors import CheckpointError
from gemma_dist.merge.folders import model_class
from gemma_dist.model.load import load_another, with_adapter
from gemma_dist.model.record import Quantization

Inputs = dict[str, torch.Tensor]  # of one row, as the model's `forward` takes them


@dataclass
class Run:
    """One row on its way through a model."""

    inputs: Inputs
    in_bfloat16: bool = False  # under autocast; else in float32
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)  # of each layer: what it takes
    hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # (1, T, width), behind the last layer run

    def autocast(self) -> Any:
        """The context that it computes in."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.in_bfloat16, cache_enabled=False)


class LayerwiseModel:
    """A model folder, with adapters or without.

    Attributes:
        largest_bytes: the most bytes of weights that were held at once.
    """

    def __init__(
        self,
        folder: Path,
        adapters: Sequence[tuple[Path, float]] = (),
        quantization: Quantization | None = None,
    ) -> None:
        """
        Args:
            adapters: folders, with what each is multiplied by in the sum.
            quantization: how the weights were held; None: as they are stored.

        Raises:
            CheckpointError: the folder lacks weights, or those that `quantization` names.
        """
        self.largest_bytes = 0
        self._quantization = quantization
        model = _load_mapped(folder)
        self._stored = {parameter: parameter.data for parameter in model.parameters()}
        self._in_4_bits = _parameters_in_4_bits(model, quantization)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor in self._stored:
                tensor.data = _stand_in(tensor)
            elif tensor.is_floating_point():
                tensor.data = tensor.data.float()
        for module in model.modules():
            if hasattr(module, "scalar_embed_scale"):  # of an embedding; its buffer was rounded to the files' dtype
                module.embed_scale = torch.tensor(module.scalar_embed_scale)
        self.vocab_size = model.lm_head.weight.shape[0]
        if adapters:
            _add_adapters(model, adapters)
        self._model = model.eval()
        text = getattr(model.model, "language_model", model.model)
        self._layers, self._norm = list(text.layers), text.norm
        self._softcap = model.config.get_text_config().final_logit_softcapping
        self._hold_while_called(model, text.layers)

    @torch.no_grad()
    def run(self, runs: Sequence[Run]) -> list[torch.Tensor]:
        """What the head gets of each row, (T, width)."""
        for run in runs:
            self._begin(run)
        for number, layer in enumerate(self._layers):
            with self._held(layer.parameters()):
                for run in runs:
                    args, kwargs = run.calls[number]
                    run.calls[number] = ((), {})  # frees what only this layer needs
                    with run.autocast():
                        run.hidden = layer(run.hidden, *args, **kwargs)
        results = []
        for run in runs:
            with run.autocast():
                results.append(self._norm(run.hidden)[0])
            run.calls.clear()
            run.hidden = torch.empty(0)
        return results

    @torch.no_grad()
    def head(self, start: int, stop: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The function from (T, width) to the logits (T, stop - start) of the tokens `start` to `stop`."""
        head = self._model.lm_head
        is_plain = isinstance(head, torch.nn.Linear)  # neither adapted nor replaced
        rows = self._full(head.weight, self._stored[head.weight][start:stop]) if is_plain else None

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            found = head(hidden)[:, start:stop] if rows is None else torch.nn.functional.linear(hidden, rows)
            return found if self._softcap is None else torch.tanh(found / self._softcap) * self._softcap

        return logits

    def _begin(self, run: Run) -> None:
        """Compute all that stands in front of the layers, and note what each of them is to get."""

        def note(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            run.hidden = hidden
            run.calls.append((args, kwargs))
            return hidden

        with contextlib.ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(patch.object(layer, "forward", note))
            stack.enter_context(run.autocast())
            self._model.model(**run.inputs, use_cache=False)

    def _full(self, parameter: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """A weight, or rows of it, in float32 as the model held it."""
        if self._quantization is None:
            return stored.float()
        dtype = self._quantization.get("weights_dtype")
        loaded = stored if dtype is None else stored.to(getattr(torch, dtype))
        if parameter not in self._in_4_bits:
            return loaded.float()
        return _from_4_bits(loaded, self._quantization).float()

    @contextlib.contextmanager
    def _held(self, parameters: Iterator[torch.Tensor]) -> Iterator[None]:
        """Within, these of the parameters that the files hold have their weights."""
        mine = [parameter for parameter in parameters if parameter in self._stored]
        for parameter in mine:
            parameter.data = self._full(parameter, self._stored[parameter])
        self.largest_bytes = max(self.largest_bytes, sum(parameter.nbytes for parameter in mine))
        try:
            yield
        finally:
            for parameter in mine:
                parameter.data = _stand_in(parameter)

    def _hold_while_called(self, module: torch.nn.Module, layers: torch.nn.Module) -> None:
        """Let `module` and all that is in it, but for the layers, have their weights for as long as they run."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        if isinstance(module, torch.nn.Embedding) and module.weight in self._stored:
            module.forward = self._look_up(module)  # type: ignore[method-assign, assignment]
            return
        is_adapted = isinstance(module, BaseTunerLayer)  # may read the weight of the layer that it wraps
        if any(parameter in self._stored for parameter in module.parameters(recurse=is_adapted)):
            entered = contextlib.ExitStack()

            def enter(*_: Any) -> None:
                entered.enter_context(self._held(module.parameters(recurse=is_adapted)))

            def leave(*_: Any) -> None:
                entered.close()

            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave, always_call=True)
        for child in () if is_adapted else module.children():
            if child is not layers:
                self._hold_while_called(child, layers)

    def _look_up(self, table: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """The `forward` of an embedding that reads no more than the rows of its tokens."""

        def forward(input_ids: torch.Tensor) -> torch.Tensor:
            rows = torch.nn.functional.embedding(input_ids, self._stored[table.weight])
            return self._full(table.weight, rows) * getattr(table, "scalar_embed_scale", 1.0)

        return forward


def _load_mapped(folder: Path) -> Any:
    """A model in the dtype of its files, mapped. Raises CheckpointError where weights of it are missing."""
    model, loading = model_class(folder).from_pretrained(
        folder, dtype="auto", output_loading_info=True, trust_remote_code=False
    )
    if missing := sorted(loading["missing_keys"]) + sorted(map(str, loading["mismatched_keys"])):
        raise CheckpointError(
            f"{folder} lacks weights of the model, such as {missing[:3]}: check the base with transformers' "
            "from_pretrained"
        )
    return model


def _add_adapters(model: Any, adapters: Sequence[tuple[Path, float]]) -> None:
    """Put a weighted sum of adapters into the model's modules, as PEFT computes it."""
    from peft.tuners.lora.layer import LoraLayer

    (first, _), *more = adapters
    adapted = with_adapter(model, first)
    names = ["default", *(f"adapter_{number}" for number in range(2, 2 + len(more)))]
    for name, (folder, _) in zip(names[1:], more, strict=True):
        load_another(adapted, folder, name)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            for name, (_, weight) in zip(names, adapters, strict=True):
                if name in module.scaling:
                    module.scaling[name] *= weight
    if more:
        adapted.base_model.set_adapter(names)


def _parameters_in_4_bits(model: Any, quantization: Quantization | None) -> set[torch.Tensor]:
    """The parameters that training held in 4 bits. Raises CheckpointError where the model does not have one."""
    if quantization is None:
        return set()
    parameters = dict(model.named_parameters())
    names = [f"{module}.weight" for module in quantization["modules"]] + quantization.get("parameters", [])
    if absent := [name for name in names if name not in parameters]:
        raise CheckpointError(
            f"{len(absent)} weights that gemma_dist.json lists as 4-bit, such as {absent[0]}, are not in the model as "
            "it loads now; merge with the version of transformers that trained it, or without --verify"
        )
    return {parameters[name] for name in names}


def _from_4_bits(loaded: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """A weight taken to 4 bits and back by bitsandbytes itself, as a layer of it does."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from gemma_dist.model.experts import quantize_stack
    from gemma_dist.model.four_bit_cpu import dequantize_as_gpus_do

    dequantize_as_gpus_do()
    quantize = quantize_stack if loaded.dim() == 3 else quantize_4bit
    codes, state = quantize(
        loaded,
        quant_type=quantization["bnb_4bit_quant_type"],
        compress_statistics=quantization.get("bnb_4bit_use_double_quant", False),
    )
    return dequantize_4bit(codes, state)


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 tensor of the shape that has one element."""
    return torch.zeros(()).expand(tensor.shape)
