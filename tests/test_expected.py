"""Test cases, which end before the answer: `evaluate` takes them, training does not; names alone count as names."""

import json
from typing import Any

import pytest

from gemma_dist.config import EvaluateConfig, ShardConfig
from gemma_dist.data.read import Call, Reading
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.errors import DataError
from gemma_dist.evaluate.score import GoldCall, score_decision
from tests.support.scoring import expecting

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells.", "parameters": SCHEMA}}]
ROME = {"city": "Rome"}


def test_case(**keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Rome?"}], "available_tools": TOOLS, **keys}


test_case.__test__ = False  # type: ignore[attr-defined]


def parse(row: Any) -> Trajectory:
    return parse_row(row, "cases.jsonl:2", EvaluateConfig())


def expected(trajectory: Trajectory) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in trajectory.messages[-1]["tool_calls"]]


WITH_ARGUMENTS = {
    "beside": {"expected_tool": "weather", "expected_arguments": ROME},
    "args": {"expected_tool": "weather", "expected_args": '{"city": "Rome"}'},
    "object": {"expected_tool": {"name": "weather", "arguments": ROME}},
    "JSON": {"expected_tool": '{"name": "weather", "arguments": {"city": "Rome"}}'},
    "list": {"expected_tools": [{"name": "weather", "arguments": ROME}]},
    "OpenAI": {"expected_tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": ROME}}]},
}


@pytest.mark.parametrize("keys", WITH_ARGUMENTS.values(), ids=WITH_ARGUMENTS)
def test_the_expected_call_is_the_last_message(keys: dict[str, Any]) -> None:
    trajectory = parse(test_case(**keys))
    assert expected(trajectory) == [("weather", ROME)]
    assert [tool["function"]["name"] for tool in trajectory.tools] == ["weather"]
    assert not trajectory.is_outline


@pytest.mark.parametrize("names", ["weather", ["weather"], {"name": "weather"}])
def test_a_name_alone_is_an_outline(names: Any) -> None:
    trajectory = parse(test_case(expected_tool=names))
    assert expected(trajectory) == [("weather", {})]
    assert trajectory.is_outline


NULLS: list[Any] = [None, [], [None], {"name": None, "arguments": None}]


@pytest.mark.parametrize("none", [*NULLS, "", "none"])
def test_that_no_tool_is_expected_is_an_outline(none: Any) -> None:
    trajectory = parse(test_case(expected_tool=none))
    assert "tool_calls" not in trajectory.messages[-1]
    assert trajectory.is_outline


def test_only_the_expected_answer_is_asked_for() -> None:
    row = test_case(expected_tool="weather")
    row["messages"] = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hi."}, *row["messages"]]
    assert [message.get("train", True) for message in parse(row).messages] == [True, False, True, True]


def test_other_layouts_expect_calls_too() -> None:
    row = {"conversations": [{"from": "human", "value": "Rome?"}], "tools": TOOLS, "expected_tool": "weather"}
    assert expected(parse(row)) == [("weather", {})]
    assert expected(parse({**test_case(expected_tool="weather"), "messages": json.dumps(row_messages())})) == [
        ("weather", {})
    ]


def row_messages() -> list[dict[str, str]]:
    return [{"role": "user", "content": "Rome?"}]


def test_a_whole_trajectory_is_no_test_case() -> None:
    messages = [*row_messages(), {"role": "assistant", "content": "20 degrees."}]
    row = {"messages": messages, "tools": TOOLS, "expected_tool": "weather"}
    assert parse(row) == parse_row(row, "cases.jsonl:2", ShardConfig())
    assert parse(row).messages == messages


REFUSED = [
    ({"expected_tool": "wether"}, "calls wether, which `tools` does not declare"),
    ({"expected_tool": {"name": "weather", "arguments": {"city": 3}}}, "the arguments do not fit the tool's schema"),
    ({"expected_tool": "weather", "expected_args": "Rome"}, "`expected_tool`: not JSON at column 1"),
    ({"expected_tool": "weather", "expected_args": ["Rome"]}, "the expected arguments are ['Rome'], not an object"),
    ({"expected_tool": ["weather", "weather"], "expected_args": ROME}, "names 2 calls beside the arguments of one"),
    ({"expected_tools": ["weather", {"name": "weather", "arguments": ROME}]}, "gives arguments of some calls alone"),
    ({"expected_tool": 3}, "the call 3 is no object with a name"),
]


@pytest.mark.parametrize(("keys", "words"), REFUSED)
def test_what_is_expected_has_to_be_clear(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(test_case(**keys))
    assert words in str(caught.value)


CALLED = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ROME}}]
UNANSWERED: list[dict[str, Any]] = [
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": "", "tool_calls": CALLED},
    {"role": "tool", "tool_call_id": "c1", "content": "20"},
]


@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize("rest", [[], [{"role": "assistant", "content": "20."}, {"role": "user", "content": "Ok."}]])
def test_a_trajectory_that_expects_nothing_is_no_test_case(null: Any, rest: list[dict[str, Any]]) -> None:
    row = {"messages": UNANSWERED + rest, "tools": TOOLS}
    expects_nothing = {**row, "expected_tool": null, "expected_arguments": None}
    for settings in (ShardConfig(), EvaluateConfig()):
        parsed = parse_row(expects_nothing, "cases.jsonl:2", settings)
        assert parsed == parse_row(row, "cases.jsonl:2", settings)
        assert len(parsed.messages) == len(row["messages"])
        assert not parsed.is_outline


