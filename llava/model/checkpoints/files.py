"""Files of a checkpoint, and of the base models it builds on, judged by their content and never by a name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from llava.model.checkpoints.weights import find_file, find_weights
from llava.model.families import Family, detect_family

LANGUAGE_MODELS = ("llama", "mistral")
"""Types of language models that a vision tower can be added to."""

PROJECTOR_FILES = ("mm_projector.bin", "mm_projector.safetensors")
LORA_CONFIG = "adapter_config.json"
LORA_FILES = ("adapter_model.safetensors", "adapter_model.bin")
OTHERS_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
"""What trained as a whole beside LoRA."""


@dataclass(frozen=True)
class CheckpointFiles:
    """What a checkpoint holds.

    Attributes:
        path: Folder or hub id.
        config: Its ``config.json``; empty if it has none.
        format: "transformers" or "original" for a model of a family in either layout, "language_model" for one
            without vision tower, "part" for LoRA weights or a projector without ``config.json``.
        family: Its family; None for the last two.
        has_weights: Whether it holds the weights of a whole model.
        projector: File of a projector alone; None if there is none, or weights are there and hold it.
        lora: File of LoRA weights; None if there is none.
        lora_config: Their ``adapter_config.json``; empty if there are none.
        others: File of what trained beside them; None if there is none.
    """

    path: str
    config: Mapping[str, Any]
    format: str
    family: Family | None
    has_weights: bool
    projector: str | None
    lora: str | None
    lora_config: Mapping[str, Any]
    others: str | None

    @property
    def is_whole(self) -> bool:
        """Whether nothing but this checkpoint is needed."""
        return self.has_weights and self.lora is None


def find_files(path: str | Path) -> CheckpointFiles:
    """Look at a checkpoint, a folder or hub id; no weights are read.

    Raises:
        FileNotFoundError: If it has no ``config.json``, or LoRA's configuration without its weights.
        ValueError: If it is a model of another family.
    """
    config: Mapping[str, Any] = {}
    family, format = None, "part"
    try:
        config = read_config_dict(path)
        family, format = detect_format(config, path)
    except FileNotFoundError:
        if not _holds_part(path):  # a projector or LoRA weights need no config.json, their base has one
            raise
    # every folder of the original layout must have its weights
    folders = family.parts.values() if family is not None and format == "original" else ("",)
    is_complete = all(find_weights(path, folder) is not None for folder in folders)
    described = find_file(path, LORA_CONFIG)
    if described is None:
        # LLaVA writes mm_projector.bin beside whole weights as well, which hold it already
        projector = None if is_complete else find_file(path, *PROJECTOR_FILES)
        return CheckpointFiles(str(path), config, format, family, is_complete, projector, None, {}, None)
    lora, lora_config = find_file(path, *LORA_FILES), json.loads(Path(described).read_text(encoding="utf-8"))
    if lora is None:
        raise FileNotFoundError(
            f"{path} has {LORA_CONFIG} but none of {', '.join(LORA_FILES)}; these are needed. Complete the folder."
        )
    others = find_file(path, *OTHERS_FILES)
    return CheckpointFiles(str(path), config, format, family, is_complete, None, lora, lora_config, others)


def detect_format(config: Mapping[str, Any], path: str | Path) -> tuple[Family | None, str]:
    """Detect family and format of a model, see ``CheckpointFiles``, from its ``config.json``, found at a path.

    Raises:
        ValueError: If it is none of these.
    """
    family = detect_family(config, path)
    is_hosted = "text_config" in config or "vision_config" in config
    if family is not None:
        return family, "transformers" if is_hosted else "original"
    if is_language_model(config):
        return None, "language_model"
    lack = "" if is_hosted else " without text_config and mm_vision_tower"
    raise ValueError(
        f"{path} is a model of type {config.get('model_type')}{lack}; a LLaVA-1.5 in transformers' or the original "
        "layout is needed. Name its folder or hub id."
    )


def is_language_model(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a language model that a vision tower can be added to."""
    return config.get("model_type") in LANGUAGE_MODELS and "mm_vision_tower" not in config


