"""Routing tokens of RoE: trained embeddings that pass through the decoder beside a prompt and observe it.

They exist inside one forward pass of the decoder only: inserted before the first layer, removed from states and cache
behind the last. What is left, logits, cache and its length, is what a prompt without them leaves, so that decoding,
beams and cropping know nothing of them. No position of the prompt sees a routing token, and routing tokens do not see
each other. There is one token for the image and one for every turn.

The segment of the image token is the prefix: system prompt and image, up to the first question. That of the token of
turn t is the question of turn t. Where tokens stand is data, a ``Layout``:

- *inline*, the default: each token stands right behind its segment. Its column is 0 in the 2D attention mask, so any
  causal kernel that takes such a mask will do; it reads all that lies before it.
- *in front*, as published: the tokens stand before the prompt, and a 4D mask lets each read itself and its own segment,
  which lies behind it.

``SOURCES`` puts mean states of the same segments, which need no tokens, behind the same interface.

Reference:
    RoE (arXiv:2407.14093), "routing tokens".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fuzzyroe.cache import RoutedCacheLayer
from fuzzyroe.routers.roe.training import Relaxation, RoECompat
from fuzzyroe.routing_state import RoutingState

INITIAL_SPREAD = 0.02
"""Standard deviation that RoE's tokens really start with."""


@dataclass(frozen=True)
class Segments:
    """Segment of each routing token, that of the image token first.

    Attributes:
        reads: Positions of each segment, (B, 1 + T, N) bool.
        first: First position of each row that is no padding, (B, 1).
        turn_ids: Turn of each position as the routing tokens count it, (B, N).
    """

    reads: Tensor
    first: Tensor
    turn_ids: Tensor


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


@dataclass(frozen=True)
class Summary:
    """States that the router looks at in each layer of one forward pass.

    Attributes:
        read: States of a layer (B, S, D) to those of the image and of each turn, (B, 1 + T, D).
        norms: Norm that each layer begins with, L of them.
        turn_mask: Which turns each row has, (B, T) bool.
    """

    read: Callable[[Tensor], Tensor]
    norms: tuple[nn.Module, ...]
    turn_mask: Tensor


@dataclass(frozen=True)
class RoEPass:
    """Everything that RoE's router alone is asked in a forward pass, and remembers of it: ``RoutingState.roe``.

    Attributes:
        relaxation: How logits become keep weights in training; all that a caller gives.
        layout: Where the routing tokens of this pass stand; None where there are none.
        summary: What the summary source left for the layers.
    """

    relaxation: Relaxation = field(default_factory=Relaxation)
    layout: Layout | None = None
    summary: Summary | None = None


class TokenSource(nn.Module):
    """Summary source that inserts routing tokens into the sequence and reads their states.

    Args:
        hidden_size: Width D of the decoder.
        compat: Where the tokens stand and what they read.
    """

    def __init__(self, hidden_size: int, compat: RoECompat) -> None:
        super().__init__()
        self.compat = compat
        self.tokens = RoutingTokens(hidden_size)

    def prepare(self, decoder: nn.Module, inputs: dict[str, Any], routing: RoutingState) -> dict[str, Any]:
        """Insert the tokens, and see to it that they are gone when the decoder is through; see ``Router.prepare``.

        Raises:
            ValueError: If the attention kernel or the mask cannot keep routing tokens from being seen.
        """
        embeddings, attention_mask = inputs["inputs_embeds"], inputs.get("attention_mask")
        _check_attention(decoder, attention_mask)
        if attention_mask is None:
            attention_mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        layout = lay_out(routing, attention_mask, inputs.get("position_ids"), self.compat)
        tokens = self.tokens(embeddings.shape[0], routing.planned_turns())
        together = torch.cat([embeddings, tokens.to(embeddings)], dim=1)  # (B, S, D)
        _remove_after_pass(decoder, layout)
        inputs = {
            **inputs,
            "inputs_embeds": _take(layout.order, together),
            "attention_mask": _as_kernel_mask(decoder, layout.attention_mask, embeddings.dtype),
            "position_ids": layout.position_ids,
        }
        return _with_summary(decoder, inputs, routing, functools.partial(_take, layout.token_positions), layout)


class PooledSource(nn.Module):
    """Summary source that averages the states of the prefix with its image, and of each question.

    It has no parameters, adds nothing to the sequence and works with any attention kernel.
    """

    def __init__(self, hidden_size: int, compat: RoECompat) -> None:
        super().__init__()
        self.compat = compat

    def prepare(self, decoder: nn.Module, inputs: dict[str, Any], routing: RoutingState) -> dict[str, Any]:
        """Give the decoder's keywords with a state that knows which positions are averaged."""
        shares = find_segments(routing, self.compat).reads.float()  # (B, 1 + T, N)
        shares = shares / shares.sum(dim=-1, keepdim=True).clamp(min=1)

        def average(states: Tensor) -> Tensor:
            return shares.to(states.device, states.dtype) @ states

        return _with_summary(decoder, inputs, routing, average)


