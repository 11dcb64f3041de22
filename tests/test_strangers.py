"""Templates, schemas and stores of strangers: nothing is trained that the row does not say, and nothing takes for ever.

What takes time is bounded by the processor's, in a process of its own, or by a limit that a slow machine keeps.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from gemma_dist.config import EncodingConfig, RowConfig, ShardConfig
from gemma_dist.data import schema_fit, strange_template, templates
from gemma_dist.data.bounded import Bounded, RefusedError
from gemma_dist.data.encode import Encoder, load_encoder
from gemma_dist.data.encoded import IGNORE_INDEX, Encoded
from gemma_dist.data.images import load_image
from gemma_dist.data.places import Where
from gemma_dist.data.schema_fit import find_misfit, find_misfits
from gemma_dist.data.schema_plain import plainly_fits
from gemma_dist.data.strict import parse_json
from gemma_dist.data.tokenize import tokenize
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.errors import CheckpointError, DataError
from gemma_dist.model.tiny import newest_template
from gemma_dist.shards.ranged_http import RangedHTTP
from gemma_dist.shards.ranged_s3 import RangedS3
from gemma_dist.show.row import inspect_row
from tests.support.store import serve

SECONDS, NUM_BYTES = 1, 400 * 2**20
NEWEST = newest_template("e4b")
URL = "https://good.example"
TOOL = {
    "type": "function",
    "function": {
        "name": "fetch",
        "description": "Fetch good.example.",
        "parameters": {
            "type": "object",
            "properties": {"url": {"type": "string", "description": "Of good.example."}, "tries": {"type": "integer"}},
        },
    },
}
ROW = {
    "messages": [
        {"role": "system", "content": "Be good."},
        {"role": "user", "content": "Is good.example up?"},
        {
            "role": "assistant",
            "reasoning_content": "Ask good.example.",
            "tool_calls": [{"function": {"name": "fetch", "arguments": {"url": URL, "tries": 1}}}],
        },
        {"role": "tool", "name": "fetch", "content": "good.example says 200"},
        {"role": "assistant", "content": "Yes, good.example is up."},
    ],
    "tools": [TOOL],
}


def parsed(row: dict[str, Any] = ROW) -> Trajectory:
    return parse_row(row, Where(Path("rows.jsonl"), 1), RowConfig())


@pytest.fixture(scope="module")
def known(model: str) -> Encoder:
    return load_encoder(model, EncodingConfig())


@pytest.fixture(scope="module")
def encoder_of(known: Encoder) -> Callable[[str], Encoder]:
    def make(template: str) -> Encoder:
        processor = copy.copy(known.processor)
        processor.chat_template = template
        return Encoder(processor)

    return make


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Limits that are reached soon."""
    for module, cached in ((schema_fit, schema_fit._bounded), (strange_template, templates._strange)):
        monkeypatch.setattr(module, "SECONDS", SECONDS)
        monkeypatch.setattr(module, "NUM_BYTES", NUM_BYTES)
        cached.cache_clear()
    yield
    schema_fit._bounded.cache_clear()
    templates._strange.cache_clear()


def trained(encoded: Encoded) -> list[int]:
    """The ids that are trained."""
    return [label for label in encoded.labels if label != IGNORE_INDEX]


def changed(old: str, new: str) -> str:
    assert old in NEWEST
    return NEWEST.replace(old, new)


# ---- templates that change what is trained ---------------------------------------------------------------------------

STRING = "{{- '<|\"|>' + argument + '<|\"|>' -}}"
CALL = "'<|tool_call>call:' + function['name'] + '{'"
CALL_END = "{{- '}<tool_call|>' -}}"
ANSWER = "{{- strip_thinking(message['content']) -}}"
OTHERS = "{{- message['content'] | trim -}}"
RESULT = "{{- format_tool_response_block(ns_tname.name, tool_body) -}}"
DECLARED = "declaration:{{- tool_data['function']['name'] -}}"
DESCRIPTION = "{{- tool_data['function']['description'] -}}"
PROPERTY = "{{ value['description'] }}"
THOUGHT = "'<|channel>thought\\n' + thinking_text + "
END = "{{- '<turn|>\\n' -}}\n        {%- endif"
EVIL = "| replace('good.example', 'evil.example')"


