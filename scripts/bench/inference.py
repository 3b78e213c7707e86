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
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from fuzzyroe.routers import FuzzyRouter
from fuzzyroe.rules import load_rule_base
from scripts.bench.speed import bars, checkpoint, grid, overhead, pruning, report
from scripts.bench.speed.lines import Line
from scripts.bench.speed.passes import Bench
from scripts.bench.speed.shapes import SHAPES
from scripts.bench.speed.timing import cpu_seconds

SKIP_RATES = (0.25, 0.5)


def measure_lines(arguments: argparse.Namespace) -> Iterator[Line]:
    """Bars and overheads of one shape."""
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
        yield from pruning.skip_times_prune(shape, device=arguments.device)


def measure_cells(arguments: argparse.Namespace) -> list[grid.Cell]:
    """The table."""
    wanted = grid.Grid(
        sizes=arguments.sizes,
        dtypes=arguments.dtypes,
        batches=arguments.batches,
        prompts=arguments.prompts,
        skip_rates=arguments.skip_rates,
        device=arguments.device,
        repeats=5,
        max_seconds=arguments.max_seconds,
    )
    return list(grid.measure_grid(wanted))


def parse() -> argparse.Namespace:
    """Read the command line; lists are separated by commas."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), help="shape that the bars are measured on")
    parser.add_argument("--sizes", type=_words, default=("bar", "1b", "7b", "13b"), help="shapes of the table")
    parser.add_argument("--batches", type=_numbers(int), default=(1, 4, 8))
    parser.add_argument("--prompts", type=_numbers(int), default=(64, 640, 2048))
    parser.add_argument("--skip-rates", type=_numbers(float), default=(0.0, 0.25, 0.5))
    parser.add_argument("--dtypes", type=_words, default=("float32",), help="the first is that of the bars")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-seconds", type=float, default=30.0, help="leave out cells of the table that take longer")
    parser.add_argument("--model", help="measure the prefill of this checkpoint instead")
    parser.add_argument("--data", type=Path, default=Path("playground/data/digits"), help="its test set")
    parser.add_argument("--template", default="digits")
    parser.add_argument("--skip-rate", type=float, default=0.25, help="mean skip rate asked of the checkpoint")
    parser.add_argument("--quick", action="store_true", help="a small shape, bars lower by 0.05, no table")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--plot", type=Path, help="PNG file to draw the reached shares to")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bar is not met")
    return parser.parse_args()


def main() -> None:
    """Measure, print, check."""
    arguments = parse()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, Any] = {"conditions": report.conditions(arguments.device)}
    print(result["conditions"])
    if arguments.model:
        asked = (arguments.model, arguments.data, arguments.template, arguments.skip_rate, arguments.quick)
        result["checkpoint"] = checkpoint.measure_checkpoint(*asked)
        print(result["checkpoint"])
        lines = [result["checkpoint"].line()]
    else:
        lines = [_shown(line) for line in measure_lines(arguments)]
    result["lines"] = lines
    if not (arguments.quick or arguments.model):
        result["cells"] = measure_cells(arguments)
        print(report.table(result["cells"]))
    if arguments.plot:
        report.plot(lines, arguments.plot)
    if arguments.json:
        result["cpu_seconds"] = round(cpu_seconds())
        arguments.json.write_text(json.dumps(result, indent=1, default=report.as_json) + "\n", encoding="utf-8")
    missed = [line for line in lines if not line.is_met]
    if arguments.check and missed:
        sys.exit("bars not met:\n" + "\n".join(map(str, missed)))


def _shown(line: Line) -> Line:
    print(line, flush=True)
    return line


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(kind: type) -> object:
    def parse(text: str) -> tuple:
        return tuple(kind(word) for word in text.split(","))

    return parse


if __name__ == "__main__":
    main()
