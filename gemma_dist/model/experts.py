"""The experts of 26B-A4B in 4 bits: nearly all of its weights, and no linear layers, which alone bitsandbytes takes.

Each layer has two stacks of weights, `experts.gate_up_proj` and `experts.down_proj`, of shape (experts, out, in). They
are quantized one by one as the file is read, and made full again by each product with them: one stack at a time, in the
forward pass and once more in the backward pass, so that none waits in the graph in between. The products are those of
transformers' `grouped_mm_experts_forward`, so the bits are those of a model that holds the full stacks.

LoRA on the experts (`lora.target_parameters`) has PEFT's tensors and names. It is added to a product's result, not to
the stack: no gradient of a whole stack ever exists, and in bfloat16 no small update is rounded away.

Depends on two private functions, as read in transformers 5.23 and PEFT 0.21: `integrations.moe._grouped_linear`, and
`ParamWrapper._activate_lora`, which PEFT's wrapper calls around its experts.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit, quantize_blockwise
from bitsandbytes.nn import Params4bit
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.integrations.moe import _grouped_linear
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from gemma_dist.config import EXPERT_WEIGHTS
from gemma_dist.config import FOUR_BIT_BLOCK_SIZE as BLOCK_SIZE
from gemma_dist.model.host_experts import HostExperts

RANK_MULTIPLE = 8  # grouped products want rows of a multiple of 16 bytes

Where = Literal["gpu", "host"]


def quantize_stack(
    stack: torch.Tensor, *, quant_type: str, compress_statistics: bool
) -> tuple[torch.Tensor, QuantState]:
    """`bitsandbytes.functional.quantize_4bit` of a stack (experts, out, in), to the bit, one expert at a time.

    On a CPU bitsandbytes takes some 16 bytes of memory for each weight that it quantizes at once.
    """
    if stack[0].numel() % BLOCK_SIZE:
        return quantize_4bit(
            stack, blocksize=BLOCK_SIZE, compress_statistics=compress_statistics, quant_type=quant_type
        )
    codes, scales = [], []
    for expert in stack:
        packed, state = quantize_4bit(expert, blocksize=BLOCK_SIZE, quant_type=quant_type)
        codes.append(packed)
        scales.append(state.absmax)
    state.shape, state.absmax = stack.shape, torch.cat(scales)
    if compress_statistics:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=256)
        state.nested = True
    return torch.cat(codes), state


class FourBitExperts(Gemma4TextExperts):
    """The experts of a layer with their stacks in 4 bits, as frozen parameters or in host memory.

    Attributes:
        host: where the stacks are if they are no parameters.
        adapters: of a stack, for as long as PEFT's wrapper runs this module: B (experts, out, r), A (experts, r, in)
            and the scale of what is added to its products.
    """

    def __init__(self, config: Any, dtype: torch.dtype, compute_dtype: torch.dtype, **quantization: Any) -> None:
        """
        Args:
            dtype: what the stacks are quantized from.
            compute_dtype: what the products are computed in.
            quantization: settings of `Params4bit`.
        """
        super().__init__(config)
        self.compute_dtype = compute_dtype
        self.states: dict[str, QuantState] = {}  # of the stacks that are parameters: FSDP2 makes new ones, without it
        self.host: HostExperts | None = None
        self.adapters: dict[str, list[tuple[torch.Tensor, torch.Tensor, float]]] = {}
        for name in EXPERT_WEIGHTS:
            setattr(self, name, Params4bit(getattr(self, name).data.to(dtype), requires_grad=False, **quantization))

    def packed(self, name: str) -> tuple[torch.Tensor, QuantState | None]:
        """The codes of a stack, two in a byte, on the device, with their scales. None: it is not loaded yet, and the
        tensor has the shape of the stack."""
        if self.host is not None:
            return self.host.stack(self, name)
        parameter = getattr(self, name)
        return parameter, getattr(parameter, "quant_state", None) or self.states.get(name)

    def full(self, name: str) -> torch.Tensor:
        """A stack made full again, (experts, out, in) in `compute_dtype`: from the dtype that it was loaded in."""
        codes, state = self.packed(name)
        return dequantize_4bit(codes, state).to(self.compute_dtype)

    def stand_in(self, name: str) -> torch.Tensor:
        """A tensor that has a stack's shape, dtype and device, and one element."""
        if self.host is not None:
            state = self.host.state_of(self, name)
            return torch.empty((), dtype=state.dtype, device=self.host.device).expand(state.shape)
        codes, known = self.packed(name)
        shape, dtype = (codes.shape, codes.dtype) if known is None else (known.shape, known.dtype)
        return torch.empty((), dtype=dtype, device=codes.device).expand(shape)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: (T, hidden).
            top_k_index: (T, k), the experts of each token; `top_k_weights` their shares.

        Returns:
            (T, hidden)
        """
        num_tokens, top_k = top_k_index.shape
        expert, order = torch.sort(top_k_index.reshape(-1))  # (T * k,): one row for each token and expert of it
        counted = expert.float() if expert.device.type == "cpu" else expert.int()  # what histc takes there
        counts = torch.histc(counted, bins=self.num_experts, min=0, max=self.num_experts - 1)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)  # (experts,): of each expert's run of rows
        rows = self._product("gate_up_proj", hidden_states[order // top_k], ends)
        rows = self._product("down_proj", self._apply_gate(rows), ends)
        rows = rows * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel(), device=order.device)
        return rows[place].view(num_tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)

    def _product(self, name: str, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """(rows, out) from (rows, in): each row times the weight of its expert in a stack, and its adapters."""
        inputs = rows.to(self.compute_dtype)
        result = FrozenProduct.apply(inputs, ends, partial(self.full, name))
        for b, a, scale in self.adapters.get(name, ()):
            missing = -a.shape[1] % RANK_MULTIPLE
            a = torch.nn.functional.pad(a.to(inputs.dtype), (0, 0, 0, missing))
            b = torch.nn.functional.pad(b.to(inputs.dtype), (0, missing)).contiguous()
            result = result + scale * _grouped_linear(_grouped_linear(inputs, a, ends), b, ends)
        return result.to(rows.dtype)


class FrozenProduct(torch.autograd.Function):
    """Rows times the weights of their experts, which get no gradient and are made anew for the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, ends: torch.Tensor, full: Callable[[], torch.Tensor]) -> torch.Tensor:
        """
        Args:
            rows: (rows, in), sorted by expert; `ends` where each expert's run of them ends.
            full: gives the stack (experts, out, in).
        """
        ctx.save_for_backward(ends)
        ctx.full = full
        return _grouped_linear(rows, full(), ends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """That of the rows."""
        (ends,) = ctx.saved_tensors
        return _grouped_linear(gradient.contiguous(), ctx.full(), ends, is_transposed=True), None, None


class ParamWrapper(PeftParamWrapper):
    """PEFT's adapter of one stack: instead of adding it to the stack, it hands it to the experts.

    PEFT nests wrappers of several stacks, and knows them by this name of the class.
    """

    def get_param(self) -> torch.Tensor:
        """What PEFT reads shape, dtype and device from."""
        return self.get_base_layer().stand_in(self.parameter_name)

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        adapters = self.get_base_layer().adapters
        active = [name for name in active_adapters if name in self.lora_A]
        adapters[self.parameter_name] = [self.get_delta_factors(name) for name in active]
        try:
            yield
        finally:
            del adapters[self.parameter_name]


def adapt_four_bit_experts(settings: Any) -> Any:
    """PEFT's `LoraConfig`, so that it wraps 4-bit experts with the wrapper above, and others as always."""
    settings._register_custom_module({FourBitExperts: ParamWrapper})
    return settings


class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """transformers' loader of 4-bit models, taking the stacks of the experts as well: one at a time, as the file is
    read."""

    def __init__(self, quantization_config: Any, *, where: Where, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.host = HostExperts() if where == "host" else None

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        wanted = self.quantization_config
        for path, module in list(model.named_modules()):
            if isinstance(module, Gemma4TextExperts):
                with torch.device("meta"):
                    experts = FourBitExperts(
                        module.config,
                        module.gate_up_proj.dtype,
                        wanted.bnb_4bit_compute_dtype,
                        quant_type=wanted.bnb_4bit_quant_type,
                        compress_statistics=wanted.bnb_4bit_use_double_quant,
                        blocksize=BLOCK_SIZE,
                    )
                model.set_submodule(path, experts)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Those of 4-bit linear layers, and the stacks."""
        path, _, name = param_name.rpartition(".")
        is_stack = name in EXPERT_WEIGHTS and isinstance(model.get_submodule(path), FourBitExperts)
        return is_stack or super().param_needs_quantization(model, param_name, **kwargs)

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes of a weight on the device: transformers allocates them all beforehand."""
        if self.host is not None and param_name.rpartition(".")[2] in EXPERT_WEIGHTS:
            return 0
        return super().param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> Bnb4bitQuantize:
        """What is done to a weight once it is read."""
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.host is not None:
            self.host.settle()
        return super()._process_model_after_weight_loading(model, **kwargs)


class _Quantize(Bnb4bitQuantize):
    """bitsandbytes' way with a linear layer's weight, and ours with a stack."""

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        (path, value), *more = input_dict.items()
        assert not more
        module = model.get_submodule(path.rpartition(".")[0])
        if not isinstance(module, FourBitExperts):
            return super().convert(input_dict, model=model, **kwargs)
        name = path.rpartition(".")[2]
        wanted = getattr(module, name)
        settings = {"quant_type": wanted.quant_type, "compress_statistics": wanted.compress_statistics}
        codes, state = quantize_stack(value[0] if isinstance(value, list) else value, **settings)
        module._is_hf_initialized = True
        host = self.hf_quantizer.host
        if host is not None:
            host.add(module, name, codes, state)
            codes = codes.new_empty(0)  # in the place of the parameter for as long as transformers looks for one
        else:
            module.states[name] = state
        return {path: Params4bit(codes, quant_state=state, bnb_quantized=True, blocksize=BLOCK_SIZE, **settings)}


@contextlib.contextmanager
def naming_stacks(model: Any) -> Iterator[None]:
    """Within, PEFT finds the stacks that are in host memory under their names, as parameters of one element."""
    on_host = [module for module in model.modules() if isinstance(module, FourBitExperts) and module.host is not None]
    for module in on_host:
        for name in EXPERT_WEIGHTS:
            setattr(module, name, torch.nn.Parameter(module.stand_in(name), requires_grad=False))
    try:
        yield
    finally:
        for module in on_host:
            for name in EXPERT_WEIGHTS:
                delattr(module, name)


@contextlib.contextmanager
def loading_experts(where: Where | None) -> Iterator[None]:
    """Within, `from_pretrained` in 4 bits takes the experts as well; None changes nothing."""
    if where is None:
        yield
        return
    with patch.dict(AUTO_QUANTIZER_MAPPING, {"bitsandbytes_4bit": partial(ExpertsQuantizer, where=where)}):
        yield
