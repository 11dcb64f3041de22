"""sharegpt rows and Anthropic blocks mean the same as the OpenAI rows they stand for; errors name their own turns."""

import base64
import copy
import io
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gemma_dist.config import RowConfig
from gemma_dist.data import convert, model_turns, results
from gemma_dist.data.content import content_text
from gemma_dist.data.layouts import pieces, prefill
from gemma_dist.data.reasoning import ENCRYPTED
from gemma_dist.data.rows import read_rows
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.data.types import ArrowStruct, Json, Tool, ToolCall
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


# ---- texts around a call ---------------------------------------------------------------------------------------------

ASKED = {"role": "user", "content": "Mend it."}
USE = {"type": "tool_use", "id": "c1", "name": "f", "input": {}}
TEXTS = [{"type": "text", "text": "Let me look. "}, {"type": "text", "text": "\nThen I fix it."}]
THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
HIDDEN = {"type": "redacted_thinking", "data": "x"}
AI_CALL = {"type": "tool-call", "toolCallId": "c1", "toolName": "f", "input": {}}
ITEM_CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
ITEM_ANSWER = {"type": "function_call_output", "call_id": "c1", "output": "ok"}


def around(middle: Any) -> dict[str, Any]:
    """A row of Anthropic's blocks with `middle` between two texts."""
    return {"messages": [ASKED, {"role": "assistant", "content": [TEXTS[0], middle, TEXTS[1]]}]}


def events(*blocks: dict[str, Any]) -> dict[str, Any]:
    """A session of Claude Code that logs each block of an answer as an event."""
    session: list[Any] = [{"type": "user", "uuid": "u0", "parentUuid": None, "sessionId": "s", "message": ASKED}]
    for number, block in enumerate(blocks):
        message = {"id": "m", "role": "assistant", "content": [block]}
        ids = {"uuid": f"u{number + 1}", "parentUuid": f"u{number}", "sessionId": "s"}
        session.append({"type": "assistant", **ids, "message": message})
    return {"events": session}


def item(text: dict[str, Any]) -> dict[str, Any]:
    """A message of the Responses API."""
    return {"type": "message", "role": "assistant", "content": [{**text, "type": "output_text"}]}


def bedrock(middle: dict[str, Any]) -> dict[str, Any]:
    blocks = [{"text": TEXTS[0]["text"]}, middle, {"text": TEXTS[1]["text"]}]
    return {"messages": [{**ASKED, "content": [{"text": "Mend it."}]}, {"role": "assistant", "content": blocks}]}


GEMINI_PARTS = [{"text": TEXTS[0]["text"]}, {"functionCall": {"name": "f", "args": {}}}, {"text": TEXTS[1]["text"]}]
AROUND_A_CALL = {
    "Anthropic": around(USE),
    "AI SDK": around(AI_CALL),
    "Claude Code": events(TEXTS[0], USE, TEXTS[1]),
    "Bedrock": bedrock({"toolUse": {"toolUseId": "c1", "name": "f", "input": {}}}),
    "Gemini": {
        "contents": [{"role": "user", "parts": [{"text": "Mend it."}]}, {"role": "model", "parts": GEMINI_PARTS}]
    },
    "Responses": {"input": [ASKED, item(TEXTS[0]), ITEM_CALL, item(TEXTS[1])]},
    "Responses, answered": {"input": [ASKED, item(TEXTS[0]), ITEM_CALL, item(TEXTS[1]), ITEM_ANSWER]},
    "LangChain": {
        "messages": [
            {"type": "human", "content": "Mend it."},
            {
                "type": "ai",
                "content": [TEXTS[0], USE, TEXTS[1]],
                "tool_calls": [{"name": "f", "args": {}, "id": "c1", "type": "tool_call"}],
            },
        ]
    },
}


@pytest.mark.parametrize("layout", AROUND_A_CALL)
def test_texts_around_a_call_are_two_paragraphs(layout: str) -> None:
    trajectory = parse(AROUND_A_CALL[layout])
    said, calling = trajectory.messages[1:3]
    assert content_text(said["content"]) == "Let me look.\n\nThen I fix it."
    assert [made["function"]["name"] for made in calling["tool_calls"]] == ["f"]
    assert trajectory.notes == {pieces.TEXT_MOVED: 1}


