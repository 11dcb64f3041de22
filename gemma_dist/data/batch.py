"""Encoded trajectories -> the tensors of one micro-batch, as `Gemma4ForConditionalGeneration.forward` takes them.

Rows are padded on the right. A micro-batch without an image gets a filler, so that every rank runs the vision tower in
every forward pass: at ZeRO-3 the ranks' collectives would not match otherwise, and DDP would wait for gradients that
never come. The filler is trained on nothing and nothing can see it: it stands behind the last token of a row, where
causal attention never looks, and bidirectional image attention joins only tokens of one image.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from gemma_dist.data.encode import IGNORE_INDEX, Encoded

POOLING = 3  # Gemma 4 pools 3 x 3 patches into one soft token, so 9 patches are the smallest picture
PATCH_VALUES = 3 * 16 * 16  # colours x pixels of one patch


@dataclass(frozen=True)
class Sample:
    """One trajectory as token ids, and its N images (if any) as the tensors that `Encoder.pixels` makes."""

    id: str
    encoded: Encoded
    pixels: dict[str, torch.Tensor]


@dataclass(frozen=True)
class ControlIds:
    """The token ids that the collator itself writes."""

    pad: int
    begin_image: int
    image: int
    end_image: int


def control_ids(processor: Any) -> ControlIds:
    """The ids of a `Gemma4Processor`'s padding and image tokens."""
    tokenizer = processor.tokenizer
    begin_image, end_image = tokenizer.convert_tokens_to_ids([processor.boi_token, processor.eoi_token])
    return ControlIds(tokenizer.pad_token_id, begin_image, processor.image_token_id, end_image)


def collate(samples: list[Sample], ids: ControlIds) -> dict[str, torch.Tensor]:
    """One micro-batch of B samples with N images; an empty one becomes a single row that holds the filler alone.

    Returns:
        `input_ids`, `labels`, `attention_mask`, `mm_token_type_ids` (B, T) int64, T the longest row; `pixel_values`
        (N, P, 768) float32 and `image_position_ids` (N, P, 2) int64, P the most patches of an image, where missing
        patches are 0 with position -1, as Gemma 4's image processor pads. The images stand in the order of the rows.
    """
    rows = [
        {
            "input_ids": list(sample.encoded.input_ids),
            "labels": list(sample.encoded.labels),
            "attention_mask": [1] * len(sample.encoded.input_ids),
            "mm_token_type_ids": list(sample.encoded.mm_token_type_ids),
        }
        for sample in samples
    ]
    images = [sample.pixels for sample in samples if sample.encoded.num_images]
    if not images:
        rows = rows or [{"input_ids": [], "labels": [], "attention_mask": [], "mm_token_type_ids": []}]
        _append_filler(min(rows, key=lambda row: len(row["input_ids"])), ids)
        images = [_filler_pixels()]
    padding = {"input_ids": ids.pad, "labels": IGNORE_INDEX, "attention_mask": 0, "mm_token_type_ids": 0}
    length = max(len(row["input_ids"]) for row in rows)
    batch = {
        name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])
        for name, value in padding.items()
    }
    patches = max(part["pixel_values"].shape[1] for part in images)
    for name, value in (("pixel_values", 0), ("image_position_ids", -1)):
        padded = [pad(part[name], (0, 0, 0, patches - part[name].shape[1]), value=value) for part in images]
        batch[name] = torch.cat(padded)
    return batch


def _append_filler(row: dict[str, list[int]], ids: ControlIds) -> None:
    """Put an image of one soft token behind the end of `row`: attended to like any other token, trained on nothing."""
    row["input_ids"] += [ids.begin_image, ids.image, ids.end_image]
    row["labels"] += [IGNORE_INDEX] * 3
    row["attention_mask"] += [1] * 3
    row["mm_token_type_ids"] += [0, 1, 0]


def _filler_pixels() -> dict[str, torch.Tensor]:
    """One black picture of 3 x 3 patches, which the vision tower pools into one soft token; positions are (x, y)."""
    positions = torch.cartesian_prod(torch.arange(POOLING), torch.arange(POOLING)).flip(-1)
    return {"pixel_values": torch.zeros(1, POOLING**2, PATCH_VALUES), "image_position_ids": positions[None]}
