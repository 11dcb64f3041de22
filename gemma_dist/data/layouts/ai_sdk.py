"""Vercel's AI SDK: messages of a model (`tool-call` and `tool-result` parts) and of its UI (`parts` with tool states).

    {"role": "assistant", "content": [{"type": "reasoning", "text": "Look it up."},
        {"type": "tool-call", "toolCallId": "c1", "toolName": "weather", "input": {"city": "Rome"}}]}
    {"role": "tool", "content": [{"type": "tool-result", "toolCallId": "c1", "toolName": "weather",
        "output": {"type": "text", "value": "30"}}]}

    {"role": "assistant", "parts": [{"type": "step-start"}, {"type": "text", "text": "I look.", "state": "done"},
        {"type": "tool-weather", "toolCallId": "c1", "state": "output-available", "input": {...}, "output": "30"}]}
    {"role": "assistant", "content": "30.", "parts": [{"type": "tool-invocation", "toolInvocation": {"state": "result",
        "toolCallId": "c1", "toolName": "weather", "args": {...}, "result": "30"}}, {"type": "text", "text": "30."}]}

The arguments are called `args` and the results `result` before its version 5.
"""

from collections import Counter

from gemma_dist.data.layouts.pieces import (
    ENCRYPTED_REASONING,
    Answer,
    Call,
    Piece,
    Reasoning,
    add_pieces,
    content_part,
    content_parts,
    result_content,
    tidy,
)
from gemma_dist.data.layouts.turns import OpenAIRow, turn_name
from gemma_dist.data.strict import error_context, get, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

OWN_PARTS = ("tool-call", "tool-result")
UI_KINDS = ("text", "reasoning", "step-start", "file", "dynamic-tool", "source-url", "source-document", "source")
# What a message of the UI holds besides what was said.
UI_KEYS = (
    *("id", "role", "content", "parts", "toolInvocations", "experimental_attachments", "reasoning"),
    *("createdAt", "annotations", "metadata", "data", "revisionId"),
)
SOURCES = "source and data parts, which are shown to the user alone, were left out"


def is_messages(messages: list[object]) -> bool:
    """Whether one of the messages has parts of the AI SDK."""
    return any(_is_ui(message) or _has_own_part(message) for message in messages)


def to_openai(messages: list[object]) -> OpenAIRow:
    """The messages in OpenAI's shape; others pass. DataError where a part cannot be converted."""
    row = OpenAIRow([])
    for number, message in enumerate(messages, start=1):
        with error_context(turn_name(number, get(message, "role"))):
            if not isinstance(message, dict):
                row.messages.append((number, message))
            elif _is_ui(message):
                _add_ui_message(row, number, message)
            elif isinstance(message.get("content"), list):
                _add_model_message(row, number, message)
            else:
                row.messages.append((number, message))
    row.messages = tidy(row.messages)
    return row


def _has_own_part(message: object) -> bool:
    content = get(message, "content")
    return isinstance(content, list) and any(get(part, "type") in OWN_PARTS for part in content)


def _is_ui(message: object) -> bool:
    if not isinstance(message, dict) or message.get("role") not in ("user", "assistant", "system"):
        return False
    if message.get("toolInvocations") or message.get("experimental_attachments"):
        return True
    parts = message.get("parts")
    return isinstance(parts, list) and any(_is_ui_part(part) for part in parts)


def _is_ui_part(part: object) -> bool:
    """Whether a part is the UI's: the parts of OpenTelemetry have `content` where these have `text`."""
    kind = get(part, "type")
    if not isinstance(kind, str) or get(part, "content") is not None:
        return False
    return kind in UI_KINDS or kind.startswith(("tool-", "data-"))


# ---- messages of a model ---------------------------------------------------------------------------------------------


def _add_model_message(row: OpenAIRow, number: int, message: RawRow) -> None:
    content = message["content"]
    assert isinstance(content, list)
    kept = {key: message[key] for key in message if key not in ("role", "content", "id", "providerOptions")}
    pieces = [_model_piece(part, row.notes) for part in content]
    add_pieces(row.messages, number, message.get("role"), pieces, row.notes, kept=kept)


def _model_piece(part: object, notes: Counter[str]) -> Piece:
    kind = get(part, "type")
    if not isinstance(part, dict):
        return content_part(part)
    if kind == "tool-call":
        return Call(part.get("toolCallId"), part.get("toolName"), _first(part, "input", "args"))
    if kind == "tool-result":
        return _model_answer(part)
    if kind in ("reasoning", "redacted-reasoning"):
        return _reasoning(part, notes)
    return content_part(part)


