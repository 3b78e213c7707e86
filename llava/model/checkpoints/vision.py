"""The vision tower a LLaVA sees with, read from a checkpoint of CLIP."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import AutoConfig, CLIPVisionConfig

from llava.model.checkpoints.key_maps import TOWER
from llava.model.checkpoints.weight_files import read_weights

PROJECTOR_TYPES = ("mlp2x_gelu",)
SELECT_FEATURES = {"patch": "default", "cls_patch": "full"}
"""LLaVA's name of what is taken from the vision tower -> transformers' name."""

NO_VISION = ("text_", "visual_projection", "logit_scale")
"""Starts of names in a checkpoint of CLIP that are not the vision model's."""


@dataclass(frozen=True)
class VisionSettings:
    """How a language model is given sight.

    Attributes:
        vision_tower: CLIP checkpoint, folder or hub id.
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


def read_vision_config(settings: VisionSettings) -> CLIPVisionConfig:
    """Read the tower's configuration, from a checkpoint of CLIP or of its vision model alone.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is a model of another kind, or lacks the layer that features are taken from.
    """
    try:
        found = AutoConfig.from_pretrained(settings.vision_tower)
    except OSError as error:
        raise FileNotFoundError(
            f"Vision tower {settings.vision_tower} is no folder of a CLIP checkpoint, and cannot be had from the hub "
            "either; its configuration is needed. Download it, or correct mm_vision_tower in config.json."
        ) from error
    if found.model_type not in ("clip", "clip_vision_model"):
        raise ValueError(
            f"{settings.vision_tower} is a model of type {found.model_type}; a CLIP checkpoint is needed. "
            "LLaVA-1.5 uses openai/clip-vit-large-patch14-336."
        )
    vision = found.vision_config if found.model_type == "clip" else found
    if not -vision.num_hidden_layers - 1 <= settings.select_layer <= vision.num_hidden_layers:
        raise ValueError(
            f"Layer {settings.select_layer} is not in {settings.vision_tower}, which has {vision.num_hidden_layers}; "
            "LLaVA-1.5 uses -2."
        )
    return vision


def read_vision_weights(vision_tower: str) -> dict[str, Tensor]:
    """Read the tower's weights: released name -> tensor, with constants that old files hold."""
    weights = read_weights(vision_tower, lambda name: not name.startswith(NO_VISION))
    return {TOWER + name.removeprefix("vision_model."): tensor for name, tensor in weights.items()}
