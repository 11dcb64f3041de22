"""Probes: made of the rows alone, at points where what is right is known, and reported beside all that was there."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gemma_dist.__main__ import main
from gemma_dist.config import EvaluateConfig
from gemma_dist.data.served import decision_points
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.evaluate.beside import GENERAL, PROBES, SIMILAR, UNNEEDED, WITHHELD
from gemma_dist.evaluate.compare import compare, failed_rules
from gemma_dist.evaluate.decision import ScoredDecision
from gemma_dist.evaluate.line import gold_of
from gemma_dist.evaluate.markdown import report_page
from gemma_dist.evaluate.probes import NUM_ADDED, Probes
from gemma_dist.evaluate.report import make_report, summary
from gemma_dist.evaluate.score import score_decision
from tests.support.chromium import chromium, needs_chromium
from tests.support.corpus import row as corpus_row
from tests.support.corpus import write_rows
from tests.support.scoring import expecting, line, reading
from tests.test_compare import write

NAMES = {"get_weather": "Weather of a city.", "find_flight": "Flights between two cities.", "send_mail": "Send a mail."}
OTHERS = {"getForecast": "Weather of the next days.", "weather_map": "A map.", "buy_stock": "Trade shares."}
F: Any = {"name": "f", "arguments": {}}


def tool(name: str, description: str) -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": {"type": "object", "properties": {}}}
    return {"type": "function", "function": function}


def called(name: str, number: int) -> list[dict[str, Any]]:
    function = {"name": name, "arguments": {}}
    call = {"id": f"c{number}", "type": "function", "function": function}
    result = {"role": "tool", "tool_call_id": f"c{number}", "content": "Done."}
    return [{"role": "assistant", "content": "", "tool_calls": [call]}, result]


def parsed(number: int, names: Sequence[str], tools: dict[str, str], **keys: Any) -> Trajectory:
    """A row that calls these tools one after the other and says a word at its end."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"Question {number}?"}]
    for place, name in enumerate(names):
        messages += called(name, place)
    messages.append({"role": "assistant", "content": "That is all."})
    row = {"id": f"row-{number}", "messages": messages, "tools": [tool(*item) for item in tools.items()], **keys}
    return parse_row(row, f"rows.jsonl:{number}", EvaluateConfig())


def rows() -> list[Trajectory]:
    first, second, third = NAMES
    calls = [(first,), (first, first), (second, first, third), ()]
    mine = [parsed(number, calls[number % 4], NAMES) for number in range(12)]
    return [*mine, *(parsed(number, ("buy_stock",), OTHERS) for number in range(12, 15))]


def probes_of(trajectories: Sequence[Trajectory], num_probes: int = 5) -> list[Trajectory]:
    probes = Probes(num_probes)
    for trajectory in trajectories:
        probes.see(trajectory)
    return list(probes.make())


def names_of(trajectory: Trajectory) -> set[str]:
    return {each["function"]["name"] for each in trajectory.tools}


def test_what_is_right_at_a_probe_is_known() -> None:
    by_id = {row.id: row for row in rows()}
    probes = probes_of(rows(), num_probes=99)
    assert {probe.part for probe in probes} == set(PROBES)
    for probe in probes:
        points = list(decision_points(probe.messages))
        assert len(points) == 1, "one each"
        (index, gold), row = points[0], by_id[probe.id]
        assert [message["content"] for message in probe.messages[:index]] == [
            message["content"] for message in row.messages[:index]
        ]
        before = {
            call["function"]["name"] for message in probe.messages[:index] for call in message.get("tool_calls", [])
        }
        wanted = {call["function"]["name"] for call in row.messages[index].get("tool_calls", [])}
        added = names_of(probe) - names_of(row)
        if probe.part == WITHHELD:
            assert wanted
            assert names_of(row) - names_of(probe) == wanted
            assert not wanted & before, "nothing in the history hangs on what was taken"
            assert probe.is_outline
            assert "tool_calls" not in gold[-1]
        else:
            assert gold == row.messages[index : index + len(gold)], "gold is the row's own"
            assert names_of(row) <= names_of(probe)
            assert 0 < len(added) <= NUM_ADDED
            assert bool(wanted) == (probe.part == SIMILAR)
        called = reading({"name": min(wanted or added), "arguments": {}})
        outputs = called, reading(content="No tool does that.")
        scored = [score_decision(output, gold_of(probe, gold), probe.tools) for output in outputs]
        assert [score["right"] for score in scored] == [probe.part == SIMILAR, probe.part != SIMILAR]
        assert scored[0]["ratios"].get("over_calling") == (None if probe.part == SIMILAR else [1, 1])
        if wanted == {"get_weather"} and probe.part == SIMILAR:
            assert added == {"getForecast", "weather_map"}, "both say weather, and no share does"
        if probe.part == UNNEEDED:
            assert added <= set(OTHERS) or added <= set(NAMES)


def test_the_same_rows_make_the_same_probes_in_any_order_and_more_of_them_the_same_and_others() -> None:
    def key(probe: Trajectory) -> str:
        return json.dumps([probe.part, probe.id, probe.messages, probe.tools])

    shuffled = rows()
    random.Random(1).shuffle(shuffled)
    few = [key(probe) for probe in probes_of(rows(), 3)]
    assert few == [key(probe) for probe in probes_of(shuffled, 3)]
    assert set(few) < {key(probe) for probe in probes_of(rows(), 6)}
    assert len(few) == 3 * len(PROBES)


