"""Own runs: calls are executed and answered, each run ends in an outcome, and what is kept is what the model saw."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from gemma_dist.__main__ import main
from gemma_dist.act.episode import give
from gemma_dist.act.first_wrong import calls_text, first_wrong_step, nearest
from gemma_dist.act.tasks import read_tasks
from gemma_dist.act.tools import Box, Functions, ToolServer
from gemma_dist.chat.conversation import QUESTION, Conversation
from gemma_dist.chat.tools import Result
from gemma_dist.config import ShardConfig
from gemma_dist.config_act import ActConfig
from gemma_dist.data.encode import load_encoder
from gemma_dist.data.rows import read_rows
from gemma_dist.data.trajectory import parse_row
from gemma_dist.errors import ConfigError, EvaluationError
from gemma_dist.evaluate.runs import with_repeats
from gemma_dist.evaluate.sampling import Sampling
from gemma_dist.logs import read_jsonl
from tests.support.corpus import TOOLS, row, write_rows
from tests.support.ranks import gemma_dist, long
from tests.support.standin import Asked, Reply, called, message, standing_in

MY_TOOLS = '''
import os, subprocess, time
from pathlib import Path
from PIL import Image

count = 0

def plot(n: int):
    """Draw a chart.

    Args:
        n: How many bars.
    """
    global count
    count += 1
    if n == 13:
        raise ValueError("13 is no number of bars")
    return [f"chart {n}, call {count}", Image.new("RGB", (48, 64), (n % 256, 40, 200))]

def sleep(seconds: float) -> str:
    """Sleep.

    Args:
        seconds: How long.
    """
    time.sleep(seconds)
    return f"slept, count {count}"

def stubborn(pid_file: str) -> str:
    """Does not heed a time limit.

    Args:
        pid_file: Where to leave the number of a process that this one starts.
    """
    child = subprocess.Popen(["sleep", "600"])
    Path(pid_file).write_text(str(child.pid))
    while True:
        try:
            time.sleep(600)
        except TimeoutError:
            pass

def die() -> str:
    """Ends the process."""
    os._exit(3)

def setup(row):
    global count
    count = row.get("count", 0)
    if row.get("broken"):
        raise KeyError("a table")

def check(row, messages):
    if row["id"] == "odd":
        raise KeyError("expected")
    return 0.5 if row.get("half") else count > 0 and "chart" in messages[-1]["content"]

TOOLS = [plot, sleep, stubborn, die]
'''
FUNCTIONS = ["--tools", "act_tools:TOOLS", "--check", "act_tools:check", "--setup", "act_tools:setup"]
Act = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a module of tools, in which these tests run."""
    made = tmp_path_factory.mktemp("mine")
    (made / "act_tools.py").write_text(MY_TOOLS)
    with contextlib.chdir(made), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""), prepend=os.pathsep)
        yield made


@pytest.fixture(scope="module")
def tools(folder: Path) -> Iterator[ToolServer]:
    functions = Functions("act_tools:TOOLS", "act_tools:check", "act_tools:setup")
    with contextlib.closing(ToolServer(functions, timeout_s=0.5, declare=True)) as server:
        yield server


@pytest.fixture
def box(tools: ToolServer) -> Iterator[Box]:
    with contextlib.closing(Box(tools, {"id": "one", "count": 5})) as made:
        yield made


@pytest.fixture
def act(folder: Path, tmp_path: Path) -> Act:
    """Act on tasks into a folder of that name, and expect an exit code; the folder."""

    def run(name: str, tasks: Sequence[Any], *options: object, code: int = 0) -> Path:
        data = write_rows(tmp_path / f"{name}.jsonl", list(tasks))
        words = ["act", "--data", data, "--out", tmp_path / name, *options]
        assert main([str(word) for word in words]) == code
        return tmp_path / name

    return run


def task(number: int, **fields: Any) -> dict[str, Any]:
    """What is asked, and nothing behind it."""
    return {"id": f"task-{number}", "messages": [{"role": "user", "content": f"Draw {number}, please."}], **fields}


