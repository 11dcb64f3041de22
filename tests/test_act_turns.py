"""Tasks of several turns, calls that do not fit, and two folders of runs side by side."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gemma_dist.__main__ import main
from gemma_dist.act.changes import compare_acted
from gemma_dist.act.tasks import read_tasks
from gemma_dist.config import ShardConfig
from gemma_dist.config_act import ActConfig
from gemma_dist.data.encode import load_encoder
from gemma_dist.data.rows import read_rows
from gemma_dist.data.trajectory import parse_row
from gemma_dist.errors import ConfigError, DataError
from gemma_dist.evaluate.intervals import mcnemar
from gemma_dist.evaluate.log import opened
from gemma_dist.evaluate.runs import with_repeats
from gemma_dist.logs import read_jsonl
from tests.support.corpus import TOOLS, call, row, write_rows
from tests.support.standin import Asked, Reply, called, message, standing_in

MY_TOOLS = """
drawn = []

def plot(n):
    if not isinstance(n, int):
        raise ValueError(f"{n!r} bars?")
    drawn.append(n)
    return f"chart {n}"

def rest():
    return "rested"

def secret():
    return "<|turn>"

def check(row, messages):
    return drawn == row["expected"]

TOOLS = [plot, rest, secret]
"""
FUNCTIONS = ["--tools", "turn_tools:TOOLS", "--check", "turn_tools:check", "--declare", "rows"]
REST = {"type": "function", "function": {"name": "rest", "parameters": {"type": "object", "properties": {}}}}
Act = Callable[..., Path]


@pytest.fixture
def act(tmp_path: Path) -> Iterator[Act]:
    """Act on tasks into a folder of that name, and expect an exit code; the folder."""
    (tmp_path / "turn_tools.py").write_text(MY_TOOLS)

    def run(name: str, tasks: Sequence[Any], *options: object, code: int = 0) -> Path:
        words = ["act", "--data", write_rows(tmp_path / f"{name}.jsonl", list(tasks)), "--out", tmp_path / name]
        assert main([str(word) for word in [*words, *options]]) == code
        return tmp_path / name

    with contextlib.chdir(tmp_path):
        yield run


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split() if word.isdigit()]


def obedient(asked: Asked) -> Reply:
    """Draws what the user's last message says, or rests, and says so."""
    history = asked.body["messages"]
    last = max(place for place, one in enumerate(history) if one["role"] == "user")
    text = history[last]["content"]
    if last < len(history) - 1:
        return Reply(message(f"That was: {text}"))
    calls = [called("plot", json.dumps({"n": n})) for n in numbers(text)] or [called("rest", "{}")]
    return Reply(message(None, calls, "tool_calls"))


def lines_of(out: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(out / "runs.jsonl"))


