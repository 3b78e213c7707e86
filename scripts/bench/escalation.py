#!/usr/bin/env python
"""Escalated prefills against the ideal for the same net layers, at batch 1 and 8.

    python scripts/bench/escalation.py --check --json escalation.json   about 8 CPU minutes
    python scripts/bench/escalation.py --quick --check                  under a minute

All rows have one plan, which skips 7 of 16 layers, the first of them layer 5; 20 % of the rows are escalated to all
layers. So 30 % of the layers are skipped net: what a resumed row runs again counts twice. At batch 1 every fifth prompt
is escalated, at batch 8 one row in two of five batches and two rows in the others; the times of these prefills are
averaged by those shares. The ideal is a dense model without the skipped layers, plus the measured time of their
adapters, plus the layers that run again at the mean time of a layer. Planned, escalated, ideal and dense prefills take
turns in one process; a ratio is that of one turn. Times are CPU time on one thread (wall time on a GPU).
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from fuzzyroe import set_escalation
from fuzzyroe.escalation import Escalation
from fuzzyroe.resume import ALL_LAYERS, KEEP_PLAN
from fuzzyroe.routers import FuzzyRouter
from fuzzyroe.rules import load_rule_base
from scripts.bench.bench import Line, conditions, make_parser, report, take_turns
from scripts.bench.speed.decoders import SHAPES, Bench, Form

SHARE = 0.2
MOST = 1.10
"""Bar: escalated prefills take at most this much of the ideal."""

BATCHES = {1: {0: 1 - SHARE, 1: SHARE}, 8: {1: 0.4, 2: 0.6}}
"""Batch size -> escalated rows of a batch -> share of such batches."""


@dataclass(frozen=True)
class FirstRows(Escalation):
    """Asks its rules as ever, then escalates the first ``count`` rows of each batch."""

    count: int = 0

    def levels(self, doubts: np.ndarray) -> np.ndarray:
        """The first rows run all layers."""
        return np.where(np.arange(len(doubts)) < self.count, ALL_LAYERS, KEEP_PLAN)


def make_plan(num_layers: int) -> torch.Tensor:
    """A plan that skips 7 of 16 layers, every second one from 5 of 16 up and then the latest, (L,) bool."""
    order = [*range(num_layers * 5 // 16, num_layers, 2)]
    order += [layer for layer in reversed(range(order[0], num_layers)) if layer not in order]
    keep = torch.ones(num_layers, dtype=torch.bool)
    keep[order[: round(num_layers * 7 / 16)]] = False
    return keep


def net_skip_rate(keep: torch.Tensor) -> float:
    """Layers not run over layers, those that run again counted twice."""
    first = int(keep.long().argmin())
    return (int((~keep).sum()) - SHARE * (len(keep) - first)) / len(keep)


def measure_batch(bench: Bench, batch: int, length: int, repeats: int, most: float) -> Iterator[Line]:
    """Escalated prefills of one batch size against their ideal."""
    keep = make_plan(bench.shape.layers)
    num_skipped, num_again = int((~keep).sum()), bench.shape.layers - int(keep.long().argmin())
    form = bench.planned(keep.expand(batch, -1))

    def routed(escalation: Escalation | None) -> Any:
        set_escalation(bench.routed, escalation)
        return bench.prefill(form, batch, length)

    forms: dict[Any, Form] = {"ideal": bench.ideal(num_skipped), "dense": bench.whole()}
    escalations = {None: None} | {count: FirstRows.make("fuzzy", count=count) for count in BATCHES[batch]}
    calls = {count: functools.partial(routed, escalation) for count, escalation in escalations.items()}
    adapters = num_skipped * bench.adapter_seconds(batch, length)
    seconds = take_turns(bench.clock, repeats, {**calls, **bench.prefills(forms, batch, length)}, warm_up=True)
    mixed = [sum(share * seconds[count][turn] for count, share in BATCHES[batch].items()) for turn in range(repeats)]
    layer = [(dense - ideal) / num_skipped for dense, ideal in zip(seconds["dense"], seconds["ideal"], strict=True)]
    planned = [ideal + adapters for ideal in seconds["ideal"]]
    ideal = [time + SHARE * num_again * one for time, one in zip(planned, layer, strict=True)]
    what = f"net skip {net_skip_rate(keep):.0%}, prefill, batch {batch}"
    yield Line.ratio(f"{what}: escalated over ideal", mixed, ideal, at_most=most)
    yield Line.ratio(f"{what}: plan alone over its ideal", seconds[None], planned)
    yield Line.ratio(f"{what}: escalated of dense", mixed, seconds["dense"])
    for name, values in (("escalated", mixed), ("plan alone", seconds[None]), ("dense", seconds["dense"])):
        yield Line.of(f"{what}: {name}", values, 1e3, unit=" ms")


def measure(arguments: argparse.Namespace) -> Iterator[Line]:
    """All batch sizes."""
    shape = SHAPES["quick" if arguments.quick else "bar"]
    bench = Bench(shape, FuzzyRouter(load_rule_base("default"), shape.layers), device=arguments.device)
    length, most = (160, MOST + 0.05) if arguments.quick else (640, MOST)
    for batch in BATCHES:
        yield from measure_batch(bench, batch, length, arguments.repeats, most)


def main() -> None:
    """Measure, print, check."""
    parser = make_parser(__doc__, "a small shape, the bar higher by 0.05")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report(arguments, measure(arguments), conditions(arguments.device))


if __name__ == "__main__":
    main()
