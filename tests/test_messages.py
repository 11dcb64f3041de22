"""Messages as people log them: calls, reasoning, masks and results under the names that each tool gives them."""

from pathlib import Path
from typing import Any

import pytest

from gemma_dist.config import RowConfig
from gemma_dist.data.marks import OFF_MESSAGE, ON_MESSAGE, UNCLEAR
from gemma_dist.data.read import read_whole_call
from gemma_dist.data.reasoning import split_think_tags
from gemma_dist.data.rows import read_rows
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.errors import DataError

USER = {"role": "user", "content": "Go."}
CALLING = {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": {}}}]}
DONE = {"role": "assistant", "content": "Done."}


def parse(*messages: dict[str, Any], **columns: Any) -> Trajectory:
    return parse_row({"messages": list(messages), **columns}, "rows.jsonl:1", RowConfig())


def refusal(*messages: dict[str, Any], **columns: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse(*messages, **columns)
    return str(caught.value)


def case(shared: Path, name: str) -> Trajectory:
    path = shared / "cases" / "data" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent: the inputs of the cases lie beside the repository")
    ((where, row),) = read_rows([path])
    return parse_row(row, where, RowConfig())


# ---- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": "x"}}},
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": "x"}'}},
        {"id": "c1", "type": "tool_call", "name": "f", "args": {"a": "x"}},
        {"id": "c1", "name": "f", "args": {"a": "x"}},
        {"id": "c1", "type": "function", "name": "f", "input": {"a": "x"}},
        {"id": "c1", "type": "tool_use", "name": "f", "input": '{"a": "x"}'},
        {"id": "c1", "function": {"name": "f", "parameters": {"a": "x"}}},
        {"id": "c1", "function": {"name": "f", "params": {"a": "x"}, "arguments": None}},
        {"id": "c1", "function": {"name": "f"}, "arguments": {"a": "x"}},
        {"id": "c1", "function": "f", "kwargs": {"a": "x"}},
        {"call_id": "c1", "index": 0, "name": "f", "arguments": {"a": "x"}, "extra_content": {"google": {}}},
        {"toolCallId": "c1", "toolName": "f", "args": {"a": "x"}},
        {"id": "c1", "tool": "f", "tool_input": {"a": "x"}},
        {"id": "c1", "action": "f", "action_input": '{"a": "x"}'},
        {"id": "c1", "type": "tool_use", "name": "f", "input": {"a": "x"}, "caller": {"type": "direct"}},
        {"id": "c1", "function": {"name": "f", "arguments": '{"a": "x"}', "parsed_arguments": {"a": "x"}}},
        '{"id": "c1", "name": "f", "arguments": {"a": "x"}}',
    ],
)
def test_a_call_means_the_same_under_every_known_key(call: Any) -> None:
    row = parse(USER, {"role": "assistant", "tool_calls": [call]})
    expected = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": "x"}}}
    assert row.messages[1]["tool_calls"] == [expected]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("requestor", "assistant"), ("description", "Looks."), ("timestamp", "2025"), ("state", "result")),
        *(("duration_ms", 3), ("success", True), ("error", ""), ("is_error", False), ("usage", {}), ("namespace", "")),
        *(("server_name", "s"), ("item_id", "i"), ("thoughtSignature", "x"), ("signature", "x"), ("score", 0.5)),
        *(("finish_reason", "stop"), ("providerExecuted", False), ("function", {"id": "c2"})),
    ],
)
def test_what_is_beside_a_call_and_says_nothing_passes(key: str, value: object) -> None:
    call = {"id": "c1", "name": "f", "arguments": {"a": "x"}, key: value}
    expected = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": "x"}}}
    assert parse(USER, {"role": "assistant", "tool_calls": [call]}).messages[1]["tool_calls"] == [expected]


