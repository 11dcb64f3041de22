"""Rows that hold a part of a trajectory: an event, a span, one half of a batch. Each is refused with the command that
makes whole rows of its file.
"""

from collections.abc import Callable

from gemma_dist.data.calls import first_of
from gemma_dist.data.layouts import claude_code, langchain, openhands, prompt_completion, responses
from gemma_dist.data.layouts.attributes import PLACES
from gemma_dist.data.layouts.turns import OpenAIRow, first_filled
from gemma_dist.data.strict import get, get_list, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

# Columns of a row that is a whole.
WHOLE = ("messages", "conversations", "contents", "events", "history", "input", "inputs", "items", "prompt")
HALVES = ("body", "params", "request", "response", "result")  # of a batch: what was asked, and what was answered
STEP_LISTS = ("traj", "trajectory", "steps", "actions", "history")
OBSERVATIONS = ("observation", "screenshot", "screenshot_file", "image", "image_path")
CODEX_TYPES = ("session_meta", "response_item", "event_msg", "turn_context", "compacted")
CODEX_COMMAND = (
    'jq -cs \'{id: map(select(.type == "session_meta").payload.id)[0], '
    'input: map(select(.type == "response_item").payload)}\' ROLLOUT.jsonl'
)
MESSAGES_COMMAND = "jq -cs '{messages: .}' FILE"
CONTENTS_COMMAND = "jq -cs '{contents: .}' FILE"
ITEMS_COMMAND = "jq -cs '{input: .}' FILE"
EVENTS_COMMAND = "jq -cs '{events: .}' FILE"
# Also for the batches of Anthropic (params, result) and Gemini (key, request).
BATCH_COMMAND = (
    "jq -cs 'group_by(.custom_id // .key)[] | select(length == 2) | {id: (.[0].custom_id // .[0].key), "
    "request: map(.body // .params // .request // empty)[0], "
    "response: map(.response.body // .result.message // .response // empty)[0]}' REQUESTS.jsonl RESULTS.jsonl"
)
OTLP_COMMAND = "jq -c '(.resourceSpans // .resource_spans)[] | (.scopeSpans // .scope_spans)[].spans[]' FILE"
# The last call of the model of each trace: it holds all that was said before.
SPANS_COMMAND = (
    'jq -cs \'map(select(tostring | test("gen_ai.(input|prompt)|input_messages"))) '
    "| group_by(.trace_id // .traceId // .context.trace_id)[] | max_by(.end_time // .endTimeUnixNano)' FILE"
)
LANGSMITH_COMMAND = (
    "jq -cs 'map(select(.run_type == \"llm\")) | group_by(.trace_id)[] | max_by(.dotted_order // .start_time)' FILE"
)
LANGFUSE_COMMAND = (
    "jq -c '.observations | map(select(.type == \"GENERATION\")) | max_by(.startTime // .start_time)' FILE"
)
LANGFUSE_TYPES = ("SPAN", "EVENT", "GENERATION", "TOOL", "AGENT", "CHAIN")
AGENTS_COMMAND = (
    "jq -cs 'map(select(.span_data.type == \"generation\")) | group_by(.trace_id)[] | max_by(.ended_at)' FILE"
)
GUI_LINE = (
    '{"messages": [{"role": "user", "content": "TASK"}, {"role": "assistant", "tool_calls": [{"function": {"name": '
    '"click", "arguments": {"x": 1, "y": 2}}}]}, {"role": "tool", "content": [{"type": "image", "image": "PATH"}]}]}'
)


STEPS_REMEDY = (
    ": what the model was given and how it wrote its actions is not in it. Write each action as a call and each "
    f"screenshot as its answer: {GUI_LINE}"
)


def is_layout(row: RawRow) -> bool:
    """Whether the row is known as a part of a trajectory."""
    return _explain(row) is not None


def to_openai(row: RawRow) -> OpenAIRow:
    """DataError: what the row is, and how whole rows are made of its file."""
    raise DataError(str(_explain(row)))


def _explain(row: RawRow) -> str | None:
    """Why the row is no trajectory, with the command; None where it is none of these parts."""
    if first_filled(row, "messages", "conversations"):
        return None
    for explain in EXPLANATIONS:
        text = explain(row)
        if text is not None:
            return text
    return None


def _event(row: RawRow) -> str | None:
    """One event a line: the transcripts of agents."""
    if first_filled(row, *WHOLE):
        return None
    if claude_code.is_event(row):
        return _one_of("an event of Claude Code", row.get("type"), claude_code.SESSION_COMMAND)
    if row.get("type") in CODEX_TYPES and row.get("payload") is not None:
        return _one_of("an event of Codex", row["type"], CODEX_COMMAND)
    if openhands.is_messages([row]):
        return _one_of("an event of OpenHands", first_filled(row, "action", "kind"), EVENTS_COMMAND)
    return None


