"""A decision point as the page shows it: all values as text, so that a browser rounds no number and reads no markup.

The output is cut into pieces by what they are, and calls stand beside gold's, argument by argument, with what is wrong.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

from gemma_dist.data.gold import ABSENT
from gemma_dist.data.read import CALL, read_output
from gemma_dist.evaluate.decision import ScoredDecision
from gemma_dist.evaluate.score import Error
from gemma_dist.evaluate.values import GoldCall, nfc, same_value
from gemma_dist.gemma_format import CALL_END, CHANNEL, CHANNEL_END, CONTROL_TOKENS
from gemma_dist.logs import to_json

MAX_PATHS = 50  # places shown in which one argument differs from gold's
_CONTROL = "|".join(re.escape(token) for token in CONTROL_TOKENS)
# What a call that cannot be read, or a thought, reaches to: its end, or whatever opens next.
_PIECE = re.compile(
    rf"(?P<unreadable>{re.escape(CALL)}(?:(?!<\|(?:tool_call|tool_response|channel|turn)>|<turn\|>|<eos>).)*?"
    rf"(?:{re.escape(CALL_END)}|(?=<\|(?:tool_call|tool_response|channel|turn)>|<turn\|>|<eos>|\Z)))"
    rf"|(?P<thought>{re.escape(CHANNEL)}(?:(?!<\|(?:tool_call|tool_response|turn)>|<turn\|>|<eos>).)*?"
    rf"(?:{re.escape(CHANNEL_END)}|(?=<\|(?:tool_call|tool_response|turn)>|<turn\|>|<eos>|\Z)))"
    rf"|(?P<token>{_CONTROL})",
    re.DOTALL,
)

Piece = tuple[str, str]  # "text", "call", "unreadable", "thought" or "token", and the characters


class ComparedArgument(TypedDict):
    """An argument, or a place within it, of gold's call and of the output's."""

    path: str
    gold: str | None  # None: is not there
    got: str | None
    fault: str  # of `values.FaultKind`; "": right, or not judged


class ComparedCall(TypedDict):
    """A call of gold and the output's that was taken for it."""

    gold: str | None  # its tool; None: gold has none
    got: str | None
    fault: str  # of `score.FAILURES`; "": of the right tool
    arguments: list[ComparedArgument]


class ShownAnswer(TypedDict):
    """An output and its score."""

    right: bool
    failure: str
    status: str
    called: list[str]
    confusion: list[list[str]]
    pieces: list[Piece]
    calls: list[ComparedCall]
    text: str
    output_tokens: int
    stopped: bool


def shown_answer(line: ScoredDecision) -> ShownAnswer:
    """What the page shows of one answer."""
    score, parsed = line["score"], line["parsed"]
    return {
        "right": score["right"],
        "failure": score["failure"],
        "status": score["status"],
        "called": [call["name"] for call in parsed.get("calls", [])],
        "confusion": score["confusion"],
        "pieces": pieces(line["output"], line["opening"]),
        "calls": compared_calls(line),
        "text": parsed.get("content", ""),
        "output_tokens": line["output_tokens"],
        "stopped": line["stopped"],
    }


def shown_gold(line: ScoredDecision) -> dict[str, Any]:
    """What the page shows of gold, beside `compared_calls`."""
    gold = line["gold"]
    return {
        "tools": [call["name"] for call in gold["calls"]],
        "text": "" if gold["is_outline"] else gold["content"],
        "answers": gold.get("answers", []),
        "any_call": gold.get("any_call", False),
        "is_outline": gold["is_outline"],
    }


def pieces(output: str, opening: str) -> list[Piece]:
    """The output cut into pieces, which joined are the output again. Calls are where the reader found them, which does
    not hang on the tools declared."""
    found: list[Piece] = []
    spans = [call.span for call in read_output(output, opening).calls]
    position = 0
    for start, end in [*spans, (len(output), len(output))]:
        found += _between(output[position:start])
        if end > start:
            found.append(("call", output[start:end]))
        position = max(position, end)
    return found


def _between(text: str) -> Iterator[Piece]:
    """The pieces of a text in which no call could be read."""
    position = 0
    for match in _PIECE.finditer(text):
        if match.start() > position:
            yield "text", text[position : match.start()]
        yield str(match.lastgroup), match[0]
        position = match.end()
    if position < len(text):
        yield "text", text[position:]


