"""Thinking is on where a row has thoughts, all of them can be trained, and answers stand behind a server's prompts."""

import base64
import functools
import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemma_dist.__main__ import main
from gemma_dist.config import EncodingConfig, EvaluateConfig, RowConfig, ShardConfig
from gemma_dist.data import served
from gemma_dist.data.encode import Encoder, load_encoder
from gemma_dist.data.encoded import IGNORE_INDEX, Encoded
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.data.unroll import unroll
from gemma_dist.errors import DataError
from gemma_dist.logs import log
from gemma_dist.recipe import load_config
from gemma_dist.shards import pieces
from gemma_dist.shards.reader import open_shards
from gemma_dist.shards.sharding import run_shard
from gemma_dist.show.prompts import check_prompts
from gemma_dist.show.row import inspect_row
from tests.support import corpus
from tests.support.corpus import picture, shard_rows, write_rows

TEMPLATES = ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5")  # all that TRL ships
NEWEST = TEMPLATES[-1]
USER = "<bos><|turn>user\nGo.<turn|>\n<|turn>model\n"
THINKING_USER = "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nGo.<turn|>\n<|turn>model\n"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def encoder_of(model: str) -> Callable[..., Encoder]:
    """Encoders of the tiny model by settings."""

    @functools.cache
    def load(template: str = NEWEST, **settings: Any) -> Encoder:
        return load_encoder(model, EncodingConfig(chat_template=template, **settings))

    return load


@pytest.fixture(scope="module")
def encoder(encoder_of: Callable[..., Encoder]) -> Encoder:
    return encoder_of()


# ---- rows ------------------------------------------------------------------------------------------------------------


def user(content: Any = "Go.") -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: str = "", thought: str | None = None, *, calls: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content, **more}
    if calls:
        message["tool_calls"] = [{"function": {"name": name, "arguments": {}}} for name in calls]
    if thought:
        message["reasoning_content"] = thought
    return message


def result(name: str, content: Any = "1") -> dict[str, Any]:
    return {"role": "tool", "name": name, "content": content}


def image(number: int) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(picture(number)).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def parsed(*messages: dict[str, Any], **fields: Any) -> Trajectory:
    return parse_row({"id": "a", "messages": list(messages), **fields}, "rows.jsonl:1", RowConfig())


def marked(encoder: Encoder, encoded: Encoded) -> str:
    """The decoded tokens, with ⟦ ⟧ around the trained ones."""
    shown = ""
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    for trained, run in groupby(pairs, lambda pair: pair[1] != IGNORE_INDEX):
        piece = encoder.tokenizer.decode([token for token, _ in run])
        shown += f"⟦{piece}⟧" if trained else piece
    return shown


def check_against_prompts(encoder: Encoder, row: Trajectory) -> None:
    """In front of each trained answer stand the ids that the processor itself makes of the history."""
    encoded = encoder.encode(row)
    processor: Any = encoder.processor
    assert encoded.answers
    for index, num_tokens in encoded.answers:
        history = [{k: v for k, v in message.items() if k != "train"} for message in row.messages[:index]]
        prompt = processor.apply_chat_template(
            history,
            tools=row.tools or None,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=encoded.enable_thinking,
        )
        ids = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert encoded.input_ids[:num_tokens] == ids
        assert encoded.labels[num_tokens - 1] == IGNORE_INDEX != encoded.labels[num_tokens]


# ---- on or off -------------------------------------------------------------------------------------------------------

THINKS = [user(), says(thought="Why f.", calls=("f",)), result("f"), says("Ok.", "Why ok.")]
PLAIN = [user(), says(calls=("f",)), result("f"), says("Ok.")]


@pytest.mark.parametrize("template", TEMPLATES)
def test_auto_thinks_where_a_trained_thought_is_shown(encoder_of: Callable[..., Encoder], template: str) -> None:
    encoder = encoder_of(template)
    shows_thoughts = template != "gemma4_v2"
    assert encoder.encode(parsed(*THINKS)).enable_thinking is shows_thoughts
    assert encoder.encode(parsed(*PLAIN)).enable_thinking is False
    assert encoder.encode(parsed(*THINKS, user(), says("Bye."))).enable_thinking is False, "the thoughts are dropped"
    untrained = [THINKS[0], THINKS[1] | {"train": False}, THINKS[2], says("Ok.")]
    assert encoder.encode(parsed(*untrained)).enable_thinking is False
    for row in (parsed(*THINKS), parsed(*PLAIN)):
        check_against_prompts(encoder, row)


