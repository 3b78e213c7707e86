"""Fitting a fuzzy router with a table per layer: what skipping each layer alone costs an example, by rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fuzzyroe.calibrate import TARGET_RANGE, Measurements, prepare, rank_correlation, set_scales
from fuzzyroe.routers.fuzzy_per_layer import PerLayerFuzzyRouter
from fuzzyroe.rules.fitting import PRIOR_STRENGTHS, effective_examples, fit_consequents
from fuzzyroe.rules.monotone import order_edges
from fuzzyroe.rules.rule_base import FuzzyRuleBase


def calibrate_layers(
    rule_base: FuzzyRuleBase, measured: Measurements, num_layers: int, skip_rate: float
) -> tuple[PerLayerFuzzyRouter, dict[str, Any]]:
    """Fit a router with one table per layer, (R, L).

    Each table is a ridge fit of one layer's loss increases to their mean, monotone as the rules declare: the expert
    says nothing about single layers, so without evidence every example ranks the layers alike, as a static plan does.

    Args:
        rule_base: Gives antecedents, directions and the order of terms.
        measured: Results of the forward passes, with ``layer_losses``.
        num_layers: Layers of the decoder, L.
        skip_rate: Mean skip rate to set; layers but the first may be skipped.

    Returns:
        The router, with a report as ``calibrate_router`` gives it: instead of thresholds the mean loss increase without
        each layer, and per rule the effective examples.

    Raises:
        ValueError: If no losses of single layers were measured, or the skip rate is out of range.
    """
    if measured.layer_losses is None or measured.layer_losses.shape[1] != num_layers:
        found = None if measured.layer_losses is None else measured.layer_losses.shape
        raise ValueError(
            f"layer_losses is {found}; the loss without each single layer, (n, {num_layers}), is needed; measure with "
            "single_layers=True (--per_layer_tables True)."
        )
    prepared = prepare(rule_base, measured)
    increases = (measured.layer_losses - measured.losses[:, :1]).clip(*TARGET_RANGE)  # (n, L)
    firing = prepared.prior.firing_strengths(prepared.scaled)
    edges = order_edges(prepared.prior.shape, prepared.prior.signs)
    tables = np.stack([_fit_table(firing, column, edges) for column in increases.T], axis=1)  # (R, L)

    router = PerLayerFuzzyRouter(prepared.with_ranges(prepared.prior), num_layers)
    router.rules.consequents.copy_(torch.as_tensor(tables))
    router.budget_rates.fill_((num_layers - 1) / num_layers)
    router.budget_thresholds[:, 1:] = 1.0
    scores_all, scores = set_scales(router, prepared)
    router.set_skip_rate(skip_rate)
    counts = effective_examples(firing)
    report = {
        "examples": len(firing),
        "score_examples": len(scores_all),
        "feature_correlation": dict(zip(router.antecedents, prepared.correlations, strict=True)),
        "flipped_features": [name for name, sign in zip(router.antecedents, prepared.flips, strict=True) if sign < 0],
        "score_correlation": rank_correlation(scores.mean(axis=1), prepared.targets),
        "mean_loss_by_skips": measured.losses.mean(axis=0).tolist(),
        "layer_order": list(measured.layer_order),
        "mean_increase_by_layer": increases.mean(axis=0).tolist(),
        "skip_rate": skip_rate,
        "thresholds": router.thresholds().tolist(),
        "rules": [
            {"terms": prepared.prior.terms_of(cell), "effective_examples": float(count), "fitted": table.tolist()}
            for cell, count, table in zip(prepared.prior.cells(), counts, tables, strict=True)
        ],
    }
    return router, report


def _fit_table(firing: np.ndarray, targets: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Fit one layer's consequents, (R,), to its loss increases, (n,)."""
    prior = np.full(firing.shape[1], targets.mean())
    limits = {"lower": float(targets.min()) - 1.0, "upper": float(targets.max()) + 1.0}
    return fit_consequents(firing, targets, prior, prior_strength=PRIOR_STRENGTHS["expert"], edges=edges, **limits)
