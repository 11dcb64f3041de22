"""The reader of Gemma 4's output: the conformance cases, drifts, hostile text, and what TRL's template writes."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_dist.data.read import Reading, read_calls_lines, read_output, reading_to_json
from gemma_dist.errors import DataError
from gemma_dist.gemma_format import MAX_DEPTH

SHARED = Path(__file__).resolve().parents[2] / "shared"
CASES_FILE = SHARED / "conformance" / "gemma4_toolcall_cases.json"
CASES = json.loads(CASES_FILE.read_text()) if CASES_FILE.exists() else []
DATA_FILES = sorted((SHARED / "data").rglob("*.jsonl"))

Q, CALL, END = '<|"|>', "<|tool_call>", "<tool_call|>"


def calls(reading: Reading) -> list[Any]:
    return [[call.name, call.arguments] for call in reading.calls]


def call(arguments: str, name: str = "f") -> str:
    """A whole call around arguments as the template writes them, with ' standing for the string delimiter."""
    return f"{CALL}call:{name}{{{arguments}}}{END}".replace("'", Q)


def same_json(first: Any, second: Any) -> bool:
    """Equal as JSON, text to the last character: numbers by value, true is not 1."""
    return json.dumps(numbers_as_text(first), sort_keys=True) == json.dumps(numbers_as_text(second), sort_keys=True)


def numbers_as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: numbers_as_text(each) for key, each in value.items()}
    if isinstance(value, list):
        return [numbers_as_text(each) for each in value]
    return ["number", str(Fraction(value))] if type(value) in (int, float) else value


