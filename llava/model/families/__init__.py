"""Families of base models, and what the rest of the code asks about one.

``FAMILIES`` is the only list. Nothing outside this package names a family, or a class of transformers that belongs to
one: ask ``family_of(config)``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel

from llava.conversation import get_template
from llava.model.families.base import SELECT_FEATURES as SELECT_FEATURES
from llava.model.families.base import Family as Family
from llava.model.families.base import HostConfig as HostConfig
from llava.model.families.base import HostInnerModel as HostInnerModel
from llava.model.families.base import HostModel as HostModel
from llava.model.families.base import KeyMap as KeyMap
from llava.model.families.base import VisionSettings as VisionSettings
from llava.model.families.llava15 import LLAVA15

logger = logging.getLogger(__name__)

FAMILIES: tuple[Family, ...] = (LLAVA15,)
"""All families; the first that recognises a checkpoint is taken, so the most general one stands last."""

UNSUPPORTED: tuple[tuple[str, Callable[[Mapping[str, Any]], Any], str], ...] = (
    (
        "VILA-1.5 or NVILA, whose parts lie in three folders",
        lambda settings: settings.get("llm_cfg"),
        "Load a LLaVA-1.5 in transformers' or the original layout.",
    ),
    (
        "LLaVA-HR, which has two vision towers",
        lambda settings: settings.get("is_multipath_encoder") or settings.get("vision_tower_slow"),
        "Load a LLaVA-1.5 in transformers' or the original layout.",
    ),
    (
        "LLaVA-NeXT (its image_aspect_ratio or mm_patch_merge_type says so), which cuts images into tiles",
        lambda settings: (
            settings.get("mm_patch_merge_type", "flat") != "flat" or settings.get("image_aspect_ratio") == "anyres"
        ),
        "Load it with transformers' LlavaNextForConditionalGeneration.",
    ),
)
"""Families that call themselves "llava" as well: title, how settings tell, what to do instead."""


def detect_family(settings: Mapping[str, Any], path: str | Path) -> Family | None:
    """Find the family of a checkpoint by the content of its ``config.json``, in any layout.

    Returns:
        The family; None if none recognises it, as with a language model.

    Raises:
        ValueError: If it is of a family that is known and not supported.
    """
    # first, as their settings hold those of LLaVA-1.5 as well
    for title, recognises, remedy in UNSUPPORTED:
        if recognises(settings):
            raise ValueError(f"{path} is a checkpoint of {title}; it is not supported. {remedy}")
    return next((family for family in FAMILIES if family.recognises(settings)), None)


def family_of(config: Any) -> Family:
    """Give the family of a loaded configuration; ValueError if none recognises it."""
    # not to_dict(), which takes a millisecond: this is asked in every prefill
    settings = {"model_type": config.model_type, **vars(config)}
    for family in FAMILIES:
        if family.recognises(settings):
            return family
    raise ValueError(
        f"A configuration of type {config.model_type} belongs to none of {', '.join(f.title for f in FAMILIES)}; load "
        "a checkpoint of one of these."
    )


def choose_template(asked: str | None, config: Any, flag: str) -> tuple[str, str]:
    """Choose the conversation template to run a checkpoint with, and give the reason.

    Args:
        asked: The user's choice; None to go by the checkpoint.
        config: The model's configuration; ``conv_template`` names the template of its training.
        flag: Name of the flag by which users choose.

    Raises:
        KeyError: If the template is unknown.
    """
    named = getattr(config, "conv_template", None)
    if asked is not None:
        # two names may stand for one template
        if named is not None and get_template(asked) != get_template(named):
            logger.warning("%s is %s, but the checkpoint was trained with %s; leave it out.", flag, asked, named)
        chosen, reason = asked, flag
    elif named is not None:
        chosen, reason = named, "named by the checkpoint"
    else:
        family = family_of(config)
        chosen = family.template(config)
        reason = f"{family.title}'s; the checkpoint names none, {flag} chooses another"
    get_template(chosen)  # refuses an unknown name
    return chosen, reason


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
    """Count the positions that a prompt gives to an image: ``num_visual_tokens`` where token pruning has set it.

    >>> count_image_tokens(published_config("7b"))
    576
    """
    pruned = getattr(config, "num_visual_tokens", None)
    return count_image_features(config) if pruned is None else pruned


def published_config(size: str) -> Any:
    """Build the configuration of a published size, such as "7b" or "13b", without any file.

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
