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
from typing import TypeGuard

from gemma_dist.data.calls import first_of
from gemma_dist.data.layouts.pieces import (
    ENCRYPTED_REASONING,
    PAUSE,
    Answer,
    Call,
    Piece,
    Reasoning,
    add_pieces,
    content_part,
    content_parts,
    convert_turns,
    has_part,
    result_content,
    without_keys,
)
from gemma_dist.data.layouts.turns import OpenAIRow
from gemma_dist.data.strict import get, get_list, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

OWN_PARTS = ("tool-call", "tool-result")
UI_KINDS = ("text", "reasoning", "step-start", "file", "dynamic-tool", "source-url", "source-document", "source")
# Names since version 5, and before.
INPUT, OUTPUT = ("input", "args"), ("output", "result")
FAILED = ("error-text", "error-json", "execution-denied")  # types of a result's `output`
# What a message of the UI holds besides what was said.
UI_KEYS = (
    *("id", "role", "content", "parts", "toolInvocations", "experimental_attachments", "reasoning"),
    *("createdAt", "annotations", "metadata", "data", "revisionId"),
)
SOURCES = "source and data parts, which are shown to the user alone, were left out"


def is_messages(messages: list[object]) -> bool:
    """Whether one of the messages has parts of the AI SDK."""
    return any(map(_is_ui, messages)) or has_part(messages, "content", _is_own_part)


def to_openai(messages: list[object]) -> OpenAIRow:
    """The messages in OpenAI's shape; others pass. DataError where a part cannot be converted."""
    return convert_turns(messages, _add_message)


def _add_message(row: OpenAIRow, number: int, message: object) -> None:
    """Add a message of the UI or of a model; one without parts passes."""
    if _is_ui(message):
        _add_ui_message(row, number, message)
    elif isinstance(message, dict) and isinstance(message.get("content"), list):
        _add_model_message(row, number, message)
    else:
        row.messages.append((number, message))


def _is_own_part(part: object) -> bool:
    """Whether a part of a model's message is a call or a result: {"type": "tool-call", "toolCallId": "c1", ...}."""
    return get(part, "type") in OWN_PARTS


def _is_ui(message: object) -> TypeGuard[RawRow]:
    """Whether a message is the UI's: it has parts of the UI's kinds, or keys of the versions before 5."""
    if get(message, "role") not in ("user", "assistant", "system"):
        return False
    if get_list(message, "toolInvocations") or get_list(message, "experimental_attachments"):
        return True
    return has_part([message], "parts", _is_ui_part)


def _is_ui_part(part: object) -> bool:
    """Whether a part is the UI's: the parts of OpenTelemetry have `content` where these have `text`."""
    kind = get(part, "type")
    if not isinstance(kind, str) or get(part, "content") is not None:
        return False
    return kind in UI_KINDS or kind.startswith(("tool-", "data-"))


# ---- messages of a model ---------------------------------------------------------------------------------------------


def _add_model_message(row: OpenAIRow, number: int, message: RawRow) -> None:
    """{"role": "user", "content": [{"type": "text", "text": "Hi"}]} -> {"role": "user", "content": "Hi"}"""
    kept = without_keys(message, ("role", "content", "id", "providerOptions"))
    pieces = [_model_piece(part, row.notes) for part in get_list(message, "content")]
    add_pieces(row.messages, number, message.get("role"), pieces, row.notes, kept=kept)


def _model_piece(part: object, notes: Counter[str]) -> Piece:
    """{"type": "tool-call", "toolCallId": "c1", "toolName": "f", "input": {...}} -> Call("c1", "f", {...})"""
    kind = get(part, "type")
    if kind == "tool-call":
        return Call(get(part, "toolCallId"), get(part, "toolName"), first_of(part, INPUT))
    if kind == "tool-result":
        return _model_answer(part, notes)
    if kind in ("reasoning", "redacted-reasoning"):
        return _reasoning(part, notes)
    return content_part(part)


def _model_answer(part: object, notes: Counter[str]) -> Answer:
    """A result: `output` says how it is written (since version 5), `result` is any JSON value.

    {"toolCallId": "c1", "toolName": "f", "output": {"type": "json", "value": 30}} -> Answer("c1", "30", "f")
    {"toolCallId": "c1", "toolName": "f", "result": 30} -> the same
    """
    output = get(part, "output")
    kind, value = get(output, "type"), get(output, "value")
    has_value = isinstance(output, dict) and "value" in output
    failed = bool(get(part, "isError")) or kind in FAILED
    if kind == "content":
        content: object = content_parts(value)
    elif kind == "execution-denied":
        content = get(output, "reason") or "execution denied"
    elif isinstance(kind, str) and has_value:
        content = result_content(value, notes)
    elif isinstance(get(part, "content"), list):  # `experimental_content` of version 4
        content = content_parts(get(part, "content"))
    else:
        content = result_content(first_of(part, ("result", "output")), notes)
    return Answer(get(part, "toolCallId"), content, get(part, "toolName"), failed)


