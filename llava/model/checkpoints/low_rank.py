"""Low-rank updates merged into the weights they belong to."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llava.model.checkpoints.key_maps import PEFT_PREFIX, TO_RELEASED, Shape, list_names
from llava.model.checkpoints.weight_files import read_tensors

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class LowRankUpdate:
    """An update ``scale * up @ down`` of one weight.

    Attributes:
        down: LoRA's A, (rank, in).
        up: LoRA's B, (out, rank).
        scale: ``alpha / rank``, or ``alpha / sqrt(rank)`` where the checkpoint says so.
    """

    down: Tensor
    up: Tensor
    scale: float

    def apply(self, weight: Tensor) -> Tensor:
        """Give the merged weight, (out, in), in the data type of ``weight``; rounded once."""
        return (weight.float() + self.scale * (self.up.float() @ self.down.float())).to(weight.dtype)


def read_updates(file: str, config_file: str) -> tuple[dict[str, LowRankUpdate], dict[str, Tensor]]:
    """Read a file of low-rank updates.

    Args:
        file: ``adapter_model.safetensors`` or ``.bin``, as peft writes it.
        config_file: ``adapter_config.json`` beside it.

    Returns:
        Released name of a weight -> its update; released name -> weight, of what was saved whole in the same file.

    Raises:
        ValueError: If the updates are of another kind, incomplete, or of parts that a LLaVA does not have.

    Reference:
        LoRA (arXiv:2106.09685); rank-stabilised scale: arXiv:2312.03732.
    """
    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    _check_kind(config, config_file)
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in read_tensors(file).items():
        factor = _FACTOR.fullmatch(name)
        if factor is None:
            whole[name.removeprefix(PEFT_PREFIX)] = tensor
        else:
            weight = factor["module"].removeprefix(PEFT_PREFIX) + ".weight"
            factors.setdefault(weight, {})[factor["side"]] = tensor
    halves = [name for name, sides in factors.items() if len(sides) < 2]
    names = {name: TO_RELEASED.rename(name) for name in (*factors, *whole)}
    unknown = [name for name, renamed in names.items() if renamed is None]
    if halves or unknown:
        raise ValueError(
            f"{file}: updates of {list_names(halves)} lack a half, {list_names(unknown)} are no weights of a LLaVA; "
            "pairs lora_A and lora_B of its linear layers, and whole weights, are read. Merge it where it was trained."
        )
    updates = {names[name]: _make_update(sides, config) for name, sides in factors.items()}
    return updates, {names[name]: tensor for name, tensor in whole.items()}


def check_updates(shapes: dict[str, Shape], updates: dict[str, LowRankUpdate], source: str) -> None:
    """Compare updates with the shapes of the weights they belong to.

    Raises:
        ValueError: Listing every update whose weight is missing or of another shape.
    """
    wrong = [
        f"{name} {(update.up.shape[0], update.down.shape[1])}, not {shapes.get(name, 'there')}"
        for name, update in updates.items()
        if shapes.get(name) != (update.up.shape[0], update.down.shape[1])
    ]
    if wrong:
        raise ValueError(
            f"The updates of {source} do not fit the base model: {list_names(wrong)}. Name the base they were trained "
            "from as model_base."
        )


def _make_update(sides: dict[str, Tensor], config: dict[str, Any]) -> LowRankUpdate:
    rank = sides["A"].shape[0]
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return LowRankUpdate(sides["A"], sides["B"], config["lora_alpha"] / divisor)


def _check_kind(config: dict[str, Any], config_file: str) -> None:
    refused = ("use_dora", "fan_in_fan_out", "alpha_pattern", "megatron_config", "use_qalora", "arrow_config")
    found = {key: config[key] for key in refused if config.get(key)}
    kind = config.get("peft_type", "LORA")
    if kind != "LORA" or found or "lora_alpha" not in config:
        raise ValueError(
            f"{config_file} describes {kind} with {found or 'no lora_alpha'}; plain LoRA with lora_alpha is read. "
            "Merge it with peft where it was trained, and load the merged model."
        )
