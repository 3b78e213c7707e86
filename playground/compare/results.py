"""Writes docs/results.md and its figures from the cells.

python -m playground.compare.results --cells docs/results/cells --output docs/results
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from fuzzyroe.plots import render_svg
from playground.compare.page import write_page
from playground.compare.plots import draw_accuracy, draw_router_cost
from playground.compare.summary import Results

FIGURES = {"accuracy.svg": draw_accuracy, "router_cost.svg": draw_router_cost}


def render(results: Results) -> dict[str, str]:
    """The page, under the name ``results.md``, and its figures, by file name."""
    figures = {name: render_svg(functools.partial(draw, results)) for name, draw in FIGURES.items()}
    return {"results.md": write_page(results), **figures}


def main() -> None:
    """Read the cells, write the page beside the folder of figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, default=Path("docs/results/cells"), help="folder of the cells' files")
    parser.add_argument(
        "--output", type=Path, default=Path("docs/results"), help="folder of figures; the page goes beside it"
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, text in render(Results.read(arguments.cells)).items():
        path = arguments.output.with_suffix(".md") if name == "results.md" else arguments.output / name
        path.write_text(text, encoding="utf-8")
        print(f"compare: {path} written")


if __name__ == "__main__":
    main()