def lines_of(out: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(out / "runs.jsonl"))


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


# ---- the user's functions --------------------------------------------------------------------------------------------


def test_functions_are_declared_and_their_runs_share_no_state(tools: ToolServer, box: Box) -> None:
    assert tools.names == ["plot", "sleep", "stubborn", "die"]
    assert [tool["function"]["name"] for tool in tools.declared] == tools.names
    first = box.call("plot", {"n": 3})
    assert first.text == "chart 3, call 6"
    assert len(first.images) == 1
    assert box.call("plot", {"n": 3}).text == "chart 3, call 7"
    with contextlib.closing(Box(tools, {"id": "two"})) as other:
        assert other.check([{"content": "a chart"}]) == (0.0, "")
        assert other.call("plot", {"n": 3}).text == "chart 3, call 1"
        assert other.check([{"content": "a chart"}]) == (1.0, "")


def test_errors_are_answers(box: Box) -> None:
    assert box.call("plot", {"n": 13}) == Result("Error: ValueError: 13 is no number of bars")
    assert "unexpected keyword argument 'm'" in box.call("plot", {"m": 1}).text
    assert box.call("paint", {}).text == "Error: there is no tool paint; there are: plot, sleep, stubborn, die"


def test_a_call_that_takes_too_long_is_interrupted_and_its_run_keeps_its_state(box: Box) -> None:
    box.call("plot", {"n": 1})
    assert box.call("sleep", {"seconds": 60}).text == "Error: TimeoutError: no answer within 0.5 s"
    assert box.call("sleep", {"seconds": 0}).text == "slept, count 6"


def test_a_call_that_heeds_nothing_is_killed_with_what_it_started(box: Box, tmp_path: Path) -> None:
    box.call("plot", {"n": 1})
    told = box.call("stubborn", {"pid_file": str(tmp_path / "pid")}).text
    assert told == "Error: TimeoutError: no answer within 0.5 s; the process of the tools was begun anew"
    child = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 10
    while (state := _state_of(child)) not in ("", "Z"):
        assert time.monotonic() < end, state
        time.sleep(0.01)
    assert box.call("sleep", {"seconds": 0}).text == "slept, count 5", "set up anew"
    assert "the process of the tools ended" in box.call("die", {}).text
    assert box.call("sleep", {"seconds": 0}).text == "slept, count 5"


def _state_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_what_cannot_be_used_is_told_before_a_model_is_loaded(tools: ToolServer) -> None:
    for functions, told in {
        Functions("act_tools:nothing"): "--tools act_tools:nothing cannot be loaded: AttributeError",
        Functions("act_tools:TOOLS", "act_tools"): "--check act_tools is no MODULE:FUNCTION",
        Functions("act_tools:TOOLS", "act_tools:count"): "--check act_tools:count is int, no function",
        Functions("act_tools:check"): "the tool check cannot be declared",
    }.items():
        with pytest.raises(ConfigError, match=told):
            ToolServer(functions, timeout_s=1, declare=True)
    told = "could not be set up for this task: KeyError: 'a table'"
    with contextlib.closing(Box(tools, {"broken": True})) as broken, pytest.raises(EvaluationError, match=told):
        broken.call("plot", {"n": 1})


# ---- runs ------------------------------------------------------------------------------------------------------------


def agent(asked: Asked) -> Reply:
    """Draws as many bars as the user says, and says what came of it; some numbers it gets wrong."""
    history = asked.body["messages"]
    number = int(history[0]["content"].split()[1].strip(","))
    num_answers = sum(one["role"] == "assistant" for one in history)
    plot = called("plot", json.dumps({"n": number}))
    if num_answers == 0 and number == 1:
        return Reply(message("I am not drawing that."))
    if num_answers == 0 and number == 2:
        return Reply(message(None, [called("paint", "{}")], "tool_calls"))
    if num_answers < 4 and number == 4:
        return Reply(message(None, [plot, plot], "tool_calls"))
    if number == 5:
        return Reply(message("Here is a chart and", finish="length"))
    if number == 6:
        return Reply(message(None, [called("plot", "{n")], "tool_calls"))
    if number == 7:
        return Reply(message(""))
    if number == 8 and num_answers:
        return Reply({"error": "the prompt is too long"}, 400)
    if history[-1]["role"] == "user" or (number == 2 and num_answers == 1):
        return Reply(message(None, [plot], "tool_calls"))
    return Reply(message("Here is the chart."))


