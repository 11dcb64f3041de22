"""What a model was asked and what it answered, out of the bodies of requests and responses of every API.

    {"messages": [...], "tools": [...]}              {"choices": [{"message": {...}}]}     OpenAI's Chat Completions
    {"messages": [...], "system": "..."}             {"role": "assistant", "content": [...]}      Anthropic's Messages
    {"messages": [...], "toolConfig": {...}}         {"output": {"message": {...}}}        Bedrock's Converse
    {"contents": [...], "systemInstruction": {...}}  {"candidates": [{"content": {...}}]}  Gemini
    {"input": [...], "instructions": "..."}          {"output": [...]}                     OpenAI's Responses

Both sides become lists of messages in their own layout, which `dialects.read_messages` converts:
Request(messages=[...], tools=[...], system="..."), and [{"role": "assistant", ...}].
The values may also be JSON text, and a log or batch may wrap the bodies: {"status_code": 200, "body": {...}}.
"""

from collections import Counter
from dataclasses import dataclass

from gemma_dist.data.calls import first_of
from gemma_dist.data.layouts.dialects import is_chat, is_message
from gemma_dist.data.layouts.langchain import is_message as is_langchain_message
from gemma_dist.data.layouts.pieces import without_keys
from gemma_dist.data.layouts.responses import is_item
from gemma_dist.data.strict import get, get_list, parse_json, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

# Where a list of messages may stand, and where beside it the answer.
ANSWER_KEYS: dict[str, tuple[str, ...]] = {
    "messages": ("choices", "candidates", "response", "completion", "output"),
    "contents": ("candidates", "response"),
    "input": ("output", "response", "choices"),
    "items": (),
    "events": (),
    "history": (),
    "trajectory": (),
    "traj": (),  # tau-bench
    "transcript": (),
    "conversation": (),
    "conversations": (),
    "dialogue": (),
    "dialog": (),
    "turns": (),
    "chat": (),
    "values": (),  # the state of a graph of LangGraph
}
WRAPPERS = ("body", "inputBodyJson", "outputBodyJson")  # the last two in Bedrock's logs
# Where a response lists its answers, and where each holds its message.
CHOICES = (("choices", "message"), ("candidates", "content"), ("generations", "message"))
SYSTEM_KEYS = (
    *("system", "systemInstruction", "system_instruction", "instructions", "system_prompt", "system_message"),
)
TOOL_KEYS = ("tools", "functions")
TOOL_PLACES = ("toolConfig", "config", "kwargs", "model_parameters", "metadata")  # may hold TOOL_KEYS
BESIDE_MESSAGE = ("id", "type", "model", "stop_reason", "stop_sequence", "usage", "finish_reason", "container")
CUT_OFF = "answers that were cut off at a token limit (finish_reason) were taken as they are"
CUT_KEYS = ("finish_reason", "finishReason", "stop_reason", "stopReason")
CUT_REASONS = ("length", "MAX_TOKENS", "max_tokens", "max_output_tokens")


@dataclass(frozen=True)
class Request:
    """What a model was given: a list of messages in any layout, and what stands beside it."""

    messages: list[object]
    tools: object = None
    system: object = None
    key: str = "messages"  # of ANSWER_KEYS: where the messages were found


def read_value(value: object) -> object:
    """A value that may be kept as the JSON text of an object or list; other texts as they are.

    '{"a": 1}' -> {"a": 1}    "Hi" -> "Hi"
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return parse_json(value)
    except DataError:  # a text that begins like JSON
        return value


def unnested(value: object) -> object:
    """[[m1, m2]] -> [m1, m2]: LangChain asks for several answers at once, and logs a list for each."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        return value[0]
    return value


