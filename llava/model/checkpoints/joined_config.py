"""The configuration of a LLaVA, joined from those of its parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaConfig

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.image_tokens import count_image_tokens
from llava.model.checkpoints.key_maps import EMBEDDINGS, HEAD
from llava.model.checkpoints.vision import SELECT_FEATURES, VisionSettings

VOCABULARY_MULTIPLE = 64
"""New token ids are rounded up to it, as in released checkpoints: matrix products like it."""


def join_configs(text: Any, vision: CLIPVisionConfig, settings: VisionSettings, tokenizer: Any) -> LlavaConfig:
    """Make the configuration of a LLaVA out of those of its parts.

    Args:
        text: The language model's; its vocabulary grows until it holds the tokenizer's.
        vision: The vision tower's.
        settings: How features are taken from the tower.
        tokenizer: Has an image token; gets a padding token if it has none.
    """
    if tokenizer.pad_token_id is None:  # as in LLaVA; it is masked wherever it pads
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    image_token_id = tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
    if len(tokenizer) > text.vocab_size:
        text.vocab_size = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    text.pad_token_id = tokenizer.pad_token_id
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image_token_id,
        projector_hidden_act="gelu",
        vision_feature_layer=settings.select_layer,
        vision_feature_select_strategy=SELECT_FEATURES[settings.select_feature],
        tie_word_embeddings=text.tie_word_embeddings,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.image_seq_length = count_image_tokens(config)
    config.mm_vision_tower = settings.vision_tower  # so that a later command may name it again
    return config


def extend_vocabulary(weights: dict[str, Tensor], size: int) -> None:
    """Add rows to embeddings and output head, in place of what they are; the mean row stands out nowhere.

    Args:
        weights: Released name -> tensor.
        size: Rows wanted.
    """
    for name in (EMBEDDINGS, HEAD):
        if name in weights and weights[name].shape[0] < size:
            old = weights[name]
            mean = old.float().mean(dim=0, keepdim=True).to(old.dtype)
            weights[name] = torch.cat([old, mean.expand(size - old.shape[0], -1)])
