"""What RoE's layer-wise router looks at: one state for the image and one for each turn, at every layer.

Two sources behind one interface. ``TokenSource`` reads RoE's routing tokens where they stand; ``PooledSource`` averages
the positions of image and question, adds nothing to the sequence and works with any attention kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fuzzyroe.compat import RoECompat
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.routing_tokens import RoEPass, RoutingTokens, insert_tokens
from fuzzyroe.token_layout import find_segments


@dataclass(frozen=True)
class Summary:
    """What a source leaves in ``RoEPass.summary`` for the layers of one forward pass.

    Attributes:
        read: States of a layer (B, S, D) to those of the image and of each turn, (B, 1 + T, D).
        norms: Norm that each layer begins with, L of them.
        turn_mask: Which turns each row has, (B, T) bool.
    """

    read: Callable[[Tensor], Tensor]
    norms: tuple[nn.Module, ...]
    turn_mask: Tensor


class TokenSource(nn.Module):
    """Reads the states of routing tokens, which it inserts into the sequence.

    Args:
        hidden_size: Width D of the decoder.
        compat: Where the tokens stand and what they read.
    """

    def __init__(self, hidden_size: int, compat: RoECompat) -> None:
        super().__init__()
        self.compat = compat
        self.tokens = RoutingTokens(hidden_size)

    def prepare(self, decoder: nn.Module, inputs: dict[str, Any], routing: RoutingState) -> dict[str, Any]:
        """Insert the tokens, and note in the state where they are.

        Returns:
            The decoder's keywords with the tokens among its positions.
        """
        inputs = insert_tokens(self.tokens, decoder, inputs, routing, self.compat)
        read = functools.partial(_gather, inputs["routing"].roe.layout.token_positions)
        return _with_summary(decoder, inputs, read)


class PooledSource(nn.Module):
    """Reads mean states: of the prefix with its image, and of each question. It has no parameters.

    Args:
        hidden_size: Width D of the decoder.
        compat: As for ``TokenSource``.
    """

    def __init__(self, hidden_size: int, compat: RoECompat) -> None:
        super().__init__()
        self.compat = compat

    def prepare(self, decoder: nn.Module, inputs: dict[str, Any], routing: RoutingState) -> dict[str, Any]:
        """Note in the state which positions are averaged.

        Returns:
            The decoder's keywords with that state.
        """
        shares = find_segments(routing, self.compat).reads.float()  # (B, 1 + T, N)
        shares = shares / shares.sum(dim=-1, keepdim=True).clamp(min=1)
        return _with_summary(decoder, inputs, functools.partial(_average, shares))


SOURCES: dict[str, type[TokenSource] | type[PooledSource]] = {"tokens": TokenSource, "pooled": PooledSource}
"""Summary sources by name."""


def _gather(places: Tensor, hidden_states: Tensor) -> Tensor:
    index = places.to(hidden_states.device).unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1])
    return hidden_states.gather(1, index)


def _average(shares: Tensor, hidden_states: Tensor) -> Tensor:
    return shares.to(hidden_states.device, hidden_states.dtype) @ hidden_states


def _with_summary(decoder: nn.Module, inputs: dict[str, Any], read: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    routing: RoutingState = inputs["routing"]
    turns = torch.arange(1, routing.planned_turns() + 1, device=routing.turn_ids.device).view(1, -1, 1)
    turn_mask = (routing.turn_ids.unsqueeze(1) == turns).any(dim=-1)
    summary = Summary(read, tuple(layer.input_layernorm for layer in decoder.layers), turn_mask)
    return {**inputs, "routing": replace(routing, roe=replace(routing.roe or RoEPass(), summary=summary))}
