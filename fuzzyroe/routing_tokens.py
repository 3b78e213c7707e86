"""Routing tokens: learned embeddings that pass through the decoder beside a prompt and observe it.

They exist inside one forward pass of the decoder only. ``insert_tokens`` puts them among the positions before the
first layer; ``take_tokens_out`` removes them from the states and from the cache behind the last. What is left, logits,
cache and its length, is what a prompt without them leaves, so that decoding, beams and cropping know nothing of them.

Reference:
    RoE (arXiv:2407.14093), "routing tokens".
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fuzzyroe.cache import RoutedCacheLayer
from fuzzyroe.compat import RoECompat
from fuzzyroe.layout import Layout
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.schedule import Relaxation
from fuzzyroe.token_layout import lay_out

INITIAL_SPREAD = 0.02
"""Standard deviation that RoE's tokens really start with."""


@dataclass(frozen=True)
class RoEPass:
    """What RoE's router alone is asked in a forward pass, and what it remembers of it: ``RoutingState.roe``.

    Attributes:
        relaxation: How logits become keep weights in training.
        layout: Where the routing tokens of this pass stand; None where there are none.
        summary: What the summary source left for the layers.
    """

    relaxation: Relaxation = field(default_factory=Relaxation)
    layout: Layout | None = None
    summary: Any = None


class RoutingTokens(nn.Module):
    """Two learned embeddings: of the token of the image, and of that of every turn.

    Args:
        hidden_size: Width D of the decoder.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.empty(hidden_size).normal_(std=INITIAL_SPREAD))
        self.text = nn.Parameter(torch.empty(hidden_size).normal_(std=INITIAL_SPREAD))

    def forward(self, num_rows: int, num_turns: int) -> Tensor:
        """Give the tokens of a batch, the image's first, (B, 1 + T, D)."""
        turns = self.text.unsqueeze(0).expand(num_turns, -1)
        return torch.cat([self.image.unsqueeze(0), turns]).unsqueeze(0).expand(num_rows, -1, -1)


def insert_tokens(
    tokens: RoutingTokens, decoder: nn.Module, inputs: dict[str, Any], routing: RoutingState, compat: RoECompat
) -> dict[str, Any]:
    """Give the inputs of a decoder with routing tokens among its positions.

    Args:
        tokens: The embeddings.
        decoder: The module that holds the layers.
        inputs: Keywords of its forward, with ``inputs_embeds`` (B, N, D).
        routing: State of the prompt.
        compat: Where tokens stand and what they read.

    Returns:
        New keywords; ``routing`` is a state for the layers, which shares its result with the caller's.

    Raises:
        ValueError: If the attention kernel or the mask cannot keep routing tokens from being seen.
    """
    embeddings, attention_mask = inputs["inputs_embeds"], inputs.get("attention_mask")
    _check_attention(decoder, attention_mask, compat)
    if attention_mask is None:
        attention_mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    layout = lay_out(routing, attention_mask, inputs.get("position_ids"), compat)
    tokens_of_batch = tokens(embeddings.shape[0], routing.planned_turns())
    together = torch.cat([embeddings, tokens_of_batch.to(embeddings)], dim=1)  # (B, S, D)
    return {
        **inputs,
        "inputs_embeds": _take(together, layout.order),
        "attention_mask": _as_kernel_mask(decoder, layout.attention_mask, embeddings.dtype),
        "position_ids": layout.position_ids,
        "routing": replace(routing, roe=replace(routing.roe or RoEPass(), layout=layout)),
    }


def take_tokens_out(decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the decoder: remove routing tokens from states and cache.

    Attention weights, where they are asked for, keep the rows and columns of routing tokens.

    Returns:
        The output without them, or None if there were none.
    """
    routing = kwargs.get("routing")
    if routing is None or routing.roe is None or routing.roe.layout is None:
        return None
    places = routing.roe.layout.prompt_positions
    if isinstance(output, tuple):
        return tuple(_without_tokens(value, places) for value in output)
    for name, value in output.items():
        output[name] = _without_tokens(value, places)
    return output


def _without_tokens(value: Any, places: Tensor) -> Any:
    """States (B, S, D), a tuple of them, or a cache: what is left of it at the places of the prompt, (B, N)."""
    if isinstance(value, tuple):
        return tuple(_without_tokens(item, places) for item in value)
    if isinstance(value, Tensor) and value.dim() == 3:
        return _take(value, places)
    if hasattr(value, "layers"):
        _shrink_cache(value, places)
    return value


def _shrink_cache(cache: Any, places: Tensor) -> None:
    """Keep the keys and values of the prompt, in its order."""
    for layer in cache.layers:
        if isinstance(layer, RoutedCacheLayer):
            layer.seen = places.shape[1]
        if layer.is_initialized:
            rows = places.to(layer.keys.device)
            if layer.keys.shape[0] != rows.shape[0]:
                rows = rows[layer.split.rows(rows.device)[0]]  # stored are the kept rows only
            index = rows[:, None, :, None]
            layer.keys = layer.keys.gather(2, index.expand(*layer.keys.shape[:2], -1, layer.keys.shape[-1]))
            layer.values = layer.values.gather(2, index.expand(*layer.values.shape[:2], -1, layer.values.shape[-1]))


def _take(states: Tensor, places: Tensor) -> Tensor:
    """Positions of states (B, S, D) by place (B, M), as (B, M, D)."""
    return states.gather(1, places.to(states.device).unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def _check_attention(decoder: nn.Module, attention_mask: Tensor | None, compat: RoECompat) -> None:
    kernel = decoder.config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise ValueError(
            f"Routing tokens were asked for under attention '{kernel}'; only sdpa and eager hide them from the prompt. "
            "Load with attn_implementation='sdpa', or train a router with --routing_summary pooled."
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"The attention mask has shape {tuple(attention_mask.shape)}; routing tokens are added to a (B, N) mask. "
            "Pass a 2D mask."
        )


def _as_kernel_mask(decoder: nn.Module, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A 4D mask as the kernel wants it: eager attention adds it to the scores, and would add True as 1."""
    if mask.dim() == 2 or decoder.config._attn_implementation != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
