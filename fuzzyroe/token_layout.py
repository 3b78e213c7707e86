"""Where routing tokens stand among the positions of a batch, which positions they read, and which they count as.

Two layouts, both the same kind of data (``Layout``). In either no position of the prompt sees a routing token, and
routing tokens do not see each other: they observe.

- *inline*, the default: each token stands right behind its segment. Its column is 0 in the 2D attention mask, so any
  causal kernel that takes such a mask will do; it reads all that lies before it.
- *in front*, RoE's: the tokens stand before the prompt, and a 4D mask lets each read itself and its own segment, which
  lies behind it.

The segment of the image token is the prefix: system prompt and image, up to the first question. That of the token of
turn t is the question of turn t. There is one image token and one token per turn.

Reference:
    RoE (arXiv:2407.14093), "routing tokens".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fuzzyroe.compat import RoECompat
from fuzzyroe.layout import Layout
from fuzzyroe.routing_state import RoutingState


@dataclass(frozen=True)
class Segments:
    """What each routing token stands for, with the image token first.

    Attributes:
        reads: Positions of each segment, (B, 1 + T, N) bool.
        first: First position of each row that is no padding, (B, 1).
        turn_ids: Turn of each position as the routing tokens count it, (B, N).
    """

    reads: Tensor
    first: Tensor
    turn_ids: Tensor


def find_segments(routing: RoutingState, compat: RoECompat) -> Segments:
    """Find the segment of each routing token.

    Args:
        routing: Says where turns and questions are.
        compat: ``image_segment_takes_one_more`` acts in soft mode, that is in training.
    """
    turn_ids, num_turns = routing.turn_ids, routing.planned_turns()
    places = torch.arange(turn_ids.shape[1], device=turn_ids.device).unsqueeze(0)  # (1, N)
    is_text = turn_ids > 0
    num_before_text = _first_place(is_text, otherwise=turn_ids.shape[1])
    if compat.image_segment_takes_one_more and routing.mode == "soft":
        turn_ids = turn_ids.masked_fill(is_text & (places == num_before_text), 0)
        num_before_text = num_before_text + 1
    prefix = (turn_ids >= 0) & (places < num_before_text)
    turns = torch.arange(1, num_turns + 1, device=turn_ids.device).view(1, -1, 1)
    questions = routing.question_mask.unsqueeze(1) & (turn_ids.unsqueeze(1) == turns)  # (B, T, N)
    return Segments(
        torch.cat([prefix.unsqueeze(1), questions], dim=1), _first_place(routing.turn_ids >= 0, otherwise=0), turn_ids
    )


def lay_out(routing: RoutingState, attention_mask: Tensor, position_ids: Tensor | None, compat: RoECompat) -> Layout:
    """Put the routing tokens of a batch into their places.

    Args:
        routing: Says where turns and questions are.
        attention_mask: Non-zero at positions that are no padding, (B, N).
        position_ids: Rotary positions of the prompt, (..., B or 1, N); None for 0, 1, 2, ...
        compat: ``tokens_in_front`` chooses the layout; the others change numbers in it.
    """
    segments = find_segments(routing, compat)
    num_rows, num_tokens, num_positions = segments.reads.shape
    device = segments.reads.device
    places = torch.arange(num_positions, device=device)
    # a segment without positions (no prefix, a turn that this row does not have) puts its token behind the first one
    anchors = torch.where(segments.reads, places, -1).amax(dim=-1)  # (B, 1 + T)
    anchors = torch.maximum(anchors, segments.first)
    numbers = torch.arange(num_tokens, device=device).expand(num_rows, -1)
    if compat.tokens_in_front:
        token_keys = numbers - num_tokens
    else:
        token_keys = anchors * (num_tokens + 1) + 1 + numbers
    keys = torch.cat([(places * (num_tokens + 1)).expand(num_rows, -1), token_keys], dim=1)  # (B, S)
    order = keys.argsort(dim=1)
    where = order.argsort(dim=1)
    token_turns = numbers.to(segments.turn_ids.dtype)
    return Layout(
        order=order,
        attention_mask=_attention_mask(segments, attention_mask, order, compat),
        position_ids=_position_ids(routing, position_ids, anchors, order, compat),
        turn_ids=torch.cat([segments.turn_ids, token_turns], dim=1).gather(1, order),
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
    rows = order.unsqueeze(2).expand_as(allowed)
    columns = order.unsqueeze(1).expand_as(allowed)
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


def _first_place(mask: Tensor, otherwise: int) -> Tensor:
    """First True of each row, (B, 1); ``otherwise`` for a row without any."""
    found = mask.int().argmax(dim=1, keepdim=True)
    return torch.where(mask.any(dim=1, keepdim=True), found, otherwise)
