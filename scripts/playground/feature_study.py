#!/usr/bin/env python
"""How well each feature predicts how much loss skipped layers add to a question, alone and in triples.

    python scripts/playground/feature_study.py --model outputs/quickstart/finetune    about 5 minutes on one CPU core
    python scripts/playground/feature_study.py --measured measured.npz                the tables again, without a model

Forward passes measure every turn's loss with the first k layers of a searched order skipped, and all raw features
before the first layer (``llava.train.router_fitting``). A triple is judged as the router stage would use it: rules,
knots, consequents and thresholds are fitted on one half of the samples and scored on the other, both ways. Writes
docs/feature_study.md and docs/feature_study.json.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from jinja2 import Environment

from fuzzyroe.calibrate import Measurements, rank_correlation, skip_loss_increase
from fuzzyroe.routers import FuzzyRouter
from fuzzyroe.rules import FuzzyRuleBase, load_rule_base

if TYPE_CHECKING:
    from llava.train.router_fitting import Measurer

ROOT = Path(__file__).resolve().parents[2]


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add --model and --data."""
    parser.add_argument("--model", default="outputs/quickstart/finetune", help="checkpoint, routed or dense")
    parser.add_argument("--data", type=Path, default=Path("playground/data/digits"), help="folder of the dataset")


def make_measurer(
    model: str, records: Path, images: Path, sizes: tuple[int, int, int], max_skip_ratio: float = 0.5, seed: int = 0
) -> Measurer:
    """Load a checkpoint and a set of digits questions for the forward passes of the router stage.

    A dense checkpoint is attached with adapters that change nothing. ``records`` is the JSON of the questions,
    ``images`` the folder of their images, ``sizes`` samples for the order of layers, for losses and for scores.
    """
    from llava.data.dataset import SFTCollator
    from llava.model.builder import load_checkpoint
    from llava.model.families import get_image_token_id
    from llava.model.llava_llama import attach_routing, make_text_batches_safe
    from llava.train.router_fitting import CalibrationSize, Measurer
    from playground.compare.answers import open_dataset

    checkpoint = load_checkpoint(model)
    network, config = checkpoint.model.eval(), checkpoint.model.config
    num_layers = config.text_config.num_hidden_layers
    if checkpoint.routing is None:  # adapters of an unrouted model are the identity
        attach_routing(network, FuzzyRouter(load_rule_base("default"), num_layers), 1)
    make_text_batches_safe(network)
    return Measurer(
        network,
        open_dataset(checkpoint, records, images),
        SFTCollator(checkpoint.tokenizer.pad_token_id),
        get_image_token_id(config),
        num_layers,
        CalibrationSize(*sizes, 32, max_skip_ratio),
        torch.device("cpu"),
        seed,
        functools.partial(print, flush=True),
    )


def save_measured(measured: Measurements, num_layers: int, model: str, path: Path) -> None:
    """Write measurements as an npz file."""
    arrays = {field.name: getattr(measured, field.name) for field in fields(measured)}
    known = {name: array for name, array in arrays.items() if array is not None}
    np.savez_compressed(path, num_layers=num_layers, model=model, **known)


def load_measured(path: Path) -> tuple[Measurements, int, str]:
    """Read what ``save_measured`` wrote: measurements, number of layers, name of the checkpoint."""
    arrays = np.load(path)
    names, order = tuple(arrays["feature_names"].tolist()), arrays["layer_order"].tolist()
    measured = Measurements(names, arrays["features"], arrays["losses"], order, arrays["score_features"])
    return measured, int(arrays["num_layers"]), str(arrays["model"])


