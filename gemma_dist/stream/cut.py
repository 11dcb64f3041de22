"""A micro-batch of packs, cut so that several ranks share each of its sequences (`train.sequence_parallel_size`).

The rows lie one behind the other, padded to a multiple of the ranks, and each rank takes a slice of equal length. The
labels are moved before the cut, since a slice's last token is scored on the next rank's first. With a slice come the
images that have tokens in it, so an image over a cut comes to both ranks, and a slice without an image gets a black one
of which no token is used: every rank runs the vision tower every time.
"""

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import pad

from gemma_dist.data.encoded import IGNORE_INDEX
from gemma_dist.model.attention import lay_out
from gemma_dist.model.images import places_of
from gemma_dist.model.sequence import NUMBERS, SHARE, Share
from gemma_dist.stream.collate import ControlIds

PIXELS, POSITIONS = "pixel_values", "image_position_ids"


def cut(
    batch: dict[str, torch.Tensor], ids: ControlIds, rank: int, num_ranks: int, *, filler: bool = True
) -> dict[str, Any]:
    """The share that `rank` of `num_ranks` has of a micro-batch.

    Args:
        batch: of B packs of T tokens, as `collate_packs` makes it without a filler.
        filler: False for a model without a vision tower.

    Returns:
        `input_ids`, `position_ids`, `mm_token_type_ids`, `shift_labels`, `shift_kinds` and, if the batch has weights,
        `shift_weights` (1, B * T / num_ranks, rounded up), where the label of a token is the token behind it;
        `pixel_values` and `image_position_ids` of the images in the slice, and which of their soft tokens stand where
        (`images.places_of`); `SHARE`, and `NUMBERS` (2, num_ranks * the length of a slice) int32: document and image of
        each token of all.
    """
    missing = -batch["input_ids"].numel() % num_ranks
    rows = {}
    fill = {"input_ids": ids.pad, "labels": IGNORE_INDEX, "kinds": 0, "weights": 1, "mm_token_type_ids": 0}
    for name, value in fill.items():
        if name in batch:
            rows[name] = pad(batch[name].flatten(), (0, missing), value=value)
    rows["position_ids"] = torch.cat([batch["position_ids"].flatten(), torch.arange(missing)])
    rows["shift_labels"] = pad(rows.pop("labels")[1:], (0, 1), value=IGNORE_INDEX)
    rows["shift_kinds"] = pad(rows.pop("kinds")[1:], (0, 1))
    if "weights" in rows:
        rows["shift_weights"] = pad(rows.pop("weights")[1:], (0, 1), value=1)
    layout = lay_out(rows["position_ids"][None], rows["mm_token_type_ids"][None])
    length = len(layout.images) // num_ranks
    own = slice(rank * length, (rank + 1) * length)
    images, used = _images(batch, rows["mm_token_type_ids"] != 0, own, ids, filler)
    if images:
        types = rows["mm_token_type_ids"][None, own]
        images |= places_of(types, images[POSITIONS], pooling=ids.patches.pooling, used=used)
    lengths = torch.tensor([end - start for start, end in layout.spans])
    numbers = torch.stack([torch.arange(len(lengths)).repeat_interleave(lengths), torch.tensor(layout.images)])
    return {
        **{name: row[None, own] for name, row in rows.items()},
        **images,
        SHARE: Share(rank, length, layout.spans, layout.images),
        NUMBERS: numbers.int(),
    }


def _images(
    batch: dict[str, torch.Tensor], is_image: torch.Tensor, own: slice, ids: ControlIds, filler: bool
) -> tuple[dict[str, torch.Tensor], slice]:
    """The images that have tokens in a slice, and which of their soft tokens those are."""
    before, end = int(is_image[: own.start].sum()), int(is_image[: own.stop].sum())
    if before == end:
        return (ids.patches.image(1, 1) if filler else {}), slice(0, 0)
    num_patches = (batch[POSITIONS] != -1).all(-1).sum(-1)
    bounds = [0, *(num_patches // ids.patches.pooling**2).cumsum(0).tolist()]  # of each image: its soft tokens
    chosen = [number for number, (start, stop) in enumerate(pairwise(bounds)) if start < end and stop > before]
    first = bounds[chosen[0]]
    part = slice(chosen[0], chosen[-1] + 1)
    return {name: batch[name][part] for name in (PIXELS, POSITIONS)}, slice(before - first, end - first)
