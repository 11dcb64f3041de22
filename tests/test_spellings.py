"""Messages that write OpenAI's fields under other names, and what a tool's message says in any of its forms."""

import json
from typing import Any

import pytest

from gemma_dist.config import RowConfig
from gemma_dist.data.results import FILLED, STRUCTURED
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.data.types import ArrowStruct
from gemma_dist.errors import DataError

USER = {"role": "user", "content": "q"}
DONE = {"role": "assistant", "content": "x"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TEXT = {"type": "text", "text": "Done"}


def parse(*messages: Any, **settings: Any) -> Trajectory:
    return parse_row({"messages": list(messages)}, "rows.jsonl:1", RowConfig(**settings))


def refusal(*messages: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse(*messages)
    return str(caught.value)


def answered(message: dict[str, Any], **settings: Any) -> Trajectory:
    return parse(USER, CALLING, {"role": "tool", "tool_call_id": "c1", **message}, DONE, **settings)


def refused_answer(message: dict[str, Any]) -> str:
    return refusal(USER, CALLING, {"role": "tool", "tool_call_id": "c1", **message}, DONE)


# ---- content ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["output", "result", "results", "response", "text", "value", "data", "observation", "body", "message"]
)
def test_a_result_stands_under_any_of_its_names(key: str) -> None:
    assert answered({key: "20"}).messages[2]["content"] == "20"
    assert answered({key: 20, "content": None}).messages[2]["content"] == "20"
    assert answered({key: {"t": 20}, "content": ""}).messages[2]["content"] == '{"t": 20}'
    assert answered({key: "other", "content": "20"}).messages[2]["content"] == "20"


@pytest.mark.parametrize("key", ["text", "value", "message", "body"])
def test_a_text_stands_under_any_of_its_names(key: str) -> None:
    row = parse({"role": "user", key: "hi"}, {"role": "assistant", key: "Let me.", "tool_calls": [CALL]})
    assert [message["content"] for message in row.messages] == ["hi", "Let me.", ""]


def test_a_part_holds_its_text_under_any_of_its_names() -> None:
    parts = [{"type": "text", "content": "a"}, {"type": "text", "value": "b"}, {"type": "text", "text": {"value": "c"}}]
    assert parse({"role": "user", "content": parts}, DONE).messages[0]["content"] == [{"type": "text", "text": "abc"}]


def test_a_call_as_text_is_found_under_another_key() -> None:
    written = {"role": "assistant", "text": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'}
    assert parse(USER, written).messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "query": "hi"}, DONE], "turn 1 (user): has no content, but `query`, 'hi'"),
        ([{"role": "user", "output": "hi"}, DONE], "turn 1 (user): has no content, but `output`, 'hi'"),
        ([{"role": "user", "blocks": [{"text": "hi"}]}, DONE], "turn 1 (user): has no content, but `blocks`"),
        ([USER, {**CALLING, "result": "20"}], "turn 2 (assistant): has no content, but `result`, '20'"),
        ([{"role": "user", "text": "a", "value": "b"}, DONE], "has no content, but text and value, which differ"),
        ([{"role": "user", "content": [{"type": "text", "name": "x"}]}, DONE], "has no text, but name; write `text`"),
    ],
)
def test_what_may_be_content_is_asked_about(messages: list[Any], words: str) -> None:
    assert words in refusal(*messages)


def test_what_may_be_a_result_is_asked_about() -> None:
    assert "turn 3 (tool): has no content, but `stdout`, 'x'" in refused_answer({"stdout": "x"})
    assert "output and result, which differ" in refused_answer({"output": "a", "result": "b"})
    assert answered({"output": "a", "result": "a"}).messages[2]["content"] == "a"
    assert answered({"content": None, "stdout": "x"}).messages[2]["content"] == ""


# ---- roles and calls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asking", "saying"),
    [("User", "Assistant"), ("human", "ai"), ("user", "model"), ("human", "bot"), ("Human", "AI"), ("user", "gpt")],
)
def test_roles_in_other_words(asking: str, saying: str) -> None:
    row = parse(
        {"role": asking, "content": "q"},
        {"role": saying, "content": "", "tool_calls": [CALL]},
        {"role": "Tool", "tool_call_id": "c1", "content": "2"},
        {"role": saying, "content": "x"},
    )
    assert [message["role"] for message in row.messages] == ["user", "assistant", "tool", "assistant"]
    assert (row.messages[1]["tool_calls"], row.messages[3]) == ([CALL], DONE)


