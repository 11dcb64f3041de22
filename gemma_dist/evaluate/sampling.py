"""The next token of each answer: the likeliest, or one drawn at `temperature` among the `top_k` and `top_p` likeliest.

What is drawn hangs on the decision point, the number of its sample and the seed alone, whatever rank and batch it is
in: each answer has random numbers of its own, one a token.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; names and meanings of transformers' GenerationConfig."""

    temperature: float  # 0: the likeliest token
    top_p: float  # 1: all
    top_k: int  # 0: all
    seed: int

    def numbers(self, key: str, sample: int) -> random.Random:
        """The random numbers of an answer."""
        return random.Random(f"{self.seed} {sample} {key}")

    def pick(self, logits: torch.Tensor, numbers: Sequence[random.Random]) -> list[int]:
        """(B, V) -> B tokens; each draws from its own `numbers`."""
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        logits, tokens = (logits.float() / self.temperature).sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            logits, tokens = logits[:, : self.top_k], tokens[:, : self.top_k]
        shares = logits.softmax(-1)
        up_to = shares.cumsum(-1)
        shares = shares.masked_fill(up_to - shares >= self.top_p, 0)  # the token that crosses top_p stays
        up_to = shares.cumsum(-1)
        drawn = torch.tensor([[own.random()] for own in numbers], device=logits.device) * up_to[:, -1:]
        places = (up_to <= drawn).sum(-1, keepdim=True).clamp(max=shares.count_nonzero(-1)[:, None] - 1)
        return tokens.gather(1, places)[:, 0].tolist()
