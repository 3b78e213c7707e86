"""The layout of one forward pass: where routing tokens stand among the positions of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Prompt and routing tokens in one sequence of S = N + 1 + T positions.

    Attributes:
        order: What stands at each position: below N a position of the prompt, from N on a routing token, (B, S).
        attention_mask: 2D mask (B, S), or 4D (B, 1, S, S) bool, True where a row may look.
        position_ids: Rotary position of each, (..., B, S).
        turn_ids: Turn of each, (B, S); a routing token has the turn it decides, the image token 0.
        prompt_positions: Where the positions of the prompt stand, (B, N).
        token_positions: Where the routing tokens stand, (B, 1 + T).
    """

    order: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    turn_ids: Tensor
    prompt_positions: Tensor
    token_positions: Tensor
