"""A report for people: one page of Markdown; and the tables of such pages."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gemma_dist.evaluate.beside import SHOWN, beside_rows, over_calling_line
from gemma_dist.evaluate.loss_report import loss_rows
from gemma_dist.evaluate.message import say_reading
from gemma_dist.evaluate.metrics import MetricReport
from gemma_dist.evaluate.pass_at_k import metrics_of, pass_metrics
from gemma_dist.evaluate.report import Report
from gemma_dist.visible import masked, visible

HEADLINE = (
    "overall",
    "sample_exact",
    "abstain_acc",
    "trajectory_exact",
    "answer_contains",
    "image_pair_acc",
    "parse_ok",
)
MAX_ROWS = 30  # of a table of slices or samples: a page is read, not searched


def report_page(report: Report) -> str:
    """report.md."""
    return "\n".join(_report_lines(report)) + "\n"


def _report_lines(report: Report) -> Iterator[str]:
    yield "# Evaluation"
    yield ""
    adapter = f" with {code(report['adapter'])}" if report["adapter"] else ""
    points, trajectories = report["num_decision_points"], report["num_trajectories"]
    answers = f", {report['num_samples']} answers to each" if report["num_samples"] > 1 else ""
    yield f"{code(report['model'])}{adapter} on {code(report['data'])}: {points:,} decision points of {trajectories:,}"
    yield f"trajectories{answers}; images: {report['settings'].get('images', 'as_is')}."
    yield ""
    if server := report.get("server"):
        yield f"Answered by the server at {code(server['url'])}, asked for {server['endpoint']}."
        yield from map(_escaped, say_reading(report["server_reading"]) if "server_reading" in report else ())
        yield ""
    yield from _headline(report)
    if (loss := report["loss"]) is not None:
        title = f"Loss of gold's answers at {loss['num_points']:,} decision points"
        yield from section(title, ["metric", "value", "95 % by trajectory", "of"], loss_rows(loss))
    if (beside := report.get("beside")) is not None:
        title = f"Beside the held-out rows, at {beside['num_points']:,} decision points"
        yield from section(title, ["", *SHOWN], beside_rows(report["metrics"], beside))
        yield over_calling_line(report["metrics"], beside)
        yield ""
    yield from section("Failures", ["kind", "points"], ([kind, count] for kind, count in report["failures"].items()))
    faults = [[kind, count] for kind, count in report["arg_errors"].items() if count]
    yield from section("Wrong arguments of matched calls", ["kind", "arguments"], faults)
    yield from section("Calls", ["gold", "called", "calls"], _confused(report["confusion"]))
    curve = report["survival"]
    rows = [[row["step"], row["at_risk"], row["failed"], percent(row["survival"])] for row in curve[:MAX_ROWS]]
    if len(curve) > 1:
        yield from section("Survival", ["decision point", "trajectories", "first failure", "right so far"], rows)
    for name, values in report["slices"].items():
        largest = sorted(values, key=lambda value: -values[value]["overall"]["denominator"])[:MAX_ROWS]
        rows = [[value, *_share(found["overall"])] for value, found in values.items() if value in largest]
        yield from section(f"overall by {name}", [name, "value", "95 % by trajectory", "points"], rows)
    yield from section("All metrics", ["metric", "value", "95 %", "95 % by trajectory", "of", ""], _all(report))
    yield from section("How it was made", ["what", "is"], _made_by(report))


def _headline(report: Report) -> Iterator[str]:
    """The metrics that one looks at first, by both rules."""
    rows = []
    for name in (*HEADLINE, *(metric.name for metric in pass_metrics(report["num_samples"]))):
        metric, other = report["metrics"][name], report["bfcl"].get(name)
        if metric["denominator"]:
            rows.append([name, *_share(metric), percent(other["value"]) if other else ""])
    for rule, mean in report["overall_by_category"].items():
        if mean is not None and rule == "strict":
            bfcl = report["overall_by_category"]["bfcl"]
            of = f"{mean['num_categories']} categories"
            values = percent(mean["value"]), interval(mean["cluster_low"], mean["cluster_high"]), of
            rows.append(["overall, mean of categories", *values, percent(bfcl["value"]) if bfcl else ""])
    yield from table(["metric", "value", "95 % by trajectory", "of", "by BFCL's rule"], rows)


def _all(report: Report) -> Iterator[Sequence[object]]:
    for metric in metrics_of(report["num_samples"]):
        found = report["metrics"][metric.name]
        if found["denominator"]:
            value, clusters, of = _share(found)
            yield metric.name, value, interval(found["low"], found["high"]), clusters, of, metric.sentence


def _made_by(report: Mapping[str, Any]) -> Iterator[list[object]]:
    """What decides the numbers; the command is in report.json's `times`, since it may differ."""
    for name in ("model_hash", "adapter_hash", "data_hash", "limit", "template_hash", "encoding"):
        if report.get(name) is not None:
            yield [name, report[name]]
    yield from map(list, report.get("versions", {}).items())


def _confused(confusion: Mapping[str, Mapping[str, int]]) -> list[list[object]]:
    """The calls that went elsewhere, the most frequent first."""
    calls = [(gold, called, count) for gold, row in confusion.items() for called, count in row.items()]
    wrong = sorted((call for call in calls if call[0] != call[1]), key=lambda call: (-call[2], call))
    return [list(call) for call in wrong[:MAX_ROWS]]


def _share(metric: MetricReport) -> list[object]:
    of = f"{metric['numerator']:,} of {metric['denominator']:,}"
    return [percent(metric["value"]), interval(metric["cluster_low"], metric["cluster_high"]), of]


def percent(share: float | None) -> str:
    """A share in percent; "" where there is none."""
    return "" if share is None else f"{share:.1%}"


def interval(low: float | None, high: float | None, *, signed: bool = False) -> str:
    """An interval of shares in percent, or (`signed`) of differences in points; "" where there is none."""
    if low is None or high is None:
        return ""
    return f"{100 * low:+.1f} to {100 * high:+.1f}" if signed else f"{100 * low:.1f} to {100 * high:.1f}"


def section(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """A table under its title; nothing where it has no rows."""
    rows = list(rows)
    if rows:
        yield f"## {title}"
        yield ""
        yield from table(header, rows)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """The lines of a table, and an empty one."""
    yield _row(header)
    yield _row(["---"] * len(header))
    yield from map(_row, rows)
    yield ""


def _row(cells: Sequence[object]) -> str:
    """A line of a table. What a row or a model wrote cannot end its cell, nor be taken for markup."""
    return "| " + " | ".join(_escaped(str(cell)) for cell in cells) + " |"


def _escaped(text: str) -> str:
    return visible(" ".join(text.split()), keep="").replace("|", "\\|").replace("<", "&lt;")


def code(text: object) -> str:
    """A text as code, which is no markup."""
    return f"`{visible(masked(str(text)), keep='').replace('`', chr(39))}`"
