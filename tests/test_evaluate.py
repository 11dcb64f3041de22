"""Evaluation: every decision point once, whatever the ranks, and a report that its samples bear out."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma_dist.__main__ import main
from gemma_dist.data.read import CALL
from gemma_dist.data.read import CALL_END as END
from gemma_dist.evaluate import generate, run
from gemma_dist.evaluate.generate import Answer
from gemma_dist.evaluate.metrics import DECISION_METRICS, flat_counts
from tests.support.corpus import row, write_rows
from tests.support.ranks import gemma_dist

FILES = ("samples.jsonl", "tools.json", "report.json", "report.md")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [row(number, num_calls=1 + number % 3) for number in range(7)]
    rows[2]["messages"][1]["train"] = False  # shown, not asked for
    return write_rows(tmp_path_factory.mktemp("evaluate") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, model: str, data: Path) -> Any:
    """Evaluate on one process or two, with options; the output folder."""

    def evaluate(launch: str | None = None, *options: object) -> Path:
        out = tmp_path_factory.mktemp("out") / "report"
        gemma_dist("evaluate", "--model", model, "--data", data, "--out", out, "--max-new-tokens", 6,
                   "--per-device-eval-batch-size", 1, *options, launch=launch)  # fmt: skip
        return out

    return evaluate


def _read(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return json.loads((out / "report.json").read_text()), samples


def test_two_ranks_equal_one(evaluated: Any, data: Path) -> None:
    alone, samples_alone = _read(evaluated())
    together, samples_together = _read(evaluated("cpu_ddp"))
    assert samples_alone == samples_together
    assert alone.pop("world_size") == 1
    assert together.pop("world_size") == 2
    assert alone == together

    # 7 runs of 1 to 3 calls and a final word each, less the one that is not trained
    assert alone["num_decision_points"] == len(samples_alone) == sum(1 + number % 3 + 1 for number in range(7)) - 1
    assert len({(sample["id"], sample["turn"]) for sample in samples_alone}) == len(samples_alone)
    assert samples_alone[0]["trajectory"] == 1
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for sample in samples_alone:
        gold = rows[sample["trajectory"] - 1]["messages"][sample["turn"] - 1]
        assert (gold["role"], rows[sample["trajectory"] - 1]["id"]) == ("assistant", sample["id"])
        assert gold["content"] == sample["gold"]["content"], "row and turn are counted from 1, as errors count"


def test_the_report_follows_from_the_samples(evaluated: Any, data: Path, tmp_path: Path) -> None:
    """Scored again, byte for byte: from the lines alone, and with gold and tools of the data."""
    out = evaluated()
    for name, options in {"alone": [], "data": ["--data", str(data)]}.items():
        assert main(["score", "--from", str(out), "--out", str(tmp_path / name), *options]) == 0
        for file in FILES:
            assert (tmp_path / name / file).read_bytes() == (out / file).read_bytes(), file
    report, samples = _read(out)
    totals: Counter[str] = Counter()
    for sample in samples:
        totals.update(flat_counts(sample["score"]["ratios"]))
    for metric in DECISION_METRICS:
        found = report["metrics"][metric.name]
        assert found["numerator"] == totals[f"{metric.name}.numerator"], metric.name
        assert found["denominator"] == totals[f"{metric.name}.denominator"], metric.name


def test_blank_images_change_what_the_model_sees_and_nothing_else(evaluated: Any) -> None:
    _, real = _read(evaluated())
    _, blank = _read(evaluated(None, "--images", "blank"))
    for first, second in zip(real, blank, strict=True):
        assert first["prompt_tokens"] == second["prompt_tokens"]
        if not first["num_images"]:
            assert first["output"] == second["output"]


def test_any_text_that_a_model_writes_survives(
    model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model does not say such things by itself, so they are put behind what it says."""
    hard = ["\u2028", "\u2029", "\x85", "\r", f'{CALL}call:f{{a:"\\ud83d"}}{END}', f'{CALL}call:f{{"\\udc00":1}}{END}']
    said: list[str] = []

    def hard_answer(*arguments: Any, **options: Any) -> list[Answer]:
        (written,) = generate.generate(*arguments, **options)
        said.append(f"{written.text}a{hard[len(said) % len(hard)]}b")
        return [replace(written, text=said[-1])]

    monkeypatch.setattr(run, "generate", hard_answer)
    words = ["evaluate", "--model", model, "--data", data, "--out", tmp_path / "out", "--max-new-tokens", 2]
    assert main([str(word) for word in [*words, "--per-device-eval-batch-size", 1]]) == 0
    report, samples = _read(tmp_path / "out")
    assert report["num_decision_points"] == len(said) == len(samples)
    assert sorted(sample["output"] for sample in samples) == sorted(said)
    assert {"\ud83d", 1} == {value for sample in samples for call in sample["parsed"]["calls"]
                             for value in call["arguments"].values()}  # fmt: skip


