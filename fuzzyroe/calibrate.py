"""Fitting a fuzzy router to measured examples: the whole of FuzzyRoE's router stage once the forward passes are done.

No gradient and no optimizer: feature ranges and knots are quantiles, consequents are a ridge fit to the expert rules,
thresholds follow from measured losses. Everything runs in numpy within a second, the same on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fuzzyroe.budget import BudgetTable, allocate
from fuzzyroe.routers.fuzzy import NUM_QUANTILES, FuzzyRouter
from fuzzyroe.rules.rule_base import FuzzyRuleBase

TARGET_RANGE = (-1.0, 4.0)
"""Loss increases are cut to this range, so that a few hopeless examples do not decide the fit."""

TARGET_SPREAD = 0.25
"""Standard deviation of the fitted targets around 0.5, that of the expert rules' own outputs."""


@dataclass(frozen=True)
class Measurements:
    """What forward passes have measured.

    Attributes:
        feature_names: Names of the raw features, in column order.
        features: Raw features of the examples whose losses are known, (n, K).
        losses: Loss of each when the first k layers of the order are skipped, (n, K_max + 1).
        layer_order: Layers, first to be skipped first.
        score_features: Raw features of more examples, whose losses are not needed, (m, K).
        layer_losses: Loss of each when one layer alone is skipped, (n, L), or None; of the first layer, which is never
            skipped, the dense loss.
    """

    feature_names: tuple[str, ...]
    features: np.ndarray
    losses: np.ndarray
    layer_order: list[int]
    score_features: np.ndarray
    layer_losses: np.ndarray | None = None

    def columns(self, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Labelled and unlabelled raw features of some names, (n, len(names)) and (m, len(names))."""
        index = [self.feature_names.index(name) for name in names]
        return self.features[:, index], self.score_features[:, index]


def suffering(losses: np.ndarray) -> np.ndarray:
    """How much an example loses when about a third of the calibrated layers and more are skipped.

    Args:
        losses: Losses by number of skipped layers, (n, K_max + 1).

    Returns:
        Mean loss increase over the upper half of the skip counts, cut to ``TARGET_RANGE``, (n,).
    """
    increase = losses[:, 1:] - losses[:, :1]
    return increase[:, increase.shape[1] // 2 :].mean(axis=1).clip(*TARGET_RANGE)


@dataclass(frozen=True)
class Prepared:
    """What fits of consequents start from.

    Attributes:
        prior: The expert's rules, completed, turned where the data contradict them, with knots at quantiles.
        targets: How much each labelled example suffers, (n,).
        low, high: Raw feature values that map to 0 and 1, (K,).
        labelled, unlabelled: Raw features, (n, K) and (m, K).
        correlations: Rank correlation of each feature with the targets, (K,).
        flips: -1 for features whose declared direction was turned, else 1, (K,).
    """

    prior: FuzzyRuleBase
    targets: np.ndarray
    low: np.ndarray
    high: np.ndarray
    labelled: np.ndarray
    unlabelled: np.ndarray
    correlations: list[float]
    flips: list[int]

    @property
    def scaled(self) -> np.ndarray:
        """Features of the labelled examples in [0, 1], (n, K)."""
        return scale(self.labelled, self.low, self.high)

    def with_ranges(self, rule_base: FuzzyRuleBase) -> FuzzyRuleBase:
        """Note the ranges of the raw features in the provenance of a rule base."""
        names = (variable.name for variable in rule_base.antecedents)
        ranges = {name: [float(self.low[j]), float(self.high[j])] for j, name in enumerate(names)}
        return replace(rule_base, provenance={**rule_base.provenance, "feature_range": ranges})


def prepare(rule_base: FuzzyRuleBase, measured: Measurements) -> Prepared:
    """Scale features, turn rules that the data contradict, place the knots."""
    names = tuple(variable.name for variable in rule_base.antecedents)
    labelled, unlabelled = measured.columns(names)
    targets = suffering(measured.losses)
    low, high = feature_range(unlabelled)
    correlations = [rank_correlation(column, targets) for column in scale(labelled, low, high).T]
    prior = rule_base.unfitted()
    prior = prior if prior.is_complete else prior.interpolate()
    # A constant feature contradicts nothing, and a direction that the rules leave open cannot be contradicted.
    flips = [-1 if correlation * sign < 0 else 1 for correlation, sign in zip(correlations, prior.signs, strict=True)]
    prior = prior.flip_direction(flips).with_quantile_knots(scale(unlabelled, low, high))
    return Prepared(prior, targets, low, high, labelled, unlabelled, correlations, flips)


def set_scales(router: FuzzyRouter, prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """Set a router's feature ranges and score quantiles; give the scores of unlabelled and labelled examples.

    With a score per layer, (m, L), quantiles are those over examples and layers that have a budget.
    """
    router.feature_low.copy_(torch.as_tensor(prepared.low))
    router.feature_high.copy_(torch.as_tensor(prepared.high))
    scores_all, scores = _scores(router, prepared.unlabelled), _scores(router, prepared.labelled)
    pooled = scores_all if scores_all.ndim == 1 else scores_all[:, router.budget_thresholds[-1].numpy() > 0]
    router.score_quantiles.copy_(torch.as_tensor(np.quantile(pooled, np.linspace(0, 1, NUM_QUANTILES))))
    return scores_all, scores


def calibrate_router(
    rule_base: FuzzyRuleBase,
    measured: Measurements,
    num_layers: int,
    skip_rate: float,
    num_bins: int = 8,
    router_class: type[FuzzyRouter] = FuzzyRouter,
) -> tuple[FuzzyRouter, dict[str, Any]]:
    """Fit a router.

    Args:
        rule_base: Expert rules; a fitted one starts from its expert rules again.
        measured: Results of the forward passes.
        num_layers: Layers of the decoder.
        skip_rate: Mean skip rate to set, within K_max / num_layers.
        num_bins: Score bins of the allocation.
        router_class: What fits the score, and what is given.

    Returns:
        The router, with a report: rank correlation of each feature and of the score with the loss increase, features
        whose declared direction was flipped here, rules before and after, thresholds.

    Raises:
        ValueError: If there are too few examples for ``num_bins``, or the skip rate is out of range.
    """
    prepared = prepare(rule_base, measured)
    targets, prior, scaled, flips = prepared.targets, prepared.prior, prepared.scaled, prepared.flips
    spread = max(float(targets.std()), 1e-9)
    wanted = 0.5 + TARGET_SPREAD * (targets - targets.mean()) / spread
    fitted = router_class.fit_score(prior, scaled, wanted)
    router = router_class(prepared.with_ranges(fitted), num_layers)
    scores_all, scores = set_scales(router, prepared)
    # The labelled examples are binned by their own ranks, so that every bin of the allocation has its share of them.
    ranks = (np.argsort(np.argsort(scores, kind="stable"), kind="stable") + 0.5) / len(scores)
    table = allocate(measured.losses, ranks, measured.layer_order, num_layers, num_bins)
    set_budget_table(router, table)
    router.set_skip_rate(skip_rate)
    report = {
        "examples": len(targets),
        "score_examples": len(scores_all),
        "feature_correlation": dict(zip(router.antecedents, prepared.correlations, strict=True)),
        "flipped_features": [name for name, flip in zip(router.antecedents, flips, strict=True) if flip < 0],
        "score_correlation": rank_correlation(scores, targets),
        "mean_loss_by_skips": measured.losses.mean(axis=0).tolist(),
        "layer_order": list(measured.layer_order),
        "skip_rate": skip_rate,
        "thresholds": router.thresholds().tolist(),
        "rules": [vars(rule) for rule in fitted.report(scaled)],
    }
    return router, report


def set_budget_table(router: FuzzyRouter, table: BudgetTable) -> None:
    """Replace a router's budgets."""
    router.budget_rates = torch.as_tensor(table.skip_rates, dtype=torch.float32)
    router.budget_thresholds = torch.as_tensor(table.thresholds, dtype=torch.float32)


def feature_range(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 1% and 99% quantiles of raw features, at least 1e-6 apart, (K,) each."""
    low, high = np.quantile(features, [0.01, 0.99], axis=0)
    return low, np.maximum(high, low + 1e-6)


def scale(features: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Map raw features to [0, 1], (n, K)."""
    return ((features - low) / (high - low)).clip(0, 1)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation in [-1, 1]; 0 where one side is constant."""
    from scipy.stats import spearmanr

    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(spearmanr(first, second).statistic)


def _scores(router: FuzzyRouter, raw_features: np.ndarray) -> np.ndarray:
    """Scores by the router's own torch tables, so that percentiles refer to exactly what inference computes."""
    with torch.no_grad():
        features = router.scale(torch.as_tensor(raw_features, dtype=torch.float32))
        return router.rules(features).double().numpy()
