"""Configuration and tokenizer of a model, read without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlavaConfig

from llava.model.checkpoint_layout import read_config_dict
from llava.model.compose import LANGUAGE_MODELS, VisionSettings, compose_config


def is_language_model(config: dict[str, Any]) -> bool:
    """Whether a configuration is that of a language model that can be given sight."""
    return config.get("model_type") in LANGUAGE_MODELS


def read_text_side(model_path: str | Path, settings: VisionSettings | None = None) -> tuple[LlavaConfig, Any]:
    """Configuration and tokenizer of a LLaVA checkpoint, or of the LLaVA that a language model will become.

    Args:
        model_path: Folder or hub id of either.
        settings: What the language model will see with; not for a LLaVA checkpoint.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If a language model comes without ``settings``.
    """
    if not is_language_model(read_config_dict(model_path)):
        return LlavaConfig.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    if settings is None:
        raise ValueError(
            f"{model_path} is a language model; a CLIP checkpoint must be named as its vision tower, "
            "LLaVA-1.5's is openai/clip-vit-large-patch14-336."
        )
    return compose_config(model_path, settings)
