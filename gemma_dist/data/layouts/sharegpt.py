"""sharegpt: {"conversations": [{"from": "human", "value": "..."}, ...], "system"?, "tools"?, "images"?}.

The same turns are taken under `messages` and with OpenAI's keys, as ms-swift, LLaMA-Factory and Toucan write them:

    {"messages": [{"role": "user", "content": "Rome?"},
                  {"role": "tool_call", "content": "{'name': 'weather', 'arguments': '{\"city\": \"Rome\"}'}"},
                  {"role": "tool_response", "content": "20"},
                  {"role": "assistant", "content": "20 degrees."}], "tools"?}
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any, TypeAlias

from gemma_dist.data.calls import first_of
from gemma_dist.data.layouts.markers import split_markers
from gemma_dist.data.layouts.turns import NumberedMessages, OpenAIRow, first_filled, turn_name
from gemma_dist.data.literals import as_text, parse_calls, read_literal
from gemma_dist.data.strict import as_list, as_object, error_context, get, short, without, without_nulls
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

CALLS, RESULT = "calls", "tool"
SHAREGPT_ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": CALLS,
    "function-call": CALLS,
    "tool_call": CALLS,
    "tool_calls": CALLS,
    "tool-call": CALLS,
    "observation": RESULT,
    "tool": RESULT,
    "function": RESULT,
    "function_response": RESULT,
    "function-response": RESULT,
    "function_output": RESULT,
    "function_result": RESULT,
    "tool_response": RESULT,
    "tool-response": RESULT,
    "tool_output": RESULT,
    "tool_result": RESULT,
    "ipython": RESULT,
}
# What the model thought, in front of a call; the prompt may hold the first tag.
_THOUGHT = re.compile(r"\s*(?:<think(?:ing)?>|(?![\s{\[]))(.*?)</think(?:ing)?>", re.DOTALL)
# Roles that OpenAI's messages have themselves: a row with these alone is read as it is.
_OPENAI_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Turns of a row with their numbers.
Run: TypeAlias = list[tuple[int, RawRow]]
# Keys that say who speaks and what: the message has them under OpenAI's names. All others it keeps.
_ROLE_KEYS = ("from", "role")
_VALUE_KEYS = ("value", "content")


def is_layout(row: RawRow) -> bool:
    """Whether a turn of the row says whom it is from in a way that OpenAI's messages do not."""
    return any(_is_own_turn(turn) for turn in as_list(first_filled(row, "messages", "conversations")))


def _is_own_turn(turn: object) -> bool:
    """Whether a turn has `from`, or a role that OpenAI does not have: "tool_call"."""
    role = get(turn, "role")
    has_own_role = isinstance(role, str) and role in SHAREGPT_ROLES and role not in _OPENAI_ROLES
    return "from" in as_object(turn) or has_own_role


def to_openai(row: RawRow) -> OpenAIRow:
    """The row in the OpenAI shape. DataError where a turn cannot be converted."""
    return OpenAIRow(_messages(first_filled(row, "messages", "conversations")), row.get("tools"))


def _messages(turns: list[object]) -> NumberedMessages:
    """Messages with their turns: calls in a row become one message, which the results in a row behind it answer."""
    messages: NumberedMessages = []
    fresh_ids = (f"call_{number}" for number in itertools.count())
    open_ids: list[object] = []  # of the last calls, in the order in which results answer them
    for role, run in _runs(turns):
        if role == CALLS:
            calling = _calling_message(run, fresh_ids)
            messages.append((run[0][0], calling))
            open_ids = [call["id"] for call in calling["tool_calls"]]
            continue
        if role == RESULT and len(run) == 1 and len(open_ids) > 1 and not _names_its_call(run[0][1]):
            run = _split_result(*run[0], num_calls=len(open_ids))
        for number, turn in run:
            message = _message(turn, role)
            if role == RESULT and open_ids and not _names_its_call(turn):
                message["tool_call_id"] = open_ids.pop(0)
            messages.append((number, message))
        open_ids = []
    return messages


