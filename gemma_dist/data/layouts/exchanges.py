"""Logs of a model's calls, a row each: what it was given and what it answered, as one trajectory.

    {"request": {"messages": [...], "tools": [...]}, "response": {"choices": [{"message": {...}}]}}
    {"messages": [...], "choices": [...]}  {"contents": [...], "candidates": [...]}  {"input": [...], "output": [...]}
    LangSmith: {"run_type": "llm", "inputs": {"messages": [[...]]}, "outputs": {"generations": [[{"message": {...}}]]},
                "extra": {"invocation_params": {"tools": [...]}}}
    Langfuse:  {"type": "GENERATION", "input": [...] or {"messages": [...], "tools": [...]}, "output": {...}}
    Agents SDK: {"object": "trace.span", "span_data": {"type": "generation", "input": [...], "output": [...]}}
    OpenTelemetry and OpenInference: `telemetry.py`

The assistant's messages of the history are trained as well. Where every step of a run is logged they repeat: take the
last step of each.
"""

from collections import Counter
from dataclasses import dataclass

from gemma_dist.data.layouts import swe_agent, telemetry
from gemma_dist.data.layouts.dialects import is_foreign, read_messages
from gemma_dist.data.layouts.pieces import content_part, text_part, tidy
from gemma_dist.data.layouts.prefill import continued
from gemma_dist.data.layouts.requests import (
    ANSWER_KEYS,
    Request,
    find_messages,
    has_answer,
    read_request,
    read_response,
    read_value,
    unnested,
)
from gemma_dist.data.layouts.turns import NumberedMessages, OpenAIRow
from gemma_dist.data.strict import as_list, error_context, get, get_list, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

# Columns of what was asked and what was answered; the last two are of OpenAI's and Anthropic's batches, joined.
PAIRS = (("request", "response"), ("request_body", "response_body"), ("body", "response"), ("params", "result"))
LISTED = ("choices", "candidates")  # these lists alone are no response: the object that holds them is
ASKING = ("user", "tool", "function")  # roles of a last message that waits for an answer
REPEATED = "answers that the messages of the row hold already were left out"


@dataclass(frozen=True)
class Exchange:
    """What a model was asked and what it answered."""

    request: Request
    answer: object
    place: str  # where the row holds the answer; "" where the messages of the request hold it themselves


def is_layout(row: RawRow) -> bool:
    """Whether the row logs a call of a model, or holds messages in a layout of such a log."""
    is_chat = row.get("messages") or row.get("conversations")
    return (_is_foreign_chat(row) or not is_chat) and _find(row) is not None


def to_openai(row: RawRow) -> OpenAIRow:
    """What the model was given and what it answered. DataError where the two make no single trajectory."""
    found = _find(row)
    assert found is not None
    notes: Counter[str] = Counter()
    answers = _read_answers(found, notes)
    given, tools = _without_declarations(found.request)
    turns = _joined(given, answers, found.place, notes)
    read = read_messages(turns, {"tools": tools})
    read.tools = _all_tools(read.tools, tools)
    read.notes += notes
    if found.request.system:
        read.messages = _with_system(found.request.system, read.messages)
    read.messages = tidy(read.messages)
    read.has_system = True
    return read


def _read_answers(found: Exchange, notes: Counter[str]) -> list[object]:
    """The messages that the model answered with; none where the request holds them itself."""
    if not found.place:
        return []
    with error_context(f"`{found.place}`"):
        answers = read_response(found.answer, notes)
        if not answers:
            raise DataError("holds no answer of the model; remove the row or export it whole")
    return answers


# ---- where a row holds the two ---------------------------------------------------------------------------------------


def _is_foreign_chat(row: RawRow) -> bool:
    """A row with messages that the layouts of OpenAI, Anthropic and sharegpt do not take as a whole."""
    messages = row.get("messages") or row.get("conversations")
    if is_foreign(unnested(messages)) or swe_agent.is_history(as_list(messages)):
        return True
    return bool(get_list(row, "messages")) and bool(_answer_key(row, "messages"))


def _find(row: RawRow) -> Exchange | None:
    """The call of a model that the row logs; None where it logs none."""
    if row.get("preferred_output") is not None:  # two answers: `prompt_completion.py` says so
        return None
    if row.get("messages"):
        return _body(row)
    return _pair(row) or _run(row) or _body(row) or _span(row)


def _pair(row: RawRow) -> Exchange | None:
    """{"request": ..., "response": ...}, by any of the names of PAIRS."""
    for asked, answered in PAIRS:
        answer = row.get(answered)
        request = None if answer is None else read_request(row.get(asked), answer)
        if request is not None:
            return Exchange(request, answer, answered)
    return None


def _run(row: RawRow) -> Exchange | None:
    """{"inputs": {"messages": [[...]]}, "outputs": {...}, "extra": {...}} of LangSmith; Weave says `output`."""
    request = read_request({**_as_object(row.get("inputs")), "extra": row.get("extra")})
    if request is None:
        return None
    place = "output" if row.get("outputs") is None and row.get("output") is not None else "outputs"
    return Exchange(request, row.get(place), place)


def _body(row: RawRow) -> Exchange | None:
    """Messages and their answer beside one another, in the row or in the `span_data` of the Agents SDK.

    {"messages": [m1], "choices": [c]} -> Exchange(Request([m1]), {"choices": [c]}, "choices")
    """
    data = get(row, "span_data")
    if get(data, "type") == "generation":
        row = data
    request = find_messages(row)
    if request is None:
        return None
    place = _answer_key(row, request.key)
    answer = _answer(row, place)
    if request.key == "messages" and isinstance(answer, str) and not has_answer(answer):
        answer = {"role": "assistant", "content": answer}  # as it is, even where it is JSON
    return Exchange(request, answer, place)


