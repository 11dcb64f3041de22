"""Score a reading against the gold turn: plain data in, numerators and denominators out.

The unit is the decision point: one assistant turn with gold history before it. `score_sample` scores one, `counts`
makes it addable over samples and ranks, `metrics` divides once at the end. Every metric is a ratio of two sums, so the
order of samples and their split over ranks change nothing; where there was nothing to judge the value is None.

A malformed or truncated call is an attempt, and wrong. To abstain is to answer: an output that says nothing attempts no
call and is not right either, or a model that has fallen silent would be right at every point without a call. Values are
compared strictly (`same_value`).
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemma_dist.data.schema import find_misfit
from gemma_dist.errors import DataError
from gemma_dist.evaluate.read import Call, Reading

# What each metric divides. "Calls" alone means calls that could be read; "points" means decision points.
METRICS = {
    "parse_ok": "points neither malformed nor truncated / points",
    "call_accuracy": "points where gold and output both call or both do not / points",
    "call_precision": "gold calls too / the output attempts a call",
    "call_recall": "the output attempts a call too / gold calls",
    "call_f1": "harmonic mean of call_precision and call_recall",
    "abstain_acc": "readable text, not empty, without an attempt / gold has no call",
    "relevance_acc": "the output attempts a call / gold has calls",
    "tool_set_exact": "the same names as often / gold has calls",
    "tool_precision": "called names that gold calls too / predicted calls",
    "tool_recall": "gold names that were called / gold calls",
    "tool_f1": "harmonic mean of tool_precision and tool_recall",
    "hallucinated_tool": "calls of a tool that was not offered / predicted calls, where tools are declared",
    "schema_valid": "calls that fit the tool's schema / predicted calls of offered tools with a usable schema",
    "arg_precision": "right arguments / arguments of predicted calls that are matched",
    "arg_recall": "right arguments / arguments of gold calls that are matched",
    "arg_f1": "harmonic mean of arg_precision and arg_recall",
    "call_exact": "gold calls with a partner of the same name and arguments / gold calls",
    "sample_exact": "every call exact, none too many, status ok / gold has calls",
    "parallel_exact": "sample_exact / gold has two or more calls",
    "count_match": "as many calls as gold / gold has two or more calls",
    "answer_exact": "readable text equal to gold's / gold has no call",
    "overall": "sample_exact where gold calls, abstain_acc elsewhere / points",
    "trajectory_exact": "trajectories with every point right (overall) / trajectories",
}
# Ratios that are not a share of trials have no Wilson interval.
_NOT_SHARES = {"call_f1", "tool_f1", "arg_f1"}
_NOTHING = re.compile(r"<(?:unused\d+|unk|mask)>|\ufffd")


def score_sample(
    reading: Reading, gold_calls: Sequence[Mapping[str, Any]], gold_text: str, tools: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Score one decision point, as it goes into samples.jsonl.

    `gold_calls` are {"name", "arguments"}, `tools` the OpenAI declarations offered ([]: none declared, so nothing can
    be hallucinated). Returns status, right (what `overall` counts), match ([gold, predicted] pairs by index) and
    ratios (metric -> [numerator, denominator]; metrics with nothing to judge here are absent).
    """
    if reading.as_text and same_value(reading.content, gold_text):
        reading = reading.as_text  # gold's own words are no attempt, whatever they look like
    calls = reading.calls
    pairs = match_calls(gold_calls, calls)
    exact = sum(same_value(gold_calls[g]["arguments"], calls[p].arguments) for g, p in pairs)
    gold_has, clean = bool(gold_calls), reading.status in ("ok", "no_call")
    sample_exact = gold_has and clean and exact == len(gold_calls) == len(calls)
    abstains = reading.status == "no_call" and _says_something(reading.content)
    right = sample_exact if gold_has else abstains

    right_arguments = sum(_overlap(gold_calls[g]["arguments"], calls[p].arguments) for g, p in pairs)
    gold_arguments = sum(len(gold_calls[g]["arguments"]) for g, _ in pairs)
    predicted_arguments = sum(len(calls[p].arguments) for _, p in pairs)
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    fits = [
        fit
        for call in calls
        if call.name in schemas and (fit := fits_schema(_nfc(call.arguments), _nfc(schemas[call.name]))) is not None
    ]

    ratios = {
        "parse_ok": (clean, 1),
        "call_accuracy": (gold_has == reading.attempted, 1),
        "call_precision": (gold_has and reading.attempted, reading.attempted),
        "call_recall": (gold_has and reading.attempted, gold_has),
        "call_f1": (2 * (gold_has and reading.attempted), gold_has + reading.attempted),
        "abstain_acc": (not gold_has and abstains, not gold_has),
        "relevance_acc": (gold_has and reading.attempted, gold_has),
        "tool_set_exact": (gold_has and clean and len(pairs) == len(gold_calls) == len(calls), gold_has),
        "tool_precision": (len(pairs), len(calls)),
        "tool_recall": (len(pairs), len(gold_calls)),
        "tool_f1": (2 * len(pairs), len(gold_calls) + len(calls)),
        "hallucinated_tool": (sum(call.name not in schemas for call in calls), len(calls)) if tools else (0, 0),
        "schema_valid": (sum(fits), len(fits)),
        "arg_precision": (right_arguments, predicted_arguments),
        "arg_recall": (right_arguments, gold_arguments),
        "arg_f1": (2 * right_arguments, gold_arguments + predicted_arguments),
        "call_exact": (exact, len(gold_calls)),
        "sample_exact": (sample_exact, gold_has),
        "parallel_exact": (sample_exact and len(gold_calls) > 1, len(gold_calls) > 1),
        "count_match": (clean and len(gold_calls) == len(calls) > 1, len(gold_calls) > 1),
        "answer_exact": (not gold_has and abstains and same_value(reading.content, gold_text), not gold_has),
        "overall": (right, 1),
    }
    return {
        "status": reading.status,
        "right": right,
        "match": [list(pair) for pair in pairs],
        "ratios": {name: [int(n), int(d)] for name, (n, d) in ratios.items() if d},
    }


