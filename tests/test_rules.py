"""The rules: which values of arguments are right by ours and by BFCL's, what is wrong with the others, and answers."""

import random
from typing import Any

import pytest

from gemma_dist.data.read import Reading
from gemma_dist.evaluate.answers import says_one_of
from gemma_dist.evaluate.score import GoldCall, Score, score_decision
from tests.support.scoring import expecting, reading

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "at": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "spot": {"type": "object"},
        "stops": {"type": "array", "items": {"type": "object"}},
        "note": {},
    },
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("f", "g")]


def call(name: str = "f", **arguments: Any) -> GoldCall:
    return {"name": name, "arguments": arguments}


def scored(gold: GoldCall, *calls: GoldCall) -> Score:
    return score_decision(reading(*calls), expecting([gold]), TOOLS)


@pytest.mark.parametrize(
    ("acceptable", "arguments", "strict", "bfcl"),
    [
        ({"city": ["Rome", "Roma"]}, {"city": "Roma"}, True, True),
        ({"city": ["Rome"]}, {"city": "rome."}, False, True),
        ({"city": ["Rome"]}, {"city": " Rome "}, True, True),
        ({"city": ["10.5"]}, {"city": "105"}, False, True),
        ({"city": ["-5"]}, {"city": "5"}, False, True),
        ({"city": ["it's"]}, {"city": 'it"s'}, False, True),
        ({"city": ["Rome"]}, {"city": "Oslo"}, False, False),
        ({"city": ["Rome"], "days": [3, ""]}, {"city": "Rome"}, True, True),
        ({"city": ["Rome"], "days": [3, ""]}, {"city": "Rome", "days": 3}, True, True),
        ({"city": ["Rome"], "days": [3, ""]}, {"city": "Rome", "days": 4}, False, False),
        ({"city": ["Rome"], "days": [3]}, {"city": "Rome"}, False, False),
        ({"city": ["Rome", ""]}, {}, True, False),  # the schema requires it, which BFCL asks first
        ({"city": ["Rome"], "days": [3]}, {"city": "Rome", "days": 3.0}, True, False),
        ({"city": ["Rome"], "days": [1]}, {"city": "Rome", "days": True}, False, False),
        ({"city": ["Rome"], "at": [5.0]}, {"city": "Rome", "at": 5}, True, True),
        ({"city": ["Rome"], "days": ["n"]}, {"city": "Rome", "days": "n"}, True, True),  # a variable
        ({"city": ["Rome"], "days": ["n"]}, {"city": "Rome", "days": "N"}, False, False),
        ({"city": ["Rome"], "tags": [["a", "b"]]}, {"city": "Rome", "tags": ["A", "b"]}, False, True),
        ({"city": ["Rome"], "tags": [["a", "b"]]}, {"city": "Rome", "tags": ["b", "a"]}, False, False),
        ({"city": ["Rome"], "tags": [["a"]]}, {"city": "Rome", "tags": [1]}, False, False),
        ({"city": ["Rome"], "tags": [["a"], ""]}, {"city": "Rome", "tags": []}, False, True),
        ({"city": ["Rome"], "spot": [{"x": [1, 2], "y": [3, ""]}]}, {"city": "Rome", "spot": {"x": 2}}, True, True),
        ({"city": ["Rome"], "spot": [{"x": [1], "y": [3]}]}, {"city": "Rome", "spot": {"x": 1}}, False, False),
        ({"city": ["Rome"], "spot": [{"x": [1]}]}, {"city": "Rome", "spot": {"x": 1, "z": 1}}, False, False),
        ({"city": ["Rome"], "spot": [{"x": ["a"]}]}, {"city": "Rome", "spot": {"x": "A"}}, False, True),
        ({"city": ["Rome"], "spot": [{"x": [{"y": 1}]}]}, {"city": "Rome", "spot": {"x": {"y": 1}}}, True, True),
        ({"city": ["Rome"], "stops": [[{"x": [1, 2]}]]}, {"city": "Rome", "stops": [{"x": 2}]}, True, True),
        ({"city": ["Rome"], "stops": [[{"x": [1]}]]}, {"city": "Rome", "stops": [{"x": 1}, {"x": 1}]}, False, False),
        ({"city": ["Rome"], "days": []}, {"city": "Rome"}, False, False),  # no output can be right
    ],
    ids=str,
)
def test_acceptable_values(acceptable: Any, arguments: Any, strict: bool, bfcl: bool) -> None:
    gold: GoldCall = {"name": "f", "arguments": {}, "acceptable": acceptable}
    score = scored(gold, call(**arguments))
    assert (score["right"], score["bfcl"]["right"]) == (strict, bfcl)
    assert (score["errors"] == []) == strict