def test_the_user_goes_on_when_the_model_has_answered(act: Act, tmp_path: Path) -> None:
    """Turn by turn, with the tools that one brings, as the user of a log does; and the checker judges the end."""
    system, script = {"role": "system", "content": "Draw."}, [user("Draw 3 and 4 ."), user("Rest.", tools=[REST])]
    tasks: list[dict[str, Any]] = [
        {
            "id": "script",
            "messages": [system, *script, user("Draw 5 .", tools=[REST])],
            "tools": TOOLS,
            "expected": [3, 4, 5],
        },
        {
            "id": "sharegpt",
            "conversations": [{"from": "human", "value": f"Draw {n} ."} for n in (1, 2)],
            "tools": TOOLS,
        },
        {**row(7), "id": "log"},
    ]
    tasks[1]["expected"] = [1, 2]
    tasks[2]["messages"] = [user("Draw 7 ."), *row(7)["messages"][1:], user("Draw 8 ."), user("Draw 9 ."), call(9)]
    tasks[2]["messages"] += [{**row(9)["messages"][2], "tool_call_id": "c9"}, {"role": "assistant", "content": "Done."}]
    tasks[2]["expected"] = [7, 9]
    # An answer that is not trained stands between what the user says, and another one behind the last that is.
    untrained = {"role": "assistant", "content": "Later.", "train": False}
    tasks.append({**tasks[2], "id": "untrained", "messages": [*tasks[2]["messages"], user("Thanks."), untrained]})
    tasks[3]["messages"].insert(5, untrained)
    tasks[3]["expected"] = [7, 8, 9]
    called_8 = [{**call(8), "train": False}, {**row(8)["messages"][2], "tool_call_id": "c8"}, untrained]
    answers = tasks[2]["messages"][1:4]
    tasks.append({**tasks[2], "id": "wrong", "messages": [user("Draw 700 ."), *answers, user("Draw 8 ."), *called_8]})
    tasks[4]["messages"] += tasks[2]["messages"][5:]
    tasks[4]["expected"] = []
    kept = tmp_path / "kept.jsonl"
    with standing_in(obedient) as server:
        out = act("out", tasks, "--server", server.url, *FUNCTIONS, "--keep", kept, "--concurrency", 1)
    lines = {line["task"]: line for line in lines_of(out)}
    wrong = lines.pop("wrong")
    assert (wrong["outcome"], len(wrong["steps"]), wrong["first_wrong_step"]) == ("failure", 6, 6), (
        "all calls are gold's"
    )
    assert {name: line["outcome"] for name, line in lines.items()} == dict.fromkeys(lines, "success")
    said = [one["content"] for one in lines["log"]["row"]["messages"] if one["role"] == "user"]
    assert said == ["Draw 7 .", "Draw 8 .", "Draw 9 ."], "both of the last two, before the model answers"
    told = [(one["role"], one["content"]) for one in lines["untrained"]["row"]["messages"]]
    assert [text for role, text in told if role == "user"] == said
    assert told[told.index(("user", "Draw 9 .")) - 1] == ("assistant", "That was: Draw 8 ."), "the model's own"
    offered = [[tool["function"]["name"] for tool in body["tools"]] for body in server.bodies]
    assert offered[:6] == [["plot"]] * 2 + [["plot", "rest"]] * 4
    script_row = next(one for one in read_jsonl(kept) if one["id"].startswith("script/run-1-"))
    assert [tool["function"]["name"] for tool in script_row["tools"]] == ["plot", "rest"]
    trained = [one.get("train", True) for one in script_row["messages"] if one["role"] == "assistant"]
    assert trained == [False, False, True, True, True, True], "what was said before it knew of `rest` is not trained"
    assert len(lines["script"]["steps"]) == 6


def test_kept_rows_of_several_turns_hold_what_the_model_saw(act: Act, model: str, tmp_path: Path) -> None:
    def write(asked: Asked) -> Reply:
        prompts.append(asked.body["prompt"])
        text = encoder.tokenizer.decode(asked.body["prompt"])
        n = text.count("Draw")
        answer = "So be it.<turn|>"
        if text.count("call:plot") < n:
            answer = "<|tool_call>call:plot{n:" + str(n) + "}<tool_call|><|tool_response>"
        return Reply({"choices": [{"text": answer, "finish_reason": "stop"}]})

    encoder, prompts = load_encoder(model, ShardConfig()), list[list[int]]()
    tasks = [{"id": "two", "messages": [user("Draw."), user("Draw again.")], "expected": [1, 2]}]
    kept = tmp_path / "kept.jsonl"
    with standing_in(write) as server:
        options = ["--endpoint", "completions", "--processor", model, "--keep", kept, "--concurrency", 1]
        out = act("out", tasks, "--server", server.url, *FUNCTIONS, *options)
    assert [step["prompt_ids"] for step in with_repeats(lines_of(out)[0]["steps"])] == prompts
    (kept_row,) = [parse_row(one, where, ShardConfig()) for where, one in read_rows([kept])]
    assert [point.input_ids for point in encoder.prompts(kept_row)] == prompts
    assert len(prompts) == 4