@pytest.mark.parametrize(
    ("row", "notes"),
    [
        (around(THOUGHT), {pieces.REASONING_MOVED: 1}),
        (around(HIDDEN), {ENCRYPTED: 1, pieces.REASONING_MOVED: 1}),
        (events(TEXTS[0], THOUGHT, TEXTS[1]), {pieces.REASONING_MOVED: 1}),
        (bedrock({"reasoningContent": {"redactedContent": "x"}}), {pieces.ENCRYPTED_REASONING: 1}),
        (bedrock({"reasoningContent": {"reasoningText": {"text": "Hm."}}}), {pieces.REASONING_MOVED: 1}),
    ],
)
def test_texts_around_a_thought_are_two_paragraphs(row: dict[str, Any], notes: dict[str, int]) -> None:
    trajectory = parse(row)
    assert content_text(trajectory.messages[1]["content"]) == "Let me look.\n\nThen I fix it."
    assert trajectory.notes == notes


def test_texts_with_nothing_between_them_are_one() -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": [*TEXTS, USE]}]}
    assert content_text(parse(row).messages[1]["content"]) == "Let me look. \nThen I fix it."
    assert not parse(row).notes


def test_a_text_around_a_call_that_is_blank_makes_no_paragraph() -> None:
    content = [{"type": "text", "text": "\n\n"}, USE, TEXTS[1]]
    row = {"messages": [ASKED, {"role": "assistant", "content": content}]}
    assert content_text(parse(row).messages[1]["content"]).strip() == "Then I fix it."


def test_a_call_that_is_kept_out_of_the_loss_does_not_join_one_that_is_trained() -> None:
    row = {"input": [ASKED, item(TEXTS[0]), {**ITEM_CALL, "train": False}, ITEM_ANSWER]}
    assert [message.get("train") for message in parse(row).messages] == [None, None, False, None]


# ---- neighboring messages with calls ---------------------------------------------------------------------------------


def calling(id: str, **keys: Any) -> dict[str, Any]:
    """An assistant's message with a call of f."""
    return {"role": "assistant", "tool_calls": [{"id": id, "function": {"name": "f", "arguments": {"n": 1}}}], **keys}


def answering(id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": id}


def qwen_agent() -> list[dict[str, Any]]:
    """Calls and answers as messages of their own, without ids."""
    called = {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}}
    return [called, called, *({"role": "function", "name": "f", "content": content} for content in "ab")]


def function_calls() -> list[dict[str, Any]]:
    """The same as sharegpt."""
    called = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    return [called, called, {"from": "observation", "value": "a"}, {"from": "observation", "value": "b"}]


NEIGHBORS: list[Any] = [
    ({"messages": [ASKED, calling("a"), calling("b"), answering("b"), answering("a")]}, ["a", "b"], ["b", "a"], 1),
    ({"messages": [ASKED, *qwen_agent()]}, ["call_0", "call_1"], ["call_0", "call_1"], 1),
    (
        {"conversations": [{"from": "human", "value": "q"}, *function_calls()]},
        ["call_0", "call_1"],
        ["call_0", "call_1"],
        0,  # by the layout itself
    ),
    (
        {"messages": [ASKED, *map(calling, "abc"), *map(answering, "abc")]},
        ["a", "b", "c"],
        ["a", "b", "c"],
        2,
    ),
    ({"messages": [ASKED, calling("a"), calling("b")]}, ["a", "b"], [], 1),
]


@pytest.mark.parametrize(("row", "calls", "answers", "count"), NEIGHBORS)
def test_neighboring_messages_with_calls_are_parallel_calls(
    row: dict[str, Any], calls: list[str], answers: list[str], count: int
) -> None:
    trajectory = parse(row)
    made = [call["id"] for call in trajectory.messages[1]["tool_calls"]]
    answered = [message["tool_call_id"] for message in trajectory.messages if message["role"] == "tool"]
    assert (made, answered) == (calls, answers)
    assert trajectory.notes == Counter({model_turns.PARALLEL: count})


