"""How many answers are written at a time: what their keys and values take, against the memory that is left."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemma_dist import world
from gemma_dist.logs import log

SHARE_OF_GPU, SHARE_OF_HOST = 0.7, 0.5  # of what is free when the model is loaded; the rest is for passes
GROWTH = 64  # slots that rows grow by


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of the keys and values of one token: in all full layers, and in all sliding ones."""

    full: int
    sliding: int
    window: int

    @classmethod
    def of(cls, text: Any, element_size: int) -> "CacheBytes":
        """Of a text config. Layers that share the K/V of another keep none."""
        sizes = {"full_attention": 0, "sliding_attention": 0}
        for layer_type, layer, mode in zip(text.layer_types, text.per_layer_config, text.kv_sharing_modes, strict=True):
            if mode != "reuse":
                sizes[layer_type] += 2 * layer.num_key_value_heads * layer.head_dim * element_size
        return cls(sizes["full_attention"], sizes["sliding_attention"], text.sliding_window)

    def of_tree(self, num_tokens: int, num_sliding: int) -> int:
        """Of a tree of prompts, of which sliding layers hold so many tokens."""
        return self.full * num_tokens + self.sliding * num_sliding

    def of_rows(self, num_rows: int, num_slots: int) -> int:
        """Of rows of so many slots: sliding layers keep their window alone."""
        return num_rows * self.of_tree(num_slots, min(num_slots, self.window))


@dataclass
class Room:
    """What fits at a time, in rows, tokens and bytes."""

    num_rows: int
    num_tokens: int
    num_bytes: int
    bytes_of: CacheBytes

    def fits(self, num_rows: int, num_slots: int, trees: Sequence[tuple[int, int]]) -> bool:
        """Whether so many rows of so many slots do, beside trees of so many tokens, and in sliding layers so many."""
        num_bytes = self.bytes_of.of_rows(num_rows, num_slots) + sum(self.bytes_of.of_tree(*tree) for tree in trees)
        num_tokens = num_rows * num_slots + sum(tokens for tokens, _ in trees)
        return num_rows <= self.num_rows and num_tokens <= self.num_tokens and num_bytes <= self.num_bytes

    def halve(self) -> None:
        """After the memory was not enough."""
        self.num_rows, self.num_tokens = max(1, self.num_rows // 2), max(1, self.num_tokens // 2)
        log.warning(
            "out of memory: at most %d answers and %d tokens at a time from here on; say so by "
            "--per-device-eval-batch-size and --max-batch-tokens",
            self.num_rows,
            self.num_tokens,
        )


def measure_room(model: Any, num_rows: int, num_tokens: int) -> Room:
    """What fits beside a loaded model: as the settings say, or less where there is no memory left for it."""
    bytes_of = CacheBytes.of(model.config.get_text_config(), model.dtype.itemsize)
    if model.device.type == "cuda":
        reusable = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        free = int(SHARE_OF_GPU * (torch.cuda.mem_get_info(model.device)[0] + reusable))
    else:
        import psutil

        num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size()))  # which share this memory
        free = int(SHARE_OF_HOST * psutil.virtual_memory().available / num_processes)
    if free < bytes_of.of_tree(num_tokens, num_tokens):
        log.info("%.1f GiB are left for keys and values, which may be fewer than max_batch_tokens", free / 2**30)
    return Room(num_rows, num_tokens, free, bytes_of)