def _model_answer(part: RawRow) -> Answer:
    """A result: `output` says how it is written (since version 5), `result` is any JSON value."""
    output = part.get("output")
    kind, value = get(output, "type"), get(output, "value")
    has_value = isinstance(output, dict) and "value" in output
    failed = bool(part.get("isError")) or kind in ("error-text", "error-json", "execution-denied")
    if kind == "content":
        content: object = content_parts(value)
    elif kind == "execution-denied":
        content = get(output, "reason") or "execution denied"
    elif isinstance(kind, str) and has_value:
        content = result_content(value)
    elif isinstance(part.get("content"), list):  # `experimental_content` of version 4
        content = content_parts(part["content"])
    else:
        content = result_content(_first(part, "result", "output"))
    return Answer(part.get("toolCallId"), content, part.get("toolName"), failed)


def _reasoning(part: RawRow, notes: Counter[str]) -> Piece:
    text = _first(part, "text", "reasoning")
    if not text:
        notes[ENCRYPTED_REASONING] += 1
        return None
    return Reasoning(text)


def _first(part: RawRow, *keys: str) -> object:
    return next((part[key] for key in keys if part.get(key) is not None), None)


# ---- messages of the UI ----------------------------------------------------------------------------------------------


def _add_ui_message(row: OpenAIRow, number: int, message: RawRow) -> None:
    """A message that shows several steps of an agent becomes one message a step, each with its answers behind it."""
    kept = {key: message[key] for key in message if key not in UI_KEYS}
    for step in _steps(_ui_parts(message)):
        pieces: list[Piece] = []
        answers: list[Piece] = []
        for part in step:
            pieces.append(_ui_piece(part, row.notes))
            if _tool_name(part) is not None:
                answers.append(_ui_answer(part))
        add_pieces(row.messages, number, message.get("role"), pieces + answers, row.notes, kept=kept)


def _ui_parts(message: RawRow) -> list[object]:
    """The parts of a message; before version 4.2 its calls stood beside what was said after them."""
    parts = message.get("parts")
    attached = message.get("experimental_attachments") or []
    assert isinstance(attached, list)
    files = [{"type": "file", "mediaType": get(file, "contentType"), "url": get(file, "url")} for file in attached]
    if isinstance(parts, list) and parts:
        return [*parts, *files]
    invocations = message.get("toolInvocations") or []
    assert isinstance(invocations, list)
    made: list[object] = [{"type": "tool-invocation", "toolInvocation": invocation} for invocation in invocations]
    if message.get("content"):
        made.append({"type": "text", "text": message["content"]})
    return made + files


def _steps(parts: list[object]) -> list[list[object]]:
    """The parts of each step: a step-start opens one, and so does what comes behind a tool's output."""
    steps: list[list[object]] = [[]]
    for part in parts:
        is_start = get(part, "type") == "step-start"
        last = _invocation(steps[-1][-1]) if steps[-1] else None
        tool = _invocation(part)
        after_tool = last is not None and (tool is None or tool.get("step") != last.get("step"))
        if is_start or after_tool:
            steps.append([])
        if not is_start:
            steps[-1].append(part)
    return [step for step in steps if step]


def _invocation(part: object) -> RawRow | None:
    """The call of a tool part with its state; None for other parts."""
    if not isinstance(part, dict):
        return None
    kind = part.get("type")
    inner = part.get("toolInvocation")
    if kind == "tool-invocation" and isinstance(inner, dict):
        return inner
    is_tool = isinstance(kind, str) and (kind.startswith("tool-") or kind == "dynamic-tool")
    return part if is_tool else None


def _tool_name(part: object) -> object:
    invocation = _invocation(part)
    if invocation is None:
        return None
    return invocation.get("toolName") or str(invocation.get("type")).removeprefix("tool-")


def _ui_piece(part: object, notes: Counter[str]) -> Piece:
    invocation = _invocation(part)
    if invocation is not None:
        return Call(invocation.get("toolCallId"), _tool_name(part), _first(invocation, "input", "args"))
    kind = get(part, "type")
    if isinstance(part, dict) and kind == "reasoning":
        return _reasoning(part, notes)
    if isinstance(kind, str) and kind.startswith(("source", "data-")):
        notes[SOURCES] += 1
        return None
    return content_part(part)


def _ui_answer(part: object) -> Piece:
    """The answer of a tool part; None where the call has none yet."""
    invocation = _invocation(part)
    assert invocation is not None
    state, call_id = invocation.get("state"), invocation.get("toolCallId")
    if state in ("output-available", "result"):
        return Answer(call_id, result_content(_first(invocation, "output", "result")), _tool_name(part))
    if state == "output-error":
        return Answer(call_id, invocation.get("errorText"), _tool_name(part), failed=True)
    if state in ("input-available", "call"):
        return None
    raise DataError(
        f"the tool part is in the state {short(state)}; only a finished call can be trained: export the message once "
        "the state is output-available, or remove the part"
    )
