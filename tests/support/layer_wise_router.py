"""A layer-wise router, which decides each layer from the layer's own input."""

from __future__ import annotations

import torch
from torch import Tensor

from fuzzyroe.routers import Router
from fuzzyroe.routing_state import RoutingState


class LastTokenRouter(Router):
    """Keeps a layer where a random linear map of the last position's state is positive.

    Args:
        num_layers: Layers of the decoder.
        hidden_size: Width of the decoder.
        sharpness: Factor of the logits; finite keep weights have gradients.
    """

    decides_layer_wise = True

    def __init__(self, num_layers: int, hidden_size: int, sharpness: float = 3.0) -> None:
        super().__init__()
        self.target_skip_ratio, self.sharpness = 0.5, sharpness
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(hidden_size, 1) for _ in range(num_layers))
        self.calls: list[int] = []

    def decide(self, layer: int, hidden_states: Tensor, routing: RoutingState) -> Tensor:
        """Keep weights (B, 1)."""
        self.calls.append(layer)
        state = torch.nn.functional.normalize(hidden_states[:, -1], dim=-1)
        return torch.sigmoid(self.sharpness * self.layers[layer](state))
