"""Promises of batches: literal samples in, literal tensors out."""

from __future__ import annotations

import pytest
import torch

from llava.data.dataset import SFTCollator


def sample(ids: list[int], labels: list[int], turns: list[int], num_images: int = 0, value: float = 0.0) -> dict:
    pixels = torch.full((num_images, 3, 2, 2), value) if num_images else None
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "turn_ids": torch.tensor(turns),
        "pixel_values": pixels,
    }


def test_samples_are_padded_on_the_right() -> None:
    batch = SFTCollator(pad_token_id=3)(
        [sample([1, 9, 8, 2], [-100, -100, 8, 2], [0, 1, 1, 1]), sample([1, 3], [-100, 3], [1, 1])]
    )
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 9, 8, 2], [1, 3, 3, 3]],
        "labels": [[-100, -100, 8, 2], [-100, 3, -100, -100]],
        "turn_ids": [[0, 1, 1, 1], [1, 1, -1, -1]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
    }
    assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_images_are_stacked_in_the_order_of_the_samples() -> None:
    batch = SFTCollator(0)([sample([1], [1], [1], 2, 5.0), sample([1], [1], [1]), sample([1], [1], [1], 1, 7.0)])
    assert batch["pixel_values"].shape == (3, 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [5, 5, 7]


def test_a_batch_without_images_has_no_pixel_values() -> None:
    assert "pixel_values" not in SFTCollator(0)([sample([1], [1], [1])])


def test_samples_of_the_dataset_make_a_batch(sft_dataset) -> None:
    batch = SFTCollator(sft_dataset.tokenizer.pad_token_id)(list(sft_dataset))
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["pixel_values"].shape == (4, 3, 32, 32)
    assert (batch["input_ids"] == 4).sum(dim=1).tolist() == [16, 16, 0, 16, 0, 16]
    for row, original in enumerate(sft_dataset):
        length = len(original["input_ids"])
        assert torch.equal(batch["input_ids"][row, :length], original["input_ids"])
        assert batch["attention_mask"][row].sum() == length


@pytest.mark.parametrize("pad_token_id", [0, 2, 9])
def test_the_mask_is_not_misled_by_padding_ids_in_the_text(pad_token_id: int) -> None:
    batch = SFTCollator(pad_token_id)([sample([pad_token_id] * 3, [-100, 5, 5], [0, 1, 1]), sample([1], [1], [1])])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