@pytest.mark.parametrize("name", ["args_key_langchain_notype", "input_key", "parameters_key"])
def test_the_cases_of_other_argument_keys(shared: Path, name: str) -> None:
    calls = case(shared, f"msg_tool_call_{name}").messages[1]["tool_calls"]
    assert [call["function"] for call in calls] == [{"name": "f", "arguments": {"a": "x"}}]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"name": "f", "argument": {"a": 1}}, "call of f: the key 'argument' of the call is not known"),
        ({"function": {"name": "f", "body": {"a": 1}}}, "the key 'body' of the call is not known"),
        ({"name": "f", "arguments": {}, "result": "7"}, "the key 'result' of the call is not known"),
        ({"name": "f", "arguments": {}, "result": 7}, "the key 'result' of the call is not known"),
        ({"name": "f", "limit": 7}, "the key 'limit' of the call is not known"),
        ({"name": "f", "args": {}, "namespace": "web"}, "the key 'namespace' of the call is not known"),
        ({"name": "f", "args": {}, "providerExecuted": True}, "the key 'providerExecuted' of the call is not known"),
        ({"name": "f", "description": "F.", "parameters": {"a": 1}}, "the key 'description' of the call is not known"),
        ({"name": "f", "args": {"a": 1}, "input": {"a": 2}}, "args and input stand side by side"),
        ({"name": "g", "function": {"name": "f", "arguments": {}}}, "says `name` twice"),
        ({"name": "f", "arguments": "{}", "parsed_arguments": {"a": 2}}, "arguments and parsed_arguments stand side"),
        ({"fn": "f", "args": {}}, "the call {'args': {}, 'fn': 'f'} has no name; write it under `name`"),
        ({"name": "f", "tool": "g", "args": {}}, "says name and tool, which differ"),
        ({"type": "custom", "custom": {"name": "f", "input": "x"}}, "is no function call"),
    ],
)
def test_what_may_belong_to_a_call_is_never_passed_over(call: Any, words: str) -> None:
    found = refusal(USER, {"role": "assistant", "tool_calls": [call]})
    assert "turn 2 (assistant)" in found
    assert words in found


def test_a_key_that_looks_like_one_of_ours_is_asked_about() -> None:
    assert "the key 'toolCalls' of a message is not known" in refusal(USER, {**DONE, "toolCalls": [{"name": "f"}]})
    assert "the key 'tool' of a message is not known" in refusal(USER, {**DONE, "tool": "f"})
    assert "the key 'thoughts' of a message is not known" in refusal(USER, {**DONE, "thoughts": "why"})
    harmless = {"num_tool_calls": 0, "model": "x", "created_at": "today", "tool_calls": [], "tool": None}
    assert parse(USER, {**DONE, **harmless}).messages[1] == DONE
    servers = {"finish_reason": "stop", "stopReason": "end", "reasoning_effort": "high", "content_type": "text"}
    assert parse(USER, {**DONE, **servers, "content_filter_results": {"hate": {}}}).messages[1] == DONE


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("tools_used", ["f"]), ("tool_used", "f"), ("tool_names", ["f", "g"]), ("reason", "stop")),
        *(("thinking_mode", "on"), ("thinkingTime", "3s"), ("thinking_tokens", "12"), ("reasoning_id", "r1")),
        *(("content_id", "c"), ("content_hash", "9f"), ("image_id", "i"), ("functional", "yes"), ("callsign", "D")),
        *(("raw_content", "Done."), ("content_raw", "Done."), ("thought", "Done.")),
    ],
)
def test_a_key_that_tells_of_one_of_ours_passes(key: str, value: object) -> None:
    assert parse(USER, {**DONE, key: value}).messages[1] == DONE


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("tools_used", [{"name": "f", "arguments": {}}]), ("tool_used", "f(a=1)"), ("reason", "I looked it up")),
        *(("raw_content", "<think>why</think>Done."), ("thought", "why"), ("thinking_used", "First I\nthen I")),
    ],
)
def test_a_key_that_may_hold_one_of_ours_is_asked_about(key: str, value: object) -> None:
    assert f"turn 2 (assistant): the key '{key}' of a message is not known" in refusal(USER, {**DONE, key: value})


# ---- texts -----------------------------------------------------------------------------------------------------------


