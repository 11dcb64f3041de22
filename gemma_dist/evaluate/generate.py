"""Let the model answer decision points: greedy, in padded batches, stopping where Gemma stops.

A batch runs until its last answer ends, so it costs as many passes as its longest answer has tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemma_dist.data.encode import Encoder, Prompt
from gemma_dist.gemma_format import STOP_TOKENS
from gemma_dist.model.zero3 import is_partitioned
from gemma_dist.stream.collate import collate, control_ids


@dataclass(frozen=True)
class Answer:
    """What the model wrote."""

    text: str  # control tokens kept, the stop token included
    num_tokens: int
    stopped: bool  # False: cut off at max_new_tokens


def generate(model: Any, encoder: Encoder, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[Answer]:
    """One greedy answer for each prompt, all in one batch.

    On the CPU in float32 an answer does not depend on the batch that it is in, beyond the order of floating-point sums.

    A model that is partitioned over the ranks (ZeRO-3) runs on all of them at once: every rank is to call this as often
    as the others, at the end without prompts, and all continue until the last has its answers.

    Args:
        max_new_tokens: the longest answer, in tokens.
    """
    all_ranks_at_once = is_partitioned(model)
    inputs = _inputs(encoder, prompts, with_image=all_ranks_at_once)
    prompt_length = inputs["input_ids"].shape[1]
    stops = encoder.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))
    with torch.inference_mode():
        output = model.generate(
            **{name: tensor.to(model.device) for name, tensor in inputs.items()},
            max_new_tokens=max_new_tokens if prompts else 1,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=encoder.tokenizer.pad_token_id,
            synced_gpus=all_ranks_at_once,
        )
    answers = []
    for ids in output[: len(prompts), prompt_length:].tolist():
        written, stopped = _until_stop(ids, stops)
        answers.append(Answer(encoder.tokenizer.decode(written), len(written), stopped))
    return answers


def _until_stop(ids: list[int], stops: list[int]) -> tuple[list[int], bool]:
    """The ids up to the first stop token, it included, and whether there is one."""
    for place, token in enumerate(ids):
        if token in stops:
            return ids[: place + 1], True
    return ids, False


def _inputs(encoder: Encoder, prompts: Sequence[Prompt], *, with_image: bool) -> dict[str, torch.Tensor]:
    """One batch (B, T) of `prompts`, or of one token if there are none, padded on the left so that all end together.

    Images stand in the order of the prompts. `with_image`: a batch without one gets a filler, which stands in the
    padding, where nothing sees it. The vision tower then runs on every rank.
    """
    rows = [
        {
            "input_ids": prompt.input_ids,
            "attention_mask": [1] * len(prompt.input_ids),
            "mm_token_type_ids": prompt.mm_token_type_ids,
        }
        for prompt in prompts
    ]
    if not rows:
        rows = [{"input_ids": [encoder.tokenizer.bos_token_id], "attention_mask": [1], "mm_token_type_ids": [0]}]
    images = [image for prompt in prompts for image in prompt.images]
    pixels: dict[str, torch.Tensor] = {}
    if images:
        pixels = encoder.pixels(images)
    elif with_image:
        filler = collate([], control_ids(encoder.processor))
        pixels = {name: filler[name] for name in ("pixel_values", "image_position_ids")}
        filler["attention_mask"] = torch.zeros_like(filler["input_ids"])
        shortest = min(rows, key=lambda row: len(row["input_ids"]))
        for name in shortest:
            shortest[name] = filler[name][0].tolist() + shortest[name]
    return _pad_left(rows, encoder.tokenizer.pad_token_id) | pixels


def _pad_left(rows: list[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """One tensor (B, T) a name."""
    longest = max(len(row["input_ids"]) for row in rows)
    padded = {}
    for name, padding in {"input_ids": pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0}.items():
        padded[name] = torch.tensor([[padding] * (longest - len(row[name])) + row[name] for row in rows])
    return padded
