"""Prompts in LLaVA's calling convention, beside the same prompts expanded by hand for transformers'."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

NUM_POSITIONS, IMAGE_TOKEN_ID, PADDING_ID = 16, 95, 0
"""Of the tiny LLaVA in ``conftest.py``."""

# One image, none, two images with text between them, an image in front: rows of different lengths.
ROWS = [
    [1, 11, 12, IMAGE_TOKEN_INDEX, 13, 14, 15],
    [1, 21, 22, 23],
    [1, 31, IMAGE_TOKEN_INDEX, 32, 33, IMAGE_TOKEN_INDEX, 34],
    [IMAGE_TOKEN_INDEX, 41, 42],
]


@dataclass
class Call:
    """One batch in both conventions.

    Attributes:
        rows: Ids with -200, without padding.
        input_ids, mask: Ids with -200, padded, and what is no padding, (B, M).
        images: One per marker, (images, 3, 32, 32).
        expanded_ids, expanded_mask: Ids with image tokens, padded on the same side, (B, N).
    """

    rows: list[list[int]]
    input_ids: Tensor
    mask: Tensor
    images: Tensor
    expanded_ids: Tensor
    expanded_mask: Tensor

    @property
    def llava(self) -> dict:
        """Keywords in LLaVA's convention."""
        return {"attention_mask": self.mask, "images": self.images if len(self.images) else None}

    @property
    def stock(self) -> dict:
        """Keywords in transformers' convention."""
        images = {"pixel_values": self.images} if len(self.images) else {}
        return {"input_ids": self.expanded_ids, "attention_mask": self.expanded_mask, **images}


def pad(rows: list[list[int]], side: str, padding: int = PADDING_ID) -> tuple[Tensor, Tensor]:
    """Padded rows and their mask, both (B, N) int64."""
    longest = max(map(len, rows))

    def fill(row: list[int], value: int) -> list[int]:
        missing = [value] * (longest - len(row))
        return missing + row if side == "left" else row + missing

    ids = [fill(row, padding) for row in rows]
    return torch.tensor(ids), torch.tensor([fill([1] * len(row), 0) for row in rows])


def expand(row: list[int]) -> list[int]:
    """The row with every image in all its positions."""
    expanded: list[int] = []
    for token in row:
        expanded += [IMAGE_TOKEN_ID] * NUM_POSITIONS if token == IMAGE_TOKEN_INDEX else [token]
    return expanded


def expand_labels(row: list[int]) -> list[int]:
    """Labels for ``expand`` where a row with its markers ignored is learned."""
    labels: list[int] = []
    for token in row:
        labels += [IGNORE_INDEX] * NUM_POSITIONS if token == IMAGE_TOKEN_INDEX else [token]
    return labels


def make_call(rows: list[list[int]] = ROWS, side: str = "right", images: Tensor | None = None) -> Call:
    """A batch of some of ``ROWS``, each with its own of the images for all of them; these are random if not given."""
    if images is None:
        num_images = sum(row.count(IMAGE_TOKEN_INDEX) for row in ROWS)
        images = torch.randn(num_images, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    used, start = [], 0
    for row in ROWS:
        end = start + row.count(IMAGE_TOKEN_INDEX)
        used += list(range(start, end)) if row in rows else []
        start = end
    return Call(rows, *pad(rows, side), images[used], *pad([expand(row) for row in rows], side))
