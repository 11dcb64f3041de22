"""sharegpt rows and Anthropic blocks mean the same as the OpenAI rows they stand for; errors name their own turns."""

import base64
import copy
import io
import json
from typing import Any

import pytest
from PIL import Image

from gemma_dist.config import RowConfig
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.data.types import Json, Tool, ToolCall
from gemma_dist.errors import DataError


def parse(row: Any) -> Trajectory:
    return parse_row(row, "chats.jsonl:2", RowConfig(max_image_pixels=1000))


def refusal(row: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse(row)
    return str(caught.value)


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), color).save(file, "PNG")
    return file.getvalue()


def call(id: str, name: str, **arguments: Any) -> ToolCall:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


SCHEMA: dict[str, Json] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Tool] = [
    {"type": "function", "function": {"name": "weather", "description": "Tells.", "parameters": SCHEMA}}
]


def sharegpt() -> dict[str, Any]:
    calls = [{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "weather", "arguments": '{"city": "Oslo"}'}]
    return {
        "id": "w",
        "system": "You tell the weather.",
        "conversations": [
            {"from": "human", "value": "<image>Where is it warmer?"},
            {"from": "gpt", "value": "I look.", "loss": False},
            {"from": "function_call", "value": json.dumps(calls)},
            {"from": "observation", "value": "30"},
            {"from": "observation", "value": "map:<image>"},
            {"from": "gpt", "value": "Rome."},
        ],
        "tools": json.dumps([TOOLS[0]["function"]]),
        "images": [{"bytes": png("red"), "path": None}, {"bytes": png("blue"), "path": None}],
    }


def image_block(data: bytes) -> dict[str, Any]:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(data).decode()}
    return {"type": "image", "source": source}


