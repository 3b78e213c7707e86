"""The checkpoints that one is made of: itself, the base it builds on, and so on down to whole weights."""

from __future__ import annotations

import json
from pathlib import Path

from llava.model.checkpoints.layout import LORA_CONFIG, CheckpointLayout, read_layout
from llava.model.checkpoints.weight_files import find_file


def read_chain(path: str | Path, model_base: str | None = None) -> list[CheckpointLayout]:
    """Follow a checkpoint to the weights it rests on.

    Args:
        path: Folder or hub id.
        model_base: Base to use instead of the one that ``path`` names.

    Returns:
        The checkpoint itself first, whole weights last; these may be a language model's.

    Raises:
        FileNotFoundError: If a base is not where it is said to be.
        ValueError: If a base is needed and not named, or named and not needed.
    """
    chain = [read_layout(path)]
    top = chain[0]
    if top.is_whole and model_base is not None:
        raise ValueError(
            f"{path} holds the weights of a whole model, model_base {model_base} has no part in it; a base belongs to "
            "a projector or to low-rank updates. Leave it out."
        )
    if top.kind == "language_model":
        raise ValueError(
            f"{path} is a language model (model_type {top.config.get('model_type')}); a LLaVA is needed, or a "
            "projector or low-rank updates with this as model_base. To give it sight, train it with --vision_tower."
        )
    while not chain[-1].is_whole:
        base = _find_base(chain[-1], model_base if len(chain) == 1 else None)
        if base in [layout.path for layout in chain]:
            raise ValueError(f"{chain[-1].path} names {base} as its base, which rests on it; correct one of them.")
        chain.append(read_layout(base))
    return chain


def resolve_base(path: str | Path, name: str) -> str:
    """Where a base is that a checkpoint names.

    Args:
        path: Folder or hub id of the checkpoint.
        name: Folder relative to it, or a folder, or a hub id.

    Raises:
        FileNotFoundError: If the name is a path, and nothing is there.
    """
    beside = Path(path) / name
    if beside.is_dir():
        return str(beside.resolve())
    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise FileNotFoundError(
            f"{path} holds no backbone weights and its base model is not at {beside}; put the base model there, or "
            "correct the name in its config.json or adapter_config.json."
        )
    return name


def _find_base(layout: CheckpointLayout, model_base: str | None) -> str:
    """The base of a checkpoint that is not whole."""
    if layout.lora is not None and layout.has_weights:
        raise ValueError(
            f"{layout.path} holds low-rank updates and the weights of a whole model; which of them is meant is not "
            "said. Move adapter_config.json and what belongs to it to a folder of their own."
        )
    if model_base is not None:
        return model_base
    recorded = (layout.config.get("fuzzyroe") or {}).get("base_model")
    if recorded is None and layout.lora is not None:
        file = find_file(layout.path, LORA_CONFIG)
        recorded = json.loads(Path(str(file)).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if recorded is None:
        held = "a projector" if layout.projector else "low-rank updates" if layout.lora else "no weights"
        raise ValueError(
            f"{layout.path} holds {held} and names no base; whole weights are needed. Name them as model_base "
            "(--base of fuzzyroe convert)."
        )
    return resolve_base(layout.path, recorded)
