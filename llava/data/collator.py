"""Batches: right-padded samples with their images stacked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX, PADDING_TURN


@dataclass(frozen=True)
class SFTCollator:
    """Pad samples of ``SFTDataset`` to the longest of a batch.

    Attributes:
        pad_token_id: Token id of padding.

    Returns (from a call):
        ``input_ids``, ``labels``, ``turn_ids``, ``attention_mask`` (B, N) and, if any sample has an image,
        ``pixel_values`` (images in batch, 3, H, W) in the order of the samples; ``sample_index`` (B,), where samples
        know theirs, for messages about them.
    """

    pad_token_id: int

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = {
            key: pad_sequence([sample[key] for sample in samples], batch_first=True, padding_value=value)
            for key, value in (
                ("input_ids", self.pad_token_id),
                ("labels", IGNORE_INDEX),
                ("turn_ids", PADDING_TURN),
            )
        }
        batch["attention_mask"] = (batch["turn_ids"] != PADDING_TURN).long()
        images = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
        if images:
            batch["pixel_values"] = torch.cat(images)
        if all("sample_index" in sample for sample in samples):
            batch["sample_index"] = torch.tensor([sample["sample_index"] for sample in samples])
        return batch
