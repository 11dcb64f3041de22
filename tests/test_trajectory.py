"""Rows in, trajectories or refusals out: every rule of the data contract, and every real row that the project has."""

import base64
import copy
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gemma_dist.config import EvaluateConfig, RowConfig
from gemma_dist.data.images import decode_image, image_size
from gemma_dist.data.rows import read_rows
from gemma_dist.data.strict import reason
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.errors import DataError
from gemma_dist.gemma_format import CONTROL_TOKENS

SETTINGS = RowConfig()


def parse(row: Any, where: str = "train.jsonl:7", media_root: Path | None = None, **changed: Any) -> Trajectory:
    return parse_row(row, where, RowConfig(media_root=media_root, **changed))


def refusal(row: Any, **changed: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse(row, **changed)
    return str(caught.value)


def png(size: tuple[int, int] = (4, 3), color: str = "red", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


def call(name: str = "add", arguments: Any = None, id: str | None = "c1") -> dict[str, Any]:
    function = {"name": name, "arguments": {"a": 1, "b": 2} if arguments is None else arguments}
    return {"type": "function", "function": function, **({"id": id} if id else {})}


def good_row() -> dict[str, Any]:
    """system, user, call, answer, text: turns 1 to 5."""
    return {
        "id": "sum",
        "messages": [
            {"role": "system", "content": "You add."},
            {"role": "user", "content": "1 + 2?"},
            {"role": "assistant", "content": None, "tool_calls": [call()]},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
            {"role": "assistant", "content": "It is 3."},
        ],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "add",
                    "description": "Adds.",
                    "parameters": {
                        "type": "object",
                        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                        "required": ["a", "b"],
                        "additionalProperties": False,
                    },
                },
            }
        ],
    }


