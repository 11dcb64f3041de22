"""The teacher-forced loss of gold's answers: what plain passes give over each prompt with gold behind it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma_dist.__main__ import main
from gemma_dist.config import EvaluateConfig
from gemma_dist.data.encode import Encoder, load_encoder
from gemma_dist.data.encoded import IGNORE_INDEX
from gemma_dist.data.kinds import KINDS
from gemma_dist.evaluate import loss as loss_module
from gemma_dist.evaluate.compare import compare
from gemma_dist.evaluate.compare_page import comparison_page
from gemma_dist.evaluate.decision import KindLoss
from gemma_dist.evaluate.gold_tokens import GoldTokens, gold_tokens
from gemma_dist.evaluate.loss import GoldReader
from gemma_dist.evaluate.loss_report import loss_lines, loss_report, loss_rows
from gemma_dist.model.load import load_for_evaluation
from gemma_dist.shards.reader import load_trajectories
from tests.support.corpus import TOOLS, answer, call, row, write_rows
from tests.test_compare import lines, write

WINDOW = 24  # of sliding layers, which the rows exceed


def _rows() -> list[dict[str, Any]]:
    """Calls with images in their results, and thoughts that later turns no longer show."""
    thought = call(1) | {"reasoning_content": "A chart is wanted, so plot it."}
    said = {"role": "assistant", "content": "Here.", "reasoning_content": "It is drawn."}
    again = [{"role": "user", "content": "And now?"}, call(2), answer(2, image=True), said, *2 * [said]]
    messages = [{"role": "user", "content": "Draw."}, thought, answer(1, image=True), said, *again[:-2]]
    return [row(0, num_calls=2), row(2), {"id": "thoughts", "messages": messages, "tools": TOOLS}]


def _points(encoder: Encoder, folder: Path) -> list[list[GoldTokens]]:
    data = write_rows(folder / "rows.jsonl", _rows())
    found = []
    for trajectory in load_trajectories(data, EvaluateConfig()):
        points = gold_tokens(encoder, trajectory, encoder.prompts(trajectory))
        assert all(points)
        found.append([point for point in points if point])
    return found


@pytest.mark.parametrize("style", ["e4b", "31b", "12b"])
def test_the_loss_is_that_of_a_plain_pass_over_each_prompt_and_answer(
    tiny_model: Callable[..., Path], style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", 60)
    model, encoder = (
        load_for_evaluation(str(tiny_model(style)), None),
        load_encoder(str(tiny_model(style)), EvaluateConfig()),
    )
    model.config.text_config.sliding_window = WINDOW
    points = _points(encoder, tmp_path)
    assert max(len(point.prompt.input_ids) for group in points for point in group) > 2 * 60
    found = list(GoldReader(model, encoder).losses(points))
    assert [point for point, _ in found] == [point for group in points for point in group]
    assert {kind for _, loss in found for kind in loss} == set(KINDS.values())
    for point, loss in found:
        assert loss == _plainly(model, encoder, point)


def _plainly(model: Any, encoder: Encoder, point: GoldTokens) -> dict[str, Any]:
    """By the logits of one pass without a cache."""
    prompt = point.prompt
    ids = [*prompt.input_ids, *point.ids]
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    inputs["mm_token_type_ids"] = torch.tensor([[*prompt.mm_token_type_ids, *[0] * len(point.ids)]])
    inputs |= encoder.pixels(prompt.images) if prompt.images else {}
    with torch.no_grad():
        log_probs = model(**inputs).logits[0].double().log_softmax(-1)
    sums: dict[str, list[Any]] = {}
    for place, (token, kind) in enumerate(zip(point.ids, point.kinds, strict=True), start=len(prompt.input_ids) - 1):
        if kind:
            right = int(log_probs[place].argmax()) == token
            sums.setdefault(KINDS[kind], []).append((-float(log_probs[place, token]), right))
    return {
        kind: {
            "nll": pytest.approx(sum(nll for nll, _ in found), rel=1e-5),
            "tokens": len(found),
            "right": sum(right for _, right in found),
        }
        for kind, found in sums.items()
    }


def test_gold_is_what_training_trains_behind_the_prompt_of_a_server(model: str, tmp_path: Path) -> None:
    """Where nothing is hidden later, all tokens that the whole trajectory trains; else also those of thoughts."""
    encoder = load_encoder(model, EvaluateConfig())
    trajectories = list(load_trajectories(write_rows(tmp_path / "rows.jsonl", _rows()), EvaluateConfig()))
    for trajectory, points in zip(trajectories, _points(encoder, tmp_path), strict=True):
        encoded = encoder.encode(trajectory)
        trained = [token for token in encoded.labels if token != IGNORE_INDEX]
        written = [token for point in points for token, kind in zip(point.ids, point.kinds, strict=True) if kind]
        if trajectory.id != "thoughts":
            assert written == trained
        else:
            assert len(written) > len(trained)
            text = encoder.tokenizer.decode(points[0].ids)
            assert "A chart is wanted, so plot it." in text
            assert text.endswith("<tool_call|><|tool_response>")


def test_rows_without_a_whole_answer_are_counted_and_nothing_else_changes(model: str, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Draw 1, please."}]
    cases: list[dict[str, Any]] = [
        {"messages": messages, "available_tools": TOOLS, "expected_tool": "plot"},
        {"messages": messages, "available_tools": TOOLS, "expected_tool": "*"},
        {"messages": messages, "expected_answer": ["a chart"]},
        {
            "messages": messages,
            "available_tools": TOOLS,
            "expected_calls": [{"name": "plot", "arguments": {"n": [1, 2]}}],
        },
        {"messages": messages, "available_tools": TOOLS, "expected_tool": "plot", "expected_args": {"n": 1}},
        row(1),
    ]
    data = write_rows(tmp_path / "rows.jsonl", cases)
    for name, options in (("with", []), ("without", ["--no-loss"])):
        words = ["evaluate", "--model", model, "--data", str(data), "--out", str(tmp_path / name)]
        assert main([*words, "--max-new-tokens", "2", *options]) == 0
    (report, samples), (bare, bare_samples) = (_read(tmp_path / name) for name in ("with", "without"))
    assert bare["loss"] is None
    assert (report["loss"]["num_points"], report["loss"]["num_others"]) == (3, 4)
    assert [sample.pop("loss") is None for sample in samples] == [True] * 4 + [False] * 3
    assert samples == bare_samples
    assert report | {"loss": None, "settings": bare["settings"]} == bare
    page = (tmp_path / "with/report.md").read_text()
    assert "## Loss of gold's answers at 3 decision points" in page
    assert "## Loss" not in (tmp_path / "without/report.md").read_text()


def _read(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    report = json.loads((out / "report.json").read_text())
    del report["times"]
    return report, [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_losses_are_added_and_divided_once_and_compared_by_trajectory(tmp_path: Path) -> None:
    """Nats and tokens, not means of means; half a nat a token less after, in every trajectory."""
    before, after = lines([True] * 8, 2), lines([True] * 8, 2)
    for number, (one, two) in enumerate(zip(before, after, strict=True)):
        tokens = number + 1
        one["loss"] = {"call": _loss(2.0 * tokens, tokens, 1), "text": _loss(3.0, 1, 0)}
        two["loss"] = {"call": _loss(1.5 * tokens, tokens, 1), "text": _loss(3.0, 1, 0)}
    before[0]["loss"] = after[0]["loss"] = None
    report = loss_report(before)
    assert report is not None
    assert (report["num_points"], report["num_others"]) == (7, 1)
    call_tokens, all_tokens = sum(range(2, 9)), sum(range(2, 9)) + 7
    metrics = report["metrics"]
    assert set(metrics) == {"loss", "loss_call", "loss_text", "token_accuracy"}
    assert metrics["loss_call"]["value"] == 2.0
    assert (metrics["loss_call"]["cluster_low"], metrics["loss_call"]["cluster_high"]) == (2.0, 2.0)
    assert metrics["loss"]["value"] == pytest.approx((2 * call_tokens + 3 * 7) / all_tokens)
    assert metrics["loss"]["denominator"] == all_tokens
    assert metrics["token_accuracy"]["value"] == pytest.approx(7 / all_tokens)
    compared = compare(write(tmp_path / "a", before), write(tmp_path / "b", after))
    changes = compared["loss"]
    assert changes is not None
    assert (changes["loss_call"]["before"], changes["loss_call"]["after"]) == (2.0, 1.5)
    assert (changes["loss_call"]["low"], changes["loss_call"]["high"]) == (-0.5, -0.5)
    low, high = changes["loss"]["low"], changes["loss"]["high"]
    assert low is not None
    assert high is not None
    assert -0.5 < low < changes["loss"]["difference"] < high < 0
    assert "| loss_call | 2.0000 | 1.5000 | -0.5000 | -0.5000 to -0.5000 |" in comparison_page(compared)
    assert not math.isnan(np.mean([change["difference"] for change in changes.values()]))


@pytest.mark.parametrize("nll", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_null_in_reports_and_told(tmp_path: Path, nll: float) -> None:
    broken, fine = lines([True] * 4, 2), lines([True] * 4, 2)
    for one, two in zip(broken, fine, strict=True):
        one["loss"] = {"call": _loss(nll, 3, 0), "text": _loss(1.0, 1, 0)}
        two["loss"] = {"call": _loss(1.0, 3, 0), "text": _loss(1.0, 1, 0)}
    report = loss_report(broken)
    assert report is not None
    json.dumps(report, allow_nan=False)
    for name in ("loss", "loss_call"):
        assert {report["metrics"][name][key] for key in ("value", "numerator", "cluster_low")} == {None}
    assert report["metrics"]["loss_text"]["value"] == 1.0
    assert loss_rows(report)[0][1] == "not finite"
    assert "not finite  of 16 tokens" in "".join(loss_lines(report))
    compared = compare(write(tmp_path / "a", fine), write(tmp_path / "b", broken))
    json.dumps(compared, allow_nan=False)
    assert "not finite" not in comparison_page(compared)
    assert set(compared["loss"] or {}) == {"loss_text", "token_accuracy"}


def _loss(nll: float, tokens: int, right: int) -> KindLoss:
    return {"nll": nll, "tokens": tokens, "right": right}


def test_a_loss_that_cannot_be_measured_costs_no_answer(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first trajectory's; then all is said, and two commands that end it."""
    data, out = write_rows(tmp_path / "rows.jsonl", [row(1), row(2)]), tmp_path / "out"
    words = ["evaluate", "--model", model, "--data", str(data), "--out", str(out), "--max-new-tokens", "2"]
    reads = GoldReader._read

    def refusing(reader: GoldReader, points: list[GoldTokens]) -> list[dict[str, KindLoss]]:
        if not reader.failed:
            raise RuntimeError("out of memory")
        return reads(reader, points)

    with monkeypatch.context() as patches:
        patches.setattr(GoldReader, "_read", refusing)
        assert main(words) == 2
    told = capsys.readouterr().err
    assert "all decision points are answered, but the loss of gold's answers could not be measured at 2 of them" in told
    assert "with --no-loss for a report without it" in told
    assert len((out / ".samples-0.jsonl").read_text().splitlines()) == 4
    assert main([*words, "--no-loss"]) == 0
    assert _read(out)[0]["loss"] is None


def test_an_old_run_scored_again_says_that_no_loss_was_measured(tmp_path: Path) -> None:
    run = write(tmp_path / "a", lines([True] * 2))
    report = json.loads((run / "report.json").read_text())
    del report["settings"]["loss"]
    (run / "report.json").write_text(json.dumps(report))
    assert main(["score", "--from", str(run), "--out", str(tmp_path / "b")]) == 0
    assert json.loads((tmp_path / "b/report.json").read_text())["settings"]["loss"] is False


def test_runs_without_losses_compare_without(tmp_path: Path) -> None:
    with_losses = lines([True] * 2)
    for line in with_losses:
        line["loss"] = {"call": _loss(1.0, 1, 1)}
    compared = compare(write(tmp_path / "a", lines([True] * 2)), write(tmp_path / "b", with_losses))
    assert compared["loss"] is None
    assert "Loss of gold" not in comparison_page(compared)
