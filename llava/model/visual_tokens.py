"""Visual tokens: the features of each image, the evidence of which of them matter, and their positions in prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava.model.families import HostInnerModel


@dataclass(frozen=True)
class VisualTokens:
    """Tokens of a batch of images, in the order of the patches.

    Attributes:
        features: Features that the decoder reads, (images, P, D).
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


def encode_images(llava_model: HostInnerModel, pixel_values: Tensor, **options: Any) -> VisualTokens:
    """Run ``get_image_features`` on images, (images, 3, H, W), and read class attention and keys on the way.

    Queries and keys are read from the tower's own projections while it runs: no layer runs twice, any attention kernel
    will do, and features stay the same bit for bit.

    Raises:
        ValueError: If the features hold more than the patches.
    """
    check_prunable(llava_model.config)
    attention = _attention_of_features(llava_model)
    outputs: dict[str, Tensor] = {}
    hooks = [
        getattr(attention, name).register_forward_hook(lambda *call, name=name: outputs.update({name: call[-1]}))
        for name in ("q_proj", "k_proj")
    ]
    try:
        features = llava_model.get_image_features(pixel_values, return_dict=True, **options).pooler_output
    finally:
        for hook in hooks:
            hook.remove()
    # (images, 1 + P, heads, head size), the class token first
    queries, keys = (
        outputs[name].detach().float().unflatten(-1, (-1, attention.head_dim)) for name in ("q_proj", "k_proj")
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


def _attention_of_features(llava_model: HostInnerModel) -> Any:
    """Find the attention of the tower's layer whose output becomes the features; of the last one, where several do."""
    tower, chosen = llava_model.vision_tower, llava_model.config.vision_feature_layer
    layers: nn.ModuleList = getattr(tower, "vision_model", tower).encoder.layers
    # hidden state 0 is the input of the first layer, so state n comes from layer n - 1
    index = chosen if isinstance(chosen, int) else chosen[-1]
    producer = (index if index >= 0 else index + len(layers) + 1) - 1
    if producer < 0:
        raise ValueError(
            f"vision_feature_layer is {chosen}, before the first layer; token pruning needs the output of a layer. "
            "Choose another, -2 in LLaVA-1.5."
        )
    return layers[producer].self_attn


def first_positions(input_ids: Tensor, image_token_id: int) -> Tensor:
    """Mark the first of each run of image tokens, (B, N) bool; a run does not go on in the next row."""
    is_image = input_ids == image_token_id
    is_first = is_image.clone()
    is_first[:, 1:] &= ~is_image[:, :-1]
    return is_first


def image_lengths(input_ids: Tensor, image_token_id: int, num_images: int) -> list[int]:
    """Count the positions of each image.

    Neighbouring image tokens are one image; where that does not give as many images as there are, all of them have the
    same length.

    Args:
        input_ids: Token ids with images expanded, (B, N).
        image_token_id: Token id of image positions.
        num_images: Images of the batch, at least 1, in the order of its rows.

    Raises:
        ValueError: If the image tokens cannot be divided among the images.

    >>> image_lengths(torch.tensor([[1, 9, 9, 5], [9, 9, 9, 2]]), image_token_id=9, num_images=2)
    [2, 3]
    """
    is_image = input_ids == image_token_id
    runs_so_far = first_positions(input_ids, image_token_id).flatten().cumsum(0)
    run = runs_so_far[is_image.flatten()] - 1  # the run that each image token is part of
    lengths = run.bincount().tolist() if len(run) else []
    if len(lengths) == num_images:
        return lengths
    # images side by side make one run: then only equal lengths can be told
    length, surplus = divmod(len(run), num_images)
    if length == 0 or surplus or any(count % length for count in lengths):
        raise ValueError(
            f"{num_images} images meet {len(run)} image tokens in runs of {lengths}; allowed is one run per image, or "
            "equally many tokens for each. Put a token between images that keep different numbers."
        )
    return [length] * num_images