def _reasoning(part: object, notes: Counter[str]) -> Piece:
    """{"type": "reasoning", "text": "Look it up."} -> Reasoning("Look it up."); PAUSE where it is encrypted."""
    text = first_of(part, ("text", "reasoning"))
    if not text:
        notes[ENCRYPTED_REASONING] += 1
        return PAUSE
    return Reasoning(text)


# ---- messages of the UI ----------------------------------------------------------------------------------------------


def _add_ui_message(row: OpenAIRow, number: int, message: RawRow) -> None:
    """A message that shows several steps of an agent becomes one message a step, each with its answers behind it."""
    kept = without_keys(message, UI_KEYS)
    for step in _steps(_ui_parts(message)):
        pieces: list[Piece] = []
        answers: list[Piece] = []
        for part in step:
            invocation = _invocation(part)
            if invocation is None:
                pieces.append(_ui_piece(part, row.notes))
                continue
            name = _tool_name(invocation)
            pieces.append(Call(invocation.get("toolCallId"), name, first_of(invocation, INPUT)))
            answers.append(_ui_answer(invocation, name, row.notes))
        add_pieces(row.messages, number, message.get("role"), pieces + answers, row.notes, kept=kept)


def _ui_parts(message: RawRow) -> list[object]:
    """The parts of a message; before version 4.2 its calls stood beside what was said after them.

    {"content": "Hi", "toolInvocations": [T]} -> [{"type": "tool-invocation", "toolInvocation": T}, text part "Hi"]
    """
    parts = get_list(message, "parts")
    attached = get_list(message, "experimental_attachments")
    files = [{"type": "file", "mediaType": get(file, "contentType"), "url": get(file, "url")} for file in attached]
    if parts:
        return [*parts, *files]
    invocations = get_list(message, "toolInvocations")
    made: list[object] = [{"type": "tool-invocation", "toolInvocation": invocation} for invocation in invocations]
    if message.get("content"):
        made.append({"type": "text", "text": message["content"]})
    return made + files


def _steps(parts: list[object]) -> list[list[object]]:
    """The parts of each step: a step-start opens one, and so does what comes behind a tool's output.

    [step-start, text, tool, text] -> [[text, tool], [text]]
    """
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
    """The call of a tool part with its state; None for other parts.

    {"type": "tool-invocation", "toolInvocation": {"state": "result", ...}} -> what stands in it      version 4
    {"type": "tool-weather", "state": "output-available", ...} -> the part itself      version 5, also "dynamic-tool"
    """
    if not isinstance(part, dict):
        return None
    kind = part.get("type")
    inner = part.get("toolInvocation")
    if kind == "tool-invocation" and isinstance(inner, dict):
        return inner
    is_tool = isinstance(kind, str) and (kind.startswith("tool-") or kind == "dynamic-tool")
    return part if is_tool else None


def _tool_name(invocation: RawRow) -> object:
    """{"type": "dynamic-tool", "toolName": "weather"} or {"type": "tool-weather"} -> "weather" """
    return invocation.get("toolName") or str(invocation.get("type")).removeprefix("tool-")


def _ui_piece(part: object, notes: Counter[str]) -> Piece:
    """What a part says that is no tool's; None where it is shown to the user alone."""
    kind = get(part, "type")
    if kind == "reasoning":
        return _reasoning(part, notes)
    if str(kind).startswith(("source", "data-")):
        notes[SOURCES] += 1
        return None
    return content_part(part)


def _ui_answer(invocation: RawRow, name: object, notes: Counter[str]) -> Piece:
    """The answer to a call; None where the call has none yet.

    {"toolCallId": "c1", "state": "output-available", "output": "30"}, "weather" -> Answer("c1", "30", "weather")
    """
    state, call_id = invocation.get("state"), invocation.get("toolCallId")
    if state in ("output-available", "result"):
        return Answer(call_id, result_content(first_of(invocation, OUTPUT), notes), name)
    if state == "output-error":
        return Answer(call_id, invocation.get("errorText"), name, failed=True)
    if state in ("input-available", "call"):
        return None
    raise DataError(
        f"the tool part is in the state {short(state)}; only a finished call can be trained: export the message once "
        "the state is output-available, or remove the part"
    )
