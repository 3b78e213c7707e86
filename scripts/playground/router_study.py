#!/usr/bin/env python
"""One score with nested plans, a table per layer, or the same layers for all: losses on questions nobody was fitted to.

    python scripts/playground/router_study.py --model outputs/quickstart/finetune    about 15 minutes on one CPU core

Fits both fuzzy routers (``FuzzyRouter``, ``PerLayerFuzzyRouter``) to the same training questions, then
runs the test questions with the layers they keep. The static plan skips the first layers of the same order for all.
With --quick a few questions only, under a minute; --check fails if the fuzzy score loses more than the static plan.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from fuzzyroe.attach import find_decoder
from fuzzyroe.losses import answered_turns, turn_losses
from fuzzyroe.routers import FuzzyRouter, PerLayerFuzzyRouter, Router, StaticRouter
from fuzzyroe.rules import load_rule_base
from llava.train.router_fitting import Measurer
from scripts.bench.bench import Line, make_parser, report
from scripts.playground.feature_study import add_model_flags, make_measurer


@torch.no_grad()
def run(measurer: Measurer, router: Router, batches: list[dict[str, Tensor]], rate: float) -> tuple[float, float]:
    """Mean answer loss and observed skip rate of one router at one target rate."""
    router.set_skip_rate(rate)
    losses, kept = [], []
    for batch in batches:
        state = measurer.describe(batch)
        router.plan(measurer.decoder_input(batch, state), state)
        labels = batch["labels"]
        kept.append(state.result.keep_weights[answered_turns(labels, state.turn_ids, state.num_turns)])
        logits = measurer.run_model(batch, state).logits
        losses.append(turn_losses(logits, labels, state.turn_ids, state.num_turns))
    return float(torch.cat(losses).mean()), float(1 - torch.cat(kept).mean())


def measure(arguments: argparse.Namespace) -> Iterator[Line]:
    """Fit the routers, run them at every rate, compare the fuzzy score with the static plan."""
    questions, rates, samples = arguments.questions, arguments.rates, arguments.samples
    if arguments.quick:
        samples, questions, rates = 32, 32, [0.25]
    images, sizes = arguments.data / "images", (samples // 4, samples, samples * (1 if arguments.quick else 4))
    measurer = make_measurer(arguments.model, arguments.data / "digits_train.json", images, sizes)
    measured, num_layers = measurer.measure(single_layers=True), measurer.num_layers
    base = load_rule_base("default")
    routers: dict[str, Router] = {
        "static plan": StaticRouter(num_layers, measured.layer_order, criterion="calibration loss"),
        "fuzzy score, nested plans": FuzzyRouter(base, num_layers).calibrate(measured, rates[0])[0],
        "fuzzy table per layer": PerLayerFuzzyRouter(base, num_layers).calibrate(measured, rates[0])[0],
    }
    test = make_measurer(arguments.model, arguments.data / "digits_test.json", images, (1, 1, questions))
    test.samples = test.samples[:questions]
    batches, decoder, totals = list(test.batches(questions)), find_decoder(test.engine), []
    for name, router in routers.items():
        decoder.router = router
        totals.append(0.0)
        for rate in rates:
            loss, observed = run(test, router, batches, rate)
            totals[-1] += loss
            yield Line(f"{name}, target skip rate {rate:.2f}: mean loss", loss, note=f"skip rate {observed:.3f}")
    bar = None if arguments.quick else 0.0
    yield Line("fuzzy score minus static plan, sum over all rates", totals[1] - totals[0], None, bar, " nats")


def main() -> None:
    """Fit, run, print, check."""
    parser = make_parser(__doc__, "a few samples, one rate")
    add_model_flags(parser)
    parser.add_argument("--samples", type=int, default=512, help="training samples with measured losses")
    parser.add_argument("--questions", type=int, default=512, help="test questions")
    parser.add_argument("--rates", type=float, nargs="+", default=[3 / 12, 5 / 12])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report(arguments, measure(arguments))


if __name__ == "__main__":
    main()
