"""Writes docs/results.md and its figures from the cells.

python -m playground.compare.results --cells docs/results/cells --output docs/results
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from fuzzyroe.plots import render_svg
from playground.compare.page import READING_FILE, reading_mark, write_page
from playground.compare.plots import draw_accuracy, draw_router_cost
from playground.compare.summary import Results

FIGURES = {"accuracy.svg": draw_accuracy, "router_cost.svg": draw_router_cost}


def render(results: Results, reading: str = "") -> dict[str, str]:
    """The page, under the name ``results.md``, and its figures, by file name; ``reading`` as for ``write_page``."""
    figures = {name: render_svg(functools.partial(draw, results)) for name, draw in FIGURES.items()}
    return {"results.md": write_page(results, reading), **figures}


def main() -> None:
    """Read the cells, write the page beside the folder of figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, default=Path("docs/results/cells"), help="folder of the cells' files")
    parser.add_argument(
        "--output", type=Path, default=Path("docs/results"), help="folder of figures; the page goes beside it"
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results, reading = Results.read(arguments.cells), arguments.output / READING_FILE
    read = reading.read_text(encoding="utf-8") if reading.exists() else ""
    if read and not read.startswith(reading_mark(results)):
        print(f"compare: {reading} is about other cells and left out; read these and begin it with", end=" ")
        print(reading_mark(results))
    for name, text in render(results, read).items():
        path = arguments.output.with_suffix(".md") if name == "results.md" else arguments.output / name
        path.write_text(text, encoding="utf-8")
        print(f"compare: {path} written")


if __name__ == "__main__":
    main()
