"""The oracle router: replays, for prompts whose answer was known, the plan that hurt that answer least."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuzzyroe.plan_search import allocate_skips
from fuzzyroe.prompt_hash import prompt_hashes
from fuzzyroe.routers.base import Router
from fuzzyroe.routing_state import RoutingState


class OracleRouter(Router):
    """A bound, not a policy: it knows the prompts of a test set by their hashes and their best plans by search.

    Plans come from ``fuzzyroe.plan_search``. A budget is shared out among the known prompts so that their summed loss
    is least. A prompt that it does not know is refused.

    Args:
        num_prompts: Known prompts, n.
        max_skips: Layers that a plan skips at most, K.
        num_layers: Layers of the decoder, L.
        target_skip_ratio: Mean skip rate planned for by default.

    Attributes:
        known: Prompt hashes, ascending, (n,) int64.
        plans: True where the layer runs when a prompt skips k layers, (n, K + 1, L) bool.
        losses: Loss of the answer under that plan, (n, K + 1).

    Reference:
        Duo-LLM reports trained routers beside such an oracle.
    """

    stays_in_float32 = True  # losses of neighbouring plans differ by little

    def __init__(self, num_prompts: int, max_skips: int, num_layers: int, target_skip_ratio: float = 0.0) -> None:
        super().__init__()
        self.num_prompts, self.max_skips, self.num_layers = num_prompts, max_skips, num_layers
        self.register_buffer("known", torch.zeros(num_prompts, dtype=torch.int64))
        self.register_buffer("plans", torch.ones(num_prompts, max_skips + 1, num_layers, dtype=torch.bool))
        self.register_buffer("losses", torch.zeros(num_prompts, max_skips + 1))
        self.set_skip_rate(target_skip_ratio)

    @classmethod
    def from_search(cls, known: Tensor, plans: Tensor, losses: Tensor) -> OracleRouter:
        """Make a router of search results; of a prompt that was searched twice, one result is taken.

        Args:
            known: Prompt hashes, (n,) int64.
            plans: (n, K + 1, L) bool.
            losses: (n, K + 1).
        """
        known, first = (torch.from_numpy(part) for part in np.unique(known.cpu().numpy(), return_index=True))
        router = cls(len(known), plans.shape[1] - 1, plans.shape[2])
        router.known.copy_(known)
        router.plans.copy_(plans[first])
        router.losses.copy_(losses[first])
        return router

    @property
    def max_skip_ratio(self) -> float:
        """As deep as the search went."""
        return self.max_skips / self.num_layers

    def plan(self, hidden_states: Tensor, routing: RoutingState) -> None:
        """Look the plan of each question up; the weights of an unknown one are nan, which hard routing refuses."""
        numbers = prompt_hashes(hidden_states, routing)  # (B, T)
        place = torch.searchsorted(self.known, numbers).clamp(max=self.num_prompts - 1)
        rates = self.requested_rates(routing, torch.device("cpu")).double().expand(numbers.shape[0], 1)
        tables = {rate: self._num_skips(rate) for rate in set(rates.flatten().tolist())}
        counts = torch.stack([tables[rate] for rate in rates.flatten().tolist()]).to(numbers.device)  # (B, n)
        keep = self.plans[place, counts.gather(1, place)].float()  # (B, T, L)
        is_unknown = (self.known[place] != numbers).unsqueeze(-1)
        routing.result.keep_weights = keep.masked_fill(is_unknown, torch.nan)

    def _num_skips(self, skip_rate: float) -> Tensor:
        """Layers that each known prompt skips at a budget, (n,) int64."""
        return torch.from_numpy(allocate_skips(self.losses.double().cpu().numpy(), skip_rate * self.num_layers))

    def settings(self) -> dict[str, Any]:
        """The sizes of the tables and the budget."""
        return {
            "num_prompts": self.num_prompts,
            "max_skips": self.max_skips,
            "target_skip_ratio": self.target_skip_ratio,
        }

    @classmethod
    def from_checkpoint(
        cls, options: dict[str, Any], num_layers: int, hidden_size: int, folder_file: Callable[[str], str]
    ) -> OracleRouter:
        """Rebuild the router; its tables are tensors."""
        return cls(num_layers=num_layers, **options)