def test_calls_of_additional_kwargs() -> None:
    calling = {"role": "assistant", "content": "I look", "additional_kwargs": {"tool_calls": [CALL]}}
    answer = {"role": "tool", "content": "2", "additional_kwargs": {"tool_call_id": "c1", "name": "f"}}
    row = parse(USER, calling, answer, DONE)
    assert row.messages[1:4] == [
        {"role": "assistant", "content": "I look"},
        CALLING,
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "f"},
    ]
    legacy = {"function_call": {"name": "f", "arguments": "{}"}}
    assert parse(USER, {**DONE, "additional_kwargs": legacy}).messages[2]["tool_calls"][0]["function"]["name"] == "f"
    assert len(parse(USER, {**CALLING, "additional_kwargs": legacy}).messages[1]["tool_calls"]) == 1
    thinking = {**DONE, "additional_kwargs": {"reasoning_content": "why"}}
    assert parse(USER, thinking).messages[1]["reasoning_content"] == "why"
    assert "`extra` holds tool_calls" in refusal(USER, {**DONE, "extra": {"tool_calls": [CALL]}})
    assert parse(USER, {**DONE, "metadata": {"tool_calls": 3}}).messages[1] == DONE


@pytest.mark.parametrize("key", ["name", "tool_name", "function_name", "toolName", "tool", "function"])
def test_a_result_names_its_tool_under_any_key(key: str) -> None:
    assert answered({"content": "20", key: "f"}).messages[2]["name"] == "f"
    assert "f2" in refused_answer({"content": "20", key: "f2"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("tool_input", {"a": 1}), ("arguments", "{}"), ("tool_args", {"a": 1}), ("tool_id", "t"), ("tool_type", "x")),
        *(("tool_status", "completed"), ("tool_version", "2")),
    ],
)
def test_a_result_may_echo_what_was_asked(key: str, value: object) -> None:
    assert answered({"content": "20", key: value}).messages[2]["content"] == "20"


def test_a_result_with_two_names_or_none_of_its_own_is_refused() -> None:
    assert "function_name and tool name two tools" in refused_answer({"content": "", "function_name": "f", "tool": "g"})
    assert "name and tool name two tools" in refused_answer({"content": "", "name": "f", "tool": "g"})
    assert "the key 'tool' of a message is not known" in refused_answer({"content": "20", "tool": {"name": "f"}})
    assert "has no content, but `arguments`" in refused_answer({"arguments": {"a": 1}})
    assert answered({"content": "x", "tool_status": "error"}).messages[2]["content"] == "Error: x"


@pytest.mark.parametrize("key", ["raw", "raw_message", "response_metadata", "provider_specific_fields"])
def test_a_copy_of_the_messages_own_calls_passes(key: str) -> None:
    assert parse(USER, {**CALLING, key: {"tool_calls": [CALL]}}).messages[1] == CALLING
    assert parse(USER, {**DONE, key: {"tool_calls": ["get_weather"]}}).messages[1] == DONE
    other = {**CALL, "function": {"name": "g", "arguments": {}}}
    assert f"`{key}` holds tool_calls" in refusal(USER, {**CALLING, key: {"tool_calls": [other]}})
    assert f"`{key}` holds tool_calls" in refusal(USER, {**DONE, key: {"tool_calls": ['{"name": "f"}']}})


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected", "notes"),
    [
        (20, "20", {}),
        (True, "true", {}),
        (0.5, "0.5", {}),
        (ArrowStruct({"t": 20, "sum": None}), '{"t": 20}', {FILLED: 1}),
        ([ArrowStruct({"type": None, "text": None, "title": "a"})], '[{"title": "a"}]', {FILLED: 2}),
        ({"t": ArrowStruct({"a": 1, "b": None}), "u": None}, '{"t": {"a": 1}, "u": null}', {FILLED: 1}),
        ([ArrowStruct({**TEXT, "title": None})], [TEXT], {}),
        (
            {"content": [1, 2], "title": "P", "isError": False},
            '{"content": [1, 2], "title": "P", "isError": false}',
            {},
        ),
        ({"content": [1, 2]}, '{"content": [1, 2]}', {}),
        ({"content": [TEXT], "url": "u"}, '{"content": [{"type": "text", "text": "Done"}], "url": "u"}', {}),
        ({"content": [], "structuredContent": {"t": 20}}, '{"t": 20}', {}),
        ({"content": [TEXT], "structuredContent": {"t": 20}}, [TEXT], {STRUCTURED: 1}),
        ({"content": [TEXT], "structuredContent": {"result": "Done"}}, [TEXT], {}),
        ({"content": [{"type": "text", "text": "[1]"}], "structuredContent": [1]}, [{**TEXT, "text": "[1]"}], {}),
        ([{"type": "text", "name": "x"}], '[{"type": "text", "name": "x"}]', {}),
    ],
)
def test_nothing_of_a_result_is_lost(content: Any, expected: Any, notes: dict[str, int]) -> None:
    row = answered({"content": content})
    assert row.messages[2]["content"] == expected
    assert row.notes == notes