@pytest.mark.parametrize("at", [5.5, 3, 10.0**308, [1.5], {"a": 1.5}], ids=str)
@pytest.mark.parametrize("got", [10**400, -(10**400), [10**400], {"a": 10**400}], ids=lambda got: str(got)[:9])
def test_an_integer_that_no_float_holds_is_a_wrong_value(at: Any, got: Any) -> None:
    score = scored(call(city="Rome", at=at), call(city="Rome", at=got))
    assert not score["right"]
    assert not score["bfcl"]["right"]
    assert {error["kind"] for error in score["errors"]} <= {"wrong_value", "wrong_type"}


def test_numbers_that_no_float_holds_are_no_answer_but_their_own() -> None:
    assert not says_one_of("9" * 5000, ["5"], 0.1)
    assert not says_one_of("5", ["9" * 5000], 0.1)
    assert says_one_of(f"It is {'9' * 5000}.", ["9" * 5000], 0.1)


@pytest.mark.parametrize("note", [{}, {"note": "Hm."}, {"note": [1]}])
def test_arguments_that_gold_ignores_are_right_whatever_they_hold(note: dict[str, Any]) -> None:
    gold: GoldCall = {**call(city="Rome", note="Ah."), "ignore_arguments": ["note"]}
    score = scored(gold, call(city="Rome", **note))
    assert score["right"]
    assert score["bfcl"]["right"]
    assert score["ratios"]["arg_f1"] == [2, 2], "of the city alone"


GOLD = call(city="Rome", days=3, tags=["a"])


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (reading(call(days=3, tags=["a"])), "missing_required"),
        (reading(call(city="Rome", tags=["a"])), "wrong_optional_use"),
        (reading(call(city="Rome", days=3, tags=["a"], note="x")), "wrong_optional_use"),
        (reading(call(city="Rome", days=3, tags=["a"], town="x")), "unknown_name"),
        (reading(call(city="Rome", days="3", tags=["a"])), "wrong_type"),
        (reading(call(city="Oslo", days=3, tags=["a"])), "wrong_value"),
        (reading(call(city="Rome", days=3, tags=["b"])), "wrong_value"),
        (reading({**GOLD, "name": "g"}), "wrong_tool"),
        (reading({**GOLD, "name": "h"}), "not_offered"),
        (reading(GOLD, GOLD), "extra_call"),
        (reading(GOLD, call("h")), "not_offered"),
        (reading(content="I cannot."), "no_call"),
        (reading(), "silent"),
        (reading(GOLD, status="malformed"), "malformed"),
        (reading(GOLD, status="truncated"), "truncated"),
    ],
)
def test_each_single_fault_scores_0_under_its_kind(output: Reading, kind: str) -> None:
    score = score_decision(output, expecting([GOLD]), TOOLS)
    assert (score["right"], score["bfcl"]["right"], score["failure"]) == (False, False, kind)
    assert score["ratios"]["sample_exact"] == [0, 1]
    if kind in {error["kind"] for error in score["errors"]}:
        assert [error["kind"] for error in score["errors"]] == [kind], "and no other"
    assert scored(GOLD, GOLD)["failure"] == ""


@pytest.mark.parametrize("output", [reading(GOLD), reading(status="malformed", attempted=True), reading()])
def test_a_point_without_a_call_fails_by_its_output(output: Reading) -> None:
    """BFCL takes an output that cannot be read, or is empty, for one without a call."""
    score = score_decision(output, expecting([], "No."), TOOLS)
    kinds = {"ok": "unwanted_call", "malformed": "malformed", "no_call": "silent"}
    assert score["failure"] == kinds[output.status]
    assert score["bfcl"]["ratios"]["abstain_acc"] == [int(output.status != "ok"), 1]


