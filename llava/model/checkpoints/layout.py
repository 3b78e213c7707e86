"""What a checkpoint holds, decided by its ``config.json`` and its files alone, never by its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from llava.model.checkpoints.weight_files import LAYOUTS, find_file

LANGUAGE_MODELS = ("llama", "mistral")
"""Model types that LLaVA-1.5 can be built around."""

PROJECTOR_FILES = ("mm_projector.bin", "mm_projector.safetensors")
LORA_CONFIG = "adapter_config.json"
LORA_FILES = ("adapter_model.safetensors", "adapter_model.bin")
OTHERS_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
"""What trained beside low-rank updates as a whole."""

OTHER_FAMILIES = {
    "llm_cfg": "VILA-1.5 or NVILA, whose parts lie in three folders",
    "is_multipath_encoder": "LLaVA-HR, which has two vision towers",
    "vision_tower_slow": "LLaVA-HR, which has two vision towers",
}
"""Keys of configurations that look like LLaVA's and mean another model."""


@dataclass(frozen=True)
class CheckpointLayout:
    """What a checkpoint holds.

    Attributes:
        path: Folder or hub id.
        config: Its ``config.json``; empty if it has none.
        kind: "transformers" or "original" for a LLaVA in either layout, "language_model" for one without sight, "part"
            for updates or a projector without ``config.json``.
        has_weights: Whether it holds the weights of a whole model.
        projector: File of a projector alone; None if there is none, or weights are there and hold it.
        lora: File of low-rank updates; None if there is none.
        others: File of what trained beside them; None if there is none.
    """

    path: str
    config: dict[str, Any]
    kind: str
    has_weights: bool
    projector: str | None
    lora: str | None
    others: str | None

    @property
    def is_whole(self) -> bool:
        """Whether nothing but this checkpoint is needed."""
        return self.has_weights and self.lora is None


def read_layout(path: str | Path) -> CheckpointLayout:
    """Look at a checkpoint; no weights are read.

    Args:
        path: Folder or hub id.

    Raises:
        FileNotFoundError: If it has no ``config.json``, or updates without their description.
        ValueError: If it is a model of another family.
    """
    try:
        config = read_config_dict(path)
        kind = find_kind(config, path)
    except FileNotFoundError:
        if not _holds_part(path):
            raise
        config, kind = {}, "part"
    has_weights = any(find_file(path, name) for name, _ in LAYOUTS)
    has_updates = find_file(path, LORA_CONFIG) is not None
    lora = _find_one(path, LORA_FILES) if has_updates else None
    if has_updates and lora is None:
        raise FileNotFoundError(
            f"{path} has {LORA_CONFIG} but none of {', '.join(LORA_FILES)}; the low-rank updates are needed. Complete "
            "the folder."
        )
    others = _find_one(path, OTHERS_FILES) if has_updates else None
    projector = None if has_weights or has_updates else _find_one(path, PROJECTOR_FILES)
    return CheckpointLayout(str(path), config, kind, has_weights, projector, lora, others)


def find_kind(config: dict[str, Any], path: str | Path) -> str:
    """Say what kind of model a configuration is of.

    ``model_type`` does not tell: "llava" stands in files of transformers, of the original repository, and of others.

    Args:
        config: Content of ``config.json``.
        path: Where it was found, for messages.

    Returns:
        "transformers", "original" or "language_model".

    Raises:
        ValueError: If it is none of these.
    """
    for key, family in OTHER_FAMILIES.items():
        if config.get(key):
            raise ValueError(f"{path} is a checkpoint of {family}; this is LLaVA-1.5. Load one of LLaVA-1.5's layouts.")
    if str(config.get("mm_patch_merge_type", "flat")) != "flat" or config.get("image_aspect_ratio") == "anyres":
        raise ValueError(
            f"{path} is a checkpoint of LLaVA-NeXT (image_aspect_ratio {config.get('image_aspect_ratio')}, "
            f"mm_patch_merge_type {config.get('mm_patch_merge_type')}), which cuts images into tiles; this is "
            "LLaVA-1.5. Load it with transformers' LlavaNextForConditionalGeneration."
        )
    if "text_config" in config or "vision_config" in config:
        if config.get("model_type") != "llava":
            raise ValueError(
                f"{path} is a model of type {config.get('model_type')}; a LLaVA (model_type llava) is needed."
            )
        return "transformers"
    if "mm_vision_tower" in config:
        return "original"
    if is_language_model(config):
        return "language_model"
    raise ValueError(
        f"{path} is a model of type {config.get('model_type')} without text_config and mm_vision_tower; a LLaVA-1.5 in "
        "transformers' or the original layout is needed. Name its folder or hub id."
    )


def is_language_model(config: dict[str, Any]) -> bool:
    """Whether a configuration is that of a language model that can be given sight."""
    return config.get("model_type") in LANGUAGE_MODELS and "mm_vision_tower" not in config


def read_config_dict(path: str | Path) -> dict[str, Any]:
    """Read a configuration as it stands, whatever kind of model it is of.

    Args:
        path: Folder or hub id.

    Raises:
        FileNotFoundError: If there is none, saying what to name instead.
    """
    folder = Path(path)
    if folder.exists() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; name the folder of a checkpoint.")
    try:
        return PretrainedConfig.get_config_dict(str(path))[0]
    except OSError as error:
        if folder.exists():
            raise FileNotFoundError(
                f"{folder / 'config.json'} cannot be read ({error}); write the checkpoint again."
            ) from error
        raise FileNotFoundError(
            f"{path} is no folder, and its configuration cannot be had from the hub either; "
            "name a checkpoint folder, as an earlier stage writes it, or a hub id (owner/name)."
        ) from error


def _find_one(path: str | Path, names: tuple[str, ...]) -> str | None:
    return next((file for file in (find_file(path, name) for name in names) if file is not None), None)


def _holds_part(path: str | Path) -> bool:
    """Whether updates or a projector are there."""
    try:
        return any(find_file(path, name) for name in (LORA_CONFIG, *PROJECTOR_FILES))
    except OSError:
        return False