SOURCES: dict[str, type[TokenSource] | type[PooledSource]] = {"tokens": TokenSource, "pooled": PooledSource}
"""Summary sources by name."""


class RoutingTokens(nn.Module):
    """Two trained embeddings (D,): of the token of the image, and of that of every turn."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.empty(hidden_size).normal_(std=INITIAL_SPREAD))
        self.text = nn.Parameter(torch.empty(hidden_size).normal_(std=INITIAL_SPREAD))

    def forward(self, num_rows: int, num_turns: int) -> Tensor:
        """Give the tokens of a batch, the image's first, (B, 1 + T, D)."""
        turns = self.text.unsqueeze(0).expand(num_turns, -1)
        return torch.cat([self.image.unsqueeze(0), turns]).unsqueeze(0).expand(num_rows, -1, -1)


def find_segments(routing: RoutingState, compat: RoECompat) -> Segments:
    """Find the segment of each routing token; ``image_segment_takes_one_more`` acts in soft mode, in training."""
    turn_ids, num_turns = routing.turn_ids, routing.planned_turns()
    positions = torch.arange(turn_ids.shape[1], device=turn_ids.device).unsqueeze(0)  # (1, N)
    is_text = turn_ids > 0
    num_before_text = _first_true(is_text, otherwise=turn_ids.shape[1])
    if compat.image_segment_takes_one_more and routing.mode == "soft":
        turn_ids = turn_ids.masked_fill(is_text & (positions == num_before_text), 0)
        num_before_text = num_before_text + 1
    prefix = (turn_ids >= 0) & (positions < num_before_text)
    turns = torch.arange(1, num_turns + 1, device=turn_ids.device).view(1, -1, 1)
    questions = routing.question_mask.unsqueeze(1) & (turn_ids.unsqueeze(1) == turns)  # (B, T, N)
    return Segments(
        torch.cat([prefix.unsqueeze(1), questions], dim=1), _first_true(routing.turn_ids >= 0, otherwise=0), turn_ids
    )


def lay_out(routing: RoutingState, attention_mask: Tensor, position_ids: Tensor | None, compat: RoECompat) -> Layout:
    """Put the routing tokens of a batch into their positions.

    Args:
        routing: Says where turns and questions are.
        attention_mask: Non-zero at positions that are no padding, (B, N).
        position_ids: Rotary positions of the prompt, (..., B or 1, N); None for 0, 1, 2, ...
        compat: Says where the tokens stand, and which positions they count as.
    """
    segments = find_segments(routing, compat)
    num_rows, num_tokens, num_positions = segments.reads.shape
    device = segments.reads.device
    positions = torch.arange(num_positions, device=device)
    # a segment without positions (no prefix, a turn that this row does not have) puts its token behind the first one
    anchors = torch.where(segments.reads, positions, -1).amax(dim=-1)  # (B, 1 + T)
    anchors = torch.maximum(anchors, segments.first)
    numbers = torch.arange(num_tokens, device=device).expand(num_rows, -1)
    # sorting these keys lays the sequence out: between two positions of the prompt there is room for every token
    token_keys = numbers - num_tokens if compat.tokens_in_front else anchors * (num_tokens + 1) + 1 + numbers
    keys = torch.cat([(positions * (num_tokens + 1)).expand(num_rows, -1), token_keys], dim=1)  # (B, S)
    order = keys.argsort(dim=1)
    where = order.argsort(dim=1)
    return Layout(
        order=order,
        attention_mask=_attention_mask(segments, attention_mask, order, compat),
        position_ids=_position_ids(routing, position_ids, anchors, order, compat),
        turn_ids=torch.cat([segments.turn_ids, numbers.to(segments.turn_ids)], dim=1).gather(1, order),
        prompt_positions=where[:, :num_positions],
        token_positions=where[:, num_positions:],
    )


def _attention_mask(segments: Segments, attention_mask: Tensor, order: Tensor, compat: RoECompat) -> Tensor:
    num_rows, num_tokens, num_positions = segments.reads.shape
    if not compat.tokens_in_front:
        hidden = attention_mask.new_zeros(num_rows, num_tokens)
        return torch.cat([attention_mask, hidden], dim=1).gather(1, order)
    device = segments.reads.device
    causal = torch.ones(num_positions, num_positions, dtype=torch.bool, device=device).tril()
    prompt = causal & attention_mask.bool().unsqueeze(1)  # (B, N, N)
    prompt = torch.cat([prompt, prompt.new_zeros(num_rows, num_positions, num_tokens)], dim=2)
    itself = torch.eye(num_tokens, dtype=torch.bool, device=device).expand(num_rows, -1, -1)
    tokens = torch.cat([segments.reads, itself], dim=2)  # (B, 1 + T, S)
    allowed = torch.cat([prompt, tokens], dim=1)  # (B, S, S), the prompt first
    rows, columns = order.unsqueeze(2).expand_as(allowed), order.unsqueeze(1).expand_as(allowed)
    return allowed.gather(1, rows).gather(2, columns).unsqueeze(1)


