"""The linear score: the fuzzy router's plans, percentiles and budgets, with a weighted sum in place of the rules."""

from __future__ import annotations

import numpy as np

from fuzzyroe.routers.fuzzy import FuzzyRouter
from fuzzyroe.rules.rule_base import FuzzyRuleBase
from fuzzyroe.rules.variable import LinguisticVariable

RIDGE = 1.0
"""Strength of the pull of the weights towards 0, in examples."""


class LinearScoreRouter(FuzzyRouter):
    """Tells what rules are worth: K weights and a constant, fitted to the same examples, score an example.

    A linear function on [0, 1]^K is the multilinear interpolation of its values at the corners. So it is kept as a rule
    base with two terms per antecedent, and everything else is the fuzzy router's.
    """

    @staticmethod
    def fit_score(prior: FuzzyRuleBase, features: np.ndarray, targets: np.ndarray) -> FuzzyRuleBase:
        """Fit a linear function by ridge regression; nothing of the rules but the names of the antecedents is used.

        Args:
            prior: Names the antecedents.
            features: Features in [0, 1], (n, K).
            targets: What the score should follow, (n,).

        Returns:
            A rule base of 2^K cells that increases with the fitted function, from 0 at its lowest corner to 1 at its
            highest; only the order of scores acts. All cells are 1/2 if the function is constant.
        """
        centred = features - features.mean(axis=0)
        gram = centred.T @ centred + RIDGE * np.eye(features.shape[1])
        weights = np.linalg.solve(gram, centred.T @ (targets - targets.mean()))  # (K,)
        corners = np.stack(np.meshgrid(*[[0.0, 1.0]] * len(weights), indexing="ij"), axis=-1)  # (2, ..., 2, K)
        values = corners @ weights
        spread = np.ptp(values)
        table = (values - values.min()) / spread if spread > 1e-12 else np.full(values.shape, 0.5)
        variables = [LinguisticVariable(v.name, (0.0, 1.0), ("low", "high"), (0.0, 1.0)) for v in prior.antecedents]
        cells = np.ndindex(table.shape)
        rules = {tuple(v.terms[k] for v, k in zip(variables, cell, strict=True)): float(table[cell]) for cell in cells}
        return FuzzyRuleBase.from_rules(
            "linear_score",
            variables,
            prior.consequent,
            dict(zip(rules, prior.consequent.from_output(np.fromiter(rules.values(), float)).tolist(), strict=True)),
            description="A linear score, written as rules at the corners of the unit cube.",
            provenance={"linear_score": {"weights": weights.tolist(), "examples": len(targets)}},
        )
