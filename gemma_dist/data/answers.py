"""Tool messages linked to the calls that they answer.

    {"role": "assistant", "tool_calls": [{"id": "c1", …}, {…}]}     of weather, and of clock without an id
    {"role": "tool", "name": "clock", "content": "12:00"}           by name: gets the id of the second call, "call_0"
    {"role": "tool", "tool_call_id": "c1", "content": "Sunny."}     by id: gets the name "weather"

An answer is a tool message: the result of one call, or an error that came in its place.
"""

import itertools
from collections.abc import Iterator

from gemma_dist.data.strict import error_context, short
from gemma_dist.data.types import Message, ToolCall
from gemma_dist.errors import DataError


def link_answers(places: list[str], messages: list[Message]) -> None:
    """Give each call an id and each tool message the id and name of the call that it answers, in place.

    The calls of a message are answered before the next user or assistant message, each once. Answers keep their order,
    in which the template renders them. Only the last assistant's calls may stay without answers, and then all of them.

    Args:
        places: how errors name each message.

    Raises:
        DataError: an answer has no call, a call has no answer or two, or two calls of a message have one id.
    """
    given_ids = {call["id"] for message in messages for call in message.get("tool_calls", []) if call["id"]}
    fresh_ids = _fresh_ids(given_ids)
    calling_place = ""
    waiting: list[ToolCall] = []
    answered: list[ToolCall] = []
    for place, message in zip(places, messages, strict=True):
        if message["role"] == "tool":
            with error_context(place):
                call = _answered_call(message, waiting, answered, given_ids)
            waiting.remove(call)
            answered.append(call)
            message["tool_call_id"] = call["id"]
            message["name"] = call["function"]["name"]
            continue
        if waiting:
            raise DataError(
                f"{calling_place}: {_names(waiting)} without an answer before {place}; add a tool message for it"
            )
        calls = message.get("tool_calls", [])
        for call in calls:
            call["id"] = call["id"] or next(fresh_ids)
        with error_context(place):
            if len({call["id"] for call in calls}) < len(calls):
                raise DataError(f"two calls of the message have one id: {_names(calls)}; make ids unique")
        calling_place, waiting, answered = place, list(calls), []
    if waiting and answered:
        raise DataError(
            f"{calling_place}: {_names(waiting)} without an answer, while others of the message are answered; "
            "answer all or none of the last calls"
        )


def _fresh_ids(given_ids: set[str]) -> Iterator[str]:
    """call_0, call_1, …, without those that the row gives itself."""
    for number in itertools.count():
        if f"call_{number}" not in given_ids:
            yield f"call_{number}"


def _answered_call(answer: Message, waiting: list[ToolCall], answered: list[ToolCall], given_ids: set[str]) -> ToolCall:
    """The open call that a tool message answers: by id, else the first of its name, else the only one."""
    if answer["tool_call_id"]:
        return _call_of_id(answer, waiting, answered, given_ids)
    name = answer["name"]
    if name:
        for call in waiting:
            if call["function"]["name"] == name:
                return call
        raise DataError(
            f"answers a call of {short(name)}, which is not open; open calls: {_names(waiting)}; fix the name"
        )
    if len(waiting) != 1:
        raise DataError(
            f"has neither tool_call_id nor name, and one call has to be open; open calls: {_names(waiting)}; add the id"
        )
    return waiting[0]


def _call_of_id(answer: Message, waiting: list[ToolCall], answered: list[ToolCall], given_ids: set[str]) -> ToolCall:
    """The open call with the id that a tool message gives.

    Args:
        waiting: calls of the last assistant message that have no answer yet.
        answered: those that have one.
        given_ids: ids that the row gives to its calls. An id that we gave to a call is not one that the row can mean.
    """
    call_id, name = answer["tool_call_id"], answer["name"]
    for call in waiting:
        if call_id not in given_ids or call["id"] != call_id:
            continue
        if name not in ("", call["function"]["name"]):
            raise DataError(f"is named {short(name)} but answers {_names([call])}; make the two agree")
        return call
    if call_id in [done["id"] for done in answered]:
        why = "is already answered"
    elif call_id in given_ids:
        why = "is not open here"
    else:
        why = "no earlier turn made"
    raise DataError(
        f"answers call {short(call_id)}, which {why}; open calls: {_names(waiting)}; "
        "a call is answered once, right after the message that makes it"
    )


def _names(calls: list[ToolCall]) -> str:
    """How errors name calls: "call 'c1' of weather, call 'c2' of clock"."""
    return ", ".join(f"call {short(call['id'])} of {call['function']['name']}" for call in calls) or "none"
