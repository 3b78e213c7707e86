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
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from fuzzyroe.attach import find_decoder
from fuzzyroe.features import FEATURES
from fuzzyroe.routers.fuzzy import FuzzyRouter
from scripts.bench.bench import Line, make_parser, report
from scripts.playground.feature_study import add_model_flags, make_measurer

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
def measure(arguments: argparse.Namespace) -> Iterator[Line]:
    """Every rate, the largest miss and what the quantiles come from."""
    num_samples = 500 if arguments.quick else arguments.samples
    questions = arguments.questions or arguments.data / "stages.router.json"
    measurer = make_measurer(arguments.model, questions, arguments.data / "images", (1, 1, num_samples))
    router = find_decoder(measurer.engine).router
    columns = [list(FEATURES).index(name) for name in router.antecedents]
    raw = measurer.raw_features(measurer.batches(num_samples))[:, columns]
    rows = met_rates(router, raw)
    for rate, met in rows:
        yield Line(f"skip rate, target {rate:.2f}", met, note=f"off by {100 * (met - rate):+.2f} points")
    # few questions have another mean by chance: only the full number can miss the bar
    bar, what = None if arguments.quick else 100 * TOLERANCE, f"{len(raw)} questions of {questions.name}"
    yield Line("largest miss", 100 * max(abs(met - rate) for rate, met in rows), None, bar, " points", note=what)
    yield Line("training questions of the quantiles", router.rule_base.provenance["knots"]["examples"], MIN_SCORES)


def main() -> None:
    """Measure, print, check."""
    parser = make_parser(__doc__, "500 records")
    add_model_flags(parser)
    parser.add_argument("--questions", type=Path, help="JSON of the questions; default stages.router.json of --data")
    parser.add_argument("--samples", type=int, default=2600, help="records to read")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report(arguments, measure(arguments))


if __name__ == "__main__":
    main()
