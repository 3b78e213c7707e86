#!/usr/bin/env python
"""What the fuzzy router costs, how exact it is, and how much its calibration recovers, in one run.

    python scripts/bench/router.py --check --json router.json       about two minutes on one CPU core; no model, no data
    python scripts/bench/router.py --quick                          fewer repeats, under a minute

Times are CPU time of this process on one thread, medians over blocks of calls that take turns; only ratios of times
carry over to other machines. With --check the exit status is 1 if a bar is not met, and its line is named.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from fuzzyroe.calibrate import Measurements
from fuzzyroe.features import FEATURES
from fuzzyroe.routers.fuzzy import FuzzyRouter
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.rules import (
    Consequent,
    FuzzyRuleBase,
    LinguisticVariable,
    compile_rule_base,
    load_rule_base,
    skfuzzy_bridge,
)
from fuzzyroe.rules.fitting import project_missing
from scripts.bench.bench import Clock, Line, conditions, make_parser, report

NUM_LAYERS, BATCH, WIDTH, TOKENS = 32, 64, 4096, 640
THREE_TERMS = ("low", "medium", "high")
BORDERS = (0.0, 0.33, 0.67, 1.0)
"""Borders of the published boxes, open at the top: a feature of exactly 1.0 matches none, nor does a negative one."""
EQUAL_MASS = (1 / 6, 1 / 2, 5 / 6)
"""Knots at which three terms share uniform features equally."""


def medians(repeats: int, block: int, **calls: Callable[[], Any]) -> dict[str, float]:
    """Median CPU seconds of each call; blocks of calls take turns, and the first call of a block is not timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()
            times[name].append(Clock().seconds(lambda call=call: [call() for _ in range(block)]) / block)
    return {name: statistics.median(values) for name, values in times.items()}


def calibrated_router() -> FuzzyRouter:
    """A router with a full table of budgets, set to skip 0.3."""
    return FuzzyRouter(load_rule_base("default"), NUM_LAYERS).calibrate(planted_measurements(), 0.3)[0].eval()


PublishedRules = list[tuple[tuple[int, ...], float]]
"""Box, as the number of its interval per feature, and raw score in [0, 1.5], in the published order."""


def published_rules() -> PublishedRules:
    """The fifteen published rules."""
    table = load_rule_base("published_raw").table
    return [(cell, float(table[cell])) for cell in map(tuple, np.argwhere(~np.isnan(table)).tolist())]


def match_box(point: Sequence[float], rules: PublishedRules) -> float | None:
    """Score of the box that a point lies in, None where no rule has it."""
    for levels, value in rules:
        if all(BORDERS[k] <= x < BORDERS[k + 1] for x, k in zip(point, levels, strict=True)):
            return value
    return None


def interpolate_nearest_two(point: Sequence[float], rules: PublishedRules) -> float:
    """Score by the two nearest box centres, each weighted by the distance of the other; of equal ones the first."""
    pairs = []
    for levels, value in rules:
        centre = [(BORDERS[k] + BORDERS[k + 1]) / 2 for k in levels]
        pairs.append((sum((x - c) ** 2 for x, c in zip(point, centre, strict=True)) ** 0.5, value))
    (d1, v1), (d2, v2) = sorted(pairs, key=lambda pair: pair[0])[:2]
    return (d2 * v1 + d1 * v2) / (d1 + d2)


def published_loop(points: Sequence[Sequence[float]], rules: PublishedRules) -> list[float]:
    """Score elements as published: one by one, box by box, else by the two nearest centres."""
    matched = [match_box(point, rules) for point in points]
    return [
        interpolate_nearest_two(p, rules) if score is None else score for p, score in zip(points, matched, strict=True)
    ]


