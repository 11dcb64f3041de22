"""A bare list of messages, items or events as logs hold them: which layout it is, and the list in OpenAI's shape.

[{"role": "model", "parts": [{"text": "Hi"}]}]                 Gemini's: gemini.to_openai
[{"type": "ai", "content": "Hi"}]                              LangChain's: langchain.to_openai
[{"type": "function_call", "name": "f", "arguments": "{}"}]    Responses': responses.to_openai
[{"role": "assistant", "content": "Hi"}]                       OpenAI's own: as it is

The layout of a list is told by what no other layout has; one message of it is enough.
"""

from collections.abc import Callable
from typing import TypeGuard

from gemma_dist.data.layouts import (
    ai_sdk,
    anthropic,
    bedrock,
    claude_code,
    gemini,
    langchain,
    openhands,
    responses,
    swe_agent,
    telemetry,
)
from gemma_dist.data.layouts.turns import OpenAIRow, number_turns
from gemma_dist.data.strict import get
from gemma_dist.data.types import RawRow

Converter = Callable[[list[object]], OpenAIRow]

# How each layout of a list is told from the others, and converted. The first one that knows the list takes it.
DIALECTS: list[tuple[Callable[[list[object]], bool], Converter]] = [
    (claude_code.is_messages, claude_code.to_openai),
    (openhands.is_messages, openhands.to_openai),
    (langchain.is_messages, langchain.to_openai),
    (responses.is_messages, responses.to_openai),
    (telemetry.is_messages, telemetry.to_openai),
    (gemini.is_messages, gemini.to_openai),
    (ai_sdk.is_messages, ai_sdk.to_openai),
    (bedrock.is_messages, bedrock.to_openai),
]


def is_foreign(value: object) -> bool:
    """Whether a value is a list that one of DIALECTS knows: no list of messages of OpenAI or Anthropic."""
    return isinstance(value, list) and _converter(value) is not None


def _converter(messages: list[object]) -> Converter | None:
    """The `to_openai` of the first of DIALECTS that knows the messages; None where none does."""
    for is_messages, to_openai in DIALECTS:
        if is_messages(messages):
            return to_openai
    return None


def is_chat(value: object) -> bool:
    """Whether a value is a list of messages in any layout that is taken."""
    if not isinstance(value, list) or not value:
        return False
    if is_foreign(value) or swe_agent.is_messages(value):
        return True
    return all(isinstance(get(message, "role"), str) and is_message(message) for message in value)


def is_message(value: object) -> TypeGuard[RawRow]:
    """Whether an object says something itself, as a message of OpenAI or Anthropic does: {"content": "Hi"}."""
    return isinstance(value, dict) and any(key in value for key in ("content", "tool_calls", "function_call"))


def read_messages(value: list[object], row: RawRow) -> OpenAIRow:
    """The list in OpenAI's shape, with what `row` declares beside it where the list is of OpenAI or Anthropic.

    Raises:
        DataError: a message cannot be converted, with the turn.
    """
    to_openai = _converter(value)
    if to_openai is not None:
        return to_openai(value)
    if swe_agent.is_messages(value):
        return swe_agent.to_openai(value)
    plain: RawRow = {"messages": value, "tools": row.get("tools")}
    if anthropic.is_layout(plain):
        return anthropic.to_openai(plain)
    return OpenAIRow(number_turns(value), row.get("tools"))