def texts(row: Trajectory) -> list[Any]:
    return [message["content"] for message in row.messages]


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def test_texts_of_one_message_are_joined_as_they_were_said(shared: Path) -> None:
    assert texts(parse({"role": "user", "content": [part("a\n"), part("b")]}, DONE))[0] == [part("a\nb")]
    assert texts(case(shared, "msg_parts_asst_trim_join"))[1] == [part("Hello world")]
    assert texts(case(shared, "msg_parts_user_trim_join"))[0] == [part("Line one\nline two")]
    cited = case(shared, "format_anthropic_multi_text_citations")
    assert texts(cited)[2] == [part("Rome is warm, about 20 degrees today.")]


def test_neighboring_messages_of_the_assistant_stay_two_sayings(shared: Path) -> None:
    row = case(shared, "msg_two_assistants")
    assert texts(row) == ["hi", "done\n\nmore"]
    assert [count for note, count in row.notes.items() if "joined" in note] == [1]
    three = parse(USER, *[{"role": "assistant", "content": word} for word in ("One ", [part(" two")], "three")])
    assert texts(three)[1:] == [[part("One\n\ntwo\n\nthree")]]


def test_what_parts_texts_keeps_them_apart() -> None:
    thinking = {"role": "assistant", "content": "b", "reasoning_content": "why"}
    assert len(parse(USER, {"role": "assistant", "content": "a"}, thinking).messages) == 3
    assert len(parse(USER, {"role": "assistant", "content": "a"}, CALLING).messages) == 3
    assert "of which one is trained and one is not" in refusal(USER, {**DONE, "train": False}, DONE)


# ---- reasoning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nhmm\n</think>\n\nanswer", ("hmm", "answer")),
        ("  <thinking>hmm</thinking>answer", ("hmm", "answer")),
        ("hmm\n</think>\n\nanswer", ("hmm", "answer")),
        ("<think>a</think><think>b</think>answer", ("a\nb", "answer")),
        ("<think>\n\n</think>\n\nanswer", ("", "answer")),
        ("<think>a ` b</think>say `x`", ("a ` b", "say `x`")),
        ("<think>only</think>", ("only", "")),
        ("write `<think>` in code", ("", "write `<think>` in code")),
        ("```\n<think>a</think>\n```", ("", "```\n<think>a</think>\n```")),
        ("`` ` <think> `` is one", ("", "`` ` <think> `` is one")),
        ("1 < 2", ("", "1 < 2")),
        ('<think duration="3">hmm</think>Hi', ("hmm", "Hi")),
        ("<Think>hmm</Think>Hi", ("hmm", "Hi")),
        ("<seed:think>hmm</seed:think>Hi", ("hmm", "Hi")),
        ("<reasoning>hmm</reasoning>\nHi", ("hmm", "Hi")),
        ("<thought>hmm</thought>Hi", ("hmm", "Hi")),
        ("[THINK]hmm[/THINK]Hi", ("hmm", "Hi")),
        ("◁think▷hmm◁/think▷Hi", ("hmm", "Hi")),
        ("<|begin_of_thought|>hmm<|end_of_thought|>\n<|begin_of_solution|>\nHi<|end_of_solution|>", ("hmm", "Hi")),
        ("<|START_THINKING|>hmm<|END_THINKING|><|START_RESPONSE|>Hi<|END_RESPONSE|>", ("hmm", "Hi")),
        ("<|channel|>analysis<|message|>hmm<|end|><|start|>assistant<|channel|>final<|message|>Hi", ("hmm", "Hi")),
        ("<|channel|>final<|message|>Hi<|return|>", ("", "Hi")),
        ("a `b\n</think>\n\nuse `x`", ("a `b", "use `x`")),
        ("Hi <reasoning>x</reasoning>", ("", "Hi <reasoning>x</reasoning>")),
        ("<reasoning>no end", ("", "<reasoning>no end")),
        ("<think>The tag `</think>` closes it.</think>Use it.", ("The tag `</think>` closes it.", "Use it.")),
        ("<think>a `x`</think>`y` is", ("a `x`", "`y` is")),
        ("<think>a ` b</think>c `<think>d</think>` e", ("a ` b", "c `<think>d</think>` e")),
        ("```\n<think>\na\n</think>\n```", ("", "```\n<think>\na\n</think>\n```")),
        ("```\nend with </think>\n```", ("", "```\nend with </think>\n```")),
    ],
)
def test_think_tags(text: str, expected: tuple[str, str]) -> None:
    assert split_think_tags(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("said <think>x</think> said", "<think>no end", "a <thinking> b"),
        "<reasoning>a</reasoning>b<thought>c</thought>",
        "Okay, try\n```python\nfoo\n</think>\nAnswer:\n```python\nx\n```",
        "<think>a `</think>` b",
    ],
)
def test_tags_in_the_middle_are_refused(text: str) -> None:
    assert "stands inside of the text" in refusal(USER, {"role": "assistant", "content": text})


