"""The pages of inspect, stats and plot: they show what is there, and nothing in them runs, loads or deceives."""

import base64
import hashlib
import html
import io
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_dist.__main__ import main
from gemma_dist.config import RowConfig, ShardConfig
from gemma_dist.errors import ConfigError, DataError
from gemma_dist.logs import RunLog, duration, log
from gemma_dist.show.plot import _names, panels, plot_runs, smoothed, thinned, ticks
from gemma_dist.show.row import Inspection, inspect_row
from gemma_dist.show.row_page import write_row_page
from gemma_dist.show.stats import collect_stats
from gemma_dist.show.stats_page import write_stats_page
from gemma_dist.static_page import heading, paragraph, section, table, text, write_page
from gemma_dist.visible import visible
from tests.support.chromium import chromium, needs_chromium
from tests.support.corpus import row, write_rows
from tests.support.hostile import HOSTILE, LOADS, OWNED

TAG = re.compile(r"<[^>]*>")


def words_of(page: str) -> str:
    """What a page says, its tags taken out."""
    body = page.partition("<main>")[2].partition("</main>")[0]
    return html.unescape(TAG.sub("", body))


def require_safe(page: str) -> None:
    """A page has one style, no script and no link to elsewhere, and its policy names the style by its hash."""
    assert [page.count(word) for word in ("<style>", "<script", "<body", "<meta http-equiv")] == [1, 0, 1, 1]
    assert page.partition("<body>")[0].count("<title>") == 1
    tags = TAG.findall(page.replace(re.search(r"<style>.*?</style>", page, re.DOTALL)[0], ""))  # type: ignore[index]
    assert not [
        tag for tag in tags if re.search(r"\s(on\w+|href|style|action|srcdoc)\s*=", tag) and "data:," not in tag
    ]
    assert all(tag.startswith('<img src="data:image/jpeg;base64,') for tag in tags if tag.startswith("<img"))
    sheet = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]  # type: ignore[index]
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)[1]  # type: ignore[index]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["style-src"] == f"'sha256-{digest}'"
    assert "script-src" not in rules


@given(st.text(st.characters(exclude_categories=()) | st.sampled_from("<>&\"'\u202e\x1b\u200b")))
def test_any_text_is_shown_and_is_no_markup(words: str) -> None:
    shown = text(words)
    assert not re.search("[<>\"']", shown)
    assert html.unescape(shown).replace("\r", "") == visible(words).replace("\r", "")