def test_texts_and_thoughts_of_parallel_calls_stay_in_order() -> None:
    first = calling("a", content="Rome. ", reasoning_content="One.")
    second = calling("b", content=" Oslo.", reasoning_content="Two.")
    said, made = parse({"messages": [ASKED, first, second, answering("a"), answering("b")]}).messages[1:3]
    assert said == {"role": "assistant", "content": "Rome.\n\nOslo.", "reasoning_content": "One.\nTwo."}
    assert [call["id"] for call in made["tool_calls"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (
            [calling("a", train=False), calling("b"), answering("a"), answering("b")],
            "turn 3 (assistant): follows the calls of turn 2 (assistant) before their answers, but one of the two is",
        ),
        ([calling("a"), calling("a"), answering("a")], "turn 2 (assistant): two calls of the message have one id"),
        ([calling("a"), calling("b"), answering("b")], "call 'a' of f without an answer"),
        ([calling("a"), {"role": "assistant", "content": "x"}, answering("a")], "without an answer before turn 3"),
    ],
)
def test_neighboring_calls_that_are_not_parallel_are_refused(messages: list[Any], words: str) -> None:
    assert words in refusal({"messages": [ASKED, *messages]})


# ---- results of logs -------------------------------------------------------------------------------------------------


def gemini_result(result: Any) -> dict[str, Any]:
    parts = [{"functionResponse": {"name": "f", "response": result}}]
    asked = {"role": "user", "parts": [{"text": "q"}]}
    return {"contents": [asked, {"role": "model", "parts": [GEMINI_PARTS[1]]}, {"role": "user", "parts": parts}]}


def responses_result(result: Any) -> dict[str, Any]:
    return {"input": [ASKED, ITEM_CALL, {**ITEM_ANSWER, "output": result}]}


def ai_sdk_result(result: Any) -> dict[str, Any]:
    told = {"type": "tool-result", "toolCallId": "c1", "toolName": "f", "output": {"type": "json", "value": result}}
    calls = {"role": "assistant", "content": [AI_CALL]}
    return {"messages": [ASKED, calls, {"role": "tool", "content": [told]}]}


def ui_result(result: Any) -> dict[str, Any]:
    told = {"type": "tool-f", "toolCallId": "c1", "state": "output-available", "input": {}, "output": result}
    return {"messages": [ASKED, {"role": "assistant", "parts": [told]}]}


def bedrock_result(result: Any) -> dict[str, Any]:
    told = {"toolResult": {"toolUseId": "c1", "content": [{"json": result}]}}
    use = {"toolUse": {"toolUseId": "c1", "name": "f", "input": {}}}
    asked = {"role": "user", "content": [{"text": "q"}]}
    return {
        "messages": [asked, {"role": "assistant", "content": [use]}, {"role": "user", "content": [told]}],
    }


def langchain_result(result: Any) -> dict[str, Any]:
    made = {"name": "f", "args": {}, "id": "c1", "type": "tool_call"}
    told = {"type": "tool", "content": result, "tool_call_id": "c1"}
    return {"messages": [{"type": "human", "content": "q"}, {"type": "ai", "content": "", "tool_calls": [made]}, told]}


RESULTS = [gemini_result, responses_result, ai_sdk_result, ui_result, bedrock_result]
STRINGS = [responses_result, ai_sdk_result, ui_result, bedrock_result, langchain_result]


def told(row: dict[str, Any]) -> Any:
    return [message["content"] for message in parse(row).messages if message["role"] == "tool"]


@pytest.mark.parametrize("make", RESULTS)
def test_nulls_that_arrow_filled_into_results_are_dropped_and_counted(make: Any) -> None:
    days = [ArrowStruct({"title": "a", "text": None}), {"own": None}]
    row = make(ArrowStruct({"t": 20, "sum": None, "days": days}))
    assert [json.loads(text) for text in map(content_text, told(row))] == [
        {"t": 20, "days": [{"title": "a"}, {"own": None}]}
    ]
    assert parse(row).notes == {results.FILLED: 2}


