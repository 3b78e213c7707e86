"""Visual tokens: what vision tower and projector give for an image, with the evidence of which of them matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaModel


@dataclass(frozen=True)
class VisualTokens:
    """Tokens of a batch of images, in the order of the patches.

    Attributes:
        features: What the decoder reads, (images, P, D).
        class_attention: Attention that the class token of the vision tower pays to each patch, mean over heads, in the
            layer that the features are taken from, (images, P), float32. The rest of 1 falls on the class token itself.
        keys: Keys of the patches in that layer, mean over heads, (images, P, head size), float32.
    """

    features: Tensor
    class_attention: Tensor
    keys: Tensor

    def select(self, images: Tensor) -> VisualTokens:
        """Give the tokens of some images, named by an (n,) int64 tensor."""
        return VisualTokens(self.features[images], self.class_attention[images], self.keys[images])


def encode_images(llava_model: LlavaModel, pixel_values: Tensor, **options: Any) -> VisualTokens:
    """Run vision tower and projector, and read class attention and keys on the way.

    Queries and keys are read from the tower's own projections while it runs, so no layer runs twice and any attention
    kernel will do.

    Args:
        llava_model: The inner model of LLaVA, ``model.model``.
        pixel_values: Images, (images, 3, H, W).
        **options: Passed to ``get_image_features``.

    Returns:
        Features that are those of ``get_image_features`` bit for bit, with their evidence.

    Raises:
        ValueError: If the features hold more than the patches.
    """
    check_prunable(llava_model.config)
    attention = _attention_of_features(llava_model)
    seen: dict[str, Tensor] = {}
    hooks = [
        projection.register_forward_hook(_remember_under(name, seen))
        for name, projection in (("queries", attention.q_proj), ("keys", attention.k_proj))
    ]
    try:
        features = llava_model.get_image_features(pixel_values, return_dict=True, **options).pooler_output
    finally:
        for hook in hooks:
            hook.remove()
    # (images, 1 + P, heads, head size), the class token first
    queries, keys = (
        seen[name].detach().float().unflatten(-1, (-1, attention.head_dim)) for name in ("queries", "keys")
    )
    logits = torch.einsum("ihd,iphd->ihp", queries[:, 0], keys) * attention.scale
    class_attention = logits.softmax(dim=-1).mean(dim=1)  # (images, 1 + P)
    return VisualTokens(torch.stack(list(features)), class_attention[:, 1:], keys[:, 1:].mean(dim=2))


def check_prunable(config: Any) -> None:
    """Raise ValueError unless features are one per patch, of a vision tower with a class token."""
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"vision_feature_select_strategy is '{config.vision_feature_select_strategy}'; token pruning needs "
            "'default', where the class token is left out of the features. Leave pruning off for this model."
        )
    if config.vision_config.model_type != "clip_vision_model":
        raise ValueError(
            f"The vision tower is a {config.vision_config.model_type}; token pruning reads the class token of a "
            "clip_vision_model. Leave pruning off for this model."
        )


def _attention_of_features(llava_model: LlavaModel) -> nn.Module:
    """The attention of the tower's layer whose output becomes the features; of the last one, where several do."""
    tower, chosen = llava_model.vision_tower, llava_model.config.vision_feature_layer
    layers = getattr(tower, "vision_model", tower).encoder.layers
    index = chosen if isinstance(chosen, int) else chosen[-1]  # 0 is what goes into the first layer
    producer = (index if index >= 0 else index + len(layers) + 1) - 1
    if producer < 0:
        raise ValueError(
            f"vision_feature_layer is {chosen}, before the first layer; token pruning needs the output of a layer. "
            "Choose another, -2 in LLaVA-1.5."
        )
    return layers[producer].self_attn


def _remember_under(name: str, seen: dict[str, Tensor]) -> Any:
    def remember(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen[name] = output

    return remember