@pytest.mark.parametrize("setting", ["auto", True, False])
@pytest.mark.parametrize("said", [True, False, None])
@pytest.mark.parametrize("messages", [THINKS, PLAIN])
def test_a_row_that_says_it_wins_over_the_setting(
    encoder_of: Callable[..., Encoder], messages: list[dict[str, Any]], said: bool | None, setting: Any
) -> None:
    row = parsed(*messages, chat_template_kwargs={"enable_thinking": said})
    by_setting = messages is THINKS if setting == "auto" else setting
    encoded = encoder_of(enable_thinking=setting).encode(row)
    assert encoded.enable_thinking is (by_setting if said is None else said)
    assert row.enable_thinking is said
    thoughts_without_thinking = messages is THINKS and not encoded.enable_thinking
    assert encoded.notes[served.THINKS_WHILE_OFF] == 2 * thoughts_without_thinking


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        (None, None),
        ("", None),
        ({}, None),
        ({"enable_thinking": True}, True),
        ({"enable_thinking": False, "preserve_thinking": False, "add_generation_prompt": True}, False),
        ({"enable_thinking": None, "thinking": None}, None),  # as Arrow fills in
        ('{"enable_thinking": true}', True),
        (
            {"custom_instructions": "", "enable_thinking": False, "python_tools": [], "xml_tools": []},
            False,
        ),  # smoltalk2
        ({"documents": [], "custom_instructions": None, "tools": {}}, None),
    ],
)
def test_template_settings_of_a_row_that_are_taken(kwargs: object, said: bool | None) -> None:
    assert parsed(*PLAIN, chat_template_kwargs=kwargs).enable_thinking is said


@pytest.mark.parametrize(
    ("kwargs", "refusal"),
    [
        ({"preserve_thinking": True}, "`preserve_thinking` is True.*only enable_thinking.*`unroll: reasoning`"),
        ({"thinking": True}, "`thinking` is True.*calls it enable_thinking"),
        ({"reasoning_effort": "high"}, "`reasoning_effort` is 'high', but only enable_thinking is carried out; remove"),
        ({"custom_instructions": "Be kind.", "xml_tools": []}, "`custom_instructions` is 'Be kind.', but only enable"),
        ({"xml_tools": ["<f>"]}, "`xml_tools` is .*but only enable_thinking"),
        ({"documents": [{"text": "t"}]}, "`documents` is .*Gemma's template shows none"),
        ({"enable_thinking": "yes"}, "`enable_thinking` is 'yes'; write true or false"),
        ([True], "is no object"),
        (False, "is no object"),
        ("{", "not JSON"),
    ],
)
def test_template_settings_of_a_row_that_are_refused(kwargs: object, refusal: str) -> None:
    with pytest.raises(DataError, match=rf"rows.jsonl:1: `chat_template_kwargs`: .*{refusal}"):
        parsed(*PLAIN, chat_template_kwargs=kwargs)


def test_a_recipe_takes_auto_and_truth_values() -> None:
    recipe = ROOT / "launch/cpu_lora.yaml"
    for word, value in (("auto", "auto"), ("true", True), ("false", False)):
        assert load_config(recipe, [f"enable_thinking={word}"]).data.enable_thinking is value
    assert load_config(recipe).data.enable_thinking == "auto"


# ---- the prompt's own thought ----------------------------------------------------------------------------------------


def test_a_thought_that_the_prompt_opens_is_not_trained_as_the_models(encoder: Encoder) -> None:
    row = parsed(*THINKS)
    assert marked(encoder, encoder.encode(row)) == (
        f"{THINKING_USER}⟦<|channel>thought\nWhy f.\n<channel|><|tool_call>call:f{{}}<tool_call|><|tool_response>⟧"
        'response:f{value:<|"|>1<|"|>}<tool_response|><|channel>thought\n⟦Why ok.\n<channel|>Ok.<turn|>⟧\n'
    )