@pytest.mark.parametrize("make", [*RESULTS[1:], langchain_result])
def test_lists_of_structs_are_results_without_their_nulls(make: Any) -> None:
    row = make([ArrowStruct({"type": None, "text": None, "title": "a"})])
    assert [content_text(content) for content in told(row)] == ['[{"title": "a"}]']
    assert parse(row).notes == {results.FILLED: 2}


@pytest.mark.parametrize("make", STRINGS)
def test_a_list_of_strings_is_a_value(make: Any) -> None:
    assert [content_text(content) for content in told(make(["a", "b"]))] == ['["a", "b"]']


def test_parquet_of_gemini_gives_each_result_its_own_keys(tmp_path: Path) -> None:
    rows = [gemini_result({"t": 20}), gemini_result({"sum": 1})]
    for row in rows:
        row["contents"][1]["parts"][0]["functionCall"]["args"] = "{}"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = [row for _, row in read_rows([tmp_path / "rows.parquet"])]
    assert [told(row) for row in read if isinstance(row, dict)] == [['{"t": 20}'], ['{"sum": 1}']]


# ---- prefilled answers -----------------------------------------------------------------------------------------------

REST = [{"type": "text", "text": '"a": 1}'}]
RESPONSE = {"type": "message", "role": "assistant", "content": REST, "stop_reason": "end_turn"}


def begun(content: Any = "{", **keys: Any) -> list[dict[str, Any]]:
    """The messages of a request that ends with the beginning of its answer."""
    return [ASKED, {"role": "assistant", "content": content, **keys}]


def completed(text: str) -> dict[str, Any]:
    """An OpenAI response."""
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


CONVERSED = [{"role": "user", "content": [{"text": "q"}]}, {"role": "assistant", "content": [{"text": "{"}]}]
PREFILLED = [
    {"request": {"messages": begun()}, "response": RESPONSE},
    {"request": {"messages": begun([{"type": "text", "text": "{"}])}, "response": RESPONSE},
    {"messages": begun(), "response": RESPONSE},
    {"params": {"messages": begun()}, "result": {"type": "succeeded", "message": RESPONSE}},
    {
        "request": {"messages": CONVERSED},
        "response": {"output": {"message": {"role": "assistant", "content": [{"text": '"a": 1}'}]}}},
    },
    {"request": {"messages": begun(prefix=True)}, "response": completed('"a": 1}')},
    {"request": {"messages": begun(prefix=True)}, "response": completed('{"a": 1}')},
    {"request": {"messages": begun(partial=True)}, "response": completed('"a": 1}')},
]


@pytest.mark.parametrize("row", PREFILLED)
def test_an_answer_goes_on_from_the_beginning_in_its_request(row: dict[str, Any]) -> None:
    trajectory = parse(row)
    assert [content_text(message["content"]) for message in trajectory.messages[1:]] == ['{"a": 1}']
    assert trajectory.notes == {prefill.PREFILLED: 1}


def test_an_answer_of_openai_behind_an_assistants_message_is_a_message_of_its_own() -> None:
    trajectory = parse({"request": {"messages": begun("Hi.")}, "response": completed("Hello.")})
    assert [message["content"] for message in trajectory.messages[1:]] == ["Hi.\n\nHello."]
    assert trajectory.notes == {model_turns.JOINED: 1}


def test_a_beginning_that_is_kept_out_of_the_loss_is_refused() -> None:
    row = {"request": {"messages": begun(train=False)}, "response": RESPONSE}
    assert "of which one is trained and one is not" in refusal(row)


@pytest.mark.parametrize(
    "row",
    [
        {"input": [ASKED, {**item({"type": "text", "text": "a"}), "tool_calls": None}, ITEM_CALL]},
        {
            "messages": [
                ASKED,
                {"role": "assistant", "tool_calls": None, "content": [{"type": "text", "text": "a"}, AI_CALL]},
            ]
        },
    ],
)
def test_null_calls_beside_the_call_of_a_log_are_none(row: dict[str, Any]) -> None:
    said, made = parse(row).messages[1:]
    assert (said["content"], made["tool_calls"]) == ("a", [call("c1", "f")])


# ---- rows in OpenAI's shape to the letter ----------------------------------------------------------------------------