def _message(row: RawRow) -> str | None:
    """One message or item a line."""
    if first_filled(row, *WHOLE):
        return None
    role = row.get("role")
    if langchain.is_message(row):
        return _one_of("a message of LangChain", row.get("type"), MESSAGES_COMMAND)
    if responses.is_messages([row]):
        return _one_of("an item of the Responses API", row.get("type"), ITEMS_COMMAND)
    if not isinstance(role, str):
        return None
    if isinstance(row.get("parts"), list):
        return _one_of("a message of Gemini", role, CONTENTS_COMMAND)
    if "content" in row or "tool_calls" in row:
        return _one_of("a message", role, MESSAGES_COMMAND)
    return None


def _one_of(what: str, name: object, command: str) -> str:
    """What the row is one of, by the name of its kind, and the command that makes a row of all of them."""
    return f"the row is {what} ({short(name)}), and a row holds a whole trajectory; make one of the file: {command}"


def _batch_half(row: RawRow) -> str | None:
    """A request of a batch without its answer, or the other way round."""
    name = first_filled(row, "custom_id", "key")
    halves = [key for key in HALVES if row.get(key) is not None]
    if name is None or len(halves) != 1:
        return None
    return f"the row holds `{halves[0]}` of the batch's request {short(name)} alone; join both files: {BATCH_COMMAND}"


def _span(row: RawRow) -> str | None:
    """Spans that are no call of a model, and what wraps spans."""
    if first_filled(row, "resourceSpans", "resource_spans"):
        return f"the row wraps spans of OpenTelemetry (`resourceSpans`); write one span a line: {OTLP_COMMAND}"
    is_span = first_of(row, ("trace_id", "traceId", "context", "TraceId")) is not None
    if is_span and first_of(row, PLACES) is not None:
        return (
            f"the span {short(row.get('name'))} holds no messages of a model (gen_ai.input.messages, gen_ai.prompt.0, "
            f"llm.input_messages); keep the last call of the model of each trace: {SPANS_COMMAND}"
        )
    return None


def _agents_span(row: RawRow) -> str | None:
    """OpenAI's Agents SDK: a trace, or a span of another type than generation."""
    if row.get("object") not in ("trace", "trace.span"):
        return None
    kind = get(row.get("span_data"), "type")
    if kind == "response":
        return (
            "the span holds the id of a response of OpenAI and none of its items; write what the run gives instead: "
            '{"input": result.to_input_list(), "tools": [...]}'
        )
    return (
        f"the row is a {row['object']} of the Agents SDK (type {short(kind)}) without messages; keep the last "
        f'generation of each trace: {AGENTS_COMMAND}, or write {{"input": result.to_input_list()}} of each run'
    )


def _run(row: RawRow) -> str | None:
    """Runs of LangSmith and traces of Langfuse that hold no messages themselves."""
    if row.get("run_type") is not None:
        return (
            f"the run {short(row.get('name'))} of LangSmith is of type {short(row['run_type'])} and its `inputs` hold "
            f"no messages; keep the last call of the model of each trace: {LANGSMITH_COMMAND}"
        )
    if isinstance(row.get("inputs"), dict) and isinstance(row.get("outputs"), dict):
        return (
            f"`inputs` and `outputs` hold no messages but {short(row['inputs'])}; write a chat: "
            '{"inputs": {"messages": [{"role": "user", "content": ...}]}, "outputs": {"role": "assistant", ...}}'
        )
    if isinstance(row.get("observations"), list):
        return (
            "the row is a trace of Langfuse whose own `input` is no list of messages; keep its last generation: "
            f"{LANGFUSE_COMMAND}"
        )
    is_plain = isinstance(row.get("input"), str) and row.get("type") == "GENERATION"  # `prompt_completion.py` says so
    if row.get("traceId") is not None and row.get("type") in LANGFUSE_TYPES and not is_plain:
        return (
            f"the observation {short(row.get('name'))} of Langfuse (type {short(row['type'])}) holds no messages in "
            'its `input`; keep generations of chats: {"type": "GENERATION", "input": [{"role": ...}], "output": {...}}'
        )
    return None


def _steps(row: RawRow) -> str | None:
    """Steps of an agent whose prompt, and so the way in which it wrote its actions, is not in the row."""
    if prompt_completion.is_layout(row):
        return None
    for key in STEP_LISTS:
        for step in get_list(row, key)[:1]:
            held = list(step) if isinstance(step, dict) else step
            return f"`{key}` holds steps with {short(held)}, not messages{STEPS_REMEDY}"
    observed = [key for key in OBSERVATIONS if row.get(key)]
    if row.get("action") is not None and observed:
        return f"the row is one step, with `action` and `{observed[0]}`, not the messages of a whole run{STEPS_REMEDY}"
    return None


EXPLANATIONS: tuple[Callable[[RawRow], str | None], ...] = (
    _batch_half,
    _event,
    _agents_span,
    _run,
    _span,
    _message,
    _steps,
)
