"""Read the message in which a server of chat says what the model wrote: calls that the server has read already.

    {"content": "…", "reasoning_content": "…", "tool_calls": [{"name": "f", "arguments": "{\\"x\\": 1}"}]}

This is what a program behind that server would act on, so this is what is scored. Where the server also gives the text
that the model wrote, we read that as well: a server that reads other calls in it than we do shows in the report.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from gemma_dist.data.read import Call, Reading, read_output
from gemma_dist.data.strict import as_list, get
from gemma_dist.evaluate.decision import ScoredDecision
from gemma_dist.evaluate.values import same_value
from gemma_dist.gemma_format import CALL, MAX_DEPTH

MESSAGE = "message"  # the form of an output that is such a message, as JSON text
MESSAGE_KEYS = ("content", "reasoning_content", "reasoning", "tool_calls")
ERROR = "error"  # the one key of a message in whose place the server sent an error
MAX_NAMED = 20  # answers that the report names


class ServerReading(TypedDict):
    """How the server read the answers, beside how we would."""

    answers: int  # of a server of chat
    with_text: int  # for which it also gave the text that the model wrote
    read_otherwise: int  # of these: those in which we read other calls
    calls_left_in_text: int  # answers with a call in their content that the server did not read, and we do
    errors: int  # answers in whose place it sent an error: they count as malformed
    other_prompt_length: int  # answers whose prompt had another number of tokens than the processor here makes of it
    named: list[str]  # some of those read otherwise or left: "ID turn TURN", with "answer N" of several


def kept_call(call: object) -> Any:
    """Name and arguments of an entry of `tool_calls` (its id differs from run to run); as it is where it has none."""
    function = get(call, "function")
    return {key: function.get(key) for key in ("name", "arguments")} if isinstance(function, dict) else call


def read_message(output: str, *, budget_spent: bool, tool_names: Iterable[str]) -> Reading:
    """Read a message, given as JSON text. A call whose name or arguments cannot be used is malformed, and so is an
    error in the message's place; a message without calls is read as the text that it holds."""
    message = json.loads(output)
    if ERROR in message:
        return Reading((), "", "", True, "malformed")
    content, reasoning = _text(message.get("content")), _text(message.get("reasoning_content"))
    text = read_output(content, "", budget_spent, tool_names)
    reasoning = (reasoning or _text(message.get("reasoning")) or text.reasoning).strip()
    if not message.get("tool_calls"):
        return _with_reasoning(text, reasoning)
    given = message["tool_calls"]
    calls = [_call(call) for call in as_list(given)]
    is_whole = None not in calls and isinstance(given, list) and not text.attempted
    status = "malformed" if not is_whole else "truncated" if budget_spent else "ok"
    return Reading(tuple(filter(None, calls)), text.content, reasoning, True, status)  # type: ignore[arg-type]


def compare_readings(lines: Sequence[ScoredDecision]) -> ServerReading | None:
    """How a server read the answers of a run; None where no server did."""
    served = [line for line in lines if line.get("form") == MESSAGE]
    if not served:
        return None
    otherwise = [line for line in served if "raw" in line and not _agrees(line)]
    left = [line for line in served if CALL in _text(json.loads(line["output"]).get("content"))]
    several = any(line["sample"] for line in served)
    named = {
        f"{line['id']} turn {line['turn']}" + (f" answer {line['sample'] + 1}" if several else ""): None
        for line in (*otherwise, *left)
    }
    return {
        "answers": len(served),
        "with_text": sum("raw" in line for line in served),
        "read_otherwise": len(otherwise),
        "calls_left_in_text": len(left),
        "errors": sum(ERROR in json.loads(line["output"]) for line in served),
        "other_prompt_length": sum(
            line["prompt_tokens"] not in (0, line.get("own_prompt_tokens", line["prompt_tokens"])) for line in served
        ),
        "named": list(named)[:MAX_NAMED],
    }


def say_reading(reading: ServerReading) -> list[str]:
    """What is worth a word of it, in sentences."""
    said = []
    if reading["read_otherwise"]:
        said.append(
            f"The server's parser read other calls than we do in {reading['read_otherwise']} of {reading['with_text']} "
            "answers; scored are the server's."
        )
    if reading["calls_left_in_text"]:
        said.append(
            f"The server left calls in the text of {reading['calls_left_in_text']} of {reading['answers']} answers, as "
            "one without a parser for Gemma 4 does; where it gave none of its own, scored is what we read there."
        )
    if reading["errors"]:
        said.append(
            f"In the place of {reading['errors']} of {reading['answers']} answers the server sent an error: they "
            "count as malformed calls."
        )
    if reading["other_prompt_length"]:
        said.append(
            f"{reading['other_prompt_length']} of {reading['answers']} prompts have another length at the server than "
            "the processor here gives them: its chat template is another one, or it leaves something out."
        )
    if said and reading["named"]:
        said.append(f"Such as: {', '.join(reading['named'])}.")
    return said


def _agrees(line: ScoredDecision) -> bool:
    """Whether we read the same calls in the text as the server did."""
    own = read_output(line["raw"], line["opening"], budget_spent=not line["stopped"])
    theirs = line["parsed"]["calls"]
    ours = [{"name": call.name, "arguments": call.arguments} for call in own.calls]
    attempted = line["parsed"]["status"] != "no_call"
    return same_value(ours, theirs) and (attempted or not own.attempted)


def _with_reasoning(reading: Reading, reasoning: str) -> Reading:
    as_text = _with_reasoning(reading.as_text, reasoning) if reading.as_text else None
    return Reading(reading.calls, reading.content, reasoning, reading.attempted, reading.status, as_text)


def _text(content: object) -> str:
    """The text of a content: a string, or parts of one."""
    if isinstance(content, str):
        return content
    texts = [get(part, "text") for part in as_list(content)]
    return "".join(text for text in texts if isinstance(text, str))


def _call(call: object) -> Call | None:
    """A call that a server read; None where a program could not act on it."""
    name, arguments = get(call, "name"), get(call, "arguments")
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments) if arguments.strip() else {}
        arguments = {} if arguments is None else arguments
        if isinstance(name, str) and name and isinstance(arguments, Mapping) and _is_plain(arguments):
            return Call(name, dict(arguments), (0, 0))
    except (ValueError, RecursionError):
        pass
    return None


def _is_plain(value: object, depth: int = 0) -> bool:
    """Whether a value is JSON of a depth that can be compared: no NaN, no infinity."""
    if depth > MAX_DEPTH:
        return False
    if isinstance(value, Mapping):
        return all(_is_plain(one, depth + 1) for one in value.values())
    if isinstance(value, list):
        return all(_is_plain(one, depth + 1) for one in value)
    return not isinstance(value, float) or math.isfinite(value)