SAID = (
    "Rome?",
    "",
    None,
    "  ",
    "<think>why</think>20",
    '{"name": "weather", "arguments": {"city": "Rome"}}',
    "<image>",
)
CALLED: tuple[Any, ...] = ({"city": "Rome"}, '{"city": "Rome"}', {}, None, {"city": None}, "weather", [1], {"city": 1})
ODD_CALLS = (
    {"name": "weather", "args": {}},
    "weather",
    None,
    {"toolName": "weather", "input": {}},
    {"function": "weather"},
)
DECLARED: tuple[Any, ...] = (
    TOOLS,
    [],
    None,
    json.dumps(TOOLS),
    [{"name": "weather", "input_schema": SCHEMA}],
    TOOLS * 2,
    "weather",
)


def random_message(chance: random.Random) -> dict[str, Any]:
    """A message of keys, roles and values that are OpenAI's, most of the time."""
    role = chance.choices(["system", "user", "assistant", "tool", "human", "tool_call", 7], [1, 6, 6, 3, 1, 1, 1])[0]
    message: dict[str, Any] = {"role": role, "content": chance.choice(SAID)}
    if chance.random() < 0.5:
        called = {"name": chance.choice(["weather", "other", ""]), "arguments": chance.choice(CALLED)}
        calls = [{"id": "c1", "type": "function", "function": called}, *chance.sample(ODD_CALLS, chance.random() < 0.2)]
        message["tool_calls"] = chance.choice([calls, calls, calls, [], None, json.dumps(calls), {"x": calls}])
    if role == "tool" or chance.random() < 0.1:
        message["tool_call_id"] = chance.choice(["c1", "c2", None, 7])
    if chance.random() < 0.2:
        message |= chance.choice(
            [{"name": "weather"}, {"name": {"tool_calls": [1]}}, {"train": False}, {"from": "human"}, {"text": "Oslo"}]
        )
    return message


def random_row(chance: random.Random) -> dict[str, Any]:
    """A row in which some messages are others than they should be."""
    asked: dict[str, Any] = {"role": "user", "content": "Where is it warmer?"}
    calling = {"role": "assistant", "content": chance.choice(SAID), "tool_calls": [call("c1", "weather", city="Rome")]}
    result = {"role": "tool", "content": chance.choice(SAID), "tool_call_id": "c1"}
    said = {"role": "assistant", "content": chance.choice(SAID)}
    whole = [asked, calling, result, said][: chance.choice([2, 3, 4, 4, 4])]
    messages = [random_message(chance) if chance.random() < 0.1 else message for message in whole]
    row: dict[str, Any] = {"id": "r", "messages": messages}
    row |= {"tools": chance.choice(DECLARED)} if chance.random() < 0.9 else {}
    return row | ({"answer": "20"} if chance.random() < 0.05 else {})


def outcome(row: Any) -> object:
    try:
        return parse(row)
    except DataError as error:
        return str(error)


def test_rows_that_are_taken_as_they_are_mean_what_they_do_where_everything_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chance, outcomes = random.Random(0), []
    for _ in range(1500):
        row = random_row(chance)
        if not convert.is_plain_row(row):
            continue
        outcomes.append(outcome(copy.deepcopy(row)))
        with monkeypatch.context() as looked:
            looked.setattr(convert, "is_plain_row", lambda _: False)
            assert outcome(copy.deepcopy(row)) == outcomes[-1], row
    num_parsed = sum(isinstance(found, Trajectory) for found in outcomes)
    assert num_parsed > 100
    assert len(outcomes) - num_parsed > 100  # refused


@pytest.mark.parametrize(
    "changed",
    [
        {"from": "human"},
        {"role": "human"},
        {"content": [{"text": "Hi"}]},
        {"name": {"tool_calls": [1]}},
        {"text": "Hi"},
    ],
)
def test_a_row_with_another_spelling_is_looked_at(changed: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "20"}]
    assert convert.is_plain_row({"id": "r", "messages": messages, "tools": []})
    assert not convert.is_plain_row({"id": "r", "messages": [messages[0] | changed, messages[1]]})
    assert not convert.is_plain_row({"messages": messages, "images": []})
