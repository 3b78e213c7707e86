"""Families of base models, and what the rest of the code asks about one.

``FAMILIES`` is the only list. Nothing outside this package names a family, or a class of transformers that belongs to
one: ask ``family_of(config)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel

from llava.model.families.base import Family, KeyMap
from llava.model.families.host import SELECT_FEATURES, HostConfig, HostInnerModel, HostModel, VisionSettings
from llava.model.families.llava15 import LLAVA15
from llava.model.families.unsupported import UNSUPPORTED

__all__ = [
    "FAMILIES",
    "SELECT_FEATURES",
    "Family",
    "HostConfig",
    "HostInnerModel",
    "HostModel",
    "KeyMap",
    "VisionSettings",
    "count_image_features",
    "count_image_tokens",
    "default_family",
    "detect_family",
    "family_of",
    "get_image_token_id",
    "published_config",
    "register_vision_classes",
]

FAMILIES: tuple[Family, ...] = (LLAVA15,)
"""All families; the first that recognises a checkpoint is taken, so the most general one stands last."""


def detect_family(settings: Mapping[str, Any], path: str | Path) -> Family | None:
    """Find the family of a checkpoint by the content of its ``config.json``, in any layout.

    Args:
        settings: Content of ``config.json``.
        path: Where it was found, for the message.

    Returns:
        The family; None if none recognises it, as with a language model.

    Raises:
        ValueError: If it is of a family that is known and not supported.
    """
    # first, as their settings hold those of LLaVA-1.5 as well
    for known in UNSUPPORTED:
        if known.recognises(settings):
            raise ValueError(f"{path} is a checkpoint of {known.title}; it is not supported. {known.remedy}")
    return _recognise(settings)


def _recognise(settings: Mapping[str, Any]) -> Family | None:
    return next((family for family in FAMILIES if family.recognises(settings)), None)


def family_of(config: Any) -> Family:
    """Give the family of a loaded configuration.

    Args:
        config: Configuration of a model.

    Raises:
        ValueError: If no family recognises it.
    """
    # not to_dict(), which takes a millisecond: this is asked in every prefill
    family = _recognise({"model_type": config.model_type, **vars(config)})
    if family is None:
        raise ValueError(
            f"A configuration of type {config.model_type} belongs to none of {', '.join(f.title for f in FAMILIES)}; "
            "load a checkpoint of one of these."
        )
    return family


def default_family() -> Family:
    """Give the family that a language model and a vision tower are put together to."""
    return FAMILIES[-1]


def get_image_token_id(config: Any) -> int:
    """Give the token id that marks an image position, in the name that all of transformers' models share."""
    return config.image_token_id


def count_image_features(config: Any) -> int:
    """Count the features that vision tower and projector give for an image, before pruning.

    Raises:
        ValueError: If the patch size does not divide the image size.
    """
    return family_of(config).count_image_features(config)


def count_image_tokens(config: Any) -> int:
    """Count the positions that a prompt gives to an image.

    Args:
        config: Configuration of a model; ``num_visual_tokens``, where token pruning has set it, is the number.

    Returns:
        All of ``count_image_features``, unless tokens are pruned.

    Raises:
        ValueError: If the patch size does not divide the image size.

    >>> count_image_tokens(published_config("7b"))
    576
    """
    pruned = getattr(config, "num_visual_tokens", None)
    return count_image_features(config) if pruned is None else pruned


def published_config(size: str) -> Any:
    """Build the configuration of a published size, without any file.

    Args:
        size: Such as "7b" or "13b".

    Raises:
        KeyError: If no family has this size.
    """
    sizes = {name: build for family in reversed(FAMILIES) for name, build in family.sizes.items()}
    if size not in sizes:
        raise KeyError(f"Size '{size}' is unknown; use one of {', '.join(sizes)}, or name a checkpoint.")
    return sizes[size]()


def register_vision_classes(family: Family) -> None:
    """Let transformers build the family's own vision models from their ``model_type``."""
    for config_class, model_class in family.vision_classes:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)


for _family in FAMILIES:
    register_vision_classes(_family)