def test_a_missing_call_and_two_of_the_wrong_tool_are_told_apart() -> None:
    gold = expecting([call(city="Rome"), call(city="Oslo"), call("g", city="Bonn")])
    score = score_decision(reading(call(city="Rome"), call("g", city="Oslo")), gold, TOOLS)
    assert score["match"] == [[0, 0], [2, 1]]
    assert sorted(error["kind"] for error in score["errors"]) == ["missing_call", "wrong_value"]
    assert score["confusion"] == [["f", "(no call)"], ["f", "f"], ["g", "g"]]
    score = score_decision(reading(call("g", city="Oslo"), call("h")), expecting([call(city="Oslo")]), TOOLS)
    assert [(error["kind"], error.get("expected"), error["got"]) for error in score["errors"]] == [
        ("wrong_tool", "f", "g"),
        ("not_offered", None, "h"),
    ]
    assert score["confusion"] == [["(no call)", "(not offered)"], ["f", "g"]]
    broken = reading(status="malformed", attempted=True)
    assert score_decision(broken, expecting([GOLD]), TOOLS)["confusion"] == [["f", "(malformed)"]]
    assert score_decision(reading(content="Hi."), expecting([]), TOOLS)["confusion"] == [["(no call)", "(no call)"]]


def test_a_shuffled_output_scores_the_same_by_both_rules() -> None:
    """The first call fits both gold calls, so that who takes gold calls one by one may leave the second without."""
    gold = [{**call(), "acceptable": {"city": ["Rome", "Oslo"]}}, {**call(), "acceptable": {"city": ["Rome"]}}]
    calls = [call(city="Rome"), call(city="Oslo")]
    shuffler = random.Random(3)
    for _ in range(8):
        shuffler.shuffle(gold)
        shuffler.shuffle(calls)
        score = score_decision(reading(*calls), expecting(gold), TOOLS)
        assert (score["right"], score["bfcl"]["right"]) == (True, True)


@pytest.mark.parametrize(
    ("output", "strict", "bfcl"),
    [
        (reading(call(days=1)), True, True),
        (reading(call("h")), False, True),
        (reading(content="No."), False, False),
        (reading(call(), status="malformed"), False, False),
    ],
)
def test_where_any_call_is_right_only_a_tool_that_is_offered_is(output: Reading, strict: bool, bfcl: bool) -> None:
    gold = expecting([], "(any)", is_outline=True, any_call=True)
    score = score_decision(output, gold, TOOLS)
    assert (score["right"], score["bfcl"]["right"]) == (strict, bfcl)
    assert score["ratios"]["relevance_acc"] == [int(output.attempted), 1]
    assert not {"call_exact", "sample_exact", "answer_exact", "tool_precision", "abstain_acc"} & score["ratios"].keys()


@pytest.mark.parametrize(
    ("text", "answer", "said"),
    [
        ("It is 20 degrees in Rome.", "20 degrees", True),
        ("It is 20.1 degrees.", "20 degrees", True),
        ("It is 20.3 degrees.", "20 degrees", False),
        ("It is 120 degrees.", "20 degrees", False),
        ("It cost 1,200.50 EUR", "1200.5 eur", True),
        ("It is 20 °C.", "20°C", True),
        ("Romeo", "Rome", False),
        ("ROME!", "rome", True),
        ("Cafe\u0301", "caf\u00e9", True),
        ("-5", "5", False),
        ("0", "0.0", True),
        ("anything", "...", False),
        ("", "Rome", False),
    ],
)
def test_answers_are_found_word_by_word_and_numbers_within_a_tolerance(text: str, answer: str, said: bool) -> None:
    assert says_one_of(text, ["never", answer], 0.01) is said


def test_accepted_answers_take_the_place_of_golds_words() -> None:
    gold = expecting([], "20 degrees", is_outline=True, answers=["20 degrees", "It is warm."])
    for text, exact, contains in (("It is warm.", 1, 1), ("It is 20 degrees.", 0, 1), ("Cold.", 0, 0)):
        ratios = score_decision(reading(content=text), gold, [])["ratios"]
        assert (ratios["answer_exact"], ratios["answer_contains"]) == ([exact, 1], [contains, 1])
