"""Prompts that share their beginnings, as one sequence in which each shared token stands once. No torch here.

The decision points of a trajectory repeat the history before them, and trajectories of one source repeat its system
prompt and tools. So their prompts form a tree, and `PromptTree` is that tree laid flat: a prompt adds the tokens behind
the longest beginning that an earlier one has, and `paths` says where in the sequence its tokens are. A model reads it
in one go if each token sees its own path alone and knows how deep it stands in it (`positions`).

An image is shared where its bytes are. The last token of each prompt, from which the answer goes on, stands at the end
of the sequence: layers that share K/V then compute nothing else (`logits_to_keep` in transformers).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gemma_dist.data.encode import Prompt


@dataclass(frozen=True)
class Run:
    """Tokens start … stop-1 of the sequence, each behind the one before, and the first behind `before`."""

    start: int
    stop: int
    before: np.ndarray  # (K,): where the tokens before `start` in its path are, in order


@dataclass(frozen=True)
class PromptTree:
    """N tokens, of which the last are the ends of the P prompts."""

    input_ids: np.ndarray  # (N,) int64
    positions: np.ndarray  # (N,) int64: how many tokens are before it in its path
    image_of: np.ndarray  # (N,) int64: from 1, which of `images` a soft token is of; else 0
    images: list[bytes]  # in the order of their soft tokens
    runs: list[Run]  # in the order of the sequence
    paths: list[np.ndarray]  # of each prompt, (T,): where its tokens are

    def __len__(self) -> int:
        return len(self.input_ids)

    def chunks(self, size: int) -> list[tuple[int, int]]:
        """The sequence cut into (start, stop) of about `size` tokens: no image is cut. Of several, the last is the ends
        of the prompts alone: they stand all over the tree, and would have the others look at all of it."""
        num_inner, cuts = len(self) - len(self.paths), [0]
        while cuts[-1] + size < num_inner:
            cut = cuts[-1] + size
            while self.image_of[cut] and self.image_of[cut] == self.image_of[cut - 1]:
                cut += 1
            cuts.append(cut)
        if len(cuts) > 1 and cuts[-1] < num_inner:
            cuts.append(num_inner)
        return list(pairwise([*cuts, len(self)]))

    def first_seen(self, start: int, stop: int, window: int) -> int:
        """Where the first token is that one of start … stop-1 sees in its path among the `window` last, itself too."""
        first = start
        for run in self.runs:
            token = max(run.start, start)
            if token < min(run.stop, stop):
                position = max(0, int(self.positions[token]) - window + 1)
                is_before = position < len(run.before)
                first = min(first, int(run.before[position]) if is_before else run.start + position - len(run.before))
        return first

    def sees(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, stop) bool: which tokens before `stop` stand in the path of each token from `start` on."""
        seen = np.zeros((stop - start, stop), bool)
        for run in self.runs:
            first, last = max(run.start, start), min(run.stop, stop)
            if first < last:
                rows = seen[first - start : last - start]
                rows[:, run.before] = True
                rows[:, run.start : last] = np.tri(last - first, last - run.start, first - run.start, dtype=bool)
        return seen


def grow_tree(prompts: "Sequence[Prompt]") -> PromptTree:
    """The tree of some prompts, at least one."""
    known: dict[bytes, int] = {}
    names: list[np.ndarray] = []  # of each prompt
    inner: list[np.ndarray] = []  # of each prompt: its path without the last token
    ids: list[np.ndarray] = []
    image_of: list[np.ndarray] = []
    images: list[bytes] = []
    runs: list[Run] = []
    end = 0
    for prompt in prompts:
        places = _places_of_images(prompt)
        name = _names(prompt, places, known)[:-1]
        before = _longest_beginning(name, names, inner)
        shared = len(before)
        new = places[shared:-1]
        if new.any():
            first, last = new[new > 0].min(), new.max()
            new = np.where(new > 0, new - first + 1 + len(images), 0)
            images += prompt.images[first - 1 : last]
        ids.append(np.array(prompt.input_ids[shared:-1], np.int64))
        image_of.append(new)
        start, end = end, end + len(ids[-1])
        if start < end:
            runs.append(Run(start, end, before))
        names.append(name)
        inner.append(np.concatenate([before, np.arange(start, end)]))
    runs += [Run(end + number, end + number + 1, path) for number, path in enumerate(inner)]
    paths = [np.append(path, end + number) for number, path in enumerate(inner)]
    positions = np.zeros(end + len(prompts), np.int64)
    for path in paths:
        positions[path] = np.arange(len(path))
    return PromptTree(
        input_ids=np.concatenate([*ids, [prompt.input_ids[-1] for prompt in prompts]]).astype(np.int64),
        positions=positions,
        image_of=np.concatenate([*image_of, np.zeros(len(prompts))]).astype(np.int64),
        images=images,
        runs=runs,
        paths=paths,
    )


def _places_of_images(prompt: "Prompt") -> np.ndarray:
    """(T,): from 1, which of the prompt's images a soft token is of; else 0. Other tokens stand between two images."""
    is_soft = np.array(prompt.mm_token_type_ids, bool)
    begins = is_soft & ~np.concatenate([[False], is_soft[:-1]])
    return np.where(is_soft, begins.cumsum(), 0)


def _names(prompt: "Prompt", places: np.ndarray, known: dict[bytes, int]) -> np.ndarray:
    """(T,): what each token is: its id, or of a soft token a negative number that stands for the image's bytes."""
    numbers = [0, *(known.setdefault(image, -1 - len(known)) for image in prompt.images)]
    return np.where(places > 0, np.array(numbers)[places], prompt.input_ids)


def _longest_beginning(name: np.ndarray, names: list[np.ndarray], inner: list[np.ndarray]) -> np.ndarray:
    """Where the tokens are that `name` has in common with the earlier prompt that begins like it for longest."""
    longest = np.empty(0, np.int64)
    for other, path in zip(names, inner, strict=True):
        most = min(len(name), len(other))
        if most > len(longest):
            differs = np.flatnonzero(name[:most] != other[:most])
            shared = int(differs[0]) if len(differs) else most
            if shared > len(longest):
                longest = path[:shared]
    return longest
