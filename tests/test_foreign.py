"""Calls in the syntax of other models are attempts that cannot be read; a text that speaks of them is a text."""

import json
import time
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_dist.data.foreign import holds_foreign_call
from gemma_dist.data.read import Reading, read_output
from gemma_dist.evaluate.score import Score, score_decision
from gemma_dist.logs import read_jsonl
from tests.support.scoring import expecting

JSON_CALL = '{"name": "f", "arguments": {"a": 1}}'
CALLS = [
    JSON_CALL,
    '{"arguments": {"a": 1}, "name": "f"}',
    '{"name": "f", "parameters": {"a": 1}}',
    '{"name": "f", "arguments": "{\\"a\\": 1}"}',
    '{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}',
    '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]',
    '{"tool_calls": [{"name": "f", "arguments": {}}]}',
    '{"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}',
    '{"function_call": {"name": "f", "arguments": "{}"}}',
    '{"tool": "f", "args": {"a": 1}}',
    '{"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}',
    f"```json\n{JSON_CALL}\n```",
    f"```\n[{JSON_CALL}]\n```",
    f"```json {JSON_CALL}```",
    f"Let me look.\n\n```json\n{json.dumps(json.loads(JSON_CALL), indent=2)}\n```",
    'Let me look.\n{"name": "f", "arguments": {"a": "two\nlines", "n": 1e999}}',
    f"{JSON_CALL}\n{JSON_CALL}",
    f"{JSON_CALL}\nThe answer is 4.",
    "```tool_code\nprint(f(a=1))\n```",
    "Sure.\n```tool_code\nf(a=1)",
    "tool_code\nprint(default_api.f(a=1))",
    f"<tool_call>\n{JSON_CALL}\n</tool_call>",
    'Sure. <tool_call>{"name": "f"',
    "<tool_call>f\n<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>",
    "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    "<tool_call>call:f{a:1}</tool_call>",
    f"<|tool_call|>[{JSON_CALL}]",
    '<function=f>{"a": 1}</function>',
    "<function=f>\n</function>",
    '<function_calls>\n<invoke name="f">',
    '<functioncall> {"name": "f", "arguments": \'{}\'}',
    "<start_function_call>call:f{a:1}<end_function_call>",
    f"[TOOL_CALLS][{JSON_CALL}]",
    '[TOOL_CALLS] f[ARGS]{"a": 1}',
    "<|python_tag|>f.call(a=1)",
    '<|python_tag|>{"name": "f", "parameters": {}}',
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f",
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0",
    "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}",
    'Thought: look\nAction: f\nAction Input: {"a": 1}',
    "[f(a=1), g()]",
    "[f()]",
]
TEXTS = [
    '{"name": "Ann", "age": 3}',
    '[{"name": "Ann", "age": 3}, {"name": "Bo", "age": 4}]',
    '```json\n{"name": "Ann", "age": 3}\n```',
    'Here it is:\n{"user": {"name": "Ann", "arguments": {}}}',
    '{"name": "f", "arguments": ["a", "b"]}',
    '{"name": "f", "arguments": 3}',
    '{"name": "f", "arguments": "for and against"}',
    '{"name": "f"}',
    '{"name": "f", "arguments": {}, "verdict": "guilty"}',
    '{"name": "Ann Lee", "arguments": {"for": "peace"}}',
    '{"name": "f", "description": "d", "parameters": {"a": 1}}',
    '{"name": "f", "parameters": {"type": "object", "properties": {}}}',
    '{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}',
    '{"tool_calls": []}',
    '{"tool_calls": 7}',
    "[]",
    "{}",
    "[1, [2, 3]]",
    f"OpenAI writes {JSON_CALL} for a call.",
    f"The format is {JSON_CALL}",
    f"Like this:\n```json\n{JSON_CALL}\n```\nThen it waits for the answer.",
    f"Like this:\n\n{JSON_CALL}\n\nThen it waits.",
    f"Qwen writes `<tool_call>{JSON_CALL}</tool_call>`, Gemma does not.",
    "The <tool_call> tag opens a call, </tool_call> closes it (both are text).",
    "<tool_call> and <function=name> are tags of other models.",
    "Mistral has [TOOL_CALLS] for it, Llama had <|python_tag|> (before 4).",
    "A tool_code block runs Python, as in ```tool_code```.",
    "```python\nprint(f(a=1))\n```",
    '```json\n{"a": [1, 2\n```',
    "[see f(x)]",
    "[f(x) for x in y]",
    "[link](http://example.org)",
    "Action: none needed.",
    "f(a=1)",
]

