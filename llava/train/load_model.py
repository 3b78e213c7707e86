"""The model that a stage starts from: a checkpoint, or a language model put together with a vision tower."""

from __future__ import annotations

from typing import Any

import torch
from transformers import set_seed

from llava.model.builder import Checkpoint, build_checkpoint, load_checkpoint
from llava.model.checkpoints.contents import read_projector
from llava.model.checkpoints.files import is_language_model, read_config_dict
from llava.model.checkpoints.reading import compose
from llava.model.families import SELECT_FEATURES, VisionSettings, family_of
from llava.train.arguments import ModelArguments
from llava.train.zero3 import assign_parameters

DEFAULT_VISION = VisionSettings("")


def load_model(model_args: ModelArguments, dtype: torch.dtype, seed: int, **options: Any) -> Checkpoint:
    """Load or put together the model a stage starts from; call on all ranks.

    Args:
        model_args: Which model; has passed ``check_inputs``.
        dtype, seed: Data type of the weights, and seed of a new projector.
        **options: Passed to ``from_pretrained``.

    Raises:
        ValueError: If its routing is that of RoE's own code.
    """
    name, attention = model_args.model_name_or_path, model_args.attn_implementation
    config = read_config_dict(name)
    if is_language_model(config):
        set_seed(seed)  # the projector is drawn, alike on every rank
        checkpoint = build_checkpoint(compose(name, vision_settings(model_args)), name, dtype, attention, **options)
    else:
        checkpoint = load_checkpoint(name, dtype, attention, **options)
        if checkpoint.routing is not None and not config.get("fuzzyroe"):
            raise ValueError(
                f"{name} was trained by RoE's own code; its router is imported, but a stage starts from config.json, "
                f"which says nothing of it. Convert it first: fuzzyroe convert {name} OUTPUT."
            )
    if model_args.pretrain_mm_mlp_adapter is not None:
        to_hf = family_of(checkpoint.model.config).to_hf
        # by name, as under ZeRO-3 each rank holds a slice of every parameter
        named = {to_hf.rename(name): p for name, p in checkpoint.model.named_parameters()}
        tensors = read_projector(model_args.pretrain_mm_mlp_adapter, checkpoint.model.config)
        assign_parameters({name: named[name] for name in tensors}, tensors)
    # a model that does not sample has no use for sampling parameters: with them it could not be saved after training
    generation = checkpoint.model.generation_config
    if generation is not None and not generation.do_sample:
        generation.temperature = generation.top_p = generation.top_k = None
    return checkpoint


def vision_settings(model_args: ModelArguments) -> VisionSettings:
    """Vision settings that the flags give, with LLaVA-1.5's values where they say nothing."""
    if model_args.vision_tower is None:
        raise ValueError(
            f"{model_args.model_name_or_path} is a language model; --vision_tower must name a CLIP checkpoint, "
            "LLaVA-1.5's is openai/clip-vit-large-patch14-336."
        )
    return VisionSettings(
        model_args.vision_tower,
        model_args.mm_projector_type or DEFAULT_VISION.projector_type,
        DEFAULT_VISION.select_layer if model_args.mm_vision_select_layer is None else model_args.mm_vision_select_layer,
        model_args.mm_vision_select_feature or DEFAULT_VISION.select_feature,
    )


def check_agreement(config: dict[str, Any], model_args: ModelArguments) -> None:
    """Refuse vision settings other than a checkpoint, of transformers' or of LLaVA's layout, was trained with."""
    strategy = config.get("vision_feature_select_strategy", "default")
    feature = next((name for name, own in SELECT_FEATURES.items() if own == strategy), strategy)
    # transformers' layout says the same under other keys, and does not name the tower
    own = {
        "vision_tower": config.get("mm_vision_tower"),
        "mm_projector_type": config.get("mm_projector_type", DEFAULT_VISION.projector_type),
        "mm_vision_select_layer": config.get("mm_vision_select_layer", config.get("vision_feature_layer", -2)),
        "mm_vision_select_feature": config.get("mm_vision_select_feature", feature),
    }
    for name, expected in own.items():
        found = getattr(model_args, name)
        if found is not None and found != expected:
            has = f"has {expected}" if expected is not None else "has one inside"
            raise ValueError(
                f"--{name} {found} was given, but {model_args.model_name_or_path} {has}, which its projector was "
                f"trained for; leave --{name} out, or start from a language model."
            )
