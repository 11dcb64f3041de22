"""Calls written as text, in the syntax of other models, mean the same as `tool_calls`; what is unclear is refused."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from gemma_dist.config import RowConfig
from gemma_dist.data.foreign import holds_foreign_call
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.data.types import Json
from gemma_dist.errors import DataError

SCHEMA: dict[str, Json] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
}
FUNCTION: dict[str, Json] = {"name": "weather", "description": "Tells.", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]
ROME = {"city": "Rome", "days": 2}
OSLO = {"city": "Oslo"}


def parse(row: Any) -> Trajectory:
    return parse_row(row, "chats.jsonl:2", RowConfig())


def refusal(row: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse(row)
    return str(caught.value)


def answer_row(text: Any, tools: Any = TOOLS, **message: Any) -> dict[str, Any]:
    """A row in which the assistant says `text` to a user."""
    messages = [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": text, **message}]
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def calls_of(trajectory: Trajectory) -> list[tuple[str, dict[str, Json]]]:
    """Name and arguments of all calls."""
    calls: list[tuple[str, dict[str, Json]]] = []
    for message in trajectory.messages:
        functions = [call["function"] for call in message.get("tool_calls", [])]
        calls += [(function["name"], function["arguments"]) for function in functions]
    return calls


def said(trajectory: Trajectory) -> list[tuple[str, Any]]:
    """Role and content of all messages that say something."""
    return [(message["role"], message["content"]) for message in trajectory.messages if message["content"]]


JSON_CALL = '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}'
ONE_CALL = {
    "Hermes": f"<tool_call>\n{JSON_CALL}\n</tool_call>",
    "Hermes, Python": "<tool_call>\n{'name': 'weather', 'arguments': {'city': 'Rome', 'days': 2}}\n</tool_call>\n",
    "Hermes, arguments first": "<tool_call>{'arguments': {'city': 'Rome', 'days': 2}, 'name': 'weather'}</tool_call>",
    "Hermes, arguments as text": f"""<tool_call>{{"name": "weather", "arguments": {json.dumps(json.dumps(ROME))}}}""",
    "Hermes, not closed": f"<tool_call>\n{JSON_CALL}",
    "Hermes, end token": f"<tool_call>\n{JSON_CALL}\n</tool_call><|im_end|>",
    "OpenAI's wrapper": f'<tool_call>{{"type": "function", "function": {JSON_CALL}}}</tool_call>',
    "plural": f"<tool_calls>\n<tool_call>{JSON_CALL}</tool_call>\n</tool_calls>",
    "glaive": """<functioncall> {"name": "weather", "arguments": '{"city": "Rome", "days": 2}'} <|endoftext|>""",
    "glaive, JSON": f"<functioncall> {JSON_CALL} <|endoftext|>",
    "When2Call": f"<TOOLCALL>[{JSON_CALL}]</TOOLCALL>",
    "ToolACE": '[weather(city="Rome", days=2)]',
    "Mistral": f"[TOOL_CALLS] [{JSON_CALL}]",
    "Mistral, ARGS": '[TOOL_CALLS]weather[ARGS]{"city": "Rome", "days": 2}',
    "Llama": '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome", "days": 2}}<|eom_id|>',
    "Llama 4": "<|python_start|>[weather(city='Rome', days=2)]<|python_end|>",
    "Granite": f"<|tool_call|>[{JSON_CALL}]<|end_of_text|>",
    "Llama, tag": '<function=weather>{"city": "Rome", "days": 2}</function>',
    "Llama, bare": '{"name": "weather", "parameters": {"city": "Rome", "days": 2}}',
    "Llama, type": '{"type": "function", "name": "weather", "parameters": {"city": "Rome", "days": 2}}',
    "JSON in a fence": f"```json\n{JSON_CALL}\n```",
    "Qwen Coder": "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n"
    "</parameter>\n</function>\n</tool_call>",
    "GLM": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>2</arg_value>\n</tool_call>",
    "Claude": '<function_calls>\n<invoke name="weather">\n<parameter name="city">Rome</parameter>\n'
    '<parameter name="days">2</parameter>\n</invoke>\n</function_calls>',
    "Gemma 3": "```tool_code\nweather(city='Rome', days=2)\n```",
    "Gemma 3, print": "```tool_code\nprint(default_api.weather(city='Rome', days=2))\n```",
    "LFM2": "<|tool_call_start|>[weather(city='Rome', days=2)]<|tool_call_end|>",
    "LFM2, JSON": f"<|tool_call_start|>[{JSON_CALL}]<|tool_call_end|><|im_end|>",
    "InternLM": f"<|action_start|><|plugin|>\n{JSON_CALL.replace('arguments', 'parameters')}<|action_end|>",
    "Command R": f"Action: ```json\n[\n{json.dumps({'tool_name': 'weather', 'parameters': ROME}, indent=4)}\n]\n```",
    "Command R7B": f"<|START_ACTION|>[{json.dumps({'tool_call_id': '0', 'tool_name': 'weather', 'parameters': ROME})}]"
    "<|END_ACTION|>",
    "Phi": f"functools[{JSON_CALL}]",
    "Qwen-Agent": '✿FUNCTION✿: weather\n✿ARGS✿: {"city": "Rome", "days": 2}\n✿RESULT✿',
    "Gorilla": '<<function>>weather(city="Rome", days=2)',
    "Cline": "<weather>\n<city>Rome</city>\n<days>2</days>\n</weather>",
    "DeepSeek V3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "Rome", "days": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
    "DeepSeek V3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
    '{"city": "Rome", "days": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "Kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    '{"city": "Rome", "days": 2}<|tool_call_end|><|tool_calls_section_end|>',
    "LangChain": '{"action": "weather", "action_input": {"city": "Rome", "days": 2}}',
    "tool_input": '{"tool": "weather", "tool_input": {"city": "Rome", "days": 2}}',
    "function": '{"function": "weather", "arguments": {"city": "Rome", "days": 2}}',
    "input": '{"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "Rome", "days": 2}}',
    "a message": f'{{"tool_calls": [{JSON_CALL}]}}',
    "Python alone": "weather(city='Rome', days=2)",
}


@pytest.mark.parametrize("text", ONE_CALL.values(), ids=ONE_CALL)
def test_one_call_as_text_is_a_call(text: str) -> None:
    trajectory = parse(answer_row(text))
    assert calls_of(trajectory) == [("weather", ROME)]
    assert said(trajectory) == [("user", "Rome?")]
    assert [note for note in trajectory.notes if note.startswith("rows with calls written as text (")]


OSLO_CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
TWO_CALLS = {
    "Hermes": f"<tool_call>\n{JSON_CALL}\n</tool_call>\n<tool_call>\n{OSLO_CALL}\n</tool_call>",
    "Hermes, lines": f"<tool_call>\n{JSON_CALL}\n{OSLO_CALL}\n</tool_call>",
    "When2Call": f"<TOOLCALL>[{JSON_CALL}, {OSLO_CALL}]</TOOLCALL>",
    "ToolACE": "[weather(city='Rome', days=2), weather(city='Oslo')]",
    "Mistral": '[TOOL_CALLS]weather{"city": "Rome", "days": 2}[TOOL_CALLS]weather{"city": "Oslo"}',
    "Llama": f'<|python_tag|>{JSON_CALL}; {{"name": "weather", "parameters": {{"city": "Oslo"}}}}',
    "Gemma 3": "```tool_code\nweather(city='Rome', days=2)\nweather(city='Oslo')\n```",
}


@pytest.mark.parametrize("text", TWO_CALLS.values(), ids=TWO_CALLS)
def test_several_calls_are_calls_of_one_message(text: str) -> None:
    trajectory = parse(answer_row(text))
    assert calls_of(trajectory) == [("weather", ROME), ("weather", OSLO)]
    assert len(trajectory.messages) == 2


def test_text_before_the_calls_stays() -> None:
    trajectory = parse(answer_row(f"I look.\n\n<tool_call>\n{JSON_CALL}\n</tool_call>"))
    assert said(trajectory) == [("user", "Rome?"), ("assistant", "I look.")]
    assert calls_of(trajectory) == [("weather", ROME)]


BEHIND_WORDS = {
    "I call:": "I call: [weather(city='Rome', days=2)]",
    "Sure:": f"Sure:\n```json\n{JSON_CALL}\n```",
    "Calling": f"Calling {JSON_CALL}",
    "I see.": "I see.\nweather(city='Rome', days=2)",
    "I [1] look:": "I [1] look: print(default_api.weather(city='Rome', days=2))",
    "It's {x}, so": f"It's {{x}}, so {json.dumps({'action': 'weather', 'action_input': ROME})}",
    "Let me.": "Let me.\n<weather>\n<city>Rome</city>\n<days>2</days>\n</weather>",
    "Hm.": f"Hm.\nAction: ```json\n[{JSON_CALL}]\n```",
}


@pytest.mark.parametrize(("before", "text"), BEHIND_WORDS.items())
def test_a_call_of_a_declared_tool_behind_words_is_a_call(before: str, text: str) -> None:
    trajectory = parse(answer_row(text))
    assert calls_of(trajectory) == [("weather", ROME)]
    assert said(trajectory)[1:] == [("assistant", before)]


LIKE_CALLS = {
    "code in a fence": "```js\nconst r = await weather('/api')\n```\nThis works.",
    "code between tildes": "~~~js\nweather('/api')\n~~~\nThis works.",
    "code in a list": "1. Write:\n   ```js\n   weather('/api')\n   ```\n2. Done.",
    "code alone": "```js\nweather('/api')\n```",
    "a definition": "Sure:\n```python\ndef weather(city):\n    return 20\n\nprint(weather('Rome'))\n```",
    "a definition alone": "```python\ndef weather(city):\n    return 20\n\nprint(weather('Rome'))\n```",
    "an expression": "So:\n```python\ntotal = weather(values)\n```",
    "Go": "```go\nfunc main() {\n    weather()\n}\n```",
    "words behind": "```python\nweather(city='Rome')\n```\nThat tells you.",
    "a route": '{"tool": "weather", "why": "x"}',
    "a plan": 'My plan:\n```json\n[{"step": 1, "tool": "weather", "why": "x"}]\n```\nOk?',
    "a span": 'It says {"type": "span", "name": "weather", "ms": 3}.',
    "servers": '{"mcpServers": {"weather": {"command": "uvx"}}}',
    "descriptions": '[{"name": "weather", "description": "Tells."}]',
    "a traceback": 'Traceback:\n  File "main.py", line 3, in <module>\n    weather()\nValueError: x',
    "its own tools": "I have:\nweather(city) - tells.\nweather(city: str, days: int = 2) -> str\nweather(): tells.",
    "markup": "```xml\n<weather><cmd>ls</cmd></weather>\n```",
    "markup alone": "<weather><tspan>hi</tspan></weather>",
}


@pytest.mark.parametrize("text", LIKE_CALLS.values(), ids=LIKE_CALLS)
def test_code_and_data_with_the_name_of_a_tool_are_text(text: str) -> None:
    trajectory = parse(answer_row(text))
    assert said(trajectory)[1] == ("assistant", text)
    assert calls_of(trajectory) == []
    assert not trajectory.notes


PYTHON_BEHIND_WORDS = "Well.\n```python\nweather(city='Rome', days=2)\n```"


def test_python_in_a_fence_behind_words_is_a_call_where_a_result_follows() -> None:
    row = answer_row(PYTHON_BEHIND_WORDS)
    assert "it may be an example as well; an example has words behind it; write it under `tool_calls`" in refusal(row)
    answer = {"role": "assistant", "content": "So."}
    row["messages"][2:] = [{"role": "tool", "content": "20"}, answer]
    assert calls_of(parse(row)) == [("weather", ROME)]
    assert said(parse(row))[1] == ("assistant", "Well.")
    row["messages"][2:] = [{"role": "user", "content": "Thanks."}, answer]
    assert calls_of(parse(row)) == []
    assert said(parse(row))[1] == ("assistant", PYTHON_BEHIND_WORDS)


ATTEMPTS = [
    "```json\n" + JSON_CALL + "\n```\nHere it is.",
    f"First {JSON_CALL}, then {JSON_CALL}",
    JSON_CALL.removesuffix("}") + "  ",
    json.dumps(json.dumps(JSON_CALL)),
    '{"name": "weather", "city": "Rome"}',
    '{"weather": {"city": "Rome"}}',
    '{"calls": [{"tool": "weather", "city": "Rome"}]}',
    '{name: "weather", arguments: {city: "Rome"}}',
    "Sure. <tool_call> weather city=Rome",
    "[TOOL_CALLS]weather",
    "I look.\nweather('Rome')",
    "Sure.\nweather(city='Rome')\nThere.",
    "Use `weather`: [weather(city='Rome')].",
    "<weather><city>Rome</city>",
    "<weather><city>Rome</city><town>Rome</town></weather>",
    'Sure.\n```json\n{"name": "weather", "arguments": {"city": \n```',
    "Sure.\n```\nI call\n{'name': 'weather', 'arguments': {'city': 'Rome'}}\n```",
    "Sure.\n```python\nweather('Rome')\n```",
    "Action: weather\nThen Rome.",
]


@pytest.mark.parametrize("text", ATTEMPTS)
def test_an_attempt_that_evaluation_would_see_is_refused(text: str) -> None:
    message = refusal(answer_row(text))
    assert STYLE in message
    assert message.endswith(REMEDY)
    assert holds_foreign_call(text, ["weather"])
    assert said(parse(answer_row(text, train=False) | {"messages": _untrained(text)}))[1] == ("assistant", text)


def _untrained(text: str) -> list[dict[str, Any]]:
    """A user's question and a mistake, and the same question with an answer."""
    user = {"role": "user", "content": "Rome?"}
    mistake = {"role": "assistant", "content": text, "train": False}
    return [user, mistake, user, {"role": "assistant", "content": "Warm."}]