# What counts where tools are declared, these or others: draw_chart is.
OPENAI_CALL = '{"id": "c1", "type": "function", "function": {"name": "draw_chart", "arguments": "{\\"x\\": 1}"}}'
DRAWN = '{"name":"draw_chart","arguments":{"x":"1"}}'
CALLS_OF_DECLARED = [
    '{"type":"tool_use","id":"x","name":"draw_chart","input":{"x":"1"}}',
    f"I will draw it now: {DRAWN}",
    f"```json\n{DRAWN}\n```\nHere is your chart.",
    f"First.\n\n{DRAWN}\n\nThen I wait.",
    OPENAI_CALL.removesuffix("}"),
    OPENAI_CALL.replace('"', "'"),
    OPENAI_CALL.replace('"', "'").removesuffix("}"),
    json.dumps({"message": OPENAI_CALL}),
    '{"action":"draw_chart","action_input":{"x":"1"}}',
    '{"draw_chart":{"x":"1"}}',
    '{"calls":[{"tool":"draw_chart","x":"1"}]}',
    '{"calls":[{"draw_chart":{"x":"1"}}]}',
    '{name: "draw_chart", arguments: {x: 1}}',
    '{"name": "functions.draw_chart", "arguments": {}}',
    '{"name":"draw_chart',
    "<tool_call>draw_chart</tool_call>",
    "<tool_call>plot</tool_call>",
    "<tool_call>",
    "I will draw it.\n<tool_call>\n",
    "Sure. <tool_call> draw_chart x=1",
    "[TOOL_CALLS]draw_chart",
    'draw_chart(x="1")',
    'Sure.\n  draw_chart(x="1")\nThere.',
    "Sure.\ndraw_chart(x)\n- a chart",
    "draw_chart(x=1): now",
    'I draw: [draw_chart(x="1")]',
    '["draw_chart(x=1)"]',
    '```python\ndraw_chart(x="1")\n```',
    '```python draw_chart(x="1")```',
    'result = draw_chart(x="1")',
    'print(default_api.draw_chart(x="1"))',
    'I draw: print(default_api.draw_chart(x="1"))',
    "Action: draw_chart\nAction Input: none",
    "Action: draw_chart(1)",
]
TEXTS_BESIDE_DECLARED = [
    'Here is the service entry:\n{"name":"web","args":{"port":80}}',
    '{"name":"web","parameters":{"port":80}}',
    '```json\n{"function": "sin", "args": {"x": 1}}\n```',
    "[sorted(key=len)]",
    "Action: restart\nAction Input: none",
    "I used draw_chart to draw it.",
    "`draw_chart(x)` was called.",
    "`print(default_api.draw_chart(x))` and `[draw_chart(x)]` do the same.",
    "I called draw_chart(x) for you.",
    "draw_chart(x) - draws a chart.",
    "My tools:\ndraw_chart(x, y): draws a chart.\n  draw_chart() – draws none.",
    "draw_chart(x: list[int] | None, title: str = 'a', y: int=1) -> str",
    "```python\ndraw_chart(x: str) -> str: ...\n```",
    "draw_chart (the tool) draws charts; draw_charts(x) does not exist.",
    "draw_chart",
    "- draw_chart: it draws {x}",
    "[draw_chart](http://example.org) is the name.",
    '{"tools": ["draw_chart"], "title": "draw_chart", "draw_chart": 7}',
    '{"name": "draw_chart of the day", "arguments": {}}',
    "Qwen writes `<tool_call>draw_chart</tool_call>`.",
    "<tool_call>, or <function_call>, opens a call.\n<tool_call> draws nothing.",
    "Action: draw_chart was called.",
]


