"""A comparison of two runs for people: a page of Markdown, and one to look at, with both answers to every point."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from gemma_dist.evaluate.beside import PARTS, in_both
from gemma_dist.evaluate.compare import BesideChange, Change, ChangedPoint, Comparison, compare, failed_rules
from gemma_dist.evaluate.loss_report import change_rows
from gemma_dist.evaluate.markdown import MAX_ROWS, code, interval, percent, section, table
from gemma_dist.evaluate.page import TRAJECTORIES, PageRun, write_page
from gemma_dist.evaluate.runs import Run, read_run, read_tools
from gemma_dist.files import writing
from gemma_dist.logs import log, to_json, write_json

HEADER = ["", "before", "after", "difference", "95 % by trajectory", "fixed", "broken", "p"]


def compare_runs(
    before: Path, after: Path, out: Path | None, fail_below: Sequence[str], fail_if_worse: bool, *, as_json: bool
) -> tuple[str, bool]:
    """What `gemma-dist compare` prints, as a page or one line of JSON, and whether "after" passes the rules; those that
    it does not are logged. With `out`, both are written there.

    Raises:
        ConfigError, DataError: as `compare` and `failed_rules`.
    """
    compared = compare(before, after)
    failures = failed_rules(compared, fail_below, fail_if_worse)
    if out is not None:
        write_comparison(compared, out, read_run(before), read_run(after))
    for failure in failures:
        log.error(failure)
    return to_json(compared) + "\n" if as_json else comparison_page(compared), not failures


def write_comparison(compared: Comparison, out: Path, before: Run, after: Run) -> None:
    """comparison.md, comparison.html and, last, comparison.json."""
    out.mkdir(parents=True, exist_ok=True)
    with writing(out / "comparison.md") as temporary:
        temporary.write_text(comparison_page(compared), encoding="utf-8")
    lines = in_both(before.lines, after.lines)
    runs = [
        PageRun(str(run.folder), run.report, found, read_tools(run.folder))
        for run, found in zip((before, after), lines, strict=True)
    ]
    shown = after.folder if (after.folder / TRAJECTORIES).is_file() else before.folder
    told = {name: value for name, value in compared.items() if name not in ("fixed", "broken")}
    write_page(out / "comparison.html", runs, shown, told)
    write_json(out / "comparison.json", compared)


def comparison_page(compared: Comparison) -> str:
    """comparison.md, and what `compare` prints."""
    return "\n".join(_lines(compared)) + "\n"


def _lines(compared: Comparison) -> Iterator[str]:
    tested = compared["overall"]
    yield f"# {code(compared['before'])} against {code(compared['after'])}"
    yield ""
    points, trajectories = compared["num_decision_points"], compared["num_trajectories"]
    several = compared["num_samples"] > 1
    answers = f", {compared['num_samples']} answers to each, by their numbers" if several else ""
    yield f"The same {points:,} decision points of {trajectories:,} trajectories{answers}."
    split = f"{tested['fixed']} were fixed, {tested['broken']} broken"
    yield f"{split}: p = {tested['p_value']:.2g} (McNemar's exact test)."
    smallest = _points(compared["smallest_difference"]).removeprefix("+")
    yield f"The smallest true difference that so many points would show in 8 of 10 cases: {smallest} points of 100."
    yield ""
    yield from table(HEADER, (change_row(name, found) for name, found in compared["metrics"].items()))
    if (losses := compared["loss"]) is not None:
        header = ["metric", "before", "after", "difference", "95 % by trajectory"]
        yield from section("Loss of gold's answers", header, change_rows(losses))
    if (gain := compared["image_gain"]) is not None:
        shown = f"{_points(gain['value'])} ({interval(gain['low'], gain['high'], signed=True)})"
        yield f"Gain by images, as they are less {gain['without']}: {shown}; {gain['num_points']:,} points have some."
        yield ""
    yield from _beside(compared["beside"])
    slices = [(name, value, found) for name, values in compared["slices"].items() for value, found in values.items()]
    surest = sorted(slices, key=lambda row: (row[2]["p_holm"], -abs(row[2]["difference"] or 0.0)))[:MAX_ROWS]
    rows = ([*change_row(f"{name} {value}", found), f"{found['p_holm']:.2g}"] for name, value, found in surest)
    yield from section("overall by slice, the surest first", [*HEADER, "p (Holm)"], rows)
    for title, changed in (("Broken", compared["broken"]), ("Fixed", compared["fixed"])):
        listed = [_listed(point, several=several) for point in changed[:MAX_ROWS]]
        more = f", the first {MAX_ROWS} of {len(changed)}" if len(changed) > MAX_ROWS else ""
        yield from section(f"{title}{more}", ["row", "turn", "before", "after"], listed)


def _beside(beside: BesideChange | None) -> Iterator[str]:
    """Over-calling in one line, and the parts that stand beside the held-out rows."""
    if beside is None:
        return
    if (change := beside["over_calling"]) is not None:
        values = f"{percent(change['before'])} before, {percent(change['after'])} after"
        sure = f"{_points(change['difference'])}, 95 %: {interval(change['low'], change['high'], signed=True)}"
        yield f"Over-calling, of all points where no call is right: {values} ({sure})."
        yield ""
    rows = [
        change_row(f"{PARTS[part]}: {name}", found)
        for part, changes in beside["parts"].items()
        for name, found in changes.items()
    ]
    yield from section("Beside the held-out rows", HEADER, rows)


def _listed(point: ChangedPoint, *, several: bool) -> list[object]:
    turn = f"{point['turn']}, answer {point['sample']}" if several else point["turn"]
    return [code(point["id"]), turn, point["before"], point["after"]]


def change_row(name: str, found: Change) -> list[object]:
    """A metric before and after as a line of a table under HEADER."""
    values = percent(found["before"]), percent(found["after"]), _points(found["difference"])
    changed = ("" if number is None else number for number in (found["fixed"], found["broken"]))
    p_value = "" if found["p_value"] is None else f"{found['p_value']:.2g}"
    return [name, *values, interval(found["low"], found["high"], signed=True), *changed, p_value]


def _points(difference: float | None) -> str:
    """A difference of shares, in points of a hundred."""
    return "" if difference is None else f"{100 * difference:+.1f}"
