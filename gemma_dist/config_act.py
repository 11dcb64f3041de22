"""The settings of `act`, beside those of rows, of sampling (as in `chat`), and of a server (config_server.py)."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from gemma_dist.config_chat import ChatConfig


class ActConfig(ChatConfig):
    """Settings of `act`. enable_thinking: auto is as the row says, else as its own answers show thoughts; else off."""

    num_runs: int = Field(1, gt=0, description="Runs of each task; several need a temperature.")
    max_steps: int = Field(
        32, gt=0, description="Most answers of the model in a run, of a replay as many as the row has."
    )
    tool_timeout_s: float = Field(
        60,
        gt=0,
        le=86_400,
        description="Seconds that a function has for one call; then the model is told, and goes on.",
    )
    declare: Literal["auto", "rows"] = Field(
        "auto", description="Tools that the model is told of: the row's; auto: where it has none, those of --tools."
    )
    unfit_calls: Literal["refuse", "run"] = Field(
        "refuse", description="Calls that do not fit their declarations: the model reads why; or the function answers."
    )
    per_device_eval_batch_size: int = Field(32, gt=0, description="Most answers that one rank writes at a time.")
    max_batch_tokens: int = Field(
        131_072, gt=0, description="Most tokens of prompts and answers that one rank holds at a time."
    )
    ple: Literal["auto", "host", "gpu"] = Field(
        "auto", description="Where per-layer embeddings (E2B, E4B) are; host and auto: mapped in the model's file."
    )

    @field_validator("num_runs")
    @classmethod
    def _runs_differ(cls, value: int, info: ValidationInfo) -> int:
        if value > 1 and info.data.get("temperature") == 0:
            raise ValueError(f"with a temperature of 0 all {value} would be the same; sample at 1.0, or take one run")
        return value
