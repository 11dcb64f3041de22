"""report.html: what it shows is what the samples say, nothing in it runs or loads, and it follows from its folder."""

import base64
import hashlib
import html
import io
import json
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gemma_dist.__main__ import main
from gemma_dist.config import EvaluateConfig
from gemma_dist.data.trajectory import Trajectory
from gemma_dist.evaluate import page
from gemma_dist.evaluate.decision import ScoredDecision
from gemma_dist.evaluate.line import asked, score_line
from gemma_dist.evaluate.page import PageRun, embedded, write_page
from gemma_dist.evaluate.page_samples import compared_calls, differences, pieces, pieces_of_message
from gemma_dist.evaluate.runs import read_run, tools_key, write_results
from gemma_dist.evaluate.shown import join_shown, keep_shown
from gemma_dist.gemma_format import CALL, CALL_END, CHANNEL, CHANNEL_END, CONTROL_TOKENS, RESPONSE, TURN_END
from tests.support.chromium import chromium, needs_chromium
from tests.support.hostile import HOSTILE, LOADS, OWNED
from tests.support.scoring import expecting, line, reading

INHERITED = ("constructor", "__proto__", "toString")  # what every object of JavaScript has
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": "", "parameters": {"type": "object"}}}
    for name in ("find", *INHERITED, *HOSTILE[:3])
]
SETS = {tools_key(TOOLS): TOOLS}
BLOCK = re.compile(r'<script type="application/json" id="([\w-]+)">(.*?)</script>', re.DOTALL)
# What would hide or turn around what one reads, where a page shows it.
DECEIVES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]")


def image(number: int) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64 + number, 900)).save(file, "PNG")
    return file.getvalue()


def trajectory(number: int, text: str, with_image: bool) -> Trajectory:
    parts: Any = [{"type": "text", "text": text}, *([{"type": "image"}] if with_image else [])]
    call: Any = {"id": "1", "type": "function", "function": {"name": "find", "arguments": {"what": text, "n": 2**60}}}
    messages: Any = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": text, "name": "find", "tool_call_id": "1"},
        {"role": "assistant", "content": text},
    ]
    return Trajectory(f"{number} {text}", messages, TOOLS, [image(number)] if with_image else [], category=text)


