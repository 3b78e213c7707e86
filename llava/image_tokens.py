"""How many positions of the decoder an image takes, read from a model's own configuration."""

from __future__ import annotations

from typing import Any


def count_image_tokens(config: Any) -> int:
    """Number of image tokens per image.

    Args:
        config: A ``LlavaConfig``; ``num_visual_tokens``, where token pruning has set it, is the number.

    Returns:
        How many positions a prompt gives to an image: all of ``count_image_features``, unless tokens are pruned.

    Raises:
        ValueError: If the patch size does not divide the image size.
    """
    pruned = getattr(config, "num_visual_tokens", None)
    return count_image_features(config) if pruned is None else pruned


def count_image_features(config: Any) -> int:
    """Number of features that vision tower and projector give for an image.

    Args:
        config: A ``LlavaConfig``: ``vision_config.image_size`` and ``patch_size`` in pixels,
            ``vision_feature_select_strategy`` "default" (patches only) or "full" (with the class token).

    Returns:
        (image_size / patch_size)^2, one more where the class token is kept; 576 for CLIP ViT-L/14-336.

    Raises:
        ValueError: If the patch size does not divide the image size.
    """
    vision = config.vision_config
    if vision.image_size % vision.patch_size:
        raise ValueError(
            f"Patch size {vision.patch_size} does not divide image size {vision.image_size}; use a vision tower "
            "whose image size is a multiple of its patch size."
        )
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + (config.vision_feature_select_strategy == "full")