def test_a_last_answer_without_a_thought_closes_the_one_that_the_prompt_opened(encoder: Encoder) -> None:
    row = parsed(*THINKS[:3], says("Ok."))
    encoded = encoder.encode(row)
    assert marked(encoder, encoded) == (
        f"{THINKING_USER}⟦<|channel>thought\nWhy f.\n<channel|><|tool_call>call:f{{}}<tool_call|><|tool_response>⟧"
        'response:f{value:<|"|>1<|"|>}<tool_response|><|channel>thought\n⟦<channel|>Ok.<turn|>⟧\n'
    )
    assert encoded.notes == {served.CLOSED_BY_MODEL: 1}
    check_against_prompts(encoder, row)


MIDDLE = [user(), says(thought="Why.", calls=("f", "g")), result("f"), result("g"), says("Now h.", calls=("h",))]
MIDDLE += [result("h"), says("Ok.", "Done.")]


def test_an_earlier_answer_without_a_thought_is_not_trained_and_counted(encoder: Encoder) -> None:
    row = parsed(*MIDDLE)
    encoded = encoder.encode(row)
    assert marked(encoder, encoded) == (
        f"{THINKING_USER}⟦<|channel>thought\nWhy.\n<channel|><|tool_call>call:f{{}}<tool_call|>"
        "<|tool_call>call:g{}<tool_call|><|tool_response>⟧"
        'response:f{value:<|"|>1<|"|>}<tool_response|><|tool_response>response:g{value:<|"|>1<|"|>}<tool_response|>'
        'Now h.<|tool_call>call:h{}<tool_call|><|tool_response>response:h{value:<|"|>1<|"|>}<tool_response|>'
        "<|channel>thought\n⟦Done.\n<channel|>Ok.<turn|>⟧\n"
    )
    assert encoded.notes == {served.UNTRAINED: 1}
    assert "`unroll: reasoning`" in served.UNTRAINED
    check_against_prompts(encoder, row)


def test_old_revisions_open_no_thought_and_train_every_answer(encoder_of: Callable[..., Encoder]) -> None:
    row = parsed(*MIDDLE[:4], says(calls=("h",)), result("h"), says("Ok."))
    for template in TEMPLATES[:-1]:
        encoded = encoder_of(template).encode(row)
        assert len(encoded.answers) == 3
        assert not encoded.notes
        check_against_prompts(encoder_of(template), row)


def test_line_breaks_around_a_thought_are_the_templates(encoder: Encoder) -> None:
    row = parsed(*THINKS[:3], says("Ok.", "\nWhy ok.\n\n"))
    assert row.messages[-1]["reasoning_content"] == "Why ok."
    check_against_prompts(encoder, row)


@pytest.fixture(scope="module", params=["12b", "31b"])
def large(tiny_model: Callable[..., Path], request: pytest.FixtureRequest) -> Encoder:
    """An encoder of a large model: with thinking off, a prompt has an empty thought, a history none."""
    return load_encoder(str(tiny_model(request.param)), EncodingConfig())


def test_the_empty_thought_of_large_models_prompts_stands_in_front_of_answers(large: Encoder) -> None:
    row = parsed(user(), says("Let me see.", calls=("f",)), result("f"), says("Ok."), user("Bye."), says("Bye."))
    encoded = large.encode(row)
    assert marked(large, encoded) == (
        f"{USER}<|channel>thought\n<channel|>⟦Let me see.<|tool_call>call:f{{}}<tool_call|><|tool_response>⟧"
        'response:f{value:<|"|>1<|"|>}<tool_response|>⟦Ok.<turn|>⟧\n'
        "<|turn>user\nBye.<turn|>\n<|turn>model\n<|channel>thought\n<channel|>⟦Bye.<turn|>⟧\n"
    )
    assert encoded.notes == {served.CLOSED_BY_PROMPT: 2, served.SHOWN_LATER: 1}
    check_against_prompts(large, parsed(user(), says("Ok.")))
    check_against_prompts(large, parsed(user(), says("Ok.", "Why.")))  # thinking is on: no empty thought


def test_unroll_shows_an_empty_thought_to_the_answer_behind_it_alone(large: Encoder) -> None:
    first = [user(), says("Let me see.", calls=("f",)), result("f"), says(calls=("g",)), result("g")]
    row = parsed(*first, says("Ok."), user("Bye."), says("Bye."))
    samples = unroll(row, large, RowConfig(unroll="reasoning"))
    encoded = [large.encode(sample) for sample in samples]
    assert [sample.id for sample in samples] == ["a#turn-3", "a"]
    assert [[index for index, _ in one.answers] for one in encoded] == [[1], [4, 6, 8]]
    assert [one.notes for one in encoded] == [{served.CLOSED_BY_PROMPT: 1}] * 2
    for sample in samples:
        check_against_prompts(large, sample)
    row = parsed(user(), says("Ok."))
    assert unroll(row, large, RowConfig(unroll="reasoning")) == [row]


