"""The fuzzy router: a scikit-fuzzy rule base scores an example, its percentile decides how many layers are skipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuzzyroe.budget import BudgetTable
from fuzzyroe.features import FEATURES, compute_features, summarise
from fuzzyroe.routers.base import Router
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.rules import load_rule_base, save_rule_base
from fuzzyroe.rules.rule_base import FuzzyRuleBase
from fuzzyroe.rules.skfuzzy_bridge import compile_rule_base

RULE_BASE_FILE = "rule_base.yaml"

NUM_QUANTILES = 1025
"""Percentiles are told apart to a thousandth, so a skip rate is met within 0.1 points of what the scores allow."""


class FuzzyRouter(Router):
    """Features -> fuzzy rules -> score -> percentile -> nested plan.

    Layer l is skipped iff the percentile of the example's score lies below the threshold of l, so a higher score keeps
    a superset of layers. Nothing here is trained by gradient; ``fuzzyroe.calibrate`` fits it all by forward passes.

    Args:
        rule_base: Complete rule base whose antecedents are names of ``FEATURES``. It is turned into a scikit-fuzzy
            control system, and the tables of the forward pass are read back from that system.
        num_layers: Layers of the decoder, L.
        num_budgets: Rows G of the table of budgets; a new router has one, which skips nothing.

    Attributes:
        feature_low, feature_high: Raw feature values that map to 0 and 1, (K,).
        score_quantiles: Scores at equally spaced percentiles, non-decreasing, (Q,).
        budget_rates, budget_thresholds: Skip rates (G,) with the thresholds that meet them (G, L).
        target_skip_ratio: Mean skip rate planned by default, ().
        planned_thresholds: Thresholds that meet it, (L,); ``set_skip_rate`` looks them up once, not every plan.
        non_finite_turns: Turns that had a non-finite feature and hence kept every layer, counted on the device, ();
            not saved.
    """

    stays_in_float32 = True  # a score quantile rounded to bfloat16 would shift plans

    def __init__(self, rule_base: FuzzyRuleBase, num_layers: int, num_budgets: int = 1) -> None:
        super().__init__()
        self.rule_base = rule_base
        self.antecedents = tuple(variable.name for variable in rule_base.antecedents)
        for name in self.antecedents:
            if name not in FEATURES:
                raise KeyError(
                    f"Rule base '{rule_base.name}' has antecedent '{name}', which is no feature; "
                    f"use {', '.join(FEATURES)}."
                )
        self.rules = compile_rule_base(rule_base if rule_base.is_complete else rule_base.interpolate())
        self.register_buffer("feature_low", torch.zeros(len(self.antecedents)))
        self.register_buffer("feature_high", torch.ones(len(self.antecedents)))
        self.register_buffer("score_quantiles", torch.linspace(0, 1, NUM_QUANTILES))
        self.register_buffer("budget_rates", torch.zeros(num_budgets))
        self.register_buffer("budget_thresholds", torch.zeros(num_budgets, num_layers))
        self.register_buffer("target_skip_ratio", torch.zeros(()))
        self.register_buffer("planned_thresholds", torch.zeros(num_layers))
        self.register_buffer("non_finite_turns", torch.zeros((), dtype=torch.int64), persistent=False)
        self._known_max: tuple[Tensor, int, float] | None = None

    @staticmethod
    def fit_score(prior: FuzzyRuleBase, features: np.ndarray, targets: np.ndarray) -> FuzzyRuleBase:
        """Fit the consequents of the rules to examples.

        Args:
            prior: Complete rule base to start from.
            features: Features in [0, 1], (n, K).
            targets: What the score should follow, (n,).
        """
        return prior.fit(features, targets)

    def plan(self, hidden_states: Tensor, routing: RoutingState) -> None:
        """Fill ``routing.result`` with summary, features, scores and keep weights.

        A non-finite feature keeps every layer of its turn.

        Args:
            hidden_states: States before the first decoder layer, (B, N, D).
            routing: ``target_skip_ratio`` may hold a budget for all or one per example (B,); else the default is used.
        """
        result = routing.result
        result.summary = summarise(hidden_states, routing, routing.num_turns)
        raw = compute_features(result.summary, self.antecedents)  # (B, T, K)
        result.features = self.scale(raw)
        result.scores = self.rules(result.features)  # (B, T)
        is_broken = ~(raw.abs().amax(dim=-1) < torch.inf)  # (B, T)
        self.non_finite_turns += is_broken.sum()
        planned = self.keep_weights(result.scores, routing.target_skip_ratio, routing.softness)
        result.keep_weights = planned.masked_fill(is_broken.unsqueeze(-1), 1.0)

    def scale(self, raw_features: Tensor) -> Tensor:
        """Map raw features to [0, 1] by the calibrated range, (..., K)."""
        return ((raw_features - self.feature_low) / (self.feature_high - self.feature_low)).clamp(0, 1)

    def percentiles(self, scores: Tensor) -> Tensor:
        """Share of calibration examples with a lower score and half of those with an equal one, in [0, 1], same shape.

        Rules that say the same tie many examples. Counted in whole, ties shifted mean skip rates by up to 0.9 points.
        """
        above_lowest, scores = self.score_quantiles[1:], scores.contiguous()
        lower = torch.searchsorted(above_lowest, scores)
        return (lower + torch.searchsorted(above_lowest, scores, right=True)) / (2 * len(above_lowest))

    def thresholds(self, skip_rate: Tensor | float | None = None) -> Tensor:
        """Thresholds of all layers for one budget or several, (L,) or (B, L)."""
        if skip_rate is None:
            return self.planned_thresholds
        rate = torch.as_tensor(skip_rate, device=self.budget_rates.device)
        if len(self.budget_rates) == 1:
            return self.budget_thresholds[0].expand(*rate.shape, -1)
        flat = rate.reshape(-1).float()  # indexing by a tensor without dimensions would wait for the device
        cell = torch.searchsorted(self.budget_rates[1:-1], flat)
        low, high = self.budget_rates.unfold(0, 2, 1)[cell].unbind(dim=-1)
        share = ((flat - low) / (high - low)).clamp(0, 1).unsqueeze(-1)
        thresholds = torch.lerp(self.budget_thresholds[cell], self.budget_thresholds[cell + 1], share)
        return thresholds.view(*rate.shape, -1)

    def keep_weights(self, scores: Tensor, skip_rate: Tensor | float | None = None, softness: float = 0.0) -> Tensor:
        """Keep weights, (B, T, L), of scores (B, T) under a budget for all or one per example (B,).

        They are 0 or 1. With a softness s they are ``sigmoid((u - theta) / s)`` for an example at percentile u and a
        layer of threshold theta: the same layers on either side of 1/2, towards s = 0 the same weights. A layer of
        threshold 0, which no example skips, keeps its weight of 1.
        """
        thresholds = self.thresholds(skip_rate)
        if thresholds.dim() == 2:
            thresholds = thresholds.unsqueeze(1)  # (B, 1, L)
        margin = self.percentiles(scores).unsqueeze(-1) - thresholds  # (B, T, L)
        if softness == 0:
            return (margin >= 0).float()
        return torch.sigmoid(margin / softness).masked_fill(thresholds <= 0, 1.0)

    @property
    def max_skip_ratio(self) -> float:
        """Largest calibrated rate; read from the device when the table has changed, not for every prompt."""
        rates = self.budget_rates
        version = 0 if rates.is_inference() else rates._version
        if self._known_max is None or self._known_max[0] is not rates or self._known_max[1] != version:
            self._known_max = (rates, version, float(rates[-1]))
        return self._known_max[2]

    def set_skip_rate(self, skip_rate: float) -> None:
        """Plan for another mean skip rate from now on; nothing is retrained.

        Raises:
            ValueError: If the router was not calibrated for such a rate.
        """
        self.check_target(skip_rate)
        self.target_skip_ratio.fill_(skip_rate)
        self.planned_thresholds.copy_(self.thresholds(skip_rate))

    def budget_table(self) -> BudgetTable:
        """The calibrated budgets, as arrays."""
        return BudgetTable(self.budget_rates.cpu().double().numpy(), self.budget_thresholds.cpu().double().numpy())

    def settings(self) -> dict[str, Any]:
        """The size of the table of budgets, and the file of the rules."""
        return {"rule_base": RULE_BASE_FILE, "num_budgets": len(self.budget_rates)}

    def save_files(self, folder: Path) -> None:
        """Write the rule base."""
        save_rule_base(self.rule_base, folder / RULE_BASE_FILE)

    @classmethod
    def from_checkpoint(
        cls, options: dict[str, Any], num_layers: int, hidden_size: int, folder_file: Callable[[str], str]
    ) -> FuzzyRouter:
        """Rebuild the router around the checkpoint's rule base."""
        return cls(
            load_rule_base(folder_file(options.get("rule_base", RULE_BASE_FILE))),
            num_layers,
            options.get("num_budgets", 1),
        )
