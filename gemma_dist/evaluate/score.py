"""Score a reading against the gold turn: plain data in, numerators and denominators out.

The unit is the decision point: one assistant turn with gold history before it. `score_decision` matches its calls with
gold's, counts, and says what is wrong; what is measured of the counts is the table in `metrics.py`.

A malformed or truncated call is an attempt, and wrong. To abstain is to answer: an output that says nothing attempts no
call and is not right either, or a model that has fallen silent would be right at every point without a call. Values are
compared by two rules, side by side: ours (`values.py`), and BFCL's (`bfcl_rule.py`) with its leniency beside it.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NotRequired, TypedDict

from gemma_dist.data.read import Reading, Status
from gemma_dist.data.schema_fit import find_misfit
from gemma_dist.errors import DataError
from gemma_dist.evaluate.answers import says_one_of
from gemma_dist.evaluate.bfcl_rule import bfcl_faults
from gemma_dist.evaluate.matching import Comparison, Pair, match_calls, match_other_tools
from gemma_dist.evaluate.metrics import BFCL_METRICS, DECISION_METRICS, DecisionCounts, Ratios, ratios
from gemma_dist.evaluate.values import GoldCall, is_one_of, nfc, strict_faults

__all__ = ["GoldCall", "Score", "score_decision"]

_NOTHING = re.compile(r"<(?:unused\d+|unk|mask)>|\ufffd")  # what says nothing to a reader
NO_CALL, NOT_OFFERED, MALFORMED = "(no call)", "(not offered)", "(malformed)"  # classes beside the tools

# What can be wrong with a decision point, the first that applies counts; then the kinds of `values.FaultKind`.
FAILURES = (
    *("malformed", "truncated", "silent", "no_call", "unwanted_call", "not_offered", "wrong_tool", "missing_call"),
    *("extra_call", "missing_required", "unknown_name", "wrong_type", "wrong_value", "wrong_optional_use"),
)


class Gold(TypedDict):
    """What the model was expected to write."""

    calls: list[GoldCall]
    content: str
    is_outline: bool  # of a test case that gives names of tools alone: arguments and content stand for nothing
    any_call: NotRequired[bool]  # of a test case: it is to call, whatever it calls
    answers: NotRequired[list[str]]  # of a test case: texts, any of which is right; else it is `content` alone


class Error(TypedDict):
    """One thing that is wrong with an output."""

    kind: str  # of FAILURES
    call: NotRequired[int]  # index among gold's calls
    predicted: NotRequired[int]  # index among the output's
    parameter: NotRequired[str]
    expected: NotRequired[Any]  # of an argument: the values that would be right; of a call: its name
    got: NotRequired[Any]


class RuleScore(TypedDict):
    """The score of one decision point by another rule than ours."""

    right: bool
    ratios: Ratios


class Score(TypedDict):
    """The score of one decision point, as it goes into samples.jsonl."""

    status: Status
    right: bool  # what `overall` counts
    failure: str  # the first of FAILURES that applies; "" where it is right
    match: list[list[int]]  # [gold, predicted] pairs of calls of one name, by index
    errors: list[Error]
    confusion: list[list[str]]  # [gold, predicted] tool for each call of either
    ratios: Ratios  # metrics with nothing to judge here are absent
    bfcl: RuleScore


@dataclass(frozen=True)
class _Point:
    """What is compared at one decision point."""

    reading: Reading
    gold: Gold
    schemas: Mapping[str, Mapping[str, Any]]  # of the parameters of each tool declared, in NFC
    tolerance: float

    @property
    def answers(self) -> Sequence[str]:
        return self.gold.get("answers") or [self.gold["content"]]

    @property
    def any_call(self) -> bool:
        return self.gold.get("any_call", False)


def score_decision(
    reading: Reading, gold: Gold, tools: Sequence[Mapping[str, Any]], *, answer_tolerance: float = 0.0
) -> Score:
    """Score one decision point.

    Args:
        tools: the OpenAI declarations offered ([]: none declared, so nothing can be hallucinated).
        answer_tolerance: how far a number of an answer may be off, as a share of it.
    """
    answers = gold.get("answers") or [gold["content"]]
    if reading.as_text and is_one_of(reading.content, answers):
        reading = reading.as_text  # gold's own words are no attempt, whatever they look like
    schemas = {tool["function"]["name"]: nfc(tool["function"].get("parameters") or {}) for tool in tools}
    point = _Point(reading, gold, schemas, answer_tolerance)
    strict = Comparison(gold["calls"], reading.calls, schemas, strict_faults)
    pairs = match_calls(strict)
    others = match_other_tools(strict, pairs)
    counted = _count(point, strict, pairs)
    errors = _errors(point, strict, pairs, others)
    failure = "" if counted.right else _failure(counted, reading, errors)
    return {
        "status": reading.status,
        "right": counted.right,
        "failure": failure,
        "match": [list(pair) for pair in pairs],
        "errors": errors,
        "confusion": _confusion(point, [*pairs, *others]),
        "ratios": ratios(DECISION_METRICS, counted),
        "bfcl": _score_by_bfcl(point),
    }


def _score_by_bfcl(point: _Point) -> RuleScore:
    """The score by BFCL's rule: an output that cannot be read as a whole has no calls, and that abstains."""
    comparison = Comparison(point.gold["calls"], point.reading.calls, point.schemas, bfcl_faults)
    calls = bool(point.reading.calls) and point.reading.status == "ok"
    counted = _count(point, comparison, match_calls(comparison), attempted=calls, abstains=not calls)
    if point.any_call:
        counted = replace(counted, not_offered=0)  # is as good
    return {"right": counted.right, "ratios": ratios(BFCL_METRICS, counted)}


