"""The report of scored lines: what hangs together (trajectories, pairs, categories), slices, and one page to read."""

import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from gemma_dist.evaluate.decision import ScoredDecision
from gemma_dist.evaluate.markdown import report_page
from gemma_dist.evaluate.report import Report, make_report
from gemma_dist.evaluate.runs import where_to_look
from gemma_dist.evaluate.score import FAILURES
from tests.support.scoring import expecting, line, reading

TOOLS = [{"type": "function", "function": {"name": name}} for name in "fg"]
F: Any = {"name": "f", "arguments": {"a": 1}}
G: Any = {"name": "g", "arguments": {}}
HEADER = {"model": "m", "adapter": None, "data": "d.jsonl", "settings": {"images": "as_is"}, "times": {}}


def report(*lines: ScoredDecision) -> Report:
    return make_report(HEADER, lines)


def point(trajectory: int, turn: int, right: bool, **keys: Any) -> ScoredDecision:
    """A decision point where gold calls f."""
    output = reading(F) if right else reading(content="No.")
    return line(trajectory, turn, expecting([F]), output, TOOLS, **keys)


def trajectory(number: int, *right: bool, **keys: Any) -> list[ScoredDecision]:
    return [point(number, 2 * place + 2, ok, **keys) for place, ok in enumerate(right)]


def test_survival_is_that_of_kaplan_and_meier() -> None:
    """Of four, one fails at its first point; of the three with a second one fails; the one with a third survives."""
    fates = [(False, True), (True, False), (True, True, True), (True, True)]
    found = report(*(each for number, right in enumerate(fates, start=1) for each in trajectory(number, *right)))
    assert [(row["step"], row["at_risk"], row["failed"]) for row in found["survival"]] == [
        (1, 4, 1),
        (2, 3, 1),
        (3, 1, 0),
    ]
    assert [row["survival"] for row in found["survival"]] == pytest.approx([0.75, 0.5, 0.5], abs=1e-6)
    metrics = found["metrics"]
    assert (metrics["step_acc"]["numerator"], metrics["step_acc"]["denominator"]) == (7, 9)
    assert (metrics["trajectory_exact"]["numerator"], metrics["trajectory_exact"]["denominator"]) == (2, 4)
    assert report(*trajectory(1, True))["metrics"]["step_acc"]["value"] is None, "of several steps alone"


def test_a_pair_is_right_when_both_are() -> None:
    pairs = [("one", True), ("one", True), ("two", True), ("two", False), ("alone", True), ("", True)]
    lines = [point(number, 2, right, pair=pair) for number, (pair, right) in enumerate(pairs, start=1)]
    metric = report(*lines)["metrics"]["image_pair_acc"]
    assert (metric["numerator"], metric["denominator"]) == (1, 2)


def test_a_reader_of_text_alone_gets_no_pair_right() -> None:
    """The same words, two images, other answers: whoever gives the same call both times is right once."""
    lines = []
    for number in range(20):
        gold = [{"name": "f", "arguments": {"a": answer}} for answer in (1, 2)]
        for member, expected in enumerate(gold):
            lines.append(line(2 * number + member, 2, expecting([expected]), reading(F), TOOLS, pair=str(number)))
    metrics = report(*lines)["metrics"]
    assert (metrics["overall"]["value"], metrics["image_pair_acc"]["value"]) == (0.5, 0.0)


@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_pass_at_k_counts_choices(num_samples: int) -> None:
    fates = [[(3 * number + sample) % 4 == 0 for sample in range(num_samples)] for number in range(4)]
    lines = [
        point(number + 1, 2, right, sample=sample)
        for number, answers in enumerate(fates)
        for sample, right in enumerate(answers)
    ]
    found = report(*lines)
    assert (found["num_decision_points"], found["num_samples"]) == (4, num_samples)
    names = [name for name in found["metrics"] if name.startswith("pass")]
    assert names == [f"pass{sign}{k}" for k in (2, 4, 5) if k <= num_samples for sign in "@^"]
    for name in names:
        metric, judge, k = found["metrics"][name], (any if "@" in name else all), int(name[5:])
        chosen = [judge(choice) for answers in fates for choice in combinations(answers, k)]
        assert (metric["numerator"], metric["denominator"]) == (sum(chosen), len(chosen)), name
        low, high = metric["cluster_low"], metric["cluster_high"]
        assert low is not None
        assert high is not None
        assert low <= sum(chosen) / len(chosen) <= high


def test_choices_of_many_answers_do_not_overflow() -> None:
    """64 over 32 ways, of each of 20 points, are more than 8 bytes count."""
    lines = [point(number, 2, sample % 2 == 0, sample=sample) for number in range(1, 21) for sample in range(64)]
    metric = report(*lines)["metrics"]["pass^32"]
    assert metric["denominator"] > 2**63
    assert metric["numerator"] == 20