@torch.no_grad()
def time_decisions(repeats: int) -> list[Line]:
    """All layers of a batch, features given, beside linear routers, the published loop and scikit-fuzzy."""
    router = calibrated_router()
    linears = [nn.Linear(2 * WIDTH, 2) for _ in range(NUM_LAYERS)]
    states, raw = torch.randn(BATCH, 2 * WIDTH), torch.rand(BATCH, 1, 3)
    rules, points = published_rules(), raw[:, 0].tolist()
    names = list(router.antecedents)
    system = skfuzzy_bridge.to_control_system(router.rule_base)
    fast = medians(
        repeats,
        10,
        fuzzy=lambda: router.keep_weights(router.rules(router.scale(raw))),
        linear=lambda: [linear(states).softmax(dim=-1) for linear in linears],
    )
    slow = medians(
        max(2, repeats // 20),
        1,
        loop=lambda: published_loop(points, rules),
        skfuzzy=lambda: skfuzzy_bridge.evaluate(system, np.array(points), names, "execute_weight"),
    )
    share, what = 100 * fast["fuzzy"] / fast["linear"], f"{NUM_LAYERS} x (Linear({2 * WIDTH}, 2) + softmax)"
    decisions = f"decisions of {NUM_LAYERS} layers, B = {BATCH}, features given, of {what}"
    per_layer = f"per layer x {NUM_LAYERS}"
    return [
        Line(decisions, share, at_most=5.0, unit=" %"),
        Line("  fuzzy router, all layers", 1e3 * fast["fuzzy"], unit=" ms"),
        Line(f"  {NUM_LAYERS} linear routers", 1e3 * fast["linear"], unit=" ms"),
        Line(f"  published loop over elements, {per_layer}", 1e3 * NUM_LAYERS * slow["loop"], unit=" ms"),
        Line(f"  scikit-fuzzy, {per_layer}", 1e3 * NUM_LAYERS * slow["skfuzzy"], unit=" ms"),
    ]


@torch.no_grad()
def time_planning(repeats: int) -> list[Line]:
    """Features and decisions of one prompt beside the decoder layers that they decide about."""
    router = calibrated_router()
    states = torch.randn(1, TOKENS, WIDTH)
    image = (torch.arange(TOKENS) < 576).unsqueeze(0)

    def plan() -> None:
        router.plan(states, RoutingState((~image).long(), image, ~image, "hard", num_turns=1))

    planning = medians(10, 5, plan=plan)["plan"]
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=11008, num_attention_heads=32)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, layer_idx=0)
    layer = layer.to_empty(device="cpu").eval()
    for parameter in layer.parameters():
        parameter.fill_(1e-3)
    rotary = LlamaRotaryEmbedding(config)(states, torch.arange(TOKENS).unsqueeze(0))
    forward = medians(repeats, 1, layer=lambda: layer(states, position_embeddings=rotary))["layer"]
    share = 100 * planning / (NUM_LAYERS * forward)
    return [
        Line(f"router with its features, one prompt, of {NUM_LAYERS} decoder layers", share, at_most=1.0, unit=" %"),
        Line("  features and decisions", 1e3 * planning, unit=" ms"),
        Line(f"  one decoder layer, width {WIDTH}, {TOKENS} tokens", 1e3 * forward, unit=" ms"),
    ]


