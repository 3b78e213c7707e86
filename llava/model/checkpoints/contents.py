"""Contents of a checkpoint, read but not yet in a model: weights, LoRA weights, projector, and whether they fit."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, GenerationConfig

from llava.model.checkpoints.routing import StoredRouting
from llava.model.checkpoints.weights import (
    HEAD,
    PEFT_PREFIX,
    TOWER,
    Shape,
    check_fit,
    list_names,
    read_tensors,
    shapes_of,
    to_hf_names,
)
from llava.model.families import Family, family_of
from llava.model.families.base import HostProjector

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")

NOT_PLAIN = ("use_dora", "fan_in_fan_out", "alpha_pattern", "megatron_config", "use_qalora", "arrow_config")
"""Keys of peft's configuration under which LoRA computes something else."""


@dataclass(frozen=True)
class LoraWeights:
    """The change ``scale * up @ down`` of one weight.

    Attributes:
        down: LoRA's A, (rank, in).
        up: LoRA's B, (out, rank).
        scale: ``alpha / rank``, or ``alpha / sqrt(rank)`` where the checkpoint says so.
    """

    down: Tensor
    up: Tensor
    scale: float

    @property
    def shape(self) -> Shape:
        """Shape of the weight, (out, in)."""
        return self.up.shape[0], self.down.shape[1]

    def merge_into(self, weight: Tensor) -> Tensor:
        """Give the merged weight, (out, in), in the data type of ``weight``; rounded once."""
        # in float32: a small change would round away in half precision
        return (weight.float() + self.scale * (self.up.float() @ self.down.float())).to(weight.dtype)


@dataclass(frozen=True)
class CheckpointContents:
    """Everything that makes up a model.

    Attributes:
        config: Configuration in transformers' layout.
        weights: Name in Hugging Face's files -> tensor as stored, mapped from its file and not read before it is used.
        tokenizer, image_processor: A tokenizer with an image token, and an image processor.
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


def parameter_shapes(config: Any) -> dict[str, Shape]:
    """Give names in Hugging Face's files and shapes of the parameters of a configuration; nothing is allocated."""
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
    shapes = shapes_of(to_hf_names(parameters, family_of(config), "the configuration"))
    if config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    return shapes


def read_projector(file: str | Path, config: Any) -> dict[str, Tensor]:
    """Read a projector that was trained and saved on its own, into names of Hugging Face's files.

    Args:
        file: LLaVA's ``mm_projector.bin``, or a safetensors file under the names of any layout.
        config: Configuration of the model that it is for.

    Raises:
        ValueError: Listing missing, unexpected and misshapen tensors.
    """
    family = family_of(config)
    wanted = {name: shape for name, shape in parameter_shapes(config).items() if family.part_of(name) == "projector"}
    tensors = to_hf_names(read_tensors(file), family, str(file))
    remedy = "Name the projector that was trained for this vision tower and language model."
    check_fit(shapes_of(tensors), wanted, f"The weights of {file}", "the model", remedy)
    return tensors


def read_lora(
    file: str, settings: Mapping[str, Any], family: Family
) -> tuple[dict[str, LoraWeights], dict[str, Tensor]]:
    """Read a file of LoRA weights.

    Args:
        file, settings: ``adapter_model.safetensors`` or ``.bin``, and the content of ``adapter_config.json``, of peft.
        family: Family of the model they belong to.

    Returns:
        LoRA weights by the weight that they change, and what was saved whole in the same file; both under names in
        Hugging Face's files.

    Raises:
        ValueError: If they are not plain LoRA, incomplete, or of parts that the family does not have.

    Reference:
        LoRA (arXiv:2106.09685); rank-stabilised scale: arXiv:2312.03732.
    """
    kind, other = settings.get("peft_type", "LORA"), {key: settings[key] for key in NOT_PLAIN if settings.get(key)}
    if kind != "LORA" or other or "lora_alpha" not in settings:
        raise ValueError(
            f"{file} is described as {kind} with {other or 'no lora_alpha'}; plain LoRA with lora_alpha is read. "
            "Merge it with peft where it was trained, and load the merged model."
        )
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in read_tensors(file).items():
        name = name.removeprefix(PEFT_PREFIX)
        factor = _FACTOR.fullmatch(name)  # peft also saves whole modules into the same file
        if factor is None:
            whole[name] = tensor
        else:
            factors.setdefault(f"{factor['module']}.weight", {})[factor["side"]] = tensor
    halves = [name for name, sides in factors.items() if len(sides) < 2]
    if halves:
        raise ValueError(
            f"{file}: LoRA weights of {list_names(halves)} lack a half; pairs lora_A and lora_B are read. Merge it "
            "where it was trained."
        )
    lora = {}
    for name, sides in to_hf_names(factors, family, file).items():
        # rank of the factors, not of the configuration: rank_pattern may set it layer by layer
        rank = sides["A"].shape[0]
        scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        lora[name] = LoraWeights(sides["A"], sides["B"], scale)
    return lora, to_hf_names(whole, family, file)
