"""Weights of a checkpoint: read from files of any layout, and brought to the names of Hugging Face's files.

Hugging Face's names are those of ``llava-hf``'s files: every version of transformers reads them, whatever its modules
are called today.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

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

INDEX_FILE = "model.safetensors.index.json"

WEIGHT_FILES = (INDEX_FILE, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
"""Files that list or hold the weights, the safer ones first."""


# --- reading ---


def find_file(path: str | Path, *names: str) -> str | None:
    """Give the local path of the first of some files that a checkpoint (folder or hub id) has; None if it has none."""
    files = (cached_file(str(path), name, _raise_exceptions_for_missing_entries=False) for name in names)
    return next((file for file in files if file is not None), None)


def find_weights(path: str | Path, folder: str = "") -> str | None:
    """Give the file that lists or holds the weights of a checkpoint, or of a sub-folder of it; None if it has none."""
    return find_file(path, *(str(Path(folder, name)) for name in WEIGHT_FILES))


def read_weights(path: str | Path, folder: str = "") -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, or of a sub-folder of it, under the names they are stored under.

    Raises:
        FileNotFoundError: If the checkpoint has no weights in a known layout, or lacks a file of them.
    """
    file = find_weights(path, folder)
    if file is None:
        raise FileNotFoundError(
            f"{path} holds none of {', '.join(WEIGHT_FILES)}; weights are needed. Download it again."
        )
    if not file.endswith(".index.json"):
        return read_tensors(file)
    weights: dict[str, Tensor] = {}
    for name in dict.fromkeys(json.loads(Path(file).read_text())["weight_map"].values()):
        shard = find_file(path, str(Path(folder, name)))
        if shard is None:
            raise FileNotFoundError(f"{path} lacks {name}, which its index names; download the checkpoint again.")
        weights |= read_tensors(shard)
    return weights


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """Read a ``.safetensors`` file, or one that ``torch.save`` wrote, of which nothing but tensors is ever loaded.

    Raises:
        ValueError: If the file is neither, or holds anything but named tensors.
    """
    try:
        if str(file).endswith(".safetensors"):
            with safe_open(file, "pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}
        # mapped, not read: pages come as they are used, and only once for all ranks; files before torch 1.6 cannot be
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors and pickle raise many kinds on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{file} cannot be read as weights ({reason}); a safetensors file or a pickle of plain tensors is needed. "
            "Download it again."
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ValueError(f"{file} holds more than named tensors; only these are read. Save the tensors alone.")
    return loaded


# --- names ---


def to_hf_names(weights: Mapping[str, Value], family: Family, source: str) -> dict[str, Value]:
    """Give weights of any layout their names in Hugging Face's files, leaving out what the family does not use.

    ``source`` says where they come from, for messages.

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


def check_fit(shapes: Mapping[str, Shape], wanted: Mapping[str, Shape], subject: str, target: str, remedy: str) -> None:
    """Compare the shapes of weights with those they should have, both under Hugging Face's names.

    Args:
        shapes, wanted: Name -> shape as stored, and as needed.
        subject, target, remedy: What does not fit what, and what to do, for the message.

    Raises:
        ValueError: Listing missing, unexpected and misshapen weights (of very many the first ones).
    """
    missing, unexpected = wanted.keys() - shapes.keys(), shapes.keys() - wanted.keys()
    misshapen = [
        f"{name} {shapes[name]}, not {wanted[name]}" for name in shapes.keys() & wanted if shapes[name] != wanted[name]
    ]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"{subject} do not fit {target}: missing {list_names(missing)}, unexpected {list_names(unexpected)}, wrong "
            f"shape {list_names(misshapen)}; they must agree exactly. {remedy}"
        )


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, Shape]:
    """Give the shapes of tensors, or of what has a shape as they do, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def list_names(names: Iterable[str]) -> str:
    """List names in order, in brackets; of very many the first ones and their number.

    >>> list_names(["b", "a"])
    '[a, b]'
    """
    ordered = sorted(names)
    more = f" and {len(ordered) - NUM_LISTED} more" if len(ordered) > NUM_LISTED else ""
    return f"[{', '.join(ordered[:NUM_LISTED])}]{more}"