def read_request(body: object, answer: object = None) -> Request | None:
    """What a request asks, wrapped or not; None where it holds no list of messages.

    {"body": {"messages": [m1, m2], "tools": [t]}} -> Request([m1, m2], [t])

    Args:
        answer: what answers the request, where that is logged apart.

    Raises:
        DataError: it goes on from messages that are not in it.
    """
    body = _unwrapped(read_value(body))
    if isinstance(body, list):
        body = {"messages": body}
    return find_messages(body, answer) if isinstance(body, dict) else None


def find_messages(body: RawRow, answer: object = None) -> Request | None:
    """As `read_request`, of a body or a row like one, which nothing wraps."""
    for key in ANSWER_KEYS:
        value = unnested(read_value(body.get(key)))
        inner = read_request(value) if isinstance(value, dict) else None
        if inner is not None:  # Langfuse: {"input": {"messages": [...], "tools": [...]}}
            return Request(inner.messages, inner.tools or _tools(body), inner.system or _system(body), key)
        if key == "input" and isinstance(value, str) and _is_responses(body, answer):
            value = [{"role": "user", "content": value}]
        if isinstance(value, list) and is_chat(value):
            _refuse_stored_history(body)
            return Request(value, _tools(body), _system(body), key)
    return None


def read_response(body: object, notes: Counter[str]) -> list[object]:
    """The messages or items that a model answered with.

    {"choices": [{"message": {"role": "assistant", "content": "Hi"}}]} -> [{"role": "assistant", "content": "Hi"}]

    Raises:
        DataError: there is none, or there are several to choose from.
    """
    body = _unwrapped(read_value(body))
    if isinstance(body, str) and body.strip():
        return [{"role": "assistant", "content": body}]
    if isinstance(body, list):
        return _answers_of_list(body, notes)
    if not isinstance(body, dict) or body.get("error"):
        raise DataError(f"the answer is {short(body)}; write the response of the API, or a message of the assistant")
    _refuse_stored_history(body)
    _count_cut(body, notes)
    for key, inner in CHOICES:
        given = unnested(read_value(body.get(key)))
        if isinstance(given, list):
            return [_only(given, key, inner, notes)]
    if is_langchain_message(body) or is_message(body) or isinstance(body.get("parts"), list):
        return [_with_role(body)]
    inner_body = first_of(body, ("message", "output", "messages", "response"))
    if inner_body is not None:
        return read_response(inner_body, notes)
    raise DataError(
        f"the answer has the keys {short(list(body))}, and none of choices, candidates, output and message; write "
        '{"choices": [{"message": {"role": "assistant", ...}}]}'
    )


def has_answer(body: object) -> bool:
    """Whether a value looks like a response of an API, {"choices": [{"message": {...}}]}, or like messages."""
    body = _unwrapped(read_value(body))
    if is_message(body) or is_chat(body):
        return True
    for key, inner in (*CHOICES, ("choices", "delta")):
        if any(get(choice, inner) is not None for choice in get_list(body, key)):
            return True
    return isinstance(get(body, "output"), (dict, list))


def _answers_of_list(given: list[object], notes: Counter[str]) -> list[object]:
    """A list of messages or items; LangChain's lists of generations hold one each.

    [{"type": "reasoning", ...}, {"type": "function_call", ...}] -> the same
    [[{"text": "Hi", "message": {"type": "ai", "content": "Hi"}}]] -> [{"type": "ai", "content": "Hi"}]
    """
    if len(given) == 1 and (isinstance(given[0], list) or get(given[0], "message") is not None):
        return read_response(given[0], notes)
    if not is_chat(given) and not all(is_item(item) for item in given):
        raise DataError(f"the answer is the list {short(given)}; write the messages or items that the model made")
    return list(given)


