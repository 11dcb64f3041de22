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


class _Waiting:
    """Calls of a message that have no answer yet, in their order."""

    def __init__(self, calls: list[ToolCall]) -> None:
        self.by_id = {call["id"]: call for call in calls}
        self.by_name: dict[str, dict[str, ToolCall]] = {}  # and then by id
        for call in calls:
            self.by_name.setdefault(call["function"]["name"], {})[call["id"]] = call

    def remove(self, call: ToolCall) -> None:
        """Take out one that is answered."""
        del self.by_id[call["id"]], self.by_name[call["function"]["name"]][call["id"]]

    def names(self) -> str:
        """As errors name them."""
        return _names(list(self.by_id.values()))

    def remedy(self, where_some_are_open: str) -> str:
        """What to do about an answer that none of them takes."""
        return where_some_are_open if self.by_id else "put the assistant message with the call in front, or remove this"


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
    waiting = _Waiting([])
    answered: set[str] = set()  # ids
    for place, message in zip(places, messages, strict=True):
        if message["role"] == "tool":
            with error_context(place):
                call = _answered_call(message, waiting, answered, given_ids)
            waiting.remove(call)
            answered.add(call["id"])
            message["tool_call_id"] = call["id"]
            message["name"] = call["function"]["name"]
            continue
        if waiting.by_id:
            raise DataError(
                f"{calling_place}: {waiting.names()} without an answer before {place}; add a tool message for it"
            )
        calls = message.get("tool_calls", [])
        for call in calls:
            call["id"] = call["id"] or next(fresh_ids)
        with error_context(place):
            if len({call["id"] for call in calls}) < len(calls):
                raise DataError(f"two calls of the message have one id: {_names(calls)}; make ids unique")
        calling_place, waiting, answered = place, _Waiting(calls), set()
    if waiting.by_id and answered:
        raise DataError(
            f"{calling_place}: {waiting.names()} without an answer, while others of the message are answered; "
            "answer all or none of the last calls"
        )


def _fresh_ids(given_ids: set[str]) -> Iterator[str]:
    """call_0, call_1, …, without those that the row gives itself."""
    for number in itertools.count():
        if f"call_{number}" not in given_ids:
            yield f"call_{number}"


def _answered_call(answer: Message, waiting: _Waiting, answered: set[str], given_ids: set[str]) -> ToolCall:
    """The open call that a tool message answers: by id, else the first of its name, else the only one."""
    if answer["tool_call_id"]:
        return _call_of_id(answer, waiting, answered, given_ids)
    name = answer["name"]
    if name:
        first = next(iter(waiting.by_name.get(name, {}).values()), None)
        if first is not None:
            return first
        raise DataError(
            f"answers a call of {short(name)}, which is not open; open calls: {waiting.names()}; "
            + waiting.remedy("fix the name")
        )
    if len(waiting.by_id) != 1:
        raise DataError(
            f"has neither tool_call_id nor name, and one call has to be open; open calls: {waiting.names()}; "
            + waiting.remedy("add the id")
        )
    return next(iter(waiting.by_id.values()))


def _call_of_id(answer: Message, waiting: _Waiting, answered: set[str], given_ids: set[str]) -> ToolCall:
    """The open call with the id that a tool message gives.

    Args:
        waiting: calls of the last assistant message that have no answer yet.
        answered: ids of those that have one.
        given_ids: ids that the row gives to its calls. An id that we gave to a call is not one that the row can mean.
    """
    call_id, name = answer["tool_call_id"], answer["name"]
    call = waiting.by_id.get(call_id) if call_id in given_ids else None
    if call is not None:
        if name not in ("", call["function"]["name"]):
            raise DataError(f"is named {short(name)} but answers {_names([call])}; make the two agree")
        return call
    if call_id in answered:
        why = "is already answered"
    elif call_id in given_ids:
        why = "is not open here"
    else:
        why = "no earlier turn made"
    raise DataError(
        f"answers call {short(call_id)}, which {why}; open calls: {waiting.names()}; "
        + waiting.remedy("a call is answered once, right after the message that makes it")
    )


def _names(calls: list[ToolCall]) -> str:
    """How errors name calls: "call 'c1' of weather, call 'c2' of clock"."""
    return ", ".join(f"call {short(call['id'])} of {call['function']['name']}" for call in calls) or "none"
