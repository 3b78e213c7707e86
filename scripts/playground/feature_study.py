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
import itertools
import json
import logging
import platform
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from fuzzyroe.calibrate import Measurements, rank_correlation, skip_loss_increase
from fuzzyroe.routers import FuzzyRouter
from fuzzyroe.rules import FuzzyRuleBase, load_rule_base

if TYPE_CHECKING:
    from llava.train.router_fitting import Measurer

ROOT = Path(__file__).resolve().parents[2]
ALL_LINEAR = "all features, linear"


@dataclass(frozen=True)
class TripleResult:
    """What three features are worth.

    Attributes:
        names: The features.
        fitted: Rank correlation of score and loss increase on the half that was fitted to, mean of both ways.
        held_out: The same on the other half: the number to judge by.
        saving: Loss that the scores save on the held-out half against the same numbers of skips dealt out at random, as
            a share of what that random plan adds to the dense loss.
    """

    names: tuple[str, ...]
    fitted: float
    held_out: float
    saving: float


def make_measurer(
    model: str, records: Path, images: Path, samples: int, order_samples: int, score_samples: int, **options: Any
) -> Measurer:
    """Load a checkpoint and a set of digits questions for the forward passes of the router stage.

    Args:
        model: Checkpoint, routed or dense; a dense one is attached with adapters that change nothing.
        records: JSON of the questions.
        images: Folder of their images.
        samples, order_samples, score_samples: How much to measure, see ``CalibrationSize``.
        **options: ``max_skip_ratio`` of ``CalibrationSize``; ``seed``.
    """
    from llava.data.dataset import SFTCollator, SFTDataset
    from llava.model.builder import load_checkpoint
    from llava.model.families import count_image_tokens, get_image_token_id
    from llava.model.llava_llama import attach_routing, make_text_batches_safe
    from llava.train.router_fitting import CalibrationSize, Measurer

    seed = options.pop("seed", 0)
    checkpoint = load_checkpoint(model)
    network, config = checkpoint.model.eval(), checkpoint.model.config
    if checkpoint.routing is None:  # adapters of an unrouted model are the identity
        attach_routing(network, FuzzyRouter(load_rule_base("default"), config.text_config.num_hidden_layers), 1)
    make_text_batches_safe(network)
    image_places = count_image_tokens(config), get_image_token_id(config)
    dataset = SFTDataset(
        str(records),
        str(images),
        checkpoint.tokenizer,
        checkpoint.image_processor,
        "digits",
        *image_places,
        512,
        "square",
    )
    size = CalibrationSize(order_samples, samples, score_samples, 32, options.pop("max_skip_ratio", 0.5), **options)
    return Measurer(
        network,
        dataset,
        SFTCollator(checkpoint.tokenizer.pad_token_id),
        get_image_token_id(config),
        config.text_config.num_hidden_layers,
        size,
        torch.device("cpu"),
        seed,
        lambda line: print(line, flush=True),
    )


def measure(arguments: argparse.Namespace) -> tuple[Measurements, int]:
    """Run the forward passes of the router stage on a checkpoint; also gives its number of layers."""
    measurer = make_measurer(
        arguments.model,
        arguments.data / "digits_train.json",
        arguments.data / "images",
        arguments.samples,
        arguments.order_samples,
        2 * arguments.samples,
        max_skip_ratio=arguments.max_skip,
        seed=arguments.seed,
    )
    return measurer.measure(), measurer.num_layers


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
    """Rank correlations on the fitted and the held-out half, the saving on the latter, (3,), and its scores, (n,)."""
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


def judge_triples(measured: Measurements, num_layers: int, rate: float) -> list[TripleResult]:
    """All triples, the best on held-out samples first."""
    ways, results = halves(measured), []
    usable = [name for name, column in zip(measured.feature_names, measured.features.T, strict=True) if np.ptp(column)]
    for names in itertools.combinations(usable, 3):
        judged = [judge(rules_over(names, fit), fit, held, num_layers, rate)[0] for fit, held in ways]
        numbers = np.mean(judged, axis=0)
        results.append(TripleResult(names, *numbers.tolist()))
    return sorted(results, key=lambda result: -result.held_out)


def judge_shipped(name: str, measured: Measurements, num_layers: int, rate: float) -> TripleResult:
    """A shipped rule base, with its own rules."""
    base = load_rule_base(name)
    numbers = np.mean([judge(base, fit, held, num_layers, rate)[0] for fit, held in halves(measured)], axis=0)
    return TripleResult(tuple(variable.name for variable in base.antecedents), *numbers.tolist())


def compare_with_default(
    names: tuple[str, ...], measured: Measurements, num_layers: int, rate: float, draws: int = 200
) -> tuple[float, float]:
    """How much more a triple correlates on the held-out halves than the shipped default: 95 % bootstrap interval.

    Both score the same questions, so questions are drawn in pairs; most of what moves one correlation moves both.
    """
    rng, differences = np.random.default_rng(0), np.zeros(draws)
    for fit, held in halves(measured):
        targets = skip_loss_increase(held.losses)
        pair = [
            judge(base, fit, held, num_layers, rate)[1] for base in (rules_over(names, fit), load_rule_base("default"))
        ]
        for draw in range(draws):
            rows = rng.integers(len(targets), size=len(targets))
            found, default = (rank_correlation(scores[rows], targets[rows]) for scores in pair)
            differences[draw] += (found - default) / 2
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)


