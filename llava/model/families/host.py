"""transformers' LLaVA, the host of every family: its classes, vision settings, a configuration joined from parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlavaConfig as HostConfig
from transformers import LlavaForConditionalGeneration as HostModel
from transformers import LlavaModel as HostInnerModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector as HostProjector

from llava.constants import DEFAULT_IMAGE_TOKEN

__all__ = [
    "SELECT_FEATURES",
    "HostConfig",
    "HostInnerModel",
    "HostModel",
    "HostProjector",
    "VisionSettings",
    "join_configs",
    "locate",
]

SELECT_FEATURES = {"patch": "default", "cls_patch": "full"}
"""LLaVA's name of the features taken from the vision tower -> transformers' name."""

PROJECTOR_TYPES = ("mlp2x_gelu",)

VOCABULARY_MULTIPLE = 64
"""New token ids are rounded up to it, as in released checkpoints: matrix products like it."""


@dataclass(frozen=True)
class VisionSettings:
    """The vision tower of a model, and which of its features the projector reads.

    Attributes:
        vision_tower: Checkpoint of the vision tower, folder or hub id.
        projector_type: LLaVA's name of the projector's form.
        select_layer: Layer of the tower that features are taken from, counted from its end if negative.
        select_feature: "patch" without, "cls_patch" with the class token.

    Raises:
        ValueError: If projector or features are of an unknown kind.
    """

    vision_tower: str
    projector_type: str = "mlp2x_gelu"
    select_layer: int = -2
    select_feature: str = "patch"

    def __post_init__(self) -> None:
        if self.projector_type not in PROJECTOR_TYPES:
            raise ValueError(
                f"Projector type {self.projector_type} is not available, {', '.join(PROJECTOR_TYPES)} is: that of "
                "LLaVA-1.5 and of transformers' LLaVA. Use it."
            )
        if self.select_feature not in SELECT_FEATURES:
            raise ValueError(
                f"Vision feature {self.select_feature} is unknown; {' and '.join(SELECT_FEATURES)} are known. Use one."
            )


def join_configs(
    text: Any, vision: Any, settings: VisionSettings, tokenizer: Any, count_features: Callable[[Any], int]
) -> Any:
    """Make the configuration of a model out of those of its parts.

    Args:
        text: The language model's; its vocabulary grows until it holds the tokenizer's.
        vision: The vision tower's.
        settings: How features are taken from the tower.
        tokenizer: Has an image token; gets a padding token if it has none.
        count_features: The family's ``count_image_features``.
    """
    if tokenizer.pad_token_id is None:  # as in LLaVA; it is masked wherever it pads
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if len(tokenizer) > text.vocab_size:
        text.vocab_size = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    text.pad_token_id = tokenizer.pad_token_id
    config: Any = HostConfig(
        text_config=text,
        vision_config=vision,
        projector_hidden_act="gelu",
        vision_feature_layer=settings.select_layer,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    config.image_token_id = tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
    config.vision_feature_select_strategy = SELECT_FEATURES[settings.select_feature]
    config.bos_token_id, config.eos_token_id = text.bos_token_id, text.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    config.image_seq_length = count_features(config)
    config.mm_vision_tower = settings.vision_tower  # so that a later command may name it again
    return config


def locate(name: str, folder: str | Path) -> str:
    """Find what a checkpoint names: in its own folder if it is there, else where the name says, as folder or hub id."""
    beside = Path(folder) / name
    return str(beside.resolve()) if beside.is_dir() else name
