"""A LLaVA model put together from a language model, a CLIP vision tower and a new projector."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.image_tokens import count_image_tokens
from llava.model.checkpoint_layout import LANGUAGE_MODELS
from llava.model.weight_files import read_tensors, read_weights

PROJECTOR_TYPES = ("mlp2x_gelu",)
SELECT_FEATURES = {"patch": "default", "cls_patch": "full"}
"""LLaVA's name of what is taken from the vision tower -> transformers' name."""

VOCABULARY_MULTIPLE = 64
"""New token ids are rounded up to it, as in released checkpoints: matrix products like it."""

PROJECTOR_NAMES = {
    f"{prefix}.{number}.{kind}": f"model.multi_modal_projector.linear_{position}.{kind}"
    for prefix in ("model.mm_projector", "mm_projector", "base_model.model.model.mm_projector")
    for number, position in ((0, 1), (2, 2))
    for kind in ("weight", "bias")
}
"""LLaVA's names of the projector's weights, as its training writes them -> transformers' names."""


@dataclass(frozen=True)
class VisionSettings:
    """How a language model is given sight.

    Attributes:
        vision_tower: CLIP checkpoint, folder or hub id.
        projector_type: LLaVA's name of the projector's form.
        select_layer: Layer of the tower that features are taken from, counted from its end if negative.
        select_feature: "patch" without, "cls_patch" with the class token.

    Raises:
        ValueError: If projector or features are of an unknown kind.
    """

    vision_tower: str
    projector_type: str = "mlp2x_gelu"
    select_layer: int = -2
    select_feature: str = "patch"

    def __post_init__(self) -> None:
        if self.projector_type not in PROJECTOR_TYPES:
            raise ValueError(
                f"Projector type {self.projector_type} is not available, {', '.join(PROJECTOR_TYPES)} is: that of "
                "LLaVA-1.5 and of transformers' LLaVA. Use it."
            )
        if self.select_feature not in SELECT_FEATURES:
            raise ValueError(
                f"Vision feature {self.select_feature} is unknown; {' and '.join(SELECT_FEATURES)} are known. Use one."
            )


@dataclass(frozen=True)
class Composed:
    """A model that was put together.

    Attributes:
        model: It, with an untrained projector.
        tokenizer: The language model's, with an image token.
        image_processor: The vision tower's.
    """

    model: LlavaForConditionalGeneration
    tokenizer: Any
    image_processor: Any


def compose_config(language_model: str | Path, settings: VisionSettings) -> tuple[LlavaConfig, Any]:
    """Configuration and tokenizer of the model that ``compose`` makes; no weights are read.

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
    vision = read_vision_config(settings)
    tokenizer = AutoTokenizer.from_pretrained(language_model, extra_special_tokens={"image_token": DEFAULT_IMAGE_TOKEN})
    return join_configs(text, vision, settings, tokenizer), tokenizer


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
        image_token_index=image_token_id,
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


def compose(
    language_model: str | Path,
    settings: VisionSettings,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
) -> Composed:
    """Put a LLaVA model together; the projector is new, every other weight is as it was.

    Token ids that the language model lacks, the image token's among them, get the mean of its embeddings.

    Args:
        language_model: Folder or hub id of a Llama checkpoint, such as Vicuna.
        settings: What it sees with.
        dtype: Data type of the weights.
        attn_implementation: "sdpa", "flash_attention_2" or "eager".

    Raises:
        ValueError: If a part is of another kind, or lacks weights.
    """
    config, tokenizer = compose_config(language_model, settings)
    weights = {f"language_model.{name}": tensor for name, tensor in read_weights(language_model, _is_text).items()}
    weights |= read_vision_weights(settings.vision_tower)
    extend_vocabulary(weights, config.text_config.vocab_size)
    model, found = LlavaForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=dtype,
        attn_implementation=attn_implementation,
        output_loading_info=True,
    )
    model.__dict__.pop("_weight_conversions", None)  # would be reversed on saving, into names that others cannot read
    missing = [name for name in found["missing_keys"] if not name.startswith("model.multi_modal_projector.")]
    wrong = sorted([*missing, *found["unexpected_keys"], *(str(key) for key in found["mismatched_keys"])])
    if wrong:
        raise ValueError(
            f"{language_model} and {settings.vision_tower} do not make up a LLaVA: {', '.join(wrong[:5])} missing, "
            "unexpected or of another shape. Download both again."
        )
    return Composed(model, tokenizer, CLIPImageProcessorPil.from_pretrained(settings.vision_tower))


def read_projector(file: str | Path) -> dict[str, Tensor]:
    """Read a projector that was trained on its own.

    Args:
        file: LLaVA's ``mm_projector.bin``, or a safetensors file under transformers' names.

    Returns:
        Its four tensors under transformers' names.

    Raises:
        ValueError: If other tensors are there, or some are missing.
    """
    tensors = {PROJECTOR_NAMES.get(name, name): tensor for name, tensor in read_tensors(file).items()}
    wanted = set(PROJECTOR_NAMES.values())
    if set(tensors) != wanted:
        wrong = sorted(set(tensors) ^ wanted)
        raise ValueError(
            f"{file} is no projector of type mlp2x_gelu: {', '.join(wrong[:4])} missing or unexpected; exactly "
            f"{', '.join(sorted(wanted))}, or LLaVA's names of these, are needed. Name another file."
        )
    return tensors


def _is_text(name: str) -> bool:
    return not name.endswith("rotary_emb.inv_freq")  # a constant that old files hold


def read_vision_config(settings: VisionSettings) -> CLIPVisionConfig:
    """Read the tower's configuration, from a checkpoint of CLIP or of its vision model alone.

    Raises:
        ValueError: If it is a model of another kind, or lacks the layer that features are taken from.
    """
    found = AutoConfig.from_pretrained(settings.vision_tower)
    if found.model_type not in ("clip", "clip_vision_model"):
        raise ValueError(
            f"{settings.vision_tower} is a model of type {found.model_type}; a CLIP checkpoint is needed. "
            "LLaVA-1.5 uses openai/clip-vit-large-patch14-336."
        )
    vision = found.vision_config if found.model_type == "clip" else found
    if not -vision.num_hidden_layers - 1 <= settings.select_layer <= vision.num_hidden_layers:
        raise ValueError(
            f"Layer {settings.select_layer} is not in {settings.vision_tower}, which has {vision.num_hidden_layers}; "
            "LLaVA-1.5 uses -2."
        )
    return vision


def read_vision_weights(vision_tower: str) -> dict[str, Tensor]:
    """Read the tower's weights, under the names of transformers' released LLaVA checkpoints."""
    weights = read_weights(
        vision_tower, lambda name: not name.startswith(("text_", "visual_projection", "logit_scale"))
    )
    named = {f"vision_tower.vision_model.{name.removeprefix('vision_model.')}": t for name, t in weights.items()}
    named.pop("vision_tower.vision_model.embeddings.position_ids", None)  # a constant that old files hold
    return named


def extend_vocabulary(weights: dict[str, Tensor], size: int) -> None:
    """Add rows to embeddings and output head; the mean row stands out nowhere."""
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in weights and weights[name].shape[0] < size:
            old = weights[name]
            mean = old.float().mean(dim=0, keepdim=True).to(old.dtype)
            weights[name] = torch.cat([old, mean.expand(size - old.shape[0], -1)])
