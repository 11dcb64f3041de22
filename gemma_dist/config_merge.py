"""The settings of `merge`, `export` and `extract`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from gemma_dist.config import Section


class MergeConfig(Section):
    """Settings of `merge`."""

    base_weights: Literal["as_trained", "original"] = Field(
        "as_trained",
        description="Add to the base as training saw it (QLoRA: quantized to 4 bits and back), or to the original.",
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="Dtype of the result; default: that of each tensor of the base."
    )
    max_shard_size: str | None = Field(
        None,
        pattern=r"^[1-9]\d*[KMGT]B$",
        description="Largest file of the result, such as 5GB (of 10^9 bytes); default: the base's own files.",
    )
    save_in_4bit: bool = Field(
        False,
        description="After QLoRA: sum nothing, but write the base in 4 bits, as trained, with the adapter beside it.",
    )
    verify_data: Path | None = Field(
        None, description="Verify on these trajectories: a JSONL file or a shard folder; default: made-up prompts."
    )
    verify_samples: int = Field(8, gt=0, description="How many of these trajectories, the first ones.")


class ExportConfig(Section):
    """Settings of `export`."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Dtype of the weights; auto: as stored, and of DeepSpeed's folders that of config.json."
    )
    max_shard_size: str = Field(
        "5GB", pattern=r"^[1-9]\d*[KMGT]B$", description="Largest file of weights that is written, such as 5GB."
    )


class ExtractConfig(Section):
    """Settings of `extract`."""

    r: int = Field(32, gt=0, description="Rank of the factors: more come nearer to the model, and take more room.")
    ignore_others: bool = Field(
        False, description="Leave out what changed beside linear layers of the language model, instead of refusing."
    )