def test_a_page_of_hostile_texts_says_them_and_does_nothing(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    parts = [heading(HOSTILE[0], HOSTILE[1], HOSTILE), section(HOSTILE[2], *map(paragraph, HOSTILE), note=HOSTILE[3])]
    write_page(path, HOSTILE[2], [*parts, section("t", table(HOSTILE[:2], [HOSTILE[2:4], HOSTILE[4:6]]))])
    page = path.read_text(encoding="utf-8")
    require_safe(page)
    for words in HOSTILE[:5]:
        assert visible(words) in words_of(page)


@pytest.fixture(scope="module")
def hostile_row(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """The page of a row of hostile words, one image and a call, and what is inspected of it."""
    folder = tmp_path_factory.mktemp("row")
    found = row(3, num_calls=2)
    found["messages"][0]["content"] = "\n".join(words for words in HOSTILE if "\ud83d" not in words)
    found["messages"][-1]["content"] = HOSTILE[2]
    inspection = inspect_row(write_rows(folder / "rows.jsonl", [found]), model, 1, ShardConfig())
    write_row_page(folder / "row.html", inspection, HOSTILE[0])
    (folder / "expected.json").write_text(json.dumps(inspection.to_json()))
    return folder / "row.html"


def test_a_row_is_shown_whole_its_trained_tokens_marked_and_its_pictures_in_place(
    hostile_row: Path, model: str
) -> None:
    page = hostile_row.read_text(encoding="utf-8")
    require_safe(page)
    inspection = inspect_row(hostile_row.parent / "rows.jsonl", model, 1, ShardConfig())
    body = page.partition(">The row<")[2]
    blocks = "".join(re.findall(r'<div class="tokens">(.*?)</div></div>|$', body, re.DOTALL))
    without_pictures = re.sub(r"<figure>.*?</figure>", "", blocks, flags=re.DOTALL)
    assert html.unescape(TAG.sub("", without_pictures)) == "".join(
        visible(piece.text) for piece in inspection.pieces if not piece.is_image
    )
    marked = re.findall(r'<span class="(text|reasoning|call|argument)">(.*?)</span>', blocks, re.DOTALL)
    trained = "".join(visible(words) for is_trained, words in inspection.segments if is_trained)
    assert "".join(html.unescape(words) for _, words in marked) == trained
    assert {kind for kind, _ in marked} == {"text", "call", "argument"}
    assert blocks.count("<figure>") == inspection.num_images == 2
    assert sum(piece.num_tokens for piece in inspection.pieces) == len(inspection.ids)
    assert sum(piece.num_tokens for piece in inspection.pieces if piece.kind) == inspection.num_target_tokens
    assert f"{inspection.num_target_tokens:,} trained" in words_of(page)
    assert body.count('<div class="turn user">') == 1
    assert body.count('<div class="turn assistant">') == 1


def test_what_was_cut_for_its_length_is_told(tmp_path: Path, model: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [row(1, num_calls=5)])
    whole = inspect_row(data, model, 1, ShardConfig())
    assert whole.cut == []
    limit = len(whole.ids) - 1
    cut = inspect_row(data, model, 1, ShardConfig(max_length=limit, too_long="cut_turns"))
    assert cut.cut[-1] == "assistant: Here is chart 1: étude ✓."
    words = [
        "inspect",
        data,
        "--model",
        model,
        "--max-length",
        limit,
        "--too-long",
        "cut_turns",
        "--html",
        tmp_path / "a.html",
    ]
    assert main([str(word) for word in words]) == 0
    said = words_of((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert f"Cut from its end for its length: {len(cut.cut)} message" in said
    assert "Here is chart 1: étude ✓." in said


def test_an_inspection_without_pieces_has_a_page(tmp_path: Path) -> None:
    empty = Inspection("a", [], [], [], [], 0, 0, 0, 0, {"note <b>": 2}, ["added <i>"], False, ["a", "b"], 2.0)
    write_row_page(tmp_path / "a.html", empty, "rows")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    require_safe(page)
    for words in ("2 x note <b>", "added <i>", "weight 2", "a, b"):
        assert words in words_of(page)


def test_a_corpus_is_shown_with_its_numbers(tmp_path: Path) -> None:
    rows: list[Any] = [row(number) for number in range(6)]
    rows += [rows[0] | {"id": "again"}, {"messages": [{"role": "judge <b>"}]}]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    stats = collect_stats([data], [data], None, RowConfig())
    write_stats_page(tmp_path / "stats.html", stats)
    page = (tmp_path / "stats.html").read_text(encoding="utf-8")
    require_safe(page)
    said = words_of(page)
    for words in ("7 rows", "1 refused", "plot", "Exact duplicates", "2 rows in 1 group", "Exactly: 7 rows", data):
        assert words in said
    for name, spread in stats.per_row.items():
        assert sum(spread.bins) == stats.num_rows
        assert f"{name.replace('_', ' ')}{spread.total:,}" in said
    heights = [float(one) for one in re.findall(r'<rect class="mark"[^>]* height="([\d.]+)"', page)]
    assert max(heights) <= 96


def test_a_page_is_not_written_over_rows(tmp_path: Path, model: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [row(1)])
    before = data.read_bytes()
    for words in (["inspect", str(data), "--model", model], ["stats", str(data)]):
        assert main([*words, "--html", str(data)]) == 2
        assert "write one that ends in .html" in capfd.readouterr().err
        assert data.read_bytes() == before


# ---- runs ------------------------------------------------------------------------------------------------------------


def log_run(folder: Path, num_steps: int, start: float) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, num_steps + 1):
        loss = start / step
        figures = {"loss": loss, "loss_call": loss / 2, "loss_text": loss * 2, "learning_rate": 1e-4, "grad_norm": 1.0}
        lines.append({"step": step, **figures, "token_accuracy": 0.5, "tokens_per_s": 100.0})
        if step % 5 == 0:
            lines.append({"step": step, "eval_loss": loss + 1, "eval_loss_call": loss, "eval_runtime": 1.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "loss": tor')  # a line that is being written
    return folder


def test_a_run_is_drawn_with_all_that_it_logged(tmp_path: Path) -> None:
    out = plot_runs([log_run(tmp_path / "<b>run", 100, 3.0)], None)
    assert out == tmp_path / "<b>run" / "plot.html"
    page = out.read_text(encoding="utf-8")
    require_safe(page)
    said = words_of(page)
    for words in (
        "<b>run: step 100",
        "Loss by kind of token, training",
        "evaluation",
        "0.03 at 100",
        "3 at 1",
        "Learning rate",
    ):
        assert words in said
    assert page.count("<circle") == 2 * 20, "each evaluation, of all and of calls"
    points = [float(one) for found in re.findall(r'points="([^"]*)"', page) for one in re.split("[ ,]", found)]
    assert all(0 <= value <= 600 for value in points)


def test_several_runs_share_pictures_each_in_its_color(tmp_path: Path) -> None:
    runs = [log_run(tmp_path / name, 10, 3.0) for name in ("a", "b")]
    page = plot_runs([*runs], tmp_path / "both.html").read_text(encoding="utf-8")
    require_safe(page)
    said = words_of(page)
    for words in ("2 runs", "a, training", "b, evaluation", "Loss, call"):
        assert words in said
    assert "Loss, reasoning" not in said, "what no run has is no picture"
    colors = {kind.split()[0] for kind in re.findall(r'<polyline class="([^"]*)"', page)}
    assert colors == {"c0", "c1"}


def test_runs_are_told_apart_by_their_folders() -> None:
    assert _names([Path("/x/a/metrics.jsonl"), Path("/x/b/metrics.jsonl")]) == ["a", "b"]
    assert _names([Path("/x/a/metrics.jsonl"), Path("/y/a/metrics.jsonl")]) == ["x/a", "y/a"]
    assert len(set(_names([Path("/x/a/metrics.jsonl")] * 2))) == 2


def test_what_is_not_finite_and_what_is_no_step_are_left_out() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "loss": math.nan},
        {"step": 2, "loss": 5.0},
        {"step": 2, "loss": 4.0},
        {"step": 3, "loss": True},
    ]
    (loss, *_) = panels({"a": rows})
    assert loss.curves[0].points == [(2, 4.0)]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=2000))
def test_fewer_points_have_the_same_mean_and_an_average_stays_within(values: list[float]) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    fewer = thinned(points, 100)
    assert len(fewer) <= 100
    assert min(values) - 1e-6 <= min(y for _, y in fewer) <= max(y for _, y in fewer) <= max(values) + 1e-6
    assert len(smoothed(points)) == len(points)
    assert all(min(values) - 1e-3 <= y <= max(values) + 1e-3 for _, y in smoothed(points))


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_ticks_span_the_range_in_even_round_steps(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert found[0] <= low + max(1e-15, 1e-6 * abs(low))
    assert found[-1] >= (low + span) - max(1e-15, 1e-6 * abs(low + span))
    assert 1 <= len(found) <= 8


def test_a_run_without_steps_and_a_name_of_no_picture_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(DataError, match="it has no step yet"):
        plot_runs([tmp_path], None)
    (tmp_path / "my.jsonl").write_text('{"messages": []}\n{"messages": []}\n')
    monkeypatch.setattr(log, "propagate", True)
    with pytest.raises(DataError, match=r"my\.jsonl: no line of it is a step of a run; name an output_dir, or its met"):
        plot_runs([tmp_path / "my.jsonl"], None)
    assert not caplog.records, "and nothing of it is called damaged"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="a run writes it at its first step"):
        plot_runs([tmp_path / "empty"], None)
    with pytest.raises(ConfigError, match=r"name a file \.html or \.png"):
        plot_runs([tmp_path], tmp_path / "a.gif")


def test_a_png_is_one_or_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.png"
    code = main(["plot", str(log_run(tmp_path / "a", 70, 3.0)), "--out", str(out)])
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert code == 2
        assert "pip install 'gemma-dist[plot]'" in capsys.readouterr().err
        assert not out.exists()
    else:
        assert code == 0
        assert out.read_bytes().startswith(b"\x89PNG")


def test_a_line_of_a_step_says_how_long_the_others_will_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 60, 61, 62, 82])  # seconds: the first step is slow; of the last line there are two steps
    monkeypatch.setattr("gemma_dist.logs.time.perf_counter", lambda: float(next(clock)))
    said = io.StringIO()
    monkeypatch.setattr(log, "handlers", [logging.StreamHandler(said)])
    monkeypatch.setattr(log, "propagate", False)
    log.setLevel(logging.INFO)  # as `start_logging` does
    run = RunLog(tmp_path / "metrics.jsonl", start_step=100, num_steps=1000)
    figures = {"loss": 1.0, "entropy": 1.0, "token_accuracy": 0.5, "grad_norm": 1.0, "learning_rate": 1e-4}
    for step in (101, 102, 103, 105):
        run.write(step, {**figures, "target_tokens": 50}, num_tokens=400)
    run.close()
    lines = said.getvalue().splitlines()
    left = [re.search(r"(\S+ \w+(?: \d+ min)?) left", line)[1] for line in lines]  # type: ignore[index]
    assert left == ["14 h 59 min", "15 min", "15 min", "28 min"]
    assert "400 tokens/s (50 trained)" in lines[1]


