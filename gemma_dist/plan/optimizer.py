"""The states that the optimizer of a recipe keeps, and what a step of it takes."""

import torch

from gemma_dist.config import TrainConfig

SMALLEST_8BIT, SCALES_BLOCK = 4096, 256  # elements: of a parameter in 8 bits, and that share a scale (bitsandbytes)


class FakeOptimizer:
    """`train.optim` over fakes: torch's own optimizers as they are, those of bitsandbytes by the states they keep."""

    def __init__(self, settings: TrainConfig, model: torch.nn.Module, *, device: str) -> None:
        """Make the states of all parameters that train, as after a first step."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.states: list[torch.Tensor] = []
        self.optimizer: torch.optim.Optimizer | None = None
        name = settings.optim
        if "adamw_8bit" in name or "adamw_32bit" in name:
            embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
            for parameter in parameters:
                # transformers keeps those of embeddings in 32 bits
                in_8_bits = "8bit" in name and id(parameter) not in embeddings
                self.states += _bitsandbytes_states(parameter, in_8_bits=in_8_bits)
        elif name == "adafactor":
            from transformers.optimization import Adafactor

            self.optimizer = Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)
        elif name == "sgd":
            self.optimizer = torch.optim.SGD(parameters, lr=1e-3, foreach=device == "cuda")
        else:
            fused = name == "adamw_torch_fused"
            self.optimizer = torch.optim.AdamW(
                parameters, lr=1e-3, fused=fused or None, foreach=device == "cuda" and not fused
            )
            for parameter in parameters:  # a fake counter stays at its first value, and at 0 is divided by
                moments = {name: torch.empty_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
        if self.optimizer is not None:
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            self.step()
            self.optimizer.zero_grad()

    def step(self) -> None:
        """Update all parameters from their gradients; bitsandbytes does it in place."""
        if self.optimizer is not None:
            self.optimizer.step()


def _bitsandbytes_states(parameter: torch.Tensor, *, in_8_bits: bool) -> list[torch.Tensor]:
    """The two moments of a parameter, on the GPU also where they may be paged out."""
    if not in_8_bits or parameter.numel() < SMALLEST_8BIT:
        return [torch.empty(parameter.shape) for _ in range(2)]
    scales = -(-parameter.numel() // SCALES_BLOCK)
    moments = [torch.empty(parameter.shape, dtype=torch.uint8) for _ in range(2)]
    return moments + [torch.empty(scales) for _ in range(2)]