def collapse(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.skipif(not CASES, reason=f"no conformance cases at {CASES_FILE}")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_conformance(case: dict[str, Any]) -> None:
    reading = read_output(case["output"], case.get("prefix", ""))
    accepted = [case["expected_calls"]]
    if case["tier"] == "malformed":
        accepted += [alternative["calls"] for alternative in case.get("alternatives", [])]
    else:
        assert reading.status == ("ok" if case["expected_calls"] else "no_call")
    found = calls(reading)
    assert any(same_json(found, [[each["name"], each["arguments"]] for each in answer]) for answer in accepted)
    for field in ("content", "reasoning"):
        if f"expected_{field}" in case:
            assert collapse(getattr(reading, field)) == collapse(case[f"expected_{field}"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        (" \n ", {}),
        ("s:''", {"s": ""}),
        ("xs:[],o:{},n:[[],{}]", {"xs": [], "o": {}, "n": [[], {}]}),
        ("i:0,j:-0,k:-12,x:1e-07,y:-2.5E+3,z:1.0", {"i": 0, "j": 0, "k": -12, "x": 1e-07, "y": -2500.0, "z": 1}),
        (f"n:{10**40}", {"n": 10**40}),
        (
            "a:true,b:false,c:null,d:None,e:True,f:False",
            {"a": True, "b": False, "c": None, "d": None, "e": True, "f": False},
        ),
        ("a:'7',b:'true',c:'null'", {"a": "7", "b": "true", "c": "null"}),
        ("a: 1 ,\n b : 'x' , c : [ 1 , 2 ]\n", {"a": 1, "b": "x", "c": [1, 2]}),
        ("a:1,b:[1,2,],", {"a": 1, "b": [1, 2]}),
        ("first name:1,a-b:2,a.b:3,$ref:4,@type:5,items[0]:6,a=b:7", None),
        ("xlink:href:'x',t:n:{a:1},p:q:[1]", {"xlink:href": "x", "t:n": {"a": 1}, "p:q": [1]}),
        ("节点 名称:'東京 🌍'", {"节点 名称": "東京 🌍"}),
        ("'k 1':1,\"k 2\":2", {"k 1": 1, "k 2": 2}),
        ('s:"a: [b], c:{d} \\"e\\" \\u00e9\\n"', {"s": 'a: [b], c:{d} "e" é\n'}),
        ("a:1,a:2", {"a": 2}),
    ],
)
def test_argument_forms(arguments: str, expected: dict[str, Any] | None) -> None:
    if expected is None:
        expected = {"first name": 1, "a-b": 2, "a.b": 3, "$ref": 4, "@type": 5, "items[0]": 6, "a=b": 7}
    reading = read_output(call(arguments))
    assert same_json(calls(reading), [["f", expected]])
    assert reading.status == "ok"


@pytest.mark.parametrize(
    "text",
    [END, CALL, "}", "},b:1", ",b:", "{[(<", '"', "'", "\\", "\n\t", f"{CALL}call:g{{}}{END}", "<turn|>", "<eos>"],
)
def test_nothing_inside_a_string_is_an_escape(text: str) -> None:
    output = f"{CALL}call:f{{a:{Q}x{text}y{Q},b:[{Q}{text}{Q}]}}{END}"
    reading = read_output(output)
    assert calls(reading) == [["f", {"a": f"x{text}y", "b": [text]}]]
    assert (reading.content, reading.status, reading.calls[0].span) == ("", "ok", (0, len(output)))


@pytest.mark.parametrize("name", ["a-b", "a.b", "a/b", "mcp:tools:a-b", "createIn-AppMessage", "名前", "_x9"])
def test_names(name: str) -> None:
    assert calls(read_output(call("a:1", name))) == [[name, {"a": 1}]]


@pytest.mark.parametrize(
    "broken",
    [
        f"{CALL}call:f{{a=1}}{END}",
        f"{CALL}call:f{{a:1,b='x'}}{END}",
        f"{CALL}call:f{{a:'x'}}{END}",
        f"{CALL}call:f(a:1){END}",
        f"{CALL}:f{{a:1}}{END}",
        f"{CALL}f{{a:1}}{END}",
        f"{CALL}call:{{a:1}}{END}",
        f"{CALL}call:f{END}",
        f"{CALL}call:f{{a:1{END}",
        f"{CALL}call:f{{a:1}}}}{END}",
        f"{CALL}call:f{{a:1}}<turn|>",
        f"{CALL}call:f{{a:1}} oops{END}",
        f"{CALL}call:f{{a:{Q}x}}{END}",
        f"{CALL}call:f{{a:{Q}x{Q} y}}{END}",
        f"{CALL}call:f{{a:{Q}x{Q}b:1}}{END}",
        f"{CALL}call:f{{a:word}}{END}",
        f"{CALL}call:f{{a:nullable}}{END}",
        f"{CALL}call:f{{a:}}{END}",
        f"{CALL}call:f{{:1}}{END}",
        f"{CALL}call:f{{a:1,,b:2}}{END}",
        f"{CALL}call:f{{a:[1}}{END}",
        f"{CALL}call:f{{a:{{b:1]}}{END}",
        *(
            f"{CALL}call:f{{a:{number}}}{END}"
            for number in ("NaN", "Infinity", "-inf", "1e999", "007", "+1", "1.", ".5")
        ),
        f"{CALL}call:f{{a:{'1' * 5000}}}{END}",
        f"{CALL}call:f{{a:{'[' * 99 + ']' * 99}}}{END}",
        f'{CALL}call:f{{a:"C:\\users"}}{END}',
        f"call:f{{a:1}}{END}",
        f"f{{a:1}}{END}",
        "call:f{a:1}",
        "<|channel>thought\nhm<channel|>call:f(a:1)",
    ],
)
def test_a_garbled_call_is_dropped_noticed_and_alone(broken: str) -> None:
    alone = read_output(broken)
    assert (calls(alone), alone.status, alone.attempted) == ([], "malformed", True)
    followed = read_output(broken.removesuffix("<turn|>") + call("b:2", "good"))
    assert ["good", {"b": 2}] in calls(followed)
    assert followed.status == "malformed"


@pytest.mark.parametrize(
    ("output", "content"),
    [
        (f"One. {call('')} Two. {call('')}Three.", "One. Two. Three."),
        (call("") + "<|tool_response>", ""),
        (call("") + f"<|tool_response>response:f{{value:{Q}9{Q}}}<tool_response|>So 9.", "So 9."),
        ("<|image|>It is a cat.<turn|>\n", "It is a cat."),
        ("<|image><|image|><|image|><image|>A dog.<eos><pad><pad>", "A dog."),
        ("<pad><bos><|turn>model\nHi<turn|>\n<|turn>user\nnever said", "Hi"),
        ("thought\nhm<channel|>Yes.", "Yes."),
        (f"thought\nhm{call('')}Yes.", "Yes."),
        ("<|channel>thought\nmaybe <|tool_call>call:f{}<tool_call|>?<channel|>No.", "No."),
        ("Use a < b && c |> d, [1], {x: 1} or recall:f{x}.", "Use a < b && c |> d, [1], {x: 1} or recall:f{x}."),
    ],
)
def test_content(output: str, content: str) -> None:
    reading = read_output(output)
    assert collapse(reading.content) == content
    assert reading.status == ("ok" if reading.calls else "no_call")


def test_prefix_leaves_a_block_open() -> None:
    thinking = read_output(f"go on<channel|>{call('')}", "<|turn>model\n<|channel>thought\nprefilled")
    assert (thinking.reasoning, len(thinking.calls), thinking.calls[0].span[0]) == ("go on", 1, len("go on<channel|>"))
    assert read_output("Hi", "<|turn>model\n<|channel>thought\n<channel|>").content == "Hi"
    begun = read_output(f"ow:1}}{END} Done", f"<|turn>model\n{CALL}call:f{{n")
    assert (calls(begun), begun.calls[0].span, begun.content) == ([["f", {"now": 1}]], (0, 5 + len(END)), "Done")


def test_truncated_output_is_neither_a_call_nor_an_abstention() -> None:
    whole = f"{call('a:1')}{CALL}call:g{{s:{Q}text{Q},n:[1,2]}}{END}"
    first = len(call("a:1"))
    for end in range(len(whole)):
        reading = read_output(whole[:end])
        assert calls(reading) == ([["f", {"a": 1}]] if end >= first else [])
        if len(CALL) <= end < first or end >= first + len(CALL):
            assert reading.status == "truncated"
    spent = read_output("I was about to", budget_spent=True)
    assert (spent.status, spent.attempted) == ("truncated", False)
    assert read_output(call("a:1"), budget_spent=True).status == "truncated"


PIECES = [
    *"{}[]():=,'\"\\ \n-.ax1é",
    *(Q, CALL, END, "call:", "call:f{", "thought\n", "response:", "true", "None", "NaN", "1e9", "\ud800"),
    *("<|channel>", "<channel|>", "<|tool_response>", "<tool_response|>", "<|turn>", "<turn|>", "<eos>", "<pad>"),
    *("<|image|>", "<image|>"),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)


@settings(max_examples=400, deadline=None)
@given(TEXTS, TEXTS)
def test_never_raises_and_answers_json(output: str, prefix: str) -> None:
    reading = read_output(output, prefix)
    json.dumps(reading_to_json(reading), allow_nan=False)
    assert (reading.status == "no_call") <= (not reading.calls and not reading.attempted)
    assert (reading.status == "ok") <= bool(reading.calls)
    ends = [0]
    for each in reading.calls:
        assert ends[-1] <= each.span[0] < each.span[1] <= len(output)
        assert output[: each.span[1]].endswith(END)
        ends.append(each.span[1])


@settings(deadline=None)
@given(st.text())
def test_plain_text_comes_back(text: str) -> None:
    plain = text.replace("<", "").replace("call:", "").replace("thought", "")
    assert read_output(plain) == Reading((), plain.strip(), "", False, "no_call")


UNITS = {
    "calls": call("a:1"),
    "strings in one array": f"{Q}x{Q},",
    "open tokens": CALL,
    "open strings": f"{CALL}call:f{{a:{Q}",
    "open JSON strings": f'{CALL}call:f{{a:"\\',
    "strings that swap sides": f",{Q}{CALL}call:f{{a:[{Q}",
    "braces": "{",
    "brackets": "[",
    "delimiters": Q,
    "keys": "a : : ",
    "responses": "<|tool_response>response:f<tool_response|>",
    "thoughts": f"<|channel>{CALL}",
    "bare calls": "\ncall:f ",
    "garbage": "x<|y:'\" ",
}


@pytest.mark.parametrize("start", ["", f"{CALL}call:f{{a:", f"{CALL}call:f{{a:["], ids=["text", "value", "array"])
@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
def test_time_is_linear(unit: str, start: str) -> None:
    def fastest(count: int) -> float:
        text = start + unit * count
        return min(_seconds(partial(read_output, text)) for _ in range(2))

    # 16 times the text: about 16 times the time if linear, 256 times if quadratic.
    assert fastest(8_000) < 80 * (fastest(500) + 1e-4)


def _seconds(function: Any) -> float:
    start = time.process_time()  # of this process: other work on the machine does not count
    function()
    return time.process_time() - start


def test_depth_is_bounded() -> None:
    deepest = f"a:{'[' * (MAX_DEPTH - 1)}{']' * (MAX_DEPTH - 1)}"
    assert read_output(call(deepest)).status == "ok"
    assert read_output(call("a:" + "[" * 100_000 + "]" * 100_000)).status == "malformed"
    assert read_output(call("a:{" * 100_000 + "}" * 100_000)).status == "malformed"


@pytest.fixture(scope="module")
def render() -> Callable[[list[Any]], str]:
    """What TRL's newest template writes for one assistant message with these [name, arguments] pairs."""
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    trl = pytest.importorskip("trl")
    template_file = Path(trl.__file__).parent / "chat_templates" / "gemma4_v5.jinja"
    template = chat_template_utils._compile_jinja_template(template_file.read_text())

    def render(pairs: list[Any]) -> str:
        tool_calls = [{"function": {"name": name, "arguments": arguments}} for name, arguments in pairs]
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": tool_calls}]
        return template.render(messages=messages, bos_token="<bos>").partition("<|turn>model\n")[2]

    return render


KEYS = st.text("aZ_9 -.$@/=é", min_size=1).filter(lambda key: key == key.strip())
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
STRINGS = (st.text() | TEXTS).map(lambda text: text.replace(Q, ""))
JSON = st.recursive(SCALARS | STRINGS, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=12)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS, JSON))
def test_any_json_reads_back(render: Callable[[list[Any]], str], arguments: dict[str, Any]) -> None:
    assert same_json(calls(read_output(render([["f", arguments]]))), [["f", arguments]])


