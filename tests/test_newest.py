"""The newest template in Python: the text that Jinja makes of it, as transformers runs it."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from gemma_dist.config import ShardConfig
from gemma_dist.data import newest
from gemma_dist.data.rows import read_rows
from gemma_dist.data.templates import KnownTemplate, known_template
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.gemma_format import CHANNEL, CHANNEL_END, THOUGHT
from gemma_dist.model.tiny import newest_template, shipped_templates
from tests.support.corpus import row

WORDS = ("x", "B", "a", "items", "type", "", " ", "\n", "é", "{", "<", '"', THOUGHT, CHANNEL, CHANNEL_END, "properties")
STYLES = {"e4b": False, "31b": True}  # and whether their prompts open an empty thought


def jinja(style: str) -> Any:
    return _compile_jinja_template(newest_template(style))


def known(style: str) -> KnownTemplate:
    found = known_template(newest_template(style))
    assert found is not None
    return found


def variables(messages: list[Any], tools: list[Any], thinking: bool = False, prompts: bool = False) -> dict[str, Any]:
    settled = {"add_generation_prompt": prompts, "enable_thinking": thinking}
    return {"bos_token": "<bos>", "messages": messages, "tools": tools or None, "documents": None} | settled


def is_plain(style: str, given: dict[str, Any]) -> bool:
    """Whether it is written without Jinja."""
    try:
        declarations = [newest.declaration(tool) for tool in given["tools"] or ()]
        newest.conversation(
            given["messages"],
            declarations,
            bos="<bos>",
            thinking=given["enable_thinking"],
            prompts=given["add_generation_prompt"],
            opens_empty_thought=STYLES[style],
        )
    except newest.NotPlainError:
        return False
    return True


# ---- random ones -----------------------------------------------------------------------------------------------------


def words(rng: random.Random) -> str:
    return "".join(rng.choices(WORDS, k=rng.randint(0, 3)))


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randint(0, 6 if depth < 3 else 4)
    if kind == 5:
        return [value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if kind == 6:
        return {words(rng): value(rng, depth + 1) for _ in range(rng.randint(0, 3))}
    return (words(rng), None, rng.random() < 0.5, rng.randint(-9, 9), rng.choice((1e16, 0.1, -0.0, 1e-7)))[kind]


def schema(rng: random.Random, depth: int = 0, strange: float = 0.0) -> Any:
    """A schema of a parameter, of which a part is anything at all."""
    if rng.random() < strange:
        return value(rng)
    kind = rng.choice(("string", "STRING", "integer", "array", "object") if depth < 3 else ("string", "number"))
    made: dict[str, Any] = {"type": kind, "description": words(rng), "nullable": rng.random() < 0.3}
    if kind == "array":
        made["items"] = schema(rng, depth + 1, strange)
    if depth < 3 and rng.random() < 0.7:
        made["properties"] = {words(rng): schema(rng, depth + 1, strange) for _ in range(rng.randint(0, 3))}
    if rng.random() < 0.5:
        made["required"] = [words(rng) for _ in range(rng.randint(0, 2))]
    if rng.random() < 0.4:
        made["enum"] = [value(rng, 2) for _ in range(rng.randint(0, 3))]
    for key in [*made, words(rng)]:
        if rng.random() < strange:
            made[key] = value(rng)
        elif rng.random() < 0.2:
            made.pop(key, None)
    return made


def tool(rng: random.Random, strange: float) -> Any:
    function = {"name": words(rng) or "f", "description": words(rng)}
    if rng.random() < 0.8:
        function["parameters"] = schema(rng, 0, strange)
    if rng.random() < strange:
        function["response"] = schema(rng, 0, strange)
    return {"type": "function", "function": function}


def content(rng: random.Random) -> Any:
    if rng.random() < 0.6:
        return words(rng)
    parts = [{"type": "text", "text": words(rng)}, {"type": "image"}]
    return [rng.choice(parts) for _ in range(rng.randint(0, 3))]


def conversation(rng: random.Random) -> list[Any]:
    """Messages in any order."""
    messages = []
    for role in rng.choices(("user", "assistant", "tool"), (2, 4, 4), k=rng.randint(1, 8)):
        message: dict[str, Any] = {"role": role, "content": content(rng)}
        if role == "assistant" and rng.random() < 0.6:
            names = [f"f{number}" for number in range(rng.randint(1, 3))]
            message["tool_calls"] = [
                {"id": name, "function": {"name": name, "arguments": {words(rng): value(rng) for _ in range(3)}}}
                for name in names
            ]
        if role == "assistant" and rng.random() < 0.4:
            message["reasoning_content"] = words(rng)
        if role == "tool":
            message |= {"name": "f", "tool_call_id": rng.choice(("f0", "f1", "c"))}
        messages.append(message)
    if rng.random() < 0.4:
        messages.insert(0, {"role": "system", "content": words(rng) if rng.random() < 0.7 else content(rng)})
    return messages


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("strange", [0.0, 0.05])
def test_random_rows_are_written_as_jinja_does(style: str, strange: float) -> None:
    rng = random.Random(int(strange * 100))
    python, template = known(style), jinja(style)
    num_plain = num_rendered = 0
    for _ in range(1500):
        tools = [tool(rng, strange) for _ in range(rng.choice((0, 1, 1, 2)))]
        given = variables(conversation(rng), tools, rng.random() < 0.5, rng.random() < 0.5)
        try:
            expected = template.render(**given)
        except Exception as error:  # of a template that adds a string to something else
            with pytest.raises(type(error)):
                python.render(given)
            continue
        assert python.render(given) == expected, json.dumps(given)
        num_rendered += 1
        num_plain += is_plain(style, given)
    assert num_plain > num_rendered * (0.5 if strange else 0.8)


def test_numbers_words_and_nothing_are_written_as_jinja_does() -> None:
    arguments = {"b": True, "A": None, "a": 10**20, "c": [1.0, {"Z": "", "y": {}}], "items": [[], "<"]}
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    given = variables([{"role": "user", "content": ""}, {"role": "assistant", "content": "", "tool_calls": [call]}], [])
    assert is_plain("e4b", given)
    assert known("e4b").render(given) == jinja("e4b").render(**given)


# ---- what is left to Jinja -------------------------------------------------------------------------------------------


def test_other_templates_are_left_to_jinja() -> None:
    for name, path in shipped_templates().items():
        text = path.read_text(encoding="utf-8")
        assert (newest.opens_empty_thought(text) is not None) == (name == "gemma4_v5")
        assert newest.opens_empty_thought(text + " ") is None
    assert {style: newest.opens_empty_thought(newest_template(style)) for style in STYLES} == STYLES


def test_what_the_template_is_asked_besides_is_left_to_jinja() -> None:
    messages = [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Because.",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}}],
        },
        {"role": "tool", "content": "1", "tool_call_id": "1"},
        {"role": "user", "content": "y"},
    ]
    given = variables(messages, []) | {"preserve_thinking": True}
    shown = known("e4b").render(given)
    assert "Because." in shown
    assert shown == jinja("e4b").render(**given)


def test_roles_and_parts_that_no_row_has_are_left_to_jinja() -> None:
    for messages in (
        [{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "audio"}]}],
        [],
    ):
        given = variables(messages, [], prompts=True)
        assert known("e4b").render(given) == jinja("e4b").render(**given)


# ---- rows ------------------------------------------------------------------------------------------------------------


def renderings(trajectory: Trajectory) -> Iterator[dict[str, Any]]:
    """The whole with thinking off and on, and the prompt of its last answer."""
    for thinking in (False, True):
        yield variables(trajectory.messages, trajectory.tools, thinking)
        yield variables(trajectory.messages[:-1], trajectory.tools, thinking, prompts=True)


def require_same(trajectories: list[Trajectory]) -> None:
    for style in STYLES:
        python, template = known(style), jinja(style)
        for trajectory in trajectories:
            for given in renderings(trajectory):
                assert python.render(given) == template.render(**given)
                assert is_plain(style, given)


def test_rows_in_normal_form_are_plain_and_written_as_jinja_does() -> None:
    rows = [row(number, num_calls=number % 3) for number in range(30)]
    require_same([parse_row(one, "rows.jsonl:1", ShardConfig()) for one in rows])


def test_real_rows_are_plain_and_written_as_jinja_does(shared: Path) -> None:
    """Every fourth row; all of them in `make test-all`."""
    files = [
        shared / "data" / f"{name}.jsonl"
        for name in ("toolcalls/train", "toolcalls/eval_multiturn", "multimodal/train")
    ]
    rows = [parse_row(row, where, ShardConfig()) for where, row in read_rows(files)]
    require_same(rows[:: 1 if "LONG_TESTS" in os.environ else 4])
