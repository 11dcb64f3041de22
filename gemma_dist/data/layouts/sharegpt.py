"""sharegpt: {"conversations": [{"from": "human", "value": "..."}, ...], "system"?, "tools"?, "images"?}."""

import json

from gemma_dist.data.layouts.markers import split_markers
from gemma_dist.data.layouts.turns import NumberedMessages, OpenAIRow, turn_name
from gemma_dist.data.strict import error_context, get, parse_json, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
OWN_KEYS = ("from", "value")  # of a turn; its message keeps the others


def is_layout(row: RawRow) -> bool:
    """Whether the row holds `conversations` whose turns say whom they are from."""
    turns = row.get("conversations")
    if row.get("messages") or not isinstance(turns, list):
        return False
    return any(isinstance(turn, dict) and "from" in turn for turn in turns)


def to_openai(row: RawRow) -> OpenAIRow:
    """The row in the OpenAI shape. DataError where a turn cannot be converted."""
    turns = row["conversations"]
    assert isinstance(turns, list)
    return OpenAIRow(_messages(turns), row.get("tools"))


def _messages(turns: list[object]) -> NumberedMessages:
    """Messages with their turns. Parallel calls are answered in order by the observations after them."""
    messages: NumberedMessages = []
    sources = [get(turn, "from") for turn in turns]
    num_calls = 0
    open_ids: list[str] = []  # of the last function_call turn: its calls that no observation has answered yet
    for index, (turn, source) in enumerate(zip(turns, sources, strict=True)):
        number = index + 1
        with error_context(turn_name(number, source)):
            if not isinstance(turn, dict) or not isinstance(source, str) or source not in SHAREGPT_ROLES:
                raise DataError(f"`from` is {short(source)}; sharegpt turns come from {', '.join(SHAREGPT_ROLES)}")
            message = {key: value for key, value in turn.items() if key not in OWN_KEYS}
            message["role"] = SHAREGPT_ROLES[source]
            value = turn.get("value")
            if source == "function_call":
                functions = _calls(value)
                open_ids = [f"call_{num_calls + i}" for i in range(len(functions))]
                num_calls += len(functions)
                calls = [{"id": id, "function": function} for id, function in zip(open_ids, functions, strict=True)]
                messages.append((number, {**message, "content": "", "tool_calls": calls}))
            elif message["role"] == "tool" and open_ids:
                follows_calls = sources[index - 1] == "function_call"
                is_last = sources[number : number + 1] not in (["observation"], ["tool"])
                # The only observation after several calls answers all of them.
                answers = _answers(value, len(open_ids)) if follows_calls and is_last else [value]
                for answer in answers:
                    answered = {"tool_call_id": open_ids.pop(0), "content": split_markers(answer)}
                    messages.append((number, message | answered))
            else:
                messages.append((number, {**message, "content": split_markers(value)}))
    return messages


def _calls(value: object) -> list[RawRow]:
    """The calls of a function_call turn: JSON text of {"name", "arguments"} or of a list of them."""
    given = parse_json(value) if isinstance(value, str) else value
    calls: list[RawRow] = []
    for call in given if isinstance(given, list) else [given]:
        if not isinstance(call, dict) or "name" not in call:
            raise DataError(
                f'the call {short(call)} is no object with a name; write {{"name": ..., "arguments": {{...}}}}'
            )
        calls.append(call)
    return calls


def _answers(value: object, num_calls: int) -> list[object]:
    """What the only observation after `num_calls` calls answers to each: its JSON list where there are several."""
    if num_calls == 1:
        return [value]
    answers = parse_json(value) if isinstance(value, str) else value
    if not isinstance(answers, list) or len(answers) != num_calls:
        raise DataError(
            f"one observation, {short(value)}, after {num_calls} calls; "
            f"give an observation for each call, or a JSON list of {num_calls}"
        )
    return [answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False) for answer in answers]
