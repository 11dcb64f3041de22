"""Encoded trajectories -> the tensors of one micro-batch, as a Gemma 4's `forward` takes them.

A row is a sample, or a pack of several, and is padded on the right. A micro-batch without an image gets a filler, so
that every rank runs the vision tower in every forward pass: at ZeRO-3 the ranks' collectives would not match otherwise,
and DDP would wait for gradients that never come. (Where the tower is not loaded, there is none.) The filler is trained
on nothing and nothing can see it: it stands behind the last token of a row, where causal attention never looks, and
bidirectional image attention joins only tokens of one image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from gemma_dist.data.encoded import IGNORE_INDEX, Encoded
from gemma_dist.data.types import Processor
from gemma_dist.model.vision import Patches, patches_of_processor

SHORTEST = 2  # tokens: a loss is scored on the token before


@dataclass(frozen=True)
class Sample:
    """One trajectory as token ids, and its N images (if any) as the tensors that `Encoder.pixels` makes."""

    id: str
    encoded: Encoded
    pixels: dict[str, torch.Tensor]
    weight: float = 1.0  # by which its loss is multiplied


@dataclass(frozen=True)
class ControlIds:
    """The token ids that the collator itself writes, and the patches of the image that it fills in."""

    pad: int
    begin_image: int
    image: int
    end_image: int
    patches: Patches


def control_ids(processor: Processor) -> ControlIds:
    """The ids of a processor's padding and image tokens, and its patches."""
    tokenizer = processor.tokenizer
    begin_image, end_image = tokenizer.convert_tokens_to_ids([processor.boi_token, processor.eoi_token])
    patches = patches_of_processor(processor)
    return ControlIds(tokenizer.pad_token_id, begin_image, processor.image_token_id, end_image, patches)


def collate(samples: list[Sample], ids: ControlIds, *, filler: bool = True) -> dict[str, torch.Tensor]:
    """One micro-batch of B samples with N images; an empty one becomes a single row that holds the filler alone.

    Args:
        filler: False for a model without a vision tower; an empty micro-batch is then a row of padding.

    Returns:
        `input_ids`, `labels`, `attention_mask`, `mm_token_type_ids` (B, T) int64, T the longest row, and `kinds` (B, T)
        uint8, those of the labels (`data/kinds.py`, 0 where there is none); where a sample has a weight, `weights`
        (B, T) float32, by which losses are multiplied; `pixel_values`
        (N, P, values of a patch) float32 and `image_position_ids` (N, P, 2) int64, P the most patches of an image,
        where missing patches are 0 with position -1, as Gemma 4's image processors pad. The images stand in the order
        of the rows.
    """
    batch = _collate([[sample] for sample in samples], ids, filler)
    del batch["position_ids"]  # counted from the left: what the model does by itself
    return batch


def collate_packs(packs: list[list[Sample]], ids: ControlIds, *, filler: bool = True) -> dict[str, torch.Tensor]:
    """One micro-batch of B packs, each a row of documents, for a model that attends within documents.

    The filler and a row's padding are documents too, trained on nothing; an empty pack is a row of just those.

    Returns:
        As `collate`, the images in the order of rows and documents, with `position_ids` (B, T) int64, which start at 0
        in each document, in the place of `attention_mask`.
    """
    batch = _collate(packs, ids, filler)
    del batch["attention_mask"]
    return batch


def _collate(packs: list[list[Sample]], ids: ControlIds, filler: bool) -> dict[str, torch.Tensor]:
    """All tensors that `collate` and `collate_packs` return, a row for each pack (one empty row if there are none)."""
    rows = []
    for pack in packs or [[]]:
        row = _empty_row()
        for sample in pack:
            # The label of a token is scored on the token before it, which here may be another document's.
            assert sample.encoded.labels[0] == IGNORE_INDEX, f"{sample.id} trains its first token"
            encoded = sample.encoded
            _append(row, encoded.input_ids, encoded.labels, encoded.mm_token_type_ids, kinds=encoded.kinds)
        rows.append(row)
    images = [sample.pixels for pack in packs for sample in pack if sample.encoded.num_images]
    if not images and filler:
        shortest = min(rows, key=lambda row: len(row["input_ids"]))
        _append(shortest, [ids.begin_image, ids.image, ids.end_image], [IGNORE_INDEX] * 3, [0, 1, 0])
        images = [ids.patches.image(1, 1)]
    elif not any(row["input_ids"] for row in rows):
        _append(rows[0], [ids.pad] * SHORTEST, [IGNORE_INDEX] * SHORTEST, [0] * SHORTEST)
    length = max(len(row["input_ids"]) for row in rows)
    for row in rows:
        missing = length - len(row["input_ids"])
        _append(row, [ids.pad] * missing, [IGNORE_INDEX] * missing, [0] * missing, attended=0)
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    batch["kinds"] = batch["kinds"].to(torch.uint8)
    if any(sample.weight != 1 for pack in packs for sample in pack):
        batch["weights"] = _weights(packs, length)
    if not images:
        return batch
    most_patches = max(part["pixel_values"].shape[1] for part in images)
    for name, value in (("pixel_values", 0), ("image_position_ids", -1)):
        padded = []
        for part in images:  # (images of a sample, patches, values of a patch)
            missing_patches = most_patches - part[name].shape[1]
            padded.append(pad(part[name], (0, 0, 0, missing_patches), value=value))
        batch[name] = torch.cat(padded)
    return batch


def _weights(packs: list[list[Sample]], length: int) -> torch.Tensor:
    """(B, T) float32: that of each token's sample; 1 behind them."""
    weights = torch.ones(len(packs), length)
    for row, pack in zip(weights, packs, strict=True):
        start = 0
        for sample in pack:
            end = start + sample.encoded.num_tokens
            row[start:end] = sample.weight
            start = end
    return weights


def _empty_row() -> dict[str, list[int]]:
    """A row to `_append` to: for each tensor (B, T) the values of its row."""
    names = ("input_ids", "labels", "kinds", "attention_mask", "position_ids", "mm_token_type_ids")
    return {name: [] for name in names}


def _append(
    row: dict[str, list[int]],
    input_ids: list[int],
    labels: list[int],
    mm_token_type_ids: list[int],
    *,
    kinds: Sequence[int] = (),
    attended: int = 1,
) -> None:
    """Put a document behind the end of `row`; without `kinds` it is trained on nothing."""
    row["input_ids"] += input_ids
    row["labels"] += labels
    row["kinds"] += kinds or [0] * len(labels)
    row["attention_mask"] += [attended] * len(input_ids)
    row["position_ids"] += range(len(input_ids))
    row["mm_token_type_ids"] += mm_token_type_ids
