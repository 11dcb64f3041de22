"""What the matrix found: a table to read, and a file with every cell."""

import csv
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path

from tests.parity.bench import Bench
from tests.parity.cells import DATA, FOR_ALL_STYLES, LAUNCHES, LIMITS, STYLES, Cell
from tests.parity.judge import Figures, curve

Results = Mapping[Cell, Figures]
WHAT_A_CELL_IS = ("launch", "tuning", "style", "data", "packing", "checkpointing", "accumulation", "dtype", "optim")
NAMES = (*WHAT_A_CELL_IS, "sequence", "resumed_from", "resumed_sequence", "peer")
FIGURES = ("loss", "gradient", "logits", "resume", "names", "copies", "ok", "error")


def show(results: Results) -> None:
    """For each dtype a row of each launch, and one where two ranks share each sequence: how many cells it has, the
    worst loss, gradient and logits of them, and the worst figure of those that were resumed, in the same launch or from
    another one."""
    for dtype, limit in LIMITS.items():
        of_dtype = {cell: figures for cell, figures in results.items() if cell.dtype == dtype}
        if not of_dtype:
            continue
        print(f"\n{dtype}, limit {_digit(limit)}")
        print(_line("", ["cells", "loss", "gradient", "logits", "resumed", "from another launch"]))
        for sequence, launch in product((1, 2), LAUNCHES):
            cells = [cell for cell in of_dtype if (cell.launch, cell.sequence) == (launch, sequence)]
            if cells:
                name = launch if sequence == 1 else f"{launch}, shared"
                print(_line(name, _worst_of_launch({cell: of_dtype[cell] for cell in cells})))
    num_good = sum(figures.get("ok", False) for figures in results.values())
    print(f"\n{num_good} of {len(results)} cells agree with their reference", flush=True)
    _show_failures(results)


def _worst_of_launch(results: Results) -> list[str]:
    plain = [figures for cell, figures in results.items() if not cell.resumed_from]
    resumed = [figures for cell, figures in results.items() if cell.stays]
    moved = [figures for cell, figures in results.items() if cell.resumed_from and not cell.stays]
    return [
        str(len(results)),
        _worst(figures.get("loss") for figures in plain),
        _worst(figures.get("gradient") for figures in plain),
        _worst(figures.get("logits") for figures in plain),
        _worst(figures.get("resume") for figures in resumed),
        _worst(figures.get("resume") for figures in moved),
    ]


def _worst(values: Iterable[float | None]) -> str:
    found = [value for value in values if value is not None]
    return _digit(max(found)) if found else "."


def _digit(value: float) -> str:
    """One digit and a power of ten."""
    return f"{value:.0e}".replace("e-0", "e-") if value else "0"


def _line(name: str, columns: list[str]) -> str:
    return f"{name:18}{''.join(f'{column:>10}' for column in columns[:-1])}{columns[-1]:>22}"


def _show_failures(results: Results) -> None:
    for cell, figures in results.items():
        if not figures.get("ok"):
            reason = str(figures.get("error", figures)).strip().partition("\n")[0]
            print(f"  {cell.name}: {reason[:300]}")


def show_peer(peer: str, bench: Bench, results: Results) -> None:
    """Loss and gradient of the peer on rows without images, a row of each tuning, a column of each launch; and what
    the first loss is of."""
    launches = [launch for launch in LAUNCHES if any(cell.launch == launch for cell in results)]
    print(f"\n{peer}: SFTTrainer on the same rows, against itself in one process: loss and gradient")
    print(f"{'':8}" + "".join(f"{launch:>18}" for launch in launches))
    texts = {(cell.tuning, cell.launch): figures for cell, figures in results.items() if cell.data == "text"}
    for tuning in FOR_ALL_STYLES:
        columns = [_loss_and_gradient(texts.get((tuning, launch))) for launch in launches]
        print(f"{tuning:8}" + "".join(f"{column:>18}" for column in columns))
    _show_failures({cell: figures for cell, figures in results.items() if "error" in figures})
    for style, data in product(STYLES, DATA):
        ours = bench.of(Cell("single", "full", style, data, is_reference=True))
        theirs = bench.of(Cell("single", "full", style, data, is_reference=True, peer=peer))
        if all((folder / "out" / "metrics.jsonl").exists() for folder in (ours, theirs)):
            (first_of_ours, _), (first_of_theirs, _) = curve(ours)[0], curve(theirs)[0]
            print(f"  first loss of {style}, {data}: gemma_dist {first_of_ours:.4f}, TRL {first_of_theirs:.4f}")


def _loss_and_gradient(figures: Figures | None) -> str:
    if figures is None:
        return "."
    return "failed" if "error" in figures else f"{_digit(figures['loss'])} {_digit(figures['gradient'])}"


def write_csv(path: Path, results: Results) -> None:
    """Every cell and its figures, a line each, with names in the first line."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, [*NAMES, *FIGURES])
        lines.writeheader()
        for cell, figures in results.items():
            lines.writerow({name: getattr(cell, name) for name in NAMES} | figures)