def halves(measured: Measurements) -> list[tuple[Measurements, Measurements]]:
    """Both ways of fitting on one half of the samples and judging on the other.

    Rows are turns, sample by sample, so halves share at most one sample. The unlabelled rows behind the labelled ones
    belong to no half and serve both fits.
    """
    count = len(measured.losses)
    more = measured.score_features[count:]
    parts = []
    for rows in (slice(0, count // 2), slice(count // 2, count)):
        features = measured.features[rows]
        known = np.concatenate([features, more])
        parts.append(replace(measured, features=features, losses=measured.losses[rows], score_features=known))
    return [(parts[0], parts[1]), (parts[1], parts[0])]


def rules_over(names: tuple[str, ...], fit: Measurements) -> FuzzyRuleBase:
    """The default rules over other features, the one that correlates most first: it counts double in them."""
    targets, index = skip_loss_increase(fit.losses), fit.feature_names.index
    ordered = sorted(names, key=lambda name: -abs(rank_correlation(fit.features[:, index(name)], targets)))
    base = load_rule_base("default")
    variables = [replace(variable, name=name) for variable, name in zip(base.antecedents, ordered, strict=True)]
    return replace(base, antecedents=tuple(variables))


def judge(
    rule_base: FuzzyRuleBase, fit: Measurements, held: Measurements, num_layers: int, rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """What a rule base is worth, as the router stage would use it.

    Returns:
        Rank correlation of score and loss increase on the fitted and on the held-out half, and the saving: loss that
        the scores save on the held-out half against the same numbers of skips dealt out at random, as a share of what
        that random plan adds to the dense loss, (3,). And the scores of the held-out half, (n,).
    """
    router, report = FuzzyRouter(rule_base, num_layers).calibrate(fit, rate)
    with torch.no_grad():
        raw = torch.as_tensor(held.columns(router.antecedents)[0], dtype=torch.float32)
        scores = router.rules(router.scale(raw))
        skips = (1 - router.keep_weights(scores.unsqueeze(1))).sum(dim=-1).long().squeeze(1).numpy()  # (n,)
    dense = held.losses[:, 0].mean()
    routed = held.losses[np.arange(len(skips)), skips].mean()
    at_random = held.losses.mean(axis=0)[skips].mean()
    saving = (at_random - routed) / (at_random - dense)
    numbers = report["score_correlation"], rank_correlation(scores.numpy(), skip_loss_increase(held.losses)), saving
    return np.array(numbers), scores.double().numpy()


def judge_both_ways(
    make_rules: Callable[[Measurements], FuzzyRuleBase], measured: Measurements, num_layers: int, rate: float
) -> dict[str, Any]:
    """Names of the features of rules made for each half, and means of ``judge`` over both."""
    ways = [(make_rules(fit), fit, held) for fit, held in halves(measured)]
    numbers = np.mean([judge(*way, num_layers, rate)[0] for way in ways], axis=0).tolist()
    names = tuple(variable.name for variable in ways[0][0].antecedents)
    return {"names": names, **dict(zip(("fitted", "held_out", "saving"), numbers, strict=True))}


def compare_with_default(
    names: tuple[str, ...], measured: Measurements, num_layers: int, rate: float, draws: int = 200
) -> tuple[float, float]:
    """How much more a triple correlates on the held-out halves than the shipped default: 95 % bootstrap interval.

    Both score the same questions, so questions are drawn in pairs; most of what moves one correlation moves both.
    """
    rng, differences = np.random.default_rng(0), np.zeros(draws)
    for fit, held in halves(measured):
        targets = skip_loss_increase(held.losses)
        bases = rules_over(names, fit), load_rule_base("default")
        pair = [judge(base, fit, held, num_layers, rate)[1] for base in bases]
        for draw in range(draws):
            rows = rng.integers(len(targets), size=len(targets))
            found, default = (rank_correlation(scores[rows], targets[rows]) for scores in pair)
            differences[draw] += (found - default) / 2
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)


def judge_linear(measured: Measurements) -> dict[str, float]:
    """Rank correlation of a ridge regression on all features, fitted and held out: what a triple could hope for."""
    results = []
    for fit, held in halves(measured):
        centre, spread = fit.features.mean(axis=0), fit.features.std(axis=0) + 1e-9
        targets = skip_loss_increase(fit.losses)
        design, other = ((half.features - centre) / spread for half in (fit, held))
        weights = np.linalg.solve(design.T @ design + np.eye(design.shape[1]), design.T @ (targets - targets.mean()))
        known, unknown = rank_correlation(design @ weights, targets), skip_loss_increase(held.losses)
        results.append((known, rank_correlation(other @ weights, unknown)))
    return dict(zip(("fitted", "held_out"), np.mean(results, axis=0).tolist(), strict=True))


def study(measured: Measurements, num_layers: int, rate: float) -> dict[str, Any]:
    """All numbers, as plain data."""
    targets = skip_loss_increase(measured.losses)
    alone = {
        name: {
            "correlation": rank_correlation(column, targets),
            "low": float(np.quantile(column, 0.01)),
            "high": float(np.quantile(column, 0.99)),
        }
        for name, column in zip(measured.feature_names, measured.features.T, strict=True)
    }
    usable = [name for name, column in zip(measured.feature_names, measured.features.T, strict=True) if np.ptp(column)]
    triples = [
        {**judge_both_ways(functools.partial(rules_over, names), measured, num_layers, rate), "names": names}
        for names in itertools.combinations(usable, 3)
    ]
    triples.sort(key=lambda triple: -triple["held_out"])
    return {
        "turns": len(targets),
        "layers": num_layers,
        "layer_order": list(measured.layer_order),
        "mean_loss_by_skips": measured.losses.mean(axis=0).tolist(),
        "skip_rate": rate,
        "standard_error": 1 / np.sqrt(len(targets) - 1),
        "alone": dict(sorted(alone.items(), key=lambda item: -abs(item[1]["correlation"]))),
        "triples": triples,
        "best_minus_default": compare_with_default(triples[0]["names"], measured, num_layers, rate),
        "shipped": {
            name: judge_both_ways(lambda fit, name=name: load_rule_base(name), measured, num_layers, rate)
            for name in ("default", "published")
        },
        "linear": judge_linear(measured),
    }


def to_markdown(numbers: dict[str, Any], conditions: dict[str, Any], num_triples: int = 12) -> str:
    """The page for the docs, from the template beside this file."""
    text = Path(__file__).with_suffix(".md.jinja").read_text(encoding="utf-8")
    environment = Environment(trim_blocks=True, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(text).render(**conditions, **numbers, num_triples=num_triples)


def main() -> None:
    """Measure or read, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--samples", type=int, default=1024, help="samples with measured losses")
    parser.add_argument("--order-samples", type=int, default=192, help="samples that layers are ordered on")
    parser.add_argument("--max-skip", type=float, default=0.5, help="largest share of skipped layers")
    parser.add_argument("--skip-rate", type=float, default=0.3, help="mean skip rate of the saving")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measured", type=Path, help="npz file to read measurements from, or to write them to")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of feature_study.md and .json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("fuzzyroe.rules.variable").setLevel(logging.ERROR)  # text-only questions have constant features
    started = time.time()
    if arguments.measured and arguments.measured.exists():
        measured, num_layers, model = load_measured(arguments.measured)
    else:
        model, data, samples = arguments.model, arguments.data, arguments.samples
        records, sizes = data / "digits_train.json", (arguments.order_samples, samples, 2 * samples)
        measurer = make_measurer(model, records, data / "images", sizes, arguments.max_skip, arguments.seed)
        measured, num_layers = measurer.measure(), measurer.num_layers
        if arguments.measured:
            save_measured(measured, num_layers, model, arguments.measured)
    numbers = study(measured, num_layers, arguments.skip_rate)
    conditions = {
        "model": model,
        "command": f"python scripts/playground/feature_study.py --model {model} --samples {arguments.samples}",
        "seconds": time.time() - started,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    page = to_markdown(numbers, conditions)
    (arguments.output / "feature_study.md").write_text(page)
    (arguments.output / "feature_study.json").write_text(json.dumps({**conditions, **numbers}, indent=1) + "\n")
    print(page)


if __name__ == "__main__":
    main()
