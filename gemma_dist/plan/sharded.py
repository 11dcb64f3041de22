"""What FSDP2 leaves on each GPU, and what it gathers there for as long as it is needed.

Units are gathered one at a time, the next one while the last is worked on: the layers, and the rest of the model, the
token embedding foremost, which stays from its first use to its last. Weights that train lie in float32; all are sent as
they are computed with (`train.bf16`), and gradients are summed in float32.
"""

from collections import Counter

from gemma_dist.config import RunConfig
from gemma_dist.plan.geometry import Geometry, embeddings, linears, stacks
from gemma_dist.plan.weights import BYTES, EXPERTS, LAYER, QUANTIZED, bytes_in_4_bits

SUMMED = 4  # bytes of a number while gradients are summed
AT_ONCE = 2  # layers: the one at work, and the one that is on its way


class Shards:
    """Weights and gradients of one rank of `num`.

    Attributes:
        gathered: bytes of whole weights, and of the gradients of layers, that are there at once.
        last_gradients: bytes of what comes at the end of the backward pass, where no activations are left: the gradient
            of the embeddings, as it was computed and as it is summed.
    """

    def __init__(
        self, geometry: Geometry, config: RunConfig, weights: dict[str, int], trained: int, num: int, *, reshard: bool
    ) -> None:
        """Args:
        weights: bytes of the base that are on the GPU, by part, whole.
        trained: number of weights that train.
        reshard: whether a layer is given back after the forward pass.
        """
        self._geometry, self._config, self._weights, self._num = geometry, config, weights, num
        self._each = BYTES[config.model.dtype]
        self._sent = 2 if config.train.bf16 else self._each
        self._full = config.tuning == "full"
        layers, rest = self._largest_layer(EXPERTS in weights), self._rest()
        at_once = AT_ONCE if reshard else len(geometry.layers)
        self.gathered = at_once * layers + rest
        self.last_gradients = 0
        if self._full:
            numel = layers // self._sent
            self.gathered += AT_ONCE * numel * (self._sent + SUMMED)
            self.last_gradients = rest // self._sent * (self._sent + SUMMED)
        self.gradients = SUMMED * trained  # of an adapter: whole until the end of a step
        if self._full:
            self.gradients = -(-self.gradients // num)

    def of(self, part: str) -> int:
        """Bytes of this rank's share of a part of the base."""
        size = self._weights[part]
        if self._full and part != "audio tower":  # which alone does not train
            size = size * SUMMED // self._each
        scales = self._scales(part)  # no parameters: every rank has them
        return scales + -(-(size - scales) // self._num)

    def _scales(self, part: str) -> int:
        """Bytes of a part in 4 bits that are scales."""
        quantization = self._config.quantization
        if quantization is None or not (part == QUANTIZED or (part == EXPERTS and quantization.quantize_moe_experts)):
            return 0
        numel = 2**20
        whole = bytes_in_4_bits(numel, double_quant=quantization.bnb_4bit_use_double_quant)
        return int(self._weights[part] * (whole - numel / 2) / whole)

    def _largest_layer(self, with_experts: bool) -> int:
        """Bytes of a layer as it is sent; its 4-bit weights stay in 4 bits."""
        quantization, sizes = self._config.quantization, Counter[str]()
        for linear in linears(self._geometry):
            if match := LAYER.match(linear.path):
                numel = linear.inputs * linear.outputs
                sizes[match[1]] += numel * self._sent if quantization is None else numel // 2
        largest = max(sizes.values())
        if with_experts:
            in_4_bits = quantization is not None and quantization.quantize_moe_experts
            numel = sum(stack.numel for stack in stacks(self._geometry)) // len(self._geometry.layers)
            largest += numel // 2 if in_4_bits else numel * self._sent
        return largest

    def _rest(self) -> int:
        """Bytes of the embeddings that are on the GPU, as they are sent."""
        return sum(numel * self._sent for part, numel in embeddings(self._geometry).items() if part in self._weights)
