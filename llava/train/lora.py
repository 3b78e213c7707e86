"""Low-rank updates of the decoder: put in place with peft, saved in peft's format."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

WEIGHTS_FILE = "adapter_model.safetensors"
OTHER_WEIGHTS_FILE = "non_lora_trainables.safetensors"
"""What else is not in the base, such as a trained projector, under stock names; LLaVA's file of the same purpose."""

_LINEAR = r"self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj)"
TARGETS = rf"^model\.language_model\.layers\.\d+\.({_LINEAR})$"
"""All linear layers of the decoder; anchored, as bare names would hit the vision tower and skip adapters as well."""

_ADAPTER, _PREFIX = "default", "base_model.model."


def add_lora(model: nn.Module, rank: int, alpha: int, dropout: float) -> None:
    """Put low-rank updates into a LLaVA model; before the first step they change nothing.

    Args:
        model: Dense or routed; its class and the names of its other parameters stay.
        rank: Rank of the updates.
        alpha: Updates are scaled by ``alpha / rank``.
        dropout: Dropout before the updates, in [0, 1).

    Raises:
        ImportError: If peft is not installed.

    Reference:
        LoRA (arXiv:2106.09685).
    """
    peft = import_peft()
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=TARGETS,
        bias="none",
        task_type="CAUSAL_LM",
    )
    peft.inject_adapter_in_model(config, model, _ADAPTER)


def import_peft() -> Any:
    """Import peft.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"--lora_enable was given but peft cannot be imported ({error}); install it with "
            "pip install 'fuzzyroe[train]', or leave --lora_enable out."
        ) from error
    return peft


def save_lora(
    model: nn.Module, updates: dict[str, Tensor], others: dict[str, Tensor], folder: Path, base_model: str
) -> None:
    """Write updates as peft does, and what else trained beside them.

    Args:
        model: Model with updates.
        updates: Whole tensors of the updates, under their names in the model.
        others: Whole tensors of other parameters that are not in the base, under their names in the model.
        folder: Folder to write to.
        base_model: What the updates belong to: a hub id, or a folder relative to where the updates will lie.
    """
    config = copy.deepcopy(model.peft_config[_ADAPTER])
    config.base_model_name_or_path = base_model
    config.save_pretrained(folder)
    renamed = {_PREFIX + name.replace(f".{_ADAPTER}.", "."): tensor for name, tensor in updates.items()}
    save_file(renamed, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if others:
        save_file(others, folder / OTHER_WEIGHTS_FILE, metadata={"format": "pt"})