@pytest.mark.parametrize(
    "message",
    [
        {"content": "answer", "reasoning_content": "hmm"},
        {"content": "answer", "reasoning": "hmm", "reasoning_details": [{"type": "reasoning.text", "text": "hmm!"}]},
        {"content": "answer", "thinking": "hmm"},
        {"content": "answer", "reasoning_details": [{"type": "reasoning.summary", "summary": "hmm"}]},
        {"content": "<think>hmm</think>answer", "reasoning_content": "hmm"},
        {"content": "<think>hmm</think>answer"},
        {"content": [{"type": "thinking", "thinking": "hmm", "signature": "x"}, {"type": "text", "text": "answer"}]},
        {"content": [{"type": "reasoning", "text": "hmm"}, {"type": "text", "text": "answer"}]},
        {"content": [{"type": "text", "text": "<think>hmm</think>answer"}]},
        {"content": "answer", "reasoning_content": "<think>\nhmm\n</think>"},
        {"content": "answer", "reasoning_content": "<think>hmm"},
        {"content": "answer", "reasoning_content": "hmm\n</think>"},
        {"content": "answer", "reasoning_content": "<reasoning>hmm</reasoning>"},
        {"content": "answer", "reasoning": "hmm", "thinking": False},
        {"content": "answer", "reasoning": [{"type": "text", "text": "hmm"}]},
        {"content": "answer", "thinking_blocks": [{"type": "thinking", "thinking": "hmm", "signature": "x"}]},
        {"content": "answer", "reasoning": "hmm", "thinking_blocks": [{"type": "thinking", "thinking": "hmm"}]},
        {"content": "answer", "reasoning_details": [{"index": 0, "text": "h"}, {"index": 0, "text": "mm"}]},
        {"content": [{"type": "thinking", "thinking": [part("h"), part("mm")]}, part("answer")]},
        {"content": [{"type": "reasoning", "summary": [{"text": "hmm"}]}, part("answer")]},
    ],
)
def test_reasoning_is_found_wherever_it_stands(message: dict[str, Any]) -> None:
    said = parse(USER, {"role": "assistant", **message}).messages[1]
    assert said["reasoning_content"] == "hmm"
    assert said["content"] in ("answer", [part("answer")])


def test_the_cases_of_reasoning(shared: Path) -> None:
    assert case(shared, "msg_think_tags_in_content").messages[1] == {
        "role": "assistant",
        "content": "answer",
        "reasoning_content": "hmm",
    }
    beside = case(shared, "msg_think_tags_beside_call").messages[1]
    assert (beside["reasoning_content"], beside["content"], len(beside["tool_calls"])) == ("hmm", "", 1)
    assert case(shared, "msg_reasoning_details_openrouter").messages[1]["reasoning_content"] == "hmm"


def test_think_tags_of_a_sharegpt_turn() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "<think>hmm</think>answer"}]
    row = parse_row({"conversations": turns}, "rows.jsonl:1", RowConfig())
    assert row.messages[1] == {"role": "assistant", "content": "answer", "reasoning_content": "hmm"}


def test_what_nobody_can_read_of_reasoning_is_counted() -> None:
    details = [{"type": "reasoning.encrypted", "data": "x"}]
    assert sum(parse(USER, {**DONE, "reasoning_details": details}).notes.values()) == 1
    blocks = [{"type": "redacted_thinking", "data": "x"}, part("Done.")]
    assert sum(parse(USER, {"role": "assistant", "content": blocks}).notes.values()) == 1
    summary = {"type": "reasoning", "summary": [], "encrypted_content": "x"}
    assert sum(parse(USER, {"role": "assistant", "content": [summary, part("Done.")]}).notes.values()) == 1


