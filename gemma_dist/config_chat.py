"""The settings of `chat`. Those of rows are for the conversation, which is read as a row is."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from gemma_dist.aliases import current_value
from gemma_dist.config import RowConfig


class ChatConfig(RowConfig):
    """Settings of `chat`. enable_thinking: auto is off here: nothing says yet whether a thought will be trained."""

    control_tokens: Annotated[Literal["reject", "escape"], BeforeValidator(current_value)] = Field(
        "escape", description="A control token of Gemma in what is typed, or what a tool says: escape it, or refuse it."
    )
    max_new_tokens: int = Field(1024, gt=0, description="Maximum number of tokens of an answer.")
    temperature: float = Field(0.0, ge=0, description="Of sampling; 0: always the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample among the likeliest tokens of this share; 1: all.")
    top_k: int = Field(0, ge=0, description="Sample among so many of the likeliest tokens; 0: all.")
    seed: int = Field(42, ge=0, description="Random seed of sampling.")
