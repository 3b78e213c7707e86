"""The interface of a router that plans all layers before the first one runs."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from fuzzyroe.routing_state import RoutingState


class Router(nn.Module):
    """Decides, for every turn of every example, the keep weight of every layer.

    Attributes:
        enabled: Whether the router plans prompts on its own when the model is not training; a state passed by the
            caller is planned either way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    @abstractmethod
    def plan(self, hidden_states: Tensor, routing: RoutingState) -> None:
        """Fill ``routing.keep_weights``, (B, T, L), from the states before the first layer, (B, N, D)."""

    @abstractmethod
    def set_budget(self, skip_rate: float) -> None:
        """Set the mean skip rate that is planned for where a state asks for none."""
