"""Files of weights: read as stored, whatever they are split into; written one file at a time and compared."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import cached_file

from llava.files import write_json

INDEX_FILE = "model.safetensors.index.json"

WEIGHT_FILES = (
    (INDEX_FILE, True),
    ("model.safetensors", False),
    ("pytorch_model.bin.index.json", True),
    ("pytorch_model.bin", False),
)
"""Files that list or hold the weights, the safer ones first, with whether they are an index."""

Progress = Callable[[int, int], None]


def find_file(path: str | Path, *names: str) -> str | None:
    """Give the local path of the first file that a checkpoint has, downloaded if need be; None if it has none.

    Args:
        path: Folder or hub id.
        names: Names of files, best first; may begin with a sub-folder.
    """
    found = (cached_file(str(path), name, _raise_exceptions_for_missing_entries=False) for name in names)
    return next((file for file in found if file is not None), None)


def find_needed(path: str | Path, name: str) -> str:
    """Give the local path of a file that a checkpoint must have.

    Raises:
        OSError: If it is missing.
    """
    return str(cached_file(str(path), name))


def has_weights(path: str | Path, folder: str = "") -> bool:
    """Whether the weights of a whole model lie in a checkpoint, or in a sub-folder of it."""
    return find_file(path, *(str(Path(folder, name)) for name, _ in WEIGHT_FILES)) is not None


def read_weights(path: str | Path, folder: str = "") -> dict[str, Tensor]:
    """Read the tensors of a checkpoint under the names they are stored under.

    Args:
        path: Folder or hub id of a checkpoint.
        folder: Sub-folder that they lie in.

    Returns:
        Tensors on the CPU.

    Raises:
        FileNotFoundError: If the checkpoint has no weights in a known layout, or lacks a file of them.
    """
    for name, is_index in WEIGHT_FILES:
        found = find_file(path, str(Path(folder, name)))
        if found is None:
            continue
        if not is_index:
            return read_tensors(found)
        weights: dict[str, Tensor] = {}
        for shard in dict.fromkeys(json.loads(Path(found).read_text())["weight_map"].values()):
            file = find_file(path, str(Path(folder, shard)))
            if file is None:
                raise FileNotFoundError(f"{path} lacks {shard}, which its index names; download the checkpoint again.")
            weights |= read_tensors(file)
        return weights
    raise FileNotFoundError(
        f"{path} holds none of {', '.join(name for name, _ in WEIGHT_FILES)}; weights are needed. Download it again."
    )


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """Read one file of tensors; of a pickled file nothing but tensors is ever loaded.

    Args:
        file: A ``.safetensors`` file, or one that ``torch.save`` wrote.

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
            f"{file} cannot be read as weights ({reason}); a safetensors file or a pickle of "
            "plain tensors is needed. Download it again."
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ValueError(f"{file} holds more than named tensors; only these are read. Save the tensors alone.")
    return loaded


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written.

    Attributes:
        source: Name of the weight it is made of, in Hugging Face's files.
        shape: Its shape; of a longer weight the first rows are taken.
        dtype: Its data type.
    """

    source: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def cast(self, weight: Tensor) -> Tensor:
        """Give a weight this shape and data type."""
        return weight[: self.shape[0]].to(self.dtype).contiguous()


def write_weights(
    specs: Mapping[str, TensorSpec],
    tensor: Callable[[str], Tensor],
    folder: Path,
    max_shard_size: str | int,
    progress: Progress = lambda done, total: None,
) -> int:
    """Write weights; no more than one file's are in memory at a time.

    Args:
        specs: Name in the file -> what is written.
        tensor: Gives a weight by its name in Hugging Face's files.
        folder: Folder to write to.
        max_shard_size: Largest size of a file, in bytes or such as "5GB"; a larger tensor has one of its own.
        progress: Told of the tensors written and all there are.

    Returns:
        Number of files.
    """
    meta = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    split = split_torch_state_dict_into_shards(
        meta, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    done = 0
    for file, names in split.filename_to_tensors.items():
        shard = {name: specs[name].cast(tensor(specs[name].source)) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        del shard  # before the next one is made
        done += len(names)
        progress(done, len(specs))
    if split.is_sharded:
        write_json(folder / INDEX_FILE, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    return len(split.filename_to_tensors)


def compare_weights(
    specs: Mapping[str, TensorSpec], tensor: Callable[[str], Tensor], written: Mapping[str, Tensor]
) -> None:
    """Compare what is read from written files with what should be in them, bit by bit, one tensor at a time.

    Args:
        specs: Name in the file -> what was written.
        tensor: Gives a weight by its name in Hugging Face's files.
        written: The weights that were read back, under these names.

    Raises:
        RuntimeError: Naming the first that differs.
    """
    wrong = [
        name
        for name, spec in specs.items()
        if not _has_same_bits(spec.cast(tensor(spec.source)), written[spec.source][: spec.shape[0]])
    ]
    if wrong:
        raise RuntimeError(
            f"Read back, {len(wrong)} of {len(specs)} weights differ, {wrong[0]} first; is the disk whole?"
        )


def _has_same_bits(expected: Tensor, found: Tensor) -> bool:
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return False
    # as bytes, because NaN differs from itself
    return torch.equal(expected.view(torch.uint8), found.contiguous().view(torch.uint8))
