"""Score a reading against the gold turn: plain data in, numerators and denominators out.

The unit is the decision point: one assistant turn with gold history before it. `score_decision` matches its calls with
gold's and counts; what is measured of these counts is the table in `metrics.py`.

A malformed or truncated call is an attempt, and wrong. To abstain is to answer: an output that says nothing attempts no
call and is not right either, or a model that has fallen silent would be right at every point without a call. Values are
compared strictly (`same_value`).
"""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

from gemma_dist.data.read import Call, Reading, Status
from gemma_dist.data.schema import find_misfit
from gemma_dist.errors import DataError
from gemma_dist.evaluate.metrics import DECISION_METRICS, DecisionCounts, Ratios, ratios

_NOTHING = re.compile(r"<(?:unused\d+|unk|mask)>|\ufffd")  # what says nothing to a reader

# JSON's types as Python has them. The first that fits counts: Python's bool is an int as well.
_JSON_TYPES = (
    ("boolean", bool),
    ("number", (int, float)),
    ("string", str),
    ("array", list),
    ("object", Mapping),
    ("null", type(None)),
)


class GoldCall(TypedDict):
    """A call of the gold turn."""

    name: str
    arguments: dict[str, Any]


class Score(TypedDict):
    """The score of one decision point, as it goes into samples.jsonl."""

    status: Status
    right: bool  # what `overall` counts
    match: list[list[int]]  # [gold, predicted] pairs of calls, by index
    ratios: Ratios  # metrics with nothing to judge here are absent


def score_decision(
    reading: Reading,
    gold_calls: Sequence[GoldCall],
    gold_text: str,
    tools: Sequence[Mapping[str, Any]],
    *,
    is_outline: bool = False,
) -> Score:
    """Score one decision point.

    `tools` are the OpenAI declarations offered ([]: none declared, so nothing can be hallucinated). Gold as an outline
    gives the names of calls alone.
    """
    if reading.as_text and same_value(reading.content, gold_text):
        reading = reading.as_text  # gold's own words are no attempt, whatever they look like
    pairs = match_calls(gold_calls, reading.calls)
    counted = _count(reading, gold_calls, gold_text, tools, pairs)
    if is_outline:
        counted = replace(counted, is_outline=True, gold_arguments=0, arguments=0, right_arguments=0)
    return {
        "status": reading.status,
        "right": counted.right,
        "match": [list(pair) for pair in pairs],
        "ratios": ratios(DECISION_METRICS, counted),
    }


def _count(
    reading: Reading,
    gold_calls: Sequence[GoldCall],
    gold_text: str,
    tools: Sequence[Mapping[str, Any]],
    pairs: Sequence[tuple[int, int]],
) -> DecisionCounts:
    """What there is to count at one decision point; `pairs` as `match_calls` returns them.

    Arguments are counted in matched calls only, and a schema is looked at only where the model called a declared tool.
    """
    exact = gold_arguments = arguments = right_arguments = 0
    for gold, predicted in pairs:
        want, have = gold_calls[gold]["arguments"], reading.calls[predicted].arguments
        exact += same_value(want, have)
        gold_arguments += len(want)
        arguments += len(have)
        right_arguments += _overlap(want, have)

    schemas = {}
    for tool in tools:
        declaration = tool["function"]
        schemas[declaration["name"]] = declaration.get("parameters") or {}
    offered = [call for call in reading.calls if call.name in schemas]
    fits = [fits_schema(_nfc(call.arguments), _nfc(schemas[call.name])) for call in offered]
    return DecisionCounts(
        readable=reading.status in ("ok", "no_call"),
        attempted=reading.attempted,
        abstains=reading.status == "no_call" and _says_something(reading.content),
        same_text=same_value(reading.content, gold_text),
        gold_calls=len(gold_calls),
        calls=len(reading.calls),
        matched=len(pairs),
        exact=exact,
        gold_arguments=gold_arguments,
        arguments=arguments,
        right_arguments=right_arguments,
        offered_any=bool(tools),
        not_offered=len(reading.calls) - len(offered),
        judged=len(fits) - fits.count(None),
        fitting=fits.count(True),
    )


def same_value(first: Any, second: Any) -> bool:
    """Equal as JSON: types must agree, numbers by value (5 equals 5.0), true is not 1, keys after NFC, strings after
    NFC and trimming."""
    return _same(_nfc(first), _nfc(second))


