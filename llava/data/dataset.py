"""The training set: validated records with their images, one encoded sample at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, tensor
from torch.utils.data import Dataset

from llava.conversation import get_template
from llava.data.image_files import open_rgb
from llava.data.outlines import estimate_length
from llava.data.preprocess import encode_conversation
from llava.data.records import DataError, ImageFileError, Record, RecordError, RecordFile, resolve_image
from llava.mm_utils import process_images


class SFTDataset(Dataset):
    """LLaVA SFT records as tensors.

    Args:
        data_path: JSON or JSONL file of records.
        image_folder: Folder that image paths are relative to; they cannot leave it.
        tokenizer: Fast tokenizer.
        image_processor: CLIP image processor.
        template_name: Conversation template, a key of ``conv_templates``.
        num_image_tokens: Positions one image takes.
        image_token_id: Token id of an image position.
        max_length: Longest sample in tokens after image expansion.
        image_aspect_ratio: "pad" to centre images on a square, "square" to let the processor resize.

    Raises:
        RecordError: While reading a sample, naming file, index and id, if the record or one of its images is bad.
        KeyError: If the template is unknown.
    """

    def __init__(
        self,
        data_path: str | Path,
        image_folder: str | Path,
        tokenizer: Any,
        image_processor: Any,
        template_name: str,
        num_image_tokens: int,
        image_token_id: int,
        max_length: int = 2048,
        image_aspect_ratio: str = "pad",
    ) -> None:
        self.records = RecordFile(data_path)
        self.image_folder = Path(image_folder)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.template = get_template(template_name)
        self.num_image_tokens = num_image_tokens
        self.image_token_id = image_token_id
        self.max_length = max_length
        self.image_aspect_ratio = image_aspect_ratio

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: ``input_ids``, ``labels``, ``turn_ids`` (N,), ``pixel_values`` (images, 3, H, W) or None."""
        record = self.records[index]
        image = (self.num_image_tokens, self.image_token_id)
        try:
            encoded = encode_conversation(record.turns, self.tokenizer, self.template, *image, self.max_length)
        except DataError as error:
            raise self._error(record, str(error)) from error
        if not encoded.num_trained:
            raise self._error(
                record, f"no answer within {self.max_length} tokens; raise --model_max_length or drop the record."
            )
        return {
            "input_ids": tensor(encoded.input_ids),
            "labels": tensor(encoded.labels),
            "turn_ids": tensor(encoded.turn_ids),
            "pixel_values": self._pixel_values(record) if record.images else None,
            "sample_index": index,
        }

    def modality_lengths(self) -> np.ndarray:
        """Rough length of every sample in tokens, negative for text-only ones, int32; nothing is parsed."""
        return np.fromiter(map(self.modality_length, range(len(self))), dtype=np.int32, count=len(self))

    def modality_length(self, index: int) -> int:
        """Rough length of one sample, see ``modality_lengths``."""
        return estimate_length(self.records.raw_bytes(index), self.num_image_tokens)

    def _pixel_values(self, record: Record) -> Tensor:
        images = []
        for relative in record.images:
            try:
                images.append(open_rgb(resolve_image(self.image_folder, relative)))
            except ImageFileError as error:
                raise self._error(record, str(error)) from error
        return process_images(images, self.image_processor, self)

    def _error(self, record: Record, problem: str) -> RecordError:
        return RecordError(f"{self.records.path}: record {record.index} (id {record.id!r}): {problem}")
