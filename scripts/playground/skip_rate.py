#!/usr/bin/env python
"""Whether requested mean skip rates are met on questions that calibration has not seen.

    python scripts/playground/skip_rate.py --model outputs/quickstart/finetune --check    about a minute on one CPU core

Reads the features of held-out questions by forward passes, then asks the checkpoint's router for several rates; nothing
is fitted here. The default are those drawn for the router stage: the finetune stage set its thresholds on others of
their kind. Where the mix of questions is another one, so is the mean rate: the test questions (--questions
playground/data/digits/digits_test.json) hold fewer easy images. With --check the exit status is 1 if a rate is missed
by more than a point, or if the router's quantiles come from fewer than 4,000 training questions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from fuzzyroe.attach import find_decoder
from fuzzyroe.features import FEATURES
from fuzzyroe.routers.fuzzy import FuzzyRouter
from scripts.playground.feature_study import make_measurer

TOLERANCE = 0.01
MIN_SCORES = 4000
STEP = 0.05


def met_rates(router: FuzzyRouter, raw_features: torch.Tensor) -> list[tuple[float, float]]:
    """Requested and met mean skip rates, from raw features of the router's antecedents, (n, K)."""
    scores = router.rules(router.scale(raw_features)).unsqueeze(1)  # (n, 1), or (n, 1, L) with a table per layer
    steps = int(router.max_skip_ratio / STEP + 1e-6)
    rates = [STEP * step for step in range(1, steps + 1)]
    return [(rate, float(1 - router.keep_weights(scores, rate).mean())) for rate in rates]


@torch.no_grad()
def main() -> None:
    """Measure, print, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/quickstart/finetune", help="routed checkpoint")
    parser.add_argument("--data", type=Path, default=Path("playground/data/digits"))
    parser.add_argument("--questions", type=Path, help="JSON of the questions; default stages.router.json of --data")
    parser.add_argument("--samples", type=int, default=2600, help="records to read")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--quick", action="store_true", help="500 records")
    parser.add_argument("--check", action="store_true", help="exit 1 where a rate is missed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.time()
    num_samples = 500 if arguments.quick else arguments.samples
    questions = arguments.questions or arguments.data / "stages.router.json"
    measurer = make_measurer(arguments.model, questions, arguments.data / "images", 1, 1, num_samples)
    router = find_decoder(measurer.engine).router
    columns = [list(FEATURES).index(name) for name in router.antecedents]
    raw = measurer.raw_features(measurer.batches(num_samples))[:, columns]
    trained_on = router.rule_base.provenance["knots"]["examples"]
    rows = met_rates(router, raw)
    worst = max(abs(met - rate) for rate, met in rows)
    seconds = time.time() - started
    print(f"{len(raw)} questions of {questions.name}, quantiles of {trained_on} training questions, {seconds:.0f} s")
    for rate, met in rows:
        print(f"skip rate {met:.4f} (requested {rate:.2f}, off by {100 * (met - rate):+.2f} points)")
    print(f"largest miss {100 * worst:.2f} points")
    if arguments.json:
        numbers = {"questions": len(raw), "score_examples": trained_on, "rates": rows, "largest_miss": worst}
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n")
    # few questions have another mean by chance: only the full number can miss the bar
    if arguments.check and (trained_on < MIN_SCORES or (worst > TOLERANCE and not arguments.quick)):
        sys.exit(f"missed: at most {100 * TOLERANCE:g} points from at least {MIN_SCORES} scores are allowed")


if __name__ == "__main__":
    main()
