"""Baseline routers: what the fuzzy router is compared with, on the same plans and budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuzzyroe.prompt_hash import prompt_hashes, uniforms
from fuzzyroe.routers.base import Measurer, Router
from fuzzyroe.routers.fuzzy import FuzzyRouter
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.rules import FuzzyRuleBase, LinguisticVariable

RIDGE = 1.0
"""Strength of the pull of a linear score's weights towards 0, in examples."""


class KeepAllRouter(Router):
    """Plans to skip nothing in L layers, bit for bit the dense model."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.num_layers, self.target_skip_ratio = num_layers, 0.0

    @property
    def max_skip_ratio(self) -> float:
        """Zero."""
        return 0.0

    def plan(self, hidden_states: Tensor, routing: RoutingState) -> None:
        """Keep every layer for every turn."""
        shape = (hidden_states.shape[0], routing.planned_turns(), self.num_layers)
        routing.result.keep_weights = hidden_states.new_ones(shape, dtype=torch.float32)


class StaticRouter(Router):
    """Skips the first layers of one order for every prompt, as many as the target says, rounded to whole layers.

    Args:
        num_layers: Layers of the decoder, L.
        layer_order: Layers that may be skipped, first to be skipped first; None allows all but the first in turn.
        target_skip_ratio: Mean skip rate planned for by default.
        criterion: Where the order comes from, kept for the record.

    Raises:
        ValueError: If the order names a layer twice, or one that the decoder does not have.
    """

    is_plan_router = True
    option_names = ("layer_order", "target_skip_ratio", "criterion")
    ranks: Tensor

    def __init__(
        self,
        num_layers: int,
        layer_order: Sequence[int] | None = None,
        target_skip_ratio: float = 0.0,
        criterion: str = "",
    ) -> None:
        super().__init__()
        self.num_layers, self.criterion = num_layers, criterion
        self.layer_order = list(range(1, num_layers) if layer_order is None else layer_order)
        if len(set(self.layer_order)) < len(self.layer_order) or not set(self.layer_order) <= set(range(num_layers)):
            raise ValueError(
                f"The layer order is {self.layer_order}; allowed are layers 0 to {num_layers - 1}, each once. Correct "
                "the order."
            )
        ranks = torch.full((num_layers,), num_layers)  # a layer outside the order ranks behind any number of skips
        ranks[self.layer_order] = torch.arange(len(self.layer_order))
        self.register_buffer("ranks", ranks, persistent=False)  # the order is among the options
        self.set_skip_rate(target_skip_ratio)

    @property
    def max_skip_ratio(self) -> float:
        """All layers of the order."""
        return len(self.layer_order) / self.num_layers

    def plan(self, hidden_states: Tensor, routing: RoutingState) -> None:
        """Skip the first layers of the order."""
        ratios = self.requested_ratios(routing, self.ranks.device)
        num_skipped = (ratios * self.num_layers + 0.5).floor()  # (B, 1) or (1, 1)
        keep = (self.ranks >= num_skipped).float()  # (B, L) or (1, L)
        routing.result.keep_weights = keep.unsqueeze(1).expand(hidden_states.shape[0], routing.planned_turns(), -1)

    def fit(self, measurer: Measurer, arguments: Any) -> tuple[StaticRouter, dict[str, Any]]:
        """Order the layers greedily by how little answer loss skipping them adds."""
        order, target = measurer.find_order(), arguments.target_skip_ratio
        router = StaticRouter(self.num_layers, order, target, "greedy by answer loss")
        return router, {"layer_order": order, "target_skip_ratio": target}


class RandomRouter(Router):
    """Draws the skipped layers of each prompt anew, but the same for the same prompt, in any batch.

    At a target r each prompt skips r L layers; a fraction is made up for by skipping one more for that share of
    prompts. The first layer is always kept.

    Args:
        num_layers: Layers of the decoder, L.
        seed: Another seed gives other plans.
        target_skip_ratio: Mean skip rate planned for by default.

    Reference:
        RoE (arXiv:2407.14093) starts its training with random skips.
    """

    is_plan_router = True
    option_names = ("seed", "target_skip_ratio")

    def __init__(self, num_layers: int, seed: int = 0, target_skip_ratio: float = 0.0) -> None:
        super().__init__()
        self.num_layers, self.seed = num_layers, seed
        self.set_skip_rate(target_skip_ratio)

    @property
    def max_skip_ratio(self) -> float:
        """All layers but the first."""
        return (self.num_layers - 1) / self.num_layers

    def plan(self, hidden_states: Tensor, routing: RoutingState) -> None:
        """Draw the layers from the hash of each question and its images."""
        draws = uniforms(prompt_hashes(hidden_states, routing), self.num_layers, self.seed)  # (B, T, L)
        # the first draw rounds the number of skips up or down, the others rank the layers behind the first
        num_skipped = self.requested_ratios(routing, draws.device) * self.num_layers + draws[..., 0]  # (B, T)
        ranks = draws[..., 1:].argsort(dim=-1).argsort(dim=-1)  # (B, T, L - 1)
        keep = draws.new_ones(draws.shape)
        keep[..., 1:] = (ranks >= num_skipped.floor().unsqueeze(-1)).float()
        routing.result.keep_weights = keep


class LinearScoreRouter(FuzzyRouter):
    """The fuzzy router's plans, percentiles and budgets, with a weighted sum in place of the rules.

    It shows what rules are worth: K weights and a constant, fitted to the same examples, score an example. A linear
    function on [0, 1]^K is the multilinear interpolation of its values at the corners. So it is kept as a rule base
    with two terms per antecedent, and everything else is the fuzzy router's.
    """

    @staticmethod
    def fit_score(prior: FuzzyRuleBase, features: np.ndarray, targets: np.ndarray) -> FuzzyRuleBase:
        """Fit a linear function by ridge regression; nothing of the prior but the names of its antecedents is used.

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
        return FuzzyRuleBase(
            "linear_score",
            tuple(variables),
            prior.consequent.from_output(table),
            np.full(table.shape, "expert"),
            prior.consequent,
            description="A linear score, written as rules at the corners of the unit cube.",
            provenance={"linear_score": {"weights": weights.tolist(), "examples": len(targets)}},
        )