def with_messages(*messages: dict[str, Any]) -> dict[str, Any]:
    """A row without tools: a question, then `messages`."""
    return {"messages": [{"role": "user", "content": "Go."}, *messages]}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The good row with one value set: "messages.3.content"."""
    row: Any = good_row()
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    target = row
    for key in parents:
        target = target[key]
    target[last] = value
    return row


def nested_schema(depth: int) -> dict[str, Any]:
    """A JSON schema of objects in objects."""
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


# ---- what goes through ----


@pytest.mark.parametrize(
    "file",
    [
        "toolcalls/train.jsonl",
        "toolcalls/eval_multiturn.jsonl",
        "multimodal/train.jsonl",
        "multimodal/eval.jsonl",
        "multimodal/image_pairs.jsonl",
    ],
)
def test_every_real_row_goes_through(file: str, shared: Path) -> None:
    for where, row in read_rows([shared / "data" / file]):
        assert isinstance(row, dict)
        trajectory = parse_row(row, where, EvaluateConfig())  # test cases among them
        parts = [
            part
            for message in trajectory.messages
            if isinstance(message["content"], list)
            for part in message["content"]
        ]
        assert trajectory.id == row["id"]
        assert trajectory.tools == row["tools"]
        assert sum(part == {"type": "image"} for part in parts) == len(trajectory.images)
        raw_messages: Any = row["messages"]
        given_calls = [call["function"] for message in raw_messages for call in message.get("tool_calls") or []]
        expected: Any = row.get("expected_calls", [])
        for call in expected:
            first = {name: values[0] for name, values in call["arguments"].items()}
            gold = {"acceptable": call["arguments"], "ignore_arguments": row["ignore_arguments"]}
            given_calls.append({"name": call["name"], "arguments": first, **gold})
        assert [call["function"] for m in trajectory.messages for call in m.get("tool_calls", [])] == given_calls
        for message in trajectory.messages:
            assert not (message.get("tool_calls") and message["content"])


def test_the_row_of_the_tutorial(tmp_path: Path) -> None:
    """Arguments as JSON text, content null, an image in a tool message, no tools, no ids."""
    (tmp_path / "charts").mkdir()
    (tmp_path / "charts/q2.png").write_bytes(png())
    query = "select month, sum(total) from sales where quarter = 'Q2' group by month"
    chart = {"values": [412, 398, 455], "labels": ["Apr", "May", "Jun"], "kind": "line"}
    row = {
        "messages": [
            {"role": "system", "content": "You look after the sales figures."},
            {"role": "user", "content": "How did the second quarter go?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"type": "function", "function": {"name": "run_sql", "arguments": json.dumps({"query": query})}}
                ],
            },
            {"role": "tool", "name": "run_sql", "content": "month total\nApril 412"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"type": "function", "function": {"name": "draw_chart", "arguments": json.dumps(chart)}}
                ],
            },
            {
                "role": "tool",
                "name": "draw_chart",
                "content": [{"type": "image", "image": "charts/q2.png"}, {"type": "text", "text": "1 chart"}],
            },
            {"role": "assistant", "content": "A dip in May (-3.4 %)."},
        ]
    }
    trajectory = parse(row, where=f"{tmp_path}/sales.jsonl:3")
    assert trajectory.id == "sales.jsonl:3"
    assert trajectory.tools == []
    assert trajectory.images == [png()]
    assert trajectory.messages[2:6] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "call_0", "type": "function", "function": {"name": "run_sql", "arguments": {"query": query}}}
            ],
        },
        {"role": "tool", "content": "month total\nApril 412", "tool_call_id": "call_0", "name": "run_sql"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "draw_chart", "arguments": chart}}
            ],
        },
        {
            "role": "tool",
            "content": [{"type": "image"}, {"type": "text", "text": "1 chart"}],
            "tool_call_id": "call_1",
            "name": "draw_chart",
        },
    ]


def test_parsing_is_idempotent() -> None:
    row = good_row()
    row["messages"][2] |= {"content": "Let me see.", "reasoning_content": "Add them.", "train": False}
    row["messages"][1]["content"] = [
        {"type": "image", "image": {"bytes": png(), "path": None}},
        {"type": "text", "text": "?"},
    ]
    once = parse(row)
    images = [{"bytes": image, "path": None} for image in once.images]
    again = parse({"id": once.id, "messages": once.messages, "tools": once.tools, "images": images})
    assert again == once


def test_the_input_is_left_as_it_was() -> None:
    row = good_row()
    before = copy.deepcopy(row)
    parse(row)
    assert row == before


@pytest.mark.parametrize("dumped", ["messages", "tools"])
def test_messages_and_tools_may_be_json_text(dumped: str) -> None:
    row = good_row()
    assert parse({**row, dumped: json.dumps(row[dumped])}) == parse(row)


@pytest.mark.parametrize("wrap", [lambda function: function, lambda function: {"type": "function", **function}])
def test_tools_may_come_without_the_wrapper(wrap: Any) -> None:
    row = good_row()
    assert parse({**row, "tools": [wrap(row["tools"][0]["function"])]}) == parse(row)


def test_a_missing_description_becomes_empty_and_the_rest_of_a_declaration_stays() -> None:
    tool = {"name": "now", "response": {"type": "object"}, "strict": True}
    expected = {"type": "function", "function": {**tool, "description": ""}}
    assert parse({**with_messages({"role": "assistant", "content": "Hi"}), "tools": [tool]}).tools == [expected]


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_no_arguments(arguments: Any) -> None:
    made = {"function": {"name": "now", "arguments": arguments}}
    (message,) = parse(with_messages({"role": "assistant", "tool_calls": [made]})).messages[1:]
    assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


def test_parameters_without_a_type_get_one() -> None:
    row = changed("tools.0.function.parameters", {"properties": {"a": {"type": "integer"}}})
    expected = {"properties": {"a": {"type": "integer"}}, "type": "object"}
    assert parse(row).tools[0]["function"]["parameters"] == expected


def test_calls_of_the_old_openai_form() -> None:
    row = with_messages(
        {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": "{}"}},
        {"role": "function", "name": "now", "content": "noon"},
    )
    assert parse(row).messages[1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_0", "type": "function", "function": {"name": "now", "arguments": {}}}],
        },
        {"role": "tool", "content": "noon", "tool_call_id": "call_0", "name": "now"},
    ]


def test_developer_is_system_and_null_keys_are_absent() -> None:
    row = good_row()
    row["messages"][0]["role"] = "developer"
    for message in row["messages"]:
        message |= {
            key: message.get(key) for key in ("tool_calls", "tool_call_id", "name", "reasoning_content", "audio")
        }
    assert parse(row) == parse(good_row())


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_several_names(key: str) -> None:
    assert parse(changed("messages.4", {"role": "assistant", "content": "3", key: "Sum."})).messages[4] == {
        "role": "assistant",
        "content": "3",
        "reasoning_content": "Sum.",
    }


@pytest.mark.parametrize("switch", [{"train": False}, {"loss": False}, {"weight": 0}, {"weight": 0.0, "train": False}])
def test_a_message_may_be_kept_out_of_training(switch: dict[str, Any]) -> None:
    row = good_row()
    row["messages"][2] |= switch
    assert [message.get("train", True) for message in parse(row).messages] == [True, True, False, True, True]


def test_an_untrained_message_may_show_a_mistake() -> None:
    row = changed("messages.2.tool_calls", [call("substract", {"x": "y"})])
    row["messages"][2]["train"] = False
    assert parse(row).messages[2]["tool_calls"][0]["function"] == {"name": "substract", "arguments": {"x": "y"}}


def test_answers_keep_their_order_and_find_their_calls() -> None:
    calls = [call("f", {"n": 1}, "a"), call("g", {}, None), call("f", {"n": 2}, None)]
    row = with_messages(
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "name": "g", "content": "for g"},
        {"role": "tool", "tool_call_id": "a", "content": "for the first f"},
        {"role": "tool", "content": "for the only one left"},
    )
    answers = parse(row).messages[2:]
    assert [(m["tool_call_id"], m["name"]) for m in answers] == [("call_0", "g"), ("a", "f"), ("call_1", "f")]


def test_new_ids_avoid_given_ones() -> None:
    row = with_messages({"role": "assistant", "tool_calls": [call("f", {}, None), call("f", {}, "call_0")]})
    assert [made["id"] for made in parse(row).messages[1]["tool_calls"]] == ["call_1", "call_0"]


def test_ids_may_come_again_in_a_later_message() -> None:
    turn: list[dict[str, Any]] = [
        {"role": "assistant", "tool_calls": [call("f", {})]},
        {"role": "tool", "tool_call_id": "c1", "content": ""},
    ]
    assert len(parse(with_messages(*turn, *turn)).messages) == 5


@pytest.mark.parametrize(("length", "ends_with"), [(3, "call"), (4, "response")])
def test_a_trajectory_may_end_with_a_call_or_a_response(length: int, ends_with: str) -> None:
    row = good_row()
    row["messages"] = row["messages"][:length]
    assert len(parse(row).messages) == length


def test_names_with_dots_slashes_colons_and_hyphens() -> None:
    for name in ("createIn-AppMessage", "math.add", "mcp:files/read", "größe"):
        assert parse(with_messages({"role": "assistant", "tool_calls": [call(name)]}))


def test_the_edges_of_64_bits() -> None:
    arguments = {"low": -(2**63), "high": 2**63 - 1, "float": 1e300}
    row = with_messages({"role": "assistant", "tool_calls": [call("f", json.dumps(arguments))]})
    assert parse(row).messages[1]["tool_calls"][0]["function"]["arguments"] == arguments


def test_a_nullable_argument_may_be_null() -> None:
    row = changed("messages.2.tool_calls.0.function.arguments", {"a": None, "b": 1})
    assert "null is not of type 'integer'" in refusal(row)
    row["tools"][0]["function"]["parameters"]["properties"]["a"] = {"type": "integer", "enum": [1], "nullable": True}
    parse(row)


# ---- text beside a call ----


def test_text_beside_a_call_becomes_a_message_in_front() -> None:
    row = good_row()
    row["messages"][2] |= {"content": "Let me add.", "reasoning_content": "Easy.", "train": False}
    calls = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]
    assert parse(row).messages[2:4] == [
        {"role": "assistant", "content": "Let me add.", "reasoning_content": "Easy.", "train": False},
        {"role": "assistant", "content": "", "tool_calls": calls, "train": False},
    ]


def test_text_beside_a_call_becomes_reasoning() -> None:
    row = good_row()
    row["messages"][2] |= {"content": "Let me add.", "reasoning_content": "Easy."}
    moved = parse(row, text_beside_call="reasoning").messages
    assert len(moved) == 5
    assert (moved[2]["content"], moved[2]["reasoning_content"]) == ("", "Easy.\nLet me add.")


def test_images_beside_a_call_move_with_their_text_and_keep_their_order() -> None:
    content = [{"type": "image", "image": {"bytes": png(color="blue")}}, {"type": "text", "text": "See."}]
    row = with_messages({"role": "assistant", "content": content, "tool_calls": [call()]})
    row["messages"][0]["content"] = [{"type": "image", "image": {"bytes": png(color="green")}}]
    for setting in ("message", "reasoning"):
        trajectory = parse(row, text_beside_call=setting)
        assert [message["content"] for message in trajectory.messages[1:]] == [
            [{"type": "image"}, {"type": "text", "text": "See."}],
            "",
        ]
        assert trajectory.images == [png(color="green"), png(color="blue")]


def test_blanks_beside_a_call_are_dropped() -> None:
    assert parse(changed("messages.2.content", " \n")).messages[2]["content"] == ""


# ---- refusals: the row with one fault, and words that its message must hold ----

REFUSED = [
    (7, "not a JSON object"),
    ([], "not a JSON object"),
    ({}, "`messages` is None"),
    ({"messages": []}, "a row holds a list of messages"),
    ({"messages": "[1"}, "`messages`: not JSON at column 3"),
    (changed("id", 1.5), "`id` is 1.5"),
    (changed("id", 2**70), "`id`: the integer"),
    (changed("id", "\ud800"), "surrogate"),
    # roles and order
    (changed("messages.1", "hello"), "turn 2: the message is 'hello'"),
    (changed("messages.1.role", "robot"), "turn 2 (robot): the role is 'robot'; roles are system"),
    (changed("messages.1.role", ["user"]), "turn 2: the role is ['user']"),
    (changed("messages.1.role", "system"), "turn 2 (system): a system message may only stand first"),
    (changed("messages.4", {"role": "developer", "content": "x"}), "turn 5 (developer): a system message may only"),
    (changed("messages", [{"role": "system", "content": "x"}]), "continues with a user message"),
    (
        changed("messages.1", {"role": "assistant", "content": "x"}),
        "turn 2 (assistant): a trajectory opens with a user",
    ),
    (changed("messages.4.role", "user") | {"tools": None}, None),
    ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message is trained: there is none"),
    (with_messages({"role": "assistant", "content": "x", "train": False}), "is trained: the only one has train: false"),
    *(
        (with_messages({"role": "tool", "content": "r", **names}), "open calls: none; put the assistant message with")
        for names in ({}, {"name": "f"}, {"tool_call_id": "c"})
    ),
    (changed("messages.4.content", " \n "), "turn 5 (assistant): says nothing"),
    (changed("messages.4.content", []), "turn 5 (assistant): says nothing"),
    (changed("messages.4.train", "false"), "`train` is 'false'"),
    (changed("messages.4.weight", 0.5), "`weight` is 0.5"),
    (
        changed("messages.4", {"role": "assistant", "content": "x", "train": True, "weight": 0}),
        "train and weight disagree",
    ),
    (changed("messages.4.audio", {"data": "x"}), "`audio` of a message"),
    (changed("messages.4.images", ["x.png"]), "`images` of a message"),
    (changed("messages.4.tool_responses", [{"name": "x"}]), "`tool_responses` of a message"),
    (changed("messages.1.reasoning", "hm"), "turn 2 (user): only an assistant's message"),
    (changed("messages.4", {"role": "assistant", "reasoning": "a", "thinking": "b"}), "say different things"),
    (changed("messages.4.reasoning_content", ["a"]), "`reasoning_content` is ['a']"),
    # content
    (
        changed("messages.1.content", {"sum": 3}),
        "turn 2 (user): the content is {'sum': 3} (dict); write it",
    ),
    (changed("messages.1.content", ["x"]), "the part 'x' is of type None"),
    (changed("messages.1.content", [{"type": "input_audio"}]), "is of type 'input_audio'"),
    (changed("messages.1.content", [{"type": "text", "text": 3}]), "the text of a part is 3"),
    (changed("messages.1.content", "\ud83d"), "half of a surrogate pair"),
    (
        changed("messages.0.content", [{"type": "image", "image": {"bytes": png()}}]),
        "drops images of a system message",
    ),
    # calls and answers
    (
        changed("messages.3.tool_call_id", "c7"),
        "turn 4 (tool): answers call 'c7', which no earlier turn made; open calls: call 'c1'",
    ),
    (changed("messages.3", {"role": "tool", "name": "sub", "content": ""}), "a call of 'sub', which is not open"),
    (changed("messages.3.name", "sub"), "is named 'sub' but answers call 'c1' of add"),
    (
        changed("messages.3", {"role": "user", "content": "x"}),
        "turn 3 (assistant): call 'c1' of add without an answer before turn 4",
    ),
    (changed("messages.2.tool_calls", None) | {"x": 1}, "turn 3 (assistant): says nothing"),
    (changed("messages.2.tool_calls", "add()"), "`tool_calls`: not JSON"),
    (changed("messages.2.tool_calls", [3]), "the call 3 is no function call"),
    (changed("messages.2.tool_calls.0.type", "custom"), "is no function call"),
    (changed("messages.2.tool_calls.0.id", 1.5), "the call id is 1.5"),
    (changed("messages.2.function_call", {"name": "add"}), "both function_call and tool_calls"),
    (changed("messages.1.tool_calls", [call()]), "turn 2 (user): only an assistant's message"),
    (
        changed("messages.4", {"role": "tool", "tool_call_id": "c1", "content": "3"}),
        "turn 5 (tool): answers call 'c1', which is already",
    ),
    (changed("messages.4", {"role": "tool", "content": "3"}), "turn 5 (tool): has neither tool_call_id nor name"),
    (
        with_messages({"role": "assistant", "tool_calls": [call(), call()]}, {"role": "assistant", "content": "x"}),
        "turn 2 (assistant): two calls of the message have one id",
    ),
    (
        with_messages(
            {"role": "assistant", "tool_calls": [call(id="a"), call(id="b")]},
            {"role": "tool", "tool_call_id": "a", "content": ""},
        ),
        "turn 2 (assistant): call 'b' of add without an answer, while others",
    ),
    (
        with_messages(
            {"role": "assistant", "tool_calls": [call(id=None)]},
            {"role": "tool", "tool_call_id": "call_0", "content": ""},
        ),
        "turn 3 (tool): answers call 'call_0', which no earlier turn made",
    ),
    (
        with_messages(
            {"role": "assistant", "tool_calls": [call("f", {}, None), call("g", {}, None)]},
            {"role": "tool", "content": "?"},
            {"role": "tool", "content": "?"},
        ),
        "turn 3 (tool): has neither tool_call_id nor name",
    ),
    # arguments
    (
        changed("messages.2.tool_calls.0.function.arguments", '{"a": 1,}'),
        "turn 3 (assistant): call of add: arguments: not JSON at column",
    ),
    (changed("messages.2.tool_calls.0.function.arguments", "[1]"), "the arguments are [1], not an object"),
    (changed("messages.2.tool_calls.0.function.arguments", "null"), "the arguments are None, not an object"),
    (changed("messages.2.tool_calls.0.function.arguments", '{"a": 1, "a": 2}'), "the key 'a' stands twice"),
    (changed("messages.2.tool_calls.0.function.arguments", '{"a": NaN, "b": 1}'), "the number nan"),
    (changed("messages.2.tool_calls.0.function.arguments", {"a": float("inf"), "b": 1}), "the number inf"),
    (changed("messages.2.tool_calls.0.function.arguments", '{"a": 1e999, "b": 1}'), "the number inf"),
    (
        changed("messages.2.tool_calls.0.function.arguments", {"a": 2**63, "b": 1}),
        "the integer 9223372036854775808 does not fit",
    ),
    (
        changed("messages.2.tool_calls.0.function.arguments", '{"a": ' + "9" * 5000 + "}"),
        "an integer of thousands of digits",
    ),
    (changed("messages.2.tool_calls.0.function.arguments", '{"a":' * 5000 + "1" + "}" * 5000), "nested"),
    (changed("tools.0.function.parameters.properties.a", nested_schema(90)), "nested deeper than 64 levels"),
    (changed("tools.0.function.parameters.properties.a", nested_schema(400)), "nested too deeply"),
    (
        changed("messages.2.tool_calls.0.function.arguments", {"a": 1}),
        "do not fit the tool's schema: as a whole: 'b' is a required",
    ),
    (
        changed("messages.2.tool_calls.0.function.arguments", {"a": "1", "b": 2}),
        "schema: a: '1' is not of type 'integer'",
    ),
    (changed("messages.2.tool_calls.0.function.arguments", {"a": 1, "b": 2, "c": 3}), "'c' was unexpected"),
    (
        changed("messages.2.tool_calls.0.function.name", "sub"),
        "turn 3 (assistant): calls sub, which `tools` does not declare",
    ),
    (changed("messages.2.tool_calls.0.function.name", None), "has no name; write it under `name`"),
    *[
        (changed("messages.2.tool_calls.0.function.name", name), "cannot be represented in Gemma's call format")
        for name in ("", "add numbers", "add{", "add}", "add(1)", "a,b", "<x>", "add\n", 'a"b')
    ],
    *[
        (
            changed("messages.2.tool_calls.0.function.arguments", arguments),
            "cannot be represented in Gemma's call format",
        )
        for key in ("", " a", "a ", "a:b", "a,b", "a{b", "a}b", "a[0", "0]", 'a"b', "a\nb")
        for arguments in ({key: 1}, {"a": [{"b": {key: 1}}]})
    ],
    # tools
    (changed("tools", {"name": "add"}), "`tools` is {'name': 'add'}"),
    (changed("tools", "[{]"), "`tools`: not JSON at column 3"),
    (changed("tools", ["add"]), "tool 1: 'add' declares no function"),
    (changed("tools.0.type", "web_search"), "declares no function"),
    (changed("tools.0.function.name", "add numbers"), "tool 1: the tool name 'add numbers'"),
    (changed("tools", [*good_row()["tools"], {"name": "add", "description": "x"}]), "tool add: is declared twice"),
    (changed("tools.0.function.description", 3), "the description is 3"),
    (changed("tools.0.function.parameters", []), "parameters are []"),
    (changed("tools.0.function.parameters.type", "string"), "the type of parameters is 'string'"),
    (
        changed("tools.0.function.parameters.properties.a.type", "float64"),
        "tool add: parameters are no valid JSON schema: a: 'float64' is no type; write one of string, number",
    ),
    (changed("tools.0.function.parameters.properties.a", None), "not allowed ('a' was unexpected)"),
    (changed("tools.0.function.parameters.$schema", []), "tool add: parameters are no valid JSON schema"),
    (
        changed("tools.0.function.parameters.properties.a.maximum", "9"),
        "parameters are no valid JSON schema: properties.a.maximum: '9' is not of type 'number'; fix the schema",
    ),
    (changed("tools.0.function.parameters.properties.a", {"$ref": "https://example.com/a.json"}), "no remote $ref"),
    (changed("tools.0.function.parameters.properties.a", {"$ref": "#/$defs/none"}), "schema cannot be applied"),
    (changed("tools.0.function.parameters.properties.a", {"$ref": "#/properties/a"}), "schema cannot be applied"),
    (changed("tools.0.function.parameters.properties.a.maximum", float("nan")), "tool add: the number nan"),
    (changed("tools.0.function.parameters.properties.a.maximum", 2**64), "tool add: the integer"),
    # images
    (changed("messages.3.content", [{"type": "image"}]), "`images` holds 0 images for 1 image parts"),
    (changed("images", [png()]), "`images` holds 1 images for 0 image parts"),
    (changed("images", "x.png"), "`images` holds 1 images for 0 image parts"),
    (changed("images", 3), "`images` is 3; write a list"),
]


@pytest.mark.parametrize(("row", "words"), REFUSED)
def test_refused_with_place_and_words(row: Any, words: str | None) -> None:
    if words is None:
        parse(row)
        return
    message = refusal(row)
    assert message.startswith("train.jsonl:7: ")
    assert words in message
    assert len(message) < 600


IMAGE_REFUSED = [
    ("nowhere.png", "turn 2 (user): the image 'nowhere.png' is no file in the media root"),
    ("../secret.png", "lies outside the media root"),
    ("link.png", "lies outside the media root"),
    ("/etc/hostname", "lies outside the media root"),
    ("text.png", "the image 'text.png' (8 bytes) is not readable"),
    ({"url": "cut.png"}, "the image 'cut.png' ("),
    ("cut.jpg", "does not decode"),
    ("large.png", "bytes) has 40 x 30 = 1,200 pixels, and the limit is 1,000"),
    ("http://example.com/x.png", "nothing is downloaded"),
    ("https://example.com/x.png", "nothing is downloaded"),
    ("file:///etc/passwd", "lies outside the media root"),
    ("data:image/png,abc", "no base64 data: URL"),
    ("data:image/png;base64,a", "is not base64"),
    ("x" * 5000 + ".png", "cannot be read"),
    ("zero\0byte.png", "cannot be read"),
    (".", "is no file"),
    ("", "is no path"),
    (3, "is no path"),
    ({"bytes": None, "path": None}, "is no path"),
    (b"", "is not readable"),
]


@pytest.fixture
def media(tmp_path: Path) -> Path:
    root = tmp_path / "media"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (root / "good.png").write_bytes(png())
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "text.png").write_text("no image")
    (root / "cut.png").write_bytes(png((30, 30), "red")[:-30])
    noise = Image.effect_noise((30, 30), 90)
    noise.save(root / "whole.jpg")
    (root / "cut.jpg").write_bytes((root / "whole.jpg").read_bytes()[:-200])
    (root / "large.png").write_bytes(png((40, 30)))
    return root


def test_no_message_has_an_address_in_memory() -> None:
    error = ValueError(f"cannot identify {io.BytesIO()!r}\nin {object()}")
    assert reason(error) == "cannot identify <_io.BytesIO object> in <object object>"


@pytest.mark.parametrize(("source", "words"), IMAGE_REFUSED)
def test_images_that_are_refused(media: Path, source: Any, words: str) -> None:
    row = changed("messages.1.content", [{"type": "image", "image": source}])
    assert words in refusal(row, media_root=media, max_image_pixels=1000)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "good.png"},
        {"type": "image", "path": "./good.png"},
        {"type": "image_url", "image_url": "good.png"},
        {"type": "image_url", "image_url": {"url": "good.png", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png()).decode()}"}},
        {"type": "image", "image": base64.b64encode(png()).decode()},
        {"type": "image", "base64": base64.encodebytes(png()).decode()},
        {"type": "image", "image": {"bytes": png(), "path": "elsewhere.png"}},
        {"type": "image", "image": {"bytes": None, "path": "good.png"}},
        {"type": "image", "image": png()},
    ],
)
def test_images_come_in_many_forms(media: Path, part: dict[str, Any]) -> None:
    trajectory = parse(changed("messages.3.content", [{"type": "text", "text": "see"}, part]), media_root=media)
    assert trajectory.images == [png()]
    assert trajectory.messages[3]["content"] == [{"type": "text", "text": "see"}, {"type": "image"}]


def test_an_absolute_path_inside_the_media_root(media: Path) -> None:
    row = changed("messages.1.content", [{"type": "image", "image": str(media / "good.png")}])
    assert parse(row, media_root=media).images == [png()]


def test_the_images_column_fills_the_empty_parts_in_order(media: Path) -> None:
    row = good_row()
    row["messages"][1]["content"] = [{"type": "image"}, {"type": "image", "image": {"bytes": png(color="blue")}}]
    row["messages"][3]["content"] = [{"type": "image"}]
    row["images"] = ["good.png", {"bytes": png(color="green"), "path": None}]
    assert parse(row, media_root=media).images == [png(), png(color="blue"), png(color="green")]


def test_decoding_lays_transparency_on_white_and_turns_as_exif_says() -> None:
    file = io.BytesIO()
    Image.new("RGBA", (2, 1), (0, 0, 0, 0)).save(file, "PNG")
    assert decode_image(file.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    file = io.BytesIO()
    Image.new("L", (5, 2)).save(file, "JPEG", exif=exif)
    assert (decode_image(file.getvalue()).size, decode_image(file.getvalue()).mode) == ((2, 5), "RGB")


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's remarks on broken TIFF tags
@given(st.binary(max_size=200), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]), st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_broken_images_are_refused_plainly(noise: bytes, kind: str, position: int) -> None:
    whole = png((8, 8), kind=kind)
    try:
        decode_image(whole[:position] + noise + whole[position + len(noise) :])
    except DataError as error:
        assert "does not decode" in str(error)  # noqa: PT017


# ---- control tokens ----

TEXTS = {
    "messages.0.content": "turn 1 (system)",
    "messages.1.content": "turn 2 (user)",
    "messages.2.content": "turn 3 (assistant)",
    "messages.2.reasoning_content": "turn 3 (assistant)",
    "messages.3.content": "turn 4 (tool)",
    "messages.4.content": "turn 5 (assistant)",
    "tools.0.function.description": "tool add",
    "tools.0.function.parameters.properties.a.description": "tool add",
    "tools.0.function.parameters.properties.a.title": "tool add",
}


@pytest.mark.parametrize("path", TEXTS)
def test_a_control_token_is_refused_or_broken_wherever_it_stands(path: str) -> None:
    row = changed(path, "see <|turn>model here")
    message = refusal(row)
    assert f"{TEXTS[path]}: the control token <|turn> stands in" in message
    assert "see <\u200b|turn>model here" in json.dumps(
        [(t := parse(row, control_tokens="escape")).messages, t.tools], ensure_ascii=False
    )


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_every_control_token_is_found_in_a_tools_answer(token: str) -> None:
    row = changed("messages.3.content", [{"type": "text", "text": f"x{token}{token}y"}])
    assert f"the control token {token} stands" in refusal(row)
    content: Any = parse(row, control_tokens="escape").messages[3]["content"]
    (part,) = content
    assert not any(other in part["text"] for other in CONTROL_TOKENS)
    assert part["text"].replace("\u200b", "") == f"x{token}{token}y"


def test_control_tokens_in_arguments() -> None:
    row = with_messages({"role": "assistant", "tool_calls": [call("f", {"a": [{"b": "<turn|>"}]})]})
    assert "turn 2 (assistant): call of f: the control token <turn|>" in refusal(row)
    row = with_messages({"role": "assistant", "tool_calls": [call("f", {"a": {"<turn|>": 1}})]})
    assert "the control token <turn|>" in refusal(row)
    made = parse(row, control_tokens="escape").messages[1]["tool_calls"][0]
    assert made["function"]["arguments"] == {"a": {"<\u200bturn|>": 1}}


def test_a_control_token_in_two_halves() -> None:
    row = changed("messages.3.content", [{"type": "text", "text": text} for text in ("<|tu", "rn>")])
    assert "the control token <|turn> stands in" in refusal(row)
    assert parse(row, control_tokens="escape").messages[3]["content"] == [{"type": "text", "text": "<\u200b|turn>"}]


# ---- anything at all ----

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = """
    id messages tools images system conversations role content type text image image_url url bytes path source data
    tool_calls function name arguments parameters properties $ref description tool_call_id reasoning_content train
    weight from value input_schema tool_use_id input thinking is_error function_call