def test_a_script_that_cannot_be_said_is_refused(tmp_path: Path) -> None:
    for tools, told in (
        (3, "brings the `tools` 3; write a list"),
        ([{"type": "function"}], "the user's messages bring"),
    ):
        rows = [{"messages": [user("a"), user("b", tools=tools)], "tools": TOOLS}]
        with pytest.raises(DataError, match=told):
            list(read_tasks(write_rows(tmp_path / "tasks.jsonl", rows), None, ActConfig()))


def test_a_call_that_does_not_fit_is_refused_or_answered_by_its_function(act: Act) -> None:
    """And an answer that no row may hold is told by task and run, and to the model without them."""

    def askew(asked: Asked) -> Reply:
        history = asked.body["messages"]
        calls = [called("plot", '{"n": "many"}'), called("paint", "{}"), called("rest", "{}"), called("secret", "{}")]
        return Reply(message("So be it.") if len(history) > 1 else message(None, calls, "tool_calls"))

    results = {}
    with standing_in(askew) as server:
        for choice in ("refuse", "run"):
            tasks = [{"id": choice, "messages": [user("Draw.")], "tools": [*TOOLS, SECRET], "expected": []}]
            options = ["--unfit-calls", choice, "--control-tokens", "reject"]
            (line,) = lines_of(act(choice, tasks, "--server", server.url, *FUNCTIONS, *options))
            results[choice] = [one["content"] for one in line["row"]["messages"] if one["role"] == "tool"]
            assert next(one for one in line["row"]["messages"] if one["role"] == "assistant")["train"] is False
    absent = "Error: there is no tool {}; there are: plot, secret"
    assert results["refuse"][1:3] == [absent.format("paint"), absent.format("rest")]
    assert "integer" in results["refuse"][0]
    assert results["run"][:3] == ["Error: ValueError: 'many' bars?", absent.format("paint"), "rested"]
    for said in results.values():
        assert said[3].startswith("Error: ")
        assert "run 1" not in said[3]
        assert "turn " not in said[3]


SECRET = {"type": "function", "function": {"name": "secret", "parameters": {"type": "object", "properties": {}}}}


def lucky(odds: int) -> Callable[[Asked], Reply]:
    """Draws right where the seed and the task say so: the more, the higher the odds of 10."""

    def reply(asked: Asked) -> Reply:
        history = asked.body["messages"]
        (n,) = numbers(history[0]["content"])
        if len(history) > 1:
            return Reply(message(f"Done by {odds}."))
        right = (n * 7 + asked.body["seed"]) % 10 < odds
        return Reply(message(None, [called("plot", json.dumps({"n": n if right else -1}))], "tool_calls"))

    return reply


def test_two_folders_are_compared_run_by_run(act: Act, capsys: Any, tmp_path: Path) -> None:
    tasks = [{"id": f"t{n}", "messages": [user(f"Draw {n} .")], "expected": [n], "tools": TOOLS} for n in range(24)]
    folders = {}
    for name, odds in (("before", 3), ("after", 8)):
        with standing_in(lucky(odds)) as server:
            options = ["--num-runs", 2, "--temperature", 1, "--keep", tmp_path / f"{name}.kept"]
            folders[name] = act(name, tasks, "--server", server.url, *FUNCTIONS, *options)
    right = {
        name: {(line["task"], line["run"]): line["outcome"] == "success" for line in lines_of(out)}
        for name, out in folders.items()
    }
    fixed, broken = (
        sum(before == went[0] and right["after"][run] == went[1] for run, before in right["before"].items())
        for went in ((False, True), (True, False))
    )
    page, passes = compare_acted(folders["before"], folders["after"], None, [], True, as_json=True)
    success = json.loads(page)["metrics"]["success"]
    assert passes
    assert (success["fixed"], success["broken"], success["p_value"]) == (fixed, broken, mcnemar(fixed, broken))
    assert (success["before"], success["after"]) == tuple(sum(runs.values()) / 48 for runs in right.values())
    assert 0 < success["low"] < success["difference"] < success["high"]
    assert {"pass@2", "pass^2"} <= json.loads(page)["metrics"].keys()
    ids = [{one["id"] for one in read_jsonl(tmp_path / f"{name}.kept")} for name in folders]
    assert all(ids)
    assert not set.intersection(*ids), "two rounds of the same tasks, whose runs say something else"
    capsys.readouterr()
    words = ["compare", str(folders["after"]), str(folders["before"]), "--out", str(tmp_path / "compared")]
    assert main([*words, "--fail-if-worse", "--fail-below", "success=0.9"]) == 3
    told = capsys.readouterr()
    assert f"{broken} runs succeed that failed before, {fixed} the other way round" in told.out
    assert "95 % by task" in told.out
    assert "success is worse" in told.err
    assert "success is 0." in told.err
    assert {path.name for path in (tmp_path / "compared").iterdir()} == {"comparison.json", "comparison.md"}