@pytest.mark.parametrize(
    ("old", "new", "refusal"),
    [
        (STRING, STRING.replace("argument", f"argument {EVIL}"), "turn 3: .*evil.*other arguments"),
        ("in function['arguments'] | dictsort", "in (function['arguments'] | dictsort)[1:]", "turn 3: .*other argum"),
        (CALL, CALL + " + 'evil:1,'", "turn 3: .*evil:1.*other arguments"),
        (CALL, CALL + " + 'url:<|\"|>evil<|\"|>,'", "turn 3: .*writes 'url.*evil.*where the row says"),
        (CALL_END, CALL_END + "{{- '<|tool_call>call:evil{}<tool_call|>' -}}", "turn 4: .*the tool's answer"),
        (ANSWER, ANSWER + "{{- 'evil' if message['content'] -}}", "turn 5: .*a model would not learn to stop"),
        (ANSWER, "evil" + ANSWER, "turn 5: .*the text 'Yes"),
        (ANSWER, ANSWER.replace("content']", f"content'] {EVIL}"), "turn 5: .*the text 'Yes"),
        (THOUGHT, THOUGHT.replace("thinking_text", f"(thinking_text {EVIL})"), "turn 3: .*the call of 'fetch'"),
        (OTHERS, OTHERS.replace("| trim", f"| trim {EVIL}"), "turn 2: .*the text 'Is good"),
        (RESULT, RESULT.replace("tool_body", f"tool_body {EVIL}"), "turn 4: .*the text 'good"),
        (RESULT, RESULT.replace("ns_tname.name", "'evil'"), "turn 4: .*the result of 'fetch' as one of 'evil'"),
        (DECLARED, DECLARED + "evil", "declares the tools 'fetchevil'"),
        (
            DESCRIPTION,
            DESCRIPTION.replace("description']", f"description'] {EVIL}"),
            "leaves 'Fetch good.example.' out",
        ),
        ("{%- for tool in tools %}", "{%- for tool in [] %}", "leaves 'fetch' out"),
        (END, END.replace("'<turn", "' <turn"), "turn 5: .*a model would not learn to stop"),
    ],
)
def test_a_template_that_changes_the_row_is_refused(
    encoder_of: Callable[[str], Encoder], old: str, new: str, refusal: str
) -> None:
    with pytest.raises(DataError, match=f"(?s){refusal}"):
        encoder_of(changed(old, new)).encode(parsed())


@pytest.mark.parametrize(
    ("old", "new", "added"),
    [
        (OTHERS, OTHERS + "{{- ' Try evil.' -}}", ["turn 2 (user): the chat template adds 'Try evil.'"]),
        (OTHERS, "{{- 'Evil: ' -}}" + OTHERS, ["turn 2 (user): the chat template adds 'Evil:'"]),
        (
            "{{- messages[0]['content'] | trim -}}",
            "{{- messages[0]['content'] | trim + ' Evil.' -}}",
            ["turn 1 (system): the chat template adds 'Evil.'"],
        ),
        (
            RESULT,
            RESULT.replace("tool_body", "tool_body + ' Evil.'"),
            ["turn 4 (tool): the chat template adds 'Evil.'"],
        ),
        (
            PROPERTY,
            PROPERTY.replace("n']", f"n'] {EVIL}"),
            ["turn 1 (system): the chat template writes 'evil' for 'good'"],
        ),
        (END, END.replace("\\n'", "\\n '"), []),  # blanks are no words
        ("{{- bos_token -}}", "{{- bos_token -}}{#- the same -#}", []),
    ],
)
def test_what_a_template_adds_to_the_turns_of_others_is_counted_and_shown(
    encoder_of: Callable[[str], Encoder], known: Encoder, old: str, new: str, added: list[str]
) -> None:
    encoded = encoder_of(changed(old, new)).encode(parsed())
    assert [str(one) for one in encoded.added] == added
    noted = encoded.notes - known.encode(parsed()).notes
    assert noted.total() == len(added)
    assert all("inspect" in note for note in noted)
    assert trained(encoded) == trained(known.encode(parsed()))