@pytest.mark.parametrize(
    "items",
    [
        [{**TEXT, "bbox": [1, 2]}, {"type": "text", "text": "20", "bbox": [3, 4]}],
        [{**TEXT, "bbox": [1, 2]}, TEXT],
        [{**TEXT, "weight": 700}],
        [{**TEXT, "mask": [0, 1]}],
        [{"type": "image", "title": "Cat"}, {"type": "text", "text": "Dog", "title": "Dog"}],
    ],
)
def test_items_with_more_than_a_part_holds_are_values(items: Any) -> None:
    assert answered({"content": items}).messages[2]["content"] == json.dumps(items)
    assert answered({"content": {"content": items}}).messages[2]["content"] == json.dumps({"content": items})


def test_parts_with_a_servers_own_keys_stay_parts() -> None:
    silent: dict[str, Any] = {"id": "p1", "annotations": [], "metadata": {"page": 1}, "title": None, "bbox": []}
    assert answered({"content": [{**TEXT, **silent}]}).messages[2]["content"] == [TEXT]
    image = {"type": "image", "url": "cat.png", "title": "Cat"}
    assert "mixes parts with other values" in refused_answer({"content": [{**TEXT, "bbox": [1, 2]}, image]})


def test_nulls_of_results_are_kept_where_they_are_the_rows_own() -> None:
    row = answered({"content": ArrowStruct({"t": 20, "sum": None})}, arrow_nulls="keep")
    assert (row.messages[2]["content"], row.notes) == ('{"t": 20, "sum": null}', {})


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": "x", "is_error": "false"}, "x"),
        ({"content": "x", "is_error": "True"}, "Error: x"),
        ({"content": "x", "error": True}, "Error: x"),
        ({"content": "x", "error": "", "success": True}, "x"),
        ({"content": "x", "success": False}, "Error: x"),
        ({"content": "x", "ok": "false"}, "Error: x"),
        ({"content": "x", "status": "FAILED"}, "Error: x"),
        ({"content": "", "error": "Timeout"}, "Error: Timeout"),
        ({"error": {"code": 7}}, 'Error: {"code": 7}'),
        ({"content": "Error: Timeout", "error": "Timeout"}, "Error: Timeout"),
        ({"content": "No errors found in file", "is_error": True}, "Error: No errors found in file"),
        ({"content": "There is no error here", "is_error": True}, "Error: There is no error here"),
        ({"content": "An error occurred", "is_error": True}, "An error occurred"),
        ({"content": "ValueError: x", "is_error": True}, "ValueError: x"),
        ({"content": {"content": [TEXT], "isError": "false"}}, [TEXT]),
        ({"content": "20", "success": ""}, "20"),
        ({"content": "20", "ok": ""}, "20"),
        ({"content": "20", "success": "N/A"}, "20"),
        ({"content": "20", "success": "no"}, "Error: 20"),
        ({"content": "20", "success": "ok"}, "20"),
        ({"content": "20", "error": {"code": None, "message": None}}, "20"),
        ({"content": "", "error": {"code": None, "message": None}}, ""),
        ({"content": "20", "error": {"code": 0, "message": "OK"}}, "20"),
        *[({"content": "20", "error": word}, "20") for word in ("N/A", "nil", "-", "ok", "OK", "No error", "None")],
        ({"content": "", "error": {"code": 7, "message": None}}, 'Error: {"code": 7}'),
        ({"content": "timeout after 3s", "error": "Timeout"}, "Error: timeout after 3s"),
        (
            {"content": {"error": "NotFound", "code": 404}, "error": {"code": 404}},
            '{"error": "NotFound", "code": 404}',
        ),
    ],
)
def test_a_failed_call_says_so(message: dict[str, Any], expected: Any) -> None:
    assert answered(message).messages[2]["content"] == expected


def test_flags_that_say_neither_are_refused() -> None:
    assert "turn 3 (tool): `is_error` is 'maybe'; write true or false" in refused_answer(
        {"content": "x", "is_error": "maybe"}
    )
    assert "`error` is 'Timeout' beside the content 'part'" in refused_answer({"content": "part", "error": "Timeout"})
    assert "`error` is '{\"code\": 404}' beside" in refused_answer({"content": {"code": 4}, "error": {"code": 404}})
    block = {"type": "tool_result", "tool_use_id": "c1", "content": "x", "is_error": "false"}
    assert parse(USER, CALLING, {"role": "user", "content": [block]}, DONE).messages[2]["content"] == "x"


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("server_tool_use", "declare it in `tools` and write its call under tool_calls"),
        ("web_search_tool_result", "declare it in `tools` and write its call under tool_calls"),
        ("mcp_tool_use", "declare it in `tools` and write its call under tool_calls"),
        ("refusal", 'write its words as {"type": "text", "text": …}'),
        ("document", "write what it says as"),
        ("resource_link", "write what it says as"),
    ],
)
def test_other_parts_are_refused_with_a_way_out(kind: str, remedy: str) -> None:
    message = refusal(USER, {"role": "assistant", "content": [{"type": kind, "x": 1}]})
    assert f"is of type '{kind}'" in message
    assert remedy in message