def test_what_looks_like_a_call_of_another_tool_is_counted() -> None:
    trajectory = parse(answer_row("Sure. [clock(zone='Rome')]"))
    assert said(trajectory)[1] == ("assistant", "Sure. [clock(zone='Rome')]")
    assert trajectory.notes == {
        "assistant texts that end like a call, [name(argument=value)], of a tool that is not declared were kept": 1
    }


def test_a_call_that_is_only_thought_of_is_none() -> None:
    thought = f"<think>\n<tool_call>{JSON_CALL}</tool_call>?\n</think>\n\n"
    assert calls_of(parse(answer_row(thought + "It is warm."))) == []
    assert calls_of(parse(answer_row(f"{thought}<tool_call>{JSON_CALL}</tool_call>"))) == [("weather", ROME)]


VALUES = {
    '"it\'s, (so) [ok]"': "it's, (so) [ok]",
    "'a=b'": "a=b",
    "[1, 2.5, {'a': None}]": [1, 2.5, {"a": None}],
    '{"deep": [true, false, null]}': {"deep": [True, False, None]},
    "-3": -3,
    "True": True,
    "''": "",
}


@pytest.mark.parametrize(("written", "value"), VALUES.items())
def test_values_of_python_calls(written: str, value: Json) -> None:
    tools = [{"type": "function", "function": {"name": "f/g", "description": ""}}]
    assert calls_of(parse(answer_row(f"[f/g(x={written}, from=1), f/g()]", tools))) == [
        ("f/g", {"x": value, "from": 1}),
        ("f/g", {}),
    ]


