"""OpenHands: a list of events, of which actions and observations that belong to a call of the model become messages.

    {"history": [
      {"id": 0, "source": "agent", "action": "system", "args": {"content": "Be ...", "tools": [...]}},
      {"id": 1, "source": "user", "action": "message", "args": {"content": "Fix it.", "image_urls": []}},
      {"id": 3, "source": "agent", "action": "run", "args": {"command": "ls", "thought": ""}, "tool_call_metadata":
        {"function_name": "execute_bash", "tool_call_id": "c1", "model_response": {"id": "r1", "choices": [
          {"message": {"role": "assistant", "content": "...", "tool_calls": [...]}}]}}},
      {"id": 4, "source": "agent", "observation": "run", "content": "a.py", "extras": {...}, "cause": 3,
        "tool_call_metadata": {...}}]}

The agent SDK (version 1) writes events by `kind`:

      {"kind": "SystemPromptEvent", "system_prompt": {"type": "text", "text": "..."}, "tools": [...]}
      {"kind": "MessageEvent", "source": "user", "llm_message": {"role": "user", "content": [{"type": "text", ...}]}}
      {"kind": "ActionEvent", "thought": [{"type": "text", ...}], "reasoning_content": null, "llm_response_id": "r1",
       "tool_call": {"id": "c1", "name": "terminal", "arguments": "{...}"}}
      {"kind": "ObservationEvent", "tool_call_id": "c1", "tool_name": "terminal", "observation": {"content": [...]}}
"""

from gemma_dist.data.layouts.pieces import Answer, Call, Piece, Reasoning, add_pieces, content_parts, tidy
from gemma_dist.data.layouts.turns import OpenAIRow, first_filled, turn_name
from gemma_dist.data.strict import error_context, get, get_list
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

SAID = ("content", "tool_calls", "reasoning_content")
KINDS = ("SystemPromptEvent", "MessageEvent", "ActionEvent", "ObservationEvent", "AgentErrorEvent")
SPEAKERS = ("user", "agent", "environment")
CONDENSED = "the session was condensed here: what follows was said under a summary; cut the row before it"
INTERNAL = "OpenHands events that no model sees were left out"
EXTRAS = "OpenHands observations were taken by their content, without their extras (exit code, path)"
UNSEEN = (
    "change_agent_state",
    "agent_state_changed",
    "null",
    "recall",
    "pause",
    "resume",
    "condensation_request",
    "start",
)


def is_messages(events: list[object]) -> bool:
    """Whether one of the events is OpenHands'."""
    return any(_is_event(event) for event in events)


def to_openai(events: list[object]) -> OpenAIRow:
    """The events as messages. DataError where one shows no call or message that a model was given or made."""
    row = OpenAIRow([])
    answers: dict[str, RawRow] = {}  # the messages of the model by the id of its response
    for number, event in enumerate(events, start=1):
        with error_context(turn_name(number, _name(event))):
            if not isinstance(event, dict):
                raise DataError("is no event of OpenHands; write one object an event")
            if get(event, "kind") is not None:
                _add_sdk_event(row, number, event, answers)
            else:
                _add_event(row, number, event, answers)
    row.messages = tidy(row.messages)
    return row


def _is_event(event: object) -> bool:
    """Whether an object is an event of either version, and no message."""
    if get(event, "role") is not None:
        return False
    is_action = get(event, "source") in SPEAKERS and bool(first_filled(event, "action", "observation"))
    return is_action or get(event, "kind") in KINDS


def _name(event: object) -> object:
    """What the event is: "run", "MessageEvent"."""
    return first_filled(event, "action", "observation", "kind")


# ---- events with `action` and `observation` --------------------------------------------------------------------------


