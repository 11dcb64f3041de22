"""xLAM, APIGen: {"query": "Rome?", "answers": '[{"name": "weather", "arguments": {...}}]', "tools": "[...]"}."""

from gemma_dist.data.layouts.turns import OpenAIRow
from gemma_dist.data.literals import parse_calls, read_literal
from gemma_dist.data.strict import error_context
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

NO_CALL = (
    "`answers` is empty: no call answers the query, and no words of the row do; remove the row, write such words "
    '({"messages": [{"role": "user", ...}, {"role": "assistant", "content": ...}], "tools": [...]}), or make it a test '
    'case for `evaluate` ({"messages": [{"role": "user", ...}], "expected_tool": "none", "tools": [...]})'
)


def is_layout(row: RawRow) -> bool:
    """Whether the row holds a query and the calls that answer it, and no messages."""
    has_turns = row.get("messages") or row.get("conversations")
    return isinstance(row.get("query"), str) and row.get("answers") is not None and not has_turns


def to_openai(row: RawRow) -> OpenAIRow:
    """The row in the OpenAI shape: the query, and one message with the calls. DataError where those are none."""
    with error_context("`answers`"):
        answers = read_literal(row["answers"] or [])
    if not answers:
        raise DataError(NO_CALL)
    with error_context("`answers`"):
        calls = parse_calls(answers)
    query = {"role": "user", "content": row["query"]}
    return OpenAIRow([(1, query), (2, {"role": "assistant", "content": "", "tool_calls": calls})], row.get("tools"))