TAGS_INSIDE = {
    "closing": '<tool_call>{"name": "weather", "arguments": {"city": "a</tool_call>b"}}</tool_call>',
    "closing, Python": "<tool_call>{'name': 'weather', 'arguments': {'city': 'a</tool_call>b'}}</tool_call>",
    "plural": '<tool_calls>[{"name": "weather", "arguments": {"city": "a</tool_calls>b"}}]</tool_calls>',
    "opening": '<tool_call>{"name": "weather", "arguments": {"city": "a<tool_call>b"}}',
    "behind a quote": '<tool_call>{"name": "weather", "arguments": {"city": "\\"</tool_call>b"}}</tool_call>',
}


@pytest.mark.parametrize("text", TAGS_INSIDE.values(), ids=TAGS_INSIDE)
def test_tags_inside_of_strings_are_part_of_the_strings(text: str) -> None:
    [(_, first), (_, second)] = calls_of(parse(answer_row(f"{text}\n<tool_call>{OSLO_CALL}</tool_call>")))
    assert str(first["city"]).strip('a"').endswith(("</tool_call>b", "</tool_calls>b", "<tool_call>b"))
    assert second == OSLO


def test_nulls_of_calls_as_text_are_the_rows_own() -> None:
    schema = {"type": "object", "properties": {"unit": {"type": ["string", "null"]}}}
    tools = [{"name": "weather", "parameters": schema}]
    for text in (
        '<tool_call>{"name": "weather", "arguments": {"unit": null}}</tool_call>',
        "<tool_call>{'name': 'weather', 'arguments': {'unit': None}}</tool_call>",
        "[weather(unit=None)]",
    ):
        assert calls_of(parse(answer_row(text, tools))) == [("weather", {"unit": None})]
    unfit = '<tool_call>{"name": "weather", "arguments": {"city": null}}</tool_call>'
    assert "city: null is not of type 'string'" in refusal(answer_row(unfit))


