"""Nested plans with skips spread over levels, and a router that plans them at any policy's cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fuzzyroe.routers import Router
from fuzzyroe.routing_state import RoutingState

NUM_LEVELS = 8


def spread_skips(num_layers: int, skip_rate: float, count: int = NUM_LEVELS) -> list[int]:
    """Skipped layers of ``count`` requests, at even distances around the mean, which is a whole number.

    They go from none to twice the mean, or as far up as the first layer can stay; of one request, the mean.
    """
    mean = round(skip_rate * num_layers)
    if count == 1:
        return [mean]
    low = max(0, 2 * mean - (num_layers - 1))
    return [round(level) for level in np.linspace(low, 2 * mean - low, count)]


def nested_plans(num_layers: int, skips: list[int]) -> Tensor:
    """Plans that skip the first layers of one order, which leaves the first layer to the end, (n, L) bool."""
    order = [*range(1, num_layers, 2), *range(2, num_layers, 2), 0]
    places = torch.empty(num_layers, dtype=torch.long)
    places[order] = torch.arange(num_layers)
    return places >= torch.tensor(skips).unsqueeze(1)


class Replayed(Router):
    """Asks another router as ever, then plans what it is told: the policy's cost with plans that are the bench's.

    Args:
        router: The policy.
        num_layers: Layers of the decoder.

    Attributes:
        plans: Keep weights to plan, (B, L); the caller sets them for each batch.
    """

    def __init__(self, router: Router, num_layers: int) -> None:
        super().__init__()
        self.router = router
        self.layers = getattr(router, "layers", nn.ModuleList())
        self.decides_layer_wise = router.decides_layer_wise
        self.num_layers = num_layers
        self.plans = torch.ones(1, num_layers)
        self.calls = 0

    @property
    def skip_rate(self) -> float:
        """That of the plans."""
        return 1 - float(self.plans.mean())

    def plan(self, hidden_states: Tensor, routing: RoutingState) -> None:
        """Let the policy plan, and replace what it planned."""
        self.calls += 1
        self.router.plan(hidden_states, routing)
        if not self.decides_layer_wise:
            routing.result.keep_weights = self.plans.unsqueeze(1)

    def prepare(self, decoder: nn.Module, inputs: dict[str, Any], routing: RoutingState) -> dict[str, Any]:
        """Let the policy prepare the pass."""
        return self.router.prepare(decoder, inputs, routing)

    def decide(self, layer: int, hidden_states: Tensor, routing: RoutingState) -> Tensor:
        """Let the policy decide, and replace what it decided."""
        self.calls += 1
        self.router.decide(layer, hidden_states, routing)
        return self.plans[:, layer : layer + 1]