def test_reasoning_that_disagrees_is_refused() -> None:
    both = {"role": "assistant", "content": "<think>a</think>x", "reasoning_content": "b"}
    assert "reasoning_content and the content say different things" in refusal(USER, both)


# ---- marks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ON_MESSAGE)
def test_every_word_for_untrained_is_carried_out(key: str) -> None:
    row = parse(USER, {**CALLING, key: False}, {"role": "tool", "content": ""}, {**DONE, key: 1})
    assert [message.get("train", True) for message in row.messages] == [True, False, True, True]


@pytest.mark.parametrize("key", OFF_MESSAGE)
def test_every_word_for_left_out_is_carried_out(key: str) -> None:
    row = parse(USER, {**CALLING, key: True}, {"role": "tool", "content": ""}, {**DONE, key: 0})
    assert [message.get("train", True) for message in row.messages] == [True, False, True, True]
    assert f"`{key}` of the row is True" in refusal(USER, DONE, **{key: True})
    assert f"train and {key} disagree" in refusal(USER, {**DONE, "train": True, key: True})


@pytest.mark.parametrize(
    ("key", "value"),
    [("is_masked", True), ("mask_out", True), ("assistant_masks", [1, 0]), ("isTrainable", False), ("lossFactor", 0.5)],
)
def test_what_sounds_like_a_mark_is_asked_about(key: str, value: object) -> None:
    assert f"turn 2 (assistant): `{key}` is {value}, which may be a mark" in refusal(USER, {**DONE, key: value})
    assert f"rows.jsonl:1: `{key}` is {value}, which may be a mark" in refusal(USER, DONE, **{key: value})


def test_what_only_sounds_like_a_mark_passes() -> None:
    assert "`completion_mask` is [1, 0]" in refusal(USER, DONE, completion_mask=[1, 0])
    assert "`sample_weight` is 0.0" in refusal(USER, DONE, sample_weight=0.0)
    assert "is not known: call it weight, write train: true" in refusal(USER, DONE, sample_weight=0.5)
    harmless = {"split": "train", "training_source": "web", "num_train_tokens": 5, "constraint": 0, "token_mask": []}
    assert parse(USER, {**DONE, **harmless, "is_training": True}, **harmless).messages[1] == DONE


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("train_loss", 1.2), ("train_loss", 0.4), ("val_loss", 0.4), ("training_step", 5), ("train_tokens", 1000)),
        *(
            ("train_idx", 0),
            ("in_train", False),
            ("used_in_training", False),
            ("is_masked", False),
            ("not_masked", True),
        ),
        *(("pii_masked", True), ("train_on_inputs", False), ("mask_history", False), ("body_weight", 70)),
        *(("attention_mask", [1, 1]), ("completion_mask", [1]), ("loss", 0.31), ("train", "train")),
        *(("assistant_only_loss", True), ("train_on_responses_only", True), ("unmasked", True)),
        *(("masked", False), ("masked", [0, 0]), ("loss_mask", 1), ("train_mask", [1, 1]), ("loss_scale", 1.0)),
    ],
)
def test_columns_that_keep_nothing_out_pass(key: str, value: object) -> None:
    assert parse(USER, DONE, **{key: value}).messages[1] == DONE


@pytest.mark.parametrize(
    ("key", "value"), [("masked", 0), ("loss_mask", True), ("is_masked", False), ("train_step", 5)]
)
def test_marks_of_a_message_that_keep_nothing_out_pass(key: str, value: object) -> None:
    assert parse(USER, {**DONE, key: value}).messages[1] == DONE


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("not_masked", False),
            ("mask_history", True),
            ("turn_mask", 0),
            ("train_last_turn", True),
            ("mask_until", 3),
        ),
        *(("mask", [1, 1]), ("masked", 1), ("loss_mask", [1, 0]), ("loss_mask", 0), ("label_mask", 1)),
        *(("unmasked", False), ("loss_on_last", True)),
        *(("train_from", 3), ("sample_weight", 2), ("loss_tokens", [0, 1]), ("train", "test"), ("used_in_loss", False)),
    ],
)
def test_columns_that_may_keep_something_out_are_asked_about(key: str, value: object) -> None:
    assert f"`{key}` " in refusal(USER, DONE, **{key: value})
    assert f"`{key}` " in refusal(USER, {**DONE, key: value})


