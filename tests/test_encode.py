"""Encoding: the ids are the processor's own, and the labels lie on what the model itself emits and on nothing else."""

import base64
import copy
import functools
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from gemma_dist.config import EncodingConfig, EvaluateConfig, RowConfig
from gemma_dist.data.encode import Encoder, load_encoder
from gemma_dist.data.encoded import IGNORE_INDEX, Encoded
from gemma_dist.data.rows import read_rows
from gemma_dist.data.templates import known_template
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.data.types import Message
from gemma_dist.errors import CheckpointError, ConfigError, DataError
from gemma_dist.gemma_format import CONTROL_TOKENS
from gemma_dist.model.tiny import tiny_processor

TEMPLATES = ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5")  # all that TRL ships
NEWEST = TEMPLATES[-1]
LOSES_TOOL_IMAGES = ("gemma4", "gemma4_v3")
CLOSES_TURNS = ("gemma4", "gemma4_v3", "gemma4_v4")  # between two assistant messages, without opening another turn
EncoderOf = Callable[..., Encoder]


@pytest.fixture(scope="module")
def encoder_of(tiny_model: Callable[..., Path]) -> EncoderOf:
    """Encoders of the tiny model by template."""

    @functools.cache
    def load(template: str = NEWEST, *, enable_thinking: bool = False) -> Encoder:
        return load_encoder(str(tiny_model()), EncodingConfig(chat_template=template, enable_thinking=enable_thinking))

    return load


@pytest.fixture(scope="module")
def encoder(encoder_of: EncoderOf) -> Encoder:
    return encoder_of()


# ---- rows ------------------------------------------------------------------------------------------------------------


def trajectory(*messages: dict[str, Any], text_beside_call: Any = "message", **fields: Any) -> Trajectory:
    settings = RowConfig(text_beside_call=text_beside_call)
    return parse_row({"messages": list(messages), **fields}, "rows.jsonl:1", settings)


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def model(content: Any = None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def calls(*named: tuple[str, dict[str, Any]], content: Any = None, **fields: Any) -> dict[str, Any]:
    functions = [{"function": {"name": name, "arguments": arguments}} for name, arguments in named]
    return model(content, tool_calls=functions, **fields)


def tool(name: str, content: Any) -> dict[str, Any]:
    return {"role": "tool", "name": name, "content": content}


def text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def picture(width: int, height: int) -> dict[str, Any]:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).save(file, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
    }


# Of at most 70 soft tokens the largest grid of the same shape: 8 x 8, and 26 x 2 for ten to one.
SQUARE, SQUARE_TOKENS = picture(48, 48), "<|image>" + "<|image|>" * 64 + "<image|>"
WIDE, WIDE_TOKENS = picture(480, 48), "<|image>" + "<|image|>" * 52 + "<image|>"


# ---- the same ids as the processor's ---------------------------------------------------------------------------------


