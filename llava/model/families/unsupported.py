"""Families that look like a supported one and are refused by name; each goes when its record is written."""

from __future__ import annotations

from llava.model.families.base import Unsupported

# Told apart by keys, as all of them call themselves "llava".
UNSUPPORTED = (
    Unsupported(
        "VILA-1.5 or NVILA, whose parts lie in three folders",
        lambda settings: bool(settings.get("llm_cfg")),
    ),
    Unsupported(
        "LLaVA-HR, which has two vision towers",
        lambda settings: bool(settings.get("is_multipath_encoder") or settings.get("vision_tower_slow")),
    ),
    Unsupported(
        "LLaVA-NeXT (its image_aspect_ratio or mm_patch_merge_type says so), which cuts images into tiles",
        lambda settings: (
            str(settings.get("mm_patch_merge_type", "flat")) != "flat" or settings.get("image_aspect_ratio") == "anyres"
        ),
        "Load it with transformers' LlavaNextForConditionalGeneration.",
    ),
)