def compared_calls(line: ScoredDecision) -> list[ComparedCall]:
    """Gold's calls beside those of the output, as the score pairs them; then those that are too many."""
    gold, calls = line["gold"]["calls"], line["parsed"].get("calls", [])
    errors = line["score"]["errors"]
    pairs = {pair[0]: pair[1] for pair in line["score"]["match"]}
    for error in errors:  # calls of another tool were paired by the arguments that they share
        if "parameter" not in error and "call" in error and "predicted" in error:
            pairs[error["call"]] = error["predicted"]
    rows = []
    for number, call in enumerate(gold):
        partner = pairs.get(number)
        got = None if partner is None else calls[partner]
        found = [error for error in errors if error.get("call") == number]
        rows.append(_compared(call, got, found, is_outline=line["gold"]["is_outline"]))
    for number, call in enumerate(calls):
        if number not in pairs.values():
            found = [error for error in errors if "call" not in error and error.get("predicted") == number]
            rows.append(_compared(None, call, found, is_outline=False))
    return rows


def _compared(
    gold: GoldCall | None, got: Mapping[str, Any] | None, errors: Sequence[Error], *, is_outline: bool
) -> ComparedCall:
    """One pair; either may be missing."""
    faults = {error["parameter"]: error["kind"] for error in errors if "parameter" in error}
    wanted = {} if gold is None else _wanted(gold)
    given: dict[str, Any] = {} if got is None else nfc(got["arguments"])
    arguments: list[ComparedArgument] = []
    for name in dict.fromkeys([*wanted, *given]):
        fault = faults.get(name, "")
        gold_text = "(not judged)" if is_outline else wanted.get(name)
        got_text = to_json(given[name]) if name in given else None
        arguments.append({"path": name, "gold": gold_text, "got": got_text, "fault": fault})
        plain = {} if gold is None else nfc(gold["arguments"])
        is_listed = gold is None or name in nfc(gold.get("acceptable", {}))
        if fault == "wrong_value" and name in plain and name in given and not is_listed:
            inner = list(differences(plain[name], given[name], name))
            arguments += inner if inner != arguments[-1:] else []
    whole = next((error["kind"] for error in errors if "parameter" not in error), "")
    return {
        "gold": None if gold is None else gold["name"],
        "got": None if got is None else got["name"],
        "fault": whole,
        "arguments": arguments,
    }


def _wanted(gold: GoldCall) -> dict[str, str]:
    """What gold says of each argument, in words where it leaves a choice."""
    said = {name: to_json(value) for name, value in nfc(gold["arguments"]).items()}
    for name, options in nfc(gold.get("acceptable", {})).items():
        said[name] = " or ".join("(absent)" if option == ABSENT else to_json(option) for option in options)
    return said | dict.fromkeys(map(nfc, gold.get("ignore_arguments", ())), "(anything)")


def differences(gold: Any, got: Any, path: str) -> list[ComparedArgument]:
    """The places in which a value differs from gold's, as deep as they lie: `when.day`, `rooms[2].size`."""
    found: list[ComparedArgument] = []
    for place in _differing(gold, got, path):
        if len(found) == MAX_PATHS:
            break
        found.append(place)
    return found


def _differing(gold: Any, got: Any, path: str) -> Iterator[ComparedArgument]:
    if same_value(gold, got):
        return
    if isinstance(gold, dict) and isinstance(got, dict):
        for key in dict.fromkeys([*gold, *got]):
            yield from _member(gold, got, key, f"{path}.{key}")
    elif isinstance(gold, list) and isinstance(got, list):
        for number in range(max(len(gold), len(got))):
            yield from _member(dict(enumerate(gold)), dict(enumerate(got)), number, f"{path}[{number}]")
    else:
        yield {"path": path, "gold": to_json(gold), "got": to_json(got), "fault": "wrong_value"}


def _member(gold: Mapping[Any, Any], got: Mapping[Any, Any], key: Any, path: str) -> Iterator[ComparedArgument]:
    """The same of what stands under a key, in one of both or in both."""
    if key in gold and key in got:
        yield from _differing(gold[key], got[key], path)
    else:
        sides = [to_json(side[key]) if key in side else None for side in (gold, got)]
        yield {"path": path, "gold": sides[0], "got": sides[1], "fault": "wrong_value"}