def _add_event(row: OpenAIRow, number: int, event: RawRow, answers: dict[str, RawRow]) -> None:
    """Append what one event says; `answers` holds the messages of the model so far, by the id of the response."""
    action, arguments = event.get("action"), event.get("args")
    metadata = event.get("tool_call_metadata")
    call_id = get(metadata, "tool_call_id")
    if call_id and event.get("observation"):
        row.notes[EXTRAS] += 1
        answer = Answer(call_id, event.get("content"), get(metadata, "function_name"))
        add_pieces(row.messages, number, "tool", [answer], row.notes)
    elif call_id:
        _add_response(row, number, metadata, answers)
    elif action == "condensation":
        raise DataError(CONDENSED)
    elif action == "system":
        row.tools = get(arguments, "tools") or row.tools
        add_pieces(row.messages, number, "system", content_parts(get(arguments, "content")), row.notes)
    elif action == "message":
        role = "assistant" if event.get("source") == "agent" else "user"
        images = [{"type": "image", "url": url} for url in get_list(arguments, "image_urls")]
        pieces = content_parts(get(arguments, "content")) + images
        add_pieces(row.messages, number, role, pieces, row.notes)
    elif _name(event) in UNSEEN or event.get("source") == "environment":
        row.notes[INTERNAL] += 1
    else:
        raise DataError(
            "the event has no `tool_call_metadata`, so the call that the model wrote is not in the log; export the "
            'prompts instead (llm.log_completions: true) and write {"messages": [...], "response": {...}} of the last '
            'step, or {"messages": [...]}'
        )


def _add_response(row: OpenAIRow, number: int, metadata: object, answers: dict[str, RawRow]) -> None:
    """Append the message of the model as it came, once for all of its calls.

    {"tool_call_id": "c1", "model_response": {"id": "r1", "choices": [{"message": {...}}]}} -> the message
    """
    response = get(metadata, "model_response")
    message = None
    for choice in get_list(response, "choices")[:1]:
        message = get(choice, "message")
    if not isinstance(message, dict):
        raise DataError("`tool_call_metadata.model_response` holds no message; export the event with its response")
    response_id = str(get(response, "id") or get(metadata, "tool_call_id"))
    if response_id not in answers:
        answers[response_id] = message
        said = {key: message[key] for key in SAID if message.get(key) is not None}
        row.messages.append((number, {"role": "assistant", **said}))


# ---- events of the agent SDK, by `kind` ------------------------------------------------------------------------------


def _add_sdk_event(row: OpenAIRow, number: int, event: RawRow, answers: dict[str, RawRow]) -> None:
    """Append what one event of the SDK says; `answers` as for `_add_event`."""
    kind = event["kind"]
    if kind == "SystemPromptEvent":
        row.tools = event.get("tools") or row.tools
        pieces: list[Piece] = [*content_parts(event.get("system_prompt")), *content_parts(event.get("dynamic_context"))]
        add_pieces(row.messages, number, "system", pieces, row.notes)
    elif kind == "MessageEvent":
        message = event.get("llm_message")
        pieces = [*content_parts(get(message, "content")), *content_parts(event.get("extended_content"))]
        if get(message, "reasoning_content"):
            pieces.insert(0, Reasoning(get(message, "reasoning_content")))
        add_pieces(row.messages, number, get(message, "role"), pieces, row.notes)
    elif kind == "ActionEvent":
        _add_sdk_call(row, number, event, answers)
    elif event.get("tool_call_id") is not None:
        _add_sdk_answer(row, number, event)
    elif str(kind).startswith("Condensation"):
        raise DataError(CONDENSED)
    else:
        row.notes[INTERNAL] += 1


def _add_sdk_answer(row: OpenAIRow, number: int, event: RawRow) -> None:
    """Append an observation, or the error or the rejection in its place, as a tool message."""
    observation = event.get("observation")
    if observation is not None:
        row.notes[EXTRAS] += 1
    failed = event["kind"] == "AgentErrorEvent" or bool(get(observation, "is_error"))
    content = get(observation, "content") or first_filled(event, "error", "rejection_reason")
    answer = Answer(event["tool_call_id"], content_parts(content), event.get("tool_name"), failed)
    add_pieces(row.messages, number, "tool", [answer], row.notes)


def _add_sdk_call(row: OpenAIRow, number: int, event: RawRow, answers: dict[str, RawRow]) -> None:
    """Append a call; the calls of one response of the model are one message."""
    call = event.get("tool_call")
    arguments = get(get(call, "function"), "arguments") or get(call, "arguments")
    made = Call(get(call, "id"), get(call, "name"), arguments)
    response_id = str(event.get("llm_response_id") or made.id)
    message = answers.get(response_id)
    if message is not None:
        add_pieces([(number, message)], number, "assistant", [made], row.notes, joins=True)
        return
    pieces: list[Piece] = [Reasoning(event["reasoning_content"])] if event.get("reasoning_content") else []
    pieces += [*content_parts(event.get("thought")), made]
    add_pieces(row.messages, number, "assistant", pieces, row.notes)
    last = row.messages[-1][1]
    assert isinstance(last, dict)
    answers[response_id] = last
