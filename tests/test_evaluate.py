"""Evaluation: every decision point once, whatever the ranks, and a report that its samples bear out."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from gemma_dist.__main__ import main
from gemma_dist.data.read import CALL
from gemma_dist.data.read import CALL_END as END
from gemma_dist.evaluate.cache import TreeCache
from gemma_dist.evaluate.generate import Answer, Generator, Question
from gemma_dist.evaluate.metrics import DECISION_METRICS, flat_counts
from gemma_dist.files import exclusive
from gemma_dist.model.tiny import write_tiny_model
from tests.support.corpus import row, write_rows
from tests.support.ranks import REPOSITORY, gemma_dist, kill, start

Run = Callable[..., Path]
Answers = Iterator[tuple[Question, int, Answer]]

FILES = ("samples.jsonl", "tools.json", "trajectories.jsonl", "report.json", "report.md", "report.html")
LEFT = {*FILES, "run.json", "images"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [row(number, num_calls=1 + number % 3) for number in range(7)]
    rows[2]["messages"][1]["train"] = False  # shown, not asked for
    return write_rows(tmp_path_factory.mktemp("evaluate") / "rows.jsonl", rows)


@pytest.fixture
def evaluated(tmp_path: Path, model: str, data: Path) -> Run:
    """Evaluate with options into a folder of that name, and expect an exit code; the folder."""

    def evaluate(name: str, *options: object, launch: str | Path | None = None, code: int = 0) -> Path:
        out = tmp_path / name
        words = ["evaluate", "--model", model, "--data", data, "--out", out, "--max-new-tokens", 6, *options]
        if launch is None:
            assert main([str(word) for word in words]) == code
        else:
            gemma_dist(*words, launch=launch)
        return out

    return evaluate


def _read(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Report, but for its times, and samples."""
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    report = json.loads((out / "report.json").read_text())
    del report["times"]
    return report, samples


def _page(out: Path) -> bytes:
    """report.html, but for its times."""
    return re.sub(rb'id="times">.*', b"", (out / "report.html").read_bytes())


def _require_same_when_scored_again(out: Path, folder: Path, data: Path) -> None:
    """`score --from out` writes the same bytes, with and without the data."""
    for name, options in {"scored": [], "scored-with-data": ["--data", str(data)]}.items():
        assert main(["score", "--from", str(out), "--out", str(folder / name), *options]) == 0
        for file in FILES:
            assert (folder / name / file).read_bytes() == (out / file).read_bytes(), file


def _on_ranks(number: int, folder: Path) -> Path:
    """An accelerate config of so many CPU processes."""
    text = (REPOSITORY / "accelerate_configs/cpu_ddp.yaml").read_text()
    assert "num_processes: 2" in text
    config = folder / f"{number}.yaml"
    config.write_text(text.replace("num_processes: 2", f"num_processes: {number}"))
    return config


