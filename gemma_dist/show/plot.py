"""`gemma-dist plot`: what training runs logged, as one page of curves, or as a PNG.

    metrics.jsonl -> panels (curves that share an axis) -> plot.html (drawn here) or plot.png (by matplotlib)

The page needs nothing but a browser. A run may be at work meanwhile: what it has written is drawn.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_dist.data.kinds import KINDS
from gemma_dist.errors import ConfigError, DataError
from gemma_dist.files import writing
from gemma_dist.logs import read_steps
from gemma_dist.static_page import heading, section, text, write_page

METRICS = "metrics.jsonl"  # of an output_dir
MAX_POINTS = 500  # of a curve: of more, neighbors are averaged
MOST_TICKS = 5  # of an axis
SMOOTH_FROM = 60  # points of a curve beside which its moving average is drawn
SMOOTHING = 0.9  # share that a moving average keeps of what it was
NUM_COLORS = 6  # of the style sheet

Points = list[tuple[float, float]]  # (step, value)


@dataclass(frozen=True)
class Curve:
    """One figure of one run."""

    name: str
    points: Points
    color: int  # of the style sheet
    is_marked: bool = False  # few points, each with a mark: an evaluation's
    is_noisy: bool = True  # what its moving average tells more of

    @property
    def has_average(self) -> bool:
        """Whether its moving average is drawn, too."""
        return self.is_noisy and not self.is_marked and len(self.points) >= SMOOTH_FROM


@dataclass(frozen=True)
class Panel:
    """Curves over the steps that share an axis."""

    title: str
    curves: list[Curve]


def plot_runs(paths: Sequence[Path], out: Path | None) -> Path:
    """Draw runs, each a folder with metrics.jsonl or such a file; where the picture lies.

    Args:
        out: a file .html or .png; None: plot.html in the folder of the run, or here if there are several.

    Raises:
        ConfigError: the name ends otherwise, or matplotlib, which draws a PNG, is not installed.
        DataError: a run has logged no step.
    """
    files = [path / METRICS if path.is_dir() else path for path in paths]
    out = out or (files[0].parent if len(files) == 1 else Path()) / "plot.html"
    if out.suffix not in (".html", ".png"):
        raise ConfigError(f"{out}: a picture is a page or a PNG; name a file .html or .png")
    runs = {name: _rows(file) for name, file in zip(_names(files), files, strict=True)}
    drawn = [panel for panel in panels(runs) if panel.curves]
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        _write_png(out, drawn)
    else:
        _write_html(out, runs, drawn)
    return out


def _rows(file: Path) -> list[Mapping[str, Any]]:
    if not file.is_file():
        raise DataError(f"{file}: no such file; a run writes it at its first step: name its output_dir, or the file")
    rows = read_steps(file)
    if not rows and file.stat().st_size:
        raise DataError(f"{file}: no line of it is a step of a run; name an output_dir, or its {METRICS}")
    if not rows:
        raise DataError(f"{file}: it has no step yet; a line comes with each: wait for the first")
    return rows


def _names(files: Sequence[Path]) -> list[str]:
    """What tells runs from one another: the last folders of their paths, as many as needed."""
    for depth in range(1, 1 + max(len(file.parts) for file in files)):
        names = ["/".join(file.absolute().parts[:-1][-depth:]) for file in files]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {file}" for number, file in enumerate(files, start=1)]  # one file, named twice


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def panels(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Panel]:
    """What is drawn of the rows of runs, by the name of each."""
    yield Panel("Loss", [*_curves(runs, "loss", "training"), *_curves(runs, "eval_loss", "evaluation")])
    if len(runs) == 1:  # all kinds in one picture; of several runs, a picture a kind
        yield Panel("Loss by kind of token, training", _by_kind(runs, "loss_"))
        yield Panel("Loss by kind of token, evaluation", _by_kind(runs, "eval_loss_"))
    else:
        for kind in KINDS.values():
            curves = [*_curves(runs, f"loss_{kind}", "training"), *_curves(runs, f"eval_loss_{kind}", "evaluation")]
            yield Panel(f"Loss, {kind}", curves)
    yield Panel("Learning rate", _curves(runs, "learning_rate", ""))
    yield Panel("Norm of the gradient", _curves(runs, "grad_norm", ""))
    accuracy = [*_curves(runs, "token_accuracy", "training"), *_curves(runs, "eval_token_accuracy", "evaluation")]
    yield Panel("Tokens that were the likeliest", accuracy)
    yield Panel("Tokens per second", _curves(runs, "tokens_per_s", ""))
    yield Panel("MFU, of the GPUs' peak in bfloat16", _curves(runs, "mfu", ""))


def _curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], key: str, what: str) -> list[Curve]:
    """One figure of each run that has it."""
    is_marked, found = key.startswith("eval_"), []
    for number, (run, rows) in enumerate(runs.items()):
        name = (what or run) if len(runs) == 1 else ", ".join(filter(None, [run, what]))
        color = (number if len(runs) > 1 else int(is_marked)) % NUM_COLORS  # a run's own, or of what is evaluated
        if points := _points(rows, key):
            found.append(Curve(name, points, color, is_marked, key != "learning_rate"))
    return found


def _by_kind(runs: Mapping[str, Sequence[Mapping[str, Any]]], prefix: str) -> list[Curve]:
    (rows,) = runs.values()
    found = {kind: _points(rows, prefix + kind) for kind in KINDS.values()}
    is_marked = prefix.startswith("eval_")
    return [Curve(kind, points, color, is_marked) for color, (kind, points) in enumerate(found.items()) if points]


def _points(rows: Iterable[Mapping[str, Any]], key: str) -> Points:
    """The steps that have a finite figure of this name, the last one of each step."""
    found = {}
    for row in rows:
        value = row.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[float(row["step"])] = float(value)
    return sorted(found.items())


def thinned(points: Points, most: int = MAX_POINTS) -> Points:
    """At most so many points: neighbors are averaged, steps and values."""
    size = math.ceil(len(points) / most)
    groups = [points[start : start + size] for start in range(0, len(points), max(1, size))]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def smoothed(points: Points) -> Points:
    """The moving average, which leaves out how it began (as Adam's moments do)."""
    mean, weight, found = 0.0, 0.0, []
    for x, y in points:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * y, SMOOTHING * weight + (1 - SMOOTHING)
        found.append((x, mean / weight))
    return found


def ticks(low: float, high: float) -> list[float]:
    """Round numbers that span a range: 1, 2 or 5 times a power of ten apart."""
    span, largest = high - low, max(abs(low), abs(high))
    if span < 1e-9 * largest or largest < 1e-15:  # all the same
        span = largest if largest >= 1e-15 else 1.0
    power = 10 ** math.floor(math.log10(span / MOST_TICKS))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= MOST_TICKS)
    first = math.floor(low / step)
    return [step * number for number in range(first, math.ceil(high / step) + 1)] or [low]


