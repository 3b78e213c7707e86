"""LoRA weights merged into the weights they belong to."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llava.model.checkpoints.names import PEFT_PREFIX, Shape, list_names
from llava.model.checkpoints.weights import read_tensors
from llava.model.families import Family

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

    def merge_into(self, weight: Tensor) -> Tensor:
        """Give the merged weight, (out, in), in the data type of ``weight``; rounded once."""
        # in float32: a small change would round away in half precision
        return (weight.float() + self.scale * (self.up.float() @ self.down.float())).to(weight.dtype)


def read_lora(file: str, config_file: str, family: Family) -> tuple[dict[str, LoraWeights], dict[str, Tensor]]:
    """Read a file of LoRA weights.

    Args:
        file: ``adapter_model.safetensors`` or ``.bin``, as peft writes it.
        config_file: ``adapter_config.json`` beside it.
        family: Family of the model they belong to.

    Returns:
        LoRA weights by the weight that they change, and what was saved whole in the same file; both under names in
        Hugging Face's files.

    Raises:
        ValueError: If they are not plain LoRA, incomplete, or of parts that the family does not have.

    Reference:
        LoRA (arXiv:2106.09685); rank-stabilised scale: arXiv:2312.03732.
    """
    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    _check_kind(config, config_file)
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in read_tensors(file).items():
        factor = _FACTOR.fullmatch(name)  # peft also saves whole modules into the same file
        if factor is None:
            whole[name.removeprefix(PEFT_PREFIX)] = tensor
        else:
            weight = factor["module"].removeprefix(PEFT_PREFIX) + ".weight"
            factors.setdefault(weight, {})[factor["side"]] = tensor
    halves = [name for name, sides in factors.items() if len(sides) < 2]
    names = {name: family.to_hf.rename(name) or "" for name in (*factors, *whole)}
    unknown = [name for name, renamed in names.items() if not renamed]
    if halves or unknown:
        raise ValueError(
            f"{file}: LoRA weights of {list_names(halves)} lack a half, {list_names(unknown)} are no weights of a "
            f"{family.title}; pairs lora_A and lora_B of its linear layers, and whole weights, are read. Merge it "
            "where it was trained."
        )
    lora = {names[name]: _combine(sides, config) for name, sides in factors.items()}
    return lora, {names[name]: tensor for name, tensor in whole.items()}


def check_lora(shapes: Mapping[str, Shape], lora: Mapping[str, LoraWeights], source: str) -> None:
    """Compare LoRA weights with the shapes of the weights they belong to.

    Raises:
        ValueError: Listing all whose weight is missing or of another shape.
    """
    found = {name: (weights.up.shape[0], weights.down.shape[1]) for name, weights in lora.items()}
    wrong = [
        f"{name} {shape}, not {shapes.get(name, 'there')}" for name, shape in found.items() if shapes.get(name) != shape
    ]
    if wrong:
        raise ValueError(
            f"The LoRA weights of {source} do not fit the base model: {list_names(wrong)}. Name the base they were "
            "trained from as model_base."
        )


def _combine(sides: dict[str, Tensor], config: dict[str, Any]) -> LoraWeights:
    rank = sides["A"].shape[0]
    # rank of the factors, not of the configuration: rank_pattern may set it layer by layer
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return LoraWeights(sides["A"], sides["B"], config["lora_alpha"] / divisor)


def _check_kind(config: dict[str, Any], config_file: str) -> None:
    found = {key: config[key] for key in NOT_PLAIN if config.get(key)}
    kind = config.get("peft_type", "LORA")
    if kind != "LORA" or found or "lora_alpha" not in config:
        raise ValueError(
            f"{config_file} describes {kind} with {found or 'no lora_alpha'}; plain LoRA with lora_alpha is read. "
            "Merge it with peft where it was trained, and load the merged model."
        )
