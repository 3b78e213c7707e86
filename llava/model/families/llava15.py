"""LLaVA-1.5: a CLIP vision tower, a two-layer projector, and Llama or Mistral.

Its original layout is that of the repository's own checkpoints (``liuhaotian/llava-v1.5-*``): one ``config.json`` with
the language model's keys, ``mm_`` keys for the rest, and a vision tower that is named and not described.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, MistralConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.model.families.base import (
    SELECT_FEATURES,
    Family,
    HostConfig,
    KeyMap,
    VisionSettings,
    join_configs,
    locate,
)

TOWER = "vision_tower.vision_model."
PROJECTOR = "multi_modal_projector."

TEXT_CONFIGS = {"llava": LlamaConfig, "llava_llama": LlamaConfig, "llava_mistral": MistralConfig}
"""``model_type`` in the original repository -> configuration of its language model."""

WRITTEN_TYPES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
}
"""Language model -> ``model_type`` and class of the original repository."""

NEEDED_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

TEXT_KEYS = (
    *NEEDED_KEYS,
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "attention_bias", "attention_dropout"),
    *("mlp_bias", "pretraining_tp", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
)
"""Keys of the original configuration that are the language model's."""

VISION_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels"),
    *("image_size", "patch_size", "hidden_act", "layer_norm_eps"),
)

KEPT_KEYS = (
    *("image_aspect_ratio", "tokenizer_model_max_length", "max_sequence_length", "fuzzyroe", "num_visual_tokens"),
    *("token_pruner", "conv_template"),
)
"""Keys that keep their names, besides those that start with ``mm_``."""


def recognises(settings: Mapping[str, Any]) -> bool:
    """Whether settings are those of LLaVA-1.5; ``model_type`` alone does not tell: others are called "llava" too."""
    # transformers' layout describes both parts; other models with these keys have a type of their own
    if "text_config" in settings or "vision_config" in settings:
        return settings.get("model_type") == "llava"
    return "mm_vision_tower" in settings


def build_config(settings: Mapping[str, Any], path: str, tokenizer: Any) -> Any:
    """Translate ``config.json`` of the original layout.

    The vocabulary grows by the image token, which the original puts into prompts as a number outside of it.

    Args:
        settings: Content of ``config.json``.
        path: Folder or hub id of the checkpoint; a vision tower named by a relative path may lie in the folder.
        tokenizer: Its tokenizer, with an image token; gets a padding token if it has none.

    Raises:
        ValueError: If keys are missing, or something is of a kind that LLaVA-1.5 does not have.
    """
    kind, missing = settings.get("model_type"), [key for key in NEEDED_KEYS if key not in settings]
    if kind not in TEXT_CONFIGS:
        raise ValueError(
            f"{path} is a model of type {kind} in the original layout; {', '.join(TEXT_CONFIGS)} are read. LLaVA-1.5 "
            "is built on Llama."
        )
    if missing:
        raise ValueError(f"config.json of {path} lacks {', '.join(missing)}; add them as in the base model's.")
    known = {key: settings[key] for key in TEXT_KEYS if settings.get(key) is not None}
    if kind != "llava_mistral":
        known.pop("sliding_window", None)  # Llama's attention has none, whatever a copied config.json says
    vision_settings = VisionSettings(
        locate(settings["mm_vision_tower"], path),
        settings.get("mm_projector_type", "linear"),  # the value that the original assumes where none is given
        settings.get("mm_vision_select_layer", -2),
        settings.get("mm_vision_select_feature", "patch"),
    )
    vision = read_tower_config(vision_settings)
    config = join_configs(LLAVA15, TEXT_CONFIGS[kind](**known), vision, vision_settings, tokenizer)
    for key, value in settings.items():
        if (key.startswith("mm_") and key != "mm_vision_tower") or key in KEPT_KEYS:
            setattr(config, key, value)
    config.architectures = ["LlavaForConditionalGeneration"]
    return config


