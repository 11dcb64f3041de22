"""The settings of `evaluate --server`: how a server that holds the model is asked. Its others are in config.py."""

from typing import Literal

from pydantic import Field

from gemma_dist.config import Section


class ServerConfig(Section):
    """Settings of `evaluate` that speak of a server. What they leave open (tokens, sampling) is in EvaluateConfig."""

    server: str | None = Field(
        None,
        description="Ask an OpenAI-compatible server instead of loading the model: http://localhost:8000/v1. A key, if "
        "it wants one, is read from OPENAI_API_KEY.",
    )
    endpoint: Literal["chat", "completions"] = Field(
        "chat",
        description="Ask the server for chat (it renders messages and reads calls), or for completions of prompts that "
        "are rendered, and read, here.",
    )
    processor: str | None = Field(
        None, description="Folder or Hub name of the served model's processor; completions need it, chat does not."
    )
    concurrency: int = Field(16, gt=0, description="Most requests that are under way at a time.")
    request_timeout_s: float = Field(
        600, gt=0, le=7 * 86_400, description="Seconds after which a request counts as lost."
    )
    max_retries: int = Field(
        5, ge=0, description="How often a request that is lost, or that the server puts off, is sent again."
    )
    server_errors: Literal["fail", "malformed"] = Field(
        "fail",
        description="What an answer of status 500 is: no answer, so that the run fails; or, as of a server that fails "
        "where it cannot read a call (transformers serve), a malformed call.",
    )
    extra_body: str | None = Field(
        None,
        description="JSON object of more fields for each request, as the server knows them; null leaves a field out.",
    )