def counts(score: Mapping[str, Any]) -> dict[str, int]:
    """Numerators and denominators of one score under flat names, to be added over samples and ranks."""
    return {
        f"{name}.{part}": value
        for name, ratio in score["ratios"].items()
        for part, value in zip(("numerator", "denominator"), ratio, strict=True)
    }


def trajectory_counts(scores: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The counts of one trajectory from the scores of all its decision points."""
    return {
        "trajectory_exact.numerator": int(all(score["right"] for score in scores)),
        "trajectory_exact.denominator": 1,
    }


def metrics(totals: Mapping[str, int]) -> dict[str, dict[str, float | int | None]]:
    """Divide the summed counts: name -> value, numerator, denominator and, for shares, a 95 % Wilson interval (low,
    high), which takes decision points as independent although those of one trajectory are not. All None at 0 / 0."""
    report = {}
    for name in METRICS:
        n, d = totals.get(f"{name}.numerator", 0), totals.get(f"{name}.denominator", 0)
        low, high = wilson(n, d) if d and name not in _NOT_SHARES else (None, None)
        report[name] = {"value": n / d if d else None, "numerator": n, "denominator": d, "low": low, "high": high}
    return report


def call_decision(totals: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """The two by two table of decision points: {gold: {output: points}} with "call" and "none" on both sides."""
    both, points = totals.get("call_recall.numerator", 0), totals.get("overall.denominator", 0)
    gold, attempted = totals.get("call_recall.denominator", 0), totals.get("call_precision.denominator", 0)
    return {
        "call": {"call": both, "none": gold - both},
        "none": {"call": attempted - both, "none": points - gold - attempted + both},
    }


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927)."""
    z = 1.959964
    share, weight = successes / trials, z * z / trials
    middle = share + weight / 2
    half = z * math.sqrt((share * (1 - share) + weight / 4) / trials)
    return max(0.0, (middle - half) / (1 + weight)), min(1.0, (middle + half) / (1 + weight))


def same_value(first: Any, second: Any) -> bool:
    """Equal as JSON: types must agree, numbers by value (5 equals 5.0), true is not 1, keys after NFC, text after NFC
    and trimming."""
    return _same(_nfc(first), _nfc(second))


def _same(first: Any, second: Any) -> bool:
    """`same_value` of values in NFC."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, (int, float)) and isinstance(second, (int, float)):
        return first == second
    if isinstance(first, str) and isinstance(second, str):
        return first.strip() == second.strip()
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return first is None and second is None


def _nfc(value: Any) -> Any:
    """A JSON value, its texts and keys in Unicode's NFC. Keys that would become one stay as they are."""
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
    return any(unicodedata.category(character)[0] not in "CZ" for character in _NOTHING.sub("", text))


def fits_schema(arguments: Mapping[str, Any], schema: dict[str, Any]) -> bool | None:
    """Whether the arguments fit the tool's JSON Schema, as training data has to; None where that cannot be told."""
    try:
        return find_misfit(arguments, schema) is None
    except DataError:
        return None


def match_calls(gold: Sequence[Mapping[str, Any]], predicted: Sequence[Call]) -> list[tuple[int, int]]:
    """Pair calls of the same name, one to one and without order, as (gold, predicted) indices.

    Of all pairings one with the most exact pairs, then the most pairs, then the most right arguments, then the fewest
    other arguments, so that the order of calls changes no metric.
    """

    arguments = sum(len(call["arguments"]) for call in gold) + sum(len(call.arguments) for call in predicted)
    base = 2 + len(gold) + arguments  # worth is a number of three digits: no sum of a lower digit reaches a higher one

    def worth(want: Mapping[str, Any], have: Call) -> int:
        if want["name"] != have.name:
            return 0
        exact = same_value(want["arguments"], have.arguments)
        others = len(want["arguments"]) + len(have.arguments)
        return ((exact * base + 1) * base + _overlap(want["arguments"], have.arguments)) * base - others

    pairs = assign([[worth(want, have) for have in predicted] for want in gold])
    return [(g, p) for g, p in pairs if gold[g]["name"] == predicted[p].name]


def _overlap(want: Mapping[str, Any], have: Mapping[str, Any]) -> int:
    want, have = _nfc(want), _nfc(have)
    return sum(name in have and _same(value, have[name]) for name, value in want.items())


def assign(worth: list[list[int]]) -> list[tuple[int, int]]:
    """The (row, column) pairs, as many as there are rows or columns, whose worth adds up to the most.

    The Hungarian method with potentials: one row after the other enters along a shortest augmenting path.
    Time rows^2 x columns for the shorter side as rows.
    """
    if not worth or not worth[0]:
        return []
    if len(worth) > len(worth[0]):
        return sorted((row, column) for column, row in assign([list(column) for column in zip(*worth, strict=True)]))
    num_columns = len(worth[0])
    row_potential = [0] * len(worth)
    column_potential = [0] * (num_columns + 1)
    row_of: list[int | None] = [None] * (num_columns + 1)  # the last column is where a path starts
    for new_row in range(len(worth)):
        column, row_of[-1] = num_columns, new_row
        slack: dict[int, float] = dict.fromkeys(range(num_columns), math.inf)  # columns that the path has not reached
        before = [num_columns] * num_columns
        reached = [num_columns]
        while (row := row_of[column]) is not None:
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
        while column != num_columns:
            row_of[column], column = row_of[before[column]], before[column]
    return sorted((row, column) for column, row in enumerate(row_of[:-1]) if row is not None)