def test_each_run_ends_in_an_outcome_and_what_succeeds_is_kept(act: Act, tmp_path: Path) -> None:
    tasks = [task(number) for number in (0, 1, 2, 4, 5, 6, 7, 8, 13)] + [task(9, half=True)]
    kept = tmp_path / "kept.jsonl"
    with standing_in(agent) as server:
        out = act("out", tasks, "--server", server.url, *FUNCTIONS, "--keep", kept, "--max-steps", 3)
    lines = {line["task"]: line for line in lines_of(out)}
    assert [line["task"] for line in lines_of(out)] == [one["id"] for one in tasks]
    assert {name: (line["outcome"], line["reward"], len(line["steps"])) for name, line in lines.items()} == {
        "task-0": ("success", 1.0, 2),
        "task-1": ("failure", 0.0, 1),
        "task-2": ("success", 1.0, 3),
        "task-4": ("step_limit", 0.0, 3),
        "task-5": ("truncated", 0.0, 1),
        "task-6": ("malformed", 0.0, 1),
        "task-7": ("silent", 0.0, 1),
        "task-8": ("refused", 0.0, 1),
        "task-13": ("success", 1.0, 2),
        "task-9": ("failure", 0.5, 2),
    }
    results = {
        name: [one["content"] for one in line["row"]["messages"] if one["role"] == "tool"]
        for name, line in lines.items()
    }
    assert results["task-13"] == ["Error: ValueError: 13 is no number of bars"]
    assert results["task-2"][0] == "Error: there is no tool paint; there are: plot, sleep, stubborn, die"
    assert [part["type"] for part in results["task-0"][0]] == ["text", "image"]
    assert len(results["task-4"]) == 6
    report = report_of(out)
    assert (report["num_tasks"], report["num_runs"], report["kept"]) == (10, 1, 3)
    assert (report["metrics"]["success"]["numerator"], report["metrics"]["success"]["denominator"]) == (3, 10)
    rows = list(read_jsonl(kept))
    assert [one["id"].rpartition("-")[0] for one in rows] == ["task-0/run-1", "task-2/run-1", "task-13/run-1"]
    assert rows[1]["messages"][1]["train"] is False, "a call of a tool that there is not is shown, not trained"
    assert not list(out.glob(".runs-*"))
    assert main(["act", "--data", "x", "--out", str(out), *FUNCTIONS]) == 2


