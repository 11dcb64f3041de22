"""A real server, `gemma-dist serve`, on a tiny model: it answers what the model answers here.

It needs what `pip install 'transformers[serving]'` brings.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gemma_dist.__main__ import main
from gemma_dist.config import EvaluateConfig
from gemma_dist.data.encode import load_encoder
from gemma_dist.evaluate import client
from gemma_dist.gemma_format import CALL, CALL_END, QUOTE, RESPONSE, THOUGHT, TURN_END
from tests.support.corpus import call, row, write_rows
from tests.support.ranks import ENVIRONMENT, kill, long, start

for package in ("fastapi", "openai", "uvicorn"):
    pytest.importorskip(package)

NO_FIELD = {"return_token_ids": None}  # which this server does not know, and refuses


@contextmanager
def serving(model: str, folder: Path) -> Iterator[str]:
    """`gemma-dist serve` of a model, which becomes `transformers serve`; its URL."""
    log = folder / "serve.log"
    command = [sys.executable, "-m", "gemma_dist", "serve", model]
    options = ["--host", "127.0.0.1", "--port", "0", "--device", "cpu", "--dtype", "float32"]
    environment = os.environ | ENVIRONMENT | {"HF_HOME": str(folder / "hub")}
    with log.open("w") as file:
        process = subprocess.Popen([*command, *options], stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + 300
        while not (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text())):
            has_ended = process.poll() is not None or time.monotonic() > end
            assert not has_ended, log.read_text()[-8000:]
            time.sleep(0.1)
        yield f"{found[1]}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(model, tmp_path_factory.mktemp("serve")) as url:
        yield url


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calls with and without tools declared; images that tools return."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", [row(n, num_calls=1 + n % 2) for n in range(5)])


def evaluate(out: Path, *words: object, code: int = 0) -> list[dict[str, Any]]:
    """The samples of `gemma-dist evaluate … --out OUT`; none where it fails."""
    assert main(["evaluate", "--out", str(out), *map(str, words)]) == code
    lines = (out / "samples.jsonl").read_text(encoding="utf-8").splitlines() if code == 0 else []
    return [json.loads(line) for line in lines]


def without_times(out: Path) -> dict[str, Any]:
    report = json.loads((out / "report.json").read_text())
    return {name: value for name, value in report.items() if name not in ("times", "server")}


def test_a_server_answers_what_the_model_answers_here(url: str, model: str, data: Path, tmp_path: Path) -> None:
    """Greedy, in float32: calls, text and reasoning, and the number of tokens in front of them; at any concurrency."""
    words = ["--data", data, "--max-new-tokens", 6, "--model", model]
    here = evaluate(tmp_path / "here", *words, "--no-loss")
    extra = ["--processor", model, "--extra-body", json.dumps(NO_FIELD)]
    there = evaluate(tmp_path / "there", *words, "--server", url, "--concurrency", 4, *extra)
    assert len(here) == len(there) == 12
    assert any(sample["num_images"] for sample in here)
    assert any(sample["num_tools"] for sample in here)
    for ours, theirs in zip(here, there, strict=True):
        differing = {name for name in ours if ours[name] != theirs[name]}
        assert differing <= {"key", "output", "output_ids", "opening"}, ours["id"]
    report = without_times(tmp_path / "there")
    assert report["metrics"] == without_times(tmp_path / "here")["metrics"]
    assert report["server_reading"]["other_prompt_length"] == 0
    evaluate(tmp_path / "one", *words, "--server", url, "--concurrency", 1, *extra)
    assert (tmp_path / "one/samples.jsonl").read_bytes() == (tmp_path / "there/samples.jsonl").read_bytes()
    assert without_times(tmp_path / "one") == report


def test_thoughts_that_this_server_leaves_out_of_the_history_show(url: str, model: str, tmp_path: Path) -> None:
    rows = [row(1, num_calls=2)]
    rows[0]["messages"][1]["reasoning_content"] = "A chart is wanted."
    words = ["--data", write_rows(tmp_path / "rows.jsonl", rows), "--max-new-tokens", 4, "--model", model]
    extra = ["--processor", model, "--extra-body", json.dumps(NO_FIELD)]
    samples = evaluate(tmp_path / "out", *words, "--server", url, *extra)
    shorter = [sample["own_prompt_tokens"] - sample["prompt_tokens"] for sample in samples]
    assert shorter[0] == 0
    assert min(shorter[1:]) > 0
    assert "2 of 3 prompts have another length" in (tmp_path / "out/report.md").read_text()


def test_what_this_server_does_not_know_is_named(url: str, model: str, data: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["--data", data, "--server", url]
    evaluate(tmp_path / "a", *words, "--model", model, "--temperature", 1, code=2)
    assert "422 Unexpected fields in the request: {'top_k'}; a field" in capsys.readouterr().err
    evaluate(tmp_path / "b", *words, "--model", "other", code=2)
    assert f"Server is pinned to '{model}'; requested 'other'" in capsys.readouterr().err


def _writes(model: str, texts: Sequence[str]) -> dict[str, Any]:
    """A field that makes this server's model write a text, whatever it is asked: each token is the likeliest by far."""
    tokenizer = load_encoder(model, EvaluateConfig()).tokenizer
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    bias = [[ids[: end + 1], 1000.0 * (end + 1)] for end in range(len(ids))]
    settings = {
        "sequence_bias": bias,
        "eos_token_id": tokenizer.convert_tokens_to_ids([RESPONSE, TURN_END]),
        "do_sample": False,
    }
    return {"generation_config": json.dumps(settings)}


