"""What a model takes to read a part of a tree of prompts."""

from dataclasses import dataclass

import torch

from gemma_dist.data.encode import Encoder
from gemma_dist.evaluate.cache import Masks, TreeCache
from gemma_dist.stream.collate import collate, control_ids

CHUNK = 1024  # tokens of prompts that one pass reads


@dataclass(frozen=True)
class Chunk:
    """Some tokens of a tree, and in front of them those of an image that stands for none."""

    input_ids: list[int]
    positions: list[int]
    masks: Masks
    pixels: dict[str, torch.Tensor]  # on the host
    num_fillers: int


def chunk_of(cache: TreeCache, encoder: Encoder, start: int, stop: int, *, always_image: bool) -> Chunk:
    """Tokens start … stop-1 of the tree of `cache`, which reads them next.

    Args:
        always_image: a chunk without one gets a filler: of a partitioned model the vision tower runs on every rank.
    """
    tree = cache.tree
    input_ids, positions = tree.input_ids[start:stop].tolist(), tree.positions[start:stop].tolist()
    shown = sorted(set(tree.image_of[start:stop].tolist()) - {0})
    pixels: dict[str, torch.Tensor] = {}
    fillers: list[int] = []
    if shown:
        pixels = encoder.pixels([tree.images[number - 1] for number in shown])
    elif always_image:
        filler = collate([], control_ids(encoder.processor))
        pixels = {name: filler[name] for name in ("pixel_values", "image_position_ids")}
        fillers = filler["input_ids"][0].tolist()
    masks = cache.begin(start, stop, len(fillers))
    return Chunk(fillers + input_ids, [*range(len(fillers)), *positions], masks, pixels, len(fillers))
