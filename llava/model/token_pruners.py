"""Token pruners: which visual tokens of an image the decoder reads, and what becomes of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.model.visual_tokens import VisualTokens


class TokenPruner(Protocol):
    """Turns the tokens of images into fewer."""

    def __call__(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Give ``num_kept`` tokens per image, (images, num_kept, D), for 1 <= ``num_kept`` < P."""
        ...


@dataclass(frozen=True)
class DominantMerged:
    """Keeps the tokens that the class token attends to, and merges the others by the similarity of their keys.

    Of the kept number, ``merged_share`` are spread evenly over the tokens that do not dominate; each becomes the mean
    of itself and of those that are more like it than like the others so chosen. The question plays no part. The kept
    tokens stand in the order of their patches.

    Attributes:
        merged_share: Share of the kept tokens that are merged ones, in [0, 1).

    Reference:
        VisionZip (arXiv:2412.04467), "dominant" and "contextual" tokens; 54 and 10 of 64 there. It merges in front of
        the projector and puts merged tokens last.
    """

    merged_share: float = 10 / 64

    def __post_init__(self) -> None:
        if not 0 <= self.merged_share < 1:
            raise ValueError(f"merged_share is {self.merged_share}; choose a share in [0, 1).")

    def __call__(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Give dominant and merged tokens, (images, num_kept, D)."""
        num_images, num_tokens = tokens.class_attention.shape
        num_merged = min(round(num_kept * self.merged_share), num_kept - 1)
        ranked = tokens.class_attention.argsort(dim=1, descending=True, stable=True)
        dominant, rest = ranked[:, : num_kept - num_merged], ranked[:, num_kept - num_merged :].sort(dim=1).values
        targets = rest[:, spread(num_merged, rest.shape[1], rest.device)]  # (images, num_merged)
        merged = _merge(tokens, rest, targets)
        kept = torch.cat([dominant, targets], dim=1)
        features = torch.cat([_take(tokens.features, dominant), merged.to(tokens.features.dtype)], dim=1)
        return _take(features, kept.argsort(dim=1))


@dataclass(frozen=True)
class Even:
    """Keeps tokens at even distances and drops the others: what a choice by evidence has to beat."""

    def __call__(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Give every (P / num_kept)-th token, (images, num_kept, D)."""
        return tokens.features[:, spread(num_kept, tokens.features.shape[1], tokens.features.device)]


PRUNERS: dict[str, TokenPruner] = {"dominant_merged": DominantMerged(), "even": Even()}
"""Pruners by name."""


def get_pruner(name: str) -> TokenPruner:
    """Look a pruner up.

    Raises:
        KeyError: If there is none of this name; the message lists the known ones.
    """
    if name not in PRUNERS:
        raise KeyError(f"Token pruner '{name}' is unknown; use one of {', '.join(PRUNERS)}.")
    return PRUNERS[name]


def spread(number: int, length: int, device: torch.device) -> Tensor:
    """Give the middles of ``number`` equal parts of ``range(length)``, (number,) int64, ascending, all different."""
    return (torch.arange(number, device=device) * 2 + 1) * length // (2 * max(number, 1))


def _merge(tokens: VisualTokens, members: Tensor, targets: Tensor) -> Tensor:
    """Average the members, (images, R), that are most like each target, (images, M); give (images, M, D), float32."""
    if targets.shape[1] == 0:
        return tokens.features.new_zeros(len(targets), 0, tokens.features.shape[2], dtype=torch.float32)
    keys = F.normalize(tokens.keys, dim=-1)
    similarity = _take(keys, members) @ _take(keys, targets).transpose(1, 2)  # (images, R, M)
    is_target = members.unsqueeze(2) == targets.unsqueeze(1)
    nearest = similarity.masked_fill(is_target, torch.inf).argmax(dim=2)  # (images, R)
    weights = F.one_hot(nearest, targets.shape[1]).float()  # (images, R, M)
    weights = weights / weights.sum(dim=1, keepdim=True)
    return weights.transpose(1, 2) @ _take(tokens.features.float(), members)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Pick entries, (images, n), of values, (images, P, width), for every image; (images, n, width)."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
