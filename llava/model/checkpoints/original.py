"""The configuration of a LLaVA in the original repository's layout, as transformers understands it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlavaConfig, MistralConfig

from llava.model.checkpoints.joined_config import join_configs
from llava.model.checkpoints.vision import VisionSettings, read_vision_config

TEXT_CONFIGS = {"llava": LlamaConfig, "llava_llama": LlamaConfig, "llava_mistral": MistralConfig}
"""``model_type`` in the original repository -> configuration of its language model."""

TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "pretraining_tp",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
)
"""Keys of the original configuration that are the language model's."""

NEEDED_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

KEPT_KEYS = ("image_aspect_ratio", "tokenizer_model_max_length", "max_sequence_length", "fuzzyroe")
"""Keys that keep their names, besides those that start with ``mm_``."""


def read_settings(config: dict[str, Any], path: str | Path) -> VisionSettings:
    """How a checkpoint of the original layout sees.

    Args:
        config: Its ``config.json``.
        path: Its folder or hub id; a vision tower named by a relative path may lie in the folder.

    Raises:
        ValueError: If projector or features are of a kind that LLaVA-1.5 does not have.
    """
    return VisionSettings(
        locate_tower(config["mm_vision_tower"], path),
        config.get("mm_projector_type", "linear"),  # the value that the original assumes where none is given
        config.get("mm_vision_select_layer", -2),
        config.get("mm_vision_select_feature", "patch"),
    )


def locate_tower(name: str, path: str | Path) -> str:
    """Where the vision tower is that a configuration names: in the checkpoint's folder, or where the name says."""
    beside = Path(path) / name
    return str(beside) if beside.is_dir() else name


def build_config(config: dict[str, Any], path: str | Path, tokenizer: Any) -> LlavaConfig:
    """Translate a configuration of the original layout.

    The vocabulary grows by the image token, which the original puts into prompts as a number outside of it.

    Args:
        config: Content of ``config.json``.
        path: Folder or hub id of the checkpoint.
        tokenizer: Its tokenizer, with an image token; gets a padding token if it has none.

    Raises:
        ValueError: If keys are missing, or something is of a kind that LLaVA-1.5 does not have.
    """
    text = build_text_config(config, path)
    settings = read_settings(config, path)
    joined = join_configs(text, read_vision_config(settings), settings, tokenizer)
    for key, value in config.items():
        if key.startswith("mm_") or key in KEPT_KEYS:
            setattr(joined, key, value)
    joined.architectures = ["LlavaForConditionalGeneration"]
    return joined


def build_text_config(config: dict[str, Any], path: str | Path) -> LlamaConfig | MistralConfig:
    """Take the language model's configuration out of one of the original layout.

    Raises:
        ValueError: If it is of another kind, or keys are missing.
    """
    kind = config.get("model_type")
    if kind not in TEXT_CONFIGS:
        raise ValueError(
            f"{path} is a model of type {kind} in the original layout; {', '.join(TEXT_CONFIGS)} are read. LLaVA-1.5 "
            "is built on Llama."
        )
    missing = [key for key in NEEDED_KEYS if key not in config]
    if missing:
        raise ValueError(f"config.json of {path} lacks {', '.join(missing)}; add them as in the base model's.")
    known = {key: config[key] for key in TEXT_KEYS if config.get(key) is not None}
    if kind != "llava_mistral":
        known.pop("sliding_window", None)
    return TEXT_CONFIGS[kind](**known)