def test_the_schema_says_what_the_text_of_xml_is() -> None:
    text = "<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n</function>\n</tool_call>"
    assert calls_of(parse(answer_row(text))) == [("weather", {"city": "12"})]
    assert "no declaration says whether that is text; declare its type" in refusal(answer_row(text, tools=None))


# ---- what is no call, and what is refused ----------------------------------------------------------------------------

NO_CALLS = {
    "in backticks": (f"Hermes writes `<tool_call>{JSON_CALL}</tool_call>`.", TOOLS),
    "a word": ("The model puts <tool_call> tags around it.", TOOLS),
    "an example without tools": (f"A call looks like this:\n<tool_call>{JSON_CALL}</tool_call>", None),
    "an explanation without tools": (f"<tool_call>{JSON_CALL}</tool_call> is how Hermes writes it.", None),
    "declarations": (f"I have these:\n[{json.dumps(FUNCTION)}]\nAsk.", TOOLS),
    "data of another name": ('{"name": "Bob", "arguments": {"a": 1}}', TOOLS),
    "a declaration": (json.dumps(FUNCTION), TOOLS),
    "JSON without tools": (JSON_CALL, None),
    "Python without tools": ("[weather(city='Rome')]", None),
    "code": ("weather(city) tells the weather of a city.", TOOLS),
    "a list": ("[1, 2, 3]", TOOLS),
    "a citation": ("[1] says so (see weather(1)).", TOOLS),
}


@pytest.mark.parametrize(("text", "tools"), NO_CALLS.values(), ids=NO_CALLS)
def test_words_about_calls_and_data_stay_text(text: str, tools: Any) -> None:
    trajectory = parse(answer_row(text, tools))
    assert trajectory.messages[-1] == {"role": "assistant", "content": text}
    assert not trajectory.notes


def test_a_call_without_tools_and_answer_is_one_at_the_end_alone() -> None:
    row = answer_row(f"<tool_call>{JSON_CALL}</tool_call>", tools=None)
    assert calls_of(parse(row)) == [("weather", ROME)]
    row["messages"] += [{"role": "user", "content": "Is that Hermes?"}, {"role": "assistant", "content": "Yes."}]
    assert calls_of(parse(row)) == []