def _same(first: Any, second: Any) -> bool:
    """`same_value` of values in NFC."""
    kind = _json_type(first)
    if kind != _json_type(second):
        return False
    if kind == "string":
        return first.strip() == second.strip()
    if kind == "array":
        return len(first) == len(second) and all(map(_same, first, second))
    if kind == "object":
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return first == second


def _json_type(value: Any) -> str:
    """JSON's name for the type of a value: `true` is a "boolean", 5 and 5.0 are a "number"."""
    return next(name for name, types in _JSON_TYPES if isinstance(value, types))


def _nfc(value: Any) -> Any:
    """A JSON value, its strings and keys in Unicode's NFC. Keys that would become one stay as they are."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, list):
        return [_nfc(item) for item in value]
    if isinstance(value, Mapping):
        keys = [_nfc(key) for key in value]
        if len(set(keys)) < len(keys):
            keys = list(value)
        return dict(zip(keys, map(_nfc, value.values()), strict=True))
    return value


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


def match_calls(gold: Sequence[GoldCall], predicted: Sequence[Call]) -> list[tuple[int, int]]:
    """Pair calls of the same name, one to one and without order, as (gold, predicted) indices.

    Of all pairings one with the most exact pairs, then the most pairs, then the most right arguments, then the fewest
    other arguments, so that the order of calls changes no metric.
    """
    # `assign` adds plain integers, so what counts first stands in a higher digit: of a base that no sum over all pairs
    # of a lower digit reaches.
    num_arguments = sum(len(call["arguments"]) for call in gold) + sum(len(call.arguments) for call in predicted)
    base = 2 + len(gold) + num_arguments

    def worth(want: GoldCall, have: Call) -> int:
        """What a pair adds: 0 for calls of different names, and always less than a pair of the same name."""
        if want["name"] != have.name:
            return 0
        exact = same_value(want["arguments"], have.arguments)
        right = _overlap(want["arguments"], have.arguments)
        others = len(want["arguments"]) + len(have.arguments)
        return exact * base**3 + base**2 + right * base - others

    pairs = assign([[worth(want, have) for have in predicted] for want in gold])
    return [(g, p) for g, p in pairs if gold[g]["name"] == predicted[p].name]


def _overlap(want: Mapping[str, Any], have: Mapping[str, Any]) -> int:
    """How many arguments of `want` are in `have` with the same value (`same_value`)."""
    want, have = _nfc(want), _nfc(have)
    return sum(name in have and _same(value, have[name]) for name, value in want.items())


def assign(worth: list[list[int]]) -> list[tuple[int, int]]:
    """The (row, column) pairs, as many as there are rows or columns, whose worth adds up to the most.

    The Hungarian method with potentials. Rows enter one after the other. A new row takes the column where it costs
    least (cost = -worth, less the potentials of row and column), whose former row takes another, and so on to a column
    that was free: the cheapest such path, searched as Dijkstra does. The potentials keep all costs of rows that have
    entered at 0 or above, and at 0 in the pairs made so far: each search goes on from what the earlier ones found out.
    Time rows^2 x columns for the shorter side as rows.
    """
    if not worth or not worth[0]:
        return []
    num_columns = len(worth[0])
    if len(worth) > num_columns:
        transposed = [list(column) for column in zip(*worth, strict=True)]
        return sorted((row, column) for column, row in assign(transposed))
    row_potential = [0] * len(worth)
    column_potential = [0] * (num_columns + 1)
    row_of: list[int | None] = [None] * (num_columns + 1)  # the last column is where a path starts
    for new_row in range(len(worth)):
        column, row_of[-1] = num_columns, new_row
        slack: dict[int, float] = dict.fromkeys(range(num_columns), math.inf)  # cost of each column not yet reached
        before = [num_columns] * num_columns  # from which column each one is reached
        reached = [num_columns]
        while (row := row_of[column]) is not None:  # until a free column is reached
            for free in slack:
                cost = -worth[row][free] - row_potential[row] - column_potential[free]
                if cost < slack[free]:
                    slack[free], before[free] = cost, column
            column = min(slack, key=slack.__getitem__)
            step = int(slack.pop(column))
            for done in reached:
                column_potential[done] -= step
                row_potential[row_of[done] or 0] += step
            slack = {free: cost - step for free, cost in slack.items()}
            reached.append(column)
        while column != num_columns:  # back along the path: each column takes the row of the one before
            row_of[column], column = row_of[before[column]], before[column]
    return sorted((row, column) for column, row in enumerate(row_of[:-1]) if row is not None)