def _only(given: list[object], key: str, inner: str, notes: Counter[str]) -> object:
    """The message of the only choice.

    [{"message": {"content": "Hi"}, "finish_reason": "stop"}] -> {"role": "assistant", "content": "Hi"}
    [{"text": "Hi"}] -> the same: a completion

    Args:
        key, inner: of CHOICES: where the list stood, and where a choice holds its message.
    """
    if len(given) != 1:
        raise DataError(f"`{key}` holds {len(given)} answers to one request; keep the one that is to be trained")
    choice = given[0]
    _count_cut(choice, notes)
    message, text = get(choice, inner), get(choice, "text")
    if isinstance(message, dict):
        return _with_role(message)
    if isinstance(text, str):
        return {"role": "assistant", "content": text}
    raise DataError(
        f"`{key}` holds {short(choice)} without a message (a part of a stream?); write the whole answer: "
        '{"message": {"role": "assistant", "content": ..., "tool_calls": [...]}}'
    )


def _with_role(message: RawRow) -> RawRow:
    """The message without what the API says beside it, as the model's where it does not say whose it is.

    {"id": "msg_1", "role": "assistant", "content": [...], "usage": {...}} -> {"role": "assistant", "content": [...]}
    {"parts": [{"text": "Hi"}]} -> {"role": "model", "parts": [{"text": "Hi"}]}
    """
    if is_langchain_message(message):
        return message
    said = without_keys(message, BESIDE_MESSAGE)
    if said.get("reasoning_content"):
        said.pop("thinking_blocks", None)  # LiteLLM: the same, with Anthropic's signature
    if said.get("role") is None:
        said["role"] = "model" if "parts" in said else "assistant"
    return said


def _count_cut(answer: object, notes: Counter[str]) -> None:
    """Count {"finish_reason": "length"}, and {"incomplete_details": {"reason": "max_output_tokens"}} of Responses."""
    reasons = [get(answer, key) for key in CUT_KEYS]
    reasons.append(get(get(answer, "incomplete_details"), "reason"))
    if any(reason in CUT_REASONS for reason in reasons):
        notes[CUT_OFF] += 1


def _unwrapped(body: object) -> object:
    """The body of a request or response that a log or a batch wraps: {"status_code": 200, "body": {...}}."""
    while isinstance(body, dict):
        wrapped = read_value(first_of(body, WRAPPERS))
        if wrapped is None and get(body.get("response"), "body") is not None:
            wrapped = body["response"]
        if not isinstance(wrapped, dict):
            return body
        body = wrapped
    return body


def _is_responses(body: RawRow, answer: object) -> bool:
    """Whether a body with a text as its input is one of the Responses API: {"input": "Hi", "instructions": "..."}."""
    output = body.get("output") or get(_unwrapped(read_value(answer)), "output")
    has_items = isinstance(output, list) and bool(output) and all(is_item(item) for item in output)
    return has_items or body.get("object") == "response" or body.get("instructions") is not None


def _refuse_stored_history(body: RawRow) -> None:
    """DataError for a body of Responses that goes on from messages which only the provider has."""
    earlier = body.get("previous_response_id")
    if earlier:
        raise DataError(
            f"`previous_response_id` is {short(earlier)}: the messages before are kept by the provider; put their "
            "items in front of `input` and remove the key"
        )


def _tools(body: RawRow) -> object:
    """The declarations of a request, in whatever form.

    {"tools": [t]}, {"toolConfig": {"tools": [t]}} of Bedrock, {"extra": {"invocation_params": {"tools": [t]}}} of
    LangSmith -> [t]
    """
    places = [body, get(body.get("extra"), "invocation_params"), *map(body.get, TOOL_PLACES)]
    for place in places:
        for key in TOOL_KEYS:
            tools = read_value(get(place, key))
            if isinstance(tools, list):  # Bedrock also says in them where a prompt may be cached
                tools = [tool for tool in tools if get(tool, "cachePoint") is None]
            if tools:
                return tools
    return None


def _system(body: RawRow) -> object:
    """{"instructions": "Be kind."} -> "Be kind."; the SDK of Gemini puts it into `config`."""
    for place in (body, body.get("config")):
        for key in SYSTEM_KEYS:
            system = get(place, key)
            if system:
                return system
    return None
