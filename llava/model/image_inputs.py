"""Images as LLaVA's callers pass them, brought into one tensor with one entry per view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def stack_images(images: Any) -> tuple[Tensor | None, list[int]]:
    """Stack images of any form that LLaVA accepts.

    Args:
        images: One of: None; a tensor (images, 3, H, W); a tensor (images, tiles, 3, H, W); a list of tensors
            (3, H, W), or (tiles, 3, H, W) for an image that ``process_images`` cut into tiles.

    Returns:
        All views, (views, 3, H, W), None if there is no image; and the number of views of each image.

    Raises:
        TypeError: If the images are something else, or no floating-point numbers.
        ValueError: If a tensor has another number of dimensions.
    """
    if images is None or (isinstance(images, Tensor | Sequence) and len(images) == 0):
        return None, []
    items = list(images) if isinstance(images, Tensor | Sequence) else [images]
    wrong = {f"{type(item).__name__}" for item in items if not isinstance(item, Tensor)}
    wrong |= {str(item.dtype) for item in items if isinstance(item, Tensor) and not item.is_floating_point()}
    if wrong:
        raise TypeError(
            f"images holds {', '.join(sorted(wrong))}; floating-point tensors are needed. Pass PIL images through "
            "llava.mm_utils.process_images first."
        )
    shapes = [tuple(item.shape) for item in items]
    if any(len(shape) not in (3, 4) for shape in shapes):
        raise ValueError(
            f"images has shape {tuple(images.shape) if isinstance(images, Tensor) else shapes}; give "
            "(images, 3, H, W), (images, tiles, 3, H, W) or a list of (3, H, W) or (tiles, 3, H, W)."
        )
    # an image is a list of views, of one where it was not cut into tiles
    views = [item if item.dim() == 4 else item.unsqueeze(0) for item in items]
    return torch.cat(views), [len(item) for item in views]


def match_images(num_markers: Sequence[int], views: Tensor | None, num_views: list[int]) -> tuple[Tensor | None, list]:
    """Give each marker its image.

    A row without marker may bring a black image, which LLaVA's own collator gives to text; it is dropped.

    Args:
        num_markers: Markers of each row, B.
        views: Views of all images, (views, 3, H, W); None if there is none.
        num_views: Views of each image.

    Returns:
        The views that markers stand for, and the number of views of each of their images.

    Raises:
        ValueError: If there are more or fewer images than markers.
    """
    if len(num_views) == sum(num_markers):
        return views, num_views
    # LLaVA's collator gives a black image to each row of text
    owners = [count > 0 for count in num_markers for _ in range(max(count, 1))]
    if views is not None and len(num_views) == len(owners):
        is_used = torch.tensor(owners).repeat_interleave(torch.tensor(num_views))
        if not views[(~is_used).to(views.device)].any():
            used = views[is_used.to(views.device)]
            return (used if len(used) else None), [n for n, owner in zip(num_views, owners, strict=True) if owner]
    raise ValueError(
        f"{len(num_views)} images meet prompts with {list(num_markers)} image markers (id -200); give one image per "
        "marker, in the order of the rows. llava.mm_utils.tokenizer_image_token makes a marker of each <image>."
    )
