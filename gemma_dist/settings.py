"""What every group of settings is, and the group that a recipe's `train` has of evaluation while it trains.

All others are in config.py and config_*.py, above this module.
"""

import os
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

# What an evaluation gives, as metrics.jsonl calls it, and whether more of it is better.
EVAL_METRICS = {
    "eval_loss": False,
    "eval_loss_text": False,
    "eval_loss_reasoning": False,
    "eval_loss_call": False,
    "eval_loss_argument": False,
    "eval_entropy": False,
    "eval_token_accuracy": True,
}


class Section(BaseModel):
    """A group of settings: immutable, and closed to keys that it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _names_something(cls, value: object) -> object:
        """Refuse empty text, as of a variable that a shell does not know: as a path, it would be the current folder."""
        if isinstance(value, str) and not value.strip():
            raise ValueError("has no value; write one, or leave it out")
        return at_home(value) if isinstance(value, str) else value


def at_home(path: str) -> str:
    """A path as a shell has it: ~/ is the user's home. Shells leave it in files, in quotes, and behind --out=."""
    return os.path.expanduser(path) if path.startswith("~/") else path


class EvalInTraining(Section):
    """Evaluation while a run trains: the loss of held-out shards (`data.eval`), and which checkpoint is the best."""

    eval_strategy: Literal["no", "steps", "epoch"] = Field(
        "no", description="When data.eval is evaluated: every eval_steps, or once an epoch; and at the last step."
    )
    eval_steps: int | None = Field(
        None, gt=0, description="Optimizer steps between evaluations of eval_strategy: steps; default: save_steps."
    )
    eval_on_start: bool = Field(False, description="Also evaluate before the first step.")
    per_device_eval_batch_size: int | None = Field(
        None, gt=0, description="Sequences per rank in an evaluation's forward pass; default: as in training."
    )
    max_eval_samples: int | None = Field(
        None, gt=0, description="Evaluate so many samples of data.eval, always the same, spread evenly; default: all."
    )
    metric_for_best_model: str | None = Field(
        None,
        description="Keep the checkpoint that has the best of it, such as eval_loss_call, and name it in best.json.",
    )
    greater_is_better: bool | None = Field(
        None, description="Whether more of metric_for_best_model is better; default: for eval_token_accuracy alone."
    )
    load_best_model_at_end: bool = Field(
        False, description="Publish the best checkpoint instead of the last one; its metric is eval_loss by default."
    )

    @field_validator("eval_strategy", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: object) -> object:
        """YAML reads a bare `no` as false."""
        return "no" if value is False else value

    @field_validator("metric_for_best_model")
    @classmethod
    def _is_measured(cls, value: str | None) -> str | None:
        """Names may leave out eval_, as Hugging Face's may."""
        if value is None:
            return None
        name = value if value.startswith("eval_") else f"eval_{value}"
        if name not in EVAL_METRICS:
            raise ValueError(f"no evaluation measures it; name one of {', '.join(EVAL_METRICS)}")
        return name

    @property
    def best_metric(self) -> str | None:
        """The metric whose best checkpoint is kept; None: none is."""
        return self.metric_for_best_model or ("eval_loss" if self.load_best_model_at_end else None)

    @property
    def saves_each_epoch(self) -> bool:
        """Whether checkpoints are written at the end of each epoch as well, since the best of them is kept."""
        return self.eval_strategy == "epoch" and self.best_metric is not None

    @property
    def best_is_greatest(self) -> bool:
        """Whether more of it is better."""
        return (
            EVAL_METRICS[self.best_metric or "eval_loss"] if self.greater_is_better is None else self.greater_is_better
        )