def original_config(config: Any, vision_tower: str, vocab_size: int) -> dict[str, Any]:
    """Translate a configuration into ``config.json`` of the original layout.

    Args:
        config: Configuration in transformers' layout.
        vision_tower: CLIP checkpoint of the same architecture, folder or hub id; the original reads it from there.
        vocab_size: Size of the vocabulary that is written.

    Raises:
        ValueError: If something cannot be said in the original layout.
    """
    _check_translatable(config, vision_tower)
    text = config.text_config
    model_type, architecture = WRITTEN_TYPES[text.model_type]
    known = {key: getattr(text, key, None) for key in TEXT_KEYS if not key.startswith("rope_")}
    # transformers 5 keeps all of RoPE in one dict, the original code reads two keys
    rope = dict(text.rope_parameters)
    known["rope_theta"] = rope.pop("rope_theta")
    known["rope_scaling"] = rope if rope.get("rope_type") != "default" else None
    pad = text.pad_token_id
    known |= {"vocab_size": vocab_size, "pad_token_id": pad if pad is not None and pad < vocab_size else None}
    known |= {key: getattr(config, key, None) for key in KEPT_KEYS}
    features = {name: feature for feature, name in SELECT_FEATURES.items()}
    return {
        **{key: value for key, value in known.items() if value is not None},
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


def _check_translatable(config: Any, vision_tower: str) -> None:
    """Raise ValueError if the original layout has no words for a part, or the named tower differs from the stored."""
    wanted: dict[str, tuple[Any, tuple]] = {
        "projector_hidden_act": (config, ("gelu",)),
        "multimodal_projector_bias": (config, (True,)),
        "vision_feature_select_strategy": (config, tuple(SELECT_FEATURES.values())),
        "model_type": (config.text_config, tuple(WRITTEN_TYPES)),
    }
    wrong = {key: getattr(part, key) for key, (part, allowed) in wanted.items() if getattr(part, key) not in allowed}
    # several layers are transformers' own extension
    if not isinstance(config.vision_feature_layer, int):
        wrong["vision_feature_layer"] = config.vision_feature_layer
    if wrong:
        raise ValueError(
            f"The original layout cannot say {wrong}; LLaVA-1.5 has one feature layer, a GELU projector with biases, "
            f"and a language model of type {' or '.join(WRITTEN_TYPES)}. Keep the transformers layout."
        )
    stored = config.vision_config
    named = read_tower_config(VisionSettings(vision_tower, select_layer=config.vision_feature_layer))
    pairs = {key: (getattr(named, key), getattr(stored, key)) for key in VISION_KEYS}
    different = [f"{key} {theirs}, not {ours}" for key, (theirs, ours) in pairs.items() if theirs != ours]
    if different:
        raise ValueError(
            f"Vision tower {vision_tower} differs from the one in the checkpoint: {', '.join(different)}; the original "
            "layout takes the architecture from it. Name the CLIP checkpoint that the tower was trained from."
        )


def read_tower_config(settings: VisionSettings) -> CLIPVisionConfig:
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
    # negative layers count from the end, and 0 is what goes into the first layer
    vision = found.vision_config if found.model_type == "clip" else found
    if not -vision.num_hidden_layers - 1 <= settings.select_layer <= vision.num_hidden_layers:
        raise ValueError(
            f"Layer {settings.select_layer} is not in {settings.vision_tower}, which has {vision.num_hidden_layers}; "
            "LLaVA-1.5 uses -2."
        )
    return vision


def count_image_features(config: Any) -> int:
    """Count the patches of an image, and the class token where it is kept; 576 for CLIP ViT-L/14-336.

    Raises:
        ValueError: If the patch size does not divide the image size.
    """
    vision = config.vision_config
    if vision.image_size % vision.patch_size:
        raise ValueError(
            f"Patch size {vision.patch_size} does not divide image size {vision.image_size}; use a vision tower "
            "whose image size is a multiple of its patch size."
        )
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + (config.vision_feature_select_strategy == "full")


def _published(**sizes: Any) -> Any:
    # transformers' defaults of Llama are those of 7B, its defaults of LLaVA those of CLIP-L at 336 pixels
    return HostConfig(text_config=LlamaConfig(vocab_size=32064, **sizes))


LLAVA15 = Family(
    name="llava15",
    title="LLaVA-1.5",
    recognises=recognises,
    # the original repository and language models; then files and modules of transformers, of any version
    to_hf=KeyMap(
        (
            (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?", TOWER),
            (r"(?:model\.)?mm_projector\.0\.", f"{PROJECTOR}linear_1."),
            (r"(?:model\.)?mm_projector\.2\.", f"{PROJECTOR}linear_2."),
            (r"model\.(layers\.\d+|embed_tokens|norm)\.", r"language_model.model.\1."),
            (r"lm_head\.", "language_model.lm_head."),
            (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", TOWER),
            (r"(?:model\.)?multi_modal_projector\.", PROJECTOR),
            (r"model\.language_model\.", "language_model.model."),
            (r"language_model\.(?=model\.|lm_head\.)", "language_model."),
        )
    ),
    to_original=KeyMap(
        (
            (r"vision_tower\.vision_model\.", "model.vision_tower.vision_tower.vision_model."),
            (r"multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
            (r"multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
            (r"language_model\.model\.", "model."),
            (r"language_model\.lm_head\.", "lm_head."),
        )
    ),
    # CLIP's text side is no part of the tower
    tower_to_hf=KeyMap(((r"(?!text_|visual_projection|logit_scale)(?:vision_model\.)?", TOWER),)),
    unused=(r".*rotary_emb\.inv_freq", r".*embeddings\.position_ids"),  # constants that old files hold
    build_config=build_config,
    original_config=original_config,
    read_tower_config=read_tower_config,
    image_processor=CLIPImageProcessorPil.from_pretrained,
    count_image_features=count_image_features,
    template=lambda config: "v1",
    vision_keys=VISION_KEYS,
    trainable_parts={"vision_tower": ("vision_tower.",), "projector": (PROJECTOR,)},
    recipe={"model_max_length": 2048, "learning_rate": 2e-5},
    sizes={
        "7b": _published,
        "13b": partial(
            _published, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
        ),
    },
)