# ---- the page --------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 600, 260, 58, 12, 10, 26


def _write_html(out: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], drawn: Sequence[Panel]) -> None:
    facts = [f"{name}: step {max(row['step'] for row in rows):,}" for name, rows in runs.items()]
    title = next(iter(runs)) if len(runs) == 1 else f"{len(runs)} runs"
    cards = [section(panel.title, _chart(panel), _legend(panel)) for panel in drawn]
    write_page(
        out, f"{title}: training", [heading(title, "Training", facts), f'<div class="two">{"".join(cards)}</div>']
    )


def _chart(panel: Panel) -> str:
    """The curves of a panel as SVG."""
    points = [point for curve in panel.curves for point in curve.points]
    steps, values = [x for x, _ in points], [y for _, y in points]
    across, up = ticks(min(steps), max(steps)), ticks(min(values), max(values))

    def at(x: float, y: float) -> tuple[float, float]:
        width, height = (across[-1] - across[0]) or 1, (up[-1] - up[0]) or 1
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * (x - across[0]) / width,
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - up[0]) / height,
        )

    parts = []
    for value in up:
        y = at(across[0], value)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in across:
        x = at(value, up[0])[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{value:,.6g}</text>')
    for curve in panel.curves:
        parts += _drawn(curve, at)
    return f'<svg class="chart curves" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _drawn(curve: Curve, at: Callable[[float, float], tuple[float, float]]) -> Iterator[str]:
    """A curve: marked points joined by a line, or a line, with its moving average where it has one."""
    lines = [(curve.points, curve.has_average)]
    if curve.has_average:
        lines.append((smoothed(curve.points), False))
    for points, is_faint in lines:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in thinned(points)))
        kind = f"c{curve.color}{' faint' if is_faint else ''}{' dashed' if curve.is_marked else ''}"
        yield f'<polyline class="{kind}" points="{path}"/>'
    if curve.is_marked or len(curve.points) == 1:
        for step, value in thinned(curve.points):
            x, y = at(step, value)
            told = f"{curve.name}, step {step:,.0f}: {value:.4g}"
            yield f'<circle class="c{curve.color}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{text(told)}</title></circle>'


def _legend(panel: Panel) -> str:
    """Each curve with its color, and its last, least and greatest figure."""
    rows = []
    for curve in panel.curves:
        found = [curve.points[-1], *(pick(curve.points, key=lambda point: point[1]) for pick in (min, max))]
        mark = f'<svg class="key" viewBox="0 0 16 4"><rect class="c{curve.color}" width="16" height="4"/></svg> '
        cells = "".join(f'<td class="num">{value:.4g} at {step:,.0f}</td>' for step, value in found)
        rows.append(f"<tr><td>{mark}{text(curve.name)}</td>{cells}</tr>")
    head = "".join(f'<th class="num">{title}</th>' for title in ("last", "lowest", "highest"))
    body = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table>{body}</table></div>'


# ---- the PNG ---------------------------------------------------------------------------------------------------------


def _write_png(out: Path, drawn: Sequence[Panel]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            f"{out}: matplotlib, which draws a PNG, is not installed: `pip install 'gemma-dist[plot]'`, or name a file "
            ".html, which needs nothing"
        ) from None
    rows = math.ceil(len(drawn) / 2)
    figure = Figure(figsize=(13, 3.6 * rows), layout="constrained")
    for axes, panel in zip(figure.subplots(rows, 2, squeeze=False).flat, drawn, strict=False):
        axes.set_title(panel.title)
        axes.set_xlabel("step")
        for curve in panel.curves:
            many, color = curve.has_average, f"C{curve.color}"
            style = "o--" if curve.is_marked else "-"
            steps, values = zip(*thinned(curve.points), strict=True)
            axes.plot(steps, values, style, color=color, alpha=0.3 if many else 1, label=None if many else curve.name)
            if many:
                axes.plot(*zip(*thinned(smoothed(curve.points)), strict=True), color=color, label=curve.name)
        axes.legend()
    for axes in figure.axes[len(drawn) :]:
        axes.set_visible(False)
    with writing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