def test_a_line_of_a_step_has_what_is_known_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, asked = io.StringIO(), []
    monkeypatch.setattr(log, "handlers", [logging.StreamHandler(said)])
    monkeypatch.setattr(log, "propagate", False)
    log.setLevel(logging.INFO)
    known = iter([{"memory_gib": 61.24, "memory_planned_gib": 64.0, "mfu": 0.4127}, {"memory_gib": 61.24}, {}])

    def figures(steps: range, seconds: float) -> dict[str, float]:
        asked.append(steps)
        return next(known)

    path = tmp_path / "metrics.jsonl"
    run = RunLog(path, start_step=2, num_steps=9, figures=figures)
    values = {"loss": 1.0, "entropy": 1.0, "token_accuracy": 0.5, "grad_norm": 1.0, "learning_rate": 1e-4}
    told = [run.write(step, values, num_tokens=400) for step in (4, 5, 6)]
    run.close()
    assert asked == [range(2, 4), range(4, 5), range(5, 6)], "each step once"
    lines = said.getvalue().splitlines()
    assert "trained)  MFU 41.3%  61.2 GiB of 64.0 planned  " in lines[0]
    assert "trained)  61.2 GiB  " in lines[1]
    assert "GiB" not in lines[2]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert (rows[0]["mfu"], rows[0]["memory_gib"], rows[0]["memory_planned_gib"]) == (0.4127, 61.24, 64.0)
    for figures_told, logged in zip(told, rows, strict=True):
        assert figures_told == {name: logged[name] for name in figures_told}, "what loggers get"
        assert figures_told["tokens_per_s"] > 0
    assert "MFU" in {panel.title.partition(",")[0] for panel in panels({"a": rows}) if panel.curves}


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (89, "89 s"), (600, "10 min"), (20_000, "5 h 33 min"), (4e5, "4 d 15 h")]
)
def test_a_duration_is_said_as_a_person_would(seconds: float, said: str) -> None:
    assert duration(seconds) == said


# ---- in a browser ----------------------------------------------------------------------------------------------------


@needs_chromium
def test_a_browser_runs_and_loads_nothing_of_a_row(hostile_row: Path) -> None:
    dom = chromium(hostile_row, "--dump-dom")
    assert f"<title>{OWNED}" not in dom
    assert "&lt;script&gt;" in dom
    assert not [tag for tag in TAG.findall(dom) if LOADS in tag]
    assert dom.count("<img") == 2