@pytest.mark.parametrize("key", UNCLEAR)
def test_marks_that_cannot_be_carried_out_are_refused_by_name(key: str) -> None:
    found = refusal(USER, {**DONE, key: [{"begin_offset": 0, "end_offset": 2, "train": False}]})
    assert f"`{key}` is " in found
    assert "cannot be carried out" in found


def test_marks_on_a_part_a_call_or_the_row(shared: Path) -> None:
    with pytest.raises(DataError, match="`train` of a part is False"):
        case(shared, "msg_part_train_false")
    with pytest.raises(DataError, match="`train_detail` is"):
        case(shared, "msg_train_detail")
    call = {"name": "f", "arguments": {}, "weight": 0}
    assert "`weight` of a call is 0" in refusal(USER, {"role": "assistant", "tool_calls": [call]})
    assert "`loss` of the row is False" in refusal(USER, DONE, loss=False)
    assert parse(USER, DONE, weight=0.5).weight == 0.5
    for weight in (0, False, -1, 2e6, "2", [1]):
        assert "`weight` of the row is " in refusal(USER, DONE, weight=weight)
    whole = [{"type": "text", "text": "Done.", "train": True}]
    assert texts(parse(USER, {"role": "assistant", "content": whole}, train=True))[1] == [part("Done.")]
    all_of_it = [{"begin_offset": 0, "end_offset": 4, "train": True}]
    assert parse(USER, {**DONE, "train_detail": all_of_it}).messages[1] == DONE


def test_a_mark_that_would_train_the_user_is_counted() -> None:
    assert sum(parse({**USER, "train": True}, DONE).notes.values()) == 1
    assert not parse({**USER, "train": False}, DONE).notes


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": ["a", "b"]}, '["a", "b"]'),
        ({"content": [{"t": 1}, {"t": 2}]}, '[{"t": 1}, {"t": 2}]'),
        ({"content": {"t": "é"}}, '{"t": "é"}'),
        ({"content": [{"type": "text", "text": "7"}]}, [part("7")]),
        ({"content": {"content": [{"type": "text", "text": "7"}], "isError": False}}, [part("7")]),
        ({"content": {"content": [{"type": "text", "text": "no"}], "isError": True}}, [part("Error: no")]),
        ({"content": [{"type": "resource", "resource": {"uri": "f:", "text": "7"}}]}, [part("7")]),
        ({"content": "no", "is_error": True}, "Error: no"),
        ({"content": "Error: no", "is_error": True}, "Error: no"),
        ({"content": "no", "status": "error"}, "Error: no"),
        ({"content": "yes", "status": "success"}, "yes"),
        ({"content": None, "isError": True}, "Error:"),
        ({"content": []}, ""),
    ],
)
def test_what_a_tool_answered(message: dict[str, Any], expected: Any) -> None:
    assert texts(parse(USER, CALLING, {"role": "tool", **message}, DONE))[2] == expected


def test_the_cases_of_results(shared: Path) -> None:
    assert texts(case(shared, "msg_res_list_of_objects"))[2] == '[{"t": 1}, {"t": 2}]'
    assert texts(case(shared, "msg_res_list_of_strings"))[2] == '["a", "b"]'


def test_a_result_of_parts_and_values_is_refused() -> None:
    mixed = {"role": "tool", "content": [{"type": "text", "text": "7"}, {"t": 1}]}
    assert "mixes parts with other values" in refusal(USER, CALLING, mixed, DONE)


# ---- calls read back -------------------------------------------------------------------------------------------------


def test_a_call_is_read_as_a_whole_or_not_at_all() -> None:
    found = read_whole_call('<|tool_call>call:f{a:<|"|>x<|"|>,n:1}<tool_call|>')
    assert found is not None
    assert (found.name, found.arguments) == ("f", {"a": "x", "n": 1})
    assert read_whole_call("<|tool_call>call:f{a<b:1}<tool_call|>") is None
    assert read_whole_call("<|tool_call>call:f{}<tool_call|>.") is None
    assert read_whole_call("call:f{}") is None
