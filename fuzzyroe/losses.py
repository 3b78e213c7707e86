"""Next-token losses over the learned tokens, by position, sample and turn."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED_LABEL = -100
"""Label of a token that is not learned, as everywhere in PyTorch."""


def next_token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the token that each position predicts, in float32 nats; 0 where nothing is learned.

    Args:
        logits: (B, N, V).
        labels: Token ids, ``IGNORED_LABEL`` where nothing is learned, (B, N).

    Returns:
        Losses of the tokens at positions 1 to N - 1, (B, N - 1).
    """
    targets = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses.view(targets.shape)


def sample_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token loss of each sample, (B,); 0 for a sample without labels. Arguments as above."""
    count = (labels[:, 1:] != IGNORED_LABEL).sum(dim=1)
    return next_token_losses(logits, labels).sum(dim=1) / count.clamp(min=1)


def turn_losses(logits: Tensor, labels: Tensor, turn_ids: Tensor, num_turns: int) -> Tensor:
    """Mean next-token loss of each answered turn.

    Args:
        logits: (B, N, V).
        labels: Token ids, ``IGNORED_LABEL`` where nothing is learned, (B, N).
        turn_ids: Turn of each position, (B, N), from 1; 0 and -1 are of no turn.
        num_turns: T.

    Returns:
        One loss per answered turn, sample by sample, turn by turn, (turns,).
    """
    is_learned = (labels[:, 1:] != IGNORED_LABEL).float()
    index = turn_ids[:, 1:].clamp(min=0)  # column 0 collects what belongs to no turn
    sums = logits.new_zeros(labels.shape[0], num_turns + 1, dtype=torch.float32)
    counts = sums.scatter_add(1, index, is_learned)
    sums = sums.scatter_add(1, index, next_token_losses(logits, labels))
    return (sums / counts.clamp(min=1))[:, 1:][answered_turns(labels, turn_ids, num_turns)]


def answered_turns(labels: Tensor, turn_ids: Tensor, num_turns: int) -> Tensor:
    """Which turns have at least one learned token, (B, T) bool, from labels and turn ids (B, N)."""
    turns = torch.arange(1, num_turns + 1, device=labels.device).view(1, -1, 1)
    is_learned = (labels != IGNORED_LABEL).unsqueeze(1)  # (B, 1, N)
    return ((turn_ids.unsqueeze(1) == turns) & is_learned).any(dim=-1)
