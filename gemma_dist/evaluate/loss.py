"""The teacher-forced loss at decision points: how likely gold's own tokens are to the model, by kind of token.

The prompts of a trajectory, each with what gold writes behind it, are read as one tree (`tree.py`), chunk by chunk, and
every trajectory by itself: so no number hangs on the ranks, or on what else is read. Where each history is what stood
there when its last answer was written, that is one pass over the trajectory.

A model that is partitioned over the ranks (ZeRO-3, FSDP2) runs on all of them at once, as in `generate.py`.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gemma_dist import world
from gemma_dist.data.encode import Encoder, Prompt
from gemma_dist.data.kinds import KINDS
from gemma_dist.evaluate.cache import TreeCache
from gemma_dist.evaluate.chunk import CHUNK, chunk_of
from gemma_dist.evaluate.decision import KindLoss
from gemma_dist.evaluate.gold_tokens import GoldTokens
from gemma_dist.evaluate.tree import PromptTree, grow_tree
from gemma_dist.model.head import use_target_head
from gemma_dist.model.zero3 import is_partitioned

DIGITS = 6  # of a sum of nats in a line: far below what the order of sums changes


@dataclass(frozen=True)
class _Targets:
    """The K tokens of a tree that are scored, in the order of the tokens before them."""

    before: np.ndarray  # (K,): where in the tree each is predicted
    ids: np.ndarray  # (K,)
    kinds: np.ndarray  # (K,)
    points: np.ndarray  # (K,): which decision point each is of


class GoldReader:
    """Reads what gold writes; `failed` are the points that could not be read, with the reason. A model that is
    partitioned raises it instead."""

    def __init__(self, model: Any, encoder: Encoder) -> None:
        self._model, self._encoder, self._device = model, encoder, model.device
        self._text, self._in_step = model.config.get_text_config(), is_partitioned(model)
        self.failed: list[tuple[GoldTokens, str]] = []
        use_target_head(model.get_base_model() if hasattr(model, "get_base_model") else model)

    @torch.inference_mode()
    def losses(self, trajectories: Sequence[list[GoldTokens]]) -> Iterator[tuple[GoldTokens, dict[str, KindLoss]]]:
        """What each point's gold costs, by kind. Each rank of a partitioned model calls this once, with trajectories or
        without."""
        waiting = deque(filter(None, trajectories))
        while True:
            mine = bool(waiting)
            if not (world.any_rank([mine])[0] if self._in_step else mine):
                return
            points = waiting.popleft() if waiting else [self._nothing()]
            try:
                found = self._read(points)
            except (RuntimeError, ValueError) as error:
                if self._in_step:
                    raise
                self.failed += [(point, str(error)) for point in points]
                continue
            if mine:
                yield from zip(points, found, strict=True)

    def _read(self, points: Sequence[GoldTokens]) -> list[dict[str, KindLoss]]:
        """All points of a trajectory, in one tree."""
        tree = grow_tree([_with_answer(point) for point in points])
        targets = _targets_of(tree, points)
        cache = TreeCache(tree, self._text, self._device)
        chunks = deque(tree.chunks(CHUNK))
        nll, right = np.zeros(len(targets.ids)), np.zeros(len(targets.ids), bool)
        while True:
            more = bool(chunks)
            if self._in_step:
                (more,) = world.any_rank([more])
            if not more:
                break
            if chunks:
                start, stop = chunks.popleft()
                chosen = slice(*np.searchsorted(targets.before, (start, stop)))
                places = targets.before[chosen] - start
                nll[chosen], right[chosen] = self._pass(cache, start, stop, places, targets.ids[chosen])
            else:
                self._pretend()
        return [_sums(targets, nll, right, number) for number in range(len(points))]

    def _pass(
        self, cache: TreeCache, start: int, stop: int, places: np.ndarray, ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read tokens start … stop-1: nats of the K `ids` behind `places` (K,) among them, and which are likeliest."""
        chunk = chunk_of(cache, self._encoder, start, stop, always_image=self._in_step)
        outputs = self._model(
            input_ids=torch.tensor([chunk.input_ids], device=self._device),
            position_ids=torch.tensor([chunk.positions], device=self._device),
            attention_mask=chunk.masks,
            past_key_values=cache,
            use_cache=True,
            target_positions=torch.from_numpy(places + chunk.num_fillers).to(self._device),
            target_ids=torch.from_numpy(ids).to(self._device),
            **{name: tensor.to(self._device) for name, tensor in chunk.pixels.items()},
        )
        return -outputs.log_probs.double().cpu().numpy(), outputs.is_top1.bool().cpu().numpy()

    def _pretend(self) -> None:
        """Take part in a pass of the other ranks."""
        tree = grow_tree([self._nothing().prompt])
        none = np.zeros(0, np.int64)
        self._pass(TreeCache(tree, self._text, self._device), 0, 1, none, none)

    def _nothing(self) -> GoldTokens:
        """A point at which nothing is scored."""
        bos = self._encoder.tokenizer.bos_token_id
        return GoldTokens(Prompt([bos], [0], [], "", 1, []), [bos], b"\0")


def _with_answer(point: GoldTokens) -> Prompt:
    """A point's prompt and answer, but for its last token, behind which nothing is scored."""
    prompt, read = point.prompt, point.ids[:-1]
    types = [*prompt.mm_token_type_ids, *[0] * len(read)]
    return replace(prompt, input_ids=[*prompt.input_ids, *read], mm_token_type_ids=types)


def _targets_of(tree: PromptTree, points: Sequence[GoldTokens]) -> _Targets:
    """What is scored of all points of a tree."""
    found = []
    for number, (path, point) in enumerate(zip(tree.paths, points, strict=True)):
        before = path[len(point.prompt.input_ids) - 1 :]
        rows = zip(before.tolist(), point.ids, point.kinds, strict=True)
        found += [(place, token, kind, number) for place, token, kind in rows if kind]
    columns = np.array(sorted(found), np.int64).reshape(-1, 4).T
    return _Targets(*columns)


def _sums(targets: _Targets, nll: np.ndarray, right: np.ndarray, point: int) -> dict[str, KindLoss]:
    """What the tokens of one point add up to, by kind."""
    found: dict[str, KindLoss] = {}
    for kind, name in KINDS.items():
        chosen = (targets.points == point) & (targets.kinds == kind)
        if chosen.any():
            nats = round(float(nll[chosen].sum()), DIGITS)
            found[name] = {"nll": nats, "tokens": int(chosen.sum()), "right": int(right[chosen].sum())}
    return found
