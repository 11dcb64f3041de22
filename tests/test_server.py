"""Evaluation of what a server holds: its faults are waited out or named, nothing is lost, and order changes nothing.

The server is a stand-in, which is as bad as a test wants it; `test_served.py` asks a real one.
"""

import base64
import html
import io
import json
import random
import signal
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from PIL import ExifTags, Image

from gemma_dist.__main__ import main
from gemma_dist.config import EvaluateConfig
from gemma_dist.data.content import content_text
from gemma_dist.data.encode import load_encoder
from gemma_dist.data.images import decode_image
from gemma_dist.data.read import reading_to_json
from gemma_dist.evaluate import client
from gemma_dist.evaluate.chat import chat_fields, data_url, read_chat
from gemma_dist.evaluate.extra_body import read_extra_body
from gemma_dist.evaluate.faults import ON_FIELDS
from gemma_dist.evaluate.message import read_message
from gemma_dist.evaluate.points import find_points
from gemma_dist.gemma_format import CALL, CALL_END, QUOTE
from gemma_dist.model.load import load_for_evaluation
from tests.support.corpus import picture, row, write_rows
from tests.support.ranks import start
from tests.support.standin import LISTING, MODEL, Asked, Reply, called, message, standing_in

Ask = Callable[..., Path]

KEY = "sk-a-secret"
POINTS = 9  # of `data`: rows of 1, 2 and 3 calls, and a final word each


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("server") / "rows.jsonl", [row(n, num_calls=1 + n) for n in range(3)])


