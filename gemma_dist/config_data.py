"""The section `data` of a recipe: which shards a run trains on, in which shares, and how they are rendered."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from gemma_dist.aliases import as_bool
from gemma_dist.settings import Section, at_home

# Steps, rising from 0, each with the weight that every source has from there on.
WeightsByStep: TypeAlias = list[tuple[int, list[float]]]
FROM_STEP = "from_step"


class SourceConfig(Section):
    """One source of a mixture."""

    path: str = Field(description="Folder, or URL of one, that `gemma-dist shard` wrote.")
    name: str | None = Field(None, description="What data.weights calls it; default: its path.")
    weight: float | None = Field(
        None, gt=0, description="Share of each step's sequences, relative to the other sources."
    )


def _as_list(value: object) -> object:
    """One folder as a list of it. What names none is refused under the key of the list, not of an element."""
    return value if value is None or isinstance(value, list) else [_is_folder(value)]


def _is_folder(value: object) -> object:
    if value is None or value == "" or isinstance(value, bool | list):
        raise ValueError("that names no folder; write the one that `gemma-dist shard … --out FOLDER` filled")
    return at_home(value) if isinstance(value, str) else value


def _kind(value: object) -> str:
    return MAPPING if isinstance(value, dict | SourceConfig) else FOLDER


# Folder or URL of shards, alone or with a name and a weight. One kind is tried: pydantic would report both.
FOLDER, MAPPING = "a folder", "a mapping"
Source: TypeAlias = Annotated[
    Annotated[str, Tag(FOLDER)] | Annotated[SourceConfig, Tag(MAPPING)],
    Discriminator(_kind),
    BeforeValidator(_is_folder),
]


class EncodingConfig(Section):
    """How the chat template turns a trajectory into tokens."""

    chat_template: str | None = Field(
        None, description="A Jinja file, or a revision's name (gemma4_v5); default: the adapter's or the model's own."
    )
    enable_thinking: Annotated[Literal["auto", True, False], BeforeValidator(as_bool)] = Field(
        "auto",
        description="Render the template with enable_thinking, which asks for reasoning; auto: where a row trains any.",
    )


class TrainDataConfig(EncodingConfig):
    """Which shards a run trains on. How rows became shards is decided before: see ShardConfig."""

    train: Annotated[list[Source], BeforeValidator(_as_list)] = Field(
        default=[],
        description="Folders or URLs that `gemma-dist shard` wrote: one, a list, or a list of {path, weight}.",
    )
    weights: list[dict[str, float]] = Field(
        default=[],
        description="Weights of train's sources that change at a step: {from_step: 0, NAME: WEIGHT, …}, and so on.",
    )
    eval: Annotated[list[Annotated[str, BeforeValidator(_is_folder)]], BeforeValidator(_as_list)] = Field(
        default=[], description="Held-out shards, as in train (folders or URLs, no weights), for train.eval_strategy."
    )
    appended: Literal["refuse", "next_epoch"] = Field(
        "refuse",
        description="Rows that were added to train since the checkpoint: refuse to resume, or take them up "
        "at the next epoch of their source.",
    )
    quarantine: Path | None = Field(
        None, description="File of what to leave out: one sample id, or damaged row group, per line."
    )
    cache_dir: Path | None = Field(
        None, description="Folder where all ranks of a node cache row groups of URLs, and the number of packs."
    )
    cache_gb: float = Field(
        50, gt=0, description="Size limit of cache_dir, in GB; least recently used row groups are evicted first."
    )

    @field_validator("weights")
    @classmethod
    def _rise_from_step_0(cls, value: list[dict[str, float]]) -> list[dict[str, float]]:
        steps = [one.get(FROM_STEP, -1) for one in value]
        if any(step < 0 or step % 1 for step in steps) or any(after <= step for step, after in pairwise(steps)):
            raise ValueError("give each a from_step, a number of optimizer steps, and each a later one than before it")
        if steps and steps[0] != 0:
            raise ValueError(f"the first begins at from_step {steps[0]:g}; begin at 0, which is the first step")
        for one in value:
            of_sources = [weight for name, weight in one.items() if name != FROM_STEP]
            if min(of_sources, default=0) < 0 or not any(of_sources):
                raise ValueError(
                    f"from_step {one[FROM_STEP]:g} has weights below 0, or none above; 0 lets a source rest"
                )
        return value

    @property
    def paths(self) -> list[str]:
        """Folders or URLs of train."""
        return [source if isinstance(source, str) else source.path for source in self.train]

    @property
    def names(self) -> list[str]:
        """What `weights` calls the sources of train."""
        return [source if isinstance(source, str) else source.name or source.path for source in self.train]

    @property
    def weights_by_step(self) -> WeightsByStep | None:
        """Of the sources of train, in their order; None: all of them are one corpus."""
        if self.weights:
            return [(int(one[FROM_STEP]), [one[name] for name in self.names]) for one in self.weights]
        of_sources = [source.weight for source in self.train if isinstance(source, SourceConfig) and source.weight]
        return [(0, of_sources)] if of_sources else None  # all have a weight, or none