def test_test_cases_are_asked_at_their_end_and_counted_by_name(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = [{"name": "weather", "parameters": {"type": "object", "required": ["city"]}}]
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hi."}]
    messages.append({"role": "user", "content": "Rome?"})
    cases: list[dict[str, Any]] = [
        {"messages": messages, "available_tools": tools, "expected_tool": "weather"},
        {"messages": messages, "available_tools": tools, "expected_tool": None},
        {"messages": messages, "available_tools": tools, "expected_tool": "weather", "expected_args": {"city": "Oslo"}},
    ]

    def answer(*arguments: Any, **keywords: Any) -> list[Answer]:
        text = f'{CALL}call:weather{{city:<|"|>Rome<|"|>}}{END}<|tool_response>'
        return [Answer(text=text, num_tokens=9, stopped=True) for _ in arguments[2]]

    monkeypatch.setattr(run, "generate", answer)
    out = tmp_path / "report"
    assert main(["evaluate", "--model", model, "--data", str(write_rows(tmp_path / "rows.jsonl", cases)),
                 "--out", str(out)]) == 0  # fmt: skip
    report, samples = _read(out)
    assert [(sample["turn"], sample["score"]["right"]) for sample in samples] == [(4, True), (4, False), (4, False)]
    assert [sample["gold"]["is_outline"] for sample in samples] == [True, True, False]
    metrics = report["metrics"]
    assert (metrics["tool_set_exact"]["numerator"], metrics["tool_set_exact"]["denominator"]) == (2, 2)
    assert (metrics["call_exact"]["numerator"], metrics["call_exact"]["denominator"]) == (0, 1)


def test_limit_and_an_existing_report(evaluated: Any, model: str, data: Path) -> None:
    out = evaluated(None, "--limit", 2)
    report, samples = _read(out)
    assert report["num_trajectories"] == 2
    assert {sample["id"] for sample in samples} == {"row-0", "row-1"}
    output = gemma_dist("evaluate", "--model", model, "--data", data, "--out", out, fails=True)
    assert "exists already" in output


def test_a_launch_from_elsewhere_than_the_root_is_a_user_error(
    model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The configs of accelerate_configs/ name that of DeepSpeed by a path from the root."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "deepspeed_cpu_zero3.json"))
    assert main(["evaluate", "--model", model, "--data", str(data), "--out", str(tmp_path / "out")]) == 2
    assert "start from the repository's root or write it in full" in capsys.readouterr().err


def test_only_what_ranks_wrote_is_joined_and_removed(model: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / ".samples-mine.jsonl").write_text("mine")
    (tmp_path / ".samples-7.jsonl").write_text("{cut")  # of a run on more ranks that was killed
    gemma_dist("evaluate", "--model", model, "--data", data, "--out", tmp_path, "--max-new-tokens", 2, "--limit", 1)
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, ".samples-mine.jsonl"}
