"""The dense part of a checkpoint of any layout, read from its files but not yet in a model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionModel, GenerationConfig, LlavaConfig
from transformers.models.auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava.model.base_chain import read_chain
from llava.model.checkpoint_layout import LORA_CONFIG, CheckpointLayout
from llava.model.compose import extend_vocabulary, read_projector, read_vision_weights
from llava.model.key_maps import HEAD, TO_RELEASED, TOWER, Shape, check_fit, to_released
from llava.model.lora_merge import PREFIX, LowRankUpdate, check_updates, read_updates
from llava.model.original_layout import build_config, locate_tower
from llava.model.roe_layout import split_routing
from llava.model.tokenizer_files import has_tokenizer, read_tokenizer
from llava.model.weight_files import find_file, read_tensors, read_weights

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Backbone:
    """What makes up a LLaVA model.

    Attributes:
        config: Configuration in transformers' layout.
        weights: Released name -> tensor as stored, mapped from its file and not read before it is used.
        updates: Low-rank updates of these weights, to be merged in this order.
        added: What RoE's code added to the checkpoint, under RoE's names.
        tokenizer: Tokenizer with an image token.
        image_processor: Image processor.
        generation_config: How it generates; None if the checkpoint does not say.
        weights_path: Folder or hub id that holds the weights, or says how they are made of another's.
    """

    config: LlavaConfig
    weights: dict[str, Tensor]
    updates: tuple[dict[str, LowRankUpdate], ...]
    added: dict[str, Tensor]
    tokenizer: Any
    image_processor: Any
    generation_config: GenerationConfig | None
    weights_path: str

    def tensor(self, name: str) -> Tensor:
        """Give a weight with its updates merged."""
        weight = self.weights[name]
        for updates in self.updates:
            weight = updates[name].apply(weight) if name in updates else weight
        return weight


def read_backbone(path: str | Path, model_base: str | None = None) -> Backbone:
    """Read the dense part of a checkpoint; weights stay in their files until they are used.

    Args:
        path: Folder or hub id of a LLaVA, a projector, low-rank updates, or routing that names its base.
        model_base: Folder or hub id of what the last three belong to, instead of what they name.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: If the parts do not fit together; lists missing, unexpected and misshapen weights.
    """
    chain = read_chain(path, model_base)
    tokenizer = read_tokenizer(next((layout.path for layout in chain if has_tokenizer(layout.path)), path))
    config = _read_config(chain[0], tokenizer)
    weights, updates, added = _read_stored(chain)
    if not any(name.startswith(TOWER) for name in weights):
        tower = _find_tower(chain)
        weights |= {} if tower is None else to_released(read_vision_weights(tower), tower)
    if any(layout.kind != "transformers" for layout in chain):
        extend_vocabulary(weights, config.text_config.vocab_size)
    if config.tie_word_embeddings:
        weights.pop(HEAD, None)  # stored or not, it is the embeddings
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    check_fit(shapes, parameter_shapes(config), " with ".join(layout.path for layout in chain))
    for each in updates:
        check_updates(shapes, each, str(path))
    top = chain[0]
    weights_path = top.path if top.has_weights or top.projector or top.lora else chain[1].path
    return Backbone(
        config,
        weights,
        updates,
        added,
        tokenizer,
        _read_image_processor(chain),
        _read_generation_config(chain),
        weights_path,
    )


def parameter_shapes(config: LlavaConfig) -> dict[str, Shape]:
    """Released names and shapes of the parameters that a model of this configuration has; nothing is allocated.

    The parts are built one by one: transformers would shard the parts of a whole one under ZeRO-3.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"):
        parts = {
            "vision_tower": CLIPVisionModel(config.vision_config),
            "multi_modal_projector": LlavaMultiModalProjector(config),
            "language_model": MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)](config.text_config),
        }
    named = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
    shapes = {TO_RELEASED.rename(name) or name: tuple(parameter.shape) for name, parameter in named.items()}
    if config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    return shapes


def _read_config(layout: CheckpointLayout, tokenizer: Any) -> LlavaConfig:
    if layout.kind == "original":
        return build_config(layout.config, layout.path, tokenizer)
    return LlavaConfig.from_pretrained(layout.path)


def _read_stored(
    chain: list[CheckpointLayout],
) -> tuple[dict[str, Tensor], tuple[dict[str, LowRankUpdate], ...], dict[str, Tensor]]:
    """Weights of the last of a chain with what the others replace, their updates, and what RoE added to the first."""
    added, stored = split_routing(read_weights(chain[-1].path))
    weights = to_released(stored, chain[-1].path)
    updates: list[dict[str, LowRankUpdate]] = []
    for layout in reversed(chain[:-1]):
        replaced: dict[str, Tensor] = {}
        if layout.projector is not None:
            replaced |= to_released(read_projector(layout.projector), layout.projector)
        if layout.others is not None:
            others = {name.removeprefix(PREFIX): tensor for name, tensor in read_tensors(layout.others).items()}
            replaced |= to_released(others, layout.others)
        if layout.lora is not None:
            own, whole = read_updates(layout.lora, str(find_file(layout.path, LORA_CONFIG)))
            replaced |= whole
        else:
            own = {}
        weights |= replaced
        updates = [{name: u for name, u in each.items() if name not in replaced} for each in updates] + [own]
    return weights, tuple(each for each in updates if each), added if len(chain) == 1 else {}


def _find_tower(chain: list[CheckpointLayout]) -> str | None:
    """The vision tower that a checkpoint names which does not hold it."""
    named = [layout for layout in chain if layout.config.get("mm_vision_tower")]
    return locate_tower(named[0].config["mm_vision_tower"], named[0].path) if named else None


def _read_image_processor(chain: list[CheckpointLayout]) -> CLIPImageProcessorPil:
    paths = [layout.path for layout in chain if any(find_file(layout.path, name) for name in PROCESSOR_FILES)]
    tower = _find_tower(chain)
    if not paths and tower is None:
        raise FileNotFoundError(
            f"{chain[0].path} has no {PROCESSOR_FILES[0]}; it says how images are resized. Copy it from the vision "
            "tower's checkpoint."
        )
    return CLIPImageProcessorPil.from_pretrained(paths[0] if paths else tower)


def _read_generation_config(chain: list[CheckpointLayout]) -> GenerationConfig | None:
    paths = [layout.path for layout in chain if find_file(layout.path, "generation_config.json")]
    return GenerationConfig.from_pretrained(paths[0]) if paths else None