def _position_ids(
    routing: RoutingState, position_ids: Tensor | None, anchors: Tensor, order: Tensor, compat: RoECompat
) -> Tensor:
    num_rows, num_positions = routing.turn_ids.shape
    if position_ids is None:
        position_ids = torch.arange(num_positions, device=order.device).unsqueeze(0)
    prompt = position_ids.expand(*position_ids.shape[:-2], num_rows, num_positions)  # (..., B, N)
    if compat.tokens_take_positions:
        tokens = torch.ones_like(prompt[..., : anchors.shape[1]])
        if routing.mode == "soft":
            tokens = tokens.cumsum(dim=-1) - 1
            prompt = prompt + anchors.shape[1]
    else:
        tokens = prompt.gather(-1, anchors.expand(*prompt.shape[:-1], -1))
    together = torch.cat([prompt, tokens], dim=-1)
    return together.gather(-1, order.expand_as(together))


def _first_true(mask: Tensor, otherwise: int) -> Tensor:
    """First True of each row, (B, 1); ``otherwise`` for a row without any."""
    first = mask.int().argmax(dim=1, keepdim=True)
    return torch.where(mask.any(dim=1, keepdim=True), first, otherwise)


def _with_summary(
    decoder: Any,
    inputs: dict[str, Any],
    routing: RoutingState,
    read: Callable[[Tensor], Tensor],
    layout: Layout | None = None,
) -> dict[str, Any]:
    """Give the decoder's keywords with a state whose ``roe`` says how the layers are read."""
    turns = torch.arange(1, routing.planned_turns() + 1, device=routing.turn_ids.device).view(1, -1, 1)
    turn_mask = (routing.turn_ids.unsqueeze(1) == turns).any(dim=-1)
    summary = Summary(read, tuple(layer.input_layernorm for layer in decoder.layers), turn_mask)
    roe = replace(routing.roe or RoEPass(), layout=layout, summary=summary)
    positions = None if layout is None else layout.prompt_positions
    return {**inputs, "routing": replace(routing, roe=roe, prompt_positions=positions)}


def _remove_after_pass(decoder: nn.Module, layout: Layout) -> None:
    """Take the tokens out of states and cache when the decoder is through.

    A pre-hook cannot change what a forward gives, so this pass brings a hook of its own, which goes with it. Attention
    weights, where they are asked for, keep the rows and columns of routing tokens.
    """

    def take_out(decoder: nn.Module, args: tuple, output: Any) -> Any:
        handle.remove()
        if isinstance(output, tuple):
            return tuple(_without_tokens(value, layout.prompt_positions) for value in output)
        for name, value in (output or {}).items():  # None where the forward failed
            output[name] = _without_tokens(value, layout.prompt_positions)
        return output

    handle = decoder.register_forward_hook(take_out, always_call=True)


def _without_tokens(value: Any, positions: Tensor) -> Any:
    """States (B, S, D), a tuple of them, or a cache: what is left of it at the positions of the prompt, (B, N)."""
    if isinstance(value, tuple):
        return tuple(_without_tokens(item, positions) for item in value)
    if isinstance(value, Tensor) and value.dim() == 3:
        return _take(positions, value)
    for layer in getattr(value, "layers", ()):  # of a cache
        if isinstance(layer, RoutedCacheLayer):
            layer.seen = positions.shape[1]
        if layer.is_initialized:
            rows = positions.to(layer.keys.device)
            if layer.keys.shape[0] != rows.shape[0]:
                rows = rows[layer.split.rows(rows.device)[0]]  # stored are the kept rows only
            index = rows[:, None, :, None]
            layer.keys = layer.keys.gather(2, index.expand(*layer.keys.shape[:2], -1, layer.keys.shape[-1]))
            layer.values = layer.values.gather(2, index.expand(*layer.values.shape[:2], -1, layer.values.shape[-1]))
    return value


def _take(positions: Tensor, states: Tensor) -> Tensor:
    """Pick positions, (B, M), of states, (B, S, D); gives (B, M, D)."""
    return states.gather(1, positions.to(states.device).unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def _check_attention(decoder: Any, attention_mask: Tensor | None) -> None:
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


def _as_kernel_mask(decoder: Any, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A 4D mask as the kernel wants it: eager attention adds it to the scores, and would add True as 1."""
    if mask.dim() == 2 or decoder.config._attn_implementation != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
