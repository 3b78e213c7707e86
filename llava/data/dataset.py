"""The training set: encoded samples with their images, their order in an epoch, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from llava.constants import IGNORE_INDEX, PADDING_TURN
from llava.conversation import get_template
from llava.data.images import open_rgb, resolve_image
from llava.data.preprocess import encode_conversation, estimate_length
from llava.data.records import DataError, RecordFile, name_record
from llava.mm_utils import process_images

MEGABATCH = 50
"""Batches that are shuffled together before being sorted by length."""


@dataclass(eq=False, repr=False)
class SFTDataset(Dataset):
    """LLaVA SFT records as tensors.

    Raises:
        RecordError: While reading a sample, naming file, index and id, if the record or one of its images is bad.
        KeyError: If the template is unknown.
    """

    data_path: str | Path  # JSON or JSON Lines file of records
    image_folder: str | Path  # image paths are relative to it and cannot leave it
    tokenizer: Any  # fast or slow
    image_processor: Any  # of CLIP
    template_name: str  # key of ``conv_templates``
    num_image_tokens: int  # positions one image takes
    image_token_id: int  # token id of an image position
    max_length: int = 2048  # longest sample in tokens, images included
    image_aspect_ratio: str = "pad"  # centres images on a square; "square" lets the processor resize

    def __post_init__(self) -> None:
        """Locate the records; samples are read when they are asked for."""
        self.records = RecordFile(self.data_path)  # offsets alone, so that copies in workers stay small
        self.template = get_template(self.template_name)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: ``input_ids``, ``labels``, ``turn_ids`` (N,), ``pixel_values`` (images, 3, H, W) or None."""
        record = self.records[index]
        image = (self.num_image_tokens, self.image_token_id)
        try:
            encoded = encode_conversation(record.turns, self.tokenizer, self.template, *image, self.max_length)
            if not encoded.num_trained:
                raise DataError(f"no answer within {self.max_length} tokens; raise --model_max_length or drop it.")
            images = [open_rgb(resolve_image(self.image_folder, name)) for name in record.images]
        except DataError as error:
            # A worker dies of it hours into a run: the message must do without the traceback.
            raise name_record(self.records.path, record.index, record.id, error) from error
        return {
            "input_ids": torch.tensor(encoded.input_ids),
            "labels": torch.tensor(encoded.labels),
            "turn_ids": torch.tensor(encoded.turn_ids),
            "pixel_values": process_images(images, self.image_processor, self) if images else None,
            "sample_index": index,  # a loss that is not finite names its samples by it
        }

    def modality_lengths(self) -> np.ndarray:
        """Rough length of every sample in tokens, negative for text-only ones, int32; nothing is parsed."""
        return np.fromiter(map(self.modality_length, range(len(self))), dtype=np.int32, count=len(self))

    def modality_length(self, index: int) -> int:
        """Rough length of one sample, see ``modality_lengths``."""
        return estimate_length(self.records.raw_bytes(index), self.num_image_tokens)


class ModalityLengthSampler(Sampler[int]):
    """A random order in which each global batch holds one modality and samples of similar length.

    Samples are shuffled, cut into megabatches, sorted by length inside each, cut into batches, and the batches are
    shuffled. What is left of each modality ends in a last, mixed batch. Works for one modality alone and for fewer
    samples than a batch.

    Args:
        lengths: Length of each sample in tokens, negative for text-only samples (LLaVA's convention).
        batch_size: Samples per global batch.
        generator: Source of randomness; its state when iteration starts decides the order.
        num_ranks: Processes that a global batch is cut up for.

    >>> sampler = ModalityLengthSampler([5, -9, 7, -2], batch_size=2, generator=torch.Generator().manual_seed(0))
    >>> sorted(sampler)
    [0, 1, 2, 3]
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        generator: torch.Generator | None = None,
        num_ranks: int = 1,
    ) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.generator = generator
        self.num_ranks = num_ranks
        self._seed = None if generator is None else generator.initial_seed()

    def set_epoch(self, epoch: int) -> None:
        """Have the next order be that of an epoch, whatever was drawn before; a run resumed in it draws the same."""
        if self.generator is not None and self._seed is not None and epoch > 0:
            self.generator.manual_seed(self._seed + epoch)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        batches: list[Tensor] = []
        rest: list[Tensor] = []
        for members in (self.lengths >= 0, self.lengths < 0):
            indices = members.nonzero().flatten()
            indices = indices[torch.randperm(len(indices), generator=self.generator)]
            # What does not fill a batch of this modality is kept for the last, mixed one.
            full = len(indices) // self.batch_size * self.batch_size
            rest.append(indices[full:])
            for megabatch in indices[:full].split(self.batch_size * MEGABATCH):
                by_length = self.lengths[megabatch].abs().argsort(descending=True, stable=True)
                batches.extend(megabatch[by_length].split(self.batch_size))
        order = torch.randperm(len(batches), generator=self.generator).tolist()
        # Ranks take equal parts of a global batch one after the other: deal its lengths out evenly among them.
        chosen = [batches[position][rank :: self.num_ranks] for position in order for rank in range(self.num_ranks)]
        yield from torch.cat([*chosen, *rest]).tolist()


@dataclass(frozen=True)
class SFTCollator:
    """Pads samples of ``SFTDataset`` on the right to the longest of a batch.

    Attributes:
        pad_token_id: Token id of padding; None, where a tokenizer has none, pads with 0, as the mask hides it.

    Returns (from a call):
        ``input_ids``, ``labels``, ``turn_ids``, ``attention_mask`` (B, N) and, if any sample has an image,
        ``pixel_values`` (images in batch, 3, H, W) in the order of the samples; ``sample_index`` (B,), where samples
        know theirs, for messages about them.

    >>> short, long = ({"input_ids": torch.arange(n), "labels": torch.arange(n), "turn_ids": torch.ones(n),
    ...                 "pixel_values": None} for n in (1, 3))
    >>> SFTCollator(pad_token_id=9)([short, long])["input_ids"].tolist()
    [[0, 9, 9], [0, 1, 2]]
    """

    pad_token_id: int | None

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        padding = {"input_ids": self.pad_token_id or 0, "labels": IGNORE_INDEX, "turn_ids": PADDING_TURN}
        batch = {
            key: pad_sequence([sample[key] for sample in samples], batch_first=True, padding_value=value)
            for key, value in padding.items()
        }
        # By turns, not by ids: the padding token may stand in a text as well.
        batch["attention_mask"] = (batch["turn_ids"] != PADDING_TURN).long()
        images = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
        if images:
            batch["pixel_values"] = torch.cat(images)
        if all("sample_index" in sample for sample in samples):
            batch["sample_index"] = torch.tensor([sample["sample_index"] for sample in samples])
        return batch