@pytest.mark.parametrize("text", CALLS)
def test_a_foreign_call_is_an_attempt_that_cannot_be_read(text: str) -> None:
    for output in (f"{text}<turn|>", f"<|channel>thought\nhm<channel|>\n{text}\n<eos>"):
        reading = read_output(output)
        assert (reading.calls, reading.attempted, reading.status) == ((), True, "malformed")
        assert reading.content == text.strip()


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_that_speaks_of_calls_is_a_text(text: str) -> None:
    reading = read_output(f"{text}<turn|>")
    assert (reading.attempted, reading.status, reading.content) == (False, "no_call", text)


def with_draw_chart(text: str, gold: str) -> tuple[Reading, Score]:
    """The reading of this output, and its score where draw_chart is the only tool and gold calls none."""
    reading = read_output(f"{text}<turn|>", tool_names=["draw_chart"])
    return reading, score_decision(
        reading, expecting([], gold), [{"type": "function", "function": {"name": "draw_chart"}}]
    )


@pytest.mark.parametrize("text", CALLS_OF_DECLARED)
def test_a_declared_name_in_call_position_is_an_attempt(text: str) -> None:
    reading, score = with_draw_chart(text, "It is drawn.")
    assert (reading.calls, reading.attempted, reading.status) == ((), True, "malformed")
    assert (score["status"], score["right"]) == ("malformed", False)


@pytest.mark.parametrize("text", TEXTS_BESIDE_DECLARED)
def test_where_tools_are_declared_other_json_and_code_is_text(text: str) -> None:
    for gold in (text, "Another answer."):
        reading, score = with_draw_chart(text, gold)
        assert (reading.attempted, reading.status, score["status"]) == (False, "no_call", "no_call")
        assert score["right"]
        assert score["ratios"]["answer_exact"] == [gold == text, 1]


@pytest.mark.parametrize(
    "text", [f"<tool_call>{JSON_CALL}</tool_call>", "<function=g>{}", f"[TOOL_CALLS][{JSON_CALL}]"]
)
def test_a_marker_of_another_format_is_an_attempt_whatever_is_declared(text: str) -> None:
    _, score = with_draw_chart(text, "It is drawn.")
    assert score["status"] == "malformed"


@pytest.mark.parametrize("text", [*CALLS, *CALLS_OF_DECLARED, *TEXTS, "call: Ann (at home)"])
def test_an_output_equal_to_gold_is_right_whatever_it_looks_like(text: str) -> None:
    _, score = with_draw_chart(text, text)
    assert (score["status"], score["right"], score["ratios"]["answer_exact"]) == ("no_call", True, [1, 1])
    beside_a_call = read_output(f"{text}<|tool_call>call:f{{}}<tool_call|><turn|>")
    assert score_decision(beside_a_call, expecting([{"name": "f", "arguments": {}}], text), [])["right"]
    waiting = read_output(f"{text}<|tool_response>", tool_names=["draw_chart"])
    assert score_decision(waiting, expecting([], text), [])["status"] == "malformed", "gold does not wait for a tool"
    cut = read_output(text, budget_spent=True, tool_names=["draw_chart"])
    assert score_decision(cut, expecting([], text), [])["status"] == "truncated", "gold ends its turn"


@pytest.mark.parametrize("name", ["a.b", "mcp:tools:a-b", "名前", "a b#c", "f(", "x|y", "\\", "a" * 1000])
def test_a_name_is_taken_by_the_letter(name: str) -> None:
    text = json.dumps({"name": name, "arguments": {}}, ensure_ascii=False)
    assert holds_foreign_call(text.replace("\\\\", "\\"), [name, "a"])
    assert not holds_foreign_call(text, ["a", "", "xx"])


