"""Tool messages linked to the calls that they answer, and text moved in front of the calls beside it."""

import itertools
from collections.abc import Iterator
from typing import Any

from gemma_dist.data.messages import says_something
from gemma_dist.data.strict import error_context, short
from gemma_dist.errors import DataError


def link_answers(places: list[str], messages: list[dict[str, Any]]) -> None:
    """Give each call an id and each tool message the id and name of the call that it answers, in place.

    The calls of a message are answered before the next user or assistant message, each once. Answers keep their order,
    in which the template renders them. Only the last assistant's calls may stay without answers, and then all of them.
    """
    calls_of = [message.get("tool_calls", []) for message in messages]
    given_ids = {call["id"] for calls in calls_of for call in calls} - {None}
    fresh_ids = (name for name in (f"call_{number}" for number in itertools.count()) if name not in given_ids)
    calling_place = ""
    waiting: list[dict[str, Any]] = []
    answered: list[dict[str, Any]] = []
    for place, message, calls in zip(places, messages, calls_of, strict=True):
        if message["role"] == "tool":
            with error_context(place):
                call = _answered_call(message, waiting, answered, given_ids)
            waiting.remove(call)
            answered.append(call)
            message |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
            continue
        if waiting:
            raise DataError(
                f"{calling_place}: {_names(waiting)} without an answer before {place}; add a tool message for it"
            )
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


def _answered_call(
    message: dict[str, Any], waiting: list[dict[str, Any]], answered: list[dict[str, Any]], given_ids: set[str]
) -> dict[str, Any]:
    """The open call that a tool message answers: by id, else the first of its name, else the only one."""
    id, name = message["tool_call_id"], message["name"]
    if id is not None:
        # An id that we gave to a call is not one that the row can mean.
        call = next((call for call in waiting if call["id"] == id and id in given_ids), None)
        if call is None:
            if any(done["id"] == id for done in answered):
                why = "is already answered"
            else:
                why = "is not open here" if id in given_ids else "no earlier turn made"
            raise DataError(
                f"answers call {short(id)}, which {why}; open calls: {_names(waiting)}; "
                "a call is answered once, right after the message that makes it"
            )
        if name is not None and name != call["function"]["name"]:
            raise DataError(f"is named {short(name)} but answers {_names([call])}; make the two agree")
        return call
    if name is not None:
        call = next((call for call in waiting if call["function"]["name"] == name), None)
        if call is None:
            raise DataError(
                f"answers a call of {short(name)}, which is not open; open calls: {_names(waiting)}; mend the name"
            )
        return call
    if len(waiting) != 1:
        raise DataError(
            f"has neither tool_call_id nor name, and one call has to be open; open calls: {_names(waiting)}; add the id"
        )
    return waiting[0]


def _names(calls: list[dict[str, Any]]) -> str:
    return ", ".join(f"call {short(call['id'])} of {call['function']['name']}" for call in calls) or "none"


def text_before_call(message: dict[str, Any], text_beside_call: str) -> Iterator[dict[str, Any]]:
    """The message, its content moved in front of its calls: the template would write it behind them.

    As "reasoning" it is appended to the reasoning; a content with pictures always becomes a message of its own.
    Reasoning stays with the first of the two.
    """
    content = message["content"]
    if "tool_calls" not in message:
        yield message
        return
    if not says_something(content):
        yield message | {"content": ""}
        return
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if text_beside_call == "reasoning" and all(part["type"] == "text" for part in parts):
        reasoning = [message["reasoning_content"]] if "reasoning_content" in message else []
        reasoning.append("".join(part["text"] for part in parts).strip())
        yield message | {"content": "", "reasoning_content": "\n".join(reasoning)}
        return
    yield {key: value for key, value in message.items() if key != "tool_calls"}
    yield {key: value for key, value in message.items() if key != "reasoning_content"} | {"content": ""}