def test_runs_that_end_with_their_first_answer_are_compared_as_others_are(act: Act) -> None:
    def garbled(asked: Asked) -> Reply:
        return Reply(message(None, [called("plot", "{{")], "tool_calls"))

    folders = {}
    for name, how in (("garbled", garbled), ("right", obedient)):
        with standing_in(how) as server:
            tasks = [{"id": "t", "messages": [user("Draw 1 .")], "expected": [1], "tools": TOOLS}]
            folders[name] = act(name, tasks, "--server", server.url, *FUNCTIONS)
    compared = json.loads(compare_acted(folders["garbled"], folders["right"], None, [], True, as_json=True)[0])
    assert compared["fixed"] == [{"task": "t", "run": 1, "before": "malformed", "after": "success"}]


def test_what_cannot_be_compared_is_refused(act: Act, tmp_path: Path) -> None:
    def tasks(words: str) -> list[Any]:
        return [{"id": "t", "messages": [user(words)], "expected": [1], "tools": TOOLS}]

    with standing_in(obedient) as server:
        options = ["--server", server.url, *FUNCTIONS]
        one = act("one", tasks("Draw 1 ."), *options)
        other = act("other", tasks("Draw 1 1 ."), *options)
        twice = act("twice", tasks("Draw 1 ."), *options, "--num-runs", 2, "--temperature", 1)
        unjudged = act("unjudged", tasks("Draw 1 ."), "--server", server.url, *FUNCTIONS[:2], *FUNCTIONS[4:])
    for after, told in ((other, "or gave otherwise, such as t"), (twice, "1 runs of each task")):
        with pytest.raises(DataError, match=told):
            compare_acted(one, after, None, [], False, as_json=False)
    for after, told in ((unjudged, "nothing judged these runs"), (tmp_path, "two of `evaluate`")):
        with pytest.raises(ConfigError, match=told):
            compare_acted(one, after, None, [], False, as_json=False)


def test_an_evaluation_takes_no_folder_of_runs_that_were_killed(act: Act, tmp_path: Path, capsys: Any) -> None:
    with standing_in(obedient) as server:
        out = act("out", [{**row(1), "expected": [1]}], "--server", server.url, *FUNCTIONS)
        (out / "report.json").unlink()
        before = (out / "run.json").read_bytes()
        words = ["--data", str(tmp_path / "out.jsonl"), "--out", str(out), "--server", server.url]
        for name in ("runs.jsonl", ".runs-0.jsonl"):
            (out / "runs.jsonl").rename(out / name)
            assert main(["evaluate", *words]) == 2
            assert "holds runs of `act`, and an evaluation would overwrite them" in capsys.readouterr().err
            assert (out / "run.json").read_bytes() == before
        assert main(["act", *words, *FUNCTIONS, "--seed", "1"]) == 2
        assert "holds runs of `act` of something else (seed: 42 there, 1 here)" in capsys.readouterr().err
        assert main(["act", *words, *FUNCTIONS]) == 0


@pytest.mark.parametrize("name", ["runs.jsonl", ".runs-0.jsonl"])
def test_an_interrupt_takes_no_runs_away(tmp_path: Path, name: str) -> None:
    def interrupted() -> None:
        with opened(tmp_path / "out", lambda: {}):
            (tmp_path / "out" / name).write_text("{}\n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "out" / name).read_text() == "{}\n"