@pytest.fixture
def ask(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Evaluate what a server holds into a folder of that name, and expect an exit code; the folder."""
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.01)
    monkeypatch.delenv(client.KEY, raising=False)

    def evaluate(name: str, url: str, *options: object, code: int = 0) -> Path:
        out = tmp_path / name
        words = ["evaluate", "--server", url, "--data", data, "--out", out, *options]
        assert main([str(word) for word in words]) == code
        return out

    return evaluate


def calls_as_asked(asked: Asked) -> Reply:
    """An answer that hangs on what is asked alone: a call, or words behind the last result."""
    history = asked.body["messages"]
    if history[-1]["role"] == "user":
        number = history[-1]["content"].split()[1].strip(",")
        return Reply(message(None, [called("plot", json.dumps({"n": 100 * int(number)}))], "tool_calls"))
    return Reply(message(f"Here is chart {len(history)}: étude ✓."))


def samples_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def all_written(out: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in out.rglob("*") if path.is_file())


def report_of(out: Path) -> dict[str, Any]:
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {key: value for key, value in report.items() if key not in ("times", "server")}


def test_what_a_server_answers_is_scored_as_it_read_it(ask: Ask, tmp_path: Path) -> None:
    with standing_in(calls_as_asked) as server:
        out = ask("out", server.url)
    samples, report = samples_of(out), report_of(out)
    assert len(samples) == POINTS == report["num_decision_points"]
    first = [sample for sample in samples if sample["turn"] == 2]
    assert all(sample["score"]["right"] for sample in first), "the first call of each row is gold's"
    assert report["metrics"]["call_exact"]["numerator"] == len(first)
    assert report["model"] == MODEL
    assert {sample["prompt_tokens"] for sample in samples} == {11}
    assert (out / "report.md").read_text().count(f"Answered by the server at `{server.url}`") == 1
    assert main(["score", "--from", str(out), "--out", str(tmp_path / "again")]) == 0
    for name in ("samples.jsonl", "report.json", "report.md", "report.html", "trajectories.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize(
    "name", ["toolcalls/eval_multiturn.jsonl", "multimodal/eval.jsonl", "multimodal/image_pairs.jsonl"]
)
def test_who_answers_as_the_rows_do_is_right_everywhere(ask: Ask, shared: Path, name: str) -> None:
    """On real rows: what is asked tells the points apart, images included, and calls come back as they were."""
    data, limit = shared / "data" / name, 8
    gold = {}
    points, _ = find_points(data, limit, EvaluateConfig(), None)
    for point in points:
        fields = chat_fields(point.history, point.images, point.trajectory.tools, point.thinking)
        functions = [call["function"] for call in point.gold[-1].get("tool_calls", [])]
        calls = [called(function["name"], json.dumps(function["arguments"])) for function in functions]
        text = "".join(content_text(message["content"]) for message in point.gold)
        gold[json.dumps(fields["messages"])] = message(text, calls or None, "tool_calls" if calls else "stop")
    assert len(gold) == len(points)
    with standing_in(lambda asked: Reply(gold[json.dumps(asked.body["messages"])])) as server:
        report = report_of(ask("out", server.url, "--data", data, "--limit", limit))
    overall = report["metrics"]["overall"]
    assert (overall["numerator"], overall["denominator"]) == (len(points), len(points))


def test_a_request_says_all_that_the_row_says(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = "data:image/png;base64," + base64.b64encode(picture(1)).decode()
    shown = {"type": "image_url", "image_url": {"url": image}}
    asks = {"role": "user", "content": [shown, {"type": "text", "text": "?"}]}
    thinks = {"reasoning_content": "Plot it.", "content": ""}
    rows = [row(3, num_calls=2)]  # a tool that returns images, and tools declared
    rows[0]["messages"][0] = asks
    rows[0]["messages"][1] |= thinks
    data = write_rows(tmp_path / "rows.jsonl", rows)
    monkeypatch.setenv(client.KEY, KEY)
    with standing_in(lambda _: Reply(message())) as server:
        out = ask("out", server.url, "--data", data, "--max-new-tokens", 7)
    bodies = sorted(server.bodies, key=lambda body: len(body["messages"]))
    assert [len(body["messages"]) for body in bodies] == [1, 3, 5]
    assert all(one.headers["Authorization"] == f"Bearer {KEY}" for one in server.asked)
    assert KEY not in all_written(out), "a key is stored nowhere"
    last = bodies[-1]
    assert {name: last[name] for name in ("model", "max_tokens", "temperature", "tool_choice")} == {
        "model": MODEL, "max_tokens": 7, "temperature": 0, "tool_choice": "auto"}  # fmt: skip
    assert last["tools"] == rows[0]["tools"]
    assert last["chat_template_kwargs"] == {"enable_thinking": True}
    assert not {"seed", "top_p", "top_k"} & last.keys(), "greedy: nothing to draw"
    user, call, result, *_ = last["messages"]
    assert user["content"][0] == shown
    assert (call["reasoning_content"], call["reasoning"]) == ("Plot it.", "Plot it.")
    assert json.loads(call["tool_calls"][0]["function"]["arguments"]) == {"n": 300}
    assert (result["role"], result["tool_call_id"]) == ("tool", call["tool_calls"][0]["id"])
    texts, images = result["content"]
    assert texts == {"type": "text", "text": "chart 300"}
    assert base64.b64decode(images["image_url"]["url"].partition(",")[2]) == picture(300)


def test_several_answers_have_seeds_of_their_own_and_fields_can_be_left_out(ask: Ask) -> None:
    options = ["--num-samples", 3, "--temperature", 1, "--top-p", 0.9]
    with standing_in(lambda asked: Reply(message(f"seed {asked.body['seed']}"))) as server:
        out = ask("out", server.url, *options)
        assert len({body["seed"] for body in server.bodies}) == 3 * POINTS
        assert {(body["top_p"], body["top_k"]) for body in server.bodies} == {(0.9, -1)}, "-1: all, for every server"
        ask("again", server.url, *options, "--concurrency", 1)
        assert (out / "samples.jsonl").read_bytes() == (out.parent / "again/samples.jsonl").read_bytes()
        ask("other", server.url, *options, "--extra-body", '{"top_k": null, "min_p": 0.1}')
    assert len(server.bodies) == 9 * POINTS
    assert all("top_k" not in body and body["min_p"] == 0.1 for body in server.bodies[-3 * POINTS :])


def test_how_many_are_asked_at_a_time_and_their_order_change_nothing(ask: Ask) -> None:
    numbers = random.Random(0)

    def late(asked: Asked) -> Reply:
        time.sleep(numbers.random() / 50)
        return calls_as_asked(asked)

    outs = {}
    for concurrency in (1, 4, 16):
        with standing_in(late) as server:
            outs[concurrency] = ask(f"out-{concurrency}", server.url, "--concurrency", concurrency)
            assert server.most_at_a_time <= concurrency
            assert len(server.bodies) == POINTS
    assert server.most_at_a_time > 1
    for out in outs.values():
        assert (out / "samples.jsonl").read_bytes() == (outs[1] / "samples.jsonl").read_bytes()
        assert report_of(out) == report_of(outs[1])


HTML = b"<html><head><title>x</title></head><body><h1>502 Bad Gateway</h1></body></html>"
FAULTS = {
    "put off": Reply({"error": {"message": "slow down"}}, 429, {"Retry-After": "0"}),
    "put off to a date": Reply({"error": "slow down"}, 429, {"Retry-After": formatdate(usegmt=True)}),
    "put off to no date": Reply({"error": "slow down"}, 429, {"Retry-After": "soon"}),
    "a fault": Reply(b"Internal Server Error", 500),
    "a proxy's page": Reply(HTML, 502),
    "still loading": Reply({"error": {"message": "Loading model"}}, 503),
    "a gateway's timeout": Reply(b"", 504),
    "a dropped connection": Reply(drops=True),
    "half a body": Reply(b'{"choices": [{"mess', length=4000),
    "some chunks": Reply(b'{"choices": [{"mess', chunks=7, length=0),
    "garbage": Reply(b"\xff\x00 not JSON"),
    "a page that says it is fine": Reply(HTML),
    "no object": Reply([1, 2]),
    "JSON without end": Reply(b"[" * 200_000),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_waited_out(ask: Ask, fault: str) -> None:
    failed: set[str] = set()

    def once(asked: Asked) -> Reply:
        what = json.dumps(asked.body)
        if what in failed:
            return calls_as_asked(asked)
        failed.add(what)
        return FAULTS[fault]

    with standing_in(once) as server:
        out = ask("out", server.url)
    assert len(failed) == POINTS
    times = json.loads((out / "report.json").read_text())["times"]["ranks"][0]
    if not FAULTS[fault].drops:  # on a connection that was open before, that costs no try
        assert times["requests_sent_again"] == POINTS
    assert all(sample["score"]["right"] for sample in samples_of(out) if sample["turn"] == 2)


def test_a_connection_that_the_server_has_closed_costs_no_try(ask: Ask) -> None:
    def ends(asked: Asked) -> Reply:
        return Reply(calls_as_asked(asked).body, ends=True)

    with standing_in(ends) as server:
        ask("out", server.url, "--concurrency", 1, "--max-retries", 0)
    assert len(server.bodies) == POINTS


def test_an_answer_may_come_in_chunks(ask: Ask) -> None:
    """One after the other over one connection."""
    with standing_in(lambda asked: Reply(calls_as_asked(asked).body, chunks=50)) as server:
        ask("out", server.url, "--concurrency", 1, "--max-retries", 0)
    assert len(server.bodies) == POINTS


def test_more_than_an_answer_can_hold_is_not_read(ask: Ask, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(client, "MAX_BYTES", 1000)
    with standing_in(lambda _: Reply(message("a" * 2000))) as server:
        ask("out", server.url, "--max-retries", 0, code=2)
    assert "an answer of more than 1000 bytes" in capsys.readouterr().err


def test_an_answer_that_does_not_come_is_asked_for_again(ask: Ask) -> None:
    forever, first = threading.Event(), []

    def hang(asked: Asked) -> Reply:
        first.append(asked)
        return Reply(hangs=forever, drops=True) if len(first) == 1 else calls_as_asked(asked)

    with standing_in(hang) as server:
        out = ask("out", server.url, "--request-timeout-s", 1)
        forever.set()
    assert len(samples_of(out)) == POINTS


def test_the_pause_is_as_long_as_the_server_says_and_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    replies = [Reply({}, 429, {"Retry-After": "7"}), Reply({}, 429, {"Retry-After": "86400"}), *[Reply({}, 500)] * 3]

    with standing_in(lambda _: replies.pop(0) if replies else Reply({"fine": 1})) as server:
        one = client.Client(client.parse_address(server.url), None, timeout_s=10, max_retries=5)
        monkeypatch.setattr(one._closed, "wait", lambda seconds: pauses.append(seconds))
        assert one.ask("/chat/completions", {}) == {"fine": 1}
    assert pauses[:2] == [7, client.LONGEST_PAUSE_S]
    assert all(client.FIRST_PAUSE_S * 2**n / 2 <= pause <= client.FIRST_PAUSE_S * 2**n
               for n, pause in enumerate(pauses[2:], start=2))  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "named"),
    [
        (Reply({"error": {"message": f"Incorrect API key provided: {KEY}"}}, 401), client.KEY),
        (Reply({"detail": "no"}, 403), client.KEY),
        (Reply({"detail": "Not Found"}, 404), "mostly ends in /v1"),
        (Reply({"detail": "Unexpected fields in the request: {'top_k'}"}, 422), "--extra-body"),
        (
            Reply(b"", 302, {"Location": "http://127.0.0.1:9/v1/chat/completions?key=k"}),
            "on to http://127.0.0.1:9/v1/chat/completions, where",
        ),
    ],
)
def test_the_servers_last_word_ends_the_run(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, capsys: Any, reply: Reply, named: str
) -> None:
    monkeypatch.setenv(client.KEY, KEY)
    with standing_in(lambda _: reply) as server:
        ask("out", server.url, "--concurrency", 1, code=2)
    assert len(server.bodies) == 1
    error = capsys.readouterr().err
    assert f"refuses: {reply.status}" in error
    assert named in error
    assert KEY not in error
    assert "Traceback" not in error


ODD_KEY = "sk-\"\\a/b<c>&'d"


@pytest.mark.parametrize("key", ["sk-a-key-" + 60 * "0123456789", ODD_KEY])
@pytest.mark.parametrize(
    "say",
    [
        lambda key: Reply(message(finish=key)),
        lambda key: Reply({"error": {"message": f"bad {key}"}}),
        lambda key: Reply({"choices": [{"finish_reason": "stop", key: [{"a": key}]}]}),
        lambda key: Reply([f"bad {key}"]),
        lambda key: Reply(f"bad {key}".encode()),
        lambda key: Reply(json.dumps({"error": key}).encode()[:-1]),
        lambda key: Reply({"error": {"code": 7, "said": f"bad {key}"}}, 400),
        lambda key: Reply({"error": json.dumps({"said": f"bad {key}"})}, 400),
        lambda key: Reply(f"<html>bad {html.escape(key)}</html>".encode(), 400),
        lambda key: Reply(b"", 302, {"Location": f"http://127.0.0.1:9/{quote(key, safe='')}"}),
        lambda key: Reply({"error": key}, 500),
    ],
)
def test_the_key_is_said_nowhere(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any, key: str, say: Callable[[str], Reply]
) -> None:
    monkeypatch.setenv(client.KEY, key)
    listing = Reply({"data": [{"id": MODEL, "owned_by": f"of {key}"}]})
    with standing_in(lambda _: say(key), listing) as server:
        out = ask("out", server.url, "--concurrency", 1, "--max-retries", 0, code=2)
    said = capsys.readouterr().err + caplog.text + all_written(out)
    assert f"[{client.KEY}]" in said
    for part in (key[:9], key[-9:], json.dumps(key)[1:-1], html.escape(key), quote(key)):
        assert part not in said


@pytest.mark.parametrize(
    "fields",
    [
        {
            "max_tokens": 5,
            "min_tokens": 1,
            "max_completion_tokens": 9,
            "stop_token_ids": [1],
            "truncate_prompt_tokens": 7,
        },
        {"prompt_cache_key": "a", "skip_special_tokens": False, "return_tokens_as_token_ids": True, "eos_token": "a"},
        {"response_format": {"properties": {"password": {"type": "string"}}, "required": ["password"]}},
        {"api_key": None},
    ],
)
def test_fields_that_are_no_secrets_are_taken(fields: dict[str, Any]) -> None:
    assert read_extra_body(json.dumps(fields)) == fields


def test_answers_under_way_when_the_run_ends_are_kept(ask: Ask, capsys: Any) -> None:
    together, first = threading.Barrier(4), threading.Lock()

    def refuses_one(asked: Asked) -> Reply:
        together.wait(60)
        if first.acquire(blocking=False):
            return Reply({"error": "no"}, 401)
        time.sleep(0.3)
        return calls_as_asked(asked)

    with standing_in(refuses_one) as server:
        out = ask("out", server.url, "--concurrency", 4, code=2)
        assert len(server.bodies) == 4
    assert "refuses: 401 no" in capsys.readouterr().err
    assert sum(part.read_bytes().count(b"\n") for part in out.glob(".samples-*")) == 3
    with standing_in(calls_as_asked) as server:
        ask("out", server.url)
        assert len(server.bodies) == POINTS - 3


def test_a_field_that_a_server_does_not_know_ends_the_run_with_the_remedy(ask: Ask, capsys: Any) -> None:
    """As long as it has answered nothing: else it is a matter of these points."""
    unknown = Reply({"error": {"message": "Unrecognized request argument supplied: chat_template_kwargs"}}, 400)
    answered: list[Asked] = []

    def some(asked: Asked) -> Reply:
        answered.append(asked)
        return calls_as_asked(asked) if len(answered) <= POINTS - 4 else unknown

    with standing_in(lambda _: unknown) as server:
        ask("none", server.url, "--concurrency", 1, code=2)
        assert "refuses all of the first 3 requests" in (error := capsys.readouterr().err)
        assert "Unrecognized request argument" in error
        assert ON_FIELDS in error
    with standing_in(some) as server:
        for _ in range(2):
            ask("some", server.url, "--concurrency", 1, code=2)
            assert "4 decision points could not be answered" in (error := capsys.readouterr().err)
            assert ON_FIELDS in error


def test_numbers_of_a_server_that_are_none_do_no_harm(ask: Ask) -> None:
    """In its listing, in the usage, and as an argument: the answer is malformed, or wrong."""
    listing = Reply(b'{"data": [{"id": "tiny", "max_model_len": NaN, "root": [1], "parent": null, "owned_by": "me"}]}')
    digits = iter([309, 400, 4300, 4301, 9000] * POINTS)

    def huge(_: Asked) -> Reply:
        said = message(None, [called("plot", {"n": "DIGITS"})], "tool_calls")
        said["usage"]["prompt_tokens"] = "DIGITS"
        return Reply(json.dumps(said).replace('"DIGITS"', "9" * next(digits)).encode())

    with standing_in(huge, listing) as server:
        out = ask("out", server.url, "--concurrency", 1, "--max-retries", 0)
    report = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["server"]["served"] == {"owned_by": "me"}
    statuses = [sample["score"]["status"] for sample in samples_of(out)]
    assert statuses == [*["ok"] * 3, *["malformed"] * 2, *["ok"] * 3, "malformed"]
    assert not any(sample["score"]["right"] for sample in samples_of(out))


def test_a_point_that_the_server_refuses_takes_no_other_with_it(ask: Ask, capsys: Any) -> None:
    def short(asked: Asked) -> Reply:
        if len(asked.body["messages"]) > 6:
            return Reply({"message": "This model's maximum context length is 512 tokens", "code": 400}, 400)
        return calls_as_asked(asked)

    with standing_in(short) as server:
        out = ask("out", server.url, code=2)
    error = capsys.readouterr().err
    assert "1 decision points could not be answered, such as 3 row-2 8: 400 This model's maximum context" in error
    assert not (out / "report.json").exists()
    with standing_in(calls_as_asked) as server:
        ask("out", server.url)
        assert len(server.bodies) == 1
        whole = ask("whole", server.url)
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_a_server_that_takes_no_images_of_tools_is_told_so(ask: Ask, capsys: Any) -> None:
    def text_alone(asked: Asked) -> Reply:
        if "image_url" in json.dumps(asked.body):
            return Reply({"detail": "tool messages take text content alone"}, 400)
        return calls_as_asked(asked)

    with standing_in(text_alone) as server:
        ask("out", server.url, code=2)
    error = capsys.readouterr().err
    assert "such as 1 row-0 4: 400 tool messages take text content alone" in error
    assert "some servers take no images in the results of tools" in error
    assert "--server-errors" not in error


def test_a_server_that_goes_away_leaves_what_it_answered(ask: Ask, capsys: Any) -> None:
    """And one elsewhere goes on with it."""
    with standing_in(calls_as_asked) as server:
        whole = ask("whole", server.url)
    answered: list[Asked] = []
    gone = threading.Event()

    def until_gone(asked: Asked) -> Reply:
        answered.append(asked)
        if len(answered) > 4:
            gone.set()
        return Reply(drops=True) if gone.is_set() else calls_as_asked(asked)

    with standing_in(until_gone) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.Client, "is_there", lambda _: not gone.is_set())
        out = ask("out", server.url, "--concurrency", 1, "--max-retries", 1, code=2)
    assert "does not answer any more: RemoteDisconnected" in capsys.readouterr().err
    assert sum(part.read_bytes().count(b"\n") for part in out.glob(".samples-*")) == 4
    with standing_in(calls_as_asked) as server:
        ask("out", server.url)
        assert len(server.bodies) == POINTS - 4
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert report_of(out) == report_of(whole)


def test_a_server_that_answers_nothing_is_not_asked_everything(ask: Ask, capsys: Any) -> None:
    with standing_in(lambda _: Reply(b"Internal Server Error", 500)) as server:
        ask("out", server.url, "--concurrency", 1, "--max-retries", 1, code=2)
    assert len(server.bodies) < 2 * POINTS
    assert "does not answer any more: 500 Internal Server Error (sent 2 times)" in capsys.readouterr().err


def test_a_server_that_is_not_there_costs_nothing(ask: Ask, capsys: Any) -> None:
    with standing_in(calls_as_asked) as server:
        pass
    out = ask("out", server.url, code=2)
    assert "does not answer (ConnectionRefusedError" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("listing", "options", "named"),
    [
        (Reply(LISTING), ["--model", "other"], "--model other: --server"),
        (Reply({"data": [{"id": "a"}, {"id": "b"}]}), [], "serves a, b; name one by --model"),
        (Reply({"data": []}), [], "it does not say what"),
        (Reply({"data": [{"id": 7}, None]}), [], "it does not say what"),
        (Reply(b"no", 500), [], "it does not say what"),
        (Reply({"error": "no"}, 401), ["--model", "tiny"], client.KEY),
        (
            Reply(b"moved", 301, {"Location": "http://elsewhere/"}),
            ["--model", "tiny"],
            "sends us on to http://elsewhere/",
        ),
    ],
)
def test_a_model_that_is_not_served_is_refused(
    ask: Ask, capsys: Any, listing: Reply, options: list[str], named: str
) -> None:
    with standing_in(calls_as_asked, listing) as server:
        out = ask("out", server.url, *options, code=2)
    assert named in capsys.readouterr().err
    assert not out.exists()
    assert not server.bodies


def test_a_server_that_does_not_list_its_models_is_asked_for_the_one_named(ask: Ask) -> None:
    with standing_in(calls_as_asked, Reply(b"no", 500)) as server:
        assert report_of(ask("out", server.url, "--model", "mine"))["model"] == "mine"


def test_a_server_that_lists_a_cache_is_asked_for_the_one_named(ask: Ask) -> None:
    """As `transformers serve` does, which says itself what it does not serve."""
    page = Reply({"paths": {"/v1/chat/completions": {}, "/load_model": {}}})
    with standing_in(calls_as_asked, Reply(LISTING), page) as server:
        assert report_of(ask("out", server.url, "--model", "/models/mine"))["model"] == "/models/mine"


def test_an_address_without_its_end_is_told(ask: Ask, capsys: Any) -> None:
    with standing_in(calls_as_asked) as server:
        ask("out", server.url.removesuffix("/v1"), code=2)
    assert "has no /models (404 Not Found); such an address mostly ends in /v1" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["turned", "transparent", "webp", "jpeg", "gray"])
def test_an_image_is_sent_as_every_server_reads_it(kind: str) -> None:
    """As it is where that can be read in one way alone, else as the pixels that we see in it."""
    plain = Image.open(io.BytesIO(picture(1)))
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "turned": (plain, {"format": "JPEG", "exif": _turned()}),
        "transparent": (plain.convert("RGBA"), {"format": "PNG"}),
        "webp": (plain, {"format": "WEBP", "lossless": True}),
        "jpeg": (plain, {"format": "JPEG"}),
        "gray": (plain.convert("L"), {"format": "PNG"}),
    }
    buffer = io.BytesIO()
    image, options = made[kind]
    image.save(buffer, **options)
    head, _, text = data_url(buffer.getvalue()).partition(",")
    sent = base64.b64decode(text)
    assert head == f"data:image/{'jpeg' if kind == 'jpeg' else 'png'};base64"
    assert (sent == buffer.getvalue()) == (kind in ("jpeg", "gray"))
    assert decode_image(sent).tobytes() == decode_image(buffer.getvalue()).tobytes()
    assert Image.open(io.BytesIO(sent)).convert("RGB").tobytes() == decode_image(sent).tobytes(), "however it is read"


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--server", "http://user:secret@host/v1"], "neither a user nor a password"),
        (["--server", "http://host/v1?key=secret"], "neither a user nor a password"),
        (["--server", "host:8000"], "no address of a server"),
        (["--server", "http://host:port/v1"], "is no URL"),
        (["--server", "http://127.0.0.1:9/v1", "--ple", "gpu"], "--ple is for a model that is loaded here"),
        (["--server", "http://127.0.0.1:9/v1", "--chat-template", "gemma4_v5"], "start the server with that template"),
        (["--server", "http://127.0.0.1:9/v1", "--unroll", "reasoning"], "name the --processor"),
        (["--server", "http://127.0.0.1:9/v1", "--endpoint", "completions"], "name the --processor"),
        (["--server", "http://127.0.0.1:9/v1", "--extra-body", "[]"], "write a JSON object"),
        (["--server", "http://127.0.0.1:9/v1", "--extra-body", "{"], "not JSON"),
        (["--server", "http://127.0.0.1:9/v1", "--extra-body", '{"x": NaN}'], "not JSON"),
        (["--server", "http://127.0.0.1:9/v1", "--extra-body", '{"x": "secret"'], "not JSON"),
        (["--server", "http://127.0.0.1:9/v1", "--extra-body", '"secret"'], "write a JSON object"),
        (["--server", "http://127.0.0.1:9/v1", "--extra-body", '{"api_key": "secret"}'], client.KEY),
        (
            ["--server", "http://127.0.0.1:9/v1", "--extra-body", '{"a": [{"X-Api-Key": "secret"}]}'],
            "'X-Api-Key' looks",
        ),
        (["--server", "http://127.0.0.1:9/v1", "--extra-body", '{"headers": {"Authorization": "secret"}}'], client.KEY),
        (["--server", "http://127.0.0.1:9/v1", "--extra-body", '{"hf_token": "secret"}'], "'hf_token' looks"),
        (["--server", "http://127.0.0.1:9/v1", "--request-timeout-s", "1e12"], "less than or equal to 604800"),
        (["--server", "http://127.0.0.1:9/v1", "--adapter", "."], "load it into the server"),
        (["--model", "tiny", "--concurrency", "3"], "--concurrency is for a server"),
        ([], "Missing option '--model'"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    data: Path, tmp_path: Path, capsys: Any, options: list[str], named: str
) -> None:
    assert main(["evaluate", "--data", str(data), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "secret" not in error
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused_and_so_is_a_key_that_no_header_carries(
    ask: Ask, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with standing_in(calls_as_asked) as server:
        monkeypatch.setenv(client.KEY, "sk a\nsecret")
        ask("out", server.url, code=2)
        assert "secret" not in (error := capsys.readouterr().err)
        assert f"{client.KEY} holds blanks" in error
        monkeypatch.setattr("gemma_dist.world.world_size", lambda: 2)
        ask("out", server.url, code=2)
        assert "raise --concurrency instead" in capsys.readouterr().err
        assert not server.asked


def test_a_folder_of_another_model_or_other_fields_is_refused(ask: Ask, capsys: Any) -> None:
    both = Reply({"data": [{"id": "a"}, {"id": "b"}]})
    with standing_in(calls_as_asked, both) as server:
        out = ask("out", server.url, "--model", "a")
        (out / "report.json").unlink()  # as if it had been killed before the last step
        ask("out", server.url, "--model", "b", code=2)
        assert "model: 'a' there, 'b' here" in capsys.readouterr().err
        ask("out", server.url, "--model", "a", "--extra-body", '{"min_p": 1}', code=2)
        assert "extra_body: {} there, {'min_p': 1} here" in capsys.readouterr().err


def test_an_interrupt_ends_the_run_at_once_and_keeps_the_lines(data: Path, tmp_path: Path) -> None:
    forever, answered = threading.Event(), []

    def hang(asked: Asked) -> Reply:
        answered.append(asked)
        return Reply(hangs=forever, drops=True) if len(answered) > 3 else calls_as_asked(asked)

    out = tmp_path / "out"
    with standing_in(hang) as server:
        process = start("evaluate", "--server", server.url, "--data", data, "--out", out, "--concurrency", 2)
        while len(answered) < 5:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)  # the server would answer after 60
        forever.set()
    assert process.returncode == 130, output
    assert "interrupted: every answer that was whole is kept in the folder of --out" in output
    assert "Traceback" not in output
    assert sum(part.read_bytes().count(b"\n") for part in out.glob(".samples-*")) == 3


FUNCTION = {"name": "plot", "arguments": {"n": 1}}


@pytest.mark.parametrize(
    ("given", "status", "calls"),
    [
        (message(None, [called("plot", '{"n": 1}')], "tool_calls"), "ok", [FUNCTION]),
        (message("", [called("plot", {"n": 1})], "stop"), "ok", [FUNCTION]),
        (message("So.", [called("f", ""), called("f", None)]), "ok", [{"name": "f", "arguments": {}}] * 2),
        (message(None, [called("plot", '{"n": 1}')], "length"), "truncated", [FUNCTION]),
        (message(None, [called("plot", '{"n": 1}'), called("plot", '{"n": ')]), "malformed", [FUNCTION]),
        (message(None, [called("plot", "[1]")]), "malformed", []),
        (message(None, [called("plot", [])]), "malformed", []),
        (message(None, [called("plot", '{"n": NaN}')]), "malformed", []),
        (message(None, [called("plot", '{"n": 1e999}')]), "malformed", []),
        (message(None, [called("plot", '{"n": ' + "[" * 500 + "]" * 500 + "}")]), "malformed", []),
        (message(None, [called("plot", "[" * 100_000)]), "malformed", []),
        (message(None, [called("plot", '{"n": ' + "9" * 5000 + "}")]), "malformed", []),
        (message(None, [called(None, "{}")]), "malformed", []),
        (message(None, [called({"a": 1}, "{}")]), "malformed", []),
        (message(None, [7, None, "f", {"function": "f"}]), "malformed", []),
        (message(None, {"function": FUNCTION}), "malformed", []),
        (message("Hello."), "no_call", []),
        (message([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]), "no_call", []),
        (message("Hel", finish="length"), "truncated", []),
        (message(None), "no_call", []),
        (message(7), "no_call", []),
        (message(f"{CALL}call:plot{{n:1}}{CALL_END}"), "ok", [FUNCTION]),
        (message("call:plot{n:1}"), "malformed", []),
        (message(f"{CALL}call:plot{{n:1}}{CALL_END}", [called("plot", '{"n": 1}')]), "malformed", [FUNCTION]),
    ],
)
def test_a_message_is_read_as_a_program_would_take_it(given: Any, status: str, calls: list[Any]) -> None:
    served = read_chat(given, None)
    reading = read_message(served.output, budget_spent=not served.stopped, tool_names=["plot", "f"])
    assert (reading.status, reading_to_json(reading)["calls"]) == (status, calls)
    assert reading.attempted == (status in ("ok", "malformed") or bool(calls))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_thoughts_are_no_content(key: str) -> None:
    reading = read_message(json.dumps({key: " Hm. ", "content": "Yes."}), budget_spent=False, tool_names=[])
    assert (reading.reasoning, reading.content) == ("Hm.", "Yes.")


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        {"choices": {}},
        {"choices": [7]},
        {"choices": [{"finish_reason": "stop"}]},
        {"choices": [{"finish_reason": "stop", "message": "Hello."}]},
        message(finish="abort"),
        message(finish=None),
        message(finish=["stop"]),
    ],
)
def test_an_answer_of_another_form_fails_its_point_alone(ask: Ask, capsys: Any, answer: Any) -> None:
    def once(asked: Asked) -> Reply:
        return Reply(answer) if len(asked.body["messages"]) == 7 else calls_as_asked(asked)

    with standing_in(once) as server:
        ask("out", server.url, code=2)
    assert len(server.bodies) == POINTS
    error = capsys.readouterr().err
    assert "1 decision points could not be answered, such as 3 row-2 8: " in error
    assert "Traceback" not in error


def test_calls_that_the_server_reads_otherwise_are_counted_and_named(ask: Ask, tmp_path: Path, model: str) -> None:
    """Beside the text of the model, as ids (vLLM) or as text (llama.cpp); and calls that no parser took."""
    encoder = load_encoder(model, EvaluateConfig())
    quoted = f"{CALL}call:plot{{n:1,s:{QUOTE}a,b{QUOTE}}}{CALL_END}<|tool_response>"
    right, wrong = called("plot", '{"s": "a,b", "n": 1.0}'), called("plot", '{"s": "a", "n": 1}')

    def reads(asked: Asked) -> Reply:
        length = len(asked.body["messages"])
        assert asked.body["return_token_ids"] is True
        ids = encoder.tokenizer(quoted, add_special_tokens=False)["input_ids"]
        if length == 1:
            return Reply(message(None, [right], "tool_calls", token_ids=ids))
        if length == 3:
            return Reply(message(None, [wrong], "tool_calls", token_ids=ids))
        if length == 5:
            return Reply(message(None, [right], "tool_calls") | {"__verbose": {"content": quoted * 2}})
        return Reply(message(quoted))

    with standing_in(reads) as server:
        out = ask("out", server.url, "--processor", model)
    reading = report_of(out)["server_reading"]
    assert reading["answers"] == POINTS
    assert (reading["with_text"], reading["read_otherwise"], reading["calls_left_in_text"]) == (8, 5, 1)
    assert reading["other_prompt_length"] == POINTS, "the stand-in says 11 tokens of each"
    assert "row-2 turn 8" in reading["named"]
    page = (out / "report.md").read_text()
    assert "The server's parser read other calls than we do in 5 of 8 answers" in page
    assert samples_of(out)[-1]["parsed"]["calls"][0]["arguments"] == {"n": 1, "s": "a,b"}, "no parser: ours"
    assert main(["score", "--from", str(out), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/report.json").read_bytes() == (out / "report.json").read_bytes()


def test_completions_of_prompts_rendered_here_are_what_the_model_writes_here(
    ask: Ask, tmp_path: Path, model: str, capsys: Any
) -> None:
    """Behind the stand-in is the model itself, one prompt after the other."""
    data = write_rows(tmp_path / "text.jsonl", [row(n, num_calls=n) for n in (1, 2)])
    words = ["evaluate", "--model", model, "--data", data, "--out", tmp_path / "here", "--max-new-tokens", 6]
    words.append("--no-loss")  # which a server does not tell
    assert main([str(word) for word in words]) == 0
    loaded, tokenizer = load_for_evaluation(model, None), load_encoder(model, EvaluateConfig()).tokenizer
    lock = threading.Lock()

    def complete(asked: Asked) -> Reply:
        ids = asked.body["prompt"]
        with lock, torch.inference_mode():
            written = loaded.generate(torch.tensor([ids]), max_new_tokens=asked.body["max_tokens"], do_sample=False)
        text = tokenizer.decode(written[0, len(ids) :].tolist())
        return Reply({"choices": [{"text": text, "finish_reason": "length"}], "usage": {"completion_tokens": 6}})

    options = ["--max-new-tokens", 6, "--endpoint", "completions", "--processor", model]
    with standing_in(complete) as server:
        out = ask("out", server.url, "--data", data, *options)
        assert all(body["skip_special_tokens"] is False for body in server.bodies)
        here, there = samples_of(tmp_path / "here"), samples_of(out)
        assert len(here) == 5
        for ours, theirs in zip(here, there, strict=True):
            differing = {name for name in ours if ours[name] != theirs.get(name)}
            assert differing <= {"key", "output_ids", "loss"}, differing
        assert report_of(out)["metrics"] == report_of(tmp_path / "here")["metrics"]
        ask("images", server.url, *options, code=2)
    assert "row-0 shows images, and --endpoint completions takes text alone" in capsys.readouterr().err
