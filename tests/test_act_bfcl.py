"""BFCL's multi-turn tasks through `act`, where bfcl-eval is installed: what succeeds is what its own checker says."""

import ast
import contextlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gemma_dist.__main__ import main
from gemma_dist.logs import read_jsonl
from tests.support.corpus import write_rows
from tests.support.ranks import long
from tests.support.standin import Asked, Reply, called, message, standing_in

EXAMPLES = Path(__file__).parents[1] / "examples"
CATEGORIES = ("base", "miss_func", "miss_param", "long_context")
OPTIONS = ["--tools", "bfcl:TOOLS", "--setup", "bfcl:setup", "--check", "bfcl:check", "--declare", "rows"]
Turns = list[list[list[str]]]  # of each turn, of each answer, its calls as Python


def require_package() -> None:
    if importlib.util.find_spec("bfcl_eval") is None:
        pytest.skip("bfcl-eval is not installed; examples/bfcl.py says how to")


def tasks_of(category: str) -> list[dict[str, Any]]:
    """As `examples/bfcl.py` writes them."""
    words = [sys.executable, "bfcl.py", f"multi_turn_{category}"]
    written = subprocess.run(words, cwd=EXAMPLES, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in written.splitlines()]


def gold(task: dict[str, Any], number: int) -> Turns:
    """The right calls: those of a turn at once, or one after the other where that takes no more answers than may be."""
    at_once = [bool(calls) and (number % 2 == 1 or len(calls) > 20) for calls in task["ground_truth"]]
    return [
        [calls] if together else [[call] for call in calls]
        for calls, together in zip(task["ground_truth"], at_once, strict=True)
    ]


def damaged(task: dict[str, Any], number: int) -> Turns:
    """The last call is missing, or a turn, or the first one is made twice, or has another argument; or nothing."""
    turns = gold(task, number)
    last = max(place for place, steps in enumerate(turns) if steps)
    if number % 5 == 0:
        turns[last][-1] = turns[last][-1][:-1]
        turns[last] = [step for step in turns[last] if step]
    elif number % 5 == 1:
        turns[last] = []
    elif number % 5 == 2:
        first = next(place for place, steps in enumerate(turns) if steps)
        turns[first] = [turns[first][0], *turns[first]]
    elif number % 5 == 3:
        turns[last][-1][-1] = turns[last][-1][-1].replace("='", "='x").replace("=1", "=2")
    return turns


def as_calls(task: dict[str, Any], step: Sequence[str]) -> list[Any]:
    """Calls as a server tells them: by the names of their arguments."""
    brought = [tool for one in task["messages"] for tool in one.get("tools", ())]
    declared = {tool["function"]["name"]: tool["function"]["parameters"] for tool in [*task["tools"], *brought]}
    calls = []
    for source in step:
        call: Any = ast.parse(source, mode="eval").body
        arguments = dict(zip(declared[call.func.id]["properties"], map(ast.literal_eval, call.args), strict=False))
        arguments |= {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        calls.append(called(call.func.id, json.dumps(arguments)))
    return calls


def act(folder: Path, tasks: Sequence[dict[str, Any]], answers: dict[str, Turns]) -> dict[str, bool]:
    """Which tasks succeed for a model that gives these answers."""
    of_words = {task["messages"][0]["content"]: task for task in tasks}
    assert len(of_words) == len(tasks)

    def reply(asked: Asked) -> Reply:
        said = asked.body["messages"]
        task = of_words[said[0]["content"]]
        turn = sum(one["role"] == "user" for one in said) - 1
        start = max(place for place, one in enumerate(said) if one["role"] == "user")
        step = sum(one["role"] == "assistant" for one in said[start:])
        steps = answers[task["id"]][turn]
        if step == len(steps):
            return Reply(message("That is all."))
        return Reply(message(None, as_calls(task, steps[step]), "tool_calls"))

    data = write_rows(folder / "tasks.jsonl", list(tasks))
    with standing_in(reply) as server, contextlib.chdir(EXAMPLES):
        words = ["act", "--data", data, "--out", folder / "out", "--server", server.url, "--unfit-calls", "run"]
        assert main([str(word) for word in [*words, *OPTIONS, "--max-steps", 200]]) == 0
    return {line["task"]: line["outcome"] == "success" for line in read_jsonl(folder / "out/runs.jsonl")}


@pytest.mark.parametrize("each", [3, pytest.param(200, marks=long)])
@pytest.mark.parametrize("answers", [gold, damaged])
def test_the_score_is_that_of_its_own_checker(
    tmp_path: Path, answers: Callable[[dict[str, Any], int], Turns], each: int
) -> None:
    require_package()
    checker = importlib.import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker").multi_turn_checker
    found, expected = dict[str, bool](), dict[str, bool]()
    for place, category in enumerate(CATEGORIES):
        tasks = tasks_of(category)[:: 200 // each]
        tasks = list({task["messages"][0]["content"]: task for task in tasks}.values())
        given = {task["id"]: answers(task, number) for number, task in enumerate(tasks, start=place)}
        (tmp_path / category).mkdir()
        found |= act(tmp_path / category, tasks, given)
        for task in tasks:
            name = f"{answers.__name__}_{each}"  # it keeps its environments by that
            right = checker(given[task["id"]], task["ground_truth"], task, f"multi_turn_{category}", name)
            expected[task["id"]] = right["valid"]
    assert len(found) > 3 * each
    assert found == expected
    assert set(found.values()) == ({True} if answers is gold else {True, False})


def test_what_a_model_writes_is_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor evaluates calls as Python: only names of its functions and of arguments get there."""
    require_package()
    monkeypatch.syspath_prepend(EXAMPLES)
    bfcl = importlib.import_module("bfcl")
    row = {"involved_classes": ["MathAPI"]}
    assert bfcl.as_python(row, "add", {"a": 1, "b": "1); print('x'"}) == "add(a=1,b=\"1); print('x'\")"
    assert bfcl.as_python(row, "add", {"a=print('x'),b": 1}) == bfcl.NO_FUNCTION
    assert bfcl.as_python(row, "open", {"file": "x", "mode": "w"}) == bfcl.NO_FUNCTION
    assert bfcl.as_python(row, "cd", {"folder": "x"}) == bfcl.NO_FUNCTION, "a function of another class"
