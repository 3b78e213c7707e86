"""Reading the weights of a checkpoint as stored, whatever they are split into."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

LAYOUTS = (
    ("model.safetensors.index.json", True),
    ("model.safetensors", False),
    ("pytorch_model.bin.index.json", True),
    ("pytorch_model.bin", False),
)
"""Files that list or hold the weights, the safer ones first, with whether they are an index."""


def read_weights(path: str | Path, wants: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint under the names they are stored under.

    Args:
        path: Folder or hub id of a checkpoint.
        wants: Says by name whether a tensor is read.

    Returns:
        Tensors on the CPU.

    Raises:
        FileNotFoundError: If the checkpoint has no weights in a known layout.
    """
    for name, is_index in LAYOUTS:
        found = find_file(path, name)
        if found is None:
            continue
        if not is_index:
            return read_tensors(found, wants)
        places: dict[str, str] = json.loads(Path(found).read_text())["weight_map"]
        shards = dict.fromkeys(shard for tensor, shard in places.items() if wants(tensor))
        return {name: tensor for shard in shards for name, tensor in read_tensors(_need(path, shard), wants).items()}
    raise FileNotFoundError(
        f"{path} holds none of {', '.join(name for name, _ in LAYOUTS)}; weights are needed. Download it again."
    )


def read_tensors(file: str | Path, wants: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Read one file of tensors; of a pickled file nothing but tensors is ever loaded.

    Args:
        file: A ``.safetensors`` file, or one that ``torch.save`` wrote.
        wants: Says by name whether a tensor is read.

    Raises:
        ValueError: If the file is neither, or holds anything but named tensors.
    """
    try:
        if str(file).endswith(".safetensors"):
            with safe_open(file, "pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys() if wants(name)}
        # mapped, not read: pages come as they are used, and only once for all ranks; files before torch 1.6 cannot be
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors and pickle raise many kinds on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{file} cannot be read as weights ({reason}); a safetensors file or a pickle of "
            "plain tensors is needed. Download it again."
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ValueError(f"{file} holds more than named tensors; only these are read. Save the tensors alone.")
    return {name: tensor for name, tensor in loaded.items() if wants(name)}


def find_file(path: str | Path, name: str) -> str | None:
    """Local path of a file of a checkpoint, downloaded if need be; None if the checkpoint has no such file."""
    return cached_file(str(path), name, _raise_exceptions_for_missing_entries=False)


def _need(path: str | Path, name: str) -> str:
    found = find_file(path, name)
    if found is None:
        raise FileNotFoundError(f"{path} lacks {name}, which its index names; download the checkpoint again.")
    return found
