"""A LLaVA put together from a language model, a CLIP vision tower and a new projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlavaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.model.checkpoints.backbone import Backbone, check_complete
from llava.model.checkpoints.joined_config import extend_vocabulary, join_configs
from llava.model.checkpoints.key_maps import HEAD, PROJECTOR, to_released
from llava.model.checkpoints.layout import LANGUAGE_MODELS
from llava.model.checkpoints.tokenizer import read_tokenizer
from llava.model.checkpoints.vision import VisionSettings, read_vision_config, read_vision_weights
from llava.model.checkpoints.weight_files import read_weights


def compose(language_model: str | Path, settings: VisionSettings) -> Backbone:
    """Put a LLaVA together; weights stay in their files, and those of the projector are left to be drawn.

    Token ids that the language model lacks, the image token's among them, get the mean of its embeddings.

    Args:
        language_model: Folder or hub id of a Llama checkpoint, such as Vicuna.
        settings: What it sees with.

    Raises:
        ValueError: If a part is of another kind, or lacks weights.
    """
    config, tokenizer = compose_config(language_model, settings)
    weights = to_released(read_weights(language_model), str(language_model))
    weights |= to_released(read_vision_weights(settings.vision_tower), settings.vision_tower)
    extend_vocabulary(weights, config.text_config.vocab_size)
    if config.tie_word_embeddings:
        weights.pop(HEAD, None)
    check_complete(weights, config, f"{language_model} with {settings.vision_tower}", but=PROJECTOR)
    image_processor = CLIPImageProcessorPil.from_pretrained(settings.vision_tower)
    return Backbone(config, weights, tokenizer, image_processor, path=str(language_model))


def compose_config(language_model: str | Path, settings: VisionSettings) -> tuple[LlavaConfig, Any]:
    """Configuration and tokenizer of what ``compose`` puts together; no weights are read.

    Args:
        language_model: Folder or hub id of a Llama checkpoint, such as Vicuna.
        settings: What it sees with.

    Raises:
        ValueError: If the language model or the tower is of another kind, or the tower lacks the layer.
    """
    text = AutoConfig.from_pretrained(language_model)
    if text.model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"{language_model} is a model of type {text.model_type}; {' or '.join(LANGUAGE_MODELS)} can be given a "
            "vision tower. Name another --model_name_or_path."
        )
    tokenizer = read_tokenizer(language_model)
    return join_configs(text, read_vision_config(settings), settings, tokenizer), tokenizer
