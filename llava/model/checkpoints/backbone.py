"""What makes up a LLaVA, read but not yet in a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionModel, GenerationConfig, LlavaConfig
from transformers.models.auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava.model.checkpoints.key_maps import HEAD, PROJECTOR, TOWER, Shape, check_fit, to_released
from llava.model.checkpoints.low_rank import LowRankUpdate
from llava.model.checkpoints.stored_routing import StoredRouting


@dataclass(frozen=True)
class Backbone:
    """The parts of a LLaVA.

    Attributes:
        config: Configuration in transformers' layout.
        weights: Released name -> tensor as stored, mapped from its file and not read before it is used.
        tokenizer: Tokenizer with an image token.
        image_processor: Image processor.
        path: Folder or hub id that holds the weights, or says how they are made of another's.
        updates: Low-rank updates of these weights, to be merged in this order.
        routing: Adapters and router; None if dense.
        generation_config: How it generates; None if nothing says so.
    """

    config: LlavaConfig
    weights: dict[str, Tensor]
    tokenizer: Any
    image_processor: Any
    path: str
    updates: tuple[dict[str, LowRankUpdate], ...] = ()
    routing: StoredRouting | None = None
    generation_config: GenerationConfig | None = None

    def tensor(self, name: str) -> Tensor:
        """Give a weight with its updates merged."""
        weight = self.weights[name]
        for updates in self.updates:
            weight = updates[name].apply(weight) if name in updates else weight
        return weight


def check_complete(weights: Mapping[str, Tensor], config: LlavaConfig, source: str, but: str | None = None) -> None:
    """Compare weights with those that a model of this configuration has.

    Args:
        weights: Released name -> tensor.
        config: Configuration.
        source: Where the weights come from, for messages.
        but: Start of the names that may be missing.

    Raises:
        ValueError: Listing missing, unexpected and misshapen weights.
    """
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wanted = parameter_shapes(config)
    if but is not None:
        wanted = {name: shape for name, shape in wanted.items() if name in found or not name.startswith(but)}
    check_fit(found, wanted, source)


def parameter_shapes(config: LlavaConfig) -> dict[str, Shape]:
    """Released names and shapes of the parameters that a model of this configuration has; nothing is allocated.

    The parts are built one by one: under ZeRO-3 transformers would shard the parts of a whole model.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"):
        parts = {
            TOWER: CLIPVisionModel(config.vision_config),
            PROJECTOR: LlavaMultiModalProjector(config),
            "": MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)](config.text_config),
        }
    named = {
        prefix + name.removeprefix("vision_model."): parameter
        for prefix, module in parts.items()
        for name, parameter in module.named_parameters()
    }
    shapes = {name: tuple(parameter.shape) for name, parameter in to_released(named, "the configuration").items()}
    if config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    return shapes