def anthropic() -> dict[str, Any]:
    return {
        "id": "w",
        "system": [{"type": "text", "text": "You tell the weather.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {
                "role": "user",
                "content": [
                    image_block(png("red")),
                    {"type": "text", "text": "Where is it warmer?"},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Two calls.", "signature": "x"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}},
                    {"type": "tool_use", "id": "t2", "name": "weather", "input": {"city": "Oslo"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t2", "content": "no such city", "is_error": True},
                    {
                        "type": "tool_result",
                        "tool_use_id": "t1",
                        "content": [
                            {"type": "text", "text": "map:"},
                            image_block(png("blue")),
                        ],
                    },
                    {"type": "text", "text": "Well?"},
                ],
            },
            {"role": "assistant", "content": "Rome."},
        ],
        "tools": [{"type": "custom", "name": "weather", "description": "Tells.", "input_schema": SCHEMA}],
    }


def test_sharegpt_means_the_same_as_its_openai_row() -> None:
    calls = [call("call_0", "weather", city="Rome"), call("call_1", "weather", city="Oslo")]
    assert parse(sharegpt()) == Trajectory(
        id="w",
        messages=[
            {"role": "system", "content": "You tell the weather."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is it warmer?"}]},
            {"role": "assistant", "content": "I look.", "train": False},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "30", "tool_call_id": "call_0", "name": "weather"},
            {
                "role": "tool",
                "content": [{"type": "text", "text": "map:"}, {"type": "image"}],
                "tool_call_id": "call_1",
                "name": "weather",
            },
            {"role": "assistant", "content": "Rome."},
        ],
        tools=TOOLS,
        images=[png("red"), png("blue")],
    )


def test_anthropic_means_the_same_as_its_openai_row() -> None:
    calls = [call("t1", "weather", city="Rome"), call("t2", "weather", city="Oslo")]
    assert parse(anthropic()) == Trajectory(
        id="w",
        messages=[
            {"role": "system", "content": [{"type": "text", "text": "You tell the weather."}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is it warmer?"}]},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "I look."}],
                "reasoning_content": "Two calls.",
            },
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "Error: no such city", "tool_call_id": "t2", "name": "weather"},
            {
                "role": "tool",
                "content": [{"type": "text", "text": "map:"}, {"type": "image"}],
                "tool_call_id": "t1",
                "name": "weather",
            },
            {"role": "user", "content": [{"type": "text", "text": "Well?"}]},
            {"role": "assistant", "content": "Rome."},
        ],
        tools=TOOLS,
        images=[png("red"), png("blue")],
    )


@pytest.mark.parametrize("make", [sharegpt, anthropic])
def test_converting_leaves_the_row_as_it_was(make: Any) -> None:
    row = make()
    before = copy.deepcopy(row)
    parse(row)
    assert row == before


def test_one_observation_may_answer_several_calls_with_a_list() -> None:
    row = sharegpt()
    row["conversations"][3:5] = [{"from": "observation", "value": '["30", {"celsius": 12}]'}]
    row["images"].pop()
    answers = [message["content"] for message in parse(row).messages if message["role"] == "tool"]
    assert answers == ["30", '{"celsius": 12}']


def test_conversations_may_hold_openai_messages() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    assert parse({"conversations": messages}) == parse({"messages": messages})


@pytest.mark.parametrize("role", ["human", "user"])
def test_sharegpt_roles_have_synonyms(role: str) -> None:
    answers = {"human": "gpt", "user": "assistant"}
    row = {"conversations": [{"from": role, "value": "Hi"}, {"from": answers[role], "value": "Hello."}]}
    assert [message["role"] for message in parse(row).messages] == ["user", "assistant"]


def test_a_marker_is_plain_text_in_openai_rows() -> None:
    messages = [{"role": "user", "content": "What does <image> mean?"}, {"role": "assistant", "content": "A tag."}]
    assert parse({"messages": messages}).messages == messages


def test_an_error_that_says_so_itself_is_not_marked_again() -> None:
    row = anthropic()
    row["messages"][2]["content"][0]["content"] = "ValueError: no such city"
    assert parse(row).messages[4]["content"] == "ValueError: no such city"


def test_a_system_text_beside_messages_counts_in_any_shape() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    system = {"role": "system", "content": "Be kind."}
    assert parse({"system": "Be kind.", "messages": messages}).messages == [system, *messages]
    assert parse({"system": "Be kind.", "messages": [system, *messages]}).messages == [system, *messages]
    assert "keep one of the two" in refusal(
        {"system": "Be kind.", "messages": [{**system, "content": "Be rude."}, *messages]}
    )


def turn(row: dict[str, Any], number: int, **changes: Any) -> dict[str, Any]:
    """The row with keys of one turn (from 1) replaced."""
    (row.get("conversations") or row["messages"])[number - 1].update(changes)
    return row


BLOCK = {"type": "tool_use", "id": "t1", "name": "weather"}

REFUSED = [
    (turn(sharegpt(), 2, **{"from": "robot"}), "turn 2 (robot): `from` is 'robot'; sharegpt turns come from system"),
    (turn(sharegpt(), 3, value="{"), "turn 3 (function_call): not JSON at column 2"),
    (turn(sharegpt(), 3, value="{}"), "turn 3 (function_call): the call {} is no object with a name"),
    (
        turn(sharegpt(), 3, value='{"name": "weather", "arguments": {}}'),
        "turn 5 (tool): has neither tool_call_id nor name",
    ),
    (turn(sharegpt(), 3, value='{"name": "wether", "arguments": {}}'), "turn 5 (tool)"),
    (turn(sharegpt(), 4, **{"from": "human"}), "without an answer before turn 4 (user)"),
    (turn(sharegpt(), 5, value="no map"), "`images` holds 2 images for 1 image parts"),
    (turn(sharegpt(), 6, value="<turn|>"), "turn 6 (assistant): the control token <turn|>"),
    (turn(sharegpt(), 6, value=3), "turn 6 (assistant): the content is 3"),
    (turn(sharegpt(), 6, value=None), "turn 6 (assistant): says nothing"),
    ({**sharegpt(), "videos": ["a.mp4"]}, "the row brings `videos`"),
    ({**sharegpt(), "system": "<turn|>"}, "`system` of the row: the control token"),
    (
        {"conversations": [*sharegpt()["conversations"][:4], {"from": "gpt", "value": "Rome."}]},
        "turn 4 (observation): one observation, '30', after 2 calls",
    ),
    (
        turn(anthropic(), 2, content=[BLOCK | {"input": {"city": 3}}, BLOCK | {"id": "t2", "input": {"city": "Oslo"}}]),
        "turn 2 (assistant): call of weather: the arguments do not",
    ),
    (
        turn(anthropic(), 2, content=[BLOCK | {"input": "Rome"}]),
        "turn 2 (assistant): call of weather: arguments: not JSON",
    ),
    (
        turn(anthropic(), 3, content=[{"type": "tool_result", "tool_use_id": "t9"}]),
        "turn 3 (tool): answers call 't9', which no",
    ),
    (
        turn(anthropic(), 3, content="Well?"),
        "turn 2 (assistant): call 't1' of weather, call 't2' of weather without an answer",
    ),
    (turn(anthropic(), 4, content=[{"type": "redacted_thinking", "data": "x"}]), "turn 4 (assistant): says nothing"),
    (
        turn(anthropic(), 4, content=[{"type": "thinking", "thinking": 3}]),
        "turn 4 (assistant): the reasoning part",
    ),
    (turn(anthropic(), 1, content=[{"type": "document", "source": {"type": "text"}}]), "is of type 'document'"),
    (
        turn(anthropic(), 1, content=[{"type": "image", "source": {"type": "file"}}]),
        "is of another kind than base64 and url",
    ),
    (
        turn(
            anthropic(), 1, content=[{"type": "image", "source": {"type": "url", "url": "https://example.com/x.png"}}]
        ),
        "turn 1 (user): the image 'https://example.com/x.png' lies elsewhere; nothing is downloaded",
    ),
]


@pytest.mark.parametrize(("row", "words"), REFUSED)
def test_errors_name_the_turn_of_the_row_as_given(row: dict[str, Any], words: str) -> None:
    message = refusal(row)
    assert message.startswith("chats.jsonl:2: ")
    assert words in message
