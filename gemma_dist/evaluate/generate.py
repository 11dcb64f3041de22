"""Let the model answer decision points: greedy, in padded batches, stopping where Gemma stops."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemma_dist.data.encode import Encoder, Prompt

# What ends the model's turn to write: the end of the turn, the wait for a tool's answer, the end of everything.
STOP_TOKENS = ("<turn|>", "<|tool_response>", "<eos>")


@dataclass(frozen=True)
class Answer:
    """What the model wrote."""

    text: str  # control tokens kept, the stop token included
    num_tokens: int
    stopped: bool  # False: cut off at max_new_tokens


def answer(model: Any, encoder: Encoder, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[Answer]:
    """One greedy answer for each prompt, all in one batch (B, T), padded on the left so that all end together.

    Images go through the vision tower in the order of the prompts. On the CPU in float32 an answer does not depend on
    the batch that it is in, beyond the order of floating-point sums.
    """
    tokenizer, longest = encoder.tokenizer, max(len(prompt.input_ids) for prompt in prompts)
    stops = tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([[value] * (longest - len(row)) + row for row in rows], device=model.device)

    inputs = {
        "input_ids": padded([prompt.input_ids for prompt in prompts], tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(prompt.input_ids) for prompt in prompts], 0),
        "mm_token_type_ids": padded([prompt.mm_token_type_ids for prompt in prompts], 0),
    }
    if images := [image for prompt in prompts for image in prompt.images]:
        inputs |= {name: tensor.to(model.device) for name, tensor in encoder.pixels(images).items()}
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )
    answers = []
    for ids in output[:, longest:].tolist():
        end = next((place + 1 for place, token in enumerate(ids) if token in stops), None)
        written = ids[:end]
        answers.append(Answer(tokenizer.decode(written), len(written), stopped=end is not None))
    return answers
