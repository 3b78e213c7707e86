"""Reading a checkpoint of any format, with the base models it builds on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from llava.model.checkpoints.compose import compose_config, read_tower_weights
from llava.model.checkpoints.contents import CheckpointContents, check_complete, extend_vocabulary, read_projector
from llava.model.checkpoints.files import (
    LORA_CONFIG,
    CheckpointFiles,
    is_language_model,
    read_config_dict,
    resolve_base_models,
)
from llava.model.checkpoints.lora import LoraWeights, check_lora, read_lora
from llava.model.checkpoints.names import HEAD, TOWER, to_hf_names
from llava.model.checkpoints.roe import import_routing, split_routing
from llava.model.checkpoints.stored_routing import StoredRouting, read_routing
from llava.model.checkpoints.tokenizer import has_tokenizer, read_tokenizer
from llava.model.checkpoints.weights import find_file, read_tensors, read_weights
from llava.model.families import Family, HostConfig, VisionSettings, family_of
from llava.model.families.host import locate

logger = logging.getLogger(__name__)

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
    family = family_of(config)
    for trap in family.traps:
        logger.warning("%s (%s): %s", path, family.title, trap)
    weights, lora, added = _read_weights(chain, config)
    tower = _find_tower(chain)
    # the original code reads a frozen tower from its own checkpoint, so it may not be in this one
    if tower is not None and not any(name.startswith(TOWER) for name in weights):
        weights |= read_tower_weights(tower, family)
    # only transformers' layout has a row for the image token already
    if any(files.format != "transformers" for files in chain):
        extend_vocabulary(weights, config.text_config.vocab_size)
    if config.tie_word_embeddings:
        weights.pop(HEAD, None)  # stored or not, it is the embeddings
    check_complete(weights, config, " with ".join(files.path for files in chain))
    for each in lora:
        check_lora({name: tuple(tensor.shape) for name, tensor in weights.items()}, each, str(path))
    routing = _read_routing(chain, added)
    if routing is not None:
        config.fuzzyroe = routing.config.to_dict()
    holder = next(files for files in chain if files.has_weights or files.projector or files.lora)
    generation = _first(chain, lambda files: find_file(files.path, "generation_config.json"))
    return CheckpointContents(
        config,
        weights,
        tokenizer,
        _read_image_processor(chain, family, tower),
        holder.path,
        lora,
        routing,
        None if generation is None else GenerationConfig.from_pretrained(generation.path),
    )


def read_config_and_tokenizer(
    path: str | Path, settings: VisionSettings | None = None, model_base: str | None = None
) -> tuple[Any, Any]:
    """Read the configuration and tokenizer of a model, or of the one a language model will become; no weights are read.

    Args:
        path: Folder or hub id of either.
        settings: Vision tower to be added to a language model; not for others.
        model_base: As for ``read_checkpoint``.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If a language model comes without ``settings``.
    """
    if model_base is None and is_language_model(read_config_dict(path)):
        if settings is None:
            raise ValueError(
                f"{path} is a language model; a CLIP checkpoint must be named as its vision tower, LLaVA-1.5's is "
                "openai/clip-vit-large-patch14-336."
            )
        return compose_config(path, settings)
    return _read_config_and_tokenizer(resolve_base_models(path, model_base))


def _first(chain: Sequence[CheckpointFiles], has: Callable[[CheckpointFiles], Any]) -> CheckpointFiles | None:
    """The checkpoint nearest to the top of a chain that has something; it overrides what its bases have."""
    return next((files for files in chain if has(files)), None)


def _read_config_and_tokenizer(chain: Sequence[CheckpointFiles]) -> tuple[Any, Any]:
    tokenizer = read_tokenizer((_first(chain, lambda files: has_tokenizer(files.path)) or chain[0]).path)
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
) -> tuple[dict[str, Tensor], tuple[dict[str, LoraWeights], ...], dict[str, Tensor]]:
    """Weights of the last of a chain with what the others replace, LoRA weights, and what RoE added to the last."""
    family, base = family_of(config), chain[-1]
    parts = family.parts if base.format == "original" else {"": ""}
    stored = {
        prefix + name: tensor
        for prefix, folder in parts.items()
        for name, tensor in read_weights(base.path, folder).items()
    }
    added, stored = split_routing(stored)
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
            own, whole = read_lora(files.lora, str(find_file(files.path, LORA_CONFIG)), family)
            replaced |= whole
        weights |= replaced
        # a weight that is replaced as a whole forgets the LoRA weights below it
        lora = [{name: each for name, each in below.items() if name not in replaced} for below in lora] + [own]
    return weights, tuple(each for each in lora if each), added


def _read_routing(chain: Sequence[CheckpointFiles], added: dict[str, Tensor]) -> StoredRouting | None:
    """Routing that a configuration describes, else what RoE's code added to the weights."""
    described = _first(chain, lambda files: files.config.get("fuzzyroe"))
    if described is not None:
        return read_routing(described.path, described.config["fuzzyroe"])
    return import_routing(added, chain[-1].path) if added else None


def _find_tower(chain: Sequence[CheckpointFiles]) -> str | None:
    """The vision tower that a checkpoint names; a folder that is there before a hub id."""
    named = [(files.config.get("mm_vision_tower"), files.path) for files in chain]
    towers = [locate(name, path) for name, path in named if name]
    return next((tower for tower in towers if Path(tower).is_dir()), towers[0] if towers else None)


def _read_image_processor(chain: Sequence[CheckpointFiles], family: Family, tower: str | None) -> Any:
    described = _first(chain, lambda files: find_file(files.path, *PROCESSOR_FILES))
    path = tower if described is None else described.path
    if path is None:
        raise FileNotFoundError(
            f"{chain[0].path} has no {PROCESSOR_FILES[0]}; it says how images are resized. Copy it from the vision "
            "tower's checkpoint."
        )
    return family.image_processor(path)
