"""Prompt hashes: numbers that distinguish prompts, the same in every batch and under any padding.

They are made of integers only: of the bits of the embeddings of the question, which are exact look-ups, and of the
pixels. Image states are left out: their last bits depend on the batch they were computed in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuzzyroe.features import mean_over_images
from fuzzyroe.routing_state import RoutingState

NUM_COORDINATES = 8
"""Coordinates of an embedding that are hashed; two tokens that agree in all of them are one token."""

GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed number
MIX = (30, -4658895280553007687), (27, -7723592293110685705), (31, 1)


def prompt_hashes(hidden_states: Tensor, routing: RoutingState) -> Tensor:
    """Give a number for each turn, from its question and the images of its row; everything stays on the device.

    Args:
        hidden_states: States before the first decoder layer, (B, N, D).
        routing: Where the questions are; ``pixel_values`` are read if it has any.

    Returns:
        Prompt hashes, (B, T) int64; for a turn that an example does not have, of an empty question.
    """
    tokens = _hash_rows(hidden_states[..., :NUM_COORDINATES])  # (B, N)
    num_turns = routing.planned_turns()
    turns = torch.arange(1, num_turns + 1, device=hidden_states.device).view(1, -1, 1)
    is_own = routing.question_mask.unsqueeze(1) & ((routing.turn_ids.unsqueeze(1) == turns) | (num_turns == 1))
    positions = is_own.cumsum(dim=-1)  # (B, T, N), counted from the question's first token, wherever padding has put it
    text = torch.where(is_own, _scramble(tokens.unsqueeze(1) + GOLDEN * positions), 0).sum(dim=-1)  # (B, T)
    if routing.pixel_values is None:
        return _scramble(text)
    numbers = _hash_rows(routing.pixel_values.flatten(0, -4).flatten(1))  # (images,)
    # 40 bits each: sums of them are exact in float64, in any order
    exact = ((numbers >> 24) & (2**40 - 1)).double().to(routing.image_mask.device)
    images = mean_over_images(exact, routing.image_mask.sum(dim=1)).view(torch.int64)  # (B,), 0 without an image
    return _scramble(text + images.to(text.device).unsqueeze(-1))


def uniforms(numbers: Tensor, count: int, seed: int) -> Tensor:
    """Give numbers that look drawn from [0, 1), (B, T, count), but follow from prompt hashes, (B, T), and the seed."""
    draws = torch.arange(1, count + 1, device=numbers.device)
    mixed = _scramble(_scramble(numbers.unsqueeze(-1) + seed) + GOLDEN * draws)
    return ((mixed >> 40) & 0xFFFFFF).float() / 2**24  # 24 bits: all that float32 tells apart below 1


def _hash_rows(values: Tensor) -> Tensor:
    """Hash the bits of floating-point numbers over the last dimension, by a weight for each position, modulo 2^64."""
    bits = values.float().contiguous().view(torch.int32).long()  # halves are widened first, which is exact
    positions = torch.arange(1, bits.shape[-1] + 1, device=bits.device)
    return _scramble((bits * (_scramble(GOLDEN * positions) | 1)).sum(dim=-1))


def _scramble(numbers: Tensor) -> Tensor:
    """Spread small differences over all 64 bits (the finaliser of SplitMix64)."""
    for shift, factor in MIX:
        # shifted as unsigned numbers: torch's own shift would copy the sign into the freed bits
        numbers = (numbers ^ ((numbers >> shift) & (2 ** (64 - shift) - 1))) * factor
    return numbers
