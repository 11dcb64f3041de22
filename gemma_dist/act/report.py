"""What came of all runs: outcomes, how likely one of k runs succeeds, and all of k, with intervals over tasks."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gemma_dist.act.episode import SUCCESS
from gemma_dist.act.first_wrong import first_wrong_step, nearest
from gemma_dist.act.log import Ended
from gemma_dist.evaluate.intervals import wilson
from gemma_dist.evaluate.metrics import Metric, flat_counts, ratios
from gemma_dist.evaluate.pass_at_k import PointCounts, pass_metrics
from gemma_dist.evaluate.tally import measure

SUCCESSES = Metric[PointCounts](
    "success", "runs that succeed / runs", lambda runs: runs.right, lambda runs: runs.answers
)


def make_report(header: Mapping[str, Any], ended: Sequence[Ended]) -> dict[str, Any]:
    """The report of all runs.

    Args:
        header: what was run, settings and times.
    """
    tasks = by_task(ended)
    num_runs = len(ended) // len(tasks)
    left = [run.left for run in ended if run.left is not None]
    return {
        **header,
        "num_tasks": len(tasks),
        "num_runs": num_runs,
        "outcomes": dict(Counter(run.outcome for run in ended).most_common()),
        "metrics": _metrics(tasks, num_runs),
        "mean_steps": sum(len(run.calls) for run in ended) / len(ended),
        "mean_reward": _mean([run.reward for run in ended if run.reward is not None]),
        "left": {
            "by_how": dict(Counter(one["how"] for one in left).most_common()),
            "by_step": dict(sorted(Counter(one["step"] for one in left).items())),
        },
    }


def by_task(ended: Iterable[Ended]) -> dict[int, list[Ended]]:
    """The runs of each task, by its number."""
    tasks: defaultdict[int, list[Ended]] = defaultdict(list)
    for run in ended:
        tasks[run.task_number].append(run)
    return tasks


def summary(report: Mapping[str, Any]) -> Iterator[str]:
    """The report in a few lines."""
    runs = (
        f"{report['num_tasks']:,} tasks, {report['num_runs']} runs each"
        if report["num_runs"] > 1
        else (f"{report['num_tasks']:,} runs")
    )
    outcomes = ", ".join(f"{number:,} {outcome}" for outcome, number in report["outcomes"].items())
    yield f"{runs}, {report['mean_steps']:.1f} steps on average: {outcomes}"
    for name, metric in report["metrics"].items():
        yield f"{name:>10} {metric['value']:7.1%}  ({metric['low']:.1%} to {metric['high']:.1%})"
    if report["left"]["by_how"]:
        hows = ", ".join(f"{number:,} {how}" for how, number in report["left"]["by_how"].items())
        steps = ", ".join(f"{number:,} at step {step}" for step, number in report["left"]["by_step"].items())
        yield f"the log was left: {hows}; {steps}"


def with_first_wrong(line: dict[str, Any], run: Ended, of_task: Sequence[Ended]) -> dict[str, Any]:
    """A run's line with where it went wrong, as the runs of its task that succeeded show it, where gold does not."""
    if run.outcome == SUCCESS or line["compared_with"] is not None:
        return line
    found = nearest(run.calls, [(other.id, other.calls) for other in of_task if other.outcome == SUCCESS])
    if found is None:
        return line
    return {**line, "first_wrong_step": first_wrong_step(run.calls, found[1]), "compared_with": found[0]}


def _metrics(tasks: Mapping[int, Sequence[Ended]], num_runs: int) -> dict[str, dict[str, Any]]:
    """Successes, pass@k and pass^k with 95 % intervals over tasks: of the bootstrap, or Wilson's where all is right or
    nothing. Nothing where no run was judged."""
    metrics = (SUCCESSES, *pass_metrics(num_runs))
    sums = {}
    for number, runs in tasks.items():
        if any(run.reward is not None for run in runs):
            counted = PointCounts(len(runs), sum(run.outcome == SUCCESS for run in runs))
            sums[f"{number:09}"] = Counter(flat_counts(ratios(metrics, counted)))
    if not sums:
        return {}
    found = {}
    for name, metric in measure(sums, metrics).items():
        interval: tuple[float | None, float | None] = metric["cluster_low"], metric["cluster_high"]
        if metric["value"] in (0, 1):
            low, high = wilson(len(sums) * int(metric["value"]), len(sums))
            interval = round(low, 6), round(high, 6)  # as those of the bootstrap
        counts = {"numerator": metric["numerator"], "denominator": metric["denominator"]}
        found[name] = {"value": metric["value"], "low": interval[0], "high": interval[1], **counts}
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