STYLE = "turn 2 (assistant): writes a call as text in the style of"
REMEDY = "write it under `tool_calls`, or set train: false on the message if it shows a mistake"
REFUSED = {
    "text behind": (f"<tool_call>{JSON_CALL}</tool_call> Done.", f"{STYLE} Hermes, which cannot be converted: 'Done.'"),
    "tags alone": ("<tool_call>" * 10_000, f"{STYLE} Hermes, which cannot be converted: no call stands in it"),
    "broken JSON": ('<tool_call>{"name": "weather", "arg', f"{STYLE} Hermes, which cannot be converted: not JSON at"),
    "a key twice": (
        '<tool_call>{"name": "weather", "arguments": {"city": "Rome", "city": "Oslo"}}</tool_call>',
        "the key 'city' stands twice",
    ),
    "positional": ("[weather('Rome')]", "the argument \"'Rome'\" is written without its name; write name=value"),
    "an argument twice": ("[weather(city='Rome', city='Oslo')]", "the argument 'city' stands twice"),
    "a variable": ("[weather(city=place)]", "argument city: 'place' is neither JSON nor a Python literal"),
    "an expression": ("[weather(city=f'{x}')]", "is neither JSON nor a Python literal"),
    "a nested call": ("[weather(city=first(places='x'))]", "is neither JSON nor a Python literal"),
    "an apostrophe": (
        "<tool_call>{'name': 'weather', 'arguments': {'city': 'Rome's'}}</tool_call>",
        "{'city': 'Rome's'}}\"; write it as JSON, or a backslash in front of an apostrophe inside of a string",
    ),
    "code": ("<|python_tag|>import os", f"{STYLE} Llama"),
    "undeclared": (
        '<tool_call>{"name": "wether", "arguments": {}}</tool_call>',
        "calls wether, which `tools` does not",
    ),
    "undeclared in Python": ("[wether(city='Rome')]", "calls wether, which `tools` does not declare"),
    "misfit": ("[weather(days='two')]", "call of weather: the arguments do not fit the tool's schema"),
    "JSON and text": (f"{JSON_CALL}\nI called it.", f"{STYLE} JSON"),
    "ReAct": ('Thought: hm\nAction: weather\nAction Input: {"city": "Rome"}', f"{STYLE} ReAct"),
    "an example in a fence": (f"Like this:\n```\n<tool_call>\n{JSON_CALL}\n</tool_call>\n```\nThat is all.", STYLE),
    "FunctionGemma": (
        "<start_function_call>call:weather{}<end_function_call>",
        f"{STYLE} FunctionGemma, which cannot be converted: no complete call can be read from '<start_function_call>",
    ),
    "gpt-oss": (
        '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}<|call|>',
        f"{STYLE} gpt-oss, which cannot be converted: no complete call can be read from '<|channel|>",
    ),
    "ReAct, numbered": ("Thought 1: hm\nAction 1: weather[Rome]", f"{STYLE} ReAct"),
    "ReAct, Python": ("Action: weather(city='Rome')", f"{STYLE} ReAct"),
    "DeepSeek": ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function", STYLE),
    "Gemma's own": ("<|tool_call>call:weather{}<tool_call|>", "the control token <|tool_call>"),
}


@pytest.mark.parametrize(("text", "words"), REFUSED.values(), ids=REFUSED)
def test_an_attempt_that_cannot_be_converted_is_refused(text: str, words: str) -> None:
    message = refusal(answer_row(text))
    assert message.startswith("chats.jsonl:2: turn 2 (assistant): ")
    assert words in message
    if STYLE in message:
        assert message.endswith(REMEDY)


HUGE = {
    "spaces": "x" + " " * 50_000 + "y",
    "backticks": "`" * 50_000 + "<tool_call>" * 5_000,
    "single backticks": "` " * 30_000,
    "brackets": "[" * 30_000 + "weather(",
    "JSON lines": '{"name": "weather"}\n' * 5_000,
    "calls in words": "I call: [weather(city=1) " * 5_000 + ")",
    "objects in words": 'Calling {"name": "weather", ' * 5_000 + "}",
    "JSON data": '{"tool": "weather", "why": "x"}\n' * 5_000,
    "fences of code": "```js\nweather()\n```\n" * 5_000,
    "markup": "<weather><b>" * 5_000 + "</weather>" * 5_000,
    "tags of a tool": "<weather><city>" * 5_000 + ">",
    "Kimi": "<|tool_calls_section_begin|><|tool_call_begin|>" * 5_000,
    "fences": "```json\n" * 5_000 + JSON_CALL + "x```",
    "thoughts": "<think>a</think>" * 10_000 + "b",
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_long_texts_take_no_time(text: str) -> None:
    start = time.process_time()
    with contextlib.suppress(DataError):
        assert calls_of(parse(answer_row(text))) == []
    assert time.process_time() - start < 5


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"exclude_from_loss": True}, {"no_train": 1}])
def test_a_mistake_that_is_not_trained_stays_as_it_is(mark: dict[str, Any]) -> None:
    row = answer_row(f"<tool_call>{JSON_CALL}</tool_call> Done.", **mark)
    row["messages"] += [{"role": "user", "content": "Again."}, {"role": "assistant", "content": "Yes."}]
    assert said(parse(row))[1] == ("assistant", f"<tool_call>{JSON_CALL}</tool_call> Done.")


def test_a_call_twice_is_refused() -> None:
    call = {"function": {"name": "weather", "arguments": ROME}}
    row = answer_row(f"<tool_call>{JSON_CALL}</tool_call>", tool_calls=[call])
    assert "holds `tool_calls` and writes a call as text, too, in the style of Hermes" in refusal(row)


