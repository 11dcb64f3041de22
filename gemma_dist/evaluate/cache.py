"""Keys and values of what a model has read and written, in the place of transformers' caches.

`TreeCache` holds a `PromptTree`: all tokens, in all layers. When it is read, sliding layers keep what an answer can
still see: the last tokens before each prompt's end. `RowCache` holds the answers that are being written, a row each,
and nothing of their prompts: it sees these where they are, in their trees. In full layers the token t of an answer
stands in slot t of its row. Sliding layers keep a ring of as many slots as their window is wide: t stands in slot t
modulo that, where the token is that just left the window. So rows of any lengths stand side by side without padding.

The layers of a model call `update`, and layers that share K/V take what it returned to another. Masks are made here
too (`attention_mask`), as transformers takes them: by layer type.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gemma_dist.evaluate.attention import Sight, States
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
        self.num_sliding = len(tree)  # tokens that sliding layers hold
        self._sees: Masks = {}  # of a closed tree: what of these each prompt sees, (P, tokens)

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

    def close(self) -> None:
        """All is read: keep what answers see."""
        window = self._text.sliding_window
        last = [path[max(0, len(path) - window + 1) :] for path in self.tree.paths]
        places = np.unique(np.concatenate(last))
        for layer_type, seen in ((FULL, self.tree.paths), (SLIDING, last)):
            sees = np.zeros((len(seen), len(self.tree)), bool)
            for prompt, path in enumerate(seen):
                sees[prompt, path] = True
            self._sees[layer_type] = torch.from_numpy(sees if layer_type == FULL else sees[:, places]).to(self._device)
        self.num_sliding = len(places)
        kept = torch.from_numpy(places).to(self._device)
        self._positions = self._positions[kept]
        for states in (self.keys, self.values):
            for layer, read in states.items():
                if self._text.layer_types[layer] == SLIDING and len(places) < len(self.tree):
                    states[layer] = read.index_select(2, kept)

    def sees(self, layer_type: str, prompts: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(R, tokens) bool: what of a closed tree is seen from `positions` (R,) of answers to `prompts` (R,)."""
        seen = self._sees[layer_type][prompts]
        if layer_type == SLIDING:
            seen &= positions[:, None] - self._positions < self._text.sliding_window
        return seen


@dataclass(frozen=True)
class Place:
    """Where an answer stands."""

    tree: TreeCache
    prompt: int  # of the tree, which it answers
    length: int  # tokens of the answer before the next

    @property
    def position(self) -> int:
        """Of the next token."""
        return len(self.tree.tree.paths[self.prompt]) + self.length


class RowCache:
    """B rows of S slots, in sliding layers fewer; what is in a row matters only up to its answer's length."""

    def __init__(self, text: Any, device: torch.device) -> None:
        """`text` is the config of the language model."""
        self._text, self._device = text, device
        self.keys: dict[int, torch.Tensor] = {}  # (heads, B, slots, width)
        self.values: dict[int, torch.Tensor] = {}
        self.num_rows, self.num_slots = 0, 0
        self._slots: dict[str, torch.Tensor] = {}  # of the next tokens, (B,), by layer type
        self._rows = torch.empty(0, dtype=torch.long)
        self._trees: list[TreeCache] = []  # that the next pass sees

    def _size(self, layer_type: str) -> int:
        """Slots of a layer."""
        return min(self.num_slots, self._text.sliding_window) if layer_type == SLIDING else self.num_slots

    def resize(self, rows: Sequence[int], num_rows: int, num_slots: int) -> None:
        """Keep `rows` alone, in that order, and make room for `num_rows` of `num_slots`, more than any length."""
        self.num_rows, self.num_slots = num_rows, num_slots
        self._rows = torch.arange(num_rows, device=self._device)
        kept = torch.tensor(rows, dtype=torch.long, device=self._device)
        for states in (self.keys, self.values):
            for layer, old in states.items():
                new = self._empty(old, layer)
                fits = min(new.shape[2], old.shape[2])
                new[:, : len(rows), :fits] = old[:, kept, :fits]
                states[layer] = new

    def _empty(self, like: torch.Tensor, layer: int) -> torch.Tensor:
        """States of a layer, with the heads of others."""
        size = self._size(self._text.layer_types[layer])
        return like.new_zeros(like.shape[0], self.num_rows, size, like.shape[-1])

    def begin(self, places: Sequence[Place | None]) -> dict[str, Sight]:
        """The next pass writes one token in each row (None: one of no meaning); what it sees."""
        of_trees: dict[int, list[tuple[int, Place]]] = {}
        for row, place in enumerate(places):
            if place:
                of_trees.setdefault(id(place.tree), []).append((row, place))
        self._trees = [taken[0][1].tree for taken in of_trees.values()]
        numbers = [[(row, place.prompt, place.position) for row, place in taken] for taken in of_trees.values()]
        columns = [torch.tensor(taken, device=self._device).unbind(1) for taken in numbers]
        lengths = torch.tensor([place.length if place else 0 for place in places], device=self._device)
        sights = {}
        for layer_type in (FULL, SLIDING):
            size = self._size(layer_type)
            self._slots[layer_type] = lengths % size
            own = torch.arange(size, device=self._device) <= lengths[:, None]
            sees = [tree.sees(layer_type, *of) for tree, (_, *of) in zip(self._trees, columns, strict=True)]
            hidden = own.new_ones(len(places), size + max((one.shape[1] for one in sees), default=0))
            hidden[:, :size] = ~own
            rows = [rows for rows, _, _ in columns]
            for taken, seen in zip(rows, sees, strict=True):
                hidden[taken, size : size + seen.shape[1]] = ~seen
            sights[layer_type] = Sight(rows, hidden[:, None])
        return sights

    def end(self) -> None:
        """The pass is done: the trees that it saw live only as long as answers to them wait or are written."""
        self._trees = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> tuple[States, States]:
        """Keep the states of this pass, (B, heads, 1, width); those that it sees."""
        slots = self._slots[self._text.layer_types[layer_idx]]
        for states, new in ((self.keys, key_states), (self.values, value_states)):
            new = new[:, :, 0].transpose(0, 1)
            if layer_idx not in states:
                states[layer_idx] = self._empty(new, layer_idx)
            states[layer_idx][:, self._rows, slots] = new
        return (
            States(self.keys[layer_idx], [tree.keys[layer_idx][0] for tree in self._trees]),
            States(self.values[layer_idx], [tree.values[layer_idx][0] for tree in self._trees]),
        )
