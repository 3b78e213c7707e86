"""The router that keeps every layer: the dense model behind the interface of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuzzyroe.routers.base import Router
from fuzzyroe.routing_state import RoutingState


class KeepAllRouter(Router):
    """Plans to skip nothing, bit for bit the dense model.

    Args:
        num_layers: Layers of the decoder, L.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.target_skip_ratio = 0.0

    @property
    def max_skip_ratio(self) -> float:
        """Zero."""
        return 0.0

    def plan(self, hidden_states: Tensor, routing: RoutingState) -> None:
        """Keep every layer for every turn."""
        shape = (hidden_states.shape[0], routing.planned_turns(), self.num_layers)
        routing.result.keep_weights = hidden_states.new_ones(shape, dtype=torch.float32)

    @classmethod
    def from_checkpoint(
        cls, options: dict[str, Any], num_layers: int, hidden_size: int, folder_file: Callable[[str], str]
    ) -> KeepAllRouter:
        """Rebuild the router; it has no options."""
        return cls(num_layers)
