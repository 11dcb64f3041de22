"""Two runs side by side: intervals against closed forms, tests against tables, and what a comparison refuses."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_dist.__main__ import main
from gemma_dist.config import EvaluateConfig
from gemma_dist.errors import DataError
from gemma_dist.evaluate.compare import compare
from gemma_dist.evaluate.decision import ScoredDecision
from gemma_dist.evaluate.intervals import holm, mcnemar, middle_95, resample, smallest_difference, wilson
from gemma_dist.evaluate.runs import write_results
from gemma_dist.evaluate.tally import add_up, measure
from tests.support.scoring import expecting, line, reading

F: Any = {"name": "f", "arguments": {}}


def lines(right: list[bool], points_each: int = 1, **keys: Any) -> list[ScoredDecision]:
    """Decision points that are right or wrong; so many of each trajectory."""
    return [
        line(place // points_each + 1, 2 * (place % points_each) + 2, expecting([F]), reading(*([F] * ok)), **keys)
        for place, ok in enumerate(right)
    ]


def write(out: Path, run: list[ScoredDecision], **settings: Any) -> Path:
    header: dict[str, Any] = {"model": "m", "adapter": None, "data": "d.jsonl", "times": {}}
    header["settings"] = EvaluateConfig(**settings).model_dump(mode="json")
    write_results(out, header, run, {"": []})
    return out


def test_wilson() -> None:
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@pytest.mark.parametrize(("num_clusters", "points_each"), [(400, 1), (100, 4)])
def test_the_bootstrap_has_the_standard_error_of_its_clusters(num_clusters: int, points_each: int) -> None:
    """Points of a cluster are all alike here, so that its size buys nothing: sqrt(p (1 - p) / clusters)."""
    right = np.repeat(np.arange(num_clusters) % 4 == 0, points_each).tolist()
    metric = measure(add_up(lines(right, points_each)))["overall"]
    low, high = metric["cluster_low"], metric["cluster_high"]
    assert low is not None
    assert high is not None
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 * 0.75 / num_clusters), rel=0.15)
    assert low < 0.25 < high


def test_where_nothing_is_right_each_cluster_is_one_trial() -> None:
    """Twelve points of three trajectories, all wrong: every draw says 0, which is not the same as being sure of it."""
    metric = measure(add_up(lines([False] * 12, 4)))["overall"]
    assert (metric["cluster_low"], metric["cluster_high"]) == wilson(0, 3)
    assert (metric["low"], metric["high"]) == wilson(0, 12)


def test_draws_are_the_same_each_time_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = np.arange(12).reshape(6, 2)
    first, second = resample(sums, sums + 1)
    assert np.array_equal(second - first, np.full_like(first, 6)), "both by the same draws"
    assert np.array_equal(resample(sums)[0], first)
    assert middle_95(np.array([np.nan, np.nan])) is None
    monkeypatch.setattr("gemma_dist.evaluate.intervals.DRAWN_AT_ONCE", 60)
    assert len(resample(sums)[0]) == len(first)


@pytest.mark.parametrize(
    ("fixed", "broken", "p_value"),
    [(0, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (8, 2, 0.109375), (2, 8, 0.109375), (5, 5, 1.0), (15, 5, 0.0413895)],
)
def test_mcnemar_against_the_table_of_the_binomial(fixed: int, broken: int, p_value: float) -> None:
    assert mcnemar(fixed, broken) == pytest.approx(p_value, abs=1e-6)


def test_mcnemar_of_many_points_is_finite() -> None:
    assert 0 < mcnemar(3000, 2800) < 0.01
    assert mcnemar(9000, 0) == pytest.approx(0.0, abs=1e-300)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_the_smallest_difference_is_at_least_what_any_test_could_see() -> None:
    assert smallest_difference(0.0, 100) == pytest.approx(0.06)
    assert smallest_difference(0.05, 1000) == pytest.approx(0.14, abs=1e-3)


def test_a_comparison_counts_what_was_fixed_and_broken(tmp_path: Path) -> None:
    before = [True] * 10 + [False] * 20
    after = [True] * 8 + [False] * 2 + [True] * 12 + [False] * 8
    compared = compare(write(tmp_path / "a", lines(before)), write(tmp_path / "b", lines(after)))
    overall = compared["overall"]
    assert (overall["fixed"], overall["broken"], overall["difference"]) == (12, 2, pytest.approx(10 / 30))
    assert overall["p_value"] == pytest.approx(0.0129395, abs=1e-6)
    assert overall["low"] is not None
    assert 0 < overall["low"] < 10 / 30
    assert [point["id"] for point in compared["broken"]] == ["row-9", "row-10"]
    assert {(point["before"], point["after"]) for point in compared["broken"]} == {("right", "silent")}
    assert len(compared["fixed"]) == 12
    same = compare(tmp_path / "a", tmp_path / "a")
    assert (same["overall"]["difference"], same["overall"]["low"], same["overall"]["high"]) == (0, 0, 0)
    assert same["smallest_difference"] == pytest.approx(6 / 30)


def test_slices_are_adjusted_for_their_number(tmp_path: Path) -> None:
    """30 points in two categories; only the first changed."""
    marks = [{"category": "one" if place < 10 else "two"} for place in range(30)]
    runs = []
    for name, right in (("a", [False] * 30), ("b", [True] * 10 + [False] * 20)):
        runs.append(write(tmp_path / name, [each | mark for each, mark in zip(lines(right), marks, strict=True)]))  # type: ignore[misc]
    found = compare(*runs)["slices"]["category"]
    assert found["one"]["p_value"] == pytest.approx(2 / 2**10)
    assert found["one"]["p_holm"] == pytest.approx(2 * 2 / 2**10)
    assert (found["two"]["p_value"], found["two"]["p_holm"]) == (1, 1)


def test_images_gain_what_a_blinded_run_loses(tmp_path: Path) -> None:
    seen, blind = lines([True] * 8, num_images=1), lines([True] * 2 + [False] * 6, num_images=1)
    words = [line(9, 2, expecting([F]), reading()), line(9, 2, expecting([F]), reading(F))]
    write(tmp_path / "seen", [*seen, words[0]])
    write(tmp_path / "blind", [*blind, words[1]], images="swapped")
    for order in (("seen", "blind"), ("blind", "seen")):
        gain = compare(*(tmp_path / name for name in order))["image_gain"]
        assert gain is not None
        assert (gain["value"], gain["num_points"], gain["without"]) == (0.75, 8, "swapped"), "not of the one without"
    assert compare(tmp_path / "seen", tmp_path / "seen")["image_gain"] is None


def test_other_points_and_other_gold_are_refused_by_name(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", lines([True] * 9))
    part = write(tmp_path / "part", lines([True] * 2))
    with pytest.raises(DataError, match=r"whole has 7 decision points that .*part has not: row-3 \(turn 2\).* 2 more"):
        compare(part, whole)
    other = [line(1, 2, expecting([]), reading(content="Hi.")), *lines([True] * 9)[1:]]
    with pytest.raises(DataError, match=r"expect other answers at 1 decision points: row-1 \(turn 2\)"):
        compare(whole, write(tmp_path / "gold", other))


def test_several_answers_are_compared_by_their_numbers(tmp_path: Path, capsys: Any) -> None:
    """Four points with two answers each: of the first the second answer gets right, of the others nothing changes."""
    before = [line | {"sample": sample} for sample in (0, 1) for line in lines([False, True, True, False])]
    after = [line | {"sample": sample} for sample in (0, 1) for line in lines([sample == 1, True, True, False])]
    a, b = write(tmp_path / "a", before), write(tmp_path / "b", after[::-1])
    compared = compare(a, b)
    assert (compared["num_decision_points"], compared["num_samples"]) == (4, 2)
    assert (compared["overall"]["fixed"], compared["overall"]["broken"]) == (1, 0)
    assert [(point["id"], point["sample"]) for point in compared["fixed"]] == [("row-1", 1)]
    assert (compared["metrics"]["pass@2"]["before"], compared["metrics"]["pass@2"]["after"]) == (0.5, 0.75)
    assert compared["metrics"]["pass^2"]["difference"] == 0
    assert main(["compare", str(a), str(b), "--fail-below", "pass^2=0.6"]) == 3
    said = capsys.readouterr()
    assert "pass^2 is 0.5, below 0.6" in said.err
    assert "| `row-1` | 2, answer 1 | silent | right |" in said.out
    one = write(tmp_path / "one", before[:4])
    with pytest.raises(DataError, match=r"a holds 2 answers to each decision point, .*one 1; evaluate both"):
        compare(a, one)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 0, ""),
        (["--fail-if-worse"], 3, "overall is worse: -0.6667"),
        (["--fail-below", "overall=0.5", "--fail-below", "call_exact=0.1"], 3, "overall is 0.3333333333, below 0.5"),
        (["--fail-below", "overall=0.33"], 0, ""),
        (["--fail-below", "overal=0.5"], 2, "--fail-below overal=0.5: write METRIC=X"),
        (["--fail-below", "abstain_acc=0.5"], 2, "one of parse_ok"),
    ],
)  # fmt: skip
def test_the_exit_code_of_compare(tmp_path: Path, capsys: Any, options: list[str], code: int, words: str) -> None:
    before, after = write(tmp_path / "a", lines([True] * 12)), write(tmp_path / "b", lines([True] * 4 + [False] * 8))
    assert main(["compare", str(before), str(after), "--out", str(tmp_path / "out"), *options]) == code
    said = capsys.readouterr()
    assert words in said.err
    if code != 2:
        assert "| overall | 100.0% | 33.3% | -66.7 |" in said.out
        assert json.loads((tmp_path / "out" / "comparison.json").read_text())["overall"]["broken"] == 8
        assert (tmp_path / "out" / "comparison.md").read_text() == said.out
    if not options:
        assert main(["compare", str(after), str(before), "--fail-if-worse", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["overall"]["fixed"] == 8


def test_a_run_that_did_not_end_is_none(tmp_path: Path, capsys: Any) -> None:
    run = write(tmp_path / "a", lines([True] * 3))
    (tmp_path / "b").mkdir()
    assert main(["compare", str(run), str(tmp_path / "b")]) == 2
    assert "holds no report.json: the run did not end" in capsys.readouterr().err
    (run / "samples.jsonl").write_text((run / "samples.jsonl").read_text().split("\n")[0] + "\n")
    assert main(["score", "--from", str(run), "--out", str(tmp_path / "c")]) == 2
    assert "holds 1 answers, report.json says 3" in capsys.readouterr().err