def test_a_tool_name_with_blanks_is_named() -> None:
    tools = [{"name": "Market Trends API", "parameters": {"type": "object", "properties": {}}}]
    assert "the tool name 'Market Trends API' cannot be represented" in refusal(
        answer_row('[Market Trends API(trend="x")]', tools)
    )


# ---- whole rows of the public sets -----------------------------------------------------------------------------------

LISTED = json.dumps(TOOLS)
BARE = json.dumps(FUNCTION)
HERMES = (
    "You are a function calling AI model. You are provided with function signatures within <tools> </tools> XML tags. "
    "You may call one or more functions to assist with the user query. Don't make assumptions about what values to "
    f"plug into functions.\n<tools>\n{TOOLS}\n</tools>\nFor each function call return a JSON object, with the "
    "following pydantic model json schema:\n{'title': 'FunctionCall', 'type': 'object', 'properties': {'name': "
    "{'title': 'Name', 'type': 'string'}, 'arguments': {'title': 'Arguments', 'type': 'object'}}, 'required': "
    "['name', 'arguments']}\nEach function call should be enclosed within <tool_call> </tool_call> XML tags.\n"
    "<tool_call>\n{'arguments': <args-dict>, 'name': <function-name>}\n</tool_call>"
)
QWEN = (
    "Be kind.\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
    f"function signatures within <tools></tools> XML tags:\n<tools>\n{json.dumps(TOOLS[0])}\n</tools>\n\nFor each "
    "function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
TOOLACE = (
    "You are an expert in composing functions. You are given a question and a set of possible functions. \nBased on "
    "the question, you will need to make one or more function/tool calls to achieve the purpose.\nIf none of the "
    "function can be used, point it out. If the given question lacks the parameters required by the function,\nalso "
    "point it out. You should only return the function call in tools call sections.\nHere is a list of functions in "
    f"JSON format that you can invoke:\n[{BARE}]. \nShould you decide to return the function call(s). \nPut it in the "
    "format of [func1(params_name=params_value, params_name2=params_value2...), func2(params)]\n\nNO other text MUST "
    "be included. \n"
)
GLAIVE = (
    "You are a helpful assistant with access to the following functions. Use them if required -\n"
    f"{json.dumps(FUNCTION, indent=4)}\n"
)
NEMOTRON = (
    f"You can use the following tools to assist the user if required:\n<AVAILABLE_TOOLS>[{BARE}]</AVAILABLE_TOOLS>\n\n"
    'If you decide to call any tool(s), use the following format:\n<TOOLCALL>[{"name": "tool_name1", "arguments": '
    '"tool_args1"}]</TOOLCALL>\n\nThe user will execute tool-calls and return responses from tool(s) in this format:\n'
    '<TOOL_RESPONSE>[{"response": "tool_response1"}]</TOOL_RESPONSE>\n\nAnswer.'
)
SYSTEMS = {
    "Hermes": (
        HERMES,
        "You are a function calling AI model. You may call one or more functions to assist with the user query. Don't "
        "make assumptions about what values to plug into functions.",
    ),
    "Qwen": (QWEN, "Be kind.\n\nYou may call one or more functions to assist with the user query."),
    "ToolACE": (
        TOOLACE,
        "You are an expert in composing functions. You are given a question and a set of possible functions. \nBased "
        "on the question, you will need to make one or more function/tool calls to achieve the purpose.\nIf none of "
        "the function can be used, point it out. If the given question lacks the parameters required by the function,"
        "\nalso point it out.",
    ),
    "glaive": (GLAIVE, "You are a helpful assistant."),
    "Nemotron": (NEMOTRON, "Answer."),
    "a label": (f"Be kind.\nfuncs: {BARE}", "Be kind."),
    "nothing else": (f"<tools>[{BARE}]</tools>", None),
}


@pytest.mark.parametrize(("system", "left"), SYSTEMS.values(), ids=SYSTEMS)
@pytest.mark.parametrize("beside", [None, "[]", LISTED])
def test_declarations_in_the_system_text_are_the_tools(system: str, left: str | None, beside: Any) -> None:
    row = answer_row("[weather(city='Rome')]", beside)
    row["messages"].insert(0, {"role": "system", "content": system})
    trajectory = parse(row)
    assert calls_of(trajectory) == [("weather", {"city": "Rome"})]
    assert [tool["function"]["name"] for tool in trajectory.tools] == ["weather"]
    assert trajectory.tools[0]["function"]["parameters"] == SCHEMA
    systems = [message["content"] for message in trajectory.messages if message["role"] == "system"]
    assert systems == ([left] if left else [])


OTHER_LISTS: dict[str, Any] = {
    "one more": [*TOOLS, {"name": "clock", "parameters": {"type": "object", "properties": {}}}],
    "another": [{"name": "clock", "parameters": {"type": "object", "properties": {}}}],
    "another schema": [{**FUNCTION, "parameters": {"type": "object", "properties": {}}}],
    "another description": [{**FUNCTION, "description": "Says."}],
}


@pytest.mark.parametrize("listed", OTHER_LISTS.values(), ids=OTHER_LISTS)
def test_a_list_in_the_system_text_beside_other_tools_is_refused(listed: Any) -> None:
    row = answer_row("Yes.")
    row["messages"].insert(0, {"role": "system", "content": f"<tools>{json.dumps(listed)}</tools>"})
    message = refusal(row)
    assert "turn 1 (system): the text lists other tools than `tools` declares; they differ in " in message
    assert message.endswith("keep one of the two lists, or make them equal")


LONG_SYSTEMS = {
    "brackets": "[" * 60_000 + '"name"',
    "braces": "{" * 60_000 + '"name"',
    "nested lists": '[{"name":"a"}, ' * 70_000,
    "nested objects": '{"name": ' * 120_000,
    "tags": "<tools>" * 60_000,
    "broken": '{"name" ' * 60_000,
    "many values": '{"name": "a"} ' * 30_000,
}


@pytest.mark.parametrize("system", LONG_SYSTEMS.values(), ids=LONG_SYSTEMS)
def test_long_system_texts_take_no_time(system: str) -> None:
    row = answer_row("Yes.", None)
    row["messages"].insert(0, {"role": "system", "content": system})
    start = time.process_time()
    assert said(parse(row))[0] == ("system", system)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("listed", [f"[{BARE},]", f"[{BARE}", f"[see {BARE}]", f"] {BARE}"])
def test_a_list_that_is_no_json_lists_tools_all_the_same(listed: str) -> None:
    row = answer_row("Yes.", None)
    row["messages"].insert(0, {"role": "system", "content": f"Given the following functions, answer: {listed}"})
    assert [tool["function"]["name"] for tool in parse(row).tools] == ["weather"]


@pytest.mark.parametrize("system", [HERMES, QWEN, TOOLACE, GLAIVE, NEMOTRON])
def test_declarations_are_taken_from_rows_without_calls_too(system: str) -> None:
    row = answer_row("I cannot do that.", None)
    row["messages"].insert(0, {"role": "system", "content": system})
    trajectory = parse(row)
    assert [tool["function"]["name"] for tool in trajectory.tools] == ["weather"]
    assert trajectory.notes == {"rows whose system text listed their tools: the list was moved to `tools`": 1}


def test_json_in_a_system_text_of_a_row_without_calls_stays() -> None:
    row = answer_row("Yes.", None)
    row["messages"].insert(0, {"role": "system", "content": f"You document {BARE}."})
    assert said(parse(row))[0] == ("system", f"You document {BARE}.")


HERMES_CALLS = (
    "<tool_call>\n{'name': 'weather', 'arguments': {'city': 'Rome'}}\n</tool_call>\n"
    "<tool_call>\n{'name': 'weather', 'arguments': {'city': 'Oslo'}}\n</tool_call>"
)
RESULTS = {
    "Hermes": [
        (
            "tool",
            '<tool_response>\n{"name": "weather", "content": {"t": 20}}\n</tool_response>\n<tool_response>\n'
            '{"name": "weather", "content": "30"}\n</tool_response>\n',
        )
    ],
    "Hermes, two turns": [
        ("tool", '<tool_response>\n{"name": "weather", "content": {"t": 20}}\n</tool_response>'),
        ("tool", '<tool_response>\n{"name": "weather", "content": "30"}\n</tool_response>'),
    ],
    "Qwen, from the user": [
        ("human", '<tool_response>\n{"t": 20}\n</tool_response>\n<tool_response>\n30\n</tool_response>')
    ],
    "ToolACE": [("tool", '[{"name": "weather", "results": {"t": 20}}, {"name": "weather", "results": 30}]')],
    "Nemotron": [("user", '<TOOL_RESPONSE>[{"t": 20}, 30]</TOOL_RESPONSE>')],
    "glaive": [("user", 'FUNCTION RESPONSE: {"t": 20}'), ("user", "FUNCTION RESPONSE: 30")],
    "plain": [("observation", '{"t": 20}'), ("observation", "30")],
}


@pytest.mark.parametrize("results", RESULTS.values(), ids=RESULTS)
def test_results_answer_the_calls(results: list[tuple[str, str]]) -> None:
    turns = [("human", "Rome, Oslo?"), ("gpt", HERMES_CALLS), *results, ("gpt", "20 and 30 degrees.")]
    conversations = [{"from": source, "value": value} for source, value in turns]
    messages = parse({"conversations": conversations, "tools": LISTED}).messages
    answers = [(message["tool_call_id"], message["content"]) for message in messages if message["role"] == "tool"]
    assert answers == [("call_0", '{"t": 20}'), ("call_1", "30")]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "assistant"]


