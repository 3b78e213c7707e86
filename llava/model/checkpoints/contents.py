"""Contents of a checkpoint, read but not yet in a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, GenerationConfig

from llava.model.checkpoints.lora import LoraWeights
from llava.model.checkpoints.names import EMBEDDINGS, HEAD, TOWER, Shape, check_fit, list_names, to_hf_names
from llava.model.checkpoints.stored_routing import StoredRouting
from llava.model.checkpoints.weights import read_tensors
from llava.model.families import family_of
from llava.model.families.host import HostProjector


@dataclass(frozen=True)
class CheckpointContents:
    """Everything that makes up a model.

    Attributes:
        config: Configuration in transformers' layout.
        weights: Name in Hugging Face's files -> tensor as stored, mapped from its file and not read before it is used.
        tokenizer: Tokenizer with an image token.
        image_processor: Image processor.
        path: Folder or hub id that holds the weights, or says how they are made of another's.
        lora: LoRA weights by the weight that they change, to be merged in this order.
        routing: Adapters and router; None if dense.
        generation_config: How it generates; None if nothing says so.
    """

    config: Any
    weights: dict[str, Tensor]
    tokenizer: Any
    image_processor: Any
    path: str
    lora: tuple[dict[str, LoraWeights], ...] = ()
    routing: StoredRouting | None = None
    generation_config: GenerationConfig | None = None

    def tensor(self, name: str) -> Tensor:
        """Give a weight with its LoRA weights merged."""
        weight = self.weights[name]
        for lora in self.lora:
            weight = lora[name].merge_into(weight) if name in lora else weight
        return weight


def extend_vocabulary(weights: dict[str, Tensor], size: int) -> None:
    """Add rows to embeddings and output head, in place; a new row is the mean of the others, which stands out nowhere.

    Args:
        weights: Name in Hugging Face's files -> tensor.
        size: Rows wanted.
    """
    for name in (EMBEDDINGS, HEAD):
        if name in weights and weights[name].shape[0] < size:
            old = weights[name]
            mean = old.float().mean(dim=0, keepdim=True).to(old.dtype)
            weights[name] = torch.cat([old, mean.expand(size - old.shape[0], -1)])


def check_complete(weights: Mapping[str, Tensor], config: Any, source: str, new_part: str | None = None) -> None:
    """Compare weights with those that a model of this configuration has.

    Args:
        weights: Name in Hugging Face's files -> tensor.
        config: Configuration.
        source: Where the weights come from, for messages.
        new_part: Part whose weights may be missing, as they will be drawn.

    Raises:
        ValueError: Listing missing, unexpected and misshapen weights.
    """
    family, shapes = family_of(config), {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wanted = {
        name: shape
        for name, shape in parameter_shapes(config).items()
        if name in shapes or family.part_of(name) != new_part  # a part that is to be drawn may be missing
    }
    check_fit(shapes, wanted, source)


def parameter_shapes(config: Any) -> dict[str, Shape]:
    """Give names in Hugging Face's files and shapes of a model's parameters; nothing is allocated.

    Args:
        config: Configuration of the model.
    """
    config = copy.deepcopy(config)  # building a model writes to it
    # one by one, and by class: under ZeRO-3 transformers would shard the parts of a whole model
    tower_class: Any = MODEL_MAPPING[type(config.vision_config)]
    text_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)]
    with torch.device("meta"):
        modules = {
            TOWER: tower_class(config.vision_config),
            "multi_modal_projector.": HostProjector(config),
            "": text_class(config.text_config),
        }
    parameters = {
        prefix + name: parameter for prefix, module in modules.items() for name, parameter in module.named_parameters()
    }
    named = to_hf_names(parameters, family_of(config), "the configuration")
    shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
    if config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    return shapes


def read_projector(file: str | Path, config: Any) -> dict[str, Tensor]:
    """Read a projector that was trained and saved on its own.

    Args:
        file: LLaVA's ``mm_projector.bin``, or a safetensors file under the names of any layout.
        config: Configuration of the model that it is for.

    Returns:
        Name in Hugging Face's files -> tensor.

    Raises:
        ValueError: If other tensors are there, some are missing, or they are of another size than the model's.
    """
    family = family_of(config)
    wanted = {name: shape for name, shape in parameter_shapes(config).items() if family.part_of(name) == "projector"}
    tensors = to_hf_names(read_tensors(file), family, str(file))
    if tensors.keys() != wanted.keys():
        raise ValueError(
            f"{file} is no projector of {family.title}: {list_names(tensors.keys() ^ wanted)} missing or unexpected; "
            f"exactly {list_names(wanted)}, or the original names of these, are needed. Name another file."
        )
    misfits = {name: (tuple(t.shape), wanted[name]) for name, t in tensors.items() if tuple(t.shape) != wanted[name]}
    if misfits:
        raise ValueError(
            f"The projector {file} does not fit the model (its shape, the model's): {misfits}; name the one that was "
            "trained for this vision tower and language model."
        )
    return tensors
