"""The vision tower under the names that LLaVA's users know it by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava.model.families import SELECT_FEATURES, HostModel, count_image_features


class VisionTowerFacade:
    """A loaded model's vision tower; what is not named here is the tower module's own (``parameters``, ``to``, ...).

    Args:
        model: Loaded model.
        image_processor: Its image processor.

    Attributes:
        is_loaded: Always True; a checkpoint is loaded with its tower.
        vision_tower: The module, a CLIP vision model.
        image_processor: Its image processor; None for a model that was built by hand.
    """

    is_loaded = True

    def __init__(self, model: HostModel, image_processor: Any) -> None:
        self.vision_tower, self.image_processor = model.model.vision_tower, image_processor
        self._config = model.config

    def __getattr__(self, name: str) -> Any:
        if name == "vision_tower":  # not set yet, as in unpickling
            raise AttributeError(name)
        return getattr(self.vision_tower, name)

    def __call__(self, images: Tensor) -> Tensor:
        """Features before the projector: (images, 3, H, W) to (images, patches, hidden size)."""
        tower = self.vision_tower
        states = tower(images.to(tower.device, tower.dtype), output_hidden_states=True).hidden_states
        chosen = [states[index] for index in self._layers]
        first = 1 if self._config.vision_feature_select_strategy == "default" else 0  # the class token stands first
        return torch.cat([state[:, first:] for state in chosen], dim=-1).to(images.dtype)

    @property
    def select_layer(self) -> int | list[int]:
        """Layer that features are taken from, counted from the end if negative."""
        return self._config.vision_feature_layer

    @property
    def select_feature(self) -> str:
        """ "patch" without, "cls_patch" with the class token."""
        names = {ours: theirs for theirs, ours in SELECT_FEATURES.items()}
        return names[self._config.vision_feature_select_strategy]

    @property
    def hidden_size(self) -> int:
        """Width of the features."""
        return self.vision_tower.config.hidden_size * len(self._layers)

    @property
    def num_patches_per_side(self) -> int:
        """Patches along an edge of the image."""
        return self.vision_tower.config.image_size // self.vision_tower.config.patch_size

    @property
    def num_patches(self) -> int:
        """Features of an image."""
        return count_image_features(self._config)

    @property
    def _layers(self) -> list[int]:
        layer = self.select_layer
        return [layer] if isinstance(layer, int) else list(layer)