def test_results_by_name_and_what_the_user_says_behind_them() -> None:
    tools = [{"name": name, "parameters": {"type": "object"}} for name in ("f", "g")]
    row = answer_row("[f(a=1), g()]", tools)
    results = '[{"name": "g", "results": "second"}, {"name": "f", "results": "first"}]'
    row["messages"] += [
        {"role": "tool", "content": results},
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "So."},
    ]
    answers = [message for message in parse(row).messages if message["role"] == "tool"]
    assert [(answer["name"], answer["content"]) for answer in answers] == [("g", "second"), ("f", "first")]
    row["messages"][2:4] = [
        {"role": "user", "content": "<tool_response>1</tool_response>\n<tool_response>2</tool_response>\nWell?"}
    ]
    assert said(parse(row))[1:] == [("tool", "1"), ("tool", "2"), ("user", "Well?"), ("assistant", "So.")]


WRONG_RESULTS = {
    '<tool_response>{"name": "weather", "content": 20}</tool_response>': "turn 3 (tool): holds 1 results for 2 calls",
    '[{"t": 20}, {"t": 30}, {"t": 40}]': "turn 3 (tool): holds 1 results for 2 calls (weather, weather)",
}


@pytest.mark.parametrize(("result", "words"), WRONG_RESULTS.items())
def test_too_few_results_are_refused(result: str, words: str) -> None:
    row = answer_row(HERMES_CALLS)
    row["messages"] += [{"role": "tool", "content": result}, {"role": "assistant", "content": "So."}]
    assert words in refusal(row)