def _runs(turns: list[object]) -> Iterator[tuple[str, Run]]:
    """Neighboring turns of one role together."""
    run: Run = []
    run_role = ""
    for number, turn in enumerate(turns, start=1):
        role, turn = _checked(number, turn)
        if run and role != run_role:
            yield run_role, run
            run = []
        run_role = role
        run.append((number, turn))
    if run:
        yield run_role, run


def _source(turn: object) -> object:
    """Whom a turn says it is from."""
    return first_filled(turn, "from", "role")


def _value(turn: RawRow) -> object:
    """What a turn says."""
    return first_of(turn, _VALUE_KEYS)


def _checked(number: int, turn: object) -> tuple[str, RawRow]:
    """A turn behind its role in SHAREGPT_ROLES. DataError if it has none."""
    source = _source(turn)
    role = SHAREGPT_ROLES.get(source.lower()) if isinstance(source, str) else None
    if role is None or not isinstance(turn, dict):
        with error_context(turn_name(number, source)):
            raise DataError(f"`from` is {short(source)}; sharegpt turns come from {', '.join(SHAREGPT_ROLES)}")
    return role, turn


def _rest(turn: RawRow) -> RawRow:
    """The keys of a turn beside who speaks and what."""
    return without_nulls(without(turn, *_ROLE_KEYS, *_VALUE_KEYS))


def _message(turn: RawRow, role: str) -> RawRow:
    """The message of a turn that makes no calls as text."""
    return {**_rest(turn), "role": role, "content": split_markers(_value(turn))}


def _calling_message(run: Run, fresh_ids: Iterator[str]) -> dict[str, Any]:
    """One message with the calls of all turns of the run, each under an id.

    [{"from": "function_call", "value": "<think>why</think>{'name': 'f', 'arguments': {}}"}]
      -> {"role": "assistant", "content": "<think>why</think>",
          "tool_calls": [{"id": "call_0", "function": {"name": "f", ...}}]}
    """
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    rest = _rest(run[0][1])
    for number, turn in run:
        with error_context(turn_name(number, _source(turn))):
            value = _value(turn)
            given = rest.pop("tool_calls", None) if value in (None, "") else None
            thought = _THOUGHT.match(value) if isinstance(value, str) else None
            if isinstance(value, str) and thought:
                thoughts.append(thought[1].strip())
                value = value[thought.end() :]
            calls += parse_calls(given or value)
            if _rest(turn) != _rest(run[0][1]):
                raise DataError(
                    f"calls in a row are one message, but beside the calls this turn says {short(_rest(turn))} "
                    f"and turn {run[0][0]} {short(_rest(run[0][1]))}; make the two agree"
                )
    for call in calls:
        call["id"] = call.get("id") or next(fresh_ids)
    # As the text of the message, thoughts are read where those of all other layouts are.
    content = "".join(f"<think>{thought}</think>" for thought in thoughts if thought)
    return {**rest, "role": "assistant", "content": content, "tool_calls": calls}


def _names_its_call(turn: RawRow) -> bool:
    """Whether a result says itself which call it answers."""
    return bool(turn.get("tool_call_id") or turn.get("name"))


def _split_result(number: int, turn: RawRow, num_calls: int) -> Run:
    """The only result after several calls as one for each: its JSON list."""
    value = _value(turn)
    with error_context(turn_name(number, _source(turn))):
        answers = read_literal(value)
        if not isinstance(answers, list) or len(answers) != num_calls:
            raise DataError(
                f"one observation, {short(value)}, after {num_calls} calls; "
                f"give an observation for each call, or a JSON list of {num_calls}"
            )
    rest = without(turn, *_VALUE_KEYS)
    return [(number, {**rest, "value": as_text(answer)}) for answer in answers]
