"""The configuration of a LLaVA in the original repository's layout, translated from and to that of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlavaConfig, MistralConfig, PretrainedConfig

from llava.model.checkpoints.joined_config import join_configs
from llava.model.checkpoints.vision import SELECT_FEATURES, VisionSettings, read_vision_config

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

VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)
"""Keys of the vision tower's configuration that decide what it computes."""

WRITTEN_TYPES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
}
"""Language model -> ``model_type`` and class of the original repository."""

NEEDED_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

KEPT_KEYS = (
    "image_aspect_ratio",
    "tokenizer_model_max_length",
    "max_sequence_length",
    "fuzzyroe",
    "num_visual_tokens",
    "token_pruner",
    "conv_template",
)
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


def translate_config(config: LlavaConfig, vision_tower: str, vocab_size: int) -> dict[str, Any]:
    """Translate a configuration into the original layout.

    Args:
        config: Configuration in transformers' layout.
        vision_tower: CLIP checkpoint of the vision tower's form, folder or hub id; the original reads its form there.
        vocab_size: Size of the vocabulary that is written.

    Returns:
        Content of ``config.json``.

    Raises:
        ValueError: If something cannot be said in the original layout.
    """
    _check_translatable(config)
    check_tower(config, vision_tower)
    text = config.text_config
    model_type, architecture = WRITTEN_TYPES[text.model_type]
    known = {key: getattr(text, key, None) for key in TEXT_KEYS if not key.startswith("rope_")}
    rope = dict(text.rope_parameters)
    known["rope_theta"] = rope.pop("rope_theta")
    known["rope_scaling"] = rope if rope.get("rope_type") != "default" else None
    pad = text.pad_token_id
    known |= {"vocab_size": vocab_size, "pad_token_id": pad if pad is not None and pad < vocab_size else None}
    features = {name: feature for feature, name in SELECT_FEATURES.items()}
    kept = {key: getattr(config, key, None) for key in KEPT_KEYS}
    return {
        **{key: value for key, value in (known | kept).items() if value is not None},
        "architectures": [architecture],
        "model_type": model_type,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
        "mm_vision_tower": vision_tower,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": features[config.vision_feature_select_strategy],
        "mm_use_im_start_end": getattr(config, "mm_use_im_start_end", False),
        "mm_use_im_patch_token": getattr(config, "mm_use_im_patch_token", False),
        "use_mm_proj": True,
        "unfreeze_mm_vision_tower": True,  # without it the original leaves the tower's weights in here unread
    }


def check_tower(config: LlavaConfig, vision_tower: str) -> None:
    """Raise ValueError if a vision tower is of another form than a configuration's."""
    found = read_vision_config(VisionSettings(vision_tower, select_layer=config.vision_feature_layer))
    wrong = [
        f"{key} {getattr(found, key)}, not {getattr(config.vision_config, key)}"
        for key in VISION_KEYS
        if getattr(found, key) != getattr(config.vision_config, key)
    ]
    if wrong:
        raise ValueError(
            f"Vision tower {vision_tower} is of another form than the one in the checkpoint: {', '.join(wrong)}; the "
            "original layout takes the form from it. Name the CLIP checkpoint that the tower was trained from."
        )


def _check_translatable(config: LlavaConfig) -> None:
    wanted: dict[str, tuple[PretrainedConfig, tuple]] = {
        "projector_hidden_act": (config, ("gelu",)),
        "multimodal_projector_bias": (config, (True,)),
        "vision_feature_select_strategy": (config, tuple(SELECT_FEATURES.values())),
        "model_type": (config.text_config, tuple(WRITTEN_TYPES)),
    }
    wrong = {key: getattr(part, key) for key, (part, allowed) in wanted.items() if getattr(part, key) not in allowed}
    if not isinstance(config.vision_feature_layer, int):
        wrong["vision_feature_layer"] = config.vision_feature_layer
    if wrong:
        raise ValueError(
            f"The original layout cannot say {wrong}; LLaVA-1.5 has one feature layer, a GELU projector with biases, "
            f"and a language model of type {' or '.join(WRITTEN_TYPES)}. Keep the transformers layout."
        )
