"""Names of a LLaVA model's weights: each layout's names as anchored prefixes of the released ones.

The released names are those of ``llava-hf``'s files: every version of transformers reads them, whatever its modules are
called today.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")
Shape = tuple[int, ...]

TOWER = "vision_tower.vision_model."
PROJECTOR = "multi_modal_projector."
EMBEDDINGS = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"

PEFT_PREFIX = "base_model.model."
"""What peft puts in front of a module's name."""

CONSTANTS = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Ends of names that old files hold and that are computed today."""

NUM_LISTED = 40
"""Names that an error lists before it only counts."""


@dataclass(frozen=True)
class KeyMap:
    """A renaming by prefixes.

    Attributes:
        rules: Regular expressions of a prefix with their replacements; the first that matches is taken.
    """

    rules: tuple[tuple[str, str], ...]

    def rename(self, name: str) -> str | None:
        """Give the new name; None if no rule knows the old one."""
        for pattern, replacement in self.rules:
            renamed, count = re.subn(rf"\A{pattern}", replacement, name)
            if count:
                return renamed
        return None


TO_RELEASED = KeyMap(
    (
        # the original repository, and language models
        (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?", TOWER),
        (r"(?:model\.)?mm_projector\.0\.", f"{PROJECTOR}linear_1."),
        (r"(?:model\.)?mm_projector\.2\.", f"{PROJECTOR}linear_2."),
        (r"model\.(layers\.\d+|embed_tokens|norm)\.", r"language_model.model.\1."),
        (r"lm_head\.", "language_model.lm_head."),
        # files and modules of transformers, of any version
        (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", TOWER),
        (r"(?:model\.)?multi_modal_projector\.", PROJECTOR),
        (r"model\.language_model\.", "language_model.model."),
        (r"language_model\.(?=model\.|lm_head\.)", "language_model."),
    )
)
"""Names of any layout -> released names; no name means different weights in two layouts."""

TO_ORIGINAL = KeyMap(
    (
        (r"vision_tower\.vision_model\.", "model.vision_tower.vision_tower.vision_model."),
        (r"multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
        (r"multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
        (r"language_model\.model\.", "model."),
        (r"language_model\.lm_head\.", "lm_head."),
    )
)
"""Released names -> those of the original repository."""


def to_released(weights: Mapping[str, Value], source: str) -> dict[str, Value]:
    """Give weights their released names, leaving out constants.

    Args:
        weights: Stored name -> tensor, of any layout.
        source: Where the weights come from, for messages.

    Raises:
        ValueError: If a name belongs to no part of a LLaVA, or two become one.
    """
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(CONSTANTS)}
    new_names = {name: TO_RELEASED.rename(name.removeprefix(PEFT_PREFIX)) for name in weights}
    unknown = [name for name, new in new_names.items() if new is None]
    if unknown:
        raise ValueError(
            f"{source} holds unexpected weights {list_names(unknown)}; allowed are those of LLaVA-1.5's vision tower, "
            "projector and language model. Convert or remove them: nothing is dropped silently."
        )
    renamed = {new: weights[name] for name, new in new_names.items() if new is not None}
    if len(renamed) < len(weights):
        twice = [name for name, new in new_names.items() if list(new_names.values()).count(new) > 1]
        raise ValueError(f"{source} holds {list_names(twice)} twice under two names; remove one set of them.")
    return renamed


def original_name(name: str) -> str:
    """Give the original repository's name of a weight of any layout.

    Raises:
        KeyError: If it belongs to no part of a LLaVA.
    """
    original = TO_ORIGINAL.rename(TO_RELEASED.rename(name) or "")
    if original is None:
        raise KeyError(f"{name} is no weight of a LLaVA; the vision tower, projector and language model have names.")
    return original


def check_fit(found: Mapping[str, Shape], wanted: Mapping[str, Shape], source: str) -> None:
    """Compare weights with those a model has.

    Args:
        found: Released name -> shape of what is there.
        wanted: Released name -> shape of what a model of this configuration has.
        source: Where the weights come from, for messages.

    Raises:
        ValueError: Listing missing, unexpected and misshapen weights (of very many the first ones).
    """
    missing, unexpected = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    misshapen = [
        f"{name} {found[name]}, not {wanted[name]}" for name in found.keys() & wanted if found[name] != wanted[name]
    ]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"The weights of {source} do not fit its config.json: missing {list_names(missing)}, unexpected "
            f"{list_names(unexpected)}, wrong shape {list_names(misshapen)}; they must agree exactly. Complete the "
            "checkpoint or correct config.json."
        )


def list_names(names: Iterable[str]) -> str:
    """Names in order, in brackets; of very many the first ones and their number."""
    ordered = sorted(names)
    more = f" and {len(ordered) - NUM_LISTED} more" if len(ordered) > NUM_LISTED else ""
    return f"[{', '.join(ordered[:NUM_LISTED])}]{more}"
