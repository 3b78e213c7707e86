"""Names of weights: brought from any layout to those of Hugging Face's files, and compared with a model's.

Hugging Face's names are those of ``llava-hf``'s files: every version of transformers reads them, whatever its modules
are called today.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from llava.model.families import Family

Value = TypeVar("Value")
Shape = tuple[int, ...]

EMBEDDINGS = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
TOWER = "vision_tower."

PEFT_PREFIX = "base_model.model."
"""What peft puts in front of a module's name."""

NUM_LISTED = 40
"""Names that an error lists before it only counts."""


def to_hf_names(weights: Mapping[str, Value], family: Family, source: str) -> dict[str, Value]:
    """Give weights their names in Hugging Face's files, leaving out what the family does not use.

    Args:
        weights: Stored name -> tensor, of any layout.
        family: Family whose names are known.
        source: Where the weights come from, for messages.

    Raises:
        ValueError: If a name is unknown, or two become one.
    """
    is_unused = re.compile("|".join(family.unused) or r"(?!)").fullmatch
    new_names = {name: family.to_hf.rename(name.removeprefix(PEFT_PREFIX)) for name in weights if not is_unused(name)}
    unknown = [name for name, new in new_names.items() if new is None]
    if unknown:
        raise ValueError(
            f"{source} holds unexpected weights {list_names(unknown)}; allowed are those of {family.title}'s vision "
            "tower, projector and language model. Convert or remove them: nothing is dropped silently."
        )
    # a checkpoint that was merged by hand may hold both layouts' names
    renamed = {new: weights[name] for name, new in new_names.items() if new is not None}
    if len(renamed) < len(new_names):
        twice = [name for name, new in new_names.items() if list(new_names.values()).count(new) > 1]
        raise ValueError(f"{source} holds {list_names(twice)} twice under two names; remove one set of them.")
    return renamed


def check_fit(found: Mapping[str, Shape], wanted: Mapping[str, Shape], source: str) -> None:
    """Compare the shapes of weights with those of a model, both under Hugging Face's names.

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
    """Names in order, in brackets; of very many the first ones and their number.

    >>> list_names(["b", "a"])
    '[a, b]'
    """
    ordered = sorted(names)
    more = f" and {len(ordered) - NUM_LISTED} more" if len(ordered) > NUM_LISTED else ""
    return f"[{', '.join(ordered[:NUM_LISTED])}]{more}"
