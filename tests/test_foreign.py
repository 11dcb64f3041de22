"""Calls in the syntax of other models are attempts that cannot be read; a text that speaks of them is a text."""

import json
import time
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_dist.evaluate.foreign import holds_foreign_call
from gemma_dist.evaluate.read import read_output
from gemma_dist.report import read_jsonl

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


PIECES = [
    *'{}[]():,"`\\ \n=a1',
    *("```json\n", '{"name":', '"f"', '"arguments":', "tool_calls", "<tool_call>", "1" * 5000),
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, *CALLS]), max_size=40).map("".join))
def test_never_raises(text: str) -> None:
    assert holds_foreign_call(text) in (True, False)


UNITS = [
    *("[\n", '{"name":\n', '[1,\n"a",\n', '{"a":1}\n', '\n{"a', '{"\\"\n', '"\\', "1", "\n[1", "\n{x}", "[{"),
    *("`", "```", "```json\n", " ", "\n \n", '{"tool_calls":[', JSON_CALL, f"{JSON_CALL}\n."),
    *("<tool_call>", "<tool_call> ", "<tool_call>a", "[TOOL_CALLS]a", "<function=", "<invoke "),
    *("tool_code\n", "Action: f\n", "[f(", ")", ") ", "[f()]\n"),
]


@pytest.mark.parametrize("start", ["", "[f(", "[1,\n", '{"a":"', "Text\n"])
@pytest.mark.parametrize("unit", UNITS)
def test_time_is_linear(unit: str, start: str) -> None:
    def fastest(count: int) -> float:
        text = start + unit * count + "."
        return min(_seconds(partial(holds_foreign_call, text)) for _ in range(2))

    # 16 times the text: about 16 times the time if linear, 256 times if quadratic.
    assert fastest(16_000) < 80 * (fastest(1000) + 1e-4)


def _seconds(function: partial[bool]) -> float:
    start = time.process_time()  # of this process: other work on the machine does not count
    function()
    return time.process_time() - start