@pytest.mark.parametrize("style", ["12b", "26b", "31b"])
def test_every_answer_of_large_models_can_be_trained_behind_its_servers_prompt(
    tiny_model: Callable[..., Path], tmp_path: Path, style: str
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [*ROWS, *(corpus.row(number, num_calls=2) for number in range(4))])
    model = str(tiny_model(style))
    report = check_prompts(data, model, None, RowConfig(unroll="reasoning"), None)
    assert (report.differences, report.refused) == ([], [])
    as_it_is = check_prompts(data, model, None, RowConfig(), None)
    assert as_it_is.num_answers <= report.num_answers
    shown = "<|turn>model\\n▸<|channel>thought"  # by the trained history, to a later answer
    assert as_it_is.differences
    assert all(shown in found.trained and shown not in found.served for found in as_it_is.differences)


def test_a_template_without_the_models_empty_thought_is_warned_of(
    tiny_model: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    rows = [{"messages": [user(), says("Ok.")]}]
    for style, template, warned in (("12b", None, False), ("e4b", "gemma4_v4", False), ("12b", NEWEST, True)):
        caplog.clear()
        folder = tmp_path / f"{style}-{template}"
        folder.mkdir()
        shard_rows(folder, str(tiny_model(style)), rows, chat_template=template)
        # Not counted: where a test before called `main`, pytest has a second handler.
        assert ("opens an empty thought in front of each answer" in caplog.text) == warned
    encoder = load_encoder(str(tiny_model("12b")), EncodingConfig(chat_template=NEWEST))
    assert encoder.encode(parsed(user(), says("Ok."))).notes == {}


def test_an_earlier_answer_whose_thought_is_dropped_is_not_trained_either(encoder: Encoder) -> None:
    row = parsed(*THINKS, *THINKS)
    encoded = encoder.encode(row)
    assert [index for index, _ in encoded.answers] == [1, 5, 7]
    assert (encoded.notes, encoded.num_dropped_reasoning) == ({served.UNTRAINED: 1}, 2)
    check_against_prompts(encoder, row)
    samples = unroll(row, encoder, RowConfig(unroll="reasoning"))
    assert [index for sample in samples for index, _ in encoder.encode(sample).answers] == [1, 3, 5, 7]


# ---- one sample for each user turn -----------------------------------------------------------------------------------

TURNS = [
    user([image(1), {"type": "text", "text": "One?"}]),
    says(thought="Why f.", calls=("f",)),
    result("f", [image(2)]),
    says("One.", "Why one."),  # message 4
    user("Two?"),
    says("Two."),
    user("Three?"),
    says("Three.", "Why three."),  # message 8
    user([image(3)]),
    says("Four."),  # message 10
]


def test_unroll_trains_every_answer_once_under_the_history_that_a_server_shows(encoder: Encoder) -> None:
    row = parsed(*TURNS)
    samples = unroll(row, encoder, RowConfig(unroll="reasoning"))
    assert [sample.id for sample in samples] == ["a#turn-4", "a#turn-8", "a"]
    assert [sample.images for sample in samples] == [row.images[:2], row.images[:2], row.images]
    trained = [
        [number for number, message in enumerate(sample.messages, start=1) if served.is_target(message)]
        for sample in samples
    ]
    assert trained == [[2, 4], [6, 8], [10]]
    encoded = [encoder.encode(sample) for sample in samples]
    assert [one.enable_thinking for one in encoded] == [True, True, False]
    assert [one.num_dropped_reasoning for one in encoded] == [0, 0, 0]
    shown = [marked(encoder, one) for one in encoded]
    assert [text.count("<|channel>") for text in shown] == [2, 1, 0]
    assert (
        "<|turn>user\nThree?<turn|>\n<|turn>model\n⟦<|channel>thought\nWhy three.\n<channel|>Three.<turn|>⟧" in shown[1]
    )
    assert "⟦" not in shown[2].partition("⟦Four.<turn|>⟧")[0]
    for sample in samples:
        prompts = {prompt.turn - 1: prompt.input_ids for prompt in encoder.prompts(sample)}
        one = encoder.encode(sample)
        assert {index: one.input_ids[:length] for index, length in one.answers} == prompts
    assert [unroll(sample, encoder, RowConfig(unroll="reasoning")) for sample in samples] == [[s] for s in samples]


def test_unroll_makes_a_sample_of_each_answer_that_closes_an_opened_thought(
    encoder: Encoder, encoder_of: Callable[..., Encoder]
) -> None:
    row = parsed(*MIDDLE)  # "Now h." and the call of h are two messages and one answer
    samples = unroll(row, encoder, RowConfig(unroll="reasoning"))
    assert [(sample.id, sample.enable_thinking) for sample in samples] == [("a#turn-6", True), ("a", True)]
    assert marked(encoder, encoder.encode(samples[0])).endswith(
        "<tool_response|><|channel>thought\n⟦<channel|>Now h.<|tool_call>call:h{}<tool_call|><|tool_response>⟧"
    )
    assert [len(encoder.encode(sample).answers) for sample in samples] == [2, 1]
    for sample in samples:
        check_against_prompts(encoder, sample)
    row = parsed(*MIDDLE[:4], says(calls=("h",)), *MIDDLE[5:])
    assert unroll(row, encoder_of("gemma4_v4"), RowConfig(unroll="reasoning")) == [row], "it opens no thought"


def test_unroll_leaves_other_rows_alone(encoder: Encoder) -> None:
    reasoning = RowConfig(unroll="reasoning")
    for row in (parsed(*PLAIN), parsed(*PLAIN, *PLAIN), parsed(*THINKS), parsed(user(), says("One."), *THINKS)):
        assert unroll(row, encoder, reasoning) == [row]
    assert unroll(parsed(*TURNS), encoder, RowConfig()) == [parsed(*TURNS)]
    (cut,) = unroll(parsed(user(), says("Ok.", "Why."), user(), says("No.", train=False)), encoder, reasoning)
    assert (cut.id, len(cut.messages)) == ("a", 2), "nothing is trained behind the thought"


def raw(row_id: str, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"id": row_id, "messages": messages, **more}


def test_shards_hold_the_samples_and_count_them(tmp_path: Path, model: str) -> None:
    rows = [raw("a", TURNS), raw("b", PLAIN, chat_template_kwargs={"enable_thinking": True}), {"messages": []}]
    report = shard_rows(tmp_path, model, rows, skip_invalid=True, unroll="reasoning")
    counts = (report.num_read, report.num_unrolled, report.num_written, report.num_rejected, report.num_dropped)
    assert counts == (3, 2, 4, 1, 0)
    assert "4 samples of 3 rows" in report.summary()
    assert f"1 x {served.CLOSED_BY_MODEL}" in report.summary()
    assert report.num_dropped_reasoning == 0
    shards = open_shards(tmp_path / "shards")
    stored = [shards.read(index) for index in range(len(shards))]
    assert [one.id for one in stored] == ["a#turn-4", "a#turn-8", "a", "b"]
    assert [one.enable_thinking for one in stored] == [None, None, None, True]
    encoder = load_encoder(model, EncodingConfig())
    num_targets = [encoder.encode(one).num_target_tokens for one in stored]
    assert shards.num_target_tokens.tolist() == num_targets
    assert pq.read_schema(tmp_path / "shards/train-00000.parquet").field("enable_thinking").type == pa.bool_()
    shown = inspect_row(tmp_path / "rows.jsonl", model, "a#turn-8", ShardConfig(unroll="reasoning"))
    assert shown.ids == encoder.encode(stored[1]).input_ids
    assert shown.samples == ["a#turn-4", "a#turn-8", "a"]
    assert "thinking on\none of the samples a#turn-4, a#turn-8, a of the row" in shown.render(color=False)
    with pytest.raises(DataError, match=r"makes the samples a, but not a#turn-8; .*`unroll: reasoning`"):
        inspect_row(tmp_path / "rows.jsonl", model, "a#turn-8", ShardConfig())
    from gemma_dist.evaluate.run import _my_decisions

    settings = EvaluateConfig(unroll="reasoning")
    decisions = [
        [
            (one.trajectory.id, one.prompt.turn, one.prompt.input_ids)
            for one in _my_decisions(data, 2, encoder, settings, {})[0]
        ]
        for data in (write_rows(tmp_path / "good.jsonl", rows[:2]), tmp_path / "shards")
    ]
    assert [turn for _, turn, _ in decisions[0]] == [2, 4, 6, 8, 10, 2, 4]
    assert decisions[0][:4] == decisions[1], "of two rows, and of two samples"


def test_a_repeated_row_is_found_though_it_is_unrolled(tmp_path: Path, model: str) -> None:
    settings = ShardConfig(unroll="reasoning")
    first = write_rows(tmp_path / "first.jsonl", [raw("a", TURNS), raw("b", PLAIN)])
    out = tmp_path / "shards"
    run_shard([first], out, model, settings, skip_invalid=False)
    for name, row in (("again", raw("a", TURNS)), ("shorter", raw("a", TURNS[:4])), ("sample", raw("a#turn-8", PLAIN))):
        second = write_rows(tmp_path / f"{name}.jsonl", [row])
        with pytest.raises(DataError, match=r"the id 'a'( \(its sample 'a#turn-\d'\))? belongs to .*shards already"):
            run_shard([second], out, model, settings, skip_invalid=False, append=True)
    report = run_shard(
        [write_rows(tmp_path / "new.jsonl", [raw("c", TURNS)])], out, model, settings, skip_invalid=False, append=True
    )
    assert report.num_written == 3
    assert len(open_shards(out)) == 7
    with pytest.raises(DataError, match="unroll was 'reasoning' and is 'none'"):
        run_shard([first], out, model, ShardConfig(), skip_invalid=False, append=True)


def test_a_folder_of_before_has_no_column_and_is_read(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = pieces.SCHEMA
    monkeypatch.setattr(pieces, "SCHEMA", schema.remove(schema.get_field_index("enable_thinking")))
    shard_rows(tmp_path, model, [raw("a", PLAIN)])
    read = open_shards(tmp_path / "shards").read(0)
    assert (read.id, read.enable_thinking) == ("a", None)


# ---- check-prompts ---------------------------------------------------------------------------------------------------

ROWS = [
    raw("thinks", THINKS),
    raw("plain", PLAIN),
    raw("forced", PLAIN, chat_template_kwargs={"enable_thinking": True}),
    raw("closes", [*THINKS[:3], says("Ok.")]),
    raw("parallel", [user(), says(thought="Why.", calls=("f", "g")), result("f"), result("g"), says("Ok.", "Why ok.")]),
    raw("parallel, plain", [user(), says(calls=("f", "g")), result("f"), result("g"), says(calls=("f",)), result("f")]),
    raw("a call last", [{"role": "system", "content": "Be brief."}, user(), says(calls=("f", "f"))]),
    raw("turns", [user(), says("One.", "Why."), user([image(1)]), says("Two."), user(), says("Three.", "Why three.")]),
    raw("corrected", [user(), says(calls=("g",), train=False), result("g", "Error"), says(calls=("f",))]),
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("unrolled", ["none", "reasoning"])
def test_what_is_trained_stands_behind_the_prompts_of_the_same_template(
    tmp_path: Path, model: str, template: str, unrolled: Any
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    report = check_prompts(data, model, template, RowConfig(chat_template=template, unroll=unrolled), None)
    assert (report.differences, report.refused) == ([], [])
    assert report.num_answers == 17
    assert report.num_samples == len(ROWS) + (unrolled == "reasoning")


def test_check_prompts_says_which_rows_differ_and_where(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [*ROWS[:2], {"messages": []}])
    command = ["check-prompts", str(data), "--model", model]
    assert main([*command, "--server-template", NEWEST]) == 0
    assert "0 of 4 trained answers stand behind another prompt than gemma4_v5 makes, in 0 of 2 samples" in (
        capsys.readouterr().out
    )
    assert main([*command, "--server-template", "gemma4_v4", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["num_answers"], report["num_differing_answers"], report["num_differing_samples"]) == (4, 1, 1)
    assert report["num_refused"] == 1
    assert report["differences"] == [
        {
            "place": f"{data}:1",
            "id": "thinks",
            "turn": 4,
            "trained": 'nse:f{value:<|"|>1<|"|>}<tool_response|>▸<|channel>thought\\n',
            "served": 'nse:f{value:<|"|>1<|"|>}<tool_response|>▸',
        }
    ]
    assert main([*command, "--server-template", "gemma4_v4", "--limit", "1"]) == 1
    shown = capsys.readouterr().out
    assert "1 of 2 trained answers" in shown
    assert f"\n{data}:1: thinks, turn 4\n    trained  nse:f" in shown
    assert main([*command, "--server-template", "gemma4_v9"]) == 2


def test_check_prompts_of_shards_by_a_template_that_cannot_show_them(tmp_path: Path, model: str) -> None:
    rows = [raw("a", [user(), says(calls=("f",)), result("f", [image(1)]), says("Ok.")])]
    shard_rows(tmp_path, model, rows)
    report = check_prompts(tmp_path / "shards", model, "gemma4_v3", RowConfig(), None)
    (found,) = report.differences
    assert (found.place, found.turn) == (f"{tmp_path / 'shards'}:1", 4)
    assert "renders 0 of the row's 1 images" in found.served
    assert not check_prompts(tmp_path / "shards", model, "gemma4_v4", RowConfig(), None).differences


def test_shards_of_another_setting_are_refused_with_the_setting_that_made_them(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": [user(), says("Ok.", "Why.")]}])
    shards = tmp_path / "shards"
    run_shard([rows], shards, model, ShardConfig(enable_thinking=False), False)
    recipe = [str(ROOT / "launch/cpu_lora.yaml"), f"model_name_or_path={model}", f"data.train={shards}"]
    for words in (["check", *recipe], ["check-prompts", str(shards), "--model", model]):
        assert main(words) == 2
        assert "as they were made" in capsys.readouterr().err
    assert main(["check", *recipe, "data.enable_thinking=false", f"output_dir={tmp_path / 'out'}"]) == 0
    for command in ("check-prompts", "inspect", "stats"):
        for option in ("--unroll reasoning", "--control-tokens escape"):
            words = [command, str(shards), "--model", model, "--enable-thinking", "false", *option.split()]
            assert main(words) == 2
            assert f"{option} is for raw rows" in capsys.readouterr().err
    words = ["--model", model, "--data", str(shards), "--out", str(tmp_path / "out"), "--schemas", "simplify"]
    assert main(["evaluate", *words]) == 2
    assert "--schemas simplify is for raw rows" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["stats", str(rows), "--against", str(shards), "--control-tokens", "escape"]) == 0, "it is of the rows"


def test_the_flag_of_before_stands_for_true(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(write_rows(tmp_path / "rows.jsonl", [raw("a", PLAIN)]))
    for options, is_on in (
        (["--enable-thinking", data], True),
        ([data, "--enable-thinking", "true"], True),
        ([data, "--enable-thinking=false"], False),
        ([data, "--enable-thinking"], True),
        ([data], False),
    ):
        assert main(["inspect", "--model", model, "--json", *options]) == 0
        assert json.loads(capsys.readouterr().out)["enable_thinking"] is is_on


def test_the_report_and_inspect_name_the_option(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [raw("a", MIDDLE), raw("b", TURNS)])
    assert main(["inspect", str(data), "--model", model]) == 0
    assert "1 x answers to a tool's result that have no thought, or lose it, are not" in capsys.readouterr().out
    assert main(["shard", str(data), "--model", model, "--out", str(tmp_path / "out"), "--num-workers", "1"]) == 0
    shown = capsys.readouterr().out
    assert "1 x answers to a tool's result that have no thought, or lose it, are not" in shown
    assert "3 messages lose their reasoning" in shown
    assert shown.count("use --unroll reasoning, which makes") == 2


@pytest.mark.parametrize(("unrolled", "num_samples", "num_answers"), [("none", 12, 71), ("reasoning", 20, 79)])
def test_real_rows_with_thoughts_stand_behind_the_prompts(
    shared: Path, model: str, unrolled: Any, num_samples: int, num_answers: int
) -> None:
    data = shared / "data/multimodal/eval.jsonl"
    report = check_prompts(data, model, NEWEST, RowConfig(chat_template=NEWEST, unroll=unrolled), None)
    assert (report.differences, report.refused) == ([], [])
    assert (report.num_samples, report.num_answers) == (num_samples, num_answers)
