"""Let the model answer decision points: greedy, in padded batches, stopping where Gemma stops."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemma_dist.data.encode import Encoder, Prompt
from gemma_dist.model.zero3 import is_spread
from gemma_dist.stream.collate import collate, control_ids

# What ends the model's turn to write: the end of the turn, the wait for a tool's answer, the end of everything.
STOP_TOKENS = ("<turn|>", "<|tool_response>", "<eos>")


@dataclass(frozen=True)
class Answer:
    """What the model wrote."""

    text: str  # control tokens kept, the stop token included
    num_tokens: int
    stopped: bool  # False: cut off at max_new_tokens


def answer(model: Any, encoder: Encoder, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[Answer]:
    """One greedy answer for each prompt, all in one batch.

    On the CPU in float32 an answer does not depend on the batch that it is in, beyond the order of floating-point sums.

    A model that lies spread over the ranks (ZeRO-3) runs on all of them at once: every rank is to call this as often as
    the others, at the end without prompts, and all go on until the last has its answers.
    """
    together = is_spread(model)
    inputs = _inputs(encoder, prompts, with_image=together)
    longest = inputs["input_ids"].shape[1]
    stops = encoder.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))
    with torch.inference_mode():
        output = model.generate(
            **{name: tensor.to(model.device) for name, tensor in inputs.items()},
            max_new_tokens=max_new_tokens if prompts else 1,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=encoder.tokenizer.pad_token_id,
            synced_gpus=together,
        )
    answers = []
    for ids in output[: len(prompts), longest:].tolist():
        end = next((place + 1 for place, token in enumerate(ids) if token in stops), None)
        written = ids[:end]
        answers.append(Answer(encoder.tokenizer.decode(written), len(written), stopped=end is not None))
    return answers


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
    ] or [{"input_ids": [encoder.tokenizer.bos_token_id], "attention_mask": [1], "mm_token_type_ids": [0]}]
    pixels: dict[str, torch.Tensor] = {}
    if images := [image for prompt in prompts for image in prompt.images]:
        pixels = encoder.pixels(images)
    elif with_image:
        filler = collate([], control_ids(encoder.processor))
        pixels = {name: filler[name] for name in ("pixel_values", "image_position_ids")}
        filler["attention_mask"] = torch.zeros_like(filler["input_ids"])
        shortest = min(rows, key=lambda row: len(row["input_ids"]))
        shortest |= {name: filler[name][0].tolist() + row for name, row in shortest.items()}
    longest = max(len(row["input_ids"]) for row in rows)
    missing = {"input_ids": encoder.tokenizer.pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0}
    padded = {
        name: torch.tensor([[value] * (longest - len(row[name])) + row[name] for row in rows])
        for name, value in missing.items()
    }
    return padded | pixels
