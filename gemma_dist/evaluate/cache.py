"""Keys and values of what a model has read, in the place of transformers' caches.

`TreeCache` holds a `PromptTree`: all tokens, in all layers. `RowCache` holds the answers that are being written, a row
each, and the prompts before them, copied from a tree. In full layers the token at position p stands in slot p of its
row. Sliding layers keep a ring of as many slots as their window is wide: p stands in slot p modulo that, where the
token is that just left the window. So a new token sees the slots up to its position, in every layer, and rows of any
lengths stand side by side without padding on the left.

The layers of a model call `update`, and layers that share K/V take what it returned to another. Masks are made here
too (`attention_mask`), as transformers takes them: by layer type.
"""

from collections.abc import Sequence
from typing import Any

import torch

from gemma_dist.evaluate.tree import PromptTree

Masks = dict[str, torch.Tensor]  # layer type -> (B, 1, T, S) bool: True where a query sees a key
FULL, SLIDING = "full_attention", "sliding_attention"


class TreeCache:
    """A `PromptTree` as a model reads it, from front to back."""

    def __init__(self, tree: PromptTree, text: Any, device: torch.device) -> None:
        """`text` is the config of the language model."""
        self.tree, self._text, self._device = tree, text, device
        self.keys: dict[int, torch.Tensor] = {}  # of each layer that keeps some: (1, heads, N, width of a head)
        self.values: dict[int, torch.Tensor] = {}
        self._start, self._stop, self._num_fillers = 0, 0, 0
        self._first = {FULL: 0, SLIDING: 0}  # that the next pass sees
        self._positions = torch.from_numpy(tree.positions).to(device)
        self._image_of = torch.from_numpy(tree.image_of).to(device)

    def begin(self, start: int, stop: int, num_fillers: int = 0) -> Masks:
        """The next pass reads tokens start … stop-1; what they see. Before them stand `num_fillers` that nobody sees
        and nothing keeps; they see one token, since softmax wants something to look at."""
        self._start, self._stop, self._num_fillers = start, stop, num_fillers
        sees = torch.from_numpy(self.tree.sees(start, stop)).to(self._device)
        behind = self._positions[start:stop, None] - self._positions[:stop]
        is_near = behind < self._text.sliding_window
        sliding = sees & is_near
        if self._text.use_bidirectional_attention == "vision":
            image = self._image_of[start:stop, None]
            sliding |= (image == self._image_of[:stop]) & (image > 0) & is_near
        self._first[SLIDING] = self.tree.first_seen(start, stop, self._text.sliding_window)
        masks = {}
        for layer_type, mask in ((FULL, sees), (SLIDING, sliding)):
            first = self._first[layer_type]
            filler = torch.zeros(num_fillers, stop - first, dtype=torch.bool, device=self._device)
            filler[:, 0] = True
            masks[layer_type] = torch.cat([filler, mask[:, first:]])[None, None]
        return masks

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the states of this pass, (1, heads, T, width); those that it sees."""
        if layer_idx not in self.keys:
            heads, width = key_states.shape[1], key_states.shape[3]
            for kept in (self.keys, self.values):
                kept[layer_idx] = key_states.new_empty(1, heads, len(self.tree), width)
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept[layer_idx][:, :, self._start : self._stop] = new[:, :, self._num_fillers :]
        seen = slice(self._first[self._text.layer_types[layer_idx]], self._stop)
        return self.keys[layer_idx][:, :, seen], self.values[layer_idx][:, :, seen]


class RowCache:
    """B rows of S slots, in sliding layers fewer; what is in a row matters only up to its position."""

    def __init__(self, text: Any, device: torch.device) -> None:
        """`text` is the config of the language model."""
        self._text, self._device = text, device
        self.keys: dict[int, torch.Tensor] = {}  # (B, heads, slots, width)
        self.values: dict[int, torch.Tensor] = {}
        self.num_rows, self.num_slots = 0, 0
        self._slots: dict[str, torch.Tensor] = {}  # of the next tokens, (B,), by layer type
        self._rows = torch.empty(0, dtype=torch.long)

    def _size(self, layer_type: str) -> int:
        """Slots of a layer."""
        return min(self.num_slots, self._text.sliding_window) if layer_type == SLIDING else self.num_slots

    def resize(self, rows: Sequence[int], num_rows: int, num_slots: int) -> None:
        """Keep `rows` alone, in that order, and make room for `num_rows` of `num_slots`, more than any position."""
        self.num_rows, self.num_slots = num_rows, num_slots
        self._rows = torch.arange(num_rows, device=self._device)
        kept = torch.tensor(rows, dtype=torch.long, device=self._device)
        for states in (self.keys, self.values):
            for layer, old in states.items():
                size = self._size(self._text.layer_types[layer])
                new = old.new_zeros(num_rows, old.shape[1], size, old.shape[3])
                fits = min(size, old.shape[2])
                new[: len(rows), :, :fits] = old[kept, :, :fits]
                states[layer] = new

    def fill(self, row: int, cache: TreeCache, prompt: int) -> None:
        """Copy what a prompt of a tree is into a row, from whose position an answer goes on."""
        path = torch.from_numpy(cache.tree.paths[prompt]).to(self._device)
        for states, source in ((self.keys, cache.keys), (self.values, cache.values)):
            for layer, read in source.items():
                size = self._size(self._text.layer_types[layer])
                if layer not in states:
                    states[layer] = read.new_zeros(self.num_rows, read.shape[1], size, read.shape[3])
                first = max(0, len(path) - size)
                kept = read[0].index_select(1, path[first:])
                states[layer][row, :, : len(path) - first] = kept.roll(first % size, 1) if first else kept

    def begin(self, positions: torch.Tensor) -> Masks:
        """The next pass writes one token in each row, at `positions` (B,); what it sees."""
        masks = {}
        for layer_type in (FULL, SLIDING):
            size = self._size(layer_type)
            self._slots[layer_type] = positions % size
            masks[layer_type] = (torch.arange(size, device=self._device) <= positions[:, None])[:, None, None]
        return masks

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the states of this pass, (B, heads, 1, width); those in all slots."""
        slots = self._slots[self._text.layer_types[layer_idx]]
        self.keys[layer_idx][self._rows, :, slots] = key_states[:, :, 0]
        self.values[layer_idx][self._rows, :, slots] = value_states[:, :, 0]
        return self.keys[layer_idx], self.values[layer_idx]