def test_kept_rows_hold_what_the_model_saw(act: Act, model: str, tmp_path: Path) -> None:
    """Each prompt that was asked with stands in the row as training encodes it: ids, tools and all."""

    def write(asked: Asked) -> Reply:
        prompts.append(asked.body["prompt"])
        text = encoder.tokenizer.decode(asked.body["prompt"])
        calls = (
            "I sleep.<|tool_call>call:sleep{seconds:0}<tool_call|>" + "<|tool_call>call:sleep{seconds:0.0}<tool_call|>"
        )
        answer = "All is well: a chart.<turn|>" if "slept" in text else calls + "<|tool_response>"
        return Reply({"choices": [{"text": answer, "finish_reason": "stop"}]})

    encoder, prompts = load_encoder(model, ShardConfig()), list[list[int]]()
    kept = tmp_path / "kept.jsonl"
    with standing_in(write) as server:
        options = ["--endpoint", "completions", "--processor", model, "--keep", kept, "--concurrency", 1]
        tasks = [task(0, count=1), task(1, count=1, tools=[])]
        out = act("out", tasks, "--server", server.url, *FUNCTIONS, *options)
    steps = [step for line in lines_of(out) for step in with_repeats(line["steps"])]
    assert [step["prompt_ids"] for step in steps] == prompts
    held = [len(step["prompt_ids"]) for line in lines_of(out) for step in line["steps"]]
    assert held[1] < len(prompts[0]) < len(prompts[1]), "what a prompt begins with is held once"
    rows = [parse_row(one, where, ShardConfig()) for where, one in read_rows([kept])]
    assert len(rows) == 2
    points = [prompt for one in rows for prompt in encoder.prompts(one)]
    assert [point.input_ids for point in points] == prompts
    assert [point.turn for point in points] == [step["turn"] for step in steps]
    for one in rows:
        encoded = encoder.encode(one)
        for index, start_of_answer in encoded.answers:
            (seen,) = [point.input_ids for point in encoder.prompts(one) if point.turn == index + 1]
            assert encoded.input_ids[:start_of_answer] == seen
    words = [str(kept), "--model", model, "--out", str(tmp_path / "shards"), "--num-workers", "1"]
    assert main(["shard", *words]) == 0


