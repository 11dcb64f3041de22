"""Roles and spellings of sharegpt, ms-swift, LLaMA-Factory and Toucan mean the same as the OpenAI row."""

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_dist.config import RowConfig
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.errors import DataError

CALL = '{"name": "f", "arguments": {"a": "1"}}'


def parse(row: Any) -> Trajectory:
    return parse_row(row, "chats.jsonl:2", RowConfig())


def refusal(row: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse(row)
    return str(caught.value)


def conversation(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": source, "value": value} for source, value in turns]}


def short_form(trajectory: Trajectory) -> list[Any]:
    """Each message as its role with its calls, or with what it says."""
    messages: list[Any] = []
    for message in trajectory.messages:
        calls = [(call["id"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]
        answered = message.get("tool_call_id", "")
        messages.append((message["role"], calls or message["content"], answered))
    return messages


ONE_CALL = [
    ("user", "q", ""),
    ("assistant", [("call_0", {"a": "1"})], ""),
    ("tool", "20", "call_0"),
    ("assistant", "ok", ""),
]
CALLERS = ["function_call", "function-call", "tool_call", "tool_calls", "Tool_Call"]
ANSWERERS = ["observation", "tool", "function", "function_response", "function-response", "tool_response", "ipython"]


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("answerer", ANSWERERS)
def test_spellings_of_the_roles(caller: str, answerer: str) -> None:
    turns = [("human", "q"), (caller, CALL), (answerer, "20"), ("gpt", "ok")]
    assert short_form(parse(conversation(*turns))) == ONE_CALL
    for key in ("conversations", "messages"):
        for role_key, value_key in (("role", "content"), ("role", "value"), ("from", "content")):
            row = {key: [{role_key: role, value_key: value} for role, value in turns]}
            assert short_form(parse(row)) == ONE_CALL


CALL_TEXTS = {
    "object": {"name": "f", "arguments": {"a": "1"}},
    "JSON": CALL,
    "JSON in JSON": '{"name": "f", "arguments": "{\\"a\\": \\"1\\"}"}',
    "list": f"[{CALL}]",
    "Python (Toucan)": str({"name": "f", "arguments": '{"a": "1"}'}),
    "Python in JSON": """{"name": "f", "arguments": "{'a': '1'}"}""",
    "Python in Python": str([{"name": "f", "arguments": str({"a": "1"})}]),
    "OpenAI": f'[{{"type": "function", "function": {CALL}}}]',
    "parameters": '{"name": "f", "parameters": {"a": "1"}}',
}


@pytest.mark.parametrize("value", CALL_TEXTS.values(), ids=CALL_TEXTS)
def test_how_a_turn_writes_a_call(value: Any) -> None:
    row = conversation(("human", "q"), ("function_call", value), ("observation", "20"), ("gpt", "ok"))
    assert short_form(parse(row)) == ONE_CALL


TWO_CALLS = [
    ("user", "q", ""),
    ("assistant", [("call_0", {"a": "1"}), ("call_1", {"a": "2"})], ""),
    ("tool", "1", "call_0"),
    ("tool", "2", "call_1"),
    ("assistant", "ok", ""),
]
OTHER = CALL.replace('"1"', '"2"')


def test_calls_in_a_row_are_parallel() -> None:
    turns = [("tool_call", CALL), ("tool_call", OTHER), ("tool_response", "1"), ("tool_response", "2")]
    assert short_form(parse(conversation(("human", "q"), *turns, ("gpt", "ok")))) == TWO_CALLS
    turns = [("function_call", CALL), ("function_call", OTHER), ("observation", "[1, 2]")]
    assert short_form(parse(conversation(("human", "q"), *turns, ("gpt", "ok")))) == TWO_CALLS


def test_calls_one_after_the_other_are_messages_of_their_own() -> None:
    turns = [("tool_call", CALL), ("tool_response", "1"), ("tool_call", OTHER), ("tool_response", "2")]
    roles = [message["role"] for message in parse(conversation(("human", "q"), *turns, ("gpt", "ok"))).messages]
    assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]


def test_a_turn_keeps_its_other_keys() -> None:
    row = conversation(("human", "q"), ("function_call", CALL), ("observation", "20"), ("gpt", "ok"))
    row["conversations"][1] |= {"reasoning_content": "Look.", "loss": False}
    row["conversations"][2] |= {"name": "f"}
    calling, answer = parse(row).messages[1:3]
    assert calling["reasoning_content"] == "Look."
    assert calling["train"] is False
    assert answer["tool_call_id"] == "call_0"


THOUGHTS = {
    "tags": f"<think>\nLook.\n</think>\n\n{CALL}",
    "the prompt held the first": f"Look.\n</think>\n{CALL}",
    "thinking": f"<thinking>Look.</thinking>{CALL}",
    "a tag in an argument": f"<think>Look.</think>{CALL.replace('1', '<think>')}",
    "braces in the thought": f"<think>Look.</think>[{CALL}]",
}


@pytest.mark.parametrize("value", THOUGHTS.values(), ids=THOUGHTS)
def test_thoughts_in_front_of_a_call_are_reasoning(value: str) -> None:
    row = conversation(("human", "q"), ("function_call", value), ("observation", "20"), ("gpt", "ok"))
    calling = parse(row).messages[1]
    assert (calling["content"], calling["reasoning_content"]) == ("", "Look.")
    assert calling["tool_calls"][0]["function"]["arguments"]["a"] in ("1", "<think>")
    row["conversations"][1]["reasoning_content"] = "Think."
    assert "say different things about the reasoning" in refusal(row)


def test_structured_calls_inside_of_turns() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": "1"}}}
    row = conversation(("human", "q"), ("gpt", ""), ("tool", "20"), ("gpt", "ok"))
    row["conversations"][1]["tool_calls"] = [call]
    row["conversations"][2]["tool_call_id"] = "c"
    assert [message for message in parse(row).messages if "tool_calls" in message] == [
        {"role": "assistant", "content": "", "tool_calls": [call]}
    ]
    row["conversations"][1]["from"] = "function_call"
    assert parse(row).messages[1]["tool_calls"] == [call]


REFUSED = [
    (conversation(("human", "q"), ("function_call", "[]")), "turn 2 (function_call): the list of calls is empty"),
    (conversation(("human", "q"), ("function_call", "f(1)")), "turn 2 (function_call): not JSON at column 1"),
    (conversation(("human", "q"), ("function_call", '{"a": 1}')), "is no object with a name; write"),
    (conversation(("human", "q"), ("function_call", "{'name': 'f', 'name': 'g'}")), "the key 'name' stands twice"),
    (conversation(("human", "q"), ("function_call", "{'name': 'f', 'arguments': {'a': {1}}}")), "turn 2"),
    (conversation(("human", "q"), ("critic", "no")), "turn 2 (critic): `from` is 'critic'; sharegpt turns come from"),
    (
        conversation(("human", "q"), ("tool_call", CALL), ("tool_call", OTHER), ("observation", "20"), ("gpt", "ok")),
        "turn 4 (observation): one observation, '20', after 2 calls",
    ),
]


@pytest.mark.parametrize(("row", "words"), REFUSED)
def test_refused_with_the_turn(row: dict[str, Any], words: str) -> None:
    assert words in refusal(row)


def test_calls_in_a_row_have_to_agree_on_what_stands_beside_them() -> None:
    row = conversation(("human", "q"), ("tool_call", CALL), ("tool_call", OTHER), ("gpt", "ok"))
    row["conversations"][2]["loss"] = False
    assert "turn 3 (tool_call): calls in a row are one message, but beside the calls this turn says" in refusal(row)


def test_two_function_calls_as_filed(shared: Path) -> None:
    row = json.loads((shared / "cases" / "data" / "msg_lf9585_two_function_calls.jsonl").read_text())
    assert short_form(parse(row)) == TWO_CALLS