def test_a_corpus_of_one_tool_set_makes_no_probe_that_needs_others() -> None:
    mine = rows()[:12]
    assert {probe.part for probe in probes_of(mine)} == {WITHHELD}
    probes = Probes(5)
    for row in mine:
        probes.see(row)
    probes.see_tools(rows()[-1])
    assert {probe.part for probe in probes.make()} == set(PROBES), "those of a general set will do"


def test_a_tool_that_is_golds_under_another_name_is_not_offered_beside_it() -> None:
    twins = {f"{name}_2": description for name, description in NAMES.items()}
    probes = [probe for probe in probes_of([*rows(), parsed(20, (), twins)], 99) if probe.part == SIMILAR]
    called = {probe.messages[-1]["tool_calls"][0]["function"]["name"]: names_of(probe) for probe in probes}
    assert "get_weather" in called
    assert not any(f"{name}_2" in offered for name, offered in called.items())


def parts(over_calls: bool) -> list[ScoredDecision]:
    """Twenty points of each part that want words, and twenty held-out ones; all are calls, or none."""
    output = reading(F) if over_calls else reading(content="I cannot do that.")
    return [
        line(number, 2, expecting([]), output, **({"part": part} if part else {}))
        for number, part in enumerate(part for part in ("", WITHHELD, UNNEEDED, GENERAL) for _ in range(20))
    ]


def test_parts_change_no_other_number_and_over_calling_is_caught(tmp_path: Path) -> None:
    header: dict[str, Any] = {"model": "m", "adapter": None, "data": "d", "settings": {}, "times": {}}
    words = parts(over_calls=False)
    whole, alone = make_report(header, words), make_report(header, words[:20])
    beside = whole.pop("beside")
    assert whole == alone
    assert beside["num_points"] == 60
    assert (beside["over_calling"]["numerator"], beside["over_calling"]["denominator"]) == (0, 80)

    calm = words[:20] + parts(over_calls=True)[20:]  # right at the rows themselves
    report = make_report(header, calm)
    assert report["metrics"]["overall"]["value"] == 1
    assert report["beside"]["over_calling"]["numerator"] == 60
    line_of_all = list(summary(report))[-1]
    assert line_of_all.startswith("over-calling, where no call is right: 75.0%, 60 of 80 (the held-out rows 0 of 20, ")
    assert line_of_all in report_page(report)
    assert "| gold's tool withheld | 100.0% (20 of 20) | 0.0% (0 of 20) |" in report_page(report)

    before, after = write(tmp_path / "before", words), write(tmp_path / "after", calm)
    compared = compare(before, after)
    assert compared["overall"]["difference"] == 0
    assert compared["beside"] is not None
    change = compared["beside"]["parts"][WITHHELD]["over_calling"]
    assert (change["before"], change["after"], change["fixed"], change["broken"]) == (0, 1, 0, 20)
    failures = failed_rules(compared, [], fail_if_worse=True)
    assert len(failures) == 1
    assert failures[0].startswith("over_calling is worse: +0.7500")
    assert failed_rules(compare(after, before), [], fail_if_worse=True) == []
    assert compare(write(tmp_path / "old", words[:20]), after)["beside"] is None, "an earlier run asked none"
    assert main(["compare", str(before), str(after), "--out", str(tmp_path / "page"), "--fail-if-worse"]) == 3
    # Without the withheld ones, those behind them have other numbers.
    fewer: list[Any] = [*words[:20], *({**one, "trajectory": one["trajectory"] - 20} for one in words[40:])]
    less = write(tmp_path / "less", fewer)
    for one, other in ((less, after), (after, less)):
        found = compare(one, other)["beside"]
        assert found is not None
        assert found["parts"].keys() == {"", UNNEEDED, GENERAL}


@needs_chromium
def test_both_pages_show_what_stands_beside(tmp_path: Path) -> None:
    before = write(tmp_path / "before", parts(over_calls=False))
    after = write(tmp_path / "after", parts(over_calls=True))
    assert main(["compare", str(before), str(after), "--out", str(tmp_path / "page")]) == 0
    for page, shown in ((after / "report.html", "20 of 20"), (tmp_path / "page" / "comparison.html", "+100.0")):
        table = chromium(page, "--dump-dom").partition("Beside the held-out rows")[2].partition("</table>")[0]
        assert table.count("gold's tool withheld") == 3, "over_calling, abstain_acc, overall"
        assert shown in table


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    mine = [corpus_row(number, num_calls=1) for number in range(5)]
    other = corpus_row(7)
    other["tools"] = [tool("draw_map", "Draw a map."), *other["tools"]]
    return [str(write_rows(tmp_path / name, found)) for name, found in (("mine.jsonl", mine), ("other.jsonl", [other]))]


def test_a_model_is_asked_and_scored_again_byte_for_byte(tmp_path: Path, model: str, data: list[str]) -> None:
    mine, other = data
    words = ["evaluate", "--model", model, "--data", mine, "--max-new-tokens", "6"]
    assert main([*words, "--out", str(tmp_path / "plain")]) == 0
    assert main([*words, "--out", str(tmp_path / "out"), "--probes", "2", "--general", other]) == 0
    plain, full = (
        [json.loads(each) for each in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        for name in ("plain", "out")
    )
    assert [each for each in full if "part" not in each] == plain, "and so are their keys: a run may go on with probes"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["beside"]["parts"]) == {*PROBES, GENERAL}
    for name, options in {"scored": [], "with-data": ["--data", mine]}.items():
        assert main(["score", "--from", str(tmp_path / "out"), "--out", str(tmp_path / name), *options]) == 0
        for file in ("samples.jsonl", "tools.json", "report.json", "report.md", "report.html"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "out" / file).read_bytes(), file