def _count(
    point: _Point,
    comparison: Comparison,
    pairs: Sequence[Pair],
    *,
    attempted: bool | None = None,
    abstains: bool | None = None,
) -> DecisionCounts:
    """What there is to count at one decision point; `pairs` as `match_calls` returns them.

    Arguments are counted in matched calls only, and a schema is looked at only where the model called a declared tool.
    """
    reading, gold = point.reading, point.gold
    judged_pairs = [] if gold["is_outline"] else pairs
    offered = [call for call in reading.calls if call.name in point.schemas]
    fits = [fits_schema(nfc(call.arguments), dict(point.schemas[call.name])) for call in offered]
    says = reading.status == "no_call" and _says_something(reading.content)
    return DecisionCounts(
        readable=reading.status in ("ok", "no_call"),
        attempted=reading.attempted if attempted is None else attempted,
        abstains=says if abstains is None else abstains,
        same_text=says and is_one_of(reading.content, point.answers),
        says_answer=says and says_one_of(reading.content, point.answers, point.tolerance),
        has_answer=bool(gold.get("answers")) or not gold["is_outline"],
        gold_calls=len(gold["calls"]),
        calls=len(reading.calls),
        matched=len(pairs),
        exact=sum(not comparison.faults(*pair) for pair in pairs),
        gold_arguments=sum(comparison.num_wanted(*pair) for pair in judged_pairs),
        arguments=sum(comparison.num_given(*pair) for pair in judged_pairs),
        right_arguments=sum(comparison.num_right(*pair) for pair in judged_pairs),
        offered_any=bool(point.schemas),
        not_offered=len(reading.calls) - len(offered),
        judged=len(fits) - fits.count(None),
        fitting=fits.count(True),
        is_outline=gold["is_outline"],
        any_call=point.any_call,
    )


def _errors(point: _Point, comparison: Comparison, pairs: Sequence[Pair], others: Sequence[Pair]) -> list[Error]:
    """All that is wrong with the calls. Where any call is right, a tool that was not offered alone is wrong."""
    gold, calls = point.gold["calls"], point.reading.calls
    errors: list[Error] = []
    for number, predicted in pairs if not point.gold["is_outline"] else ():
        for fault in comparison.faults(number, predicted):
            error: Error = {"kind": fault.kind, "call": number, "predicted": predicted, "parameter": fault.parameter}
            if fault.expected:
                error["expected"] = list(fault.expected)
            if fault.got:
                error["got"] = fault.got[0]
            errors.append(error)
    answered = dict([*pairs, *others])
    for number, predicted in others:
        kind = "wrong_tool" if _is_offered(point, predicted) else "not_offered"
        names = {"expected": gold[number]["name"], "got": calls[predicted].name}
        errors.append({"kind": kind, "call": number, "predicted": predicted, **names})  # type: ignore[typeddict-item]
    for number, call in enumerate(gold):
        if number not in answered:
            errors.append({"kind": "missing_call", "call": number, "expected": call["name"]})
    for predicted, read in enumerate(calls):
        is_spare = predicted not in answered.values()
        if is_spare and not _is_offered(point, predicted):
            errors.append({"kind": "not_offered", "predicted": predicted, "got": read.name})
        elif is_spare and not point.any_call:
            errors.append({"kind": "extra_call", "predicted": predicted, "got": read.name})
    return errors


def _is_offered(point: _Point, predicted: int) -> bool:
    """Whether a call is of a declared tool. Where none is declared, all are."""
    return not point.schemas or point.reading.calls[predicted].name in point.schemas


def _failure(counted: DecisionCounts, reading: Reading, errors: Sequence[Error]) -> str:
    """Why a point is wrong, in one word of FAILURES."""
    if not counted.readable:
        return reading.status
    if not counted.wants_call:
        return "unwanted_call" if counted.attempted else "silent"
    if not counted.attempted:
        return "no_call" if _says_something(reading.content) else "silent"
    kinds = {error["kind"] for error in errors}
    return next(kind for kind in FAILURES if kind in kinds)


def _confusion(point: _Point, pairs: Sequence[Pair]) -> list[list[str]]:
    """The [gold, predicted] tool of each call of either side; of a point without any, that neither calls."""
    gold, calls = [call["name"] for call in point.gold["calls"]], [call.name for call in point.reading.calls]
    seen = [name if _is_offered(point, number) else NOT_OFFERED for number, name in enumerate(calls)]
    partner = dict(pairs)
    is_readable = point.reading.status in ("ok", "no_call")
    nothing = NO_CALL if is_readable else MALFORMED
    rows = [[name, seen[partner[number]] if number in partner else nothing] for number, name in enumerate(gold)]
    spare = [number for number in range(len(calls)) if number not in partner.values()]
    rows += [[NO_CALL, seen[number]] for number in spare]
    return sorted(rows) or [[NO_CALL, nothing]]


def _says_something(text: str) -> bool:
    """Whether anything shows: blanks, control and format characters (a zero-width space), tokens without a meaning and
    bytes that are no text do not."""
    categories = map(unicodedata.category, _NOTHING.sub("", text))  # "Lu", "Nd" …: C are control, Z separators
    return any(category[0] not in "CZ" for category in categories)


def fits_schema(arguments: Mapping[str, Any], schema: dict[str, Any]) -> bool | None:
    """Whether the arguments fit the tool's JSON Schema, as training data has to; None where that cannot be told."""
    try:
        return find_misfit(arguments, schema) is None
    except DataError:
        return None