def make_run(out: Path, texts: tuple[str, ...], *, with_images: bool = True, fault: str = "") -> Path:
    """A finished run whose rows and outputs hold these texts: a right call and a wrong answer each, or (`fault`) that
    for a call."""
    trajectories = {number: trajectory(number, text, with_images) for number, text in enumerate(texts, start=1)}
    lines: list[ScoredDecision] = []
    for number, row in trajectories.items():
        text = texts[number - 1]
        for turn in (2, 4):
            name = "find" if turn == 2 else INHERITED[number % 3]
            called = f'{CALL}call:{name}{{what:<|"|>{text}{fault}<|"|>,n:{2**60}}}{CALL_END}{RESPONSE}'
            told = {"sample": 0, "key": "", "num_images": len(row.images), "prompt_tokens": 9, "opening": ""}
            told |= {"output": called if turn == 2 else text + called, "output_ids": [1], "output_tokens": 1}
            point: Any = asked(row, number, [row.messages[turn - 1]], turn) | told | {"stopped": True}
            lines.append(score_line(point, TOOLS, 0.0))
    keep_shown(out, trajectories)
    join_shown(out)
    header: dict[str, Any] = {"model": texts[0], "adapter": None, "data": texts[-1], "versions": {"torch": texts[0]}}
    header |= {"settings": EvaluateConfig(loss=False).model_dump(mode="json"), "times": {"command": texts[1]}}
    write_results(out, header, lines, SETS)
    return out


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run in which every text is hostile."""
    return make_run(tmp_path_factory.mktemp("hostile") / "run", HOSTILE) / "report.html"


def blocks_of(path: Path) -> dict[str, Any]:
    return {name: json.loads(text) for name, text in BLOCK.findall(path.read_text(encoding="utf-8"))}


def shown_elements(path: Path, fragment: str = "") -> str:
    """What Chromium makes of a page, without the blocks of data and the script."""
    dom = chromium(path, "--dump-dom", fragment=fragment)
    return re.sub(r"<(script|style)\b.*?</\1>", "", dom, flags=re.DOTALL)


# ---- the file --------------------------------------------------------------------------------------------------------


@given(st.text(st.characters() | st.sampled_from("<>&\ud800\u2028\u2029\0\x1b\u202e")))
def test_any_text_stays_in_its_block(text: str) -> None:
    written = embedded({"text": text})
    assert json.loads(written.encode()) == json.loads(json.dumps({"text": text}))
    assert not re.search("[<>&\u2028\u2029\\x00-\\x1f]", written)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null(number: float) -> None:
    written = embedded({"a": [number, (1, {"b": number})], "c": "NaN Infinity"})
    assert json.loads(written, parse_constant=pytest.fail) == {"a": [None, [1, {"b": None}]], "c": "NaN Infinity"}


def test_a_page_has_the_structure_of_its_template_whatever_is_in_it(hostile: Path) -> None:
    text = hostile.read_text(encoding="utf-8")
    blocks = [name for name, _ in BLOCK.findall(text)]
    assert blocks[:3] == ["overview", "times", "samples"]
    assert len(blocks) == len(set(blocks)) == 3 + 1 + 2 * len(HOSTILE), "tools, trajectories and images"
    rest = BLOCK.sub("", text)
    assert [rest.count(word) for word in ("<script", "</script", "<style", "</style", "<title", "<body")] == [1] * 6
    assert re.search(r"<title>(.*?)</title>", rest, re.DOTALL)[1] == html.escape(HOSTILE[0])  # type: ignore[index]
    assert set(re.findall(r"https?:[^\"' ]*", rest)) == {"http://www.w3.org/2000/svg"}, "the name of a format alone"


def test_the_policy_names_style_and_script_by_their_hashes(hostile: Path) -> None:
    text = hostile.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)[1]  # type: ignore[index]
    hashes = {}
    for name, pattern in {"style": r"<style>(.*?)</style>", "script": r"<script>(.*?)</script>"}.items():
        content = re.search(pattern, text, re.DOTALL)[1]  # type: ignore[index]
        hashes[name] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules == {
        "default-src": "'none'",
        "style-src": f"'sha256-{hashes['style']}'",
        "script-src": f"'sha256-{hashes['script']}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert "innerHTML" not in text.rpartition("<script>")[2]


def test_a_page_follows_from_its_folder(tmp_path: Path) -> None:
    first, second = (make_run(tmp_path / name, HOSTILE).joinpath("report.html").read_bytes() for name in "ab")
    assert first == second
    assert main(["score", "--from", str(tmp_path / "a"), "--out", str(tmp_path / "c")]) == 0
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            assert (tmp_path / "c" / path.relative_to(tmp_path / "a")).read_bytes() == path.read_bytes(), path


def test_prompts_and_images_stand_once_and_small(hostile: Path) -> None:
    blocks = blocks_of(hostile)
    for sample in blocks["samples"]:
        messages = blocks[f"trajectory-{sample['trajectory']}"]
        text, picture = messages[0]["content"]
        assert sample["id"] == f"{sample['trajectory']} {HOSTILE[sample['trajectory'] - 1]}".encode(
            "utf-16", "surrogatepass"
        ).decode("utf-16", "surrogatepass")
        assert text["text"] in sample["id"]
        assert str(2**60) in messages[1]["calls"][0], "a number as it was, not as a browser rounds it"
        assert (picture["width"], picture["height"]) == (64 + sample["trajectory"], 900)
        head, _, data = blocks[f"image-{picture['image']}"].partition(",")
        assert head == "data:image/jpeg;base64"
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) == 640


@pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.6, 0.9])
def test_a_page_has_a_size_and_says_what_it_leaves_out(
    hostile: Path, monkeypatch: pytest.MonkeyPatch, share: float, tmp_path: Path
) -> None:
    whole = {name: len(text) for name, text in BLOCK.findall(hostile.read_text(encoding="utf-8"))}
    room = int(share * sum(size for name, size in whole.items() if name not in ("overview", "times")))
    monkeypatch.setattr(page, "MAX_PAGE_BYTES", room)
    run = read_run(hostile.parent)
    write_page(tmp_path / "page.html", [PageRun("run", run.report, run.lines, SETS)], hostile.parent)
    blocks = blocks_of(tmp_path / "page.html")
    left_out = blocks["overview"]["left_out"]
    kept = {"samples": len(blocks["samples"])}
    kept["tool sets"] = sum(name.startswith("tools-") for name in blocks)
    kept["prompts"] = sum(name.startswith("trajectory-") for name in blocks)
    kept["images"] = sum(name.startswith("image-") for name in blocks)
    asked_for = {sample["trajectory"] for sample in blocks["samples"]}
    assert kept["samples"] + left_out["samples"] == 2 * len(HOSTILE)
    assert kept["tool sets"] + left_out["tool sets"] == min(1, kept["samples"]), "all have the same"
    assert kept["prompts"] + left_out["prompts"] == len(asked_for)
    assert kept["images"] + left_out["images"] == kept["prompts"]
    sizes = {name: len(text) for name, text in BLOCK.findall((tmp_path / "page.html").read_text(encoding="utf-8"))}
    assert sum(size for name, size in sizes.items() if name not in ("overview", "times")) <= room + 2 * len(HOSTILE) + 2
    assert any(left_out.values())
    wrong = [sample for sample in blocks["samples"] if not sample["answers"][0]["right"]]
    assert len(wrong) in (len(HOSTILE), kept["samples"]), "what is wrong comes first"


def test_a_page_has_the_tools_of_its_samples_alone(hostile: Path, tmp_path: Path) -> None:
    run = read_run(hostile.parent)
    many = {f"{number:016x}": TOOLS for number in range(100)}
    many["</script>"] = TOOLS
    lines: list[Any] = [line | {"tools": f"{7 if line['trajectory'] == 1 else 8:016x}"} for line in run.lines]
    lines[-1]["tools"] = "</script>"
    write_page(tmp_path / "page.html", [PageRun("run", run.report, lines, many)], hostile.parent)
    assert [name for name in blocks_of(tmp_path / "page.html") if "tools" in name] == [
        "tools-0000000000000007", "tools-0000000000000008"]  # fmt: skip


# ---- outputs and calls -----------------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from([*CONTROL_TOKENS, "call:f{a:1}", "thought\n", "text ", "<", "🌍", "\ud800"]), max_size=12)
)
def test_pieces_joined_are_the_output(parts: list[str]) -> None:
    output = "".join(parts)
    found = pieces(output, "")
    assert "".join(text for _, text in found) == output
    assert all(text for _, text in found)


CALLED = '{"name": "find", "arguments": "{}"}'
MESSAGE: dict[str, Any] = {
    "content": "Let me look.",
    "reasoning_content": "Which tool?",
    "tool_calls": [{"name": "find", "arguments": "{}"}],
}


@pytest.mark.parametrize(
    ("message", "keys", "expected"),
    [
        (
            MESSAGE,
            {},
            [("text", "Let me look."), ("thought", "Which tool?"), ("call", '{"name": "find", "arguments": "{}"}')],
        ),
        (MESSAGE, {"raw": f"{CALL}call:find{{}}{CALL_END}"}, [("call", f"{CALL}call:find{{}}{CALL_END}")]),
        ({"error": "500"}, {}, [("text", '{"error": "500"}')]),
        ({"content": [1], "tool_calls": "x"}, {}, [("text", "[1]"), ("unreadable", '"x"')]),
    ],
)
def test_what_a_server_said_is_shown_part_by_part(message: Any, keys: Any, expected: list[tuple[str, str]]) -> None:
    status = "malformed" if expected[-1][0] == "unreadable" else "ok"
    line: Any = {"output": json.dumps(message), "opening": "", "score": {"status": status}} | keys
    assert pieces_of_message(line) == expected


def test_pieces_say_what_they_are() -> None:
    call, broken = f"{CALL}call:f{{a:1}}{CALL_END}", f"{CALL}call:f(a=1){CALL_END}"
    thought = f"{CHANNEL}thought\nHm.{CHANNEL_END}"
    found = pieces(f"{thought}🌍 So:{call}{broken}{call}{RESPONSE}", "")
    assert found == [("thought", thought), ("text", "🌍 So:"), ("call", call), ("unreadable", broken), ("call", call),
                     ("token", RESPONSE)]  # fmt: skip
    assert pieces(f"{CALL}call:f{{a:", "") == [("unreadable", f"{CALL}call:f{{a:")]
    assert pieces(f"a:1}}{CALL_END}Done.{TURN_END}", f"{CALL}call:f{{") == [
        ("call", f"a:1}}{CALL_END}"), ("text", "Done."), ("token", TURN_END)]  # fmt: skip


F: Any = {"name": "f", "arguments": {"a": 1, "b": {"c": [1, {"d": "x"}]}}}


@pytest.mark.parametrize(
    ("gold", "called", "told"),
    [
        ([F], [F], [("f", "f", "", {"a": ("1", "1", ""), "b": ('{"c": [1, {"d": "x"}]}',) * 2 + ("",)})]),
        ([{"name": "f", "arguments": {}}], [], [("f", None, "missing_call", {})]),
        ([], [{"name": "f", "arguments": {}}], [(None, "f", "extra_call", {})]),
        (
            [{"name": "f", "arguments": {"a": 5}}],
            [{"name": "g", "arguments": {"a": 5}}],
            [("f", "g", "wrong_tool", {"a": ("5", "5", "")})],
        ),
        (
            [{"name": "f", "arguments": {}, "acceptable": {"a": ["x", ""], "b": [1]}, "ignore_arguments": ["i"]}],
            [{"name": "f", "arguments": {"a": "z", "i": 3}}],
            [
                (
                    "f",
                    "f",
                    "",
                    {
                        "a": ('"x" or (absent)', '"z"', "wrong_value"),
                        "b": ("1", None, "missing_required"),
                        "i": ("(anything)", "3", ""),
                    },
                )
            ],
        ),
        (
            [{"name": "f", "arguments": {"a": 2**60}}],
            [{"name": "f", "arguments": {"a": 2**60 + 1}}],
            [("f", "f", "", {"a": (str(2**60), str(2**60 + 1), "wrong_value")})],
        ),
    ],
)
def test_calls_stand_beside_those_of_gold(gold: Any, called: Any, told: Any) -> None:
    tools: Any = [{"function": {"name": name, "parameters": {}}} for name in "fg"]
    read = line(1, 2, expecting(gold), reading(*called), tools, parsed={"calls": called})
    found = [
        (call["gold"], call["got"], call["fault"],
         {one["path"]: (one["gold"], one["got"], one["fault"]) for one in call["arguments"]})
        for call in compared_calls(read)
    ]  # fmt: skip
    assert found == told


def test_differences_are_found_where_they_lie() -> None:
    got = {"c": [1, {"d": "y", "e": 1}, 3]}
    found = [(one["path"], one["gold"], one["got"]) for one in differences(F["arguments"]["b"], got, "b")]
    assert found == [("b.c[1].d", '"x"', '"y"'), ("b.c[1].e", None, "1"), ("b.c[2]", None, "3")]
    assert list(differences(got, got, "b")) == []


# ---- two runs --------------------------------------------------------------------------------------------------------


def test_a_comparison_has_both_answers_to_every_point(tmp_path: Path) -> None:
    texts = ("one", "two", "three")
    before, after = make_run(tmp_path / "before", texts, fault="!"), make_run(tmp_path / "after", texts)
    assert main(["compare", str(before), str(after), "--out", str(tmp_path / "both")]) == 0
    blocks = blocks_of(tmp_path / "both" / "comparison.html")
    assert blocks["overview"]["comparison"]["overall"]["fixed"] == 3
    rights = [[answer["right"] for answer in sample["answers"]] for sample in blocks["samples"]]
    assert rights == [[False, True], [False, False]] * 3
    assert [run["name"] for run in blocks["overview"]["runs"]] == [str(before), str(after)]
    assert {name for name in blocks if name.startswith("trajectory-")} == {f"trajectory-{n}" for n in (1, 2, 3)}


# ---- in a browser ----------------------------------------------------------------------------------------------------


@contextmanager
def counting_proxy() -> Iterator[tuple[int, list[str]]]:
    """A port that takes down what is asked of it, and the requests."""
    requests: list[str] = []

    class Refuses(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            requests.append(self.requestline)

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], requests
        server.shutdown()


def asked_of(path: Path, fragment: str = "") -> tuple[str, list[str]]:
    """The elements of a page, and what it asked hostile.invalid for."""
    with counting_proxy() as (port, requests):
        dom = chromium(path, "--dump-dom", f"--proxy-server=127.0.0.1:{port}", fragment=fragment)
    return dom, [request for request in requests if LOADS.split("/")[2] in request]


@needs_chromium
def test_nothing_hostile_runs_or_loads_and_nothing_deceives(hostile: Path) -> None:
    """With all samples open: outputs, gold, arguments, prompts and tools."""
    dom, requests = asked_of(hostile, "#open=all")
    assert requests == []
    shown = re.sub(r"<(script|style)\b.*?</\1>", "", dom, flags=re.DOTALL)
    assert f"<title>{html.escape(HOSTILE[0], quote=False)}</title>" in shown, "a script that ran would have changed it"
    assert f'data-ready="{2 * len(HOSTILE)}"' in shown
    assert shown.count('class="detail"') == 2 * len(HOSTILE)
    assert not re.search(
        r"<(?:script|iframe|object|base|form|a|embed)\b|\son\w+=", re.sub(r"&lt;.*?&gt;|>[^<]*<", "><", shown)
    )
    assert shown.count("<img ") == shown.count('<img src="data:image/jpeg;base64,') == 2 * len(HOSTILE)
    assert not DECEIVES.search(shown), "such signs are shown by name"
    assert "U+202E" in shown
    assert "\u241b[31mred" in shown.replace("</span>", ""), "ESC as a sign that one sees"


@needs_chromium
def test_the_proof_can_fail_and_the_policy_holds_where_a_page_did_not_escape(hostile: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.html"
    bare.write_text(f"<title>x</title>{HOSTILE[0]}{HOSTILE[7]}")
    dom, requests = asked_of(bare)
    assert f"<title>{OWNED}</title>" in dom
    assert requests
    torn = tmp_path / "torn.html"
    markup = HOSTILE[0] + HOSTILE[6] + HOSTILE[7]
    text = hostile.read_text(encoding="utf-8")
    torn.write_text(text.replace('<main id="page">', f'{markup}<main id="page">', 1), encoding="utf-8")
    dom, requests = asked_of(torn)
    assert f"<title>{OWNED}</title>" not in dom
    assert requests == []
    assert "data-ready" in dom, "and the page works"


@needs_chromium
@pytest.mark.parametrize(
    ("fragment", "number"),
    [
        ("#failure=unwanted_call&status=ok", len(HOSTILE)),
        ("#gold=find&called=find&right=right", len(HOSTILE)),
        ("#q=HOSTILE.invalid%2F6", 2),
        ("#%%%=1&q=%E0%A4%A", 2 * len(HOSTILE)),
    ],
)
def test_filters_stand_in_the_address(hostile: Path, fragment: str, number: int) -> None:
    shown = shown_elements(hostile, fragment)
    assert f">{number} of {2 * len(HOSTILE)} samples<" in shown
    assert shown.count('class="row"') == number


@needs_chromium
def test_tools_that_have_no_room_are_told(hostile: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    samples = next(text for name, text in BLOCK.findall(hostile.read_text(encoding="utf-8")) if name == "samples")
    monkeypatch.setattr(page, "MAX_PAGE_BYTES", len(samples.encode()))
    run = read_run(hostile.parent)
    write_page(tmp_path / "page.html", [PageRun("run", run.report, run.lines, SETS)], hostile.parent)
    shown = shown_elements(tmp_path / "page.html", "#open=all")
    assert shown.count("Its tools are left out for their size") == 2 * len(HOSTILE)
    assert "MB: 1 tool sets, " in shown
    assert "tools declared: " not in shown
    assert shown_elements(hostile, "#open=all").count("7 tools declared: ") == 2 * len(HOSTILE)


@needs_chromium
def test_tools_named_as_what_every_object_has_are_counted_as_any(hostile: Path) -> None:
    shown = shown_elements(hostile)
    assert "native code" not in shown
    for place, name in enumerate(INHERITED):
        calls = sum(number % 3 == place for number in range(1, len(HOSTILE) + 1))
        assert f'aria-label="gold (no call), called {name}: {calls}"' in shown
