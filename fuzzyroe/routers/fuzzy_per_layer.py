"""The fuzzy router with a table of consequents per layer: the rules foresee what each layer is worth to an example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuzzyroe.routers.fuzzy import RULE_BASE_FILE, FuzzyRouter
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.rules import FuzzyRuleBase, ZeroOrderTSK, load_rule_base


class PerLayerFuzzyRouter(FuzzyRouter):
    """Features -> fuzzy rules -> one score per layer -> percentile among the scores of all examples and layers.

    Layer l is skipped iff the percentile of its score lies below one threshold for all, so a mean skip rate is met over
    examples and layers together. A larger budget skips a superset; examples are not nested in each other, so a batch
    has to run what any of its rows keeps.

    Args:
        rule_base: Complete rule base; gives antecedents and knots, its consequents are replaced by the tables.
        num_layers: Layers of the decoder, L.

    Attributes:
        rules: One firing for all layers, consequents (R, L).
        score_quantiles: Quantiles of the scores of all calibration examples and layers that may be skipped, (Q,).
        budget_rates: The largest mean skip rate, the share of layers that may be skipped, (1,).
        budget_thresholds: 1 for layers that may be skipped, else 0, (1, L).
    """

    def __init__(self, rule_base: FuzzyRuleBase, num_layers: int) -> None:
        super().__init__(rule_base, num_layers)
        peaks = [variable.peaks for variable in rule_base.antecedents]
        self.rules = ZeroOrderTSK(peaks, torch.zeros(rule_base.num_rules, num_layers), rule_base.non_finite)

    def plan(self, hidden_states: Tensor, routing: RoutingState) -> None:
        """Fill ``routing`` as ``FuzzyRouter`` does; ``scores`` are means over the layers."""
        super().plan(hidden_states, routing)
        routing.result.scores = routing.result.scores.mean(dim=-1)

    def thresholds(self, skip_rate: Tensor | float | None = None) -> Tensor:
        """Percentiles below which layers are skipped, equal for all that may be, (L,) or (B, L)."""
        if skip_rate is None:
            return self.planned_thresholds
        rate = torch.as_tensor(skip_rate, dtype=torch.float32, device=self.budget_rates.device)
        # a new router may skip nothing: 0 / 0 would be nan
        share = (rate / self.budget_rates[0].clamp(min=1e-9)).clamp(0, 1)
        return share.unsqueeze(-1) * self.budget_thresholds[0]

    def keep_weights(self, scores: Tensor, skip_rate: Tensor | float | None = None, softness: float = 0.0) -> Tensor:
        """Keep weights, (B, T, L), of scores (B, T, L), as ``FuzzyRouter.keep_weights`` gives them."""
        thresholds = self.thresholds(skip_rate)
        if thresholds.dim() == 2:
            thresholds = thresholds.unsqueeze(1)  # (B, 1, L)
        margin = self.percentiles(scores) - thresholds  # (B, T, L)
        if softness == 0:
            return (margin >= 0).float()
        return torch.sigmoid(margin / softness).masked_fill(thresholds <= 0, 1.0)

    def settings(self) -> dict[str, Any]:
        """The file of the rules."""
        return {"rule_base": RULE_BASE_FILE}

    @classmethod
    def from_checkpoint(
        cls, options: dict[str, Any], num_layers: int, hidden_size: int, folder_file: Callable[[str], str]
    ) -> PerLayerFuzzyRouter:
        """Rebuild the router around the checkpoint's rule base; its tables are among the tensors."""
        return cls(load_rule_base(folder_file(options.get("rule_base", RULE_BASE_FILE))), num_layers)