@pytest.mark.skipif(not DATA_FILES, reason=f"no data below {SHARED / 'data'}")
@pytest.mark.parametrize("path", DATA_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_gold_calls_read_back(render: Callable[[list[Any]], str], path: Path) -> None:
    turns = 0
    for line in path.read_text().splitlines():
        row = json.loads(line)
        called = [[call["function"] for call in message.get("tool_calls", [])] for message in row["messages"]]
        for functions in filter(None, [*called, row.get("expected_calls")]):
            gold = [[function["name"], function["arguments"]] for function in functions]
            reading = read_output(render(gold))
            assert reading.status == "ok"
            assert same_json(calls(reading), gold)
            turns += 1
    assert turns


def test_reader_and_scorer_import_nothing_heavy() -> None:
    code = "import sys, gemma_dist.evaluate.score; print(*{'torch', 'transformers', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_command_lines() -> None:
    lines = [json.dumps({"output": call("s:'é'")}), "", '{"output": "hm<channel|>Hi", "prefix": "<|channel>", "id": 7}']
    answers = [json.loads(line) for line in read_calls_lines(lines)]
    assert answers == [
        {"calls": [{"name": "f", "arguments": {"s": "é"}}], "content": "", "reasoning": "", "status": "ok"},
        {"calls": [], "content": "Hi", "reasoning": "hm", "status": "no_call"},
    ]


@pytest.mark.parametrize("bad", ["{", "[" * 100_000, "7", "{}", '{"output": 7}', '{"output": "", "prefix": 0}'])
def test_a_bad_line_names_its_place(bad: str) -> None:
    with pytest.raises(DataError, match=r"^stdin:2: .*\"output\": string"):
        list(read_calls_lines(['{"output": ""}', bad]))