def _span(row: RawRow) -> Exchange | None:
    """{"attributes": {"gen_ai.input.messages": [...], "gen_ai.output.messages": [...]}} of OpenTelemetry and kin."""
    if not telemetry.is_span(row):
        return None
    body, answers = telemetry.span_exchange(row)
    request = find_messages(body)
    return None if request is None else Exchange(request, answers, "output messages")


def _answer_key(row: RawRow, asked: str) -> str:
    """Where the row answers what stands under `asked`; "" where the messages there hold the answers themselves."""
    for key in ANSWER_KEYS[asked]:
        if row.get(key) is None:
            continue
        # Beside messages other things may be called so: the choices of a question, a response of another kind.
        if asked != "messages" or has_answer(_answer(row, key)) or _is_text_answer(row, key):
            return key
    return ""


def _is_text_answer(row: RawRow, key: str) -> bool:
    """Whether a text answers messages that end without an answer: {"messages": [..., user], "completion": "Hi"}."""
    *_, last = get_list(row, "messages") or [None]
    text = row.get(key)
    return get(last, "role") in ASKING and isinstance(text, str) and text.strip() != ""


def _answer(row: RawRow, place: str) -> object:
    """What stands at a place, as the object of a response that `read_response` takes."""
    return {place: row.get(place)} if place in LISTED else row.get(place)


def _as_object(value: object) -> RawRow:
    """`inputs` as the body of a request: an object, its JSON text, or the messages alone."""
    value = read_value(value)
    if isinstance(value, list):
        return {"messages": value}
    return value if isinstance(value, dict) else {}


# ---- the two as one trajectory ---------------------------------------------------------------------------------------


def _without_declarations(request: Request) -> tuple[list[object], object]:
    """The messages, and the tools: Langfuse's handler for LangChain logs them as messages of role `tool`.

    {"role": "tool", "content": {"type": "function", "function": {"name": "f", ...}}} -> its `content` is a tool
    """
    messages: list[object] = []
    tools: list[object] = []
    for message in request.messages:
        content = get(message, "content")
        answers_nothing = get(message, "role") == "tool" and get(message, "tool_call_id") is None
        if answers_nothing and (get(content, "function") or get(content, "name")):
            tools.append(content)
        else:
            messages.append(message)
    return messages, request.tools or tools or None


def _all_tools(found: object, given: object) -> object:
    """The tools that the messages brought, or those beside them, or both.

    Of the tools of a request of Responses, {"type": "mcp"} names a server, whose tools an item of the messages lists.
    """
    if isinstance(found, list) and isinstance(given, list) and found != given:
        names = [get(tool, "name") for tool in found]
        return found + [tool for tool in given if get(tool, "type") != "mcp" and get(tool, "name") not in names]
    return found or given


def _joined(given: list[object], answers: list[object], name: str, notes: Counter[str]) -> list[object]:
    """History and answers as one list. A state that was logged after a step repeats the history: it stands alone.

    [user], [assistant] -> [user, assistant]
    [user], [user, assistant] -> [user, assistant]
    [user, assistant], [assistant] with the same words -> [user, assistant]
    """
    if not answers:
        return given
    before, after = _words(given), _words(answers)
    is_state = _speaker(answers[0]) in ("user", "human", "system", "developer")
    if is_state and after[: len(before)] != before:
        raise DataError(
            f"`{name}` neither goes on from the messages that were given nor repeats them; write one list of "
            'messages: {"messages": [...]}'
        )
    if is_state:
        return answers
    if before[-len(after) :] == after:
        notes[REPEATED] += 1
        return given
    return continued(given, answers, notes)


def _speaker(message: object) -> object:
    """Who speaks, by whatever key says so."""
    role = get(message, "role")
    return role if role is not None else get(message, "type")


def _words(messages: list[object]) -> list[object]:
    """What each message says, for a comparison that ids and other spellings do not disturb.

    [{"role": "assistant", "content": "", "tool_calls": [{...}]}] -> [("assistant", "", 1)]
    """
    words: list[object] = []
    for _, message in tidy(read_messages(messages, {}).messages):
        calls = get_list(message, "tool_calls")
        words.append((get(message, "role"), str(get(message, "content") or ""), len(calls)))
    return words


def _with_system(system: object, messages: NumberedMessages) -> NumberedMessages:
    """The messages under the request's own system text, unless they open with the same."""
    with error_context("`system` of the row"):
        own = tidy([(0, {"role": "system", "content": _system_content(read_value(system))})])
        openings = [message for _, message in tidy(messages[:1]) if get(message, "role") in ("system", "developer")]
        if not openings:
            return own + messages
        if get(openings[0], "content") != get(own[0][1], "content"):
            raise DataError("stands beside another system message; merge the two into one")
        return messages


def _system_content(system: object) -> object:
    """The content of a system message, from whatever an API calls its system text.

    "Be kind." -> the same
    {"parts": [{"text": "Be kind."}]} -> [{"type": "text", "text": "Be kind."}]      Gemini
    [{"type": "text", "text": "Be kind."}] -> the same      Anthropic
    [{"text": "Be kind."}, {"cachePoint": {"type": "default"}}] -> [{"type": "text", "text": "Be kind."}]      Bedrock
    """
    if isinstance(system, dict):
        system = system.get("parts", system.get("content", system.get("text")))
    if isinstance(system, dict):
        system = [system]
    if not isinstance(system, list):
        return system
    parts: list[object] = []
    for block in system:
        if get(block, "cachePoint") is not None:
            continue
        if get(block, "role") is not None:
            raise DataError(f"holds the message {short(block)}; put it first in the messages")
        has_type = isinstance(block, str) or get(block, "type") is not None
        parts.append(content_part(block) if has_type else text_part(get(block, "text")))
    return parts
