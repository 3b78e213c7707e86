"""The static router: the same layers skipped for every prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fuzzyroe.routers.base import Router
from fuzzyroe.routing_state import RoutingState


class StaticRouter(Router):
    """Skips the first layers of one order, as many as the budget says, rounded to whole layers.

    Args:
        num_layers: Layers of the decoder, L.
        layer_order: Layers that may be skipped, first to be skipped first; ``fuzzyroe.layer_order`` finds orders.
        target_skip_ratio: Mean skip rate planned for by default.
        criterion: Where the order comes from, kept for the record.

    Raises:
        ValueError: If the order names a layer twice, or one that the decoder does not have.
    """

    def __init__(
        self, num_layers: int, layer_order: Sequence[int], target_skip_ratio: float = 0.0, criterion: str = ""
    ) -> None:
        super().__init__()
        self.num_layers, self.layer_order, self.criterion = num_layers, list(layer_order), criterion
        if len(set(self.layer_order)) < len(self.layer_order) or not set(self.layer_order) <= set(range(num_layers)):
            raise ValueError(
                f"The layer order is {self.layer_order}; allowed are layers 0 to {num_layers - 1}, each once. Correct "
                "the order."
            )
        places = torch.full((num_layers,), num_layers)
        places[self.layer_order] = torch.arange(len(self.layer_order))
        self.register_buffer("places", places, persistent=False)  # the order stands in the settings
        self.set_skip_rate(target_skip_ratio)

    @property
    def max_skip_ratio(self) -> float:
        """All layers of the order."""
        return len(self.layer_order) / self.num_layers

    def plan(self, hidden_states: Tensor, routing: RoutingState) -> None:
        """Skip the first layers of the order."""
        rates = self.requested_rates(routing, self.places.device)
        num_skipped = (rates * self.num_layers + 0.5).floor()  # (B, 1) or (1, 1)
        keep = (self.places >= num_skipped).float()  # (B, L) or (1, L)
        routing.result.keep_weights = keep.unsqueeze(1).expand(hidden_states.shape[0], routing.planned_turns(), -1)

    def settings(self) -> dict[str, Any]:
        """The order, the budget and the criterion."""
        return {
            "layer_order": self.layer_order,
            "target_skip_ratio": self.target_skip_ratio,
            "criterion": self.criterion,
        }

    @classmethod
    def from_checkpoint(
        cls, options: dict[str, Any], num_layers: int, hidden_size: int, folder_file: Callable[[str], str]
    ) -> StaticRouter:
        """Rebuild the router."""
        return cls(num_layers, **options)