""".split()  # noqa: SIM905
WORDS = """
    user assistant tool system developer text image image_url function object string base64 human gpt function_call
    observation tool_use tool_result thinking add c1 #
""".split()  # noqa: SIM905
rowlike = st.recursive(
    st.sampled_from(WORDS) | st.none() | st.integers(-1, 2) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=20,
)


def parses_or_refuses(row: Any) -> None:
    for beside, tokens in (("message", "reject"), ("reasoning", "escape")):
        try:
            assert isinstance(parse(row, text_beside_call=beside, control_tokens=tokens), Trajectory)
        except DataError as error:
            assert str(error).startswith("train.jsonl:7: ")  # noqa: PT017
            str(error).encode()


@given(json_values | rowlike)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_value_is_a_trajectory_or_a_refusal(row: Any) -> None:
    parses_or_refuses(row)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, item in items for inner in paths_of(item, (*path, key)))]


BASES: list[dict[str, Any]] = [
    good_row(),
    {
        "conversations": [
            {"from": "human", "value": "<image> What?"},
            {"from": "function_call", "value": [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]},
            {"from": "observation", "value": '["1", "2"]'},
            {"from": "gpt", "value": "Done."},
        ],
        "images": [{"bytes": png()}],
        "tools": "[]",
    },
    {
        "system": "Look.",
        "messages": [
            {"role": "user", "content": "Go."},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": {}}]},
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "x",
                        "is_error": True,
                        "content": [{"type": "text", "text": "no"}],
                    }
                ],
            },
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Sorry."}],
            },
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    },
]


@given(st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_good_row_with_anything_put_anywhere(data: st.DataObject) -> None:
    row: Any = {"row": copy.deepcopy(data.draw(st.sampled_from(BASES)))}
    *parents, last = data.draw(st.sampled_from(paths_of(row)[1:]))
    target = row
    for key in parents:
        target = target[key]
    target[last] = data.draw(json_values | rowlike)
    parses_or_refuses(row["row"])


def test_the_bases_are_good() -> None:
    for row in BASES:
        parse(row)


# ---- reading files ----


def rows_of(*paths: Path) -> list[tuple[str, Any]]:
    return [(str(where), row) for where, row in read_rows(paths)]


def test_jsonl_lines_keep_their_numbers_and_bad_ones_do_not_stop_the_reading(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [
        b'\xef\xbb\xbf{"a": 1}',
        b"",
        b'{"a": }',
        b"[1]",
        b'{"a": "\xff"}',
        b'{"a": 1, "a": 2}',
        b'{"a": "\xe2\x80\xa8"}\r',
    ]
    file.write_bytes(b"\n".join(lines))
    rows = rows_of(file)
    assert [where.rpartition(":")[2] for where, _ in rows] == ["1", "3", "4", "5", "6", "7"]
    assert [row for _, row in rows if isinstance(row, dict)] == [{"a": 1}, {"a": "\u2028"}]
    errors = [str(row) for _, row in rows if isinstance(row, DataError)]
    assert all(error.startswith(f"{file}:") for error in errors)
    for error, words in zip(
        errors, ["not JSON at column 7", "not a JSON object", "not UTF-8 at column 8", "twice"], strict=True
    ):
        assert words in error


def test_compressed_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    assert rows_of(file) == [(f"{file}:1", {"a": 1}), (f"{file}:2", {"a": 2})]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read to its end"):
        rows_of(file)


def test_zstandard_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl.zst"
    file.write_bytes(pa.Codec("zstd").compress(b'{"a": 1}\n').to_pybytes())
    assert [row for _, row in read_rows([file])] == [{"a": 1}]


def test_parquet_as_nested_columns_and_as_json_text(tmp_path: Path) -> None:
    row = good_row()
    nested, text = tmp_path / "nested.parquet", tmp_path / "text.parquet"
    for message in row["messages"]:
        for made in message.get("tool_calls", []):
            made["function"]["arguments"] = json.dumps(made["function"]["arguments"])
    pq.write_table(pa.Table.from_pylist([row] * 40), nested)
    pq.write_table(pa.Table.from_pylist([{key: json.dumps(value) for key, value in row.items() if key != "id"}]), text)
    found = list(read_rows([nested, text]))
    assert [where.line for where, _ in found] == [*range(1, 41), 1]
    for where, raw in found:
        trajectory = parse_row(raw, where, SETTINGS)
        assert (trajectory.messages, trajectory.tools) == (parse(row).messages, parse(row).tools)


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    row = good_row() | {"images": [{"bytes": png(), "path": None}]}
    row["messages"][3]["content"] = [{"type": "image"}]
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "messages": datasets.Json(),
            "tools": datasets.Json(),
            "images": datasets.List(datasets.Image()),
        }
    )
    made = datasets.Dataset.from_list([row | {"id": str(number)} for number in range(40)], features=features)
    made.select(range(20, 40)).save_to_disk(str(tmp_path / "saved"))
    found = list(read_rows([tmp_path / "saved"]))
    parsed = [parse_row(raw, where, SETTINGS) for where, raw in found]
    assert [trajectory.id for trajectory in parsed] == [str(number) for number in range(20, 40)]
    assert parsed[0].images == [png()]
    assert parsed[0].messages == parse(row).messages
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match="several splits; name those"):
        list(read_rows([tmp_path / "splits"]))


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("none.jsonl", None, "no such file"),
        ("rows.csv", b"a,b", "unknown kind of file"),
        ("rows.json", b'[\n{"a": 1},\n', "the array is not closed"),
        ("rows.jsonl.gz", b"not gzip", "cannot be read"),
        ("rows.parquet", b"not parquet", "cannot be read"),
        ("folder", "folder", "no state.json"),
    ],
)
def test_files_that_cannot_be_read_stop_the_reading(tmp_path: Path, name: str, data: Any, words: str) -> None:
    path = tmp_path / name
    if data == "folder":
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=words) as caught:
        rows_of(path)
    assert str(path) in str(caught.value)


def test_images_are_found_beside_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "chart.png").write_bytes(png())
    row = changed("messages.1.content", [{"type": "image", "image": "chart.png"}])
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    ((where, raw),) = read_rows([tmp_path / "rows.jsonl"])
    assert parse_row(raw, where, SETTINGS).images == [png()]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_an_image_is_that_of_its_pixels(orientation: int) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (5, 2)).save(file, "JPEG", exif=exif)
    image = decode_image(file.getvalue())
    assert image_size(file.getvalue()) == (image.height, image.width)
