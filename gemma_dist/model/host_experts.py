"""4-bit experts in host memory: a layer is copied to the device when it is its turn, ahead of it where its turn can be
foreseen.

Layers take their turns up and down: forward from the first to the last, backward from the last to the first, recomputed
ones too. Two places on the device take layers of even and odd number, so that the layer at work and the one before or
behind it are there, and at both ends nothing has to be copied.

On a GPU the host memory is pinned, and copies run on a stream of their own beside what the layer at work computes. On a
CPU the same code copies from memory to memory, at once.
"""

import copy
from typing import Any

import torch
from bitsandbytes.functional import QuantState


class HostExperts:
    """The stacks of all layers' experts: codes and scales of each, by module and name.

    Attributes:
        device: where they are computed with.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._layers: list[Any] = []  # modules of experts, from the first layer to the last
        self._stacks: dict[tuple[int, str], tuple[torch.Tensor, QuantState]] = {}  # in host memory
        self._places: list[dict[str, tuple[torch.Tensor, QuantState]]] = [{}, {}]  # of two layers, on the device
        self._held: list[int | None] = [None, None]  # which layers are there, or on their way
        self._last, self._step = 0, 1  # the layer of the last turn, and the way to the next
        self._stream: Any = None
        self._arrived: list[Any] = [None, None]  # events: the copy is complete

    def add(self, module: Any, name: str, codes: torch.Tensor, state: QuantState) -> None:
        """Take a stack that was quantized on the device to host memory, layer by layer from the first."""
        self.device = codes.device
        if module not in self._layers:
            self._layers.append(module)
        layer = self._layers.index(module)
        on_host = copy.copy(state)  # the small tensors of the state stay on the device
        on_host.absmax = _on_host(state.absmax)
        self._stacks[layer, name] = _on_host(codes), on_host

    def settle(self) -> None:
        """All stacks are here: make room for two layers on the device, and take the modules' parameters away."""
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            self._arrived = [torch.cuda.Event(), torch.cuda.Event()]
        for layer, module in enumerate(self._layers):
            module.host, module.layer_on_host = self, layer
            for name in [name for _, name in self._stacks if _ == layer]:
                del module._parameters[name]
        for place in self._places:
            for (layer, name), (codes, state) in self._stacks.items():
                if layer == 0:
                    room = copy.copy(state)
                    room.absmax = torch.empty_like(state.absmax, device=self.device)
                    place[name] = torch.empty_like(codes, device=self.device), room

    def state_of(self, module: Any, name: str) -> QuantState:
        """Shape and dtype of a stack, without its turn."""
        return self._stacks[module.layer_on_host, name][1]

    def stack(self, module: Any, name: str) -> tuple[torch.Tensor, QuantState]:
        """Codes and scales of a stack on the device, valid until the next turn but one; the next layer's set out."""
        layer = module.layer_on_host
        if layer != self._last:
            self._step = 1 if layer > self._last else -1
        if layer == 0:
            self._step = 1
        elif layer == len(self._layers) - 1:
            self._step = -1
        self._last = layer
        self._fetch(layer)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived[layer % 2])
        if 0 <= (following := layer + self._step) < len(self._layers):
            self._fetch(following)
        codes, room = self._places[layer % 2][name]
        state = copy.copy(self._stacks[layer, name][1])
        state.absmax = room.absmax
        return codes, state

    def _fetch(self, layer: int) -> None:
        """Copy a layer to its place, unless it is there, after all that was computed with the layer there before."""
        place = layer % 2
        if self._held[place] == layer:
            return
        self._held[place] = layer
        if self._stream is None:
            self._copy(layer)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._copy(layer)
            self._arrived[place].record()

    def _copy(self, layer: int) -> None:
        for name, (codes, room) in self._places[layer % 2].items():
            from_codes, state = self._stacks[layer, name]
            codes.copy_(from_codes, non_blocking=True)
            room.absmax.copy_(state.absmax, non_blocking=True)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, pinned where it comes from a GPU."""
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.device.type == "cuda")
    return copied.copy_(tensor)
