"""Image statistics: how much there is to see, read from the pixels before any part of the model runs.

Pixels come as a CLIP image processor gives them, with a standard deviation of about 1, so that full contrast between
neighbours is about 4. Both statistics are a handful of elementwise passes over one grey image: at 336 x 336 pixels
about a millionth of the vision tower's arithmetic. They grow with the amount of detail.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EDGE_STEP = 0.4
"""A brightness step of a tenth of full contrast counts as a whole edge, a smaller one in proportion."""

CODING_STEP = 0.05
"""Differences are coded in steps of this size, about three of an eight-bit image's 256."""

FULL_CONTRAST = 4.0


def edge_density(pixel_values: Tensor) -> Tensor:
    """Mean over pixels of ``min(1, |gradient| / EDGE_STEP)``: the share of pixels on an edge, soft at weak edges.

    Args:
        pixel_values: Normalised images, (images, channels, H, W).

    Returns:
        Values in [0, 1], (images,); nan for an image with a non-finite pixel.
    """
    across, down = _differences(pixel_values)
    gradient = (across[:, :-1].square() + down[:, :, :-1].square()).sqrt()  # (images, H - 1, W - 1)
    return (gradient / EDGE_STEP).clamp(max=1).mean(dim=(1, 2))


def coding_cost(pixel_values: Tensor) -> Tensor:
    """Mean length of a code for each pixel's difference to its left neighbour: how badly the image compresses.

    A difference d costs ``log(1 + |d| / CODING_STEP)``, as lengths of universal codes do; the mean is divided by the
    cost of ``FULL_CONTRAST``. PNG predicts pixels in the same manner before it compresses.

    Args:
        pixel_values: Normalised images, (images, channels, H, W).

    Returns:
        Values in [0, 1], (images,); nan for an image with a non-finite pixel.
    """
    across, _ = _differences(pixel_values)
    cost = torch.log1p(across.abs() / CODING_STEP).mean(dim=(1, 2))
    return (cost / math.log1p(FULL_CONTRAST / CODING_STEP)).clamp(max=1)


def mean_over_images(values: Tensor, image_tokens: Tensor) -> Tensor:
    """Average a statistic over the images of each row.

    Images stand in the order of the rows and take equally many positions each, so the positions say whose they are.

    Args:
        values: One number per image, (images,).
        image_tokens: Image positions of each row, (B,).

    Returns:
        Means, (B,); 0 for a row without an image.
    """
    ends = image_tokens.cumsum(0)  # (B,)
    tokens_per_image = ends[-1] / len(values)
    middles = (torch.arange(len(values), device=values.device) + 0.5) * tokens_per_image  # (images,)
    is_own = (middles >= (ends - image_tokens).unsqueeze(1)) & (middles < ends.unsqueeze(1))  # (B, images)
    sums = torch.where(is_own, values, 0.0).sum(dim=1)  # no product: nan of one row stays out of the others
    return sums / is_own.sum(dim=1).clamp(min=1)


def _differences(pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of grey values to the left and the upper neighbour, (images, H, W - 1) and (images, H - 1, W)."""
    grey = pixel_values.float().mean(dim=1)
    grey = torch.where(torch.isfinite(grey), grey, torch.nan)  # an infinite pixel must not be cut to a large one
    return grey.diff(dim=2), grey.diff(dim=1)
