#!/usr/bin/env python
"""Routed inference against the dense model and the ideal: prefill, decoding, memory, operations, overhead.

    python scripts/bench/inference.py --check --json inference.json --plot inference.png   about 25 CPU minutes
    python scripts/bench/inference.py --quick --check                                      under a minute
    python scripts/bench/inference.py --model outputs/quickstart/finetune                  a checkpoint's prefill
    python scripts/bench/inference.py --device cuda --shape 7b --dtypes bfloat16 --sizes 7b,13b --check

The ideal is a dense model of the same shape with the skipped layers removed, plus the measured time of their adapters;
embeddings and head count on both sides. Dense, routed and ideal passes take turns in one process; ratios are those of
one turn, numbers are medians with quartiles of at least five. Times are CPU time on one thread (wall time on a GPU).
Decoding starts from a cache of random keys and values, as a prefill of that plan leaves it. Plans are nested, and their
skips spread evenly over eight levels. Operations are counted by ``fuzzyroe.flops``; the closed form is their ratio.

With --check the exit status is 1 if a bar is not met or was not measured, and its line is named.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from fuzzyroe.routers import FuzzyRouter
from fuzzyroe.rules import load_rule_base
from scripts.bench.bench import Line, conditions, make_parser, markdown, report
from scripts.bench.speed import bars, checkpoint, grid, overhead
from scripts.bench.speed.decoders import SHAPES, Bench

SKIP_RATES = (0.25, 0.5)


def measure_lines(arguments: argparse.Namespace) -> Iterator[Line]:
    """Bars and overheads of one shape, or the prefill of a checkpoint."""
    if arguments.model:
        asked = (arguments.model, arguments.data, arguments.template, arguments.skip_rate, arguments.quick)
        yield from checkpoint.measure_checkpoint(*asked)
        return
    shape = SHAPES[arguments.shape or ("quick" if arguments.quick else "bar")]
    effort = bars.QUICK if arguments.quick else bars.FULL
    policy = FuzzyRouter(load_rule_base("default"), shape.layers)
    bench = Bench(shape, policy, getattr(torch, arguments.dtypes[0]), arguments.device)
    yield from bars.measure_bars(bench, effort, SKIP_RATES)
    yield from overhead.router_share(bench, effort.length)
    yield from overhead.decode_counts(bench, effort.length)
    yield from overhead.forward_overhead(bench, effort.length)
    if not arguments.quick:
        yield from overhead.policy_overheads(bench, effort.length)
        yield from bars.published_rule(bench, effort, 0.5)
        yield from overhead.skip_times_prune(shape, device=arguments.device)


def measure_cells(arguments: argparse.Namespace) -> list[grid.Cell]:
    """The table, printed."""
    names = ("sizes", "dtypes", "batches", "prompts", "skip_rates", "device", "max_seconds")
    cells = list(grid.measure_grid(**{name: getattr(arguments, name) for name in names}))
    print(markdown([grid.to_row(cell) for cell in cells]))
    return cells


def plot(lines: list[Line], path: Path) -> None:
    """Draw every line that says how much of the ideal is reached, with its quartiles and its bar."""
    from matplotlib.figure import Figure

    chosen = [line for line in lines if line.name.endswith(("ideal over routed", "of ideal throughput"))][::-1]
    figure = Figure(figsize=(9, 0.36 * len(chosen) + 1.0), layout="constrained")
    axes = figure.subplots()
    for row, line in enumerate(chosen):
        low, high = line.value - line.spread.lower, line.spread.upper - line.value
        axes.barh(row, line.value, height=0.62, color="#4477aa" if line.has_bar else "#bbbbbb")
        axes.errorbar(line.value, row, xerr=[[low], [high]], color="#222222", capsize=2, linewidth=1)
        if line.at_least is not None:
            axes.plot([line.at_least] * 2, [row - 0.42, row + 0.42], color="#cc3311", linewidth=2)
    axes.set_yticks(range(len(chosen)), [line.name.rsplit(":", 1)[0] for line in chosen], fontsize=8)
    axes.axvline(1, color="#222222", linewidth=0.8, linestyle=":")
    axes.set_xlim(left=0)
    axes.set_xlabel("ideal time over routed time; red: bar, grey: no bar, whiskers: quartiles", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def parse() -> argparse.Namespace:
    """Read the command line; lists are separated by commas."""

    def several(kind: type) -> object:
        return lambda text: tuple(kind(word) for word in text.split(","))

    parser = make_parser(__doc__, "a small shape, bars lower by 0.05, no table")
    parser.add_argument("--shape", choices=list(SHAPES), help="shape that the bars are measured on")
    parser.add_argument("--sizes", type=several(str), default=("bar", "1b", "7b", "13b"), help="shapes of the table")
    parser.add_argument("--batches", type=several(int), default=(1, 4, 8))
    parser.add_argument("--prompts", type=several(int), default=(64, 640, 2048))
    parser.add_argument("--skip-rates", type=several(float), default=(0.0, 0.25, 0.5))
    parser.add_argument("--dtypes", type=several(str), default=("float32",), help="the first is that of the bars")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-seconds", type=float, default=30.0, help="leave out cells of the table that take longer")
    parser.add_argument("--model", help="measure the prefill of this checkpoint instead")
    parser.add_argument("--data", type=Path, default=Path("playground/data/digits"), help="its test set")
    parser.add_argument("--template", default="digits")
    parser.add_argument("--skip-rate", type=float, default=0.25, help="mean skip rate asked of the checkpoint")
    parser.add_argument("--plot", type=Path, help="PNG file to draw the reached shares to")
    return parser.parse_args()


def main() -> None:
    """Measure, print, check."""
    arguments = parse()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def finish(lines: list[Line]) -> dict[str, object]:
        cells = [] if arguments.quick or arguments.model else measure_cells(arguments)
        if arguments.plot:
            plot(lines, arguments.plot)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {"cells": cells, "cpu_seconds": round(usage.ru_utime + usage.ru_stime)}

    report(arguments, measure_lines(arguments), conditions(arguments.device), finish)


if __name__ == "__main__":
    main()
