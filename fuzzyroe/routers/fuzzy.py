"""The fuzzy router: a scikit-fuzzy rule base scores an example, its percentile decides how many layers are skipped."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuzzyroe.budget import BudgetTable, allocate
from fuzzyroe.calibrate import Measurements, Prepared, fit_layer_tables, prepare, rank_correlation
from fuzzyroe.features import ANSWER_FEATURES, FEATURES, compute_features, summarise
from fuzzyroe.routers.base import Measurer, Router
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.rules import FuzzyRuleBase, ZeroOrderTSK, compile_rule_base

NUM_QUANTILES = 1025
"""Percentiles are distinguished to a thousandth, so a target is met within 0.1 points of what the scores allow."""


class FuzzyRouter(Router):
    """Features -> fuzzy rules -> score -> percentile -> nested plan.

    Layer l is skipped iff the percentile of the example's score lies below the threshold of l, so a higher score keeps
    a superset of layers. Nothing here is trained by gradient; ``fit`` needs forward passes only.

    Args:
        rule_base: Rule base whose antecedents are names of ``FEATURES``; missing rules are interpolated. It is turned
            into a scikit-fuzzy control system, and the tables of the forward pass are read back from that system.
        num_layers: Layers of the decoder, L.
        num_budgets: Rows G of the table of budgets; a new router has one, which skips nothing.

    Attributes:
        rules: The compiled rules: features in [0, 1], (..., K), to scores (...).
        feature_low, feature_high: Raw feature values that map to 0 and 1, (K,).
        score_quantiles: Scores at equally spaced percentiles, non-decreasing, (Q,).
        budget_ratios, budget_thresholds: Mean skip rates (G,) with the thresholds that meet them (G, L).
        target_skip_ratio: Mean skip rate planned by default, ().
        planned_thresholds: Thresholds that meet it, (L,); ``set_skip_rate`` looks them up once, not every plan.
    """

    is_plan_router = True
    is_scored = True
    stays_in_float32 = True  # a score quantile rounded to bfloat16 would shift plans
    option_names = ("rule_base", "num_budgets")
    feature_low: Tensor
    feature_high: Tensor
    score_quantiles: Tensor
    budget_ratios: Tensor
    budget_thresholds: Tensor
    target_skip_ratio: Tensor
    planned_thresholds: Tensor

    def __init__(self, rule_base: FuzzyRuleBase, num_layers: int, num_budgets: int = 1) -> None:
        super().__init__()
        self.rule_base, self.num_layers = rule_base, num_layers
        self.antecedents = tuple(variable.name for variable in rule_base.antecedents)
        for name in self.antecedents:
            if name not in FEATURES:
                found = "known after the prefill only" if name in ANSWER_FEATURES else "no feature"
                raise KeyError(
                    f"Rule base '{rule_base.name}' has antecedent '{name}', which is {found}; a plan is made "
                    f"before the first layer, use {', '.join(FEATURES)}."
                )
        self.rules = self._compile(rule_base if rule_base.is_complete else rule_base.interpolate())
        self.register_buffer("feature_low", torch.zeros(len(self.antecedents)))
        self.register_buffer("feature_high", torch.ones(len(self.antecedents)))
        self.register_buffer("score_quantiles", torch.linspace(0, 1, NUM_QUANTILES))
        self.register_buffer("budget_ratios", torch.zeros(num_budgets))
        self.register_buffer("budget_thresholds", torch.zeros(num_budgets, num_layers))
        self.register_buffer("target_skip_ratio", torch.zeros(()))
        self.register_buffer("planned_thresholds", torch.zeros(num_layers))
        self._known_max: tuple[Tensor, int, float] | None = None

    def _compile(self, rule_base: FuzzyRuleBase) -> ZeroOrderTSK:
        return compile_rule_base(rule_base)

    @property
    def num_budgets(self) -> int:
        """Rows G of the table of budgets."""
        return len(self.budget_ratios)

    def plan(self, hidden_states: Tensor, routing: RoutingState) -> None:
        """Fill the result with summary, features, scores and keep weights; a non-finite feature keeps every layer."""
        result = routing.result
        result.summary = summarise(hidden_states, routing, routing.num_turns)
        raw = compute_features(result.summary, self.antecedents)  # (B, T, K)
        result.features = self.scale(raw)
        scores = self.rules(result.features)  # (B, T), or (B, T, L) with a table per layer
        result.scores = scores if scores.dim() == 2 else scores.mean(dim=-1)
        planned = self.keep_weights(scores, routing.target_skip_ratio, routing.softness)
        is_broken = ~(raw.abs().amax(dim=-1) < torch.inf)  # (B, T), also where nan makes the comparison false
        result.keep_weights = planned.masked_fill(is_broken.unsqueeze(-1), 1.0)

    def scale(self, raw_features: Tensor) -> Tensor:
        """Map raw features to [0, 1] by the calibrated range, (..., K)."""
        return ((raw_features - self.feature_low) / (self.feature_high - self.feature_low)).clamp(0, 1)

    def keep_weights(self, scores: Tensor, target: Tensor | float | None = None, softness: float = 0.0) -> Tensor:
        """Keep weights of examples, (B, T, L).

        They are 0 or 1. With a softness s they are ``sigmoid((u - theta) / s)`` for an example at percentile u and a
        layer of threshold theta: the same layers on either side of 1/2, towards s = 0 the same weights. A layer of
        threshold 0, which no example skips, keeps its weight of 1.

        Args:
            scores: Scores, (B, T), or one for each layer, (B, T, L).
            target: Mean skip rate for all or one per example (B,); None for the default.
            softness: How soft the plans are, at least 0.
        """
        thresholds = self.thresholds(target)
        if thresholds.dim() == 2:
            thresholds = thresholds.unsqueeze(1)  # (B, 1, L)
        percentiles = self.percentiles(scores)
        margin = (percentiles.unsqueeze(-1) if scores.dim() == 2 else percentiles) - thresholds  # (B, T, L)
        if softness == 0:
            return (margin >= 0).float()
        return torch.sigmoid(margin / softness).masked_fill(thresholds <= 0, 1.0)

    def percentiles(self, scores: Tensor) -> Tensor:
        """Share of calibration examples with a lower score and half of those with an equal one, in [0, 1], same shape.

        Rules that say the same tie many examples. Counted in whole, ties shifted mean skip rates by up to 0.9 points.
        """
        above_lowest, scores = self.score_quantiles[1:], scores.contiguous()
        lower = torch.searchsorted(above_lowest, scores)
        return (lower + torch.searchsorted(above_lowest, scores, right=True)) / (2 * len(above_lowest))

    def thresholds(self, target: Tensor | float | None = None) -> Tensor:
        """Thresholds of all layers for one target or several, (L,) or (B, L); None for the default."""
        if target is None:
            return self.planned_thresholds
        ratio = torch.as_tensor(target, device=self.budget_ratios.device)
        if self.num_budgets == 1:
            return self.budget_thresholds[0].expand(*ratio.shape, -1)
        flat = ratio.reshape(-1).float()  # indexing by a tensor without dimensions would wait for the device
        cell = torch.searchsorted(self.budget_ratios[1:-1], flat)
        low, high = self.budget_ratios.unfold(0, 2, 1)[cell].unbind(dim=-1)
        share = ((flat - low) / (high - low)).clamp(0, 1).unsqueeze(-1)
        thresholds = torch.lerp(self.budget_thresholds[cell], self.budget_thresholds[cell + 1], share)
        return thresholds.view(*ratio.shape, -1)

    @property
    def max_skip_ratio(self) -> float:
        """Largest calibrated ratio; read from the device when the table has changed, not for every prompt."""
        ratios = self.budget_ratios
        version = 0 if ratios.is_inference() else ratios._version
        if self._known_max is None or self._known_max[0] is not ratios or self._known_max[1] != version:
            self._known_max = (ratios, version, float(ratios[-1]))
        return self._known_max[2]

    def set_skip_rate(self, target: float) -> None:
        """Plan for another mean skip rate from now on; one that was not calibrated is a ``ValueError``."""
        self.check_target(target)
        self.target_skip_ratio.fill_(target)
        self.planned_thresholds.copy_(self.thresholds(target))

    def set_budget_table(self, table: BudgetTable) -> None:
        """Replace the budgets; what is planned by default stays until ``set_skip_rate``."""
        self.budget_ratios = torch.as_tensor(table.ratios, dtype=torch.float32)
        self.budget_thresholds = torch.as_tensor(table.thresholds, dtype=torch.float32)

    # Fitting: from measured losses to a router, once the forward passes are done.

    def fit(self, measurer: Measurer, arguments: Any) -> tuple[FuzzyRouter, dict[str, Any]]:
        """Measure on all ranks and fit the router; with ``per_layer_tables`` it becomes a ``PerLayerFuzzyRouter``."""
        router = self
        if arguments.per_layer_tables and not isinstance(self, PerLayerFuzzyRouter):
            router = PerLayerFuzzyRouter(self.rule_base, self.num_layers)
        measured = measurer.measure(single_layers=isinstance(router, PerLayerFuzzyRouter))
        return router.calibrate(measured, arguments.target_skip_ratio)

    def calibrate(
        self, measured: Measurements, target_skip_ratio: float, num_bins: int = 8
    ) -> tuple[FuzzyRouter, dict[str, Any]]:
        """Fit a router to measured examples; a fitted one starts from its expert rules again.

        Args:
            measured: Results of the forward passes.
            target_skip_ratio: Mean skip rate to set, within K_max / L.
            num_bins: Score bins of the allocation; there is none with a table per layer.

        Returns:
            The router, with a report: rank correlation of each feature and of the score with the loss increase,
            features whose declared direction was flipped here, rules before and after, thresholds.

        Raises:
            ValueError: If there are too few examples for ``num_bins``, or the target is out of range.
        """
        prepared = prepare(self.rule_base, measured)
        fitted = self.fit_score(prepared.prior, prepared.scaled, prepared.score_targets)
        router = type(self)(prepared.with_ranges(fitted), self.num_layers)
        scores = router.set_scales(prepared)
        # Labelled examples are binned by their own ranks, so that every bin of the allocation has its share of them.
        ranks = (np.argsort(np.argsort(scores, kind="stable"), kind="stable") + 0.5) / len(scores)
        router.set_budget_table(allocate(measured.losses, ranks, measured.layer_order, self.num_layers, num_bins))
        router.set_skip_rate(target_skip_ratio)
        return router, {
            **prepared.report(measured),
            "score_correlation": rank_correlation(scores, prepared.loss_increase),
            "target_skip_ratio": target_skip_ratio,
            "thresholds": router.thresholds().tolist(),
            "rules": [vars(rule) for rule in fitted.report(prepared.scaled)],
        }

    @staticmethod
    def fit_score(prior: FuzzyRuleBase, features: np.ndarray, targets: np.ndarray) -> FuzzyRuleBase:
        """Fit the consequents of a complete rule base to features in [0, 1], (n, K), and targets of the score, (n,)."""
        return prior.fit(features, targets)

    def set_scales(self, prepared: Prepared) -> np.ndarray:
        """Set feature ranges and score quantiles; give the scores of the labelled examples, (n,) or (n, L).

        Scores come from the router's own torch tables, so that percentiles refer to exactly what inference computes.
        """
        self.feature_low.copy_(torch.as_tensor(prepared.low))
        self.feature_high.copy_(torch.as_tensor(prepared.high))
        unlabelled, labelled = (
            self.rules(self.scale(torch.as_tensor(raw, dtype=torch.float32))).double().numpy()
            for raw in (prepared.unlabelled, prepared.labelled)
        )
        if unlabelled.ndim == 2:  # (m, L): layers that are never skipped have no percentile
            unlabelled = unlabelled[:, self.budget_thresholds[-1].numpy() > 0]
        self.score_quantiles.copy_(torch.as_tensor(np.quantile(unlabelled, np.linspace(0, 1, NUM_QUANTILES))))
        return labelled


class PerLayerFuzzyRouter(FuzzyRouter):
    """The fuzzy router with a table of consequents per layer: the rules foresee what each layer is worth to an example.

    Layer l is skipped iff the percentile of its score, among the scores of all calibration examples and layers that may
    be skipped, lies below one threshold for all. So a mean skip rate is met over examples and layers together. A larger
    target skips a superset; examples are not nested in each other, so a batch has to run what any of its rows keeps.

    Args:
        rule_base: Gives antecedents and knots; its consequents are replaced by the tables.
        num_layers: Layers of the decoder, L; all but the first may be skipped.
        num_budgets: 1 for a new router, which skips nothing, 2 for a calibrated one.

    Attributes:
        rules: One firing for all layers, consequents (R, L).
    """

    is_plan_router = False  # a fuzzy router becomes one by ``per_layer_tables``

    def _compile(self, rule_base: FuzzyRuleBase) -> ZeroOrderTSK:
        peaks = [variable.peaks for variable in rule_base.antecedents]
        return ZeroOrderTSK(peaks, torch.zeros(rule_base.num_rules, self.num_layers), rule_base.non_finite)

    def calibrate(
        self, measured: Measurements, target_skip_ratio: float, num_bins: int = 8
    ) -> tuple[FuzzyRouter, dict[str, Any]]:
        """Fit one table per layer to what skipping each layer alone costs an example; see ``FuzzyRouter.calibrate``.

        The measurements need ``layer_losses``, else it is a ``ValueError``. The report has the mean loss increase
        without each layer, too, and per rule the effective examples.
        """
        prepared = prepare(self.rule_base, measured)
        tables, increases, counts = fit_layer_tables(prepared, measured, self.num_layers)
        router = PerLayerFuzzyRouter(prepared.with_ranges(prepared.prior), self.num_layers)
        router.rules.consequents.copy_(torch.as_tensor(tables))
        may_skip = np.arange(self.num_layers) > 0
        router.set_budget_table(BudgetTable(np.array([0, may_skip.mean()]), np.stack([0 * may_skip, may_skip])))
        scores = router.set_scales(prepared)
        router.set_skip_rate(target_skip_ratio)
        rules = zip(prepared.prior.cells(), counts, tables, strict=True)
        return router, {
            **prepared.report(measured),
            "score_correlation": rank_correlation(scores.mean(axis=1), prepared.loss_increase),
            "mean_increase_by_layer": increases.mean(axis=0).tolist(),
            "target_skip_ratio": target_skip_ratio,
            "thresholds": router.thresholds().tolist(),
            "rules": [
                {"terms": prepared.prior.terms_of(cell), "effective_examples": float(count), "fitted": table.tolist()}
                for cell, count, table in rules
            ],
        }
