"""The skip adapter that stands in for a decoder layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ADAPTER_INITS = ("zero", "xavier")


class SkipAdapter(nn.Module):
    """A bias-free bottleneck ``W_B relu(W_A h)`` that replaces the update of a skipped layer.

    A skipped layer gives ``h + adapter(input_layernorm(h))``. With ``init="zero"`` the up-projection starts at zero,
    so an untrained skip is the identity; with ``init="xavier"`` both projections start at Xavier-uniform values.

    Args:
        hidden_size: Width D of the decoder.
        width: Width of the bottleneck, at least 1.
        init: ``"zero"`` or ``"xavier"``.

    Raises:
        ValueError: If a size is below 1 or ``init`` is unknown.

    Reference:
        RoE (arXiv:2407.14093), section on adapters; the zero start follows LoRA (arXiv:2106.09685).
    """

    def __init__(self, hidden_size: int, width: int, init: str = "zero") -> None:
        super().__init__()
        if hidden_size < 1 or width < 1:
            raise ValueError(
                f"SkipAdapter got hidden_size={hidden_size} and width={width}; both must be at least 1. "
                "Pass the decoder's hidden size and a positive adapter width."
            )
        if init not in ADAPTER_INITS:
            raise ValueError(f"Unknown adapter init '{init}'; known: {', '.join(ADAPTER_INITS)}. Pick one of these.")
        self.init = init
        self.down = nn.Linear(hidden_size, width, bias=False)
        self.up = nn.Linear(width, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the starting weights that ``init`` names."""
        nn.init.xavier_uniform_(self.down.weight)
        # were both zero, neither would ever get a gradient
        if self.init == "zero":
            nn.init.zeros_(self.up.weight)
        else:
            nn.init.xavier_uniform_(self.up.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Give the update of the residual stream.

        Args:
            hidden_states: Normalised hidden states, (B, N, D).

        Returns:
            The update, (B, N, D).
        """
        return self.up(torch.relu(self.down(hidden_states)))
