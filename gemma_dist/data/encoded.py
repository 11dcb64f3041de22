"""A trajectory as token ids and labels."""

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from gemma_dist.data.against_known import Added
from gemma_dist.data.kinds import TEXT

IGNORE_INDEX = -100  # the label of a token that is not trained: torch's cross entropy skips it


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels of one trajectory. T is its length in tokens, image soft tokens included.

    It holds bytes; lists are made once somebody asks for them, which who only counts never does.
    """

    token_ids: bytes  # (T,), int32
    kinds: bytes  # (T,): of `data/kinds.py`, 0 where a token is not trained
    is_soft_token: bytes  # (T,): 1 on image soft tokens, else 0
    num_images: int
    num_dropped_reasoning: int = 0  # trained messages whose reasoning the template leaves out (before the last user)
    enable_thinking: bool = False  # as it was rendered
    # Of each trained answer (a message, or several in a row): the index of its first message, and how many tokens stand
    # in front of what the model writes.
    answers: list[tuple[int, int]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)  # what is trained otherwise than rendered, in words: how often
    added: list[Added] = field(default_factory=list)  # what the template writes of its own, if it is not known

    @classmethod
    def of_words(cls, input_ids: list[int], labels: list[int], mm_token_type_ids: list[int], num_images: int) -> Self:
        """Of tokens that were not rendered: all that is trained is text."""
        kinds = bytes(TEXT * (label != IGNORE_INDEX) for label in labels)
        return cls(np.array(input_ids, np.int32).tobytes(), kinds, bytes(mm_token_type_ids), num_images)

    @functools.cached_property
    def input_ids(self) -> list[int]:
        """(T,)"""
        ids: list[int] = np.frombuffer(self.token_ids, np.int32).tolist()
        return ids

    @functools.cached_property
    def labels(self) -> list[int]:
        """(T,): the token's own id where it is trained (not shifted), else IGNORE_INDEX."""
        is_trained = np.frombuffer(self.kinds, np.uint8) != 0
        labels: list[int] = np.where(is_trained, np.frombuffer(self.token_ids, np.int32), IGNORE_INDEX).tolist()
        return labels

    @functools.cached_property
    def mm_token_type_ids(self) -> list[int]:
        """(T,): 1 on image soft tokens, else 0."""
        return list(self.is_soft_token)

    @property
    def num_tokens(self) -> int:
        return len(self.kinds)

    @property
    def num_image_tokens(self) -> int:
        return self.is_soft_token.count(1)

    @property
    def num_target_tokens(self) -> int:
        return len(self.kinds) - self.kinds.count(0)