def judge_linear(measured: Measurements) -> tuple[float, float]:
    """Rank correlation of a ridge regression on all features, fitted and held out: what a triple could hope for."""
    results = []
    for fit, held in halves(measured):
        centre, spread = fit.features.mean(axis=0), fit.features.std(axis=0) + 1e-9
        design, targets = (fit.features - centre) / spread, skip_loss_increase(fit.losses)
        weights = np.linalg.solve(design.T @ design + np.eye(design.shape[1]), design.T @ (targets - targets.mean()))
        found = (held.features - centre) / spread @ weights
        results.append(
            (rank_correlation(design @ weights, targets), rank_correlation(found, skip_loss_increase(held.losses)))
        )
    return tuple(np.mean(results, axis=0).tolist())


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
    triples = judge_triples(measured, num_layers, rate)
    return {
        "turns": len(targets),
        "layers": num_layers,
        "layer_order": list(measured.layer_order),
        "mean_loss_by_skips": measured.losses.mean(axis=0).tolist(),
        "skip_rate": rate,
        "standard_error": 1 / np.sqrt(len(targets) - 1),
        "alone": dict(sorted(alone.items(), key=lambda item: -abs(item[1]["correlation"]))),
        "triples": [vars(result) for result in triples],
        "best_minus_default": compare_with_default(triples[0].names, measured, num_layers, rate),
        "shipped": {name: vars(judge_shipped(name, measured, num_layers, rate)) for name in ("default", "published")},
        "linear": dict(zip(("fitted", "held_out"), judge_linear(measured), strict=True)),
    }


def to_markdown(numbers: dict[str, Any], conditions: dict[str, Any], num_triples: int = 12) -> str:
    """The page for the docs."""
    losses = numbers["mean_loss_by_skips"]
    lines = [
        "# Which features predict the loss of skipping",
        "",
        "Written by `scripts/playground/feature_study.py`; all numbers: [feature_study.json](feature_study.json).",
        "",
        f"{numbers['turns']} turns of the digits playground, checkpoint `{conditions['model']}`, "
        f"{numbers['layers']} layers. A turn counts by its mean loss increase over the upper half of the skip counts. "
        f"The mean loss goes from {losses[0]:.3f} nats (dense) to {losses[len(losses) // 2]:.3f} with "
        f"{len(losses) // 2} layers skipped and {losses[-1]:.3f} with {len(losses) - 1}. Correlations are Spearman's, "
        f"their standard error without any effect is about {numbers['standard_error']:.3f} ("
        f"{numbers['standard_error'] * np.sqrt(2):.3f} on a half).",
        "",
        "## Alone",
        "",
        "| Feature | rank correlation | range (1 % to 99 %) |",
        "|---|---|---|",
    ]
    for name, entry in numbers["alone"].items():
        lines.append(f"| `{name}` | {entry['correlation']:+.3f} | {entry['low']:.4f} to {entry['high']:.4f} |")
    lines += [
        "",
        "## In triples",
        "",
        "The default rules over three features, fitted as the router stage does on one half of the samples, judged on "
        "the other, both ways averaged. *Saving*: of the loss that skipping adds at a mean skip rate of "
        f"{numbers['skip_rate']:g} when the same numbers of skips are dealt out at random, the share that the scores "
        f"avoid. The best of {len(numbers['triples'])} triples is a lucky one to some degree; differences below the "
        "standard error mean nothing.",
        "",
        "| Features | fitted half | held-out half | saving |",
        "|---|---|---|---|",
    ]
    for entry in numbers["triples"][:num_triples]:
        lines.append(_row(", ".join(f"`{name}`" for name in entry["names"]), entry))
    lines.append("| ... | | | |")
    for name, entry in numbers["shipped"].items():
        lines.append(_row(f"shipped rules `{name}`", entry))
    linear = numbers["linear"]
    lines.append(f"| {ALL_LINEAR} | {linear['fitted']:+.3f} | {linear['held_out']:+.3f} | |")
    low, high = numbers["best_minus_default"]
    lines += [
        "",
        f"The best triple correlates by {low:+.3f} to {high:+.3f} more than the default rules on the same held-out "
        "samples (95 % interval, bootstrap in pairs).",
        "",
        f"Made by `{conditions['command']}` in {conditions['seconds']:.0f} s, Python {conditions['python']}, torch "
        f"{conditions['torch']}, CPU.",
    ]
    return "\n".join(lines) + "\n"


def _row(label: str, entry: dict[str, Any]) -> str:
    return f"| {label} | {entry['fitted']:+.3f} | {entry['held_out']:+.3f} | {entry['saving']:+.1%} |"


def main() -> None:
    """Measure or read, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/quickstart/finetune", help="checkpoint, routed or dense")
    parser.add_argument("--data", type=Path, default=Path("playground/data/digits"))
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
        (measured, num_layers), model = measure(arguments), arguments.model
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
