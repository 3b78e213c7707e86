"""Calibration of a fuzzy router: what its rules are fitted to, once the forward passes are done.

No gradient and no optimizer: feature ranges and knots are quantiles, consequents are a ridge fit to the expert rules,
and thresholds follow from measured losses (``fuzzyroe.budget``). Everything runs in numpy within a second, the same on
every rank. ``FuzzyRouter.calibrate`` puts the parts together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fuzzyroe.rules import FuzzyRuleBase, effective_examples, fit_consequents
from fuzzyroe.rules.fitting import PRIOR_STRENGTHS, order_edges

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


def skip_loss_increase(losses: np.ndarray) -> np.ndarray:
    """How much an example loses when about a third of the calibrated layers and more are skipped, (n,).

    It is the mean loss increase over the upper half of the skip counts, cut to ``TARGET_RANGE``, of losses by number of
    skipped layers, (n, K_max + 1).
    """
    increase = losses[:, 1:] - losses[:, :1]
    # a shallow plan hurts nobody, so the few first skips would add noise alone
    return increase[:, increase.shape[1] // 2 :].mean(axis=1).clip(*TARGET_RANGE)


@dataclass(frozen=True)
class Prepared:
    """What fits of consequents start from.

    Attributes:
        prior: The expert's rules, completed, flipped where the data contradict them, with knots at quantiles.
        loss_increase: What skipping costs each labelled example, (n,).
        low, high: Raw feature values that map to 0 and 1, (K,).
        labelled, unlabelled: Raw features, (n, K) and (m, K).
        correlations: Rank correlation of each feature with the loss increase.
        flipped: Features whose declared direction was flipped.
    """

    prior: FuzzyRuleBase
    loss_increase: np.ndarray
    low: np.ndarray
    high: np.ndarray
    labelled: np.ndarray
    unlabelled: np.ndarray
    correlations: dict[str, float]
    flipped: list[str]

    @property
    def scaled(self) -> np.ndarray:
        """Features of the labelled examples in [0, 1], (n, K)."""
        return scale(self.labelled, self.low, self.high)

    @property
    def score_targets(self) -> np.ndarray:
        """What the score should follow: the loss increase, spread around 0.5 as the expert's outputs are, (n,)."""
        spread = max(float(self.loss_increase.std()), 1e-9)
        return 0.5 + TARGET_SPREAD * (self.loss_increase - self.loss_increase.mean()) / spread

    def with_ranges(self, rule_base: FuzzyRuleBase) -> FuzzyRuleBase:
        """Note the ranges of the raw features in the provenance of a rule base."""
        ranges = {name: [float(self.low[j]), float(self.high[j])] for j, name in enumerate(self.correlations)}
        return replace(rule_base, provenance={**rule_base.provenance, "feature_range": ranges})

    def report(self, measured: Measurements) -> dict[str, Any]:
        """What every report of a fit begins with."""
        return {
            "examples": len(self.labelled),
            "score_examples": len(self.unlabelled),
            "feature_correlation": self.correlations,
            "flipped_features": self.flipped,
            "mean_loss_by_skips": measured.losses.mean(axis=0).tolist(),
            "layer_order": list(measured.layer_order),
        }


def prepare(rule_base: FuzzyRuleBase, measured: Measurements) -> Prepared:
    """Scale features, flip rules that the data contradict, place the knots.

    Of a fitted rule base the expert's rules are taken again, so that fitting twice is fitting once.
    """
    names = tuple(variable.name for variable in rule_base.antecedents)
    labelled, unlabelled = measured.columns(names)
    increase = skip_loss_increase(measured.losses)
    low, high = feature_range(unlabelled)
    correlations = [rank_correlation(column, increase) for column in scale(labelled, low, high).T]
    # the expert's own table is the prior: fitting a fitted one again would count the data twice
    prior = rule_base.unfitted()
    prior = prior if prior.is_complete else prior.interpolate()
    # A constant feature contradicts nothing, and a direction that the rules leave open cannot be contradicted.
    signs = [-1 if correlation * sign < 0 else 1 for correlation, sign in zip(correlations, prior.signs, strict=True)]
    prior = prior.flip_direction(signs).with_quantile_knots(scale(unlabelled, low, high))
    flipped = [name for name, sign in zip(names, signs, strict=True) if sign < 0]
    named = dict(zip(names, correlations, strict=True))
    return Prepared(prior, increase, low, high, labelled, unlabelled, named, flipped)


def fit_layer_tables(
    prepared: Prepared, measured: Measurements, num_layers: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit one table of consequents per layer to the loss increases without it.

    Each table is a ridge fit of one layer's loss increases to their mean, monotone as the rules declare: the expert
    says nothing about single layers, so without evidence every example ranks the layers alike, as a static plan does.

    Returns:
        Tables, (R, L), loss increases, (n, L), and the effective examples of each rule, (R,).

    Raises:
        ValueError: If the loss without each single layer was not measured.
    """
    if measured.layer_losses is None or measured.layer_losses.shape[1] != num_layers:
        found = None if measured.layer_losses is None else measured.layer_losses.shape
        raise ValueError(
            f"layer_losses is {found}; the loss without each single layer, (n, {num_layers}), is needed; measure with "
            "single_layers=True (--per_layer_tables True)."
        )
    increases = (measured.layer_losses - measured.losses[:, :1]).clip(*TARGET_RANGE)  # (n, L)
    firing = prepared.prior.firing_strengths(prepared.scaled)  # (n, R)
    edges = order_edges(prepared.prior.shape, prepared.prior.signs)
    # one layer at a time: the tables share the firing strengths and nothing else
    tables = [
        fit_consequents(
            firing,
            column,
            np.full(firing.shape[1], column.mean()),
            prior_strength=PRIOR_STRENGTHS["expert"],
            edges=edges,
            lower=float(column.min()) - 1.0,
            upper=float(column.max()) + 1.0,
        )
        for column in increases.T
    ]
    return np.stack(tables, axis=1), increases, effective_examples(firing)


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