def test_thinking_of_a_foreign_call_is_a_thought() -> None:
    reading = read_output(f"<|channel>thought\n<tool_call>{JSON_CALL}</tool_call>\n<channel|>No need.<turn|>")
    assert (reading.attempted, reading.status) == (False, "no_call")


def test_no_text_of_real_trajectories_is_taken_for_a_call(shared: Path) -> None:
    num_texts = 0
    for path in (shared / "data").rglob("*.jsonl"):
        for row in read_jsonl(path):
            for message in row["messages"]:
                content = message.get("content") or []
                parts = [{"text": content}] if isinstance(content, str) else content
                for text in filter(None, (part.get("text") for part in parts)):
                    num_texts += 1
                    assert not holds_foreign_call(text), text
    assert num_texts


def test_each_answer_of_real_trajectories_is_right_against_itself(shared: Path) -> None:
    num_answers = 0
    for path in (shared / "data").rglob("*.jsonl"):
        for row in read_jsonl(path):
            tools = row.get("tools") or []
            names = [tool["function"]["name"] for tool in tools]
            for message in row["messages"]:
                content = message.get("content") or []
                text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
                if message["role"] != "assistant" or not text.strip():
                    continue
                num_answers += 1
                reading = read_output(f"{text}<turn|>", tool_names=names)
                assert not reading.attempted, text
                if not message.get("tool_calls"):
                    score = score_decision(reading, expecting([], text), tools)
                    assert score["right"], text
                    assert score["ratios"]["answer_exact"] == [1, 1], text
    assert num_answers


PIECES = [
    *'{}[]():,"`\\ \n=a1',
    *("```json\n", '{"name":', '"f"', '"arguments":', "tool_calls", "<tool_call>", "1" * 5000),
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, *CALLS, *CALLS_OF_DECLARED]), max_size=40).map("".join))
def test_never_raises(text: str) -> None:
    assert holds_foreign_call(text) in (True, False)
    assert holds_foreign_call(text, ["f", "draw_chart"]) in (True, False)


UNITS = [
    *("[\n", '{"name":\n', '[1,\n"a",\n', '{"a":1}\n', '\n{"a', '{"\\"\n', '"\\', "1", "\n[1", "\n{x}", "[{"),
    *("`", "```", "```json\n", " ", "\n \n", '{"tool_calls":[', JSON_CALL, f"{JSON_CALL}\n."),
    *("<tool_call>", "<tool_call> ", "<tool_call>a", "[TOOL_CALLS]a", "<function=", "<invoke "),
    *("tool_code\n", "Action: f\n", "[f(", ")", ") ", "[f()]\n", "a: b, ", "[g(a: b, "),
    *(
        "[ ",
        "print( ",
        "tools.",
        "-tools.",
        "/functions.",
        "await ",
        "{ ",
        ", ",
        "{\n\n",
        '"name" ',
        '"name":',
        '\\"name\\',
        '{f"',
        "f",
        "f.",
        "a = ",
    ),
]


@pytest.mark.parametrize("start", ["", "[f(", "[1,\n", '{"a":"', "Text\n"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("names", [(), ("g", "ff"), ("zz",)], ids=["none declared", "declared", "named"])
def test_time_is_linear(unit: str, start: str, names: tuple[str, ...]) -> None:
    def fastest(count: int) -> float:
        text = start + unit * count + ". zz"
        return min(_seconds(partial(holds_foreign_call, text, names)) for _ in range(2))

    # 16 times the text: about 16 times the time if linear, 256 times if quadratic.
    assert fastest(16_000) < 80 * (fastest(1000) + 1e-4)


def _seconds(function: partial[bool]) -> float:
    start = time.process_time()  # of this process: other work on the machine does not count
    function()
    return time.process_time() - start
