"""Writing weights to safetensors files, one file at a time, comparing what was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Form:
    """Form of a tensor that is written.

    Attributes:
        source: Released name of the weight it is made of.
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

    def shape_up(self, weight: Tensor) -> Tensor:
        """Give a weight this form."""
        return weight[: self.shape[0]].to(self.dtype).contiguous()


def write_weights(
    forms: Mapping[str, Form],
    tensor: Callable[[str], Tensor],
    folder: Path,
    max_shard_size: str | int,
    progress: Progress = lambda done, total: None,
) -> int:
    """Write weights; no more than one file's are in memory at a time.

    Args:
        forms: Name in the file -> its form.
        tensor: Gives a weight by its released name.
        folder: Folder to write to.
        max_shard_size: Largest size of a file, in bytes or such as "5GB"; a larger tensor has one of its own.
        progress: Told of the tensors written and all there are.

    Returns:
        Number of files.
    """
    meta = {name: torch.empty(form.shape, dtype=form.dtype, device="meta") for name, form in forms.items()}
    split = split_torch_state_dict_into_shards(
        meta, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    done = 0
    for file, names in split.filename_to_tensors.items():
        shard = {name: forms[name].shape_up(tensor(forms[name].source)) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        del shard  # before the next one is made
        done += len(names)
        progress(done, len(forms))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return len(split.filename_to_tensors)


def compare_weights(
    forms: Mapping[str, Form], tensor: Callable[[str], Tensor], written: Callable[[str], Tensor]
) -> None:
    """Compare what is read from written files with what should be in them, bit by bit, one tensor at a time.

    Args:
        forms: Name in the file -> its form.
        tensor: Gives a weight by its released name.
        written: Gives a weight that was read back by its released name.

    Raises:
        RuntimeError: Listing those that differ.
    """
    wrong = [
        name
        for name, form in forms.items()
        if not _is_same(form.shape_up(tensor(form.source)), written(form.source)[: form.shape[0]])
    ]
    if wrong:
        raise RuntimeError(
            f"Read back, {len(wrong)} of {len(forms)} weights differ, {wrong[0]} first; is the disk whole?"
        )


def _is_same(expected: Tensor, found: Tensor) -> bool:
    """Whether two tensors have the same bits, also those that are no numbers."""
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return False
    return torch.equal(expected.view(torch.uint8), found.contiguous().view(torch.uint8))
