"""xLAM, APIGen: {"query": "Rome?", "answers": '[{"name": "weather", "arguments": {...}}]', "tools": "[...]"}."""

from gemma_dist.data.layouts.turns import OpenAIRow
from gemma_dist.data.literals import parse_calls
from gemma_dist.data.strict import error_context
from gemma_dist.data.types import RawRow


def is_layout(row: RawRow) -> bool:
    """Whether the row holds a query and the calls that answer it, and no messages."""
    has_turns = row.get("messages") or row.get("conversations")
    return isinstance(row.get("query"), str) and bool(row.get("answers")) and not has_turns


def to_openai(row: RawRow) -> OpenAIRow:
    """The row in the OpenAI shape: the query, and one message with the calls. DataError where those are none."""
    with error_context("`answers`"):
        calls = parse_calls(row["answers"])
    query = {"role": "user", "content": row["query"]}
    return OpenAIRow([(1, query), (2, {"role": "assistant", "content": "", "tool_calls": calls})], row.get("tools"))
