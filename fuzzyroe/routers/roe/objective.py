"""RoE's objective: the answers' loss, and a hinge on the skip rate that easy samples feel most.

For a sample with mean token loss t and skip rate s, under a target rho::

    t + exp(-damping * t) * max(0, rho - s)

The factor is a constant to the gradient: about 1 for a sample that is answered well, 0.08 at t = 0.5 and nothing at
t = 2, so a sample is pushed to skip only once it is easy. The mean is over samples, not over tokens.

Reference:
    RoE (arXiv:2407.14093), sparsity regularisation; damping 5 is that of its training code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fuzzyroe.losses import IGNORED_LABEL, sample_losses

DAMPING = 5.0


@dataclass(frozen=True)
class Objective:
    """The objective of a batch, with its parts.

    Attributes:
        loss: What is minimised, a scalar.
        task: Mean token loss of each sample, (B,).
        hinge: ``max(0, rho - s)`` of each sample, (B,).
        skip_rate: Skip rate s of each sample, (B,).
    """

    loss: Tensor
    task: Tensor
    hinge: Tensor
    skip_rate: Tensor


def sample_skip_rates(keep_weights: Tensor, turn_mask: Tensor) -> Tensor:
    """Mean skip weight of each sample over its turns and all layers, (B,); 0 for a sample without turns.

    The system prompt and the image do not count, although they are routed too.

    Args:
        keep_weights: Keep weights in [0, 1], (B, T, L).
        turn_mask: Which turns each sample has, (B, T) bool.
    """
    skipped = (1 - keep_weights.mean(dim=2)) * turn_mask
    return skipped.sum(dim=1) / turn_mask.sum(dim=1).clamp(min=1)


def routing_objective(
    logits: Tensor,
    labels: Tensor,
    keep_weights: Tensor,
    turn_mask: Tensor,
    skip_ratio: float,
    damping: float = DAMPING,
    weight: float = 1.0,
) -> Objective:
    """The objective of a batch; a sample without labels has no part in the mean.

    Args:
        logits: (B, N, V).
        labels: Token ids, ``IGNORED_LABEL`` where nothing is learned, (B, N).
        keep_weights: Keep weights in [0, 1], (B, T, L).
        turn_mask: Which turns each sample has, (B, T) bool.
        skip_ratio: Target rho.
        damping: How fast the hinge fades with the loss.
        weight: Weight of the hinge, 1 in RoE.
    """
    task, skip_rate = sample_losses(logits, labels), sample_skip_rates(keep_weights, turn_mask)
    hinge = (skip_ratio - skip_rate).clamp(min=0)
    # detached: the factor weighs the hinge, and must not teach the model to answer badly
    damped = weight * torch.exp(-damping * task.detach()) * hinge
    # a sample without labels has loss 0, which would count as answered perfectly
    has_labels = (labels[:, 1:] != IGNORED_LABEL).any(dim=1)
    loss = ((task + damped.to(task.device)) * has_labels).sum() / has_labels.sum().clamp(min=1)
    return Objective(loss, task.detach(), hinge.detach(), skip_rate.detach())
