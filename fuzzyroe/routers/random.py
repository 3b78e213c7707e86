"""The random router: as many layers skipped as asked for, whichever they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fuzzyroe.prompt_hash import prompt_hashes, uniforms
from fuzzyroe.routers.base import Router
from fuzzyroe.routing_state import RoutingState


class RandomRouter(Router):
    """Draws the skipped layers of each prompt anew, but the same for the same prompt, in any batch.

    At a rate r each prompt skips r L layers; a fraction is made up for by skipping one more for that share of prompts.
    The first layer is always kept.

    Args:
        num_layers: Layers of the decoder, L.
        seed: Another seed gives other plans.
        target_skip_ratio: Mean skip rate planned for by default.

    Reference:
        RoE (arXiv:2407.14093) starts its training with random skips.
    """

    def __init__(self, num_layers: int, seed: int = 0, target_skip_ratio: float = 0.0) -> None:
        super().__init__()
        self.num_layers, self.seed = num_layers, seed
        self.set_skip_rate(target_skip_ratio)

    @property
    def max_skip_ratio(self) -> float:
        """All layers but the first."""
        return (self.num_layers - 1) / self.num_layers

    def plan(self, hidden_states: Tensor, routing: RoutingState) -> None:
        """Draw the layers from the prompt hash of each question and its images."""
        draws = uniforms(prompt_hashes(hidden_states, routing), self.num_layers, self.seed)  # (B, T, L)
        num_skipped = self.requested_rates(routing, draws.device) * self.num_layers + draws[..., 0]  # (B, T)
        ranks = draws[..., 1:].argsort(dim=-1).argsort(dim=-1)  # (B, T, L - 1)
        keep = draws.new_ones(draws.shape)
        keep[..., 1:] = (ranks >= num_skipped.floor().unsqueeze(-1)).float()
        routing.result.keep_weights = keep

    def settings(self) -> dict[str, Any]:
        """The seed and the budget."""
        return {"seed": self.seed, "target_skip_ratio": self.target_skip_ratio}

    @classmethod
    def from_checkpoint(
        cls, options: dict[str, Any], num_layers: int, hidden_size: int, folder_file: Callable[[str], str]
    ) -> RandomRouter:
        """Rebuild the router."""
        return cls(num_layers, **options)
