"""A model put together from a language model, a vision tower and a new projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from llava.model.checkpoints.contents import CheckpointContents, check_complete, extend_vocabulary
from llava.model.checkpoints.files import LANGUAGE_MODELS
from llava.model.checkpoints.names import HEAD, to_hf_names
from llava.model.checkpoints.tokenizer import read_tokenizer
from llava.model.checkpoints.weights import read_weights
from llava.model.families import Family, VisionSettings, default_family
from llava.model.families.host import join_configs


def compose(language_model: str | Path, settings: VisionSettings) -> CheckpointContents:
    """Put a model together; weights stay in their files, and those of the projector are left to be drawn.

    Token ids that the language model lacks, the image token's among them, get the mean of its embeddings.

    Args:
        language_model: Folder or hub id of a Llama checkpoint, such as Vicuna.
        settings: Vision tower, and which of its features are read.

    Raises:
        ValueError: If a part is of another kind, or lacks weights.
    """
    family = default_family()
    config, tokenizer = compose_config(language_model, settings)
    # both parts keep their own names in their files, which mean the same in any layout
    weights = to_hf_names(read_weights(language_model), family, str(language_model))
    weights |= read_tower_weights(settings.vision_tower, family)
    extend_vocabulary(weights, config.text_config.vocab_size)
    if config.tie_word_embeddings:
        weights.pop(HEAD, None)  # stored or not, it is the embeddings
    check_complete(weights, config, f"{language_model} with {settings.vision_tower}", new_part="projector")
    image_processor = family.image_processor(settings.vision_tower)
    return CheckpointContents(config, weights, tokenizer, image_processor, path=str(language_model))


def compose_config(language_model: str | Path, settings: VisionSettings) -> tuple[Any, Any]:
    """Give configuration and tokenizer of what ``compose`` puts together; no weights are read.

    Args:
        language_model: Folder or hub id of a Llama checkpoint, such as Vicuna.
        settings: Vision tower, and which of its features are read.

    Raises:
        ValueError: If the language model or the tower is of another kind, or the tower lacks the layer.
    """
    text = AutoConfig.from_pretrained(language_model)
    if text.model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"{language_model} is a model of type {text.model_type}; {' or '.join(LANGUAGE_MODELS)} can be given a "
            "vision tower. Name another --model_name_or_path."
        )
    family, tokenizer = default_family(), read_tokenizer(language_model)
    vision = family.read_tower_config(settings)
    return join_configs(text, vision, settings, tokenizer, family.count_image_features), tokenizer


def read_tower_weights(vision_tower: str, family: Family) -> dict[str, Tensor]:
    """Read the weights of a vision tower from its own checkpoint.

    Args:
        vision_tower: Folder or hub id, of the tower alone or of a model that has a text side too.
        family: Family whose tower it becomes.

    Returns:
        Name in Hugging Face's files -> tensor.
    """
    stored = {family.tower_to_hf.rename(name): tensor for name, tensor in read_weights(vision_tower).items()}
    return to_hf_names({name: tensor for name, tensor in stored.items() if name is not None}, family, vision_tower)