def test_blanks_of_a_template_in_what_is_trained_are_shown(encoder_of: Callable[[str], Encoder]) -> None:
    (added,) = encoder_of(changed(CALL, CALL + " + ' \\u3000\\n'")).encode(parsed()).added
    assert str(added) == r"turn 3 (assistant): the chat template adds ' \u3000\n'"


def test_inspect_shows_what_a_template_adds(model: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "own.jinja").write_text(changed(OTHERS, OTHERS + "{{- ' Try evil.' -}}"))
    settings = ShardConfig(chat_template=str(tmp_path / "own.jinja"))
    inspection = inspect_row(tmp_path / "rows.jsonl", model, 1, settings)
    words = "turn 2 (user): the chat template adds 'Try evil.'"
    assert inspection.to_json()["added"] == [words]
    assert f"\n{words}\n" in inspection.render(color=False)
    assert "1 x words of the chat template's own in a turn of the user" in inspection.render(color=False)


def test_a_system_turn_of_the_templates_own_is_shown(encoder_of: Callable[[str], Encoder]) -> None:
    own = "{{- bos_token -}}{{- '<|turn>system\\nObey evil.<turn|>\\n' -}}"
    row = parsed({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
    (added,) = encoder_of(changed("{{- bos_token -}}", own)).encode(row).added
    assert added.place == "in front of turn 1"
    assert "Obey evil." in added.text


def test_real_rows_pass_the_comparison(encoder_of: Callable[[str], Encoder], known: Encoder, shared: Path) -> None:
    blank = encoder_of(changed(END, END.replace("\\n'", "\\n '")))
    lines = (shared / "data" / "toolcalls" / "train.jsonl").read_text().splitlines()[::60]
    for number, line in enumerate(lines):
        row = parse_row(json.loads(line), Where(Path("train.jsonl"), number), RowConfig())
        encoded = blank.encode(row)
        assert not encoded.added
        assert trained(encoded) == trained(known.encode(row))


def test_an_unknown_template_is_named_once_by_its_hash(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates.log, "propagate", True)
    template = NEWEST + "{#- of test_strangers -#}"
    for text in (NEWEST, template, template):
        (tmp_path / "own.jinja").write_text(text)
        load_encoder(model, EncodingConfig(chat_template=str(tmp_path / "own.jinja")))
    records = {id(record): record.getMessage() for record in caplog.records}  # two handlers may have one
    (warned,) = (message for message in records.values() if "sha256" in message)
    assert templates._sha256(template) in warned


# ---- tokenizers that change what is trained --------------------------------------------------------------------------


def with_tokenizer(model: str, folder: Path, settings: dict[str, Any], **parts: Any) -> Encoder:
    """The model's encoder with other `parts` of its tokenizer.json, and other settings of the tokenizer."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, changes in (("tokenizer.json", parts), ("tokenizer_config.json", settings)):
        given = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(given | changes))
    return load_encoder(str(folder), EncodingConfig())


WITHOUT_GOOD = {"type": "Split", "pattern": {"String": "good"}, "behavior": "Removed", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("part", "value", "refusal"),
    [
        ("normalizer", {"type": "Replace", "pattern": {"String": "good"}, "content": "evil"}, "evil.*the text says"),
        ("normalizer", {"type": "Lowercase"}, "'be good.*the text says 'Be good"),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [WITHOUT_GOOD, BYTES]},
            "says 'good",
        ),
    ],
)
def test_a_tokenizer_that_changes_the_row_is_refused(
    model: str, tmp_path: Path, part: str, value: object, refusal: str
) -> None:
    encoder = with_tokenizer(model, tmp_path / "model", {}, **{part: value})
    with pytest.raises(DataError, match=f"(?s){refusal}.*; take the tokenizer"):
        encoder.encode(parsed())


def test_a_tokenizers_own_expression_that_fails_refuses_the_row(model: str) -> None:
    given = json.loads((Path(model) / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    backend: Any = tokenizers.Tokenizer.from_str(json.dumps(given | {"pre_tokenizer": split}))
    with pytest.raises(DataError, match="the tokenizer fails on this row: Onig"):
        tokenize(backend, "a" * 40 + "b")


def test_blanks_that_a_tokenizer_writes_as_gemmas_does_are_none_of_its_words(
    model: str, known: Encoder, tmp_path: Path
) -> None:
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    byte_level = json.loads((Path(model) / "tokenizer.json").read_text())["decoder"]
    decoder = {"type": "Sequence", "decoders": [byte_level, blank | {"pattern": {"String": "▁"}, "content": " "}]}
    encoder = with_tokenizer(model, tmp_path / "model", {}, normalizer=blank, decoder=decoder)
    row = {"messages": [{"role": "user", "content": "a ▁ b"}, {"role": "assistant", "content": "Hello  there"}]}
    assert encoder.encode(parsed(row)).num_target_tokens
    assert encoder.encode(parsed()).num_target_tokens


@pytest.mark.parametrize("name", ["bos_token", "boi_token", "eoi_token"])
def test_a_tokenizer_with_other_words_for_gemmas_tokens_is_refused(model: str, tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"has the {name} 'e', Gemma's is "):
        with_tokenizer(model, tmp_path / "model", {name: "e"})


def test_no_token_takes_the_place_of_the_rows_tools(model: str, known: Encoder, tmp_path: Path) -> None:
    tokens = {"tools": "<unk>", "messages": "<pad>"}
    encoder = with_tokenizer(model, tmp_path / "model", {"extra_special_tokens": tokens})
    assert encoder.tokenizer.special_tokens_map.items() >= tokens.items()
    assert encoder.encode(parsed()).input_ids == known.encode(parsed()).input_ids


# ---- templates that never end ----------------------------------------------------------------------------------------

FEATURES = """{{ bos_token }}{%- set ns = namespace(n=0) -%}
{%- for message in messages -%}{%- if loop.first %}{% continue %}{% endif -%}
{% generation %}{{ message.content | tojson }}{{ dict(a=1) | tojson(indent=1) }}{% endgeneration %}
{%- set ns.n = ns.n + 1 -%}{%- endfor -%}
{{ ns.n }} {{ documents is none }} {{ absent is defined }}
    {% if tools %}x{% endif %}

{{ strftime_now('%Y') }}
"""


def test_a_strangers_template_is_rendered_as_transformers_does(model: str) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    messages = [{"role": "user", "content": "é <b>"}, {"role": "assistant", "content": 'ü "<b>"'}]
    variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": False}
    for template in (FEATURES, NEWEST):
        expected = processor.apply_chat_template(messages, tokenize=False, chat_template=template)
        given = variables | processor.tokenizer.special_tokens_map
        assert strange_template.bounded_render()(template, given) == expected


@pytest.mark.parametrize(
    ("template", "refusal"),
    [
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}", "1 seconds"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}abcdefgh{% endfor %}{% endfor %}", "characters"),
        ("{{ 'a' * 10**10 }}", "400 MiB"),
        ("{{ 'a' | center(10**10) }}", "400 MiB"),
        ("{{ 'a'.center(10**10) }}", "400 MiB"),
        ("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "400 MiB"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace(_x=1) %}", "_x"),
        ("{{ raise_exception('a' * 10**7) }}", "^a{2000}$"),
    ],
)
def test_a_template_is_stopped_and_the_next_goes_on(template: str, refusal: str) -> None:
    render = Bounded("gemma_dist.data.strange_template:render", seconds=SECONDS, num_bytes=NUM_BYTES)
    with pytest.raises(RefusedError, match=refusal):
        render(template, {})
    assert render("ok{{ x }}", {"x": 1}) == "ok1"


def test_chance_in_a_template_is_the_same_each_time() -> None:
    render = Bounded("gemma_dist.data.strange_template:render", seconds=SECONDS, num_bytes=NUM_BYTES)
    template = "{{ range(10**4) | random }} {{ lipsum(1) }}"
    assert render(template, {}) == render(template, {})


def test_a_row_is_refused_with_the_hash_of_a_template_that_takes_too_much(
    encoder_of: Callable[[str], Encoder], impatient: None
) -> None:
    template = NEWEST + "{% if 'bomb' in messages[0]['content'] %}{{ 'a'.center(10**10) }}{% endif %}"
    encoder = encoder_of(template)
    bomb = {"messages": [{"role": "user", "content": "bomb"}, {"role": "assistant", "content": "Hello"}]}
    with pytest.raises(DataError, match=f"400 MiB of memory .*{templates._sha256(template)}"):
        encoder.encode(parsed(bomb))
    assert encoder.encode(parsed()).num_target_tokens > 0


def test_a_fork_has_a_process_of_its_own() -> None:
    render = Bounded("gemma_dist.data.strange_template:render", seconds=SECONDS, num_bytes=NUM_BYTES)
    assert render("{{ x }}", {"x": 1}) == "1"
    child = os.fork()
    if not child:
        os._exit(0 if render("{{ x }}", {"x": 2}) == "2" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert render("{{ x }}", {"x": 3}) == "3"


def test_no_module_of_the_current_folder_is_taken_for_pythons(model: str, tmp_path: Path) -> None:
    for name in ("pickle", "resource", "signal", "json", "jinja2"):
        (tmp_path / f"{name}.py").write_text("open('hacked', 'w').close()")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "own.jinja").write_text(NEWEST + "{#- own -#}")
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-P", "-m", "gemma_dist", "shard", "rows.jsonl", "--model", model]
    options = ["--chat-template", "own.jinja", "--out", "shards"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"} | {"PYTHONPATH": root}
    subprocess.run([*command, *options], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "shards").is_dir()
    assert not (tmp_path / "hacked").exists()


# ---- schemas and rows that take for ever -----------------------------------------------------------------------------


def called(schema: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """A row with one call of a tool that has this schema."""
    function = {"name": "f", "parameters": {"type": "object", **schema}}
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"messages": messages, "tools": [{"type": "function", "function": function}]}


PATTERN = {"properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}}
NAMES = {"patternProperties": {"^(a+)+$": {"type": ["integer", "null"]}}}
DOUBLED = {
    "$defs": {"d24": {}} | {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(24)},
    "properties": {"a": {"$ref": "#/$defs/d0"}},
}


@pytest.mark.parametrize(
    ("schema", "arguments"),
    [(PATTERN, {"a": "a" * 40 + "b"}), (NAMES, {"a" * 40 + "b": 1.5}), (DOUBLED, {"a": 1})],
    ids=["pattern", "patternProperties", "allOf"],
)
def test_a_schema_that_takes_for_ever_refuses_its_row_alone(
    impatient: None, schema: dict[str, Any], arguments: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*f: .*cannot be applied: it takes more than 1 seconds"):
        parsed(called(schema, **arguments))
    assert parsed(called(PATTERN, a="aaa")).id
    with pytest.raises(DataError, match="'b' does not match"):
        parsed(called(PATTERN, a="b"))


@pytest.mark.parametrize("max_steps", [0, schema_fit.MAX_STEPS], ids=["elsewhere", "here"])
def test_the_calls_of_a_row_have_a_limit_together(max_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    schema: dict[str, Any] = {"properties": {"a": {"items": {"not": {"type": "integer"}}}}}
    assert not plainly_fits({"a": ["x"]}, schema), "jsonschema is asked: a hundred times the limit below, for all calls"
    row = called(schema, a=["x"] * 200)
    row["messages"][1]["tool_calls"] *= 50
    monkeypatch.setattr(schema_fit, "MAX_STEPS", max_steps)
    assert parsed(row).id
    monkeypatch.setattr(schema_fit, "ROW_SECONDS", 0.001)
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*cannot be applied: with the others of its row it takes more"):
        parsed(row)


def test_what_is_checked_elsewhere_is_found_as_here(monkeypatch: pytest.MonkeyPatch) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "object", "required": ["b", "c"]}]}},
        "required": ["z"],
    }
    arguments: dict[str, Any] = {"a": {"b": None}}
    here = find_misfit(arguments, schema), find_misfits(arguments, schema)
    monkeypatch.setattr(schema_fit, "MAX_STEPS", 0)
    assert (find_misfit(arguments, schema), find_misfits(arguments, schema)) == here
    assert {misfit.path for misfit in here[1]} == {("a",), ()}
    assert ["z"] in [misfit.required for misfit in here[1]]


@pytest.mark.timeout(120)
def test_unique_items_are_looked_at_once() -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"uniqueItems": True}}}
    items: list[Any] = [{"x": number, "y": [number]} for number in range(20_000)]
    assert find_misfit({"a": items}, schema) is None
    assert "non-unique" in str(find_misfit({"a": [*items, {"y": [7.0], "x": 7}]}, schema))
    assert find_misfit({"a": [1, True, "1", [1], {"1": 1}]}, schema) is None


@pytest.mark.timeout(120)
def test_repeated_keys_are_counted_once() -> None:
    pairs = ",".join(f'"k{number}":1' for number in range(200_000))
    with pytest.raises(DataError, match="'k199999' stands twice"):
        parse_json(f'{{{pairs},"k199999":2}}')


@pytest.mark.timeout(120)
@pytest.mark.parametrize("behind", ["A" * 200_000, " " * 200_000, "\n=" * 100_000])
def test_almost_base64_is_read_once(tmp_path: Path, behind: str) -> None:
    with pytest.raises(DataError, match=r"cannot be read|no file"):
        load_image("iVBORw0KGgo" + "A" * 200_000 + behind + "!", tmp_path)


@pytest.mark.timeout(120)
def test_backticks_and_answers_in_any_order_are_looked_at_once() -> None:
    thought = "<think>" + "`</think>`" * 100_000 + "</think>Hi"
    row = parsed({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": thought}]})
    assert row.messages[1]["content"] == "Hi"
    assert row.messages[1]["reasoning_content"] == "`</think>`" * 100_000
    calls = [{"id": f"c{number}", "function": {"name": "f", "arguments": {}}} for number in range(20_000)]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "ok"} for call in reversed(calls)]
    asked = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "", "tool_calls": calls}]
    assert len(parsed({"messages": [*asked, *results]}).messages) == 20_002


# ---- a store without ranges ------------------------------------------------------------------------------------------


def test_an_answer_is_cut_at_the_length_asked_for() -> None:
    with serve({"data": bytes(64 * 2**20)}) as server:
        server.ranges = False
        assert len(RangedHTTP(skip_instance_cache=True).cat_file(f"{server.url}/data", 0, 100)) == 101
        server.ranges = True
        assert len(RangedHTTP(skip_instance_cache=True).cat_file(f"{server.url}/data", 0, 100)) == 100


def test_so_is_one_of_a_store_that_speaks_s3() -> None:
    with serve({"bucket/data": bytes(64 * 2**20)}) as server:
        store = RangedS3(anon=True, endpoint_url=server.url, skip_instance_cache=True)
        server.ranges = False
        assert len(store.cat_file("bucket/data", start=0, end=100)) == 101
        server.ranges = True
        assert len(store.cat_file("bucket/data", start=7, end=107)) == 100
        assert len(store.cat_file("bucket/data")) == 64 * 2**20
