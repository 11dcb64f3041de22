"""BFCL's rows as they are published: questions and answers in files of their own, and what is not taken."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from gemma_dist.config import EvaluateConfig, ShardConfig
from gemma_dist.data.read import read_output
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.errors import DataError
from gemma_dist.evaluate.line import gold_of
from gemma_dist.evaluate.score import Score, score_decision
from gemma_dist.shards.reader import load_trajectories

PARAMETERS = {
    "type": "dict",
    "properties": {"base": {"type": "integer"}, "unit": {"type": "string"}},
    "required": ["base"],
}
FUNCTION = {"name": "math.area", "description": "Area.", "parameters": PARAMETERS}
QUESTION = [[{"role": "user", "content": "Area of 10?"}]]
TRUTH = [{"math.area": {"base": [10], "unit": ["units", ""]}}]


def row(row_id: str = "simple_python_0", **keys: Any) -> dict[str, Any]:
    return {"id": row_id, "question": QUESTION, "function": [FUNCTION], **keys}


def parse(raw: Any) -> Trajectory:
    return parse_row(raw, "bfcl.json:1", EvaluateConfig())


def score(case: Trajectory, output: str) -> Score:
    return score_decision(read_output(output), gold_of(case, case.messages[-1:]), case.tools)


def test_the_answers_are_found_beside_the_questions(tmp_path: Path) -> None:
    name = "BFCL_v4_simple_python.json"
    (tmp_path / "possible_answer").mkdir()
    rows = [row(f"simple_python_{number}") for number in range(3)]
    (tmp_path / name).write_text("".join(json.dumps(each) + "\n" for each in rows))
    answers = [{"id": each["id"], "ground_truth": TRUTH} for each in rows[::-1]]
    (tmp_path / "possible_answer" / name).write_text("".join(json.dumps(each) + "\n" for each in answers))
    cases = list(load_trajectories(tmp_path / name, EvaluateConfig()))
    assert [case.id for case in cases] == ["simple_python_0", "simple_python_1", "simple_python_2"]
    assert {case.category for case in cases} == {"simple_python"}
    assert cases[0].tools[0]["function"]["parameters"]["type"] == "object"
    for unit in ("", ',unit:<|"|>units<|"|>'):
        judged = score(cases[0], f"<|tool_call>call:math.area{{base:10{unit}}}<tool_call|>")
        assert (judged["right"], judged["bfcl"]["right"]) == (True, True)
    assert (
        score(cases[0], '<|tool_call>call:math.area{base:10,unit:<|"|>m<|"|>}<tool_call|>')["failure"] == "wrong_value"
    )


def test_rows_without_answers_expect_no_call_or_any() -> None:
    none, some = parse(row("live_irrelevance_3-0-0")), parse(row("live_relevance_3-0-0"))
    assert (none.category, some.category) == ("live_irrelevance", "live_relevance")
    call = "<|tool_call>call:math.area{}<tool_call|>"
    assert [score(case, call)["right"] for case in (none, some)] == [False, True]
    assert [score(case, "I cannot.")["right"] for case in (none, some)] == [True, False]
    assert parse(row("live_irrelevance_4-0-0", function=[])).tools == []


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (row(), "without `ground_truth`; put the file of its answers beside it, in possible_answer/"),
        (row("simple_java_0", ground_truth=TRUTH), "BFCL's category 'simple_java'"),
        (row("multi_turn_base_0"), "BFCL's category 'multi_turn_base'"),
        (row(question=QUESTION * 2, ground_truth=TRUTH), "`question` has 2 turns"),
        (row(ground_truth=[{"f": {}, "g": {}}]), "`ground_truth` holds"),
        (row(ground_truth=[{"math.area": {"base": 10}}]), "`acceptable` gives 10 for 'base'; write a list"),
        (row(ground_truth=[{"area": {}}]), "calls area, which `tools` does not declare"),
    ],
)
def test_what_cannot_be_judged_by_one_answer_is_refused(raw: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(raw)
    assert words in str(caught.value)


def test_training_refuses_them() -> None:
    with pytest.raises(DataError, match="a test case for `evaluate`"):
        parse_row(row(ground_truth=TRUTH), "bfcl.json:1", ShardConfig())


def test_the_published_checker_agrees(capsys: Any) -> None:
    """Where bfcl-eval is installed; `benchmarks/bfcl_rule.py` takes it from any environment."""
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is None or spec.origin is None:
        pytest.skip("bfcl-eval is not installed; benchmarks/bfcl_rule.py says how to compare")
    path = Path(__file__).parents[1] / "benchmarks" / "bfcl_rule.py"
    loaded = importlib.util.spec_from_file_location("bfcl_rule", path)
    assert loaded is not None
    assert loaded.loader is not None
    module: Any = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    module.CATEGORIES = ("live_parallel", "live_parallel_multiple")
    module.main(Path(spec.origin).parents[1])
    total = next(said for said in capsys.readouterr().out.splitlines() if said.startswith("all "))
    assert total.split()[-2:] == ["0", "0"]