def test_text_behind_the_result_of_a_tools_turn_is_named() -> None:
    row = answer_row("[weather(city='Rome')]")
    row["messages"] += [
        {"role": "tool", "content": "<tool_response>20</tool_response>\nWell?"},
        {"role": "assistant", "content": "20 degrees."},
    ]
    assert "turn 3 (tool): holds 'Well?' behind the tool's result; write it inside of the result, or as a" in refusal(
        row
    )


def test_a_result_without_a_call_is_refused() -> None:
    row = answer_row("I look.")
    row["messages"] += [{"role": "user", "content": "FUNCTION RESPONSE: 20"}, {"role": "assistant", "content": "So."}]
    assert "turn 3 (user): is a tool's result as text, but no call waits for one; write the call before it" in refusal(
        row
    )


@pytest.mark.parametrize("log", ["<tool_result>20</tool_result>\nWhy?", "FUNCTION RESPONSE: 20\nWhy?"])
def test_a_log_that_a_user_pastes_is_text(log: str) -> None:
    trajectory = parse(
        {"messages": [{"role": "user", "content": log}, answer_row("So.")["messages"][1]], "tools": TOOLS}
    )
    assert said(trajectory) == [("user", log), ("assistant", "So.")]
    assert not trajectory.notes


def test_glaive_as_published() -> None:
    chat = (
        'USER: Rome?\n\n\nASSISTANT: <functioncall> {"name": "weather", "arguments": \'{"city": "Rome"}\'} '
        '<|endoftext|>\n\n\nFUNCTION RESPONSE: {"t": 20}\n\n\nASSISTANT: 20 degrees. <|endoftext|>\n\n\n'
        "USER: Thanks.\n\n\nASSISTANT: Bye. <|endoftext|>\n\n\n"
    )
    trajectory = parse({"system": f"SYSTEM: {GLAIVE}", "chat": chat})
    assert calls_of(trajectory) == [("weather", {"city": "Rome"})]
    assert said(trajectory) == [
        ("system", "You are a helpful assistant."),
        ("user", "Rome?"),
        ("tool", '{"t": 20}'),
        ("assistant", "20 degrees."),
        ("user", "Thanks."),
        ("assistant", "Bye."),
    ]
    assert "`chat` is 'Hello.'; it opens with `USER:`" in refusal({"chat": "Hello."})


def test_text_results_of_structured_calls() -> None:
    row = answer_row("", tool_calls=[{"id": "c", "function": {"name": "weather", "arguments": OSLO}}])
    row["messages"] += [{"role": "user", "content": "<tool_response>30</tool_response>"}]
    row["messages"] += [{"role": "assistant", "content": "30 degrees."}]
    answer: dict[str, Any] = {"role": "tool", "content": "30", "tool_call_id": "c", "name": "weather"}
    assert parse(row).messages[2] == answer


def test_xlam_as_published() -> None:
    answers = json.dumps([{"name": "weather", "arguments": ROME}, {"name": "weather", "arguments": OSLO}])
    trajectory = parse({"id": 7, "query": "Rome, Oslo?", "answers": answers, "tools": f"[{BARE}]"})
    assert calls_of(trajectory) == [("weather", ROME), ("weather", OSLO)]
    assert said(trajectory) == [("user", "Rome, Oslo?")]
    assert "`answers`: not JSON" in refusal({"query": "Rome?", "answers": "20 degrees", "tools": LISTED})


# ---- the cases that were filed ---------------------------------------------------------------------------------------

CASES = ["format_glaive_sharegpt_text", "format_hermes_singleturn", "format_ms_swift_agent", "format_toucan_sft"]


@pytest.mark.parametrize("name", CASES)
def test_filed_cases_call_the_tool(shared: Path, name: str) -> None:
    row = json.loads((shared / "cases" / "data" / f"{name}.jsonl").read_text())
    trajectory = parse(row)
    assert calls_of(trajectory) == [("get_weather", {"city": "Rome"})]
    assert [tool["function"]["name"] for tool in trajectory.tools] == ["get_weather"]
    answers = [message["content"] for message in trajectory.messages if message["role"] == "tool"]
    assert answers == ([] if name == "format_hermes_singleturn" else ['{"t": 20}'])
