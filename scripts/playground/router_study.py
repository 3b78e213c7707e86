#!/usr/bin/env python
"""One score with nested plans, a table per layer, or the same layers for all: losses on questions nobody was fitted to.

    python scripts/playground/router_study.py --model outputs/quickstart/finetune    about 15 minutes on one CPU core

Fits both fuzzy routers (``FuzzyRouter``, ``PerLayerFuzzyRouter``) to the same training questions, then
runs the test questions with the layers they keep. The static plan skips the first layers of the same order for all.
With --quick a few questions only, under a minute; --check fails if the fuzzy score loses no less than the static plan.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from fuzzyroe.attach import find_decoder
from fuzzyroe.losses import answered_turns, turn_losses
from fuzzyroe.routers import FuzzyRouter, PerLayerFuzzyRouter, Router, StaticRouter
from fuzzyroe.rules import load_rule_base
from llava.train.router_fitting import Measurer
from scripts.playground.feature_study import make_measurer


@torch.no_grad()
def run(measurer: Measurer, router: Router, batches: list[dict[str, Tensor]], rate: float) -> dict[str, float]:
    """Mean answer loss and met skip rate of one router at one requested rate."""
    router.set_skip_rate(rate)
    losses, kept = [], []
    for batch in batches:
        state = measurer.describe(batch)
        router.plan(measurer.decoder_input(batch, state), state)
        labels = batch["labels"]
        kept.append(state.result.keep_weights[answered_turns(labels, state.turn_ids, state.num_turns)])
        logits = measurer.run_model(batch, state).logits
        losses.append(turn_losses(logits, labels, state.turn_ids, state.num_turns))
    return {"requested": rate, "met": float(1 - torch.cat(kept).mean()), "loss": float(torch.cat(losses).mean())}


def main() -> None:
    """Fit, run, print, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/quickstart/finetune", help="routed checkpoint")
    parser.add_argument("--data", type=Path, default=Path("playground/data/digits"))
    parser.add_argument("--samples", type=int, default=512, help="training samples with measured losses")
    parser.add_argument("--questions", type=int, default=512, help="test questions")
    parser.add_argument("--rates", type=float, nargs="+", default=[3 / 12, 5 / 12])
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--quick", action="store_true", help="a few samples, one rate")
    parser.add_argument("--check", action="store_true", help="exit 1 if the fuzzy score is no better than static")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.samples, arguments.questions, arguments.rates = 32, 32, [0.25]
    torch.set_num_threads(1)
    images, samples = arguments.data / "images", arguments.samples
    sizes = (samples, samples // 4, samples * (1 if arguments.quick else 4))
    measurer = make_measurer(arguments.model, arguments.data / "digits_train.json", images, *sizes)
    measured, num_layers = measurer.measure(single_layers=True), measurer.num_layers
    base, rate = load_rule_base("default"), arguments.rates[0]
    routers: dict[str, Router] = {
        "static plan": StaticRouter(num_layers, measured.layer_order, criterion="calibration loss"),
        "fuzzy score, nested plans": FuzzyRouter(base, num_layers).calibrate(measured, rate)[0],
        "fuzzy table per layer": PerLayerFuzzyRouter(base, num_layers).calibrate(measured, rate)[0],
    }
    test = make_measurer(arguments.model, arguments.data / "digits_test.json", images, 1, 1, arguments.questions)
    test.samples, batches = test.samples[: arguments.questions], []
    batches.extend(test.batches(arguments.questions))
    results: dict[str, Any] = {}
    decoder = find_decoder(test.engine)
    for name, router in routers.items():
        decoder.router = router
        results[name] = [run(test, router, batches, rate) for rate in arguments.rates]
        for row in results[name]:
            print(
                f"{name:<28} requested {row['requested']:.2f}  met {row['met']:.3f}  mean loss {row['loss']:.4f}",
                flush=True,
            )
    if arguments.json:
        numbers = {"samples": samples, "questions": arguments.questions, "layer_order": measured.layer_order, **results}
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n")
    static, fuzzy = (sum(row["loss"] for row in results[name]) for name in list(routers)[:2])
    if arguments.check and not arguments.quick and fuzzy >= static:
        sys.exit(f"the fuzzy score loses {fuzzy:.4f} nats over all rates, the static plan {static:.4f}")


if __name__ == "__main__":
    main()