def test_each_answer_makes_a_trajectory_of_its_own() -> None:
    """Two answers to both points of a trajectory: the first is right at both, the second fails at the first."""
    lines = [*trajectory(1, True, True, sample=0), *trajectory(1, False, True, sample=1)]
    found = report(*lines)
    assert (found["num_trajectories"], found["num_decision_points"]) == (1, 2)
    metrics = found["metrics"]
    assert (metrics["trajectory_exact"]["numerator"], metrics["trajectory_exact"]["denominator"]) == (1, 2)
    assert [(row["at_risk"], row["failed"]) for row in found["survival"]] == [(2, 1), (1, 0)]
    assert {value: part["overall"]["denominator"] for value, part in found["slices"]["turn"].items()} == {
        "1": 2,
        "2": 2,
    }
    page = report_page(found)
    assert "2 answers to each" in page
    assert "| pass@2 | 100.0% |" in page


def test_categories_weigh_the_same_in_the_macro_average() -> None:
    lines = [point(1, 2, False, category="small"), *(point(2 + place, 2, True, category="big") for place in range(9))]
    found = report(*lines)
    assert found["metrics"]["overall"]["value"] == 0.9
    strict = found["overall_by_category"]["strict"]
    assert strict is not None
    assert (strict["value"], strict["num_categories"]) == (0.5, 2)
    assert report(point(1, 2, True))["overall_by_category"]["strict"] is None


def test_slices_part_the_points() -> None:
    lines = [
        *trajectory(1, True, False, category="a", num_images=1, prompt_tokens=700),
        line(2, 2, expecting([F, G]), reading(F, G), TOOLS, category="b"),
        line(3, 2, expecting([], "Hi."), reading(content="Hi."), [], category="b"),
    ]
    slices = report(*lines)["slices"]
    counts = {name: {value: m["overall"]["denominator"] for value, m in s.items()} for name, s in slices.items()}
    assert counts == {
        "images": {"with": 2, "without": 2},
        "turn": {"1": 3, "2": 1},
        "tools_offered": {"0": 1, "2-4": 3},
        "gold_calls": {"0": 1, "1": 2, "2": 1},
        "prompt_tokens": {"0-511": 2, "512-1023": 2},
        "category": {"a": 2, "b": 2},
        "tool": {"(no call)": 1, "f": 3, "g": 1},
    }
    assert slices["tool"]["f"]["overall"]["numerator"] == 2
    assert "trajectory_exact" not in slices["images"]["with"], "a slice holds parts of trajectories"


def test_failures_and_confusions_add_up() -> None:
    lines = [
        point(1, 2, True),
        line(2, 2, expecting([F]), reading(G), TOOLS),
        line(3, 2, expecting([F]), reading({"name": "h", "arguments": {}}), TOOLS),
        line(4, 2, expecting([F]), reading({"name": "f", "arguments": {"a": "1"}}), TOOLS),
        line(5, 2, expecting([], "Hi."), reading(G), TOOLS),
    ]
    found = report(*lines)
    assert found["failures"] == {"unwanted_call": 1, "not_offered": 1, "wrong_tool": 1, "wrong_type": 1}
    assert sum(found["failures"].values()) == sum(not each["score"]["right"] for each in lines)
    assert set(found["failures"]) <= set(FAILURES)
    assert {kind: count for kind, count in found["arg_errors"].items() if count} == {"wrong_type": 1}
    assert found["confusion"] == {"(no call)": {"g": 1}, "f": {"(not offered)": 1, "f": 2, "g": 1}}
    assert found["call_decision"] == {"call": {"call": 4, "none": 0}, "none": {"call": 1, "none": 0}}


def test_the_order_of_lines_changes_nothing() -> None:
    lines = [
        each for number in range(1, 9) for each in trajectory(number, number % 2 > 0, True, category=str(number % 3))
    ]
    found = report(*lines)
    random.Random(1).shuffle(lines)
    assert report(*lines) == found


def test_the_page_shows_what_matters_and_no_markup_of_others() -> None:
    hostile = 'x|y<script>`*"'
    lines = [
        *trajectory(1, True, False),
        line(2, 2, expecting([{"name": hostile, "arguments": {}}]), reading(G), [], category="a|b"),
    ]
    page = report_page(report(*lines))
    assert "| overall | 33.3% |" in page
    for title in ("Failures", "Calls", "Survival", "overall by tool", "All metrics"):
        assert f"## {title}\n" in page
    assert "<script" not in page
    table = [row for row in page.splitlines() if row.startswith("|")]
    assert all(row.replace("\\|", "").count("|") in (3, 4, 5, 6, 7) for row in table)


def test_an_evaluation_ends_with_the_figure_to_read_first_and_where_the_page_is() -> None:
    found = report(*trajectory(1, True, False, True, True))
    first, last = where_to_look(found, Path("out"))
    assert first.startswith("read first: overall 75.0%, 3 of 4 decisions are right")
    assert "out/report.html" in last
    (only,) = where_to_look(report(), Path("out"))
    assert only == last, "of no decision there is no figure"