def test_any_number_of_ranks_and_a_run_that_was_killed_and_goes_on_give_the_same(
    evaluated: Run, model: str, data: Path, tmp_path: Path
) -> None:
    slow = ["--max-new-tokens", 32]  # slow enough to be killed amid its work
    alone, samples_alone = _read(evaluated("alone", *slow))
    out = tmp_path / "together"
    words = ["evaluate", "--model", model, "--data", data, "--out", out, *slow]
    process = start(*words, "--per-device-eval-batch-size", 1, launch=_on_ranks(3, tmp_path))
    while not any(part.stat().st_size for part in out.glob(".samples-*")):
        assert process.poll() is None, kill(process)
    kill(process)
    written = sum(part.read_bytes().count(b"\n") for part in out.glob(".samples-*"))
    assert written > 0
    assert not (out / "report.json").exists()
    evaluated("together", *slow, launch="cpu_ddp")
    times = json.loads((out / "report.json").read_text())["times"]
    assert times["world_size"] == 2
    assert sum(rank["answers"] for rank in times["ranks"]) == len(samples_alone) - written
    assert _read(out) == (alone, samples_alone)
    for file in ("samples.jsonl", "tools.json", "trajectories.jsonl", "report.md"):
        assert (out / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file
    assert _page(out) == _page(tmp_path / "alone")
    images = [
        {path.name: path.read_bytes() for path in (each / "images").iterdir()} for each in (out, tmp_path / "alone")
    ]
    assert images[0] == images[1]
    assert len(images[0]) == sum(1 + number % 3 for number in (0, 3, 6)), "each of every third row once"
    assert {path.name for path in out.iterdir()} == LEFT

    # 7 runs of 1 to 3 calls and a final word each, less the one that is not trained
    assert alone["num_decision_points"] == len(samples_alone) == sum(1 + number % 3 + 1 for number in range(7)) - 1
    assert len({(sample["id"], sample["turn"]) for sample in samples_alone}) == len(samples_alone)
    assert samples_alone[0]["trajectory"] == 1
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for sample in samples_alone:
        gold = rows[sample["trajectory"] - 1]["messages"][sample["turn"] - 1]
        assert (gold["role"], rows[sample["trajectory"] - 1]["id"]) == ("assistant", sample["id"])
        assert gold["content"] == sample["gold"]["content"], "row and turn are counted from 1, as errors count"


def test_the_report_follows_from_the_samples(evaluated: Run, data: Path, tmp_path: Path) -> None:
    """Scored again, byte for byte: from the lines alone, and with gold and tools of the data."""
    out = evaluated("out")
    _require_same_when_scored_again(out, tmp_path, data)
    report, samples = _read(out)
    totals: Counter[str] = Counter()
    for sample in samples:
        totals.update(flat_counts(sample["score"]["ratios"]))
    for metric in DECISION_METRICS:
        found = report["metrics"][metric.name]
        assert found["numerator"] == totals[f"{metric.name}.numerator"], metric.name
        assert found["denominator"] == totals[f"{metric.name}.denominator"], metric.name


def test_blank_images_change_what_the_model_sees_and_nothing_else(evaluated: Run) -> None:
    _, real = _read(evaluated("real"))
    _, blank = _read(evaluated("blank", "--images", "blank"))
    for first, second in zip(real, blank, strict=True):
        assert first["prompt_tokens"] == second["prompt_tokens"]
        if not first["num_images"]:
            assert first["output"] == second["output"]


def test_any_text_that_a_model_writes_survives(evaluated: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model does not say such things by itself, so they are put behind what it says."""
    hard = ["\u2028", "\u2029", "\x85", "\r", f'{CALL}call:f{{a:"\\ud83d"}}{END}', f'{CALL}call:f{{"\\udc00":1}}{END}']
    said: list[str] = []
    answer_truly = Generator.answer

    def answer(generator: Generator, trajectories: Sequence[list[Question]]) -> Answers:
        for question, sample, written in answer_truly(generator, trajectories):
            said.append(f"{written.text}a{hard[len(said) % len(hard)]}b")
            yield question, sample, replace(written, text=said[-1])

    monkeypatch.setattr(Generator, "answer", answer)
    report, samples = _read(evaluated("out"))
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

    def answer(_: Generator, trajectories: Sequence[list[Question]]) -> Answers:
        text = f'{CALL}call:weather{{city:<|"|>Rome<|"|>}}{END}<|tool_response>'
        for question in chain.from_iterable(trajectories):
            yield question, 0, Answer(text=text, ids=[1] * 9, stopped=True)

    monkeypatch.setattr(Generator, "answer", answer)
    out = tmp_path / "report"
    assert main(["evaluate", "--model", model, "--data", str(write_rows(tmp_path / "rows.jsonl", cases)),
                 "--out", str(out)]) == 0  # fmt: skip
    report, samples = _read(out)
    assert [(sample["turn"], sample["score"]["right"]) for sample in samples] == [(4, True), (4, False), (4, False)]
    assert [sample["gold"]["is_outline"] for sample in samples] == [True, True, False]
    metrics = report["metrics"]
    assert (metrics["tool_set_exact"]["numerator"], metrics["tool_set_exact"]["denominator"]) == (2, 2)
    assert (metrics["call_exact"]["numerator"], metrics["call_exact"]["denominator"]) == (0, 1)


def test_limit_and_an_existing_report(evaluated: Run, capsys: Any) -> None:
    report, samples = _read(evaluated("out", "--limit", 2))
    assert report["num_trajectories"] == 2
    assert {sample["id"] for sample in samples} == {"row-0", "row-1"}
    evaluated("out", "--limit", 2, code=2)
    assert "exists already" in capsys.readouterr().err


def test_a_launch_from_elsewhere_than_the_root_is_a_user_error(
    model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The configs of accelerate_configs/ name that of DeepSpeed by a path from the root."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "deepspeed_cpu_zero3.json"))
    assert main(["evaluate", "--model", model, "--data", str(data), "--out", str(tmp_path / "out")]) == 2
    assert "start from the repository's root or write it in full" in capsys.readouterr().err


def test_a_run_goes_on_from_any_byte_that_a_kill_left(evaluated: Run, tmp_path: Path, data: Path) -> None:
    whole = evaluated("whole")
    samples, run = (whole / "samples.jsonl").read_bytes(), (whole / "run.json").read_bytes()
    ends = [place + 1 for place, byte in enumerate(samples) if byte == ord("\n")]
    for cut in (0, 1, ends[0], ends[4] - 1, ends[4] + 40, len(samples) - 1, len(samples)):
        out = tmp_path / f"cut-{cut}"
        out.mkdir()
        (out / "run.json").write_bytes(run)
        (out / ".samples-5.jsonl").write_bytes(samples[: ends[0]] if cut > ends[0] else b"")
        (out / ".samples-0.jsonl").write_bytes(samples[ends[0] if cut > ends[0] else 0 : cut])
        (out / ".samples-mine.jsonl").write_text("mine")
        evaluated(out.name)
        assert (out / "samples.jsonl").read_bytes() == samples
        assert _read(out) == _read(whole)
        (times,) = json.loads((out / "report.json").read_text())["times"]["ranks"]
        assert times["answers"] == len(ends) - samples[:cut].count(b"\n"), "nothing is written twice"
        assert {path.name for path in out.iterdir()} == {*LEFT, ".samples-mine.jsonl"}, "only what ranks wrote goes"


def test_lines_of_something_else_are_never_taken(evaluated: Run, tmp_path: Path) -> None:
    whole, out = evaluated("whole"), tmp_path / "out"
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "foreign", [sample | {"key": "0" * 16, "output": "foreign"} for sample in samples])
    out.mkdir()
    (tmp_path / "foreign").rename(out / ".samples-0.jsonl")
    evaluated("out")
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--max-new-tokens", 5], "max_new_tokens: 6 there, 5 here"),
        (["--images", "blank"], "images: as_is there, blank here"),
        (["--limit", 1], "limit: None there, 1 here"),
        (["--data", "other.jsonl"], "data: '"),
        (["--model", "other"], "model: '"),
    ],
)
def test_a_folder_of_another_run_is_refused_by_what_differs(
    evaluated: Run, tmp_path: Path, capsys: Any, options: list[Any], named: str
) -> None:
    (evaluated("out") / "report.json").unlink()  # as if it had been killed before the last step
    if "--data" in options:
        options = ["--data", write_rows(tmp_path / "other.jsonl", [row(1)])]
    if "--model" in options:
        write_tiny_model(tmp_path / "other", seed=1)
        options = ["--model", tmp_path / "other"]
    evaluated("out", *options, code=2)
    error = capsys.readouterr().err
    assert "holds an evaluation of something else" in error
    assert named in error
    assert error.count(" there, ") == 1


def test_what_changes_no_answer_may_differ_when_a_run_goes_on(evaluated: Run, tmp_path: Path) -> None:
    out = evaluated("out")
    (out / "report.json").unlink()
    samples = (out / "samples.jsonl").read_bytes()
    (out / "samples.jsonl").rename(out / ".samples-0.jsonl")
    evaluated("out", "--per-device-eval-batch-size", 2, "--max-batch-tokens", 999, "--ple", "gpu",
              "--answer-tolerance", 0)  # fmt: skip
    assert (out / "samples.jsonl").read_bytes() == samples


def test_two_runs_do_not_write_to_one_folder(evaluated: Run, tmp_path: Path, capsys: Any) -> None:
    with exclusive(tmp_path / "out", ""):
        evaluated("out", code=2)
    assert "another evaluation is writing there" in capsys.readouterr().err


def test_what_fails_before_the_first_answer_leaves_no_folder(evaluated: Run, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "nothing").mkdir()
    out = evaluated("out", "--adapter", tmp_path / "nothing", "--no-loss", code=2)
    assert "is no adapter" in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").touch()
    evaluated("out", "--adapter", tmp_path / "nothing", "--no-loss", code=2)
    assert (out / "mine.txt").exists(), "a folder that was there stays"


def test_a_sample_hangs_on_its_number_alone(evaluated: Run, tmp_path: Path, data: Path) -> None:
    options = ["--num-samples", 3, "--temperature", 1, "--top-p", 0.9]
    many = evaluated("many", *options)
    report, samples = _read(many)
    few = evaluated("few", *options, "--per-device-eval-batch-size", 2)
    assert (few / "samples.jsonl").read_bytes() == (many / "samples.jsonl").read_bytes()
    assert [sample["sample"] for sample in samples] == [0, 1, 2] * (len(samples) // 3)
    assert len({sample["output"] for sample in samples}) > len(samples) / 2
    assert (report["num_decision_points"], report["num_samples"]) == (len(samples) / 3, 3)
    denominators = {name: report["metrics"][name]["denominator"] for name in ("overall", "pass@2", "pass^3")}
    assert denominators == {"overall": len(samples), "pass@2": len(samples), "pass^3": len(samples) / 3}
    _require_same_when_scored_again(many, tmp_path, data)
    assert main(["compare", str(few), str(many), "--fail-below", "pass@2=0"]) == 0
    _, other = _read(evaluated("other", *options, "--seed", 1))
    assert [one["output"] for one in other] != [one["output"] for one in samples]


def test_several_samples_need_a_temperature(evaluated: Run, capsys: Any) -> None:
    evaluated("out", "--num-samples", 3, code=2)
    assert "--temperature 0.0: " in capsys.readouterr().err


def test_a_decision_point_that_fails_takes_no_other_with_it(
    evaluated: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    read_truly = Generator._read

    def read(generator: Generator, cache: TreeCache, start: int, stop: int) -> Any:
        prompts = [cache.tree.input_ids[path].tolist() for path in cache.tree.paths]
        if any("Draw 4," in text for text in map(generator.encoder.tokenizer.decode, prompts)):
            raise RuntimeError("no kernel for this")
        return read_truly(generator, cache, start, stop)

    whole = evaluated("whole")
    with monkeypatch.context() as patch:
        patch.setattr(Generator, "_read", read)
        out = evaluated("out", code=2)
    error = capsys.readouterr().err
    assert "3 decision points could not be answered, such as 5 row-4 2: no kernel for this" in error
    assert not (out / "report.json").exists()
    evaluated("out")
    (times,) = json.loads((out / "report.json").read_text())["times"]["ranks"]
    assert times["answers"] == 3
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