def planted_measurements() -> Measurements:
    """500 examples whose losses grow with their first feature, as forward passes would measure them."""
    rng = np.random.default_rng(0)
    features = rng.random((500, len(FEATURES)))
    increase = np.exp(2 * features[:, :1] - 1) * np.linspace(0, 1, NUM_LAYERS // 2 + 1) ** 2
    losses = 0.5 + increase + 0.05 * rng.standard_normal(increase.shape)
    order = list(range(1, NUM_LAYERS // 2 + 1))
    return Measurements(tuple(FEATURES), features, losses, order, rng.random((4096, len(FEATURES))))


def time_fit() -> list[Line]:
    """The whole fit of a router to measured examples: knots, 27 consequents, quantiles, L thresholds per budget."""
    base, measured = load_rule_base("default"), planted_measurements()
    seconds = medians(3, 1, fit=lambda: FuzzyRouter(base, NUM_LAYERS).calibrate(measured, 0.3))["fit"]
    return [Line(f"fit of 27 consequents and {NUM_LAYERS} layers to 500 examples", seconds, at_most=1.0, unit=" s")]


@torch.no_grad()
def firing_error(count: int = 10_000) -> list[Line]:
    """Largest difference of firing strengths between the float32 module and scikit-fuzzy."""
    rule_base = load_rule_base("default").interpolate()
    points = np.random.default_rng(0).random((count, 3)).astype(np.float32)
    expected = skfuzzy_bridge.firing_strengths(rule_base, points.astype(np.float64))
    actual = compile_rule_base(rule_base).firing_strengths(torch.from_numpy(points)).double().numpy()
    error = np.abs(actual - expected).max()
    return [Line(f"firing strengths against scikit-fuzzy, float32, {count} points", error, at_most=1e-6)]


def recover(repeats: int) -> list[Line]:
    """Fit to noisy targets of a planted truth: prior plus 0.1 noise made monotone, targets with sd 0.2."""
    prior = load_rule_base("default").interpolate().with_knots([EQUAL_MASS] * 3)
    rng, free, sizes = np.random.default_rng(0), np.zeros(prior.shape, dtype=bool), (25, 50, 100, 200, 500, 1000)
    test = prior.firing_strengths(rng.random((2000, 3)))
    errors: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    for _ in range(repeats):
        noisy = np.clip(prior.output_table + 0.1 * rng.standard_normal(prior.shape), 0, 1)
        truth = project_missing(noisy, free, prior.signs).ravel()
        for size in sizes:
            features = rng.random((size, 3))
            targets = prior.firing_strengths(features) @ truth + 0.2 * rng.standard_normal(size)
            tables = (prior.fit(features, targets).output_table.ravel(), prior.output_table.ravel())
            errors[size].append(tuple(float(np.sqrt(np.mean((test @ (table - truth)) ** 2))) for table in tables))
    bars, lines = {100: 0.060, 500: 0.040, 1000: 0.030}, []
    for size, pairs in errors.items():
        fitted, before = np.mean(pairs, axis=0)
        lines.append(Line(f"recovery from {size} examples, RMSE, mean of {repeats}", fitted, at_most=bars.get(size)))
        share = 100 * fitted / before
        lines.append(Line("  as a share of the error of the expert's rules alone", share, at_most=100.0, unit=" %"))
    return lines


def draw_structured(rng: np.random.Generator) -> np.ndarray:
    """A monotone table, (3, 3, 3): main effects of random shape and importance, 0.1 noise, made monotone."""
    effects = np.meshgrid(*(np.sort(rng.random(3)) for _ in range(3)), indexing="ij")
    table = np.tensordot(rng.dirichlet(np.ones(3)), effects, axes=1) + 0.1 * rng.standard_normal((3, 3, 3))
    return np.clip(project_missing(table, np.zeros((3, 3, 3), dtype=bool), (1, 1, 1)), 0, 1)


def draw_unstructured(rng: np.random.Generator) -> np.ndarray:
    """A monotone table, (3, 3, 3): uniform numbers, sorted along every axis."""
    return np.sort(np.sort(np.sort(rng.random((3, 3, 3)), axis=0), axis=1), axis=2)


def complete(draw: Callable[[np.random.Generator], np.ndarray], draws: int) -> tuple[float, int]:
    """Complete random monotone tables of which 15 to 17 rules are kept; RMSE of the others and wrong orders."""
    rng, errors, violations = np.random.default_rng(0), [], 0
    variables = [LinguisticVariable(name, (0, 1), THREE_TERMS, (0, 0.5, 1), "increasing") for name in "abc"]
    for _ in range(draws):
        truth, kept = draw(rng), np.zeros(27, dtype=bool)
        kept[rng.choice(27, rng.integers(15, 18), replace=False)] = True
        table = np.where(kept.reshape(truth.shape), truth, np.nan)
        source = np.where(np.isnan(table), "none", "expert")
        completed = FuzzyRuleBase("drawn", variables, table, source, Consequent("y", (0, 1))).interpolate()
        errors.append(np.sqrt(np.mean((completed.table - truth)[np.isnan(table)] ** 2)))
        violations += len(completed.monotonicity_violations())
    return float(np.mean(errors)), violations


def completion(draws: int) -> list[Line]:
    """Default completion of random monotone rule bases."""
    structured, unstructured = complete(draw_structured, draws), complete(draw_unstructured, draws)
    return [
        Line(f"completion of {draws} random monotone rule bases, RMSE of missing rules", structured[0], at_most=0.085),
        Line("  rules in the wrong order", structured[1] + unstructured[1], at_most=0),
        Line("  the same for tables of sorted uniform numbers, without main effects", unstructured[0]),
    ]


def measure(quick: bool) -> Iterator[Line]:
    """All lines."""
    yield from time_decisions(40 if quick else 200)
    yield from time_planning(1 if quick else 5)
    yield from time_fit()
    yield from firing_error()
    yield from recover(30 if quick else 100)
    yield from completion(150)


def main() -> None:
    """Measure, print, check."""
    arguments = make_parser(__doc__, "fewer repeats").parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stated = conditions(what=f"numpy {np.__version__}, float32, CPU time of one thread")
    report(arguments, measure(arguments.quick), stated)


if __name__ == "__main__":
    main()
