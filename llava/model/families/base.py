"""The record of a family of base models, which holds everything that is particular to one, and the families' host.

Every family runs inside transformers' own LLaVA: vision tower, projector, decoder. A family that is more than that, a
second vision tower for example, brings a vision model of its own and registers it (``vision_classes``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import LlavaConfig as HostConfig
from transformers import LlavaForConditionalGeneration as HostModel
from transformers import LlavaModel as HostInnerModel
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector as HostProjector

from llava.constants import DEFAULT_IMAGE_TOKEN

__all__ = ["Family", "HostConfig", "HostInnerModel", "HostModel", "HostProjector", "KeyMap", "VisionSettings"]

SELECT_FEATURES = {"patch": "default", "cls_patch": "full"}
"""LLaVA's name of the features taken from the vision tower -> transformers' name."""

PROJECTOR_TYPES = ("mlp2x_gelu",)

VOCABULARY_MULTIPLE = 64
"""New token ids are rounded up to it, as in released checkpoints: matrix products like it."""


@dataclass(frozen=True)
class VisionSettings:
    """The vision tower of a model, and which of its features the projector reads.

    Attributes:
        vision_tower: Checkpoint of the vision tower, folder or hub id.
        projector_type: LLaVA's name of the projector's form.
        select_layer: Layer of the tower that features are taken from, counted from its end if negative.
        select_feature: "patch" without, "cls_patch" with the class token.

    Raises:
        ValueError: If projector or features are of an unknown kind.
    """

    vision_tower: str
    projector_type: str = "mlp2x_gelu"
    select_layer: int = -2
    select_feature: str = "patch"

    def __post_init__(self) -> None:
        if self.projector_type not in PROJECTOR_TYPES:
            raise ValueError(
                f"Projector type {self.projector_type} is not available, {', '.join(PROJECTOR_TYPES)} is: that of "
                "LLaVA-1.5 and of transformers' LLaVA. Use it."
            )
        if self.select_feature not in SELECT_FEATURES:
            raise ValueError(
                f"Vision feature {self.select_feature} is unknown; {' and '.join(SELECT_FEATURES)} are known. Use one."
            )


@dataclass(frozen=True)
class KeyMap:
    """A renaming of weights by anchored prefixes.

    Attributes:
        rules: Regular expressions of a prefix with their replacements; the first that matches is taken.

    >>> KeyMap(((r"mm_projector[.]0[.]", "projector.linear_1."),)).rename("mm_projector.0.bias")
    'projector.linear_1.bias'
    """

    rules: tuple[tuple[str, str], ...]

    def rename(self, name: str) -> str | None:
        """Give the new name; None if no rule knows the old one."""
        for pattern, replacement in self.rules:
            renamed, count = re.subn(rf"\A{pattern}", replacement, name)
            if count:  # one prefix only: a later rule must not see what an earlier one wrote
                return renamed
        return None


@dataclass(frozen=True)
class Family:
    """A family of base models. *Settings* are the content of its ``config.json``, in any layout.

    Attributes:
        name: Key in ``FAMILIES``.
        title: Name in messages.
        recognises: Whether settings are those of this family; called with a loaded configuration's attributes too.
        to_hf: Names of weights in any layout -> names in Hugging Face's files of the host model. Total: a name that
            it does not know is an error.
        to_original: Names in Hugging Face's files -> names of the original repository. Inverts ``to_hf``.
        build_config: ``(settings, path, tokenizer)`` of the original layout -> configuration of the host model.
        original_config: ``(config, vision_tower, vocab_size)`` -> settings of the original layout.
        read_tower_config: Configuration of the vision tower that ``VisionSettings`` names.
        tower_to_hf: Names in the tower's own checkpoint -> names in Hugging Face's files; None for what is not its.
        image_processor: Folder or hub id of its description -> image processor.
        count_image_features: Number of features that tower and projector give for an image, from a configuration.
        template: Name of the default conversation template, from a configuration.
        vision_keys: Attributes of the tower's configuration that decide what it computes.
        trainable_parts: Part -> prefixes of its weights in Hugging Face's files; the longest prefix that matches
            wins, and what none matches is the decoder's.
        recipe: How its authors finetune it: flags of the training script with their values.
        parts: Prefix given to the names of weights -> sub-folder of the original layout they lie in.
        unused: Regular expressions of names that may be dropped.
        sizes: Published size -> its configuration, built without any file.
        vision_classes: Configuration and model class of its own vision models, to be registered.
    """

    name: str
    title: str
    recognises: Callable[[Mapping[str, Any]], bool]
    to_hf: KeyMap
    to_original: KeyMap
    build_config: Callable[[Mapping[str, Any], str, Any], Any]
    original_config: Callable[[Any, str, int], dict[str, Any]]
    read_tower_config: Callable[[VisionSettings], Any]
    tower_to_hf: KeyMap
    image_processor: Callable[[str], Any]
    count_image_features: Callable[[Any], int]
    template: Callable[[Any], str]
    vision_keys: tuple[str, ...]
    trainable_parts: Mapping[str, tuple[str, ...]]
    recipe: Mapping[str, Any]
    parts: Mapping[str, str] = field(default_factory=lambda: {"": ""})
    unused: tuple[str, ...] = ()
    sizes: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    vision_classes: tuple[tuple[type[PretrainedConfig], type[PreTrainedModel]], ...] = ()

    def original_name(self, name: str) -> str:
        """Give the original repository's name of a weight of any layout.

        Raises:
            KeyError: If it belongs to no part of the family.
        """
        original = self.to_original.rename(self.to_hf.rename(name) or "")
        if original is None:
            raise KeyError(f"{name} is no weight of a {self.title}; vision tower, projector and decoder have names.")
        return original

    def part_of(self, name: str) -> str:
        """Give the part that a weight, named as in a model or in files, belongs to; "decoder" if to no other."""
        name = name.removeprefix("model.")  # what modules of transformers 5 have in front
        prefixes = ((start, part) for part, starts in self.trainable_parts.items() for start in starts)
        fitting = [(len(start), part) for start, part in prefixes if name.startswith(start)]
        return max(fitting)[1] if fitting else "decoder"


def join_configs(family: Family, text: Any, vision: Any, settings: VisionSettings, tokenizer: Any) -> Any:
    """Make the configuration of a model out of those of its parts.

    Args:
        family: Family of the model.
        text, vision: Those of language model and tower; the text's vocabulary grows until it holds the tokenizer's.
        settings: How features are taken from the tower.
        tokenizer: Has an image token; gets a padding token if it has none.
    """
    if tokenizer.pad_token_id is None:  # as in LLaVA; it is masked wherever it pads
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if len(tokenizer) > text.vocab_size:
        text.vocab_size = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    text.pad_token_id = tokenizer.pad_token_id
    config: Any = HostConfig(
        text_config=text,
        vision_config=vision,
        projector_hidden_act="gelu",
        vision_feature_layer=settings.select_layer,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    config.image_token_id = tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
    config.vision_feature_select_strategy = SELECT_FEATURES[settings.select_feature]
    config.bos_token_id, config.eos_token_id = text.bos_token_id, text.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    config.image_seq_length = family.count_image_features(config)
    config.mm_vision_tower = settings.vision_tower  # so that a later command may name it again
    return config


def locate(name: str, folder: str | Path) -> str:
    """Find what a checkpoint names: in its own folder if it is there, else where the name says, as folder or hub id."""
    beside = Path(folder) / name
    return str(beside.resolve()) if beside.is_dir() else name
