"""Reading a checkpoint of any format with the base models it builds on, or putting a new model together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from llava.model.checkpoints.contents import (
    CheckpointContents,
    LoraWeights,
    parameter_shapes,
    read_lora,
    read_projector,
)
from llava.model.checkpoints.files import (
    LANGUAGE_MODELS,
    CheckpointFiles,
    is_language_model,
    read_config_dict,
    resolve_base_models,
)
from llava.model.checkpoints.routing import StoredRouting, import_routing, read_routing
from llava.model.checkpoints.tokenizer import TOKENIZER_FILES, read_tokenizer
from llava.model.checkpoints.weights import (
    EMBEDDINGS,
    HEAD,
    TOWER,
    check_fit,
    find_file,
    read_tensors,
    read_weights,
    shapes_of,
    to_hf_names,
)
from llava.model.families import FAMILIES, HostConfig, VisionSettings, family_of
from llava.model.families.base import join_configs, locate

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def read_checkpoint(path: str | Path, model_base: str | None = None) -> CheckpointContents:
    """Read a checkpoint; weights stay in their files until they are used.

    Args:
        path: Folder or hub id of a model, or of a projector, LoRA weights, or routing that names its base.
        model_base: Folder or hub id of what the last three belong to, instead of what they name.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: If the parts do not fit together; lists missing, unexpected and misshapen weights.
    """
    chain = resolve_base_models(path, model_base)
    config, tokenizer = _read_config_and_tokenizer(chain)
    weights, lora, routing = _read_weights(chain, config)
    towers = [
        locate(files.config["mm_vision_tower"], files.path) for files in chain if files.config.get("mm_vision_tower")
    ]
    # a folder that is there before a hub id
    tower = next(filter(os.path.isdir, towers), towers[0] if towers else None)
    # only transformers' layout has a row for the image token already
    is_grown = all(files.format == "transformers" for files in chain)
    _complete(weights, config, tower, " with ".join(files.path for files in chain), is_grown)
    shapes = shapes_of(weights)
    for each in lora:
        wanted = {name: shape for name, shape in shapes.items() if name in each}
        remedy = "Name the base they were trained from as model_base."
        check_fit(shapes_of(each), wanted, f"The LoRA weights of {path}", "the base model", remedy)
    # routing that a configuration describes overrides what RoE's code added to the weights
    described = _first(chain, lambda files: files.config.get("fuzzyroe"))
    if described is not None:
        routing = read_routing(described.path, described.config["fuzzyroe"])
    if routing is not None:
        config.fuzzyroe = routing.config.to_dict()
    generation = _first(chain, lambda files: find_file(files.path, "generation_config.json"))
    processor = _first(chain, lambda files: find_file(files.path, *PROCESSOR_FILES))
    if processor is None and tower is None:
        raise FileNotFoundError(
            f"{path} has no {PROCESSOR_FILES[0]}; it says how images are resized. Copy it from the vision tower's "
            "checkpoint."
        )
    return CheckpointContents(
        config,
        weights,
        tokenizer,
        family_of(config).image_processor(str(tower) if processor is None else processor.path),
        next(files.path for files in chain if files.has_weights or files.projector or files.lora),
        lora,
        routing,
        None if generation is None else GenerationConfig.from_pretrained(generation.path),
    )


def compose(language_model: str | Path, settings: VisionSettings) -> CheckpointContents:
    """Put a model together; weights stay in their files, and those of the projector are left to be drawn.

    Token ids that the language model lacks, the image token's among them, get the mean of its embeddings.

    Args:
        language_model: Folder or hub id of a Llama checkpoint, such as Vicuna.
        settings: Vision tower, and which of its features are read.

    Raises:
        ValueError: If a part is of another kind, or lacks weights.
    """
    config, tokenizer = _compose_config(language_model, settings)
    family, tower = family_of(config), settings.vision_tower
    # a language model keeps its own names in its files, which mean the same in any layout
    weights = to_hf_names(read_weights(language_model), family, str(language_model))
    _complete(weights, config, tower, f"{language_model} with {tower}", is_grown=False, new_part="projector")
    return CheckpointContents(config, weights, tokenizer, family.image_processor(tower), path=str(language_model))


def read_config_and_tokenizer(
    path: str | Path, settings: VisionSettings | None = None, model_base: str | None = None
) -> tuple[Any, Any]:
    """Read the configuration and tokenizer of a model, or of the one a language model will become; no weights are read.

    Args:
        path, model_base: As for ``read_checkpoint``; or a language model alone.
        settings: Vision tower to be added to a language model; not for others.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If a language model comes without ``settings``, or parts are of another kind.
    """
    if model_base is not None or not is_language_model(read_config_dict(path)):
        return _read_config_and_tokenizer(resolve_base_models(path, model_base))
    if settings is None:
        raise ValueError(
            f"{path} is a language model; a CLIP checkpoint must be named as its vision tower, LLaVA-1.5's is "
            "openai/clip-vit-large-patch14-336."
        )
    return _compose_config(path, settings)


def _compose_config(language_model: str | Path, settings: VisionSettings) -> tuple[Any, Any]:
    text = AutoConfig.from_pretrained(language_model)
    if text.model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"{language_model} is a model of type {text.model_type}; {' or '.join(LANGUAGE_MODELS)} can be given a "
            "vision tower. Name another --model_name_or_path."
        )
    # the most general family is that of the parts alone
    family, tokenizer = FAMILIES[-1], read_tokenizer(language_model)
    return join_configs(family, text, family.read_tower_config(settings), settings, tokenizer), tokenizer


def _first(chain: Sequence[CheckpointFiles], has: Callable[[CheckpointFiles], Any]) -> CheckpointFiles | None:
    """The checkpoint nearest to the top of a chain that has something; it overrides what its bases have."""
    return next((files for files in chain if has(files)), None)


def _read_config_and_tokenizer(chain: Sequence[CheckpointFiles]) -> tuple[Any, Any]:
    holder = _first(chain, lambda files: find_file(files.path, *TOKENIZER_FILES)) or chain[0]
    tokenizer = read_tokenizer(holder.path)
    described = _first(chain, lambda files: files.family)
    if described is None or described.family is None:
        raise ValueError(
            f"Neither of {' and '.join(files.path for files in chain)} is a LLaVA: no config.json says which vision "
            "tower is meant. Name a LLaVA as the base, or add the config.json of the training run."
        )
    if described.format == "original":
        return described.family.build_config(described.config, described.path, tokenizer), tokenizer
    return HostConfig.from_pretrained(described.path), tokenizer


def _read_weights(
    chain: Sequence[CheckpointFiles], config: Any
) -> tuple[dict[str, Tensor], tuple[dict[str, LoraWeights], ...], StoredRouting | None]:
    """Weights of the last of a chain with what the others replace, LoRA weights, and what RoE added to the last."""
    family, base = family_of(config), chain[-1]
    parts = family.parts if base.format == "original" else {"": ""}
    stored = {
        prefix + name: tensor
        for prefix, folder in parts.items()
        for name, tensor in read_weights(base.path, folder).items()
    }
    routing, stored = import_routing(stored, base.path)
    weights = to_hf_names(stored, family, base.path)
    lora: list[dict[str, LoraWeights]] = []
    # from the base upwards: what is nearer to the top overrides
    for files in reversed(chain[:-1]):
        replaced: dict[str, Tensor] = {}
        own: dict[str, LoraWeights] = {}
        if files.projector is not None:
            replaced |= read_projector(files.projector, config)
        if files.others is not None:
            replaced |= to_hf_names(read_tensors(files.others), family, files.others)
        if files.lora is not None:
            own, whole = read_lora(files.lora, files.lora_config, family)
            replaced |= whole
        weights |= replaced
        # a weight that is replaced as a whole forgets the LoRA weights below it
        lora = [{name: each for name, each in below.items() if name not in replaced} for below in lora] + [own]
    return weights, tuple(each for each in lora if each), routing


def _complete(
    weights: dict[str, Tensor], config: Any, tower: str | None, source: str, is_grown: bool, new_part: str | None = None
) -> None:
    """Add rows of new token ids and the vision tower, in place; refuse weights that do not fit the configuration.

    The vocabulary holds the image token already if it ``is_grown``. Weights of a ``new_part`` may be missing, as they
    will be drawn.
    """
    family = family_of(config)
    # the original code reads a frozen tower from its own checkpoint, so it may not be in this one
    if tower is not None and not any(name.startswith(TOWER) for name in weights):
        stored = {family.tower_to_hf.rename(name): tensor for name, tensor in read_weights(tower).items()}
        weights |= to_hf_names({name: tensor for name, tensor in stored.items() if name is not None}, family, tower)
    if config.tie_word_embeddings:
        weights.pop(HEAD, None)  # stored or not, it is the embeddings
    for name in () if is_grown else (EMBEDDINGS, HEAD):
        num_new = config.text_config.vocab_size - len(weights[name]) if name in weights else 0
        if num_new > 0:
            # the mean of all rows stands out nowhere
            mean = weights[name].float().mean(dim=0, keepdim=True).to(weights[name].dtype)
            weights[name] = torch.cat([weights[name], mean.expand(num_new, -1)])
    wanted = {
        name: shape
        for name, shape in parameter_shapes(config).items()
        if name in weights or family.part_of(name) != new_part
    }
    remedy = "Complete the checkpoint or correct config.json."
    check_fit(shapes_of(weights), wanted, f"The weights of {source}", "its config.json", remedy)
