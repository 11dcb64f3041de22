"""The command: `python -m tests.parity`, which `make parity` calls."""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import tests.parity
from tests.parity.bench import Bench
from tests.parity.cells import PEERS, Cell, all_cells, core_cells, peer_cells, pruned_cells
from tests.parity.judge import Figures, judge
from tests.parity.table import show, show_peer, write_csv


def main() -> int:
    """Run the matrix, print its table and write what was asked for; 1 where a cell differs from its reference."""
    parser = argparse.ArgumentParser(prog="tests.parity", description=(tests.parity.__doc__ or "").partition("\n")[0])
    parser.add_argument("--pruned", action="store_true", help="the set that `make test-all` runs")
    parser.add_argument("--core", action="store_true", help="the part of it that `make test` runs")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cells whose name has all these words")
    parser.add_argument(
        "--against", nargs="+", choices=PEERS, default=[], help="train what plain TRL takes of the cells with it, too"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write every cell's figures to this table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same as JSON, by the cells' names")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the runs here, and resume what is there")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = options.keep or Path(tempfile.mkdtemp(prefix="parity-"))
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder)

    def run(cells: list[Cell]) -> dict[Cell, Figures]:
        cells = [cell for cell in cells if all(word in cell.name for word in options.only)]
        bench.run(cells)
        return {cell: judge(bench, cell) for cell in cells}

    try:
        results = run(core_cells() if options.core else pruned_cells() if options.pruned else all_cells())
        if results:
            show(results)
        peers: dict[Cell, Figures] = {}
        for peer in options.against:
            found = run(peer_cells(peer))
            show_peer(peer, bench, found)
            peers |= found
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    if options.csv:
        write_csv(options.csv, results | peers)
    if options.json:
        options.json.write_text(json.dumps({cell.name: figures for cell, figures in results.items()}, indent=1))
    return 0 if all(figures.get("ok") for figures in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