def with_pictures(messages: Sequence[Mapping[str, Any]], images: list[bytes]) -> list[Mapping[str, Any]]:
    """The messages as the processor itself takes them: images inside their parts."""
    pictures = iter(images)

    def part_with_picture(part: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image", "image": Image.open(io.BytesIO(next(pictures)))} if part["type"] == "image" else part

    return [
        {**message, "content": [part_with_picture(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def processed(encoder: Encoder, messages: Sequence[Mapping[str, Any]], row: Trajectory, **settings: Any) -> Any:
    processor: Any = encoder.processor
    return processor.apply_chat_template(
        with_pictures(messages, row.images),
        tools=row.tools or None,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        enable_thinking=encoder.enable_thinking,
        **settings,
    )


def check_against_processor(encoder: Encoder, row: Trajectory) -> Encoded:
    encoded = encoder.encode(row)
    expected = processed(encoder, row.messages, row)
    assert encoded.input_ids == expected["input_ids"][0].tolist()
    assert encoded.mm_token_type_ids == expected["mm_token_type_ids"][0].tolist()
    assert encoded.num_images == len(row.images)
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    if row.images:
        for name, tensor in encoder.pixels(row.images).items():
            assert tensor.equal(expected[name]), name
    else:
        assert "pixel_values" not in expected
    return encoded


@pytest.fixture(scope="module")
def real_rows(shared: Path) -> list[Trajectory]:
    names = ("toolcalls/train", "toolcalls/eval_multiturn", "multimodal/train", "multimodal/eval")
    files = [shared / "data" / f"{name}.jsonl" for name in (*names, "multimodal/image_pairs")]
    return [parse_row(row, where, EvaluateConfig()) for where, row in read_rows(files)]  # test cases among them


def test_only_templates_that_are_known_are_rendered_without_the_sandbox(encoder_of: EncoderOf) -> None:
    for name in TEMPLATES:
        known = encoder_of(name).processor.chat_template
        assert known_template(known) is not None
        assert known_template(known + " ") is None
    strange = copy.copy(encoder_of().processor)
    strange.chat_template = "{{ ''.__class__.__mro__ }}" + strange.chat_template
    with pytest.raises(DataError, match="unsafe"):
        Encoder(strange).encode(trajectory({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}))


def expected_refusal(template: str, row: Trajectory) -> str | None:
    """What a template revision is known to lose of a row, as the refusal says it."""
    arguments = [call["function"]["arguments"] for m in row.messages for call in m.get("tool_calls", [])]
    parts = [
        part for m in row.messages if m["role"] == "tool" and isinstance(m["content"], list) for part in m["content"]
    ]
    if template != NEWEST and "null" in re.sub(r'"(\\.|[^"])*"', "", json.dumps(arguments)):
        return "null argument"
    if template in LOSES_TOOL_IMAGES and {"type": "image"} in parts:
        return "loses images"
    roles = [m["role"] for m in row.messages]
    if template in CLOSES_TURNS and ("assistant", "assistant") in pairwise(roles):
        return "closes the model's turn"
    return None


def expected_dropped_reasoning(template: str, row: Trajectory) -> int:
    """The second revision renders no reasoning, others before the newest only that of calls."""
    reasoned = [message for message in row.messages if "reasoning_content" in message]
    without_call = [message for message in reasoned if "tool_calls" not in message]
    return len({"gemma4_v2": reasoned, NEWEST: []}.get(template, without_call))


# 160 rows with screenshots in tool messages; 221 rows in which a text stands beside a call.
REFUSED = {
    "gemma4": {"loses images": 160, "closes the model's turn": 221},
    "gemma4_v2": {},
    "gemma4_v3": {"loses images": 160, "closes the model's turn": 221},
    "gemma4_v4": {"closes the model's turn": 221},
    "gemma4_v5": {},
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_real_row_has_the_processors_ids_or_the_refusal_that_its_template_earns(
    encoder_of: EncoderOf, real_rows: list[Trajectory], template: str
) -> None:
    """All refusals on every template; equal ids and pixels for every third row on the newest (all in `make test-all`),
    for every 10th on the others (all rows on all of them would take minutes)."""
    every = 1 if "LONG_TESTS" in os.environ else 3
    assert len(real_rows) == 1889
    encoder, refused = encoder_of(template), Counter[str]()
    for number, row in enumerate(real_rows):
        if reason := expected_refusal(template, row):
            with pytest.raises(DataError, match=reason):
                encoder.encode(row)
            refused[reason] += 1
        elif number % (every if template == NEWEST else 10) == 0:
            encoded = check_against_processor(encoder, row)
            assert encoded.num_target_tokens > 0
            assert encoded.num_dropped_reasoning == expected_dropped_reasoning(template, row)
    assert refused == REFUSED[template]


# ---- labels, written out by hand -------------------------------------------------------------------------------------


def marked(encoder: Encoder, encoded: Encoded) -> str:
    """The decoded tokens, with ⟦ ⟧ around the trained ones."""
    shown = ""
    for trained, run in groupby(
        zip(encoded.input_ids, encoded.labels, strict=True), lambda pair: pair[1] != IGNORE_INDEX
    ):
        piece = encoder.tokenizer.decode([token for token, _ in run])
        shown += f"⟦{piece}⟧" if trained else piece
    return shown


def check(encoder: Encoder, row: Trajectory, golden: str) -> Encoded:
    encoded = check_against_processor(encoder, row)
    assert marked(encoder, encoded) == golden
    whole = encoder.tokenizer(golden.replace("⟦", "").replace("⟧", ""), add_special_tokens=False)["input_ids"]
    assert encoded.input_ids == whole
    return encoded


def test_tokens_one_by_one() -> None:
    """The whole list, on a tokenizer whose words are known."""
    words = ["Warm in Oslo?", "weather", "city", "It is C.", "Oslo", "call", "response", "value", "user", "model"]
    encoder = Encoder(tiny_processor(words, style="e4b", vocab_size=1000, chat_template=None), enable_thinking=False)
    encoded = encoder.encode(
        trajectory(
            user("Warm in Oslo?"), calls(("weather", {"city": "Oslo"})), tool("weather", "7 C"), model("It is 7 C.")
        )
    )
    # fmt: off
    context, trained = IGNORE_INDEX, True
    expected = [
        ("<bos>", context), ("<|turn>", context), ("user", context), ("\n", context), ("Warm", context),
        (" in", context), (" Oslo", context), ("?", context), ("<turn|>", context), ("\n", context),
        ("<|turn>", context), ("model", context), ("\n", context),
        ("<|tool_call>", trained), ("call", trained), (":", trained), ("weather", trained), ("{", trained),
        ("city", trained), (":", trained), ('<|"|>', trained), ("Oslo", trained),
        ('<|"|>', trained), ("}", trained), ("<tool_call|>", trained), ("<|tool_response>", trained),
        ("response", context), (":", context), ("weather", context), ("{", context), ("value", context),
        (":", context), ('<|"|>', context), ("7", context), (" C", context), ('<|"|>', context), ("}", context),
        ("<tool_response|>", context),
        ("It", trained), (" is", trained), (" ", trained), ("7", trained), (" C", trained), (".", trained),
        ("<turn|>", trained), ("\n", context),
    ]
    # fmt: on
    tokens = [encoder.tokenizer.decode([token]) for token in encoded.input_ids]
    assert tokens == [token for token, _ in expected]
    assert encoded.labels == [
        token if mark is trained else IGNORE_INDEX for token, (_, mark) in zip(encoded.input_ids, expected, strict=True)
    ]
    assert encoded.num_target_tokens == 20


USER = "<bos><|turn>user\nGo.<turn|>\n<|turn>model\n"  # what stands before the model's first word in most rows

GOLDEN: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a plain answer": (
        [system("Be brief."), user(" Hello? "), model("\nHi, there.\n")],
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHello?<turn|>\n<|turn>model\n⟦Hi, there.<turn|>⟧\n",
    ),
    "one call and its answer": (
        [user("Go."), calls(("f", {"a": 1})), tool("f", "done"), model("Ok.")],
        USER + '⟦<|tool_call>call:f{a:1}<tool_call|><|tool_response>⟧response:f{value:<|"|>done<|"|>}<tool_response|>'
        "⟦Ok.<turn|>⟧\n",
    ),
    "calls one after the other": (
        [user("Go."), calls(("f", {})), tool("f", "1"), calls(("g", {})), tool("g", "2"), model("Ok.")],
        USER + '⟦<|tool_call>call:f{}<tool_call|><|tool_response>⟧response:f{value:<|"|>1<|"|>}<tool_response|>'
        '⟦<|tool_call>call:g{}<tool_call|><|tool_response>⟧response:g{value:<|"|>2<|"|>}<tool_response|>⟦Ok.<turn|>⟧\n',
    ),
    "parallel calls: only the first response's opening is the model's": (
        [user("Go."), calls(("f", {"a": 1}), ("f", {"a": 2})), tool("f", "x"), tool("f", "y"), model("Ok.")],
        USER + "⟦<|tool_call>call:f{a:1}<tool_call|><|tool_call>call:f{a:2}<tool_call|><|tool_response>⟧"
        'response:f{value:<|"|>x<|"|>}<tool_response|><|tool_response>response:f{value:<|"|>y<|"|>}<tool_response|>'
        "⟦Ok.<turn|>⟧\n",
    ),
    "a tool's error, then the corrected call": (
        [
            user("Go."),
            calls(("f", {"n": "one"})),
            tool("f", "Error: n must be a number"),
            calls(("f", {"n": 1})),
            tool("f", ""),
            model("Ok."),
        ],
        USER + '⟦<|tool_call>call:f{n:<|"|>one<|"|>}<tool_call|><|tool_response>⟧'
        'response:f{value:<|"|>Error: n must be a number<|"|>}<tool_response|>'
        '⟦<|tool_call>call:f{n:1}<tool_call|><|tool_response>⟧response:f{value:<|"|><|"|>}<tool_response|>'
        "⟦Ok.<turn|>⟧\n",
    ),
    "reasoning before a call and before text": (
        [
            user("Go."),
            calls(("f", {}), reasoning_content="I need f.\n\nNow."),
            tool("f", "1"),
            model("Ok.", reasoning_content=" That is all. "),
        ],
        USER + "⟦<|channel>thought\nI need f.\n\nNow.\n<channel|><|tool_call>call:f{}<tool_call|><|tool_response>⟧"
        'response:f{value:<|"|>1<|"|>}<tool_response|>⟦<|channel>thought\n That is all. \n<channel|>Ok.<turn|>⟧\n',
    ),
    "several images in one response": (
        [
            user("Go."),
            calls(("f", {})),
            tool("f", [text("one "), SQUARE, text("two"), WIDE]),
            model("Two pictures."),
        ],
        USER + "⟦<|tool_call>call:f{}<tool_call|><|tool_response>⟧"
        f'response:f{{value:<|"|>one two<|"|>}}<tool_response|>{SQUARE_TOKENS}{WIDE_TOKENS}⟦Two pictures.<turn|>⟧\n',
    ),
    "an image in each of two parallel responses": (
        [user("Go."), calls(("f", {}), ("g", {})), tool("f", [WIDE]), tool("g", [SQUARE]), model("Ok.")],
        USER + "⟦<|tool_call>call:f{}<tool_call|><|tool_call>call:g{}<tool_call|><|tool_response>⟧"
        f'response:f{{value:<|"|><|"|>}}<tool_response|>{WIDE_TOKENS}'
        f'<|tool_response>response:g{{value:<|"|><|"|>}}<tool_response|>{SQUARE_TOKENS}⟦Ok.<turn|>⟧\n',
    ),
    "images of a user and of the model": (
        [user([WIDE, text("Redraw")]), model([text("Here: "), SQUARE, text(" and "), SQUARE])],
        f"<bos><|turn>user\n{WIDE_TOKENS}Redraw<turn|>\n<|turn>model\n"
        f"⟦Here:⟧{SQUARE_TOKENS}⟦and⟧{SQUARE_TOKENS}⟦<turn|>⟧\n",
    ),
    "an image of a tool, then one of the model": (
        [user("Go."), calls(("f", {})), tool("f", [WIDE]), model([SQUARE, text("Redrawn.")])],
        USER + "⟦<|tool_call>call:f{}<tool_call|><|tool_response>⟧"
        f'response:f{{value:<|"|><|"|>}}<tool_response|>{WIDE_TOKENS}{SQUARE_TOKENS}⟦Redrawn.<turn|>⟧\n',
    ),
    "a call without response ends with the stop token": (
        [user("Go."), calls(("f", {}), ("g", {}))],
        USER + "⟦<|tool_call>call:f{}<tool_call|><|tool_call>call:g{}<tool_call|><|tool_response>⟧",
    ),
    "the end is a response": (
        [user("Go."), calls(("f", {})), tool("f", "1")],
        USER + '⟦<|tool_call>call:f{}<tool_call|><|tool_response>⟧response:f{value:<|"|>1<|"|>}<tool_response|>',
    ),
    "a user interrupts after a response: the end of that turn is nobody's": (
        [user("Go."), calls(("f", {})), tool("f", "1"), user("Stop!"), model("Ok.")],
        USER + '⟦<|tool_call>call:f{}<tool_call|><|tool_response>⟧response:f{value:<|"|>1<|"|>}<tool_response|>'
        "<turn|>\n<|turn>user\nStop!<turn|>\n<|turn>model\n⟦Ok.<turn|>⟧\n",
    ),
    "untrained messages": (
        [
            user("Go."),
            calls(("f", {"n": "?"}), train=False),
            tool("f", "Error"),
            calls(("f", {"n": 1})),
            tool("f", "1"),
            model("Ok.", train=False),
            user("Go on."),
            model("Done.", train=True),
        ],
        USER + '<|tool_call>call:f{n:<|"|>?<|"|>}<tool_call|><|tool_response>response:f{value:<|"|>Error<|"|>}'
        "<tool_response|>⟦<|tool_call>call:f{n:1}<tool_call|><|tool_response>⟧"
        'response:f{value:<|"|>1<|"|>}<tool_response|>Ok.<turn|>\n<|turn>user\nGo on.<turn|>\n<|turn>model\n'
        "⟦Done.<turn|>⟧\n",
    ),
    "untrained text in front of a trained call": (
        [user("Go."), model("Let me see.", train=False), calls(("f", {})), tool("f", "1"), model("Ok.")],
        USER + "Let me see.⟦<|tool_call>call:f{}<tool_call|><|tool_response>⟧"
        'response:f{value:<|"|>1<|"|>}<tool_response|>⟦Ok.<turn|>⟧\n',
    ),
    "trained text in front of an untrained call": (
        [user("Go."), model("Let me see."), calls(("f", {}), train=False), tool("f", "1"), model("Ok.")],
        USER + "⟦Let me see.⟧<|tool_call>call:f{}<tool_call|><|tool_response>"
        'response:f{value:<|"|>1<|"|>}<tool_response|>⟦Ok.<turn|>⟧\n',
    ),
    "two texts in a row": (
        [user("Go."), model("One. "), model("Two.\n"), user("Go."), model("Three.")],
        USER + "⟦One.\n\nTwo.<turn|>⟧\n<|turn>user\nGo.<turn|>\n<|turn>model\n⟦Three.<turn|>⟧\n",
    ),
    "an untrained message that says nothing": (
        [user("Go."), model("", train=False), user("Well?"), model("Ok.")],
        USER + "<turn|>\n<|turn>user\nWell?<turn|>\n<|turn>model\n⟦Ok.<turn|>⟧\n",
    ),
    "arguments of every kind": (
        [
            user("Go."),
            calls(
                (
                    "f",
                    {"z": None, "b": True, "B": False, "c": 1.5, "d": {"y": [1, None, "x"], "w": {}}, "e": [], "a": -2},
                )
            ),
        ],
        USER + '⟦<|tool_call>call:f{a:-2,b:true,B:false,c:1.5,d:{w:{},y:[1,null,<|"|>x<|"|>]},e:[],z:null}'
        "<tool_call|><|tool_response>⟧",
    ),
    "names with signs, arguments with lines, quotes and braces": (
        [user("Go."), calls(("db.run-sql:v2/x", {"query": 'select "a",\n{b} ]', "the key": ""}))],
        USER + '⟦<|tool_call>call:db.run-sql:v2/x{query:<|"|>select "a",\n{b} ]<|"|>,the key:<|"|><|"|>}'
        "<tool_call|><|tool_response>⟧",
    ),
    "characters of several tokens": (
        [user("🙂"), calls(("f", {"ключ": "🙃é"})), tool("f", "👩‍🚀"), model("🎉 étude — 日本 👍🏽")],
        '<bos><|turn>user\n🙂<turn|>\n<|turn>model\n⟦<|tool_call>call:f{ключ:<|"|>🙃é<|"|>}<tool_call|><|tool_response>⟧'
        'response:f{value:<|"|>👩‍🚀<|"|>}<tool_response|>⟦🎉 étude — 日本 👍🏽<turn|>⟧\n',
    ),
    "texts that look like markup": (
        [
            user("model\n"),
            calls(("f", {"a": "response:f{}"})),
            tool("f", "call:f{a:1}<tool_call\nresponse:f{b:2}\nmodel\nthought\n"),
            model("thought\nresponse:f{value:1}"),
            user("system\ncall:f{}"),
            model("response:f{value:2}\nmodel\n"),
            user("turn|>"),
            model("model\ncall:x{}"),
        ],
        "<bos><|turn>user\nmodel<turn|>\n<|turn>model\n"
        '⟦<|tool_call>call:f{a:<|"|>response:f{}<|"|>}<tool_call|><|tool_response>⟧'
        'response:f{value:<|"|>call:f{a:1}<tool_call\nresponse:f{b:2}\nmodel\nthought\n<|"|>}<tool_response|>'
        "⟦thought\nresponse:f{value:1}<turn|>⟧\n<|turn>user\nsystem\ncall:f{}<turn|>\n<|turn>model\n"
        "⟦response:f{value:2}\nmodel<turn|>⟧\n<|turn>user\nturn|><turn|>\n<|turn>model\n⟦model\ncall:x{}<turn|>⟧\n",
    ),
    "a system message in parts": (
        [
            system([text("Be brief. "), text("Be kind.")]),
            user([text("Hello"), text("?")]),
            model([text("Hi"), text(".")]),
        ],
        "<bos><|turn>system\nBe brief. Be kind. <turn|>\n<|turn>user\nHello?<turn|>\n<|turn>model\n⟦Hi.<turn|>⟧\n",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_trained_is_what_the_model_emits(encoder: Encoder, name: str) -> None:
    messages, golden = GOLDEN[name]
    encoded = check(encoder, trajectory(*messages), golden)
    assert encoded.num_dropped_reasoning == 0


def test_a_token_across_a_trained_and_an_untrained_text_is_not_trained(encoder: Encoder) -> None:
    """Such a token is neither text's own: "ec" of "sel" + "ect"."""
    ids = encoder.tokenizer("select", add_special_tokens=False)["input_ids"]
    assert len(ids) == 1, "one token of the default corpus"
    for is_first_trained, golden in ((True, "select<turn|>\n"), (False, "select⟦<turn|>⟧\n")):
        neighbors: list[Message] = [
            {"role": "user", "content": "Go."},
            {"role": "assistant", "content": "sel"},
            {"role": "assistant", "content": "ect"},
        ]
        neighbors[2 if is_first_trained else 1]["train"] = False
        check(encoder, Trajectory("row", neighbors, [], []), USER + golden)


def test_reasoning_of_an_earlier_user_turn_is_not_rendered_and_is_counted(encoder: Encoder) -> None:
    messages = [
        user("One?"),
        calls(("f", {}), reasoning_content="Why f."),
        tool("f", "1"),
        model("One.", reasoning_content="Why one."),
        user("Two?"),
        model("Two.", reasoning_content="Why two."),
    ]
    golden = (
        "<bos><|turn>user\nOne?<turn|>\n<|turn>model\n⟦<|tool_call>call:f{}<tool_call|><|tool_response>⟧"
        'response:f{value:<|"|>1<|"|>}<tool_response|>⟦One.<turn|>⟧\n<|turn>user\nTwo?<turn|>\n<|turn>model\n'
        "⟦<|channel>thought\nWhy two.\n<channel|>Two.<turn|>⟧\n"
    )
    assert check(encoder, trajectory(*messages), golden).num_dropped_reasoning == 2


def test_a_turn_of_which_only_dropped_reasoning_was_said_is_not_trained(encoder: Encoder) -> None:
    messages = [user("One?"), model(None, reasoning_content="Why."), user("Two?"), model("Two.")]
    golden = (
        "<bos><|turn>user\nOne?<turn|>\n<|turn>model\n<turn|>\n<|turn>user\nTwo?<turn|>\n<|turn>model\n⟦Two.<turn|>⟧\n"
    )
    assert check(encoder, trajectory(*messages), golden).num_dropped_reasoning == 1


@pytest.mark.parametrize(
    ("setting", "emitted"),
    [
        ("message", "<|channel>thought\nWhy.\n<channel|>Let me see."),
        ("reasoning", "<|channel>thought\nWhy.\nLet me see.\n<channel|>"),
    ],
)
def test_text_beside_a_call_stands_in_front_of_it(encoder: Encoder, setting: str, emitted: str) -> None:
    messages = [
        user("Go."),
        calls(("f", {}), content="Let me see. ", reasoning_content="Why."),
        tool("f", "1"),
        model("Ok."),
    ]
    golden = (
        f"{USER}⟦{emitted}<|tool_call>call:f{{}}<tool_call|><|tool_response>⟧"
        'response:f{value:<|"|>1<|"|>}<tool_response|>⟦Ok.<turn|>⟧\n'
    )
    check(encoder, trajectory(*messages, text_beside_call=setting), golden)


def test_the_row_of_an_analyst(encoder: Encoder) -> None:
    """Arguments as JSON text, no content beside calls, an image in a tool message, no list of tools."""
    sql = "select month, sum(total) from sales where quarter = 'Q2' group by month"
    chart = {"values": [412, 398, 455], "labels": ["Apr", "May", "Jun"], "kind": "line"}
    row = trajectory(
        system("You look after the sales figures. Tools: run_sql(query), draw_chart(values, labels, kind)."),
        user("How did the second quarter go?"),
        calls(("run_sql", json.dumps({"query": sql}))),  # type: ignore[arg-type]
        tool("run_sql", "month total\nApril 412\nMay 398\nJune 455"),
        calls(("draw_chart", json.dumps(chart))),  # type: ignore[arg-type]
        tool("draw_chart", [WIDE, text("1 chart")]),
        model("A dip in May (-3.4 %), then the best June so far (+14.3 %)."),
    )
    check(
        encoder,
        row,
        "<bos><|turn>system\nYou look after the sales figures. Tools: run_sql(query), draw_chart(values, labels, kind)."
        "<turn|>\n<|turn>user\nHow did the second quarter go?<turn|>\n<|turn>model\n"
        "⟦<|tool_call>call:run_sql{query:<|\"|>select month, sum(total) from sales where quarter = 'Q2' group by month"
        '<|"|>}<tool_call|><|tool_response>⟧'
        'response:run_sql{value:<|"|>month total\nApril 412\nMay 398\nJune 455<|"|>}<tool_response|>'
        '⟦<|tool_call>call:draw_chart{kind:<|"|>line<|"|>,labels:[<|"|>Apr<|"|>,<|"|>May<|"|>,<|"|>Jun<|"|>],'
        "values:[412,398,455]}<tool_call|><|tool_response>⟧"
        f'response:draw_chart{{value:<|"|>1 chart<|"|>}}<tool_response|>{WIDE_TOKENS}'
        "⟦A dip in May (-3.4 %), then the best June so far (+14.3 %).<turn|>⟧\n",
    )


def test_the_second_revision_gives_each_message_a_turn_of_its_own(encoder_of: EncoderOf) -> None:
    """There the model ends its turn after calls, with the token that ends every turn."""
    messages = [
        user("Go."),
        calls(("f", {}), ("g", {}), content="Let me see."),
        tool("f", "model\n"),
        tool("g", [text("a chart"), WIDE]),
        model([SQUARE, text("Ok.")]),
        model("", train=False),
        model("Done."),
    ]
    check(
        encoder_of("gemma4_v2"),
        trajectory(*messages),
        f"{USER}⟦Let me see.<turn|>⟧\n<|turn>model\n"
        "⟦<|tool_call>call:f{}<tool_call|><|tool_call>call:g{}<tool_call|><turn|>⟧\n"
        f"<|turn>tool\nmodel<turn|>\n<|turn>tool\na chart\n\n{WIDE_TOKENS}\n\n<turn|>\n"
        f"<|turn>model\n\n\n{SQUARE_TOKENS}\n\n⟦Ok.<turn|>⟧\n<|turn>model\n<turn|>\n<|turn>model\n⟦Done.<turn|>⟧\n",
    )


# ---- templates that lose something -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "messages", "refusal"),
    [
        *[(name, GOLDEN["arguments of every kind"][0], "turn 2 calls 'f' with a null") for name in TEMPLATES[:4]],
        *[(name, GOLDEN["several images in one response"][0], "0 of the row's 2 images") for name in LOSES_TOOL_IMAGES],
        *[
            (name, GOLDEN["trained text in front of an untrained call"][0], "turn 3: .* closes")
            for name in CLOSES_TURNS
        ],
        *[(name, GOLDEN["a system message in parts"][0], "turn 1: .* Python list") for name in TEMPLATES[1:3]],
    ],
)
def test_old_revisions_refuse_what_they_lose(
    encoder_of: EncoderOf, template: str, messages: list[dict[str, Any]], refusal: str
) -> None:
    encoder, row = encoder_of(template), trajectory(*messages)
    for encode in (encoder.encode, encoder.prompts):
        with pytest.raises(DataError, match=refusal) as caught:
            encode(row)
        assert "gemma4_v5" in str(caught.value), "the remedy"


def variant(encoder: Encoder, *replacements: tuple[str, str]) -> str:
    template = encoder.processor.chat_template
    for old, new in replacements:
        assert old in template
        template = template.replace(old, new)
    return template


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        ("{{- format_tool_response_block(ns_tname.name, tool_body) -}}", "", "turn 3: .* the tool's answer"),
        ("{{- message['content'] | trim -}}", "{{- message['content'] | trim | upper -}}", "turn 1: .* 'Warm in Oslo"),
        ("{{- strip_thinking(message['content']) -}}", "", "turn 4: .* 'It is 7 C.'"),
        ("'<|tool_call>call:' + function['name']", "'<|tool_call>call:?'", "turn 2: .* the call of 'weather'"),
        ("{{- '<|turn>' + role", "{{- '<|turn>' + role | upper", "turn 1: .* the user turn"),
        ("{{- bos_token -}}", "{{- raise_exception('no such luck') -}}", "cannot render this row: no such luck"),
    ],
)
def test_a_template_that_loses_a_part_is_refused(
    encoder: Encoder, tiny_model: Callable[..., Path], tmp_path: Path, old: str, new: str, lost: str
) -> None:
    (tmp_path / "own.jinja").write_text(variant(encoder, (old, new)))
    own = load_encoder(str(tiny_model()), EncodingConfig(chat_template=str(tmp_path / "own.jinja")))
    row = trajectory(
        user("Warm in Oslo?"), calls(("weather", {"city": "Oslo"})), tool("weather", "7 C"), model("It is 7 C.")
    )
    with pytest.raises(DataError, match=lost):
        own.encode(row)


def test_what_is_no_processor_and_no_template_is_said_so(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ bos_token }}\n{% if messages %}")
    with pytest.raises(ConfigError, match=r"is none that Jinja reads: line 2: Unexpected end of template.*gemma4_v5"):
        load_encoder(str(tiny_model()), EncodingConfig(chat_template=str(tmp_path / "own.jinja")))
    with pytest.raises(CheckpointError, match=r"holds no config.json nor any other file of a model"):
        load_encoder(str(tmp_path), EncodingConfig())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no processor can be loaded .*config.json .*refused by transformers"):
        load_encoder(str(tmp_path), EncodingConfig())
    with pytest.raises(ConfigError, match=r"gemma4_v9.*gemma4_v5"):
        load_encoder(str(tiny_model()), EncodingConfig(chat_template="gemma4_v9"))


# ---- the template of the large models --------------------------------------------------------------------------------


EMPTY_THOUGHT = (
    "{%- if role == 'model' and not enable_thinking -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}"
)


@pytest.fixture
def large(encoder: Encoder, tiny_model: Callable[..., Path], tmp_path: Path) -> Encoder:
    """An encoder whose model turns open with an empty thought while thinking is off, as prompts of 12B and up do."""
    turn, prompt = "{{- '<|turn>' + role + '\\n' }}", "{{- '<|turn>model\\n' -}}"
    template = variant(
        encoder,
        (turn, turn + EMPTY_THOUGHT),
        (prompt, "{%- set role = 'model' -%}" + prompt + EMPTY_THOUGHT),
    )
    (tmp_path / "large.jinja").write_text(template)
    settings = EncodingConfig(chat_template=str(tmp_path / "large.jinja"), enable_thinking=False)
    return load_encoder(str(tiny_model()), settings)


def test_an_empty_thought_of_the_template_is_not_trained(large: Encoder) -> None:
    row = trajectory(
        user("Go."),
        calls(("f", {}), content="Let me see."),
        tool("f", "1"),
        model("Ok."),
        user("Think."),
        model("Done.", reasoning_content="Why."),
    )
    thought = "<|channel>thought\n<channel|>"
    check(
        large,
        row,
        f"{USER}{thought}⟦Let me see.<|tool_call>call:f{{}}<tool_call|><|tool_response>⟧"
        'response:f{value:<|"|>1<|"|>}<tool_response|>⟦Ok.<turn|>⟧\n'
        f"<|turn>user\nThink.<turn|>\n<|turn>model\n{thought}⟦<|channel>thought\nWhy.\n<channel|>Done.<turn|>⟧\n",
    )
    assert [prompt.text.endswith(f"<|turn>model\n{thought}") for prompt in large.prompts(row)] == [True, False, True]


def test_a_model_learns_from_rows_with_empty_thoughts(large: Encoder, tiny_model: Callable[..., Path]) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    row = trajectory(user("Go."), calls(("f", {"a": 1})), tool("f", [WIDE]), model("Ok."))
    encoded = large.encode(row)
    lists = {"input_ids": encoded.input_ids, "labels": encoded.labels, "mm_token_type_ids": encoded.mm_token_type_ids}
    batch = {name: torch.tensor([values]) for name, values in lists.items()} | large.pixels(row.images)
    learner = AutoModelForImageTextToText.from_pretrained(tiny_model())
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = learner(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, losses


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enable_thinking", [False, True])
@pytest.mark.parametrize("template", [NEWEST, "gemma4_v2"])
def test_a_prompt_is_what_a_server_renders_before_each_decision(
    encoder_of: EncoderOf, template: str, enable_thinking: bool
) -> None:
    encoder = encoder_of(template, enable_thinking=enable_thinking)
    row = trajectory(
        system("Be brief."),
        user([SQUARE, text("Redraw it.")]),
        calls(("draw", {"wide": True}), ("draw", {"wide": False}), content="One moment."),  # messages 2 and 3
        tool("draw", [WIDE]),
        tool("draw", [text("the same"), SQUARE]),
        calls(("draw", {"wide": "?"}), train=False),  # message 6
        tool("draw", "Error"),
        model("Here it is.", reasoning_content="Both are there."),  # message 8
        user("Thanks."),
        model("You are welcome."),  # message 10
        tools=[
            {
                "function": {
                    "name": "draw",
                    "description": "Draws.",
                    "parameters": {"properties": {"wide": {"type": "boolean"}}},
                }
            }
        ],
    )
    assert [message["role"] for message in row.messages].index("tool") == 4
    prompts = encoder.prompts(row)
    assert [prompt.turn for prompt in prompts] == [3, 9, 11]
    assert [prompt.gold for prompt in prompts] == [row.messages[2:4], row.messages[8:9], row.messages[10:]]
    assert [prompt.images for prompt in prompts] == [row.images[:1], row.images, row.images]
    for prompt in prompts:
        before = row.messages[: prompt.turn - 1]
        expected = processed(encoder, before, row, add_generation_prompt=True)
        assert prompt.input_ids == expected["input_ids"][0].tolist()
        assert prompt.mm_token_type_ids == expected["mm_token_type_ids"][0].tolist()
        assert encoder.tokenizer.decode(prompt.input_ids).endswith(prompt.text[-20:])
        assert prompt.text.count("<|image|>") == len(prompt.images)
        whole = encoder.encode(row)
        answer = "<|turn>model\n" if template != NEWEST or before[-1]["role"] == "user" else "<tool_response|>"
        if enable_thinking and answer == "<tool_response|>":
            answer += "<|channel>thought\n"  # the newest template opens the thought itself
        else:
            assert prompt.input_ids == whole.input_ids[: len(prompt.input_ids)], "it is the beginning of the row"
        assert prompt.text.endswith(answer)


def test_a_prompt_stands_where_training_begins(encoder: Encoder) -> None:
    """Without earlier reasoning a prompt is the row up to the first trained token that answers it."""
    for messages, _ in GOLDEN.values():
        row = trajectory(*messages)
        encoded = encoder.encode(row)
        for prompt in encoder.prompts(row):
            end = len(prompt.input_ids)
            assert prompt.input_ids == encoded.input_ids[:end]
            assert encoded.labels[end - 1] == IGNORE_INDEX
            if isinstance(prompt.gold[0]["content"], str) or prompt.gold[0]["content"][0]["type"] == "text":
                assert encoded.labels[end] == encoded.input_ids[end]


# ---- the fingerprint -------------------------------------------------------------------------------------------------


def test_thinking_changes_ids_and_fingerprint(encoder_of: EncoderOf) -> None:
    row = trajectory(user("Go."), model("Ok.", reasoning_content="Why."))
    thinking = encoder_of(enable_thinking=True)
    golden = (
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nGo.<turn|>\n<|turn>model\n"
        "⟦<|channel>thought\nWhy.\n<channel|>Ok.<turn|>⟧\n"
    )
    check(thinking, row, golden)
    check(encoder_of(), row, golden.replace("<|turn>system\n<|think|>\n<turn|>\n", ""))
    assert thinking.fingerprint != encoder_of().fingerprint


def test_the_fingerprint_is_that_of_the_settings_alone(
    encoder: Encoder, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Equal in another process, after use, and for a saved copy, as beside every checkpoint."""
    script = (
        "import sys; from gemma_dist.config import EncodingConfig; from gemma_dist.data.encode import load_encoder;"
        "settings = EncodingConfig(chat_template='gemma4_v5', enable_thinking=False);"
        "print(load_encoder(sys.argv[1], settings).fingerprint)"
    )
    result = subprocess.run([sys.executable, "-c", script, tiny_model()], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == encoder.fingerprint
    settings = EncodingConfig(chat_template=NEWEST, enable_thinking=False)
    used = load_encoder(str(tiny_model()), settings)
    processor: Any = used.processor
    processor.tokenizer(["a", "several tokens"], padding=True, truncation=True, max_length=3)
    assert used.fingerprint == encoder.fingerprint
    processor.save_pretrained(tmp_path)
    assert load_encoder(str(tmp_path), EncodingConfig(enable_thinking=False)).fingerprint == encoder.fingerprint


def test_the_fingerprint_changes_with_template_tokenizer_and_images(
    encoder_of: EncoderOf, tiny_model: Callable[..., Path]
) -> None:
    def changed(change: Callable[[Any], Any]) -> str:
        settings = EncodingConfig(chat_template=NEWEST, enable_thinking=False)
        encoder = load_encoder(str(tiny_model()), settings)
        change(encoder.processor)
        return encoder.fingerprint

    fingerprints = {
        *(encoder_of(template).fingerprint for template in TEMPLATES),
        changed(lambda processor: processor.tokenizer.add_tokens(["Oslo"])),
        changed(lambda processor: setattr(processor.image_processor, "max_soft_tokens", 140)),
        changed(lambda processor: setattr(processor.image_processor, "rescale_factor", 1.0)),
        changed(lambda processor: setattr(processor, "chat_template", processor.chat_template + " ")),
    }
    assert len(fingerprints) == len(TEMPLATES) + 4


# ---- any trajectory --------------------------------------------------------------------------------------------------

LOOKALIKES = [
    "call:f{",
    "response:f{",
    "}",
    "model\n",
    "thought\n",
    "<|",
    "|>",
    "<turn",
    " ",
    "\n",
    "🙂",
    "é",
    "system\n",
]
texts = (
    st.lists(st.characters(exclude_categories=["Cs"]) | st.sampled_from(LOOKALIKES), max_size=6)
    .map("".join)
    .filter(lambda text: not any(token in text for token in CONTROL_TOKENS))
)
names = st.sampled_from(["f", "db.run-sql", "Ä"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("aBcd"), inner, max_size=2),
    max_leaves=4,
)


def make_up_no_token(parts: list[dict[str, Any]]) -> bool:
    """Whether no control token comes together from several parts: such rows are refused."""
    together = "".join(part.get("text", "") for part in parts)
    return not any(token in together for token in CONTROL_TOKENS)


parts = st.lists(st.builds(text, texts) | st.sampled_from([SQUARE, WIDE]), min_size=1, max_size=3).filter(
    make_up_no_token
)
contents = texts | parts


@st.composite
def exchanges(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A user's turn, some rounds of calls with their answers, mostly a final text."""
    thoughts: st.SearchStrategy[dict[str, str]] = st.just({}) | st.builds(
        lambda thought: {"reasoning_content": f"r{thought}"}, texts
    )
    messages = [user(draw(contents))]
    for functions in draw(st.lists(st.lists(names, min_size=1, max_size=2), max_size=2)):
        named = [(name, draw(st.dictionaries(st.sampled_from("abAb_"), json_values, max_size=3))) for name in functions]
        messages.append(calls(*named, content=draw(contents), **draw(thoughts), train=draw(st.booleans())))
        messages += [tool(name, draw(contents)) for name in functions]
    if draw(st.integers(0, 3)):
        messages.append(model(f"a{draw(texts)}", **draw(thoughts)))
    return messages


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages = [system(draw(texts))] if draw(st.booleans()) else []
    for exchange in draw(st.lists(exchanges(), max_size=2)):
        messages += exchange
    last = calls(("f", draw(st.dictionaries(st.sampled_from("xyz"), json_values, max_size=3))))
    return [*messages, user(draw(contents)), last if draw(st.booleans()) else model(draw(texts) + "z")]


def written(value: Any) -> str:
    """A value as Gemma's call format writes it."""
    if isinstance(value, dict):
        items = sorted(value.items(), key=lambda item: item[0].lower())
        return "{" + ",".join(f"{key}:{written(inner)}" for key, inner in items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else str(value)
    )


def emitted(messages: Sequence[Mapping[str, Any]]) -> str:
    """All that the trained messages should make the model say, by the rules of the newest template."""
    last_user = max(turn for turn, message in enumerate(messages) if message["role"] == "user")
    said = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or not message.get("train", True):
            continue
        content = message["content"] if isinstance(message["content"], list) else [text(message["content"])]
        if turn > last_user and "reasoning_content" in message:
            said += f"<|channel>thought\n{message['reasoning_content']}\n<channel|>"
        for call in message.get("tool_calls", []):
            said += f"<|tool_call>call:{call['function']['name']}{written(call['function']['arguments'])}<tool_call|>"
        said += "".join(part["text"].strip() for part in content if part["type"] == "text")
        following = next((later["role"] for later in messages[turn + 1 :] if later["role"] != "tool"), None)
        if "tool_calls" in message:
            said += "<|tool_response>"
        elif following != "assistant":
            said += "<turn|>"
    return said


INTERRUPTED = [  # the model's image is not the one that the tool returned before the user spoke
    user("x"),
    calls(("f", {})),
    tool("f", [SQUARE]),
    user("y"),
    calls(("f", {}), content=[SQUARE]),
    tool("f", ""),
    user("z"),
    model("z"),
]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(messages=conversations(), setting=st.sampled_from(["message", "reasoning"]))
@example(messages=INTERRUPTED, setting="message")
def test_any_trajectory_has_the_processors_ids_and_trains_what_the_model_says(
    encoder: Encoder, messages: list[dict[str, Any]], setting: str
) -> None:
    row = trajectory(*messages, text_beside_call=setting)
    encoded = check_against_processor(encoder, row)
    trained = [label for label in encoded.labels if label != IGNORE_INDEX]
    assert encoder.tokenizer.decode(trained) == emitted(row.messages)


# ---- calls read back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("f", {"a<b": 1}, "the row (argument 'a<b'); rename"),
        ("f", {"a<b": "x"}, "the row (argument 'a<b'); rename"),
        ("f", {"ok": 1, "a<b": "x", "z": None}, "the row (argument 'a<b'); rename"),
        (":f", {"a": 1}, "the row; rename"),
        ("f", {"ok": [1, "x", {"y": True}], "outer": {"a<b": 1}}, "the row (argument 'outer'); rename"),
    ],
)
def test_a_call_that_does_not_read_back_is_refused(
    encoder: Encoder, name: str, arguments: dict[str, Any], words: str
) -> None:
    words = f"turn 2: the call of {name!r} does not read back from Gemma's call format as it stands in {words}"
    with pytest.raises(DataError, match=re.escape(words)):
        encoder.encode(trajectory(user("Go."), calls((name, arguments))))
