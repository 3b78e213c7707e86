"""The record of a family of base models: everything that is particular to one, in one place.

Every family runs inside transformers' own LLaVA: vision tower, projector, decoder. A family that is more than that, a
second vision tower for example, brings a vision model of its own and registers it (``vision_classes``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from llava.model.families.host import VisionSettings


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
        parts: Prefix given to the names of weights -> sub-folder of the original layout they lie in.
        to_hf: Names of weights in any layout -> names in Hugging Face's files of the host model. Total: a name that
            it does not know is an error.
        to_original: Names in Hugging Face's files -> names of the original repository. Inverts ``to_hf``.
        unused: Regular expressions of names that may be dropped.
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
        sizes: Published size -> its configuration, built without any file.
        vision_classes: Configuration and model class of its own vision models, to be registered.
        aliases: Hub ids of published checkpoints, for the documentation.
        traps: What a user should be warned of when a checkpoint is loaded.
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
    aliases: tuple[str, ...] = ()
    traps: tuple[str, ...] = ()

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
        """Give the part that a weight belongs to: "vision_tower", "projector", "decoder" or one of the family's own.

        Args:
            name: Name in a loaded model or in Hugging Face's files.
        """
        name = name.removeprefix("model.")  # what modules of transformers 5 have in front
        prefixes = ((start, part) for part, starts in self.trainable_parts.items() for start in starts)
        fitting = [(len(start), part) for start, part in prefixes if name.startswith(start)]
        return max(fitting)[1] if fitting else "decoder"


@dataclass(frozen=True)
class Unsupported:
    """A family that is recognised in order to be refused by name.

    Attributes:
        title: Name, with what is different about it.
        recognises: As for ``Family``.
        remedy: What to do instead.
    """

    title: str
    recognises: Callable[[Mapping[str, Any]], bool]
    remedy: str = "Load a LLaVA-1.5 in transformers' or the original layout."