def test_the_key_that_says_something_is_read() -> None:
    assert expected(parse(test_case(expected_tool=None, expected_tools=["weather"]))) == [("weather", {})]


@pytest.mark.parametrize("none", ["", "none"])
def test_a_word_expects_no_call_in_whole_conversations_too(none: str) -> None:
    row = test_case(expected_tool=none)
    row["messages"] = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hi."}, *row["messages"]]
    assert parse(row).is_outline


def test_training_refuses_a_test_case() -> None:
    with pytest.raises(DataError, match="a test case for `evaluate`; add the assistant message with the call to train"):
        parse_row(test_case(expected_tool="weather"), "cases.jsonl:2", ShardConfig())


def score(gold: list[GoldCall], *calls: GoldCall, content: str = "") -> Any:
    read = tuple(Call(call["name"], call["arguments"], (0, 0)) for call in calls)
    reading = Reading(read, content, "", bool(calls), "ok" if calls else "no_call")
    return score_decision(reading, expecting(gold, "(any)", is_outline=True), TOOLS)


WEATHER = GoldCall(name="weather", arguments={})
OF_ARGUMENTS = {"arg_precision", "arg_recall", "arg_f1", "call_exact", "sample_exact", "parallel_exact"}
OF_ARGUMENTS |= {"answer_exact", "answer_contains"}


def test_an_outline_counts_names_and_nothing_else() -> None:
    called = score([WEATHER], GoldCall(name="weather", arguments={"city": "Oslo"}))
    assert called["right"]
    assert not OF_ARGUMENTS & called["ratios"].keys()
    assert called["ratios"]["tool_set_exact"] == [1, 1]
    assert called["ratios"]["schema_valid"] == [1, 1]
    assert called["ratios"]["overall"] == [1, 1]
    assert not score([WEATHER], GoldCall(name="wether", arguments={}))["right"]
    assert not score([WEATHER], WEATHER, WEATHER)["right"]
    assert not score([WEATHER], content="20 degrees.")["right"]


def test_an_outline_without_a_call_takes_any_words() -> None:
    silent = score([], content="I cannot.")
    assert silent["right"]
    assert not OF_ARGUMENTS & silent["ratios"].keys()
    assert not score([], WEATHER)["right"]


LISTED = {"name": "weather", "arguments": {"city": ["Rome", "Roma"], "unit": ["celsius", ""]}}


def test_expected_calls_list_the_values_that_are_right() -> None:
    row = test_case(expected_calls=[LISTED], ignore_arguments=["note"], category="towns", pair="p1")
    trajectory = parse(row)
    (function,) = [call["function"] for call in trajectory.messages[-1]["tool_calls"]]
    assert function["arguments"] == {"city": "Rome"}, "for show"
    assert function["acceptable"] == LISTED["arguments"]
    assert function["ignore_arguments"] == ["note"]
    assert (trajectory.is_outline, trajectory.category, trajectory.pair) == (False, "towns", "p1")
    assert not parse(test_case(expected_calls=[])).messages[-1].get("tool_calls")


def test_calls_of_any_row_may_list_acceptable_values() -> None:
    gold = {"name": "weather", "arguments": ROME, "acceptable": {"city": ["Rome", "Roma"]}, "ignore_arguments": ["at"]}
    call = {"id": "c1", "type": "function", "function": gold}
    row = {"messages": [*row_messages(), {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": TOOLS}
    for settings in (EvaluateConfig(), ShardConfig()):
        assert parse_row(row, "x.jsonl:1", settings).messages[-1]["tool_calls"][0]["function"] == gold
    assert parse(test_case(expected_tool=gold)).messages[-1]["tool_calls"][0]["function"] == gold


def test_any_call_and_accepted_answers() -> None:
    case = parse(test_case(expected_tool="*"))
    assert (case.any_call, case.is_outline) == (True, True)
    case = parse(test_case(expected_answer=["20 degrees", 20]))
    assert (case.answers, case.messages[-1]["content"]) == (("20 degrees", "20"), "20 degrees")
    assert "tool_calls" not in case.messages[-1]
    whole = {"messages": [*row_messages(), {"role": "assistant", "content": "20."}], "expected_answer": "30"}
    assert parse(whole).messages[-1]["content"] == "20.", "a whole trajectory is no test case"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"expected_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]}, "gives 'Rome' for 'city'; write"),
        ({"expected_calls": {"weather": 1}}, "`expected_calls`: is {'weather': 1}; write a list of"),
        ({"expected_calls": [LISTED], "ignore_arguments": "note"}, "`ignore_arguments` is 'note'; write a list"),
        ({"expected_tool": "weather", "expected_answer": "20"}, "expects calls (`expected_tool`) and the words"),
        ({"expected_answer": [["20"]]}, "the expected answer is ['20']; write a text, a number"),
    ],
)  # fmt: skip
def test_gold_of_another_shape_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(test_case(**keys))
    assert words in str(caught.value)