def test_a_result_that_no_row_may_hold_is_an_error_that_the_model_reads() -> None:
    call = {"id": "call_0", "type": "function", "function": {"name": "read", "arguments": {}}}
    for result in (Result("<|turn>model"), Result("Error: <|turn>"), Result("\ud800"), Result("", (b"no picture",))):
        conversation = Conversation(ActConfig(control_tokens="reject"), thinking=False, known=["read"])
        conversation.messages += [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
        give(conversation, 0, result)
        (said,) = [one["content"] for one in conversation.so_far().messages if one["role"] == "tool"]
        assert str(said).startswith("Error: ")
        assert "<|turn>" not in str(said)


def test_runs_that_fail_say_where_and_pass_at_k_is_over_all_choices(act: Act) -> None:
    """Of a task's runs, which differ by their seeds, those that fail are compared with one that does not."""

    def gamble(asked: Asked) -> Reply:
        history, luck = asked.body["messages"], asked.body["seed"] % 3
        if len(history) < 4 and luck:
            return Reply(message(None, [called("plot", json.dumps({"n": len(history)}))], "tool_calls"))
        return Reply(message("Here is the chart." if luck else "No."))

    tasks = [task(number, tools=TOOLS) for number in range(4)]
    with standing_in(gamble) as server:
        options = ["--server", server.url, *FUNCTIONS, "--declare", "rows", "--temperature", 1, "--num-runs", 4]
        out, again = (act(name, tasks, *options, "--concurrency", num) for name, num in {"a": 1, "b": 8}.items())
    lines = lines_of(out)
    assert (again / "runs.jsonl").read_bytes() == (out / "runs.jsonl").read_bytes()
    assert [(line["task_number"], line["run"]) for line in lines] == list(product(range(1, 5), range(1, 5)))
    of_task = [[line["outcome"] == "success" for line in lines if line["task_number"] == n] for n in range(1, 5)]
    assert len(set(map(sum, of_task))) > 1, "tasks differ, or nothing is shown"
    metrics = report_of(out)["metrics"]
    for k in (2, 4):
        choices = [list(combinations(runs, k)) for runs in of_task]
        assert metrics[f"pass^{k}"]["value"] == pytest.approx(fmean(fmean(map(all, of)) for of in choices))
        assert metrics[f"pass@{k}"]["value"] == pytest.approx(fmean(fmean(map(any, of)) for of in choices))
    for metric in metrics.values():
        assert metric["low"] <= metric["value"] <= metric["high"]
    right = {line["task"]: line["id"] for line in reversed(lines) if line["outcome"] == "success"}
    for line in lines:
        expected: tuple[int | None, str | None] = (None, None)
        if line["outcome"] != "success" and line["task"] in right:
            calls = [len(step["calls"]) for step in line["steps"]]
            expected = (1 if calls[0] == 0 else 2 if calls[1:2] == [0] else 3, right[line["task"]])
        assert (line["first_wrong_step"], line["compared_with"]) == expected


def test_the_first_wrong_step_is_that_of_calls_in_any_order() -> None:
    one, two = {"name": "f", "arguments": {"x": 1, "y": 2}}, {"name": "g", "arguments": {}}
    assert calls_text([one, two]) == calls_text([two, {"arguments": {"y": 2, "x": 1}, "name": "f"}])
    a, b, text = calls_text([one]), calls_text([two]), calls_text([])
    assert first_wrong_step([a, b, text], [a, a, text]) == 2
    assert first_wrong_step([a, text], [a, text]) == 2, "the same calls: the words are wrong"
    assert first_wrong_step([a, b], [a, b, text]) == 2, "and so are those of a run that was cut off there"
    assert first_wrong_step([a, a, a], [a]) == 2
    assert nearest([a, b], [("x", [b, b]), ("y", [a, text]), ("z", [a, b])]) == ("z", [a, b])
    assert nearest([a], []) is None


# ---- replay ----------------------------------------------------------------------------------------------------------


def test_replay_answers_as_the_log_did_and_says_where_a_run_leaves_it(act: Act, tmp_path: Path) -> None:
    """Parallel calls in another order get the right answers, and the user of the log goes on."""
    both = row(1, num_calls=2)
    both["messages"][1]["tool_calls"] += both["messages"].pop(3)["tool_calls"]
    longer = row(3, num_calls=2)
    longer["messages"] += [{"role": "user", "content": "Thanks."}, {"role": "assistant", "content": "Any time."}]
    rows = [both, longer, row(5), row(6, num_calls=3), row(8)]

    def follow(asked: Asked) -> Reply:
        history = asked.body["messages"]
        number = int(history[0]["content"].split()[1].strip(","))
        seen.setdefault(number, []).append(history)
        num_answers = sum(one["role"] == "assistant" for one in history)
        if number == 5:
            return Reply(message("I would rather not."))
        ns = [[101, 100]] if number == 1 else [[100 * number + step] for step in range({3: 2, 6: 3}.get(number, 1))]
        if num_answers >= len(ns):
            return Reply(message("So be it."))
        if number == 6 and num_answers == 2:
            ns[2] = [7]
        return Reply(message(None, [called("plot", json.dumps({"n": n})) for n in ns[num_answers]], "tool_calls"))

    seen: dict[int, list[Any]] = {}
    with standing_in(follow) as server:
        out = act("out", rows, "--server", server.url, "--replay", "--keep", tmp_path / "kept.jsonl")
    lines = {line["task"]: line for line in lines_of(out)}
    assert {name: line["outcome"] for name, line in lines.items()} == {
        **{"row-1": "success", "row-3": "success", "row-5": "left", "row-6": "left", "row-8": "success"}
    }
    told = [part["text"] for one in seen[1][1] if one["role"] == "tool" for part in one["content"]]
    assert told == ["chart 101", "chart 100"]
    assert [one["content"] for one in seen[3][-1] if one["role"] in ("user", "assistant")][-2:] == [
        "So be it.",
        "Thanks.",
    ]
    assert (
        sum(part["type"] == "image_url" for one in seen[3][2] if one["role"] == "tool" for part in one["content"]) == 2
    )
    left = {name: line["left"] for name, line in lines.items() if line["left"]}
    assert {name: (one["step"], one["turn"], one["how"]) for name, one in left.items()} == {
        "row-5": (1, 2, "no_call"),
        "row-6": (3, 6, "wrong_value"),
    }
    assert left["row-6"]["errors"][0]["got"] == 7
    assert [lines[name]["first_wrong_step"] for name in ("row-5", "row-6")] == [1, 3]
    assert len(lines["row-6"]["row"]["messages"]) == 5, "up to where it left"
    assert report_of(out)["left"] == {"by_how": {"no_call": 1, "wrong_value": 1}, "by_step": {"1": 1, "3": 1}}
    assert report_of(out)["kept"] == 3


# ---- a model here ----------------------------------------------------------------------------------------------------


@pytest.fixture
def scripted(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of this process writes what a step of a task calls for, token by token, whatever its logits say."""
    tokenizer = load_encoder(model, ShardConfig()).tokenizer

    def numbers(_: Sampling, key: str, sample: int) -> Any:
        name, step = key.split()[1], int(key.split()[3])
        text = "Here is the chart.<turn|>"
        if name == "task-1" and sample == 1:
            text = "<|tool_call>call:plot{n:<tool_call|><|tool_response>"
        elif step == 1:
            text = "<|tool_call>call:plot{n:" + str(sample + 3) + "}<tool_call|><|tool_response>"
        return iter(tokenizer(text, add_special_tokens=False)["input_ids"])

    monkeypatch.setattr(Sampling, "numbers", numbers)
    monkeypatch.setattr(Sampling, "pick", lambda _, logits, rows: [next(one) for one in rows])


def test_how_many_runs_are_at_work_and_an_earlier_end_change_nothing(
    act: Act, model: str, scripted: None, tmp_path: Path
) -> None:
    tasks = [task(number, tools=TOOLS if number else []) for number in range(3)]
    options = ["--model", model, *FUNCTIONS, "--declare", "rows", "--num-runs", 2, "--temperature", 1]
    kept = tmp_path / "kept.jsonl"
    alone = act("alone", tasks, *options, "--per-device-eval-batch-size", 1, "--keep", kept)
    lines = lines_of(alone)
    assert [line["outcome"] for line in lines] == [*["success"] * 3, "malformed", *["success"] * 2]
    encoder = load_encoder(model, ShardConfig())
    rows = [parse_row(one, where, ShardConfig()) for where, one in read_rows([kept])]
    points = [prompt for one in rows for prompt in encoder.prompts(one)]
    steps = [step for line in lines if line["outcome"] == "success" for step in with_repeats(line["steps"])]
    assert [step["prompt_ids"] for step in steps] == [point.input_ids for point in points]
    assert [step["num_images"] for step in steps] == [len(point.images) for point in points] == [0, 1] * 5
    for step in steps:
        assert encoder.tokenizer.decode(step["completion_ids"]) == step["output"]
    again = tmp_path / "again"
    again.mkdir()
    (again / "run.json").write_bytes((alone / "run.json").read_bytes())
    whole = (alone / "runs.jsonl").read_bytes().splitlines(keepends=True)
    (again / ".runs-4.jsonl").write_bytes(b"".join(whole[:3]) + whole[3][:-9])
    (tmp_path / "again.jsonl").write_bytes((tmp_path / "alone.jsonl").read_bytes())
    act("again", tasks, *options)
    assert (again / "runs.jsonl").read_bytes() == (alone / "runs.jsonl").read_bytes()
    assert report_of(again)["times"]["ranks"][0]["runs"] == 3
    assert {path.name for path in again.iterdir()} == {"run.json", "runs.jsonl", "report.json"}


def test_what_does_not_go_together_is_refused_by_name(act: Act, model: str, capsys: Any) -> None:
    here: list[object] = ["--model", model]
    live = [*here, *FUNCTIONS]
    cases: list[tuple[list[object], str]] = [
        (here, "Name what it may call by --tools"),
        ([*here, "--replay", "--check", "act_tools:check"], "--replay runs no functions"),
        ([*here, "--replay"], "task-0 has no answers to replay"),
        ([*here, "--tools", "act_tools:TOOLS", "--keep", "kept.jsonl"], "name a checker by --check"),
        ([*live, "--num-runs", 2], "with a temperature of 0 all 2 would be the same"),
        ([*live, "--declare", "rows", "--setup", "act_tools:no"], "--setup act_tools:no cannot be loaded"),
        ([*here, "--tools", "tools.json"], "--tools tools.json names a file, and calls are run by functions"),
        ([*live, "--concurrency", 3], "--concurrency is for a server"),
    ]
    for options, told in cases:
        act("out", [task(0), task(1)], *options, code=2)
        assert told in capsys.readouterr().err
    for keep in ("out/kept/kept.jsonl", "new/deep/kept.jsonl"):
        act("out", [task(0), task(0)], *live, "--declare", "rows", "--keep", keep, code=2)
        assert "tasks 1 and 2 are both called task-0" in capsys.readouterr().err
        assert not any(Path(name).exists() for name in ("out", "new")), "what was begun is gone"


def test_a_task_of_any_layout_may_end_with_the_words_of_its_user(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Draw 1."}]
    given: list[dict[str, Any]] = [
        {"messages": said},
        {"messages": json.dumps(said)},
        {"conversations": said},
        {"conversations": [{"from": "human", "value": "Draw 1."}]},
    ]
    tasks = list(read_tasks(write_rows(tmp_path / "tasks.jsonl", given), None, ActConfig()))
    assert [(dict(task.row), task.has_gold) for task in tasks] == [(one, False) for one in given]
    assert all(task.given(0, task.length) == said for task in tasks)


def test_kept_rows_take_the_place_of_nothing_else(act: Act, tmp_path: Path, capsys: Any) -> None:
    out, others, kept = tmp_path / "out", tmp_path / "others.jsonl", tmp_path / "new/kept.jsonl"
    others.write_text("{}\n")
    with standing_in(agent) as server:
        words = ("--server", server.url, *FUNCTIONS, "--keep")
        for name in (out, out / "runs.jsonl", out / "report.json", out / "run.json"):
            act("out", [task(0)], *words, name, code=2)
            assert "is --out, or a file that it gets" in capsys.readouterr().err
        assert not out.exists(), "before a run was done"
        act("out", [task(0)], *words, kept)
        (out / "report.json").unlink()  # as a kill leaves it, just before the end
        (out / ".runs-0.jsonl").write_bytes((out / "runs.jsonl").read_bytes())
        act("out", [task(0)], *words, others, code=2)
        assert f"{others} exists already" in capsys.readouterr().err
        act("out", [task(0)], *words, kept)
    assert others.read_text() == "{}\n"
    assert [one["id"].rpartition("-")[0] for one in read_jsonl(kept)] == ["task-0/run-1"]


def test_a_run_that_cannot_be_judged_is_told_and_the_others_are_kept(act: Act, capsys: Any) -> None:
    tasks = [task(0), {**task(1), "id": "odd"}, task(13)]
    with standing_in(agent) as server:
        options = ["--server", server.url, "--tools", "act_tools:TOOLS", "--check", "act_tools:check"]
        out = act("out", tasks, *options, "--declare", "rows", code=2)
        assert "odd run 1: the checker cannot judge it: KeyError: 'expected'" in capsys.readouterr().err
        assert sum(part.read_bytes().count(b"\n") for part in out.glob(".runs-*")) == 2


@long
@pytest.mark.parametrize("launch", ["cpu_ddp", "cpu_zero3"])
def test_any_number_of_ranks_gives_the_same(act: Act, model: str, tmp_path: Path, launch: str) -> None:
    """Three tasks on two ranks, one of which has nothing to do at the end; in ZeRO-3 it takes part all the same."""
    options = ["--model", model, "--replay", "--num-runs", 3, "--temperature", 1, "--max-new-tokens", 5]
    alone = act("alone", [row(number) for number in range(3)], *options)
    words = ["act", "--data", tmp_path / "alone.jsonl", "--out", tmp_path / "together", *options]
    gemma_dist(*words, launch=launch)
    assert (tmp_path / "together/runs.jsonl").read_bytes() == (alone / "runs.jsonl").read_bytes()
    assert report_of(tmp_path / "together")["times"]["world_size"] == 2
    assert report_of(tmp_path / "together")["metrics"] == report_of(alone)["metrics"]