def test_calls_are_scored_as_this_server_reads_them(
    url: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.01)
    wanted = call(1)
    wanted["tool_calls"].append({"id": "c2", "type": "function", "function": {"name": "f", "arguments": {"s": "a,b"}}})
    rows = [{"id": "two", "messages": [{"role": "user", "content": "Draw."}, wanted]}]
    words = ["--data", write_rows(tmp_path / "rows.jsonl", rows), "--server", url, "--model", model]
    first, second = f"{CALL}call:plot{{n:1}}{CALL_END}", f"{CALL}call:f{{s:{QUOTE}a,b{QUOTE}}}{CALL_END}"
    text = [f"{THOUGHT}Hm.<channel|>", first, second, RESPONSE]
    (sample,) = evaluate(tmp_path / "right", *words, "--extra-body", json.dumps(_writes(model, text)))
    assert sample["score"]["right"]
    assert sample["parsed"]["reasoning"] == "Hm."
    assert sample["stopped"]
    torn = json.dumps(_writes(model, [f"{CALL}call:plot{{n:}}{CALL_END}", RESPONSE]))
    words += ["--extra-body", torn, "--max-retries", 1]
    evaluate(tmp_path / "torn", *words, code=2)
    error = capsys.readouterr().err
    assert "such as 1 two 2: 500 Internal Server Error (sent 2 times)" in error
    assert "--server-errors malformed" in error
    (sample,) = evaluate(tmp_path / "counted", *words, "--server-errors", "malformed")
    assert sample["score"]["failure"] == "malformed"
    assert "In the place of 1 of 1 answers the server sent an error" in (tmp_path / "counted/report.md").read_text()


def test_openais_client_gets_calls_whole_and_streamed(url: str, model: str) -> None:
    """The walk of docs/serving.md: a call of a tool whose name has more than letters, its result, and an answer."""
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    tool: Any = {
        "type": "function",
        "function": {"name": "get-weather.v2", "parameters": {"type": "object", "properties": {}}},
    }
    messages: list[Any] = [{"role": "user", "content": "How is the weather in Bern?"}]
    text = [f"{CALL}call:get-weather.v2{{city:{QUOTE}Bern, CH{QUOTE},days:2}}{CALL_END}", RESPONSE]
    asked: dict[str, Any] = {"model": model, "messages": messages, "tools": [tool], "max_tokens": 100}
    asked["extra_body"] = _writes(model, text)
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].finish_reason == "tool_calls"
    (made,) = answer.choices[0].message.tool_calls or []
    assert (made.function.name, json.loads(made.function.arguments)) == (
        "get-weather.v2",
        {"city": "Bern, CH", "days": 2},
    )
    pieces = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    streamed = [one.function for piece in pieces for one in piece.tool_calls or []]
    assert [one.name for one in streamed if one.name] == ["get-weather.v2"]
    assert json.loads("".join(one.arguments or "" for one in streamed)) == {"city": "Bern, CH", "days": 2}
    assert CALL not in "".join(piece.content or "" for piece in pieces)
    messages += [answer.choices[0].message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": made.id, "content": "sunny"}]
    final = client.chat.completions.create(**asked | {"extra_body": _writes(model, ["It is sunny.", TURN_END])})
    assert final.choices[0].message.content == "It is sunny."
    assert final.choices[0].finish_reason == "stop"


@long
def test_killed_on_either_side_a_run_goes_on(
    model: str, data: Path, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    words = ["--data", data, "--model", model, "--max-new-tokens", 32]
    out = tmp_path / "out"

    def some_lines() -> int:
        return sum(part.read_bytes().count(b"\n") for part in out.glob(".samples-*"))

    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with serving(model, tmp_path / "first") as url:
        whole = evaluate(tmp_path / "whole", *words, "--server", url)
        process = start("evaluate", *words, "--server", url, "--out", out, "--concurrency", 1)
        while not some_lines():
            assert process.poll() is None, kill(process)
            time.sleep(0.02)
        kill(process)
        process = start("evaluate", *words, "--server", url, "--out", out, "--concurrency", 1, "--max-retries", 1)
        killed = some_lines()
        while some_lines() == killed:
            assert process.poll() is None, kill(process)
            time.sleep(0.02)
    output, _ = process.communicate(timeout=300)
    assert (process.returncode, "does not answer any more" in output) == (2, True), output
    assert killed < some_lines() < len(whole)
    with serving(model, tmp_path / "second") as url:
        evaluate(out, *words, "--server", url)
    assert (out / "samples.jsonl").read_bytes() == (tmp_path / "whole/samples.jsonl").read_bytes()
    assert without_times(out) == without_times(tmp_path / "whole")
