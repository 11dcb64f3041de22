"""The scorer: perfect on gold, zero on each single fault, optimal in matching, and deaf to order and ranks."""

import random
from collections import Counter
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_dist.data.read import Reading, read_output
from gemma_dist.data.schema import check_calls
from gemma_dist.errors import DataError
from gemma_dist.evaluate.matching import Comparison, assign, match_calls
from gemma_dist.evaluate.metrics import METRICS, divide, flat_counts
from gemma_dist.evaluate.score import GoldCall, Score, fits_schema, score_decision
from gemma_dist.evaluate.values import same_value, strict_faults
from tests.support.scoring import expecting, reading


def tool(name: str, **properties: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


FAULTS = {metric.name for metric in METRICS if metric.is_fault}
TOOLS = [tool("f", a="integer", b="string"), tool("g", a="number")]
F, F2 = (GoldCall(name="f", arguments={"a": n, "b": "x"}) for n in (1, 2))
G = GoldCall(name="g", arguments={"a": 0.5})


def values(score: Score) -> dict[str, float]:
    return {name: n / d for name, (n, d) in score["ratios"].items()}


def test_gold_scores_perfectly_against_itself_in_any_order() -> None:
    gold = [F, F2, G]
    for order in permutations(gold):
        score = score_decision(reading(*order), expecting(gold, ""), TOOLS)
        assert score["right"]
        assert all(value == (name not in FAULTS) for name, value in values(score).items())
    score = score_decision(reading(content=" cafe\u0301\n"), expecting([], "café"), TOOLS)
    assert score["right"]
    assert all(value == (name not in FAULTS) for name, value in values(score).items())
    assert {"abstain_acc", "answer_exact"} <= score["ratios"].keys()


BROKEN = reading(status="malformed", attempted=True)


@pytest.mark.parametrize(
    ("output", "gold", "expected"),
    [
        (
            reading(),
            [F],
            {"call_accuracy": 0, "relevance_acc": 0, "tool_recall": 0, "call_exact": 0, "overall": 0, "parse_ok": 1},
        ),
        (
            reading(F),
            [],
            {"call_accuracy": 0, "abstain_acc": 0, "answer_exact": 0, "tool_precision": 0, "schema_valid": 1},
        ),
        (BROKEN, [F], {"call_accuracy": 1, "relevance_acc": 1, "parse_ok": 0, "sample_exact": 0, "tool_set_exact": 0}),
        (BROKEN, [], {"call_accuracy": 0, "abstain_acc": 0, "answer_exact": 0, "parse_ok": 0, "overall": 0}),
        (reading(F, status="malformed"), [F], {"call_exact": 1, "sample_exact": 0, "parse_ok": 0, "overall": 0}),
        (reading(F, status="truncated"), [F], {"call_exact": 1, "sample_exact": 0, "parse_ok": 0, "overall": 0}),
        (
            reading(content="Hi", status="truncated", attempted=False),
            [],
            {"call_accuracy": 1, "abstain_acc": 0, "overall": 0},
        ),
        (
            reading(F2),
            [F],
            {"tool_set_exact": 1, "call_exact": 0, "arg_precision": 0.5, "arg_recall": 0.5, "schema_valid": 1},
        ),
        (
            reading({"name": "f", "arguments": {"a": 1}}),
            [F],
            {"arg_precision": 1, "arg_recall": 0.5, "schema_valid": 0},
        ),
        (
            reading({"name": "f", "arguments": {"a": 1, "b": "x", "c": 1}}),
            [F],
            {"arg_precision": 2 / 3, "arg_recall": 1, "arg_f1": 0.8, "schema_valid": 0, "sample_exact": 0},
        ),
        (reading({"name": "f", "arguments": {"a": "1", "b": "x"}}), [F], {"call_exact": 0, "schema_valid": 0}),
        (reading({"name": "f", "arguments": {"a": True, "b": "x"}}), [F], {"call_exact": 0, "schema_valid": 0}),
        (reading({"name": "f", "arguments": {"a": 1.0, "b": " x "}}), [F], {"call_exact": 1, "sample_exact": 1}),
        (reading({"name": "h", "arguments": {}}), [F], {"hallucinated_tool": 1, "tool_set_exact": 0, "tool_recall": 0}),
        (
            reading(F, F),
            [F],
            {"call_exact": 1, "sample_exact": 0, "tool_precision": 0.5, "tool_f1": 2 / 3, "tool_set_exact": 0},
        ),
        (reading(F), [F, F2], {"call_exact": 0.5, "count_match": 0, "parallel_exact": 0, "tool_recall": 0.5}),
        (reading(F, F), [F, F2], {"call_exact": 0.5, "count_match": 1, "parallel_exact": 0, "tool_set_exact": 1}),
        (reading(G, F), [F, G], {"parallel_exact": 1, "count_match": 1, "overall": 1, "hallucinated_tool": 0}),
    ],
)
def test_each_fault_is_counted_where_it_belongs(output: Reading, gold: list[Any], expected: dict[str, float]) -> None:
    found = values(score_decision(output, expecting(gold, ""), TOOLS))
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("gold_text", ["It is 20 degrees.", ""])
@pytest.mark.parametrize(
    "output",
    [
        "",
        "<turn|>",
        " \n\t<turn|>\n",
        "<|channel>thought\nNothing to do.<channel|><turn|>",
        "<|channel>thought\nNothing to do.<turn|>",
        "<|image|><pad><eos>",
        "\u200b\ufeff\x00<turn|>",
        "<unused0><unused0><turn|>",
        "\ufffd\ufffd<turn|>",
        "<unused12> \ufffd\n<mask><unk><eos>",
    ],
    ids=ascii,
)
def test_silence_is_no_answer(output: str, gold_text: str) -> None:
    """It is no attempt either: the reader has nothing to complain of, the scorer has."""
    score = score_decision(read_output(output), expecting([], gold_text), TOOLS)
    expected = {"abstain_acc": 0, "answer_exact": 0, "overall": 0, "parse_ok": 1, "call_accuracy": 1}
    assert {name: values(score)[name] for name in expected} == expected
    assert not score["right"]


@pytest.mark.parametrize(
    "output",
    [
        "It is 20 degrees.<|tool_response>",
        "<|tool_response>",
        "<|channel>thought\nHm.<|tool_response>",
        "<|tool_response>response:f{value:20}<tool_response|>It is 20 degrees.<turn|>",
        '{"name": "f", "arguments": {"a": 1, "b": "x"}}<turn|>',
        "```tool_code\nprint(f(a=1, b='x'))\n```<turn|>",
    ],
)
def test_an_attempt_that_cannot_be_read_is_right_nowhere(output: str) -> None:
    expected = {"parse_ok": 0, "overall": 0}
    for gold, call_accuracy in (([], 0), ([F], 1)):
        found = values(score_decision(read_output(output), expecting(gold, "It is 20 degrees."), TOOLS))
        assert {name: found[name] for name in expected} == expected
        assert found["call_accuracy"] == call_accuracy


def test_an_answer_behind_a_tool_of_the_output_itself_counts_as_ever() -> None:
    reading = read_output("<|tool_call>call:g{a:0.5}<tool_call|><|tool_response>response:g{}<tool_response|>So.")
    assert score_decision(reading, expecting([G], ""), TOOLS)["right"]


def test_keys_are_compared_in_nfc() -> None:
    """As values are, in the schema too: a call that is exact is one that fits where gold fits."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"

    def arguments(text: str) -> GoldCall:
        return {"name": "f", "arguments": {text: {text: [text]}}}

    parameters = {
        "type": "object",
        "properties": {decomposed: {"properties": {decomposed: {"items": {"enum": [decomposed]}}}}},
        "required": [decomposed],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": parameters}}]
    score = score_decision(reading(arguments(composed)), expecting([arguments(decomposed)]), tools)
    assert score["right"]
    assert set(values(score).values()) - {0.0} == {1.0}
    assert values(score)["hallucinated_tool"] == 0


def test_what_cannot_be_judged_is_absent_and_null() -> None:
    undeclared = score_decision(reading(F), expecting([F], ""), [])
    assert not {"hallucinated_tool", "schema_valid", "abstain_acc", "parallel_exact"} & undeclared["ratios"].keys()
    report = divide(flat_counts(undeclared["ratios"]))
    assert list(report) == [metric.name for metric in METRICS]
    assert report["abstain_acc"] == dict.fromkeys(report["abstain_acc"]) | {"numerator": 0, "denominator": 0}
    assert set(divide({})["overall"].values()) == {None, 0}


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (5, 5.0, True),
        (1, True, False),
        (0, False, False),
        (True, True, True),
        ("5", 5, False),
        (10**30, 10**30 + 1, False),
        (None, False, False),
        (None, "null", False),
        ("e\u0301 ", "é", True),
        ("a", "A", False),
        ("10.5", "105", False),
        ([1, 2], [2, 1], False),
        ([1, [2.0]], [1, [2]], True),
        ({"a": 1, "b": [True]}, {"b": [True], "a": 1.0}, True),
        ({"a": None}, {}, False),
        ({"e\u0301": [{"e\u0301": 1}]}, {"\u00e9": [{"\u00e9": 1}]}, True),
        ({"e\u0301": 1, "\u00e9": 2}, {"\u00e9": 2, "e\u0301": 1}, True),  # two keys are two keys
        ({"e\u0301": 1, "\u00e9": 2}, {"\u00e9": 1, "e\u0301": 2}, False),
        ({"e\u0301": 1, "\u00e9": 1}, {"\u00e9": 1}, False),
        ({"a ": 1}, {"a": 1}, False),
        ({}, [], False),
    ],
)
def test_values_are_compared_strictly(first: Any, second: Any, same: bool) -> None:
    assert same_value(first, second) is same
    assert same_value(second, first) is same


def test_schemas() -> None:
    assert fits_schema({"a": 1}, {}) is True
    assert fits_schema({"a": 1}, {"type": "strange"}) is None
    assert fits_schema({"a": "x"}, {"properties": {"a": {"pattern": "("}}}) is None
    assert fits_schema({"a": 10**400}, {"properties": {"a": {"multipleOf": 0.1}}}) is None
    remote = {"properties": {"a": {"$ref": "https://example.invalid/schema.json"}}}
    assert fits_schema({"a": 1}, remote) is None
    nested: dict[str, Any] = {}
    for _ in range(62):
        nested = {"a": nested}
    assert fits_schema(nested, {"type": "object", "additionalProperties": {"$ref": "#"}}) is True


@pytest.mark.parametrize("draft", [{}, {"$schema": "http://json-schema.org/draft-07/schema#"}], ids=["2020", "draft-7"])
@pytest.mark.parametrize("value", [None, 1, 2, "1", True])
@pytest.mark.parametrize(
    "rule",
    [
        {"type": "integer"},
        {"type": "integer", "nullable": True},
        {"type": "integer", "nullable": False},
        {"type": ["integer", "null"]},
        {"enum": [1], "nullable": True},
        {"const": 1, "nullable": True},
        {"anyOf": [{"type": "string"}], "nullable": True},
        {"allOf": [{"type": "string"}], "nullable": True},
        {"$schema": "http://json-schema.org/draft-04/schema#", "type": "string", "nullable": True},
        {"anyOf": [{"type": "string"}, {"type": "integer", "nullable": True}]},
    ],
    ids=str,
)
def test_a_call_is_valid_exactly_where_it_may_be_trained_on(
    rule: dict[str, Any], value: Any, draft: dict[str, Any]
) -> None:
    gold = GoldCall(name="f", arguments={"a": value})
    parameters = {**draft, "type": "object", "properties": {"a": rule}}
    tools: Any = [{"type": "function", "function": {"name": "f", "description": "", "parameters": parameters}}]
    messages: Any = [{"role": "assistant", "tool_calls": [{"function": gold}]}]
    try:
        check_calls(["turn 2"], messages, tools)
        trained = True
    except DataError:
        trained = False
    assert values(score_decision(reading(gold), expecting([gold], ""), tools))["schema_valid"] == trained


@pytest.mark.parametrize("rule", [{"type": "string"}, {"const": 1}, {"anyOf": [{"type": "string"}]}])
def test_null_fits_whatever_is_nullable(rule: dict[str, Any]) -> None:
    for nullable in (True, False):
        schema = {"type": "object", "properties": {"a": rule | {"nullable": nullable}}}
        assert fits_schema({"a": None}, schema) is nullable


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.randoms(use_true_random=False))
def test_assignment_is_optimal(num_rows: int, num_columns: int, random: random.Random) -> None:
    worth = [[random.randint(0, 6) for _ in range(num_columns)] for _ in range(num_rows)]
    pairs = assign(worth)
    assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == len(pairs)
    assert len(pairs) == min(num_rows, num_columns)
    if num_rows <= num_columns:
        orders = [
            [(row, order[row]) for row in range(num_rows)] for order in permutations(range(num_columns), num_rows)
        ]
    else:
        orders = [[(order[c], c) for c in range(num_columns)] for order in permutations(range(num_rows), num_columns)]
    best = max(sum(worth[row][column] for row, column in order) for order in orders)
    assert sum(worth[row][column] for row, column in pairs) == best


CALLS = st.builds(
    lambda name, arguments: {"name": name, "arguments": arguments},
    st.sampled_from("fgh"),
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from([1, 2, True, "x"]), max_size=3),
)
GOLD = st.lists(CALLS, max_size=4)


@settings(max_examples=50, deadline=None)
@given(GOLD, GOLD)
def test_matching_is_optimal(gold: list[Any], predicted: list[Any]) -> None:
    calls = reading(*predicted).calls

    def quality(pairs: list[tuple[int, int]]) -> tuple[int, int, int]:
        named = [(gold[g], calls[p]) for g, p in pairs if gold[g]["name"] == calls[p].name]
        right = [
            sum(same_value(value, have.arguments.get(key)) for key, value in want["arguments"].items())
            for want, have in named
        ]
        return sum(same_value(want["arguments"], have.arguments) for want, have in named), len(named), sum(right)

    slots = range(max(len(gold), len(calls)))
    orders = [
        [(g, p) for g, p in enumerate(order) if g < len(gold) and p < len(calls)] for order in permutations(slots)
    ]
    assert quality(match_calls(Comparison(gold, calls, {}, strict_faults))) == max(map(quality, orders))


@settings(max_examples=50, deadline=None)
@given(GOLD, GOLD, st.randoms(use_true_random=False))
def test_order_of_calls_changes_nothing(gold: list[Any], predicted: list[Any], random: random.Random) -> None:
    ratios = score_decision(reading(*predicted), expecting(gold, ""), TOOLS)["ratios"]
    random.shuffle(gold)
    random.shuffle(predicted)
    assert score_decision(reading(*predicted), expecting(gold, ""), TOOLS)["ratios"] == ratios


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(GOLD, GOLD), max_size=12), st.integers(1, 4), st.randoms(use_true_random=False))
def test_order_of_samples_and_ranks_changes_nothing(
    points: list[tuple[list[Any], list[Any]]], world_size: int, random: random.Random
) -> None:
    scores = [score_decision(reading(*predicted), expecting(gold, ""), TOOLS) for gold, predicted in points]
    total: Counter[str] = Counter()
    for score in scores:
        total.update(flat_counts(score["ratios"]))
    random.shuffle(scores)
    summed: Counter[str] = Counter()
    for rank in range(world_size):
        for score in scores[rank::world_size]:
            summed.update(flat_counts(score["ratios"]))
    assert divide(summed) == divide(total)
    for report in divide(total).values():
        if report["denominator"]:
            assert 0 <= report["numerator"] <= report["denominator"]