def read_config_dict(path: str | Path) -> dict[str, Any]:
    """Read the configuration of a folder or hub id as it stands, whatever kind of model it is of.

    Raises:
        FileNotFoundError: If there is none, saying what to name instead.
    """
    file = Path(path, "config.json")
    if Path(path).exists() and not file.is_file():
        raise FileNotFoundError(f"{path} holds no config.json; name the folder of a checkpoint.")
    try:
        return PretrainedConfig.get_config_dict(str(path))[0]
    except OSError as error:
        if file.is_file():
            raise FileNotFoundError(f"{file} cannot be read ({error}); write the checkpoint again.") from error
        raise FileNotFoundError(
            f"{path} is no folder, and its configuration cannot be had from the hub either; name a checkpoint folder, "
            "as an earlier stage writes it, or a hub id (owner/name)."
        ) from error


def resolve_base_models(path: str | Path, model_base: str | None = None) -> list[CheckpointFiles]:
    """Follow a checkpoint to the whole weights it builds on.

    Args:
        path, model_base: As for ``read_checkpoint``.

    Returns:
        The checkpoint itself first, whole weights last; these may be a language model's.

    Raises:
        FileNotFoundError: If a base is not where it is said to be.
        ValueError: If a base is needed and not named, or named and not needed.
    """
    top = find_files(path)
    if top.is_whole and model_base is not None:
        raise ValueError(
            f"{path} holds the weights of a whole model, model_base {model_base} has no part in it; a base belongs to "
            "a projector or to LoRA weights. Leave it out."
        )
    if top.format == "language_model":
        raise ValueError(
            f"{path} is a language model (model_type {top.config.get('model_type')}); a LLaVA is needed, or a "
            "projector or LoRA weights with this as model_base. To add a vision tower, train it with --vision_tower."
        )
    # LoRA weights may rest on a projector's folder, which rests on a language model
    chain = [top]
    while not chain[-1].is_whole:
        base = _find_base(chain[-1], model_base if len(chain) == 1 else None)
        if base in [files.path for files in chain]:
            raise ValueError(f"{chain[-1].path} names {base} as its base, which rests on it; correct one of them.")
        chain.append(find_files(base))
    return chain


def _find_base(files: CheckpointFiles, model_base: str | None) -> str:
    """Folder or hub id of the base of a checkpoint that is not whole."""
    if files.lora is not None and files.has_weights:
        raise ValueError(
            f"{files.path} holds LoRA weights and the weights of a whole model; which of them is meant is not "
            "said. Move adapter_config.json and what belongs to it to a folder of their own."
        )
    if model_base is not None:
        return model_base
    # what a stage wrote is relative to its own folder; what peft wrote, perhaps to the folder it was run in
    by_stage = (files.config.get("fuzzyroe") or {}).get("base_model")
    recorded = by_stage or files.lora_config.get("base_model_name_or_path")
    if recorded is None:
        held = "a projector" if files.projector else "LoRA weights" if files.lora else "no weights"
        raise ValueError(
            f"{files.path} holds {held} and names no base; whole weights are needed. Name them as model_base "
            "(--base of fuzzyroe convert)."
        )
    beside = Path(files.path) / recorded
    if beside.is_dir():
        return str(beside.resolve())
    if recorded.startswith((".", "/")) and (by_stage or not Path(recorded).is_dir()):
        raise FileNotFoundError(
            f"{files.path} holds no backbone weights and its base model is not at {beside}; put the base model there, "
            "or correct the name in its config.json or adapter_config.json."
        )
    return recorded


def _holds_part(path: str | Path) -> bool:
    """Whether LoRA weights or a projector are there; not if the hub cannot be asked."""
    try:
        return find_file(path, LORA_CONFIG, *PROJECTOR_FILES) is not None
    except OSError:
        return False
